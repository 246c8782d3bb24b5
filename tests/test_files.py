"What several processes do to one folder at once, and lines that no JSON reader takes."

import multiprocessing, time

import pytest

from faithful_distill.files import BadInput, read_jsonl, sole_writer, writable_folder


def ask(folder, times):
    for _ in range(times):
        writable_folder(folder)


def test_several_ranks_may_ask_for_one_folder_at_once(tmp_path):
    "The ranks of a training run all make sure of the same output folder, at the same moment."
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=ask, args=(tmp_path / "out", 2000)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert not list((tmp_path / "out").iterdir())


def hold(path, ready):
    with sole_writer(path):
        ready.set()
        time.sleep(600)


def test_a_killed_writer_leaves_nothing_locked(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=hold, args=(tmp_path / "out.jsonl", ready))
    writer.start()
    assert ready.wait(60)
    with pytest.raises(
        BadInput, match=rf"out.jsonl: is being written by another process \(got 'process {writer.pid} on "
    ):
        with sole_writer(tmp_path / "out.jsonl"):
            pass
    writer.kill()
    writer.join()
    with sole_writer(tmp_path / "out.jsonl"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_lets_nobody_in(tmp_path, monkeypatch):
    "One opened the lock before its holder removed it, another makes a new one: not both are the sole writer."
    import os
    from faithful_distill import files

    opened, fresh = os.open, []

    def late(path, *args):
        handle = opened(path, *args)
        if not fresh and str(path).endswith(".lock"):
            fresh.append(os.unlink(path))  # the holder finishes just now
        return handle

    monkeypatch.setattr(files.os, "open", late)
    with pytest.raises(BadInput, match="was finished by another process a moment ago"):
        with sole_writer(tmp_path / "out.jsonl"):
            pass
    with sole_writer(tmp_path / "out.jsonl"):
        pass


def test_a_folder_in_the_place_of_a_file_is_a_clear_error(tmp_path):
    from faithful_distill.files import write_text

    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        write_text(tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read: Exceeds the limit"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_lines_that_python_cannot_read_are_named(tmp_path, line, said):
    (tmp_path / "own.jsonl").write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(BadInput, match=f"own.jsonl:2: .*{said}"):
        list(read_jsonl(tmp_path / "own.jsonl"))
    bad = []
    assert len(list(read_jsonl(tmp_path / "own.jsonl", bad))) == len(bad) == 1


def test_a_path_through_a_file_is_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(BadInput, match="own.jsonl/x: cannot be read: Not a directory"):
        list(read_jsonl(tmp_path / "own.jsonl" / "x"))
