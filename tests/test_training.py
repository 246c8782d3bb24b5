"Training as it is met in earnest: several processes, killed processes, full disks, and the same numbers as ever."
import json, os, subprocess, sys
from pathlib import Path

import pytest

import ranks
from faithful_distill.files import BadInput
from faithful_distill.training import read_jsonl, train_student

here = Path(__file__).parent


def environment():
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return dict(keep, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=os.pathsep.join([str(here.parent), str(here), keep.get("PYTHONPATH", "")]), PYTHONWARNINGS="ignore")


def launch(n, script, *args, timeout=240):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(here/script), *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def history(folder): return [row for _, row in read_jsonl(Path(folder)/"metrics.jsonl")]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(2, "ranks.py", folder)
    return folder


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {a: ranks.run(folder/f"x{a}", 2, a) for a in (1, 2)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_train_as_one(two_ranks, one_rank, stage, accumulation):
    "Losses, their parts, token counts and gradient norms do not depend on ranks, stage or accumulation."
    expected, found = history(one_rank[1][1].out), history(two_ranks/f"stage{stage}x{accumulation}")
    assert len(expected) == len(found) == 4
    for want, got in zip(expected, found):
        assert want.keys() == got.keys()
        for name in want: assert got[name] == pytest.approx(want[name], rel=2e-4, abs=2e-4), name


def test_accumulation_on_one_rank_changes_nothing(one_rank):
    for want, got in zip(history(one_rank[1][1].out), history(one_rank[2][1].out)):
        assert got == pytest.approx(want, rel=2e-4, abs=2e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gathered_weights_are_equal(two_ranks, one_rank, stage):
    from safetensors.torch import load_file
    want, got = load_file(one_rank[1][1].out/"model.safetensors"), load_file(two_ranks/f"stage{stage}x1"/"model.safetensors")
    assert want.keys() == got.keys()
    for name in want: assert (want[name] - got[name]).abs().max() < 2e-4


def test_ranks_share_the_optimizer_state_and_stage_3_the_parameters(two_ranks, one_rank):
    held = {(stage, rank): json.loads((two_ranks/f"held-{stage}x1-{rank}.json").read_text()) for stage in range(4) for rank in range(2)}
    whole = one_rank[1][0].state
    for rank in range(2):
        assert held[0, rank]["state"] >= 0.99*whole
        for stage in (1, 2, 3): assert 0.45*whole < held[stage, rank]["state"] < 0.55*whole
        assert held[3, rank]["resident"] == 0 < held[2, rank]["resident"]


def test_two_runs_in_one_process_leave_no_trace(tmp_path):
    "A run between two equal runs changes nothing, and after them no Trainer or from_pretrained is on DeepSpeed."
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    before, state = dict(os.environ), torch.get_rng_state()
    first = ranks.run(tmp_path/"a", 2, 1)[1]
    ranks.run(tmp_path/"b", 3, 1, kind="llama", seed=3)
    again = ranks.run(tmp_path/"c", 2, 1)[1]
    assert history(first.out) == history(again.out)
    assert (first.out/"model.safetensors").read_bytes() == (again.out/"model.safetensors").read_bytes()
    assert dict(os.environ) == before and torch.equal(torch.get_rng_state(), state)
    assert not is_deepspeed_zero3_enabled() and not torch.distributed.is_initialized()
