"Selection of one of several sampled rationales: killed, resumed, in parts, by growth and by a reader."

import json
import re

import pytest
from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.files import BadInput, shipped
from faithful_distill.jsonl import read_jsonl
from faithful_distill.lab.world import world_questions
from faithful_distill.ranks import shard_path
from faithful_distill.records import read_records
from faithful_distill.teacher.loading import load_teacher
from faithful_distill.teacher.rationales import rationalize
from faithful_distill.teacher.resume import journal_path
from faithful_distill.teacher.shards import merge_shards

questions = world_questions("choice", "test", limit=5) + world_questions("boolean", "test", limit=4)
call = dict(max_new_tokens=12, samples=3, roles=("gold",))


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(shipped("data", "models", "teacher"))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    "The files of an undisturbed run, and what it handed back."
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    return out, rationalize(teacher, questions, out=out, **call)


def both(out):
    return out.read_bytes(), out.with_name("out.rejected.jsonl").read_bytes()


def test_the_best_is_kept_and_every_other_candidate_is_beside_it(teacher, whole):
    "The candidates are those that are drawn one by one, and the growth is that of the teacher's own scores."
    out, kept = whole
    rejected = read_records(out.with_name("out.rejected.jsonl"))
    assert read_records(out) == kept and (len(kept), len(rejected)) == (9, 18)
    single = rationalize(teacher, questions, roles=("gold",), max_new_tokens=12, temperature=1.0, scores=True)
    for k, first in zip(kept, single, strict=True):
        others = [r for r in rejected if r.id == k.id]
        about = k.extra["selection"]
        assert about["score"] >= max(r.extra["selection"]["score"] for r in others)
        assert about["distinct"] == len({k.rationale, *(r.rationale for r in others)})
        assert about["samples"] == 3 and about["rate"] == round(1 / about["distinct"], 4)
        [drawn_first] = [r for r in (k, *others) if not r.extra.get("sample")]
        assert drawn_first.rationale == first.rationale
        assert drawn_first.extra["selection"]["score"] == pytest.approx(sum(first.growth), abs=0.06)
    assert any(k.extra.get("sample") for k in kept)  # it is not always the first


@pytest.mark.parametrize("at", ["a token", "the rejected", "the kept"])
def test_killed_anywhere_it_ends_in_the_same_bytes(teacher, whole, tmp_path, monkeypatch, at):
    from faithful_distill.teacher import resume

    out, written = tmp_path / "out.jsonl", []

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    def interrupt(module, args, kwargs):
        written.append(1)
        if len(written) == 25:
            raise Killed

    with monkeypatch.context() as patched:
        if at == "a token":
            hook = teacher.model.register_forward_pre_hook(interrupt, with_kwargs=True)
        else:
            write = resume.write_records
            before = {"the rejected": 0, "the kept": 1}[at]

            def counted(path, records):
                written.append(path)
                return die() if len(written) > before else write(path, records)

            patched.setattr(resume, "write_records", counted)
        with pytest.raises(Killed):
            rationalize(teacher, questions, out=out, token_budget=400, **call)
        if at == "a token":
            hook.remove()
    assert journal_path(out).exists() and not out.exists()
    assert rationalize(teacher, questions, out=out, **call) == whole[1] and both(out) == both(whole[0])
    assert not journal_path(out).exists()


def test_a_finished_file_is_read_and_more_samples_may_be_drawn(teacher, whole, tmp_path, monkeypatch):
    from faithful_distill.teacher import generate

    out = tmp_path / "out.jsonl"
    for target, source in zip((out, out.with_name("out.rejected.jsonl")), both(whole[0])):
        target.write_bytes(source)
    decoded, run = [], generate._run
    monkeypatch.setattr(generate, "_run", lambda engine, *rest: (decoded.append(1), run(engine, *rest)))
    assert rationalize(teacher, questions, out=out, **call) == whole[1] and not decoded
    assert both(out) == both(whole[0])
    more = rationalize(teacher, questions, out=out, **call | dict(samples=4))
    assert decoded and all(r.extra["selection"]["samples"] == 4 for r in more)
    before = both(out)
    for other, words in ((dict(samples=2), "asked for now"), (dict(select=len), "was selected otherwise")):
        with pytest.raises(BadInput, match=words):
            rationalize(teacher, questions, out=out, **call | dict(samples=4) | other)
    assert both(out) == before


def test_parts_are_joined_with_what_they_rejected(teacher, whole, tmp_path):
    out = tmp_path / "out.jsonl"
    for k in range(2):
        rationalize(teacher, questions, out=shard_path(out, k, 2), shard=(k, 2), **call)
    assert merge_shards(out, 2) == whole[1] and both(out) == both(whole[0])
    again = tmp_path / "again" / "out.jsonl"
    again.parent.mkdir()
    for k in range(2):  # another number of processes takes over both files of all parts
        part = shard_path(out, k, 2)
        for path in (part, part.with_name(f"{part.stem}.rejected.jsonl")):
            (again.parent / path.name).write_bytes(path.read_bytes())
    assert rationalize(teacher, questions, out=again, **call) == whole[1] and both(again) == both(whole[0])


def test_a_reader_selects_on_the_command_line(tmp_path):
    out = tmp_path / "out.jsonl"
    options = [
        "rationales",
        "--data",
        "world-choice",
        "--limit",
        "3",
        "--max-new-tokens",
        "12",
        "--roles",
        "gold",
    ]
    reader = str(shipped("data", "models", "student"))
    done = CliRunner().invoke(main, [*options, "--samples", "2", "--select", reader, "--out", str(out)])
    assert done.exit_code == 0 and re.search(
        r"Kept by reader student [0-9a-f]{8}: 3 of 6 samples", done.output
    ), done.output
    kept = [row for _, row in read_jsonl(out)]
    assert all(0 <= row["selection"]["score"] <= 1 and "growth" not in row for row in kept)
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 3
    json.loads(out.read_text().splitlines()[0])
    greedy = CliRunner().invoke(main, [*options, "--samples", "2", "--strategy", "greedy", "--out", str(out)])
    assert greedy.exit_code and "needs a contrast" in greedy.output + str(greedy.exception)


def test_a_judge_is_known_by_its_weights_and_a_nameless_one_is_refused(teacher, tmp_path):
    "Else the scores in a file could be those of another judge of the same name."
    from faithful_distill.student.model import tiny_student
    from faithful_distill.teacher_commands import _reader

    for text, folder in (("fish live in water", "one"), ("birds live in trees and eat worms", "two")):
        student = tiny_student([text])
        student.model.save_pretrained(tmp_path / folder / "student")
        student.tokenizer.save_pretrained(tmp_path / folder / "student")
    one, two = (_reader(str(tmp_path / folder / "student")).__name__ for folder in ("one", "two"))
    assert one != two and _reader(str(tmp_path / "one" / "student")).__name__ == one
    with pytest.raises(BadInput, match="has no name to be noted"):
        rationalize(teacher, questions[:1], out=tmp_path / "o.jsonl", select=lambda rs: [0] * len(rs), **call)
    assert not (tmp_path / "o.jsonl").exists()
