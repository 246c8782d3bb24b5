"What several processes do to one folder at once."
import multiprocessing

from faithful_distill.files import writable_folder


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
