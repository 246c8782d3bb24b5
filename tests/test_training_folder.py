"What a training run may replace in its folder, what counts as finished, and which checkpoints are read."

import json
import os
import pickle
import re
import shutil

import pytest

import ranks
from faithful_distill.files import BadInput
from faithful_distill.hashes import sha256_file
from faithful_distill.ownership import check_folder, own_folder
from faithful_distill.student.model import load_student
from faithful_distill.training import checkpoints, folder
from faithful_distill.training.launch import train_seeds
from test_training import at_step, train


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    student = ranks.base()
    student.model.save_pretrained(path)
    student.tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["README.md"],
        ["config.json"],
        ["model.safetensors", "model-00001-of-00002.safetensors"],
        ["metrics.jsonl"],
        ["checkpoints/checkpoint-5/notes.txt"],
        ["src/main.py"],
        [".git/HEAD"],
    ],
)
def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path, names, overwrite):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        BadInput, match="did not write there: " + sorted(names)[0].split("/")[0].replace(".", "[.]")
    ):
        train(tmp_path, overwrite=overwrite, max_steps=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("out", ["", "  ", None, 3, "a\0b"])
def test_an_out_that_names_no_folder_is_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for call in (train, lambda out: train_seeds(ranks.base(), ranks.records(), out=out, seeds=1)):
        with pytest.raises(BadInput, match="field 'out': must name a folder"):
            call(out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_base_is_never_replaced_by_its_student(base, tmp_path, overwrite, monkeypatch):
    before = contents(base)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base)
    for out in (base, base / ".." / "base", tmp_path / "link", "."):
        for student in (base, str(base), load_student(base)):
            with pytest.raises(BadInput, match="is the folder of the base student"):
                train(out, student, overwrite=overwrite, max_steps=1)
    assert contents(base) == before


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    out = train(tmp_path / "out", max_steps=2).out
    shutil.copytree(out, tmp_path / "old")
    for name in ("notes.txt", "my.safetensors", "data/a.jsonl"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    again = train(out, max_steps=3, overwrite=True)
    assert again.steps == 3
    assert {(out / n).read_text() for n in ("notes.txt", "my.safetensors", "data/a.jsonl")} == {"mine"}
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    with pytest.raises(BadInput, match="did not write there: model-00001-of-00002.safetensors"):
        train(out, max_steps=2, overwrite=True)
    note = json.loads((tmp_path / "old" / "student.json").read_text())
    note["written"]["../victim.txt"] = note["written"]["/etc/hostname"] = ""
    (tmp_path / "old" / "student.json").write_text(json.dumps(note))
    (tmp_path / "victim.txt").write_text("mine")
    folder.clear(tmp_path / "old")
    assert (tmp_path / "victim.txt").read_text() == "mine" and not list((tmp_path / "old").iterdir())


def test_links_in_the_folder_are_not_followed(tmp_path):
    out = train(tmp_path / "out", max_steps=2).out
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("metrics.jsonl", "README.md"):
        kept = (out / name).read_bytes()
        (out / name).unlink()
        (out / name).symlink_to(victim)
        with pytest.raises(BadInput, match=f"did not write there: {name}"):
            train(out, max_steps=3, overwrite=True)
        (out / name).unlink()
        (out / name).write_bytes(kept)
    assert victim.read_text() == "mine"


def test_files_that_come_while_it_trains_do_not_make_the_folder_foreign(tmp_path):
    class Stop(Exception):
        pass

    def stop(model):
        raise Stop

    with pytest.raises(Stop):
        train(tmp_path, save_every=2, callbacks=[at_step(3, stop)])
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path, save_every=2).steps == 6
    assert (tmp_path / "notes.txt").exists() and not list(tmp_path.glob(".*"))


def test_a_student_whose_weights_are_gone_or_broken_is_not_finished(tmp_path):
    out = train(tmp_path, max_steps=2).out
    weights, digest = out / "model.safetensors", sha256_file(out / "model.safetensors")
    assert train(tmp_path, max_steps=2).seconds == 0
    spoil = (
        weights.unlink,
        lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        lambda: weights.write_bytes(b""),
        lambda: weights.write_bytes(bytes(weights.stat().st_size)),
        (out / "config.json").unlink,
        (out / "tokenizer.json").unlink,
    )
    for act in spoil:
        act()
        assert train(tmp_path, max_steps=2).seconds > 0 and sha256_file(weights) == digest
    other = ranks.base()
    other.model.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    with pytest.raises(BadInput, match="holds other weights than its run wrote"):
        train(tmp_path, max_steps=2)


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"run": 3}', '{"max_target": "x"}', "null", "\0" * 9])
def test_a_broken_note_is_one_line(tmp_path, note):
    out = train(tmp_path, max_steps=1).out
    (out / "student.json").write_text(note)
    with pytest.raises(BadInput, match="student.json"):
        train(tmp_path, max_steps=1)
    if "run" not in note:
        with pytest.raises(BadInput, match="student.json"):
            load_student(out)


class Runs:
    "What runs when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def interrupted_run(out):
    def stop(model):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(out, save_every=2, callbacks=[at_step(5, stop)])
    return sorted((out / "checkpoints").glob("checkpoint-*"))


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, caplog):
    whole = train(tmp_path / "whole", save_every=2)
    found = interrupted_run(tmp_path / "out")
    assert [p.name for p in found] == ["checkpoint-2", "checkpoint-4"]
    for path in found[1].rglob("*.pt"):
        path.write_bytes(bytes(path.stat().st_size))
    again = train(tmp_path / "out", save_every=2)
    assert re.search("other bytes than were written.*goes on from checkpoint-2", caplog.text)
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_where_all_checkpoints_are_damaged_one_line_says_what_to_do(tmp_path):
    for checkpoint in interrupted_run(tmp_path):
        victim = max(checkpoint.rglob("*.pt"), key=lambda p: p.stat().st_size)
        victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(BadInput, match="checkpoint-4: has other bytes.*overwrite=True") as e:
        train(tmp_path, save_every=2)
    assert "\n" not in str(e.value)
    assert train(tmp_path, save_every=2, overwrite=True).steps == 6


@pytest.mark.parametrize("how", ["hashes of theirs", "a seal of theirs", "no seal"])
def test_no_pickle_of_somebody_else_is_read(tmp_path, monkeypatch, how):
    ran = tmp_path / "ran"
    for checkpoint in interrupted_run(tmp_path / "out"):
        for path in checkpoint.rglob("*.pt"):
            path.write_bytes(pickle.dumps(Runs(ran)))
        mark = json.loads((checkpoint / "whole.json").read_text())
        for name, f in mark["files"].items():
            f.update(size=(checkpoint / name).stat().st_size, sha256=sha256_file(checkpoint / name))
        if how == "a seal of theirs":
            with monkeypatch.context() as their:
                their.setenv("XDG_STATE_HOME", str(tmp_path / "their"))
                mark["seal"] = checkpoints.seal(mark)
        elif how == "no seal":
            del mark["seal"]
        (checkpoint / "whole.json").write_text(json.dumps(mark))
    with pytest.raises(BadInput, match="seal of this account.*a checkpoint can run programs"):
        train(tmp_path / "out", save_every=2)
    assert not ran.exists()


def test_the_best_checkpoint_is_checked_with_the_one_that_is_resumed(tmp_path):
    "It is read in the end, so it may not come from anywhere else."
    about = dict(run="r", ranks=1, nodes=1, stage=0)
    saving = checkpoints.AtomicCheckpoints(tmp_path, about)
    for step in (1, 2, 3):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "states.pt").write_text("x" * step)
        best = str(tmp_path / "checkpoint-1")
        (path / "trainer_state.json").write_text(json.dumps(dict(best_model_checkpoint=best)))
        saving.mark(step)
        saving.sweep(best="checkpoint-1")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    assert checkpoints.checkpoint_to_resume(tmp_path, about).endswith("checkpoint-3")
    (tmp_path / "checkpoint-1" / "states.pt").write_text("y")
    with pytest.raises(BadInput, match="other bytes"):
        checkpoints.checkpoint_to_resume(tmp_path, about)


def test_a_key_is_this_accounts_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one = checkpoints.seal(dict(run="r"))
    path = tmp_path / "state" / "faithful_distill" / "checkpoint-key"
    assert path.stat().st_mode & 0o777 == 0o600 and checkpoints.seal(dict(run="r")) == one
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert checkpoints.seal(dict(run="r")) != one


@pytest.mark.parametrize("kind, hide", [("t5", False), ("t5", True), ("llama", False)])
def test_the_code_on_a_card_runs_and_says_what_the_student_says(tmp_path, monkeypatch, capsys, kind, hide):
    from faithful_distill.questions import Question
    from faithful_distill.student.answers import answer
    from faithful_distill.student.rows import source_text

    out = tmp_path / "student"
    ranks.train_student(
        ranks.base(kind), ranks.records(), out=out, max_steps=2, hide_choices=hide, max_target=12
    )
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == (2 if kind == "t5" else 1)
    monkeypatch.chdir(out)
    found = {}
    for block in blocks:
        exec(block, found)
    said = capsys.readouterr().out
    q = Question(
        id="a", question=found["question"]["question"], choices=found["question"]["choices"], answer=0
    )
    own = answer(load_student(out), [q])[0]
    assert repr(own.rationale) in said
    if kind == "t5":
        assert found["text"] == source_text(q, hide_choices=hide)
        assert (
            found["tokenizer"].decode(found["written"][0], skip_special_tokens=True).startswith(own.rationale)
        )


def test_a_run_and_an_evaluation_share_a_folder_in_any_order(tmp_path):
    out, of_evaluate = tmp_path / "out", ["metrics.json", "report.html"]

    def evaluated():
        own_folder(out, "evaluate", of_evaluate)
        for name in of_evaluate:
            (out / name).write_text("scores")

    def stop(_):
        raise KeyboardInterrupt

    how = dict(max_steps=3, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(out, callbacks=[at_step(2, stop)], **how)
    evaluated()
    assert train(out, **how).steps == 3
    evaluated()
    assert train(out, **how).seconds == 0.0
    evaluated()
    train(out, overwrite=True, **how)
    assert {(out / name).read_text() for name in of_evaluate} == {"scores"}
    evaluated()


def test_a_command_that_failed_before_it_wrote_has_no_claim(tmp_path):
    check_folder(tmp_path, "evaluate", ["metrics.json"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.json").write_text("mine")
    with pytest.raises(BadInput, match="of something else"):
        own_folder(tmp_path, "evaluate", ["metrics.json"])
    own_folder(tmp_path, "evaluate", ["report.html"])
    own_folder(tmp_path, "evaluate", ["rows.jsonl"])  # report.html was never written
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(BadInput, match="of something else"):
        own_folder(tmp_path, "evaluate", ["report.html"])


@pytest.mark.parametrize("note", ["mine", "[1]", '{"a": 1}', '{"a": [1]}'])
def test_a_note_that_is_not_ours_is_left_alone(tmp_path, note):
    (tmp_path / ".faithful_distill").write_text(note)
    for call in (lambda: train(tmp_path, max_steps=1), lambda: own_folder(tmp_path, "score", ["a"])):
        with pytest.raises(BadInput, match="is no list of what this package wrote"):
            call()
    assert contents(tmp_path) == {".faithful_distill": note.encode()}


def test_what_another_command_wrote_is_no_hindrance_unless_it_would_be_replaced(tmp_path):
    own_folder(tmp_path, "evaluate", ["metrics.json"])
    (tmp_path / "metrics.json").write_text("scores")
    folder.check_out(tmp_path, None)
    own_folder(tmp_path, "publish", ["README.md"])
    (tmp_path / "README.md").write_text("card")
    with pytest.raises(BadInput, match="did not write there: README.md"):
        folder.check_out(tmp_path, None)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux")
def test_a_students_weights_are_on_the_disk_when_they_are_written(tmp_path, monkeypatch):
    from faithful_distill.student.model import tiny_student
    from faithful_distill.training.folder import write_model

    synced, fsync = [], os.fsync

    def note(handle):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    student, out = tiny_student(["fish live in water"]), tmp_path / "out"
    out.mkdir()
    written = write_model(student, dict(student.model.state_dict()), out)
    assert "model.safetensors" in written and synced == [*written, "out"]


def test_a_tokenizer_with_several_chat_templates_is_written_whole(tmp_path):
    "transformers writes all but the default one into a folder."
    from faithful_distill.student.model import tiny_student
    from faithful_distill.training.folder import write_model

    student, out = tiny_student(["fish live in water"]), tmp_path / "out"
    student.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    (out / ".writing").mkdir(parents=True)
    (out / ".writing" / "stale.bin").write_text("of a run that was killed")
    written = write_model(student, dict(student.model.state_dict()), out)
    assert any("/" in name for name in written) and "stale.bin" not in written
    assert all(sha256_file(out / name) == found for name, found in written.items())
    assert not (out / ".writing").exists()


def test_the_key_of_a_run_knows_the_precision_of_its_machine(monkeypatch):
    from faithful_distill.training import zero
    from faithful_distill.training.folder import run_key
    from faithful_distill.training.settings import Settings

    key = lambda **how: run_key(Settings(**how), ranks.rationales(), None, "w")
    here = key()
    monkeypatch.setattr(zero, "uses_bf16", lambda settings: settings.precision != "fp32")
    assert key() != here and key() == key(precision="bf16")
