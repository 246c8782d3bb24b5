"The student against slow and independent ways of doing the same."

import copy
import math
import random
import types
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.world import world_questions
from faithful_distill.progress import progress
from faithful_distill.questions import Question, match_choice
from faithful_distill.sources import load_questions
from faithful_distill.student import answers
from faithful_distill.student.answers import (
    answer,
    choice_tails,
    explain,
    read_answers,
    split_answer,
    write_rationales,
)
from faithful_distill.records import Rationale
from faithful_distill.student.decoding import read_distinct, stacked
from faithful_distill.student.loss import (
    Objective,
    check_needs,
    combine,
    distillation_loss,
    find_objective,
    reference_loss,
    register_objective,
    registry,
    student_logits,
    target_log_probs,
)
from faithful_distill.student.model import Student, add_tags, expresses, load_student, tag_of, tiny_student
from faithful_distill.student.rows import (
    Row,
    collate,
    encode_sources,
    encode_targets,
    examples_of,
    row_prefix,
    source_text,
    target_text,
    token_pieces,
    training_rows,
)

questions = [
    Question("1", "What does a beaver build ?", ("a dam", "a bank", "a nest"), 0),
    Question("2", "Where is money kept ?", ("bank", "river", "bank", "under the bed"), 2),
    Question("3", "Can a penguin fly ?", ("yes", "no"), 1, kind="boolean"),
]
reasons = ["Beavers cut wood and stop rivers with it .", "Safe .", "Its wings are too small to carry it ."]
vocabulary = [q.question for q in questions] + [c for q in questions for c in q.choices] + reasons
kinds = ["t5", "llama", "gpt_neox", "qwen2", "gpt2"]


def record(q, target, rationale, **more):
    return dict(
        id=q.id,
        question=q.question,
        choices=list(q.choices),
        answer=q.answer,
        kind=q.kind,
        target=target,
        role="gold" if target == q.answer else "counterfactual",
        rationale=rationale,
        **more,
    )


def rows_of(student):
    return training_rows(
        student,
        [record(q, q.answer, r) for q, r in zip(questions, reasons)]
        + [record(q, (q.answer + 1) % 2, r) for q, r in zip(questions, reasons[::-1])],
    )


@pytest.fixture(scope="module", params=kinds)
def student(request):
    return tiny_student(vocabulary, request.param)


def test_one_forward_equals_one_row_at_a_time(student):
    "Padding and other rows change no row: summed losses and gradients of a batch are those of its rows alone."
    rows = rows_of(student)
    batch = collate(rows, student)
    whole = distillation_loss(student_logits(student.model, batch), batch["labels"], batch["counterfactual"])
    student.model.zero_grad()
    whole.total.backward()
    together = [p.grad.clone() for p in student.model.parameters() if p.grad is not None]
    student.model.zero_grad()
    totals = (whole.tokens_factual, whole.tokens_counterfactual)
    alone = 0
    for row in rows:
        one = collate([row], student)
        loss = distillation_loss(
            student_logits(student.model, one), one["labels"], one["counterfactual"], totals=totals
        )
        loss.total.backward()
        alone += float(loss.total.detach())
    assert alone == pytest.approx(float(whole.total.detach()), rel=1e-5)
    for a, p in zip(together, [p for p in student.model.parameters() if p.grad is not None]):
        assert torch.allclose(a, p.grad, atol=1e-6)
    student.model.zero_grad()


def test_loss_is_the_slow_sum_over_tokens(student):
    "Token by token with plain log-softmax, from the rows' own ids."
    rows = rows_of(student)
    batch = collate(rows, student)
    loss = distillation_loss(student_logits(student.model, batch), batch["labels"], batch["counterfactual"])
    sums = {False: 0.0, True: 0.0}
    for row in rows:
        written = row.context + row.target
        for i in range(len(row.context), len(written)):
            if student.is_seq2seq:
                logits = student.model(
                    input_ids=torch.tensor([row.source]),
                    decoder_input_ids=torch.tensor([[student.start, *written[:i]]]),
                ).logits
            else:
                logits = student.model(input_ids=torch.tensor([row.source + written[:i]])).logits
            sums[row.counterfactual] -= float(logits[0, -1].log_softmax(-1)[written[i]])
    assert float(loss.factual) == pytest.approx(sums[False], rel=1e-4)
    assert float(loss.counterfactual) == pytest.approx(sums[True], rel=1e-4)
    assert int(loss.tokens_factual) == sum(len(r.target) for r in rows if not r.counterfactual)


@pytest.mark.parametrize("reduction", ["per_part", "per_token"])
@pytest.mark.parametrize("alpha_cf", [0.0, 0.3, 1.0])
def test_loss_is_that_of_one_row_at_a_time(student, alpha_cf, reduction):
    rows = rows_of(student)
    batch = collate(rows, student)
    logits = student_logits(student.model, batch)
    how = dict(alpha_cf=alpha_cf, reduction=reduction)
    fast = distillation_loss(logits, batch["labels"], batch["counterfactual"], **how).total
    with torch.no_grad():
        slow = reference_loss(rows, lambda row: target_log_probs(student, row), **how)
    assert float(fast.detach()) == pytest.approx(slow, rel=1e-5)


def test_rationales_of_counterfactual_rows_get_exactly_zero_gradient(student):
    batch = collate(rows_of(student), student)
    logits = student_logits(student.model, batch)
    logits.retain_grad()
    for reduction in ("per_part", "per_token"):
        logits.grad = None
        distillation_loss(
            logits, batch["labels"], batch["counterfactual"], reduction=reduction
        ).total.backward(retain_graph=True)
        learned = batch["labels"] != -100
        assert (logits.grad[~learned] == 0).all() and (logits.grad[learned] != 0).any(-1).all()
    student.model.zero_grad()


@given(st.floats(0, 0.99), st.lists(st.tuples(st.floats(0, 9), st.booleans()), min_size=1, max_size=9))
def test_combine_weighs_tokens_as_written(alpha, tokens):
    f, c = [l for l, side in tokens if not side], [l for l, side in tokens if side]
    mean = lambda x: sum(x) / len(x) if x else 0.0
    assert combine(sum(f), sum(c), len(f), len(c), alpha, "per_part") == pytest.approx(
        (1 - alpha) * mean(f) + alpha * mean(c)
    )
    weight = (1 - alpha) * len(f) + alpha * len(c)
    if weight >= 1:
        assert combine(sum(f), sum(c), len(f), len(c), alpha, "per_token") == pytest.approx(
            ((1 - alpha) * sum(f) + alpha * sum(c)) / weight
        )


def test_an_objective_is_known_by_its_name_and_refused_without_its_rows():
    gold, wrong = (Rationale("1", "Is it ?", ("a", "b"), 0, "so .", target=target) for target in (0, 1))
    other = Rationale("2", "Is it ?", ("a", "b"), 0, "so .", target=1)
    pairs = Objective("pairs_toy", ("pairs",), lambda tokens, weights: tokens.nll.sum())
    register_objective(pairs)
    try:
        assert find_objective("pairs_toy") is pairs
        check_needs(pairs, [gold, wrong])
        with pytest.raises(BadInput, match="needs questions with a gold and a counterfactual rationale"):
            check_needs(pairs, [gold, other])
        with pytest.raises(BadInput, match="is registered already"):
            register_objective(Objective("pairs_toy", ("pairs",), max))
        with pytest.raises(BadInput, match="is registered already"):
            register_objective(replace(pairs, rows="choice_reads"))
        assert register_objective(pairs) is pairs  # a cell that is run again
    finally:
        del registry["pairs_toy"]
    with pytest.raises(BadInput, match="is not an objective"):
        find_objective("pairs_toy")
    own, foreign = (
        find_objective("factual"),
        types.FunctionType((lambda: 0).__code__, {"__name__": "elsewhere"}),
    )
    foreign.__qualname__ = own.compute.__qualname__
    with pytest.raises(BadInput, match="is registered already"):
        register_objective(replace(own, compute=foreign))
    on_its_page = types.FunctionType(own.compute.__code__, {"__name__": "__main__"})
    on_its_page.__qualname__ = own.compute.__qualname__
    assert register_objective(replace(own, compute=on_its_page)).name == "factual"
    register_objective(own)
    with pytest.raises(BadInput, match="must be one of gold, counterfactual, pairs"):
        register_objective(Objective("silver_toy", ("silver",), print))
    assert list(registry)[:2] == ["factual", "counterfactual"]


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 99))
def test_micro_batches_of_an_objective_add_up(flags, seed):
    draw = torch.Generator().manual_seed(seed)
    logits, flags = torch.randn(len(flags), 3, 5, generator=draw), torch.tensor(flags)
    labels = torch.randint(0, 5, (len(flags), 3), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < 0.3] = -100
    for objective in ("factual", "counterfactual"):
        whole = distillation_loss(logits, labels, flags, objective=objective)
        how = dict(objective=objective, totals=(whole.tokens_factual, whole.tokens_counterfactual))
        each = [distillation_loss(logits[[i]], labels[[i]], flags[[i]], **how) for i in range(len(flags))]
        assert sum(float(part.total) for part in each) == pytest.approx(float(whole.total), abs=1e-5)


def slow_answer(student, q, rationale, prefix):
    "Batch 1, no cache: the words after the rationale, one forward pass per token."
    source = encode_sources(student, [q], [prefix])[0]
    [t] = encode_targets(student, [q], [0], [rationale], [prefix])
    written = t.before_answer
    begin = len(written)
    for _ in range(12):
        if student.is_seq2seq:
            logits = student.model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[student.start, *written]])
            ).logits
        else:
            logits = student.model(input_ids=torch.tensor([source + written])).logits
        token = int(logits[0, -1].argmax())
        if token == student.eos:
            break
        written.append(token)
    return student.tokenizer.decode(written[begin:], skip_special_tokens=True)


@pytest.mark.parametrize("prefix", ["factual", "counterfactual", "none"])
def test_batched_answers_are_those_of_a_slow_loop(student, prefix):
    many, why = questions * 3, (reasons + reasons[1:] + reasons[:1] + ["", "", ""])
    batched = answer(student, many, why, prefix=prefix, batch_size=5)
    for q, r, a in zip(many, why, batched, strict=True):
        slow = slow_answer(student, q, r, prefix)
        assert slow.startswith(a.text) and a.rationale == r and a.id == q.id
    assert any(a.text for a in batched)


def test_own_rationales_are_those_of_generate(student):
    "The greedy loop, with its cache and with rows that leave, against `transformers.generate` at batch 1."
    sources = encode_sources(student, questions, ["factual"] * 3)
    with torch.no_grad():
        read = read_distinct(student, sources)
        found = write_rationales(
            student, read and stacked([read[tuple(s)] for s in sources]), sources, [None] * 3, "factual", 10
        )
    tag = student.tokenizer("[factual]", add_special_tokens=False)["input_ids"]
    for source, (text, _, _) in zip(sources, found):
        if student.is_seq2seq:
            ids = student.model.generate(
                torch.tensor([source]),
                decoder_input_ids=torch.tensor([[student.start, *tag]]),
                max_new_tokens=10,
                do_sample=False,
            )[0][1 + len(tag) :]
        else:
            ids = student.model.generate(torch.tensor([source + tag]), max_new_tokens=10, do_sample=False)[0][
                len(source) + len(tag) :
            ]
        assert student.tokenizer.decode(ids, skip_special_tokens=True).strip().startswith(text)
    assert any(text for text, _, _ in found)


def test_after_an_error_the_model_trains_on_and_no_bar_is_left(monkeypatch):
    from faithful_distill.student import answers

    student, bars = tiny_student(["is it so ?"]), []
    student.model.train()
    torch.nn.init.constant_(student.model.lm_head.weight, math.nan)
    opened = lambda **about: bars.append(progress(**about)) or bars[0]
    monkeypatch.setattr(answers, "progress", opened)
    monkeypatch.setenv("FAITHFUL_DISTILL_PROGRESS", "1")
    with pytest.raises(BadInput, match="not finite"):
        answer(student, [Question("1", "Is it ?", ("so", "is"), 0)], ["it is so ."])
    assert student.model.training and bars[0].disable  # what a closed bar is


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_another_default_precision_changes_no_answer(kind):
    student = tiny_student(["what is a cat dog house ? because it is"], kind)
    asked = [Question("1", "What is it ?", ("a cat", "a dog house"), 0)], ["because it is"]
    want = answer(student, *asked)
    torch.set_default_dtype(torch.float64)
    try:
        assert answer(student, *asked) == want
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_live_elsewhere_answer_alike(student):
    from accelerate import cpu_offload

    want, away = answer(student, questions, reasons), replace(student, model=copy.deepcopy(student.model))
    cpu_offload(away.model, execution_device=torch.device("cpu"))
    assert away.model.device.type == "meta"
    for a, b in zip(answer(away, questions, reasons), want, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-4) and a.choice == b.choice


def test_a_seeded_model_leaves_all_random_states_alone(monkeypatch):
    "Those of GPUs too, which are not restored: they must not be seeded."
    from faithful_distill.faithfulness.late_interaction import scratch_base

    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("GPUs are seeded"))
    before = torch.get_rng_state()
    a, b = (tiny_student(["is it ?"], seed=7).model.get_input_embeddings().weight for _ in "ab")
    scratch_base(["is it ?"] * 9, 300).fresh(3)
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


def test_batch_size_and_order_change_nothing(student):
    mixed = [None, reasons[1], None]
    reference = answer(student, questions, mixed, max_new_tokens=8)
    for size in (1, 2):
        backwards = answer(student, questions[::-1], mixed[::-1], batch_size=size, max_new_tokens=8)[::-1]
        for a, b in zip(reference, backwards):
            assert (a.id, a.rationale, a.text, a.choice) == (
                b.id,
                b.rationale,
                b.text,
                b.choice,
            ) and a.scores == pytest.approx(b.scores, abs=1e-4)


def plain_answer(student, q, rationale, limit):
    "One question by `generate` and one forward pass per choice: (answer words, choice, scores)."
    source = torch.tensor(encode_sources(student, [q], ["factual"]))

    def written_after(ids, n):
        given = dict(decoder_input_ids=torch.tensor([ids]), max_new_tokens=n, do_sample=False)
        return student.model.generate(source, **given)[0, len(ids) :]

    concluded = True
    if rationale is None:
        [t] = encode_targets(student, [q], [0], [""], ["factual"])
        text = student.tokenizer.decode(
            written_after([student.start, *t.tag], limit), skip_special_tokens=True
        )
        rationale, sentence, _ = text.rpartition("So the answer is")
        rationale, concluded = (rationale, True) if sentence else (text, False)
    [t] = encode_targets(student, [q], [0], [rationale], ["factual"])
    ids, [tails] = [student.start, *t.tag, *t.rationale, *t.sentence], choice_tails(student, [q])
    written = written_after(ids, max(map(len, tails)) + 4)
    text = student.tokenizer.decode(written, skip_special_tokens=True).strip() if concluded else ""
    scores = []
    for tail in tails:
        logits = student.model(input_ids=source, decoder_input_ids=torch.tensor([ids + tail[:-1]])).logits
        scores.append(float(logits[0, -len(tail) :].log_softmax(-1)[range(len(tail)), tail].sum()))
    ended = concluded and student.eos in written.tolist()
    return text, match_choice(q, text) if ended else None, scores


def test_a_trained_student_is_read_as_one_question_at_a_time_is(monkeypatch):
    """Answers that name choices and answers that do not: words, choice and scores are those of `generate` and of
    one forward pass per choice, and only answers that name none are written out."""
    trained = load_student(shipped("data", "models", "student"), device="cpu")
    asked = [q for kind in ("choice", "boolean") for q in world_questions(kind, "test", limit=12)]
    unseen = [replace(q, id=f"{q.id}-odd", choices=("the moon", *q.choices[1:]), answer=0) for q in asked[:6]]
    asked += unseen
    why = [None if i % 3 else " ".join(reversed(q.question.split())) for i, q in enumerate(asked)]
    limits_of_calls, greedy_continue = [], answers.greedy_continue

    def watched(batch, limits):
        limits_of_calls.append(limits)
        return greedy_continue(batch, limits)

    monkeypatch.setattr(answers, "greedy_continue", watched)
    batched = answer(trained, asked, why, batch_size=7, max_new_tokens=40)
    with torch.no_grad():
        slow = [plain_answer(trained, q, r, 40) for q, r in zip(asked, why)]
    for a, (text, choice, scores) in zip(batched, slow, strict=True):
        assert (a.choice, a.scores) == (choice, pytest.approx(scores, abs=1e-4))
        if choice is not None:
            assert a.text == text
    written_out = sum(len(limits) for limits in limits_of_calls if max(limits) < 40)  # 40: rationales
    named = sum(a.choice is not None and a.text == q.choices[a.choice] for q, a in zip(asked, batched))
    assert 0 < named <= len(asked) - written_out < len(asked)


def test_what_ids_decide_is_not_matched_by_text_again(monkeypatch):
    "A tokenizer that normalises (as T5's and mT5's do) does not give a choice back as it is written."
    from tokenizers import normalizers

    q = Question("1", "How much sugar goes in ?", ("½ cup", "CO₂", "café"), 0)
    student = tiny_student([q.question, "1⁄2 cup CO2 café"])
    student.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    sources = encode_sources(student, [q], ["factual"])
    with torch.no_grad():
        encoded = stacked([read_distinct(student, sources)[tuple(sources[0])]])
        for greedy in range(3):
            monkeypatch.setattr(answers, "choice_scores", lambda batch, tails: ([[0.0] * 3], [greedy]))
            [a] = read_answers(student, [q], encoded, sources, ["it did"], "factual")
            assert a.choice == greedy, (a.text, a.choice)
    assert a.text == "café"


def byte_level_with_specials(texts):
    tokenizer = byte_level(texts)
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|im_end|>", "<extra_id_0>"]))
    return tokenizer


specials = ("</s>", "<pad>", "<|im_end|>", "<extra_id_0>", "<|endoftext|>")


@pytest.mark.parametrize("make", ["words", "byte_level", "byte_level_with_specials", "sentence_pieces"])
def test_what_is_spelled_like_a_special_token_is_read_as_text(make):
    "In questions, choices, rationales: no end and no padding comes from data, in training or in answering."
    student = tiny_student(["What is it ? a bird fish First . Then more ."])
    student = types.SimpleNamespace(
        tokenizer=student.tokenizer if make == "words" else globals()[make](vocabulary),
        model=student.model,
        name="s",
        max_source=400,
        max_target=400,
        is_seq2seq=True,
        settings={},
        affixes=([], [1]),
    )
    student.eos = student.tokenizer.eos_token_id
    held = " ".join(specials)
    q = Question("1", f"What is {held} it ?", (f"a {held} bird", "a fish"), 0)
    control = set(student.tokenizer.all_special_ids) - {student.tokenizer.unk_token_id}
    for prefix in ("factual", "none"):
        [target] = encode_targets(student, [q], [0], [f"First . {held} Then more ."], [prefix])
        assert control.isdisjoint(target.rationale + target.sentence + target.answer[:-1])
        assert target.answer[-1] == student.eos and len(target.rationale) > 5
        if make.startswith("byte_level"):  # every text can be written, so it is written as it is
            written = student.tokenizer.decode(target.rationale, clean_up_tokenization_spaces=False)
            assert written.strip() == f"First . {held} Then more ."
        pieces = token_pieces(student.tokenizer, [[tag_of(prefix), q.question, *q.choices]])[0]
        assert control.isdisjoint(sum(pieces, []))


def test_no_target_ends_because_of_its_data():
    words = "What does a bird build ? a nest a hive it gathers straw ."
    records = [
        dict(
            id="1", question="What does a bird build ?", choices=["a nest </s>", "a hive"], answer=0, target=t
        )
        for t in (0, 1)
    ]
    records = [dict(r, rationale="it gathers </s> straw . </s>") for r in records]
    for kind in ("t5", "llama"):
        student = tiny_student([words], kind)
        for row in training_rows(student, records):
            assert row.target.index(student.eos) == len(row.target) - 1 and student.eos not in row.context
            assert student.eos not in row.source[: len(row.source) - len(student.affixes[1])]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_tag_is_learned_and_choices_are_left_out_where_the_settings_say_so(kind):
    records = [
        dict(
            id="1",
            question="Can a bird fly ?",
            choices=("yes", "no"),
            answer=0,
            target=t,
            kind="boolean",
            rationale="it has wings .",
        )
        for t in (0, 1)
    ]
    student = tiny_student(["Can a bird fly ? it has wings . yes no"], kind)
    [plain, wrong], [learned, wrong_too] = (
        training_rows(student, records, learn_tag=x) for x in (False, True)
    )
    tag = student.tokenizer("[factual]", add_special_tokens=False)["input_ids"]
    assert plain.context == tag and learned.context == [] and learned.target == tag + plain.target
    assert wrong == wrong_too and learned.source == plain.source
    batch = collate([learned, wrong], student)
    first = batch["labels"][0][batch["labels"][0] != -100]
    assert first.tolist() == learned.target
    bare = copy.copy(student)
    bare.settings = dict(list_choices=False)
    q = Question("1", "Can a bird fly ?", ("yes", "no"), 0, "boolean")
    with_choices, without = (encode_sources(s, [q], ["factual"])[0] for s in (student, bare))
    said = [
        s.tokenizer.decode(ids, skip_special_tokens=True)
        for s, ids in ((student, with_choices), (bare, without))
    ]
    assert (
        said[0].split()[-4:] == ["(a)", "yes", "(b)", "no"]
        and said[1].strip() == "[factual] Can a bird fly ?"
    )
    other = Question("1", "Can a bird fly ?", ("yes", "no"), 0)  # of choices, so they are listed
    assert encode_sources(student, [other], ["factual"]) == encode_sources(bare, [other], ["factual"])


def test_token_ids_of_one_choice_decide_and_those_of_unknown_words_do_not(monkeypatch):
    "Two choices that read alike as text are told apart by their ids; words that the tokenizer lacks name no choice."
    q = Question("1", "How did the match end ?", ("3:1", "3 1", "the zyx"), 0)
    student = tiny_student([q.question, "3:1 3 1 the"])
    sources = encode_sources(student, [q], ["factual"])
    with torch.no_grad():
        encoded = stacked([read_distinct(student, sources)[tuple(sources[0])]])
        for greedy, choice in ((0, 0), (1, 1), (2, None)):
            monkeypatch.setattr(answers, "choice_scores", lambda batch, tails: ([[0.0] * 3], [greedy]))
            [a] = read_answers(student, [q], encoded, sources, ["it did"], "factual")
            assert a.choice == choice, (a.text, a.choice)


@pytest.mark.parametrize(
    "text, rationale, words",
    [
        ("It is wet . So the answer is a dam", "It is wet .", "a dam"),
        ("So the answer is no . So the answer is yes .", "So the answer is no .", "yes"),
        ("It is wet. The correct answer is bookstore.", "It is wet.", "bookstore"),
        ("It is wet. Thus the statement is false.", "It is wet.", "false"),
        ("The answer is wet", "", "wet"),
        ("It is wet . So the answer", "It is wet . So the answer", None),
        ("", "", None),
    ],
)
def test_a_written_text_is_split_at_its_last_answer_sentence(text, rationale, words):
    found, answer_words = split_answer(text)
    assert (found, answer_words and answer_words.rstrip(" .")) == (rationale, words)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["read", "back", "keep"]), st.integers(1, 70)), max_size=12),
    st.integers(0, 100),
)
def test_a_growing_cache_holds_what_a_plain_one_does(moves, seed):
    from transformers.cache_utils import DynamicLayer
    from faithful_distill.caches import growing_layer

    draw = torch.Generator().manual_seed(seed)
    ours, plain, rows = growing_layer()(), DynamicLayer(), 4
    for what, n in [("read", 3), *moves]:
        if what == "read":
            new = torch.randn(2, rows, 2, n, 5, generator=draw)
            found = ours.update(*new), plain.update(*new)
        elif what == "back":
            n = min(n, plain.get_seq_length() - 1)
            if n:
                ours.crop(-n)
                plain.crop(-n)
        else:
            stay = torch.arange(rows)[torch.rand(rows, generator=draw) < 0.8]
            if len(stay):
                ours.batch_select_indices(stay)
                plain.batch_select_indices(stay)
                rows = len(stay)
        assert ours.get_seq_length() == plain.get_seq_length()
        for a, b in (
            (ours.keys, plain.keys),
            (ours.values, plain.values),
            *(zip(*found) if what == "read" else ()),
        ):
            assert torch.equal(a, b)


def test_a_student_goes_on_from_a_beginning(student):
    for a in answer(
        student, questions, ["Safe", "Its wings", "Beavers cut"], continue_from=True, max_new_tokens=6
    ):
        assert a.rationale.startswith(("Safe", "Its wings", "Beavers cut"))


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from("the a wood river bank ( ) it . , ? [factual]".split()), min_size=0, max_size=12
    ),
    st.integers(10, 40),
)
def test_truncation_never_cuts_the_answer(rationale, max_target):
    student = tiny_student_once()
    student.max_target = max_target
    [t] = encode_targets(student, questions[:1], [2], [" ".join(rationale)], ["factual"])
    assert len(t.before_answer + t.answer) <= max_target
    assert student.tokenizer.decode(t.answer, skip_special_tokens=True) == "a nest"
    assert t.answer[-1] == student.eos
    whole = student.tokenizer(" ".join(rationale), add_special_tokens=False)["input_ids"]
    assert len(t.rationale) + t.cut == len(whole)


def tiny_student_once(made=[]):
    if not made:
        made.append(tiny_student(vocabulary))
    return copy.copy(made[0])


def test_lengths_that_are_too_short_are_an_error_with_the_number_needed():
    student = tiny_student_once()
    student.max_target = 5
    with pytest.raises(BadInput, match="at least 8"):
        encode_targets(student, questions[:1], [0], ["x"], ["factual"])
    student.max_target, student.max_source = 99, 6
    with pytest.raises(BadInput, match="max_source"):
        encode_sources(student, questions[:1], ["factual"])


def byte_level(texts):
    "A byte-level BPE, as GPT-2 and Llama 3 have."
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=400, show_progress=False, special_tokens=["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def sentence_pieces(texts):
    "A unigram model with metaspaces, as T5 has."
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = SentencePieceUnigramTokenizer()
    pieces.train_from_iterator(
        texts,
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_pieces_add_up_for_subword_tokenizers(make):
    texts = [
        target_text(q, i, r, p)
        for q, r in zip(questions, reasons)
        for i in range(2)
        for p in ("factual", "counterfactual")
    ] * 3
    tokenizer = make(texts)
    for q, r in zip(questions, reasons):
        parts = ["[counterfactual]", r, "So the answer is", q.choices[0]]
        pieces = token_pieces(tokenizer, [parts])[0]
        assert sum(pieces, []) == tokenizer(" ".join(parts), add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode(p).strip() for p in pieces] == parts


def test_real_questions_encode_whole(real_data):
    "Every CommonsenseQA dev question: its text, its choices, choices that read the same."
    dev = list(load_questions("csqa", "dev", path=real_data / "csqa"))
    qs = [Question(q["id"], q["question"], tuple(q["choices"]), q["answer"], q["kind"]) for q in dev]
    for q in qs:
        for i in range(len(q.choices)):
            assert match_choice(q, target_text(q, i, "", "none").removeprefix("So the answer is ")) == i
        assert all(choice in source_text(q) for choice in q.choices)


def test_random_prefixes_are_even_and_independent_of_role():
    n = 2000
    drawn = {
        role: [row_prefix("random", role, str(i), 0) for i in range(n)] for role in ("gold", "counterfactual")
    }
    for role in drawn:
        assert 0.45 < sum(p == "factual" for p in drawn[role]) / n < 0.55
    assert 0.45 < sum(a == b for a, b in zip(*drawn.values())) / n < 0.55


def test_examples_keep_every_row():
    rng = random.Random(0)
    ids = [str(rng.randrange(9)) for _ in range(40)]
    rows = [Row([1], [1], [1], rng.random() < 0.6) for _ in ids]
    examples = examples_of(rows, ids)
    assert sum(map(len, examples)) == 40
    for first, *others in examples:
        assert not first.counterfactual and all(row.counterfactual for row in others)
    wrong = [(row, id) for row, id in zip(rows, ids) if row.counterfactual]
    with pytest.raises(BadInput, match="no gold rationale"):
        examples_of(*zip(*wrong))


@pytest.mark.parametrize(
    "field, changes",
    [
        ("role", dict(role="silver")),
        ("target", dict(target=7)),
        ("target", dict(target=None, role="counterfactual")),
        ("rationale", dict(rationale=None)),
    ],
)
def test_bad_records_are_named(field, changes):
    bad = record(questions[0], 0, reasons[0]) | changes
    with pytest.raises(BadInput, match=f"field '{field}'"):
        training_rows(tiny_student_once(), [bad])


def test_a_student_without_end_or_padding_is_refused(tmp_path):
    student = tiny_student(vocabulary)
    student.tokenizer.eos_token = None
    with pytest.raises(BadInput, match="end-of-text"):
        type(student)(student.model, student.tokenizer)
    student = tiny_student(vocabulary)
    student.tokenizer.pad_token = None
    with pytest.raises(BadInput, match="padding"):
        type(student)(student.model, student.tokenizer)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_student(tmp_path)


def letters(lowercase=False):
    "Letters and words without an unknown token: brackets are dropped silently."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.train_from_iterator(
        ["So the answer is factual counterfactual"] * 9 + [text.replace("?", "") for text in vocabulary],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "</s>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def model_for(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def test_tags_that_a_tokenizer_loses_are_missed_only_where_they_are_needed():
    """Dropped brackets are as bad as an unknown token: both roles would read alike. Without tags nothing is missing,
    and `add_tags` is the remedy, as the error says."""
    tokenizer = letters()
    assert tokenizer.unk_token_id is None
    assert tokenizer.decode(tokenizer("[factual]")["input_ids"]) == "factual"
    model, rows = model_for(tokenizer), [record(q, q.answer, r) for q, r in zip(questions, reasons)]
    student = Student(model, tokenizer, "letters")
    for act in (
        lambda: training_rows(student, rows),
        lambda: training_rows(student, rows, prefixes="random"),
        lambda: answer(student, questions),
    ):
        with pytest.raises(
            BadInput, match=r"cannot express '\[.*factual\]'.*add_tags\(model, tokenizer\).*prefixes='none'"
        ):
            act()
    assert len(training_rows(student, rows, prefixes="none")) == 3
    assert len(answer(student, questions, reasons, prefix="none")) == 3
    add_tags(model, tokenizer)
    roles = [
        training_rows(student, [record(questions[0], target, reasons[0])])[0].source for target in (0, 1)
    ]
    assert roles[0] != roles[1]


def test_a_tokenizer_that_changes_the_answer_sentence_is_refused_and_can_be_taught():
    "Lower-cased, the sentence would never be found in what the student writes."
    tokenizer = letters(lowercase=True)
    model = model_for(tokenizer)
    with pytest.raises(BadInput, match=r"'So the answer is'.*add_tags\(model, tokenizer\)"):
        Student(model, tokenizer)
    add_tags(model, tokenizer)
    Student(model, tokenizer)


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_subword_tokenizers_express_the_tags(make):
    tokenizer = make(
        [target_text(q, 0, r, p) for q, r in zip(questions, reasons) for p in ("factual", "counterfactual")]
        * 3
    )
    assert all(expresses(tokenizer, text) for text in ("[factual]", "[counterfactual]", "So the answer is"))


def test_a_tag_in_pieces_is_expressed_and_a_sentence_without_its_spaces_is_not():
    """Word pieces come back apart, '[ factual ]', and the roles still differ; an answer sentence that comes back
    in pieces would not be found."""

    class ComesBack:
        unk_token_id = 0

        def __init__(self, back):
            self.back = back

        def __call__(self, text, add_special_tokens):
            return dict(input_ids=[1])

        def decode(self, ids):
            return self.back

    assert expresses(ComesBack("[ factual ]"), "[factual]") and not expresses(
        ComesBack("factual"), "[factual]"
    )
    assert expresses(ComesBack(" So the answer is"), "So the answer is")
    assert not expresses(ComesBack("Sothe answer is"), "So the answer is")
    assert not expresses(ComesBack("so the answer is"), "So the answer is")


def test_a_saved_student_is_loaded_as_it_was(student, tmp_path):
    if student.name == "tiny-qwen2":
        pytest.skip("transformers gives Qwen2 its own byte-level tokenizer, whatever the folder holds")
    student.model.save_pretrained(tmp_path)
    student.tokenizer.save_pretrained(tmp_path)
    loaded = load_student(tmp_path, device="cpu")
    assert [a.scores for a in answer(loaded, questions, reasons)] == [
        a.scores for a in answer(student, questions, reasons)
    ]


def test_a_student_prints_as_one_line_and_explains_from_its_folder(tmp_path):
    student = tiny_student(vocabulary)
    student.max_target = 24
    student.model.save_pretrained(tmp_path / "mine")
    student.tokenizer.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "student.json").write_text('{"max_target": 24}')
    loaded = load_student(tmp_path / "mine", device="cpu")
    assert repr(loaded) == repr(student).replace("tiny-t5", "mine") and "\n" not in repr(student)
    assert explain(tmp_path / "mine", questions[0], reasons[:1]) == explain(
        student, questions[0], reasons[:1]
    )
