"Objectives: fast against slow, gradients, equal footing, training on DeepSpeed, and what is refused."

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import ranks
from faithful_distill.files import BadInput
from faithful_distill.jsonl import read_jsonl
from faithful_distill.records import Rationale
from faithful_distill.student.answers import answer
from faithful_distill.student.examples import (
    ReadRow,
    collate_examples,
    count_rows,
    example_lengths,
    reference_objective,
    token_counts,
    token_totals,
    training_examples,
)
from faithful_distill.student.loss import (
    LossWeights,
    distillation_loss,
    learned_logits,
    registry,
    student_logits,
    target_log_probs,
)
from faithful_distill.student.model import add_tags, load_student, task_tags, tiny_student
from faithful_distill.student.objectives import consistency_terms, margin_terms, reference_consistency
from faithful_distill.training.settings import Settings
from faithful_distill.training.train import train_student
from faithful_distill.training.trainer import StepBatches

slow = pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="trains many students: set FAITHFUL_DISTILL_SLOW=1"
)
ours = ["factual", "counterfactual", "margin", "consistency", "counterfactual+consistency", "multitask"]
paired = ["margin", "consistency", "counterfactual+consistency"]
beaver = ("1", "What does a beaver build ?", ("a dam", "a bank", "a nest"), 0)
money = ("2", "Where is money kept ?", ("bank", "river", "bank", "under the bed"), 2)
penguin = ("3", "Can a penguin fly ?", ("yes", "no"), 1)
told = [
    Rationale(*beaver, "Beavers cut wood ."),
    Rationale(*beaver, "Coins are safe with it .", target=1),
    Rationale(*money, "Safe ."),
    Rationale(*penguin, "Its wings are too small to carry it ."),
    Rationale(*beaver, "It stops rivers with it ."),
    Rationale(*penguin, "It is a bird .", target=0),
    Rationale(*penguin, "It cannot ."),
    Rationale(*penguin, "Its wings are small ."),
]
words = [text for r in told for text in (r.question, *r.choices, r.rationale)]


def with_tags(student):
    add_tags(student.model, student.tokenizer, task_tags)
    return student


@pytest.fixture(scope="module", params=["t5", "llama"])
def student(request):
    return with_tags(tiny_student(words, request.param))


def loss_of(student, batch, objective, forward=learned_logits, **how):
    logits = forward(student.model, batch)
    marks = batch.get("marks")
    return logits, distillation_loss(
        logits, batch["labels"], batch["counterfactual"], objective=objective, marks=marks, **how
    )


def gradients(student, *losses):
    student.model.zero_grad()
    for loss in losses:
        loss.total.backward()
    found = [p.grad.clone() for p in student.model.parameters() if p.grad is not None]
    student.model.zero_grad()
    return found


@pytest.mark.parametrize("reduction", ["per_part", "per_token"])
@pytest.mark.parametrize("objective", ours)
def test_one_forward_pass_is_the_loss_of_each_row_read_alone(student, objective, reduction):
    weights = LossWeights(alpha_cf=0.3, reduction=reduction, beta=0.7, margin=0.2, gamma=3.0)
    examples = training_examples(student, told, objective)
    _, loss = loss_of(student, collate_examples(examples, student), objective, **vars(weights))
    assert float(loss.total.detach()) == pytest.approx(
        reference_objective(student, examples, objective, weights), rel=1e-5
    )


@pytest.mark.parametrize("objective", ours)
def test_micro_batches_add_up_with_the_counts_of_the_step(student, objective):
    "Loss and gradients of each example alone, one of them without any pair, add up to those of all."
    examples = [*training_examples(student, told, objective), []]
    whole, each = collate_examples(examples, student), [collate_examples([e], student) for e in examples]
    totals = sum(token_counts(batch) for batch in each)
    assert totals.tolist() == token_counts(whole).tolist() == token_totals(examples[:-1])
    at_once = loss_of(student, whole, objective)[1]
    parts = [loss_of(student, batch, objective, totals=totals)[1] for batch in each]
    assert sum(float(p.total.detach()) for p in parts) == pytest.approx(
        float(at_once.total.detach()), rel=1e-5
    )
    assert sum(p.pairs for p in parts) == at_once.pairs == (0 if objective not in paired else at_once.pairs)
    for a, b in zip(gradients(student, at_once), gradients(student, *parts), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("objective", paired)
def test_reasons_that_are_only_read_get_no_gradient(student, objective):
    "Neither do padding, questions and tags; and the head of learned positions alone gives the same gradients."
    batch = collate_examples(training_examples(student, told, objective), student)
    logits, loss = loss_of(student, batch, objective, forward=student_logits)
    logits.retain_grad()
    every = gradients(student, loss)
    learned = batch["labels"] != -100
    assert (logits.grad[~learned] == 0).all() and logits.grad[learned].any()
    for a, b in zip(every, gradients(student, loss_of(student, batch, objective)[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_margin_falls_as_the_right_answer_gains_under_the_right_reason(student):
    """A small step along the gradient of the margin term alone moves the difference of log-likelihoods up, and with
    the sign turned round (as in the code that its authors released) it would move down.
    """
    import copy

    examples = training_examples(student, told[:2], "margin")
    own, read = examples[0]

    def difference(model):
        right, wrong = (target_log_probs(model, row)[-row.answer :].sum() for row in (own, read))
        return right - wrong

    batch, moved = collate_examples(examples, student), copy.copy(student)
    moved.model = copy.deepcopy(student.model)
    how = dict(objective="margin", marks=batch["marks"], margin=50.0)
    logits = learned_logits(moved.model, batch)
    with_term = distillation_loss(logits, batch["labels"], batch["counterfactual"], beta=1.0, **how).total
    without = distillation_loss(logits, batch["labels"], batch["counterfactual"], beta=1e-9, **how).total
    (with_term - without).backward()
    before = float(difference(moved).detach())
    with torch.no_grad():
        for p in moved.model.parameters():
            p -= 1e-3 * p.grad if p.grad is not None else 0
    assert float(difference(moved).detach()) > before + 1e-4
    expected = 50.0 - before  # beta times the hinge, which is not yet at its floor
    assert float((with_term - without).detach()) == pytest.approx(expected, rel=1e-4)


@given(st.floats(-9, 0), st.floats(-9, 0), st.floats(0.1, 5), st.floats(0.01, 1))
def test_the_margin_term_moves_as_its_equation_says(right, wrong, margin, more):
    term = lambda a, b: float(margin_terms(torch.tensor([[[a], [b]]], dtype=torch.float64), margin))
    assert term(right, wrong) == pytest.approx(max(0.0, margin - (right - wrong)))
    assert term(right + more, wrong) <= term(right, wrong) <= term(right, wrong + more)
    assert term(right, right - margin - 0.001) == 0 < term(right, right)


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=2, max_size=5), st.integers(0, 3))
def test_consistency_is_the_slow_sum_and_never_negative(choices, padding):
    a, b = zip(*choices)
    padded = [[*side, *[-math.inf] * padding] for side in (a, b)]
    found = float(consistency_terms(torch.tensor([padded], dtype=torch.float64)))
    assert found == pytest.approx(reference_consistency([(a, b)]), abs=1e-9) and found >= 0
    assert float(consistency_terms(torch.tensor([[padded[0]] * 2]))) == 0


def test_pairs_are_of_one_question_and_of_two_texts():
    student = tiny_student(words)
    examples = training_examples(student, told, "consistency")
    reads = [sum(isinstance(row, ReadRow) for row in e) for e in examples]
    assert reads == [
        5,
        0,
        3,
        0,
        3,
        0,
    ]  # 2K - 1: with the beaver's other reason; three of the penguin's, in a chain
    again = training_examples(student, [told[0], told[0]], "consistency")
    assert all(len(e) == 1 for e in again)  # the same words twice are no pair
    wrong = training_examples(student, told, "margin")
    assert [sum(isinstance(row, ReadRow) for row in e) for e in wrong] == [
        0,
        0,
        0,
        1,
        0,
        1,
    ]  # where its row would be
    rows = [row for e in wrong for row in e if isinstance(row, ReadRow)]
    text = student.tokenizer.decode(rows[0].context)
    assert text == "[factual] Coins are safe with it . So the answer is"
    assert student.tokenizer.decode(rows[0].target, skip_special_tokens=True).strip() == "a dam"
    assert count_rows(wrong) == dict(factual=6, counterfactual=0, shortened=0, pairs=2, reads=2)


def test_smoothed_labels_are_no_part_of_what_is_compared():
    student = tiny_student(words)
    batch = collate_examples(training_examples(student, told, "margin"), student)
    plain, smooth = (loss_of(student, batch, "margin", label_smoothing=e)[1] for e in (0.0, 0.2))
    assert float(plain.pair_terms) == pytest.approx(float(smooth.pair_terms), rel=1e-6)
    assert float(plain.factual) != pytest.approx(float(smooth.factual), rel=1e-3)


def test_all_objectives_take_the_same_gold_rationales_in_the_same_steps():
    "And teach the same factual tokens; the two tasks have one end of text more each."
    student = with_tags(tiny_student(words))
    plans, taught = {}, {}
    for objective in ours:
        examples = training_examples(student, told, objective)
        plans[objective] = [StepBatches(example_lengths(examples), 2, seed=3).plan(epoch) for epoch in (0, 1)]
        taught[objective] = token_totals(examples)[0]
    assert all(plan == plans["factual"] for plan in plans.values())
    assert {taught[o] for o in ours if o != "multitask"} == {taught["factual"]}
    assert taught["multitask"] == taught["factual"] + 6


def records(second=True):
    "The rationales of the tests of several processes, three of the questions with another right one."
    gold = [r for r in ranks.records() if r["role"] == "gold"]
    more = [dict(r, rationale="some " + r["rationale"]) for r in gold[:3]]
    return ranks.records() + (more if second else [])


def train(out, objective, kind="t5", **more):
    base = tiny_student(
        [f"{r['question']} {r['rationale']}" for r in records()] + ranks.choices, kind, width=16
    )
    how = dict(max_steps=3, batch_size=4, lr=1e-2, log_every=1, warmup=0, deepspeed=ranks.stage_config(2))
    return train_student(base, records(), out=out, objective=objective, **how | more)


def history(folder):
    return [row for _, row in read_jsonl(Path(folder) / "metrics.jsonl")]


@pytest.mark.parametrize(
    "objective",
    [pytest.param("margin", marks=slow), "counterfactual+consistency", pytest.param("multitask", marks=slow)],
)
def test_accumulation_changes_nothing(tmp_path, objective):
    "And dev data have the loss of the objective; what it cost, and what it was, stands in the note and on the card."
    whole = train(tmp_path / "1", objective, dev=records())
    parts = train(tmp_path / "4", objective, dev=records(), accumulation=4)
    for want, got in zip(history(whole.out), history(parts.out), strict=True):
        assert got == ranks.log_row(want)
    trained = load_student(whole.out)
    examples, weights = (
        training_examples(trained, records(), objective),
        LossWeights(reduction=Settings().reduction),
    )
    evaluated = [row for row in history(whole.out) if "eval_loss" in row][-1]
    assert evaluated["eval_loss"] == pytest.approx(
        reference_objective(trained, examples, objective, weights), rel=1e-3
    )
    assert ("loss_pairs" in history(whole.out)[0]) == (objective in paired)
    note = json.loads((whole.out / "student.json").read_text())
    assert note["objective"] == objective == trained.settings["objective"]
    assert whole.cost | note["cost"] == whole.cost == train(tmp_path / "1", objective, dev=records()).cost
    assert note["cost"].items() <= parts.cost.items() and whole.cost["processor_seconds"] > 0
    card = (whole.out / "README.md").read_text()
    assert f"| objective | {objective} |" in card
    assert ("| gamma |" in card) == ("gamma" in registry[objective].uses)


class Broken(Exception):
    pass


def breaking(at):
    from transformers import TrainerCallback

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == at:
                raise Broken

    return Break()


@pytest.mark.parametrize(
    "objective", [pytest.param(o, marks=slow) if o != "counterfactual+consistency" else o for o in ours]
)
def test_a_run_that_is_resumed_ends_in_the_same_bytes(tmp_path, objective):
    more = dict(save_every=1, batch_size=3, max_steps=4)
    whole = train(tmp_path / "whole", objective, **more).out
    with pytest.raises(Broken):
        train(tmp_path / "broken", objective, callbacks=[breaking(3)], **more)
    resumed = train(tmp_path / "broken", objective, **more).out
    for name in ("model.safetensors", "metrics.jsonl", "student.json", "README.md"):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    from test_training import launch

    folder = tmp_path_factory.mktemp("objectives")
    launch(2, "objective_ranks.py", folder, timeout=900)
    return folder


on_two_ranks = [(o, "t5", stage) for o in ours if o != "counterfactual" for stage in (0, 1, 2, 3)]
on_two_ranks += [(o, "llama", stage) for o in ours if o != "counterfactual" for stage in (2, 3)]


@slow
@pytest.mark.parametrize("objective, kind, stage", on_two_ranks)
def test_two_ranks_train_as_one(two_ranks, tmp_path, objective, kind, stage):
    want = history(train(tmp_path, objective, kind).out)
    got = history(two_ranks / f"{objective}-{kind}-{stage}")
    assert len(want) == len(got) == 3
    for a, b in zip(want, got):
        assert b == ranks.log_row(a)


@slow
def test_a_student_of_two_tasks_answers_without_a_reason(tmp_path):
    "Asked with [label] it answers at once; asked with [rationale] it gives the reason, and no answer."
    result = train(tmp_path, "multitask", max_steps=150)
    trained = result.student
    assert trained.prefix == "label" and not trained.writes_rationales
    questions = [r.as_question() for r in ranks.rationales() if r.role == "gold"]
    answers = answer(trained, questions)
    assert [a.choice for a in answers] == [q.answer for q in questions] and not any(
        a.rationale for a in answers
    )
    [explained] = answer(trained, questions[:1], prefix="rationale")
    assert "gathers" in explained.rationale and explained.choice is None


def test_a_dry_run_counts_what_training_reads(tmp_path):
    "Rows that are only read too; and the largest forward pass is the one that training makes."
    from faithful_distill.records import read_records
    from faithful_distill.training.sizing import dry_run, meta_student, reading_need
    from faithful_distill.training.train import used_rationales

    asked = dict(objective="consistency", max_steps=2, batch_size=4)
    cost = train_student(ranks.base(), records(), out=tmp_path / "out", **asked).cost
    settings = Settings(**asked)
    shell = meta_student(ranks.base(), settings)
    need = reading_need(shell, used_rationales(read_records(records()), settings), settings, 2)
    read = [need[name] for name in ("rows_read", "tokens_read")]
    assert read == [cost[name] for name in ("rows_read", "tokens_read")] and shell.model.device.type == "meta"
    said = dry_run(ranks.base(), records(), **asked)
    assert "{:,} rows of {:,} tokens".format(*read) in said
    assert "{rows_at_once:,} rows of {tokens_at_once:,} tokens with padding".format(**need) in said
    assert "is not counted" in dry_run("google-t5/t5-3b", records(), **asked)


@pytest.mark.parametrize(
    "match, given",
    [
        ("two different gold rationales", dict(objective="consistency", records=records(second=False))),
        (
            "a gold and a counterfactual",
            dict(objective="margin", records=[r for r in records() if r["role"] == "gold"]),
        ),
        ("Did you mean 'margin'", dict(objective="margins")),
        ("'beta': is no part of the objective 'consistency'", dict(objective="consistency", beta=2.0)),
        ("'answer_only': conflicts", dict(objective="margin", answer_only=True)),
        ("'prefixes': conflicts", dict(objective="multitask", prefixes="random")),
    ],
)
def test_what_an_objective_lacks_is_one_line_before_training(tmp_path, match, given):
    given = dict(given)
    with pytest.raises(BadInput, match=match) as e:
        train_student(ranks.base(), given.pop("records", records()), out=tmp_path / "out", **given)
    assert "\n" not in str(e.value) and not list((tmp_path / "out").glob("*"))


def test_the_command_line_takes_an_objective_and_no_method_beside_it(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    file = tmp_path / "gold.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ranks.records() if r["role"] == "gold"))
    call = ["train", "--rationales", str(file), "--out", str(tmp_path / "out"), "--objective", "margin"]
    lacking = CliRunner().invoke(main, call)
    assert lacking.exit_code and "a gold and a counterfactual rationale" in lacking.output + str(
        lacking.exception
    )
    both = CliRunner().invoke(main, [*call, "--method", "factual"])
    assert both.exit_code and "conflicts with --objective" in both.output + str(both.exception)
    assert Settings(objective="margin", beta=2.0).beta == 2.0
