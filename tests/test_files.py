"What several processes do to one folder at once, and lines that no JSON reader takes."

import errno
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from faithful_distill.files import BadInput, read_jsonl, sole_writer, writable_folder, write_text


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
    """One process opens the lock's file just before its holder removes it, another makes a new file.

    The lock of the removed file must not count, or both would be the sole writer.
    """
    opened, removed = os.open, []

    def late(path, *args, **kwargs):
        handle = opened(path, *args, **kwargs)
        if not removed and str(path).endswith(".lock"):
            removed.append(os.unlink(path))  # the holder finishes just now
        return handle

    monkeypatch.setattr(os, "open", late)
    with sole_writer(tmp_path / "out.jsonl"):
        assert removed
        with pytest.raises(BadInput, match="is being written by another process"):
            with sole_writer(tmp_path / "out.jsonl"):
                pass
    assert not list(tmp_path.iterdir())


def count_up(path, times):
    "Read a number and write the next one, as a process that is alone with the file may do."
    while times:
        try:
            with sole_writer(path):
                path.write_text(str(int(path.read_text()) + 1))
        except BadInput:
            continue  # another process is at work
        times -= 1


def test_processes_that_race_over_a_lock_never_hold_it_together(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=count_up, args=(counter, 300)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert counter.read_text() == "900" and [p.name for p in tmp_path.iterdir()] == ["counter"]


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".out.jsonl.lock").symlink_to(precious)
    with pytest.raises(BadInput, match=r"\.out\.jsonl\.lock: cannot be locked"):
        with sole_writer(tmp_path / "out.jsonl"):
            pass
    assert precious.read_text() == "mine"


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    import filelock

    def no_locks(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with sole_writer(tmp_path / "out.jsonl"), sole_writer(tmp_path / "out.jsonl"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path, mask):
    "In a process of its own: the mask is a process's, and no other thread here may run under it."
    code = (
        f"import os, sys; os.umask({mask}); from faithful_distill.files import write_text;"
        " write_text(sys.argv[1], 'text'); print(os.umask(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == mask, "it is as it was"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_in_the_place_of_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        write_text(tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"a": 1' + "0" * 5000 + "}", "cannot be read: Exceeds the limit"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_lines_that_python_cannot_read_are_named(tmp_path, line, problem):
    (tmp_path / "own.jsonl").write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(BadInput, match=f"own.jsonl:2: .*{problem}"):
        list(read_jsonl(tmp_path / "own.jsonl"))
    bad = []
    assert len(list(read_jsonl(tmp_path / "own.jsonl", bad))) == len(bad) == 1


def test_a_path_through_a_file_is_named(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(BadInput, match="own.jsonl/x: cannot be read: Not a directory"):
        list(read_jsonl(tmp_path / "own.jsonl" / "x"))
