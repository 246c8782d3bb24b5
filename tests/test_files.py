"What several processes do to one folder at once."
import multiprocessing, time

import pytest

from faithful_distill.files import BadInput, sole_writer, writable_folder


def ask(folder, times):
    for _ in range(times): writable_folder(folder)


def test_several_ranks_may_ask_for_one_folder_at_once(tmp_path):
    "The ranks of a training run all make sure of the same output folder, at the same moment."
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=ask, args=(tmp_path/"out", 2000)) for _ in range(2)]
    for rank in ranks: rank.start()
    for rank in ranks: rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert not list((tmp_path/"out").iterdir())


def hold(path, ready):
    with sole_writer(path):
        ready.set()
        time.sleep(600)


def test_a_killed_writer_leaves_nothing_locked(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    writer = context.Process(target=hold, args=(tmp_path/"out.jsonl", ready))
    writer.start()
    assert ready.wait(60)
    with pytest.raises(BadInput, match=rf"out.jsonl: is being written by another process \(got 'process {writer.pid} on "):
        with sole_writer(tmp_path/"out.jsonl"): pass
    writer.kill(); writer.join()
    with sole_writer(tmp_path/"out.jsonl"): pass
    assert not list(tmp_path.iterdir())
