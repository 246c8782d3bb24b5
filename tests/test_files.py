"What several processes do to one folder at once, and lines that no JSON reader takes."

import errno
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faithful_distill.files import BadInput, Journal, writable_folder, write_text
from faithful_distill.jsonl import read_jsonl
from faithful_distill.ownership import sole_writer


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


def leave_alone(make, call, problem):
    "Whatever `make` put at the path is what it was after the refused call."
    path = make()
    before = os.lstat(path)
    with pytest.raises(BadInput, match=problem) as error:
        call(path)
    assert "\n" not in str(error.value)
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
    assert not [p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.")]


def special(kind, folder):
    "Something that is no plain file, at `folder / 'out'`."
    import socket

    path = folder / "out"
    (folder / "victim").write_text("mine\n")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(folder / "victim")
    elif kind == "dangling link":
        path.symlink_to(folder / "nothing")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif os.access("/dev/full", os.W_OK) and os.geteuid() == 0:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 7))
    else:
        pytest.skip("only root makes a device")
    return path


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
@pytest.mark.parametrize("call", [lambda p: write_text(p, "text"), lambda p: Journal(p).append({"a": 1})])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link", "socket", "device"])
def test_what_is_no_plain_file_is_neither_replaced_nor_followed(tmp_path, monkeypatch, kind, call):
    monkeypatch.chdir(tmp_path)
    leave_alone(lambda: special(kind, tmp_path), call, "out: cannot be written: it is a")
    assert (tmp_path / "victim").read_text() == "mine\n" and not (tmp_path / "nothing").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these")
@pytest.mark.parametrize("kind", ["pipe", "link", "dangling link"])
@pytest.mark.parametrize("name", [".run.lock", ".run.lock.holder"])
def test_no_lock_is_taken_through_what_is_no_plain_file(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    special(kind, tmp_path).rename(tmp_path / name)

    def take(path):
        with sole_writer(tmp_path / "run"):
            pass

    leave_alone(lambda: tmp_path / name, take, "cannot be locked")
    assert (tmp_path / "victim").read_text() == "mine\n" and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", [".run.lock", ".run.lock.holder"])
def test_a_file_of_another_origin_is_no_lock(tmp_path, name):
    (tmp_path / name).write_text("remember the milk")
    with pytest.raises(BadInput, match="is no lock of this program"):
        with sole_writer(tmp_path / "run"):
            pass
    assert (tmp_path / name).read_text() == "remember the milk"


foreign = [
    "remember the milk",
    "remember the milk\n",
    '{"id": "1"}\nremember the milk',
    '{"id": "1"}\n[1, 2]\n',
    '{"note": 1}\n',
    '{"id": "1"}\n{"todo": "mi',
    "\x00\x01\x02",
    "\n",
]


@pytest.mark.parametrize("text", foreign)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, text):
    path = tmp_path / "out.partial"
    path.write_text(text)
    with pytest.raises(BadInput, match="out.partial:[12]: is not a journal of this program"):
        Journal(path, ["id", "role"])
    assert path.read_text() == text


@pytest.mark.parametrize("torn", ["", "{", '{"', '{"id', '{"id": "2"', '{"role": "go', '{"id": "2"}'])
def test_opening_a_journal_changes_nothing_and_appending_drops_the_torn_line(tmp_path, torn):
    path = tmp_path / "out.partial"
    path.write_text('{"id": "1"}\n' + torn)
    with Journal(path, ["id", "role"]) as journal:
        assert journal.records == [{"id": "1"}] and path.read_text() == '{"id": "1"}\n' + torn
        journal.append({"id": "3"})
    assert path.read_text() == '{"id": "1"}\n{"id": "3"}\n'


def append_each(path, name, times):
    with Journal(path) as journal:
        for k in range(times):
            journal.append({"id": f"{name}{k}"})


def test_nothing_is_lost_where_several_append_to_one_journal(tmp_path):
    with Journal(tmp_path / "j") as one, Journal(tmp_path / "j") as other:
        other.append({"id": "1"}, {"id": "2"})
        one.append({"id": "3"})
        other.append({"id": "4"})
        assert one.records == [{"id": k} for k in "123"] and other.records == [{"id": k} for k in "1234"]
    assert [row["id"] for _, row in read_jsonl(tmp_path / "j")] == list("1234")
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=append_each, args=(tmp_path / "k", name, 100)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    ids = [row["id"] for _, row in read_jsonl(tmp_path / "k")]
    assert sorted(ids) == sorted(f"{name}{k}" for name in "ab" for k in range(100))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["j", "k"], "no lock stays"


@pytest.mark.parametrize("harm", [Path.unlink, lambda p: p.write_text(""), lambda p: write_text(p, "")])
def test_a_journal_that_was_taken_away_is_not_written_to(tmp_path, harm):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append({"id": "1"})
        harm(path)
        with pytest.raises(BadInput, match="was removed, replaced or shortened"):
            journal.append({"id": "2"})
        assert journal.records == [{"id": "1"}] and (not path.exists() or not path.read_text())


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux")
def test_what_was_written_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}").split("/")[-1])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    write_text(tmp_path / "a", "text")
    assert [name.split(".")[1:2] or name for name in synced] == [["a"], tmp_path.name]


class Full:
    "A file on a disk that is full after so many bytes."

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(bytes(data[: self.room]))
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_is_one_line_and_takes_nothing_from_the_journal(tmp_path):
    with Journal(tmp_path / "j") as journal:
        journal.append({"id": "1"})
        whole, room = journal.file, (tmp_path / "j").stat().st_size
        journal.file = Full(whole, 5)
        with pytest.raises(BadInput, match="j: cannot be written: No space left.*Make room and call again"):
            journal.append({"id": "2"})
        assert (tmp_path / "j").stat().st_size == room and journal.records == [{"id": "1"}]
        journal.file = whole
        journal.append({"id": "3"})
    assert [row for _, row in read_jsonl(tmp_path / "j")] == [{"id": "1"}, {"id": "3"}]


@pytest.mark.skipif(not os.path.exists("/dev/shm"), reason="Linux")
def test_a_full_disk_when_a_file_is_written_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadInput, match="out: cannot be written: No space left.*Make room and call again"):
        write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, problem", [("n" * 300, "File name too long"), ("a\0b", "null (byte|character)"), ("", "is empty")]
)
@pytest.mark.parametrize(
    "call", [lambda p: write_text(p, "x"), Journal, lambda p: sole_writer(p).__enter__()]
)
def test_names_that_no_file_can_have_are_one_line(tmp_path, monkeypatch, name, problem, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=problem) as error:
        call(name)
    assert "\n" not in str(error.value) and "\0" not in str(error.value) and not list(tmp_path.iterdir())
    with pytest.raises(BadInput):
        list(read_jsonl(name))


def test_a_long_name_that_a_file_can_have_is_written(tmp_path):
    assert write_text(tmp_path / ("n" * 250), "text").read_text() == "text"


def test_half_a_character_is_not_written(tmp_path):
    with pytest.raises(BadInput, match="contains a lone surrogate"):
        write_text(tmp_path / "out", "text \ud83d")
    assert not list(tmp_path.iterdir())


halves = [
    (r'{"id": "1", "question": "Is it \ud83d?"}', "question"),
    (r'{"id": "\udc00"}', "id"),
    (r'{"choices": ["a", "\uD83D"]}', "choices"),
    (r'{"extra": {"deep": ["\ud83d "]}}', "extra"),
]


@pytest.mark.parametrize("line, field", halves)
def test_half_a_character_is_named_by_line_and_field(tmp_path, line, field):
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": "0", "emoji": "\\ud83d\\ude00"}\n' + line + '\n{"id": "2"}\n')
    with pytest.raises(BadInput, match=f"own.jsonl:2: field '{field}': contains a lone surrogate"):
        list(read_jsonl(path))
    bad = []
    assert [n for n, _ in read_jsonl(path, bad)] == [1, 3] and [(e.line, e.field) for e in bad] == [
        (2, field)
    ]


@pytest.mark.parametrize("line", ['{"answer": 0, "answer": 1}', '{"x": [{"answer": 0, "answer": 0}]}'])
def test_a_key_that_occurs_twice_is_refused(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text('{"answer": 0}\n' + line + "\n")
    with pytest.raises(BadInput, match="own.jsonl:2: field 'answer': occurs twice"):
        list(read_jsonl(path))


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system_and_are_read_one_at_a_time(tmp_path, ends):
    path = tmp_path / "own.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + ends.join(['{"a": "\u2028\u0085"}', "", '{"a": 2}', "broken"]).encode()
    )
    rows = read_jsonl(path)
    assert [next(rows), next(rows)] == [(1, {"a": "\u2028\u0085"}), (3, {"a": 2})]
    with pytest.raises(BadInput, match="own.jsonl:4: broken JSON"):
        next(rows)


kinds_of_file = {
    "own.csv": (b"question,answer\nWho?,me\n", "own.csv:1: is a table, not JSON lines"),
    "own.parquet": (b"PAR1\x00\x00", "is a Parquet file, not JSON lines"),
    "own.zip": (b"PK\x03\x04\x00", "is a zip archive"),
    "own.xz": (b"\xfd7zXZ\x00\x00", "is packed with xz"),
    "task.json": (b'{"name": "strategyqa", "examples": [\n {"input": "Q"}\n]}', "is one JSON document"),
    "pretty.json": (b'{\n  "a": 1\n}', "is one JSON document"),
    "blank.json": (b'\n\n[\n{"a": 1}\n]', "is one JSON document"),
    "utf16.jsonl": (b"\xff\xfe{\x00", "utf16.jsonl:1: is not UTF-8 text: invalid start byte at byte 0"),
    "latin.jsonl": (b'{"a": 1}\n{"a": "\xe9"}\n', "latin.jsonl:2: is not UTF-8 text: .* at byte 16"),
    "cut.jsonl.gz": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\x56", "cannot be unpacked"),
}


@pytest.mark.parametrize("name", kinds_of_file)
def test_other_kinds_of_file_are_named(tmp_path, name):
    data, problem = kinds_of_file[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=problem) as error:
        list(read_jsonl(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_file_packed_with_gzip_is_read(tmp_path):
    import gzip

    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\nbroken\n'))
    bad = []
    assert list(read_jsonl(path, bad)) == [(1, {"a": 1}), (2, {"a": 2})] and bad[0].line == 3


def test_an_error_but_for_a_part_keeps_the_others():
    for value in ({"value": 3}, {"value": "(got none)"}, {}):
        error = BadInput("is odd", field="a", remedy="Mend it.", **value)
        assert str(error.but()) == str(error) and str(error.but(field="b")) == str(error).replace(
            "'a'", "'b'"
        )
        assert str(error.located("f", 2)) == f"f:2: {error}"
