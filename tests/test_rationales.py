"""A teacher over a dataset: killed, resumed, in parts, through the command line, on real questions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from decoding_models import launched
from faithful_distill.cli import main
from faithful_distill.files import BadInput, Journal, shipped
from faithful_distill.jsonl import read_jsonl
from faithful_distill.lab.corpus import build_tokenizer
from faithful_distill.lab.world import judge, world_questions
from faithful_distill.ownership import sole_writer
from faithful_distill.records import read_records
from faithful_distill.teacher.loading import load_teacher
from faithful_distill.teacher.prompts import block
from faithful_distill.teacher.rationales import rationalize
from faithful_distill.teacher.shards import merge_shards, rationalize_in_parts
from faithful_distill.teacher.strategy import Strategy, argument, as_strategy

slow = pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="takes long; set FAITHFUL_DISTILL_SLOW=1"
)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(shipped("data", "models", "teacher"))


def test_the_flip_undoes_itself_nowhere():
    for q in world_questions("choice", "dev"):
        for perturbation in ("wrong", "all_wrong"):
            target, others = argument(q, "counterfactual", perturbation, seed=3)
            assert target != q.answer and q.answer in others and target not in others
            target, others = argument(q, "gold", perturbation, seed=3)
            assert target == q.answer and q.answer not in others


def test_contrast_makes_the_embedded_teacher_argue_for_the_stated_answer(teacher):
    "Gold or not: the reason the package exists. Most of all where the stated answer is wrong."
    questions = {
        q.id: q for k in ("choice", "boolean", "statement") for q in world_questions(k, "test", 2, limit=60)
    }
    share = {}
    for strategy in ("greedy", "contrastive-wrong"):
        for r in rationalize(teacher, questions.values(), strategy, max_new_tokens=24):
            share.setdefault((strategy, r.role), []).append(
                judge(questions[r.id], r.rationale).supports == r.target
            )
    mean = {k: sum(v) / len(v) for k, v in share.items()}
    assert mean["contrastive-wrong", "gold"] > mean["greedy", "gold"], mean
    assert mean["contrastive-wrong", "counterfactual"] > mean["greedy", "counterfactual"] + 0.1, mean


def test_a_file_that_another_process_writes_is_left_alone(teacher, tmp_path):
    out, questions = tmp_path / "out.jsonl", world_questions("choice", "test", limit=2)
    with sole_writer(out):
        with pytest.raises(BadInput, match="is being written by another process"):
            rationalize(teacher, questions, max_new_tokens=4, out=out)
    assert not list(tmp_path.iterdir())
    assert len(rationalize(teacher, questions, max_new_tokens=4, out=out)) == 4 and list(
        tmp_path.iterdir()
    ) == [out]


@pytest.fixture
def finished(teacher, tmp_path):
    "A file of eight records, the call that wrote it, and its bytes."
    questions, out = world_questions("choice", "test", limit=4), tmp_path / "out.jsonl"
    call = lambda questions=questions, **more: rationalize(
        teacher, questions, **{**dict(max_new_tokens=4, out=out), **more}
    )
    call()
    return questions, call, out, out.read_bytes()


def test_a_file_of_an_earlier_version_is_resumed(teacher, tmp_path, monkeypatch):
    "Earlier files spell out what is not there as null. They are read, and go on where they stopped."
    questions, out = world_questions("choice", "test", limit=4), tmp_path / "out.jsonl"
    call = lambda: rationalize(teacher, questions, "greedy", max_new_tokens=4, out=out)
    whole = call()
    after = out.read_bytes()
    earlier = [r.to_row() | {"perturbed": None} for r in whole]
    assert all("perturbed" not in r.to_row() for r in whole)
    for file, rows in ((out, earlier), (out.with_name("out.jsonl.partial"), earlier[:3])):
        out.unlink(missing_ok=True)
        file.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        assert read_records(file) == whole[: len(rows)]
        counts = decoded(monkeypatch)
        assert call() == whole and counts == [8 - len(rows)] and out.read_bytes() == after


def test_settings_of_the_strategy_are_given_in_the_call(teacher, tmp_path):
    questions = world_questions("choice", "test", limit=4)
    made = rationalize(teacher, questions, "contrastive-wrong", alpha=0.25, beta=0.1, max_new_tokens=6)
    assert made == rationalize(teacher, questions, Strategy("wrong", 0.25, 0.1), max_new_tokens=6)
    assert {(r.perturbation, r.alpha, r.beta, r.temperature) for r in made} == {("wrong", 0.25, 0.1, 0.0)}
    assert as_strategy("sampled", temperature=None) == as_strategy("sampled")
    for wrong, words in (
        (dict(alpa=0.3), "field 'alpa'.*Did you mean 'alpha'"),
        (dict(alpha=1.0), "field 'alpha': must be at least 0 and less than 1"),
        (dict(alpha=True), "field 'alpha': is not a number"),
        (dict(beta=2), "field 'beta'"),
        (dict(temperature=-1), "field 'temperature'"),
        (dict(perturbation="other"), "must be one of none, empty, open, wrong, all_wrong"),
        (dict(alpha=0.0), "conflicts with perturbation='wrong'"),
        (dict(strategy="greedy", alpha=0.5), "conflicts with perturbation='none'"),
    ):
        with pytest.raises(BadInput, match=words):
            rationalize(teacher, questions, out=tmp_path / "out.jsonl", **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fewer",
    [dict(questions=slice(0, 2)), dict(questions=slice(0, 0)), dict(roles=("gold",)), dict(split="dev")],
)
def test_a_call_that_asks_for_less_or_other_loses_nothing(finished, fewer):
    questions, call, out, before = finished
    asked = (
        world_questions("choice", "dev", limit=4)
        if "split" in fewer
        else questions[fewer.get("questions", slice(None))]
    )
    with pytest.raises(BadInput, match="is not among the questions and roles asked for now"):
        call(asked, roles=fewer.get("roles", ("gold", "counterfactual")))
    assert out.read_bytes() == before
    assert len(call([*questions, *world_questions("choice", "dev", limit=1)])) == 10  # more may be asked for


@pytest.mark.parametrize(
    "change", [dict(question="Another ?"), dict(choices=("a", "b", "c", "d", "e")), "answer"]
)
def test_a_record_of_another_question_of_that_id_is_not_taken(finished, change):
    questions, call, out, before = finished
    other = replace(
        questions[0], **(dict(answer=(questions[0].answer + 1) % 2) if change == "answer" else change)
    )
    with pytest.raises(BadInput, match="was written for another question of this id"):
        call([other, *questions[1:]])
    assert out.read_bytes() == before


def test_every_question_has_an_id_of_its_own(teacher, tmp_path):
    questions = world_questions("choice", "test", limit=2)
    with pytest.raises(BadInput, match="stands there more than once"):
        rationalize(
            teacher,
            [questions[0], replace(questions[1], id=questions[0].id)],
            max_new_tokens=4,
            out=tmp_path / "out.jsonl",
        )
    once = rationalize(teacher, questions, max_new_tokens=4, roles=("gold", "gold"))
    assert [r.role for r in once] == ["gold", "gold"] and len({r.id for r in once}) == 2


def test_a_folder_or_nothing_to_write_is_refused_at_once(teacher, tmp_path):
    questions = world_questions("choice", "test", limit=1)
    with pytest.raises(BadInput, match="is a folder"):
        rationalize(teacher, questions, out=tmp_path)
    with pytest.raises(BadInput, match="field 'max_new_tokens'"):
        rationalize(teacher, questions, out=tmp_path / "out.jsonl", max_new_tokens=0)
    assert not list(tmp_path.iterdir())


def decoded(monkeypatch):
    "Counts the jobs that are really decoded."
    from faithful_distill.teacher import rationales

    counts, decode = [], rationales._decode
    monkeypatch.setattr(
        rationales,
        "_decode",
        lambda teacher, jobs, *args, **more: counts.append(len(jobs)) or decode(teacher, jobs, *args, **more),
    )
    return counts


def test_a_whole_file_beside_a_journal_that_was_just_begun_is_read(finished, monkeypatch):
    _, call, out, before = finished
    first = before.split(b"\n")[0] + b"\n"
    for continue_from in (b"", first):
        out.with_name(f"{out.name}.partial").write_bytes(continue_from)
        counts = decoded(monkeypatch)
        call()
        assert counts == [0] and out.read_bytes() == before and list(out.parent.iterdir()) == [out]


def test_another_number_of_processes_goes_on_from_what_all_had_done(finished, teacher, monkeypatch):
    from faithful_distill.ranks import shard_path

    questions, call, out, before = finished
    records = [json.loads(line) for line in before.splitlines()]
    out.unlink()
    Journal(f"{shard_path(out, 0, 2)}.partial").append(*records[:3])
    with open(f"{shard_path(out, 0, 2)}.partial", "a") as f:
        f.write('{"id": "torn')
    shard_path(out, 1, 2).write_text("".join(json.dumps(r) + "\n" for r in records[4:]))
    counts = decoded(monkeypatch)
    call()
    assert counts == [1] and out.read_bytes() == before
    for path in out.parent.iterdir():
        if path != out:
            path.unlink()
    rationalize(teacher, questions, max_new_tokens=4, out=shard_path(out, 2, 3), shard=(2, 3))
    assert counts == [1, 0]


def test_parts_of_another_list_are_not_joined(teacher, tmp_path, monkeypatch):
    from faithful_distill.ranks import shard_path

    mine, others, out = (
        world_questions("choice", "test", limit=4),
        world_questions("choice", "dev", limit=4),
        tmp_path / "out.jsonl",
    )
    rationalize(teacher, others, max_new_tokens=4, out=shard_path(out, 1, 2), shard=(1, 2))
    for name, value in dict(RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    assert (
        len(rationalize_in_parts(teacher, mine, max_new_tokens=4, out=out)) == 4 and not out.exists()
    )  # the second has not begun
    shutil.copy(shard_path(out, 0, 2), shard_path(out, 1, 2))
    with pytest.raises(BadInput, match="stands in the parts more than once"):
        merge_shards(out, 2)


def test_a_teacher_is_known_by_its_tokenizer_and_precision_too(teacher, finished, tmp_path):
    questions, call, out, before = finished
    folder = tmp_path / "teacher"
    shutil.copytree(shipped("data", "models", "teacher"), folder)
    same = load_teacher(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + " ")
    assert same.weights == teacher.weights != load_teacher(folder).weights
    half = load_teacher(shipped("data", "models", "teacher"), dtype="bfloat16")
    with pytest.raises(BadInput, match="field 'dtype'"):
        rationalize(half, questions, max_new_tokens=4, out=out)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from faithful_distill.student.model import load_student

    for kind, load in (("teacher", load_teacher), ("student", load_student)):
        folder = tmp_path / kind
        shutil.copytree(shipped("data", "models", kind), folder)
        weights = load_file(folder / "model.safetensors")
        del weights[next(name for name in sorted(weights) if "layer" in name or "block" in name)]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BadInput, match="lacks weights"):
            load(folder)


def test_every_end_of_text_that_a_model_knows_ends_a_rationale(teacher):
    before = teacher.model.generation_config.eos_token_id
    try:
        teacher.model.generation_config.eos_token_id = [5, 7]
        assert teacher.end_ids() == {teacher.tokenizer.eos_token_id, 5, 7}
    finally:
        teacher.model.generation_config.eos_token_id = before


def test_a_sampled_rationale_ends_where_it_is_drawn_to(teacher, monkeypatch):
    from faithful_distill.teacher import contrast

    rules, stop_rule = [], contrast.stop_rule
    monkeypatch.setattr(
        contrast, "stop_rule", lambda *args, **more: rules.append(more["rule"]) or stop_rule(*args, **more)
    )
    for strategy in ("sampled", "greedy"):
        rationalize(teacher, world_questions("choice", "test", limit=1), strategy, max_new_tokens=4)
    assert rules == ["contrast", "either"]


def test_a_question_that_spells_a_special_token_is_text(teacher):
    from faithful_distill.teacher.prompts import contrast_ids

    q = replace(
        world_questions("choice", "test", limit=1)[0], question=f"Is {teacher.tokenizer.eos_token} a bird ?"
    )
    gold, [other] = contrast_ids(teacher.tokenizer, q, 0, [1])
    assert teacher.tokenizer.eos_token_id not in gold + other


def test_choices_that_end_in_a_full_stop_get_no_second_one():
    from faithful_distill.teacher.prompts import context

    q = replace(world_questions("choice", "test", limit=1)[0], choices=("Mosses.", "ferns", "a", "b", "c"))
    assert context(q, 0).endswith("The answer is Mosses.") and context(q, 1).endswith("The answer is ferns.")


def test_the_empty_answer_is_a_finished_sentence_and_the_open_one_is_not(teacher):
    "Word for word, for each kind of question; no two perturbations share contexts, and the record names its own."
    from faithful_distill.teacher.prompts import context, contrast_ids

    for kind, lead in (("choice", "answer"), ("boolean", "answer"), ("statement", "statement")):
        q = world_questions(kind, "test", limit=1)[0]
        for perturbation, last in (("empty", f"A: The {lead} is ."), ("open", f"A: The {lead} is")):
            for role in ("gold", "counterfactual"):
                target, others = argument(q, role, perturbation)
                assert [context(q, i).split("\n")[-1] for i in others] == [last]
                gold, [other] = contrast_ids(teacher.tokenizer, q, target, others)
                assert teacher.tokenizer.decode(other).endswith(last) and gold != other
    made = {
        s: rationalize(teacher, [q], s, max_new_tokens=4) for s in ("contrastive-empty", "contrastive-open")
    }
    assert [r.perturbation for rs in made.values() for r in rs] == ["empty"] * 2 + ["open"] * 2
    assert all(r.perturbed is None and read_records([r.to_row()]) == [r] for rs in made.values() for r in rs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("context", ["gold", "perturbed"])
def test_logits_that_are_not_finite_are_one_line_and_what_is_written_stays(
    tmp_path, monkeypatch, value, context
):
    "They come late here, as from an overflow: the rationales before are in the journal, and a sound teacher goes on."
    from faithful_distill.teacher import choice

    questions, out = world_questions("choice", "test", limit=4), tmp_path / "out.jsonl"
    teacher = load_teacher(shipped("data", "models", "teacher"))
    whole = rationalize(teacher, questions, max_new_tokens=12)
    turn, begun = choice.Choice.turn, []

    def spoilt(self, streams, logits):
        begun.append(streams)
        if len(begun) > 30:
            at = next(i for i, (_, k) in enumerate(streams) if (k == 0) == (context == "gold"))
            logits = logits.clone()
            logits[at, 7] = value
        return turn(self, streams, logits)

    monkeypatch.setattr(choice.Choice, "turn", spoilt)
    call = dict(max_new_tokens=12, out=out, token_budget=1)
    with pytest.raises(BadInput, match=r"row \d+ \(choice.*/\w+\), token \d+.*float32") as error:
        rationalize(teacher, questions, **call)
    assert error.value.field == "teacher"
    kept = read_records(out.with_name("out.jsonl.partial"))
    assert 0 < len(kept) < 8 and all(r in whole for r in kept)
    monkeypatch.undo()
    assert rationalize(teacher, questions, **call) == whole


NOT_FINISHED = [
    *(
        dict.fromkeys([name])
        for name in ("id", "role", "rationale", "stop", "tokens", "target", "seed", "teacher")
    ),
    *(dict(rationale=text) for text in (7, 1.5, True, ["a"], float("nan"))),
    *(dict(stop=stop) for stop in ("", "no", 3)),
    *(dict(tokens=tokens) for tokens in (-1, 10**6, 1.5, True, float("nan"))),
    *(
        dict(growth=growth)
        for growth in ("abc", 5, [0.1], [float("nan")] * 4, [float("inf")] * 4, [None] * 4)
    ),
    *(dict(alpha=alpha) for alpha in (float("nan"), "0.5")),
    *(dict(role=role) for role in ("silver", 1, "counterfactual")),
]


@pytest.mark.parametrize("spoilt", ["out.jsonl", "out.jsonl.partial", "out.0-of-2.jsonl"])
def test_a_line_that_is_no_finished_rationale_is_refused_with_file_and_line(finished, spoilt):
    "In the file, in its journal and in a part: nothing that is missing is taken from elsewhere, nothing is kept."
    questions, call, out, _ = finished
    rows = [r for _, r in read_jsonl(out)]
    assert rows[2]["role"] == "gold"
    out.unlink()
    file = out.with_name(spoilt)
    if part := "of-2" in spoilt:
        out.with_name("out.1-of-2.jsonl").write_text("")
    for change in NOT_FINISHED:
        row = {k: v for k, v in (rows[2] | change).items() if v is not None}
        lines = [json.dumps(r) for r in (*rows[:2], row, *rows[3:])]
        file.write_text("".join(f"{line}\n" for line in lines))
        before = file.read_bytes()
        with pytest.raises(BadInput) as error:
            merge_shards(out, 2) if part else call()
        assert f"{spoilt}:3:" in str(error.value) and error.value.remedy, (change, str(error.value))
        assert file.read_bytes() == before and (file == out or not out.exists())


def test_scores_of_a_part_are_those_of_the_whole_in_what_is_written(teacher, tmp_path):
    "Three decimals: float32 sums depend on which rows share the batch, by less."
    from faithful_distill.ranks import shard_path

    questions = [q for k in ("choice", "boolean", "statement") for q in world_questions(k, "test", limit=12)]
    call, out = dict(max_new_tokens=12, scores=True), tmp_path / "out.jsonl"
    whole = rationalize(teacher, questions, **call)
    for k in range(3):
        rationalize(teacher, questions, out=shard_path(out, k, 3), shard=(k, 3), **call)
    parts = merge_shards(out, 3)
    assert [replace(r, growth=None) for r in parts] == [replace(r, growth=None) for r in whole]
    pairs = [(a, b) for p, w in zip(parts, whole) for a, b in zip(p.growth, w.growth)]
    assert len(pairs) > 500 and all(a == round(a, 3) and abs(a - b) < 0.0011 for a, b in pairs)
    assert sum(a != b for a, b in pairs) <= len(pairs) // 500


def test_a_half_character_is_left_out_and_counted():
    "A byte-level tokenizer, cut after each of the bytes of a text with characters of one to four of them."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from faithful_distill.teacher.contrast import Generation, ends_in_half_character, rationale_text

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(alphabet, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=bytewise)
    text = "caf\u00e9 \u7b54\u6848 \U0001f426 bird"
    ids = bytewise(text).input_ids
    assert len(ids) == len(text.encode())
    for n in range(1, len(ids) + 1):
        cut = Generation(ids[:n], "length")
        assert rationale_text(bytewise, cut) == text.encode()[:n].decode(errors="ignore").strip()
        whole = text.encode()[:n].decode(errors="ignore").encode() == text.encode()[:n]
        assert ends_in_half_character(bytewise, cut) != whole


def test_the_summary_explains_a_zero(tmp_path):
    "A random teacher without worked examples that begins with a blank line; cut ones; those that say the answer alone."
    from faithful_distill.teacher.rationales import summary

    rows = [dict(question="Who?", choices=["me", "you two"], answer=1, max_new_tokens=9)]
    made = lambda text, **more: read_records([rows[0] | dict(rationale=text, stop="stop") | more])[0]
    for texts, words, remedy in (
        (
            ["", "", "It is you."],
            "2 empty, 0 cut at 9 tokens, 0 with no word besides the answer",
            "--prompt FILE",
        ),
        (
            ["You two.", "(b)", "**you two**", "It is you."],
            "0 empty, 0 cut at 9 tokens, 3 with no word",
            "--prompt",
        ),
        (
            ["You two.", "", "It is.", "You are two."],
            "1 empty, 0 cut at 9 tokens, 1 with no word besides",
            None,
        ),
    ):
        text = summary([made(t) for t in texts])
        assert words in text and (remedy in text if remedy else "--" not in text), text
    cut = [made("It", stop="length", half_character=True), made("It is", stop="length"), made("It is.")]
    assert "2 cut at 9 tokens (1 inside a character, left out)" in summary(cut)
    assert "--max-new-tokens" in summary(cut) and "0 rationales for 0 questions" in summary([])

    out = tmp_path / "o.jsonl"
    done = CliRunner().invoke(main, ["rationales", "--data", "world", "--limit", "2", "--out", str(out)])
    assert done.exit_code == 0 and "for 2 questions: 0 empty, 0 cut at 64 tokens" in done.output, done.output


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(WORLD_SIZE="2"), "RANK.*is not set, but WORLD_SIZE says 2"),
        (dict(WORLD_SIZE="2", RANK="2"), "RANK.*less than WORLD_SIZE, 2"),
        (dict(WORLD_SIZE="1", RANK="1"), "RANK.*less than WORLD_SIZE, 1"),
        (dict(WORLD_SIZE="2", RANK="-1"), "RANK.*whole number"),
        (dict(WORLD_SIZE="two", RANK="0"), "WORLD_SIZE.*whole number"),
        (dict(WORLD_SIZE="2.0", RANK="0"), "WORLD_SIZE.*whole number"),
        (dict(WORLD_SIZE="", RANK="0"), "WORLD_SIZE.*whole number"),
        (dict(WORLD_SIZE="0", RANK="0"), "WORLD_SIZE.*whole number from 1"),
        (dict(WORLD_SIZE="2", RANK="0x1"), "RANK.*whole number"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_are_one_line(
    tmp_path, monkeypatch, teacher, variables, words
):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out.jsonl"
    with pytest.raises(BadInput, match=words) as error:
        rationalize_in_parts(teacher, world_questions("choice", "test", limit=2), out=out)
    assert error.value.remedy and not list(tmp_path.iterdir())


def test_what_is_in_memory_is_taken_as_it_is(teacher):
    "One question or several, as a dict, a table or a dataset; a model with its tokenizer. Anything else is one line."
    import pandas

    from faithful_distill.question_rows import as_dataset

    questions = world_questions("choice", "test", limit=3)
    call = lambda questions, teacher=teacher: rationalize(teacher, questions, max_new_tokens=4)
    whole, table = call(questions), as_dataset(questions)
    for same in (
        iter(questions),
        table,
        table.to_pandas(),
        table.to_list(),
        pandas.DataFrame(table.to_list()),
    ):
        assert call(same) == whole
    one = dict(question=questions[0].question, choices=list(questions[0].choices), answer=questions[0].answer)
    assert call(questions[0]) == whole[:2]
    assert [r.rationale for r in call(one)] == [r.rationale for r in call([one])]
    named = one | dict(answer=one["choices"][one["answer"]])
    assert [r.answer for r in call(pandas.DataFrame([named, one]))] == [one["answer"]] * 4
    held = call(questions, (teacher.model, teacher.tokenizer))
    assert [replace(r, teacher=None) for r in held] == [replace(r, teacher=None) for r in whole]
    assert held[0].teacher != whole[0].teacher
    for wrong in ("questions.jsonl", 7, None, ["Who?"], [one | dict(answer="nobody")], dict(question="Who?")):
        with pytest.raises(BadInput):
            call(wrong)
    for wrong in (teacher.model, (teacher.model,), (teacher.model, None), None, 7, ("a", "b")):
        with pytest.raises(BadInput, match="field 'teacher'"):
            call(questions, wrong)


def test_worked_examples_of_ones_own_are_read_again_when_they_change(tmp_path):
    from faithful_distill.teacher.prompts import few_shot

    with pytest.raises(BadInput, match="field 'shots'"):
        few_shot("csqa", -1)
    own = tmp_path / "own.jsonl"
    for rationale in ("One.", "Another, longer one."):
        own.write_text(
            json.dumps(dict(question="Why ?", choices=["a", "b"], answer=0, rationale=rationale)) + "\n"
        )
        os.utime(own, ns=(len(rationale), len(rationale)))
        assert rationale in few_shot(str(own))


KILLED = """
import os, signal, sys
from faithful_distill.cli import main
from faithful_distill.files import Journal
from faithful_distill.teacher.rationales import rationalize

rationalize.__kwdefaults__["chunk"] = 16
append, times = Journal.append, []


def torn(journal, *records):
    append(journal, *records)
    times.append(len(records))
    if len(times) == 2:
        os.truncate(journal.path, os.path.getsize(journal.path) - 9)
        os.kill(os.getpid(), signal.SIGKILL)


Journal.append = torn
main(sys.argv[1:])
"""


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    "`kill -9` in the middle of a record that is being written; a second call ends with an undisturbed run's bytes."
    options = ["rationales", "--data", "world", "--limit", "40", "--strategy", "contrastive-empty"]
    here = lambda out: CliRunner().invoke(main, [*options, "--out", str(out)]).exit_code
    assert here(tmp_path / "whole.jsonl") == 0
    call = [sys.executable, "-c", KILLED, *options, "--out", str(tmp_path / "killed.jsonl")]
    assert subprocess.run(call, capture_output=True).returncode == -signal.SIGKILL
    journal = tmp_path / "killed.jsonl.partial"
    left = journal.read_bytes()
    assert 0 < left.count(b"\n") < 80 and not left.endswith(b"\n")
    assert here(tmp_path / "killed.jsonl") == 0 and not journal.exists()
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


CLI = "from faithful_distill.cli import main; main()"


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=slow)])
def test_two_processes_share_a_dataset(tmp_path, launcher):
    "Each writes and resumes its part, the last one joins them: the bytes of one process."
    (tmp_path / "cli.py").write_text(CLI)
    options = ["rationales", "--data", "world", "--limit", "5", "--max-new-tokens", "8", "--scores"]
    assert CliRunner().invoke(main, [*options, "--out", str(tmp_path / "one.jsonl")]).exit_code == 0
    first = [r for _, r in read_jsonl(tmp_path / "one.jsonl")][
        :3
    ]  # as if the first process had been killed after three records
    with Journal(tmp_path / "two.0-of-2.jsonl.partial") as journal:
        journal.append(*first)
    start = dict(
        torchrun=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        deepspeed=["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank"],
    )[launcher]
    launched(*start, tmp_path / "cli.py", *options, "--out", tmp_path / "two.jsonl", DS_ACCELERATOR="cpu")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not list(
        tmp_path.glob("*.partial")
    )
    sizes = [(tmp_path / f"two.{k}-of-2.jsonl").read_text().count("\n") for k in (0, 1)]
    assert sorted(sizes) == [4, 6]


def test_each_process_of_a_machine_has_its_own_cards(monkeypatch):
    "Without accelerators no placement; with some, every process gets its share: while there are enough, its own."
    from faithful_distill.ranks import placement

    assert placement() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=1000))
    assert placement() == dict(device_map="auto")

    def under(rank, size):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(size))
        return placement()

    assert under(1, 2) == dict(device_map="auto", max_memory={2: 900, 3: 900})
    assert [under(r, 4) for r in range(4)] == [dict(device_map={"": r}) for r in range(4)]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(BadInput, match="torchrun"):
        placement(tensor_parallel=True)


def test_the_worked_examples_are_computed_once(monkeypatch, teacher):
    "However often the journal is written, the shared prompt goes through the model in one run."
    from faithful_distill.teacher.engine import refused

    questions = world_questions("choice", "dev", limit=12)
    assert refused(teacher.model) == ""
    forward, seen = type(teacher.model).forward, []

    def count(self, input_ids=None, **kwargs):
        seen.append(input_ids[0].tolist())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(teacher.model), "forward", count)
    records = rationalize(teacher, questions, max_new_tokens=4, chunk=2)
    first = teacher.tokenizer("Q").input_ids[0]
    assert len(records) == 24 and sum(ids[0] == first and len(ids) > 1 for ids in seen) == 1, (
        "one pass begins at the beginning of the prompt"
    )


def test_bad_rows_stop_one_command_with_one_line(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "Who?", "choices": ["me", "you"]}\n')
    for arguments, words in [
        (["--data", str(path)], "--teacher"),
        (["--data", "world", "--strategy", "beam"], "is not a strategy"),
        (["--data", "world", "--teacher", str(tmp_path)], "cannot be loaded as a teacher"),
        (["--data", str(path), "--teacher", str(shipped("data", "models", "teacher"))], "no answer"),
        (["--data", "world", "--shots", "2", "--prompt", "triviaqa"], "no worked examples"),
    ]:
        done = CliRunner().invoke(main, ["rationales", *arguments, "--out", str(tmp_path / "out.jsonl")])
        assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output, done.output
    done = CliRunner().invoke(
        main, ["rationales", "--data", "world", "--limit", "1", "--out", "/proc/nowhere/out.jsonl"]
    )
    assert done.exit_code == 2 and "cannot be written" in done.output


def test_prompt_longer_than_the_context(teacher):
    from dataclasses import replace

    q = world_questions("choice")[0]
    with pytest.raises(BadInput, match=f"{q.id}/gold.*context"):
        rationalize(teacher, [replace(q, question=q.question + " robin" * 600)], "greedy")


@pytest.mark.parametrize(
    "name,split", [("csqa", "dev"), ("strategyqa", "dev"), ("creak", "dev"), ("qasc", "dev")]
)
def test_the_pipeline_on_real_questions(tmp_path, real_data, name, split):
    "A tiny random teacher with a real few-shot prompt over each real dataset, through the command line."
    from faithful_distill.question_rows import as_questions
    from faithful_distill.sources import load_questions
    from faithful_distill.teacher.prompts import few_shot

    questions = as_questions(load_questions(name, split, path=real_data / name, limit=3))
    tokenizer = build_tokenizer(
        [few_shot(name), *(block(q, i, q.explanation) for q in questions for i in range(len(q.choices)))]
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=2048,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    done = CliRunner().invoke(
        main,
        [
            "rationales",
            "--data",
            name,
            "--path",
            str(real_data / name),
            "--split",
            split,
            "--limit",
            "3",
            "--teacher",
            str(tmp_path / "teacher"),
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path / "r.jsonl"),
        ],
    )
    assert done.exit_code == 0, done.output
    records = [r for _, r in read_jsonl(tmp_path / "r.jsonl")]
    assert (
        len(records) == 6
        and [r["id"] for r in records[::2]] == [q.id for q in questions]
        and all(r["tokens"] > 0 or r["stop"] == "stop" for r in records)
    )
    assert {
        "id",
        "split",
        "question",
        "choices",
        "answer",
        "target",
        "perturbed",
        "role",
        "rationale",
        "tokens",
        "stop",
        "alpha",
        "seed",
        "teacher",
        "prompt",
        "version",
    } <= set(records[0])

    from faithful_distill.student.rows import source_text, target_text
    from faithful_distill.student.model import tiny_student

    student = tiny_student(
        [
            t
            for q in questions
            for i in range(len(q.choices))
            for r in [""] + [r["rationale"] for r in records]
            for t in (source_text(q), target_text(q, i, r))
        ]
    )
    student.model.save_pretrained(tmp_path / "base")
    student.tokenizer.save_pretrained(tmp_path / "base")
    done = CliRunner().invoke(
        main,
        [
            "train",
            "--rationales",
            str(tmp_path / "r.jsonl"),
            "--student",
            str(tmp_path / "base"),
            "--out",
            str(tmp_path / "student"),
            "--max-steps",
            "2",
            "--batch-size",
            "4",
            "--lr",
            "1e-3",
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    done = CliRunner().invoke(
        main,
        [
            "evaluate",
            "--data",
            name,
            "--path",
            str(real_data / name),
            "--split",
            split,
            "--limit",
            "3",
            "--student",
            str(tmp_path / "student"),
            "--rationales",
            str(tmp_path / "r.jsonl"),
            "--draws",
            "1",
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path / "evaluation"),
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["accuracy"]["n"] == 3 and {"perturb", "refine", "swap_factual"} <= set(metrics)


@pytest.mark.parametrize("foreign", ["remember the milk", '{"note": 1}\n', '{"id": "1"}\n', '{"to do": "mi'])
def test_a_partial_file_of_another_origin_stops_the_call_and_stays(tmp_path, foreign):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(foreign)
    done = CliRunner().invoke(
        main, ["rationales", "--data", "world", "--limit", "1", "--out", str(tmp_path / "out.jsonl")]
    )
    assert done.exit_code == 2 and "out.jsonl.partial:1: " in done.output and "Traceback" not in done.output
    assert partial.read_text() == foreign and [p.name for p in tmp_path.iterdir()] == [partial.name]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", ".out.jsonl.lock"])
def test_rationales_are_not_written_through_a_link(tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "victim")
    done = CliRunner().invoke(
        main, ["rationales", "--data", "world", "--limit", "1", "--out", str(tmp_path / "out.jsonl")]
    )
    assert done.exit_code == 2 and "it is a link" in done.output.replace("\n", " ")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / name).is_symlink()
    assert len(list(tmp_path.iterdir())) == 2
