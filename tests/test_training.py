"Training under real conditions: several processes, killed processes, full disks, and the recorded numbers."

import functools
import importlib.util
import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import interrupted
import ranks
from faithful_distill.files import BadInput, write_json
from faithful_distill.jsonl import read_jsonl
from faithful_distill.training import folder
from faithful_distill.training.train import train_student

here = Path(__file__).parent


def environment():
    keep = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return dict(
        keep,
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        PYTHONPATH=os.pathsep.join([str(here.parent), str(here), keep.get("PYTHONPATH", "")]),
        PYTHONWARNINGS="ignore",
    )


def launch(n, script, *args, timeout=240):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(n),
        str(here / script),
        *map(str, args),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    first = max(done.stderr.find("Traceback"), 0)  # what failed first; the others only say that it left them
    assert done.returncode == 0, f"{done.stderr[first : first + 4000]}\n[...]\n{done.stderr[-1500:]}"


def history(folder):
    return [row for _, row in read_jsonl(Path(folder) / "metrics.jsonl")]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(2, "ranks.py", folder)
    return folder


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    "What one rank makes of a step of so many examples, in one micro-batch or in several."
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(kind, examples, micro_batches):
        out = folder / f"{kind}-{examples}x{micro_batches}"
        return ranks.run(out, 2, micro_batches, kind, batch_size=examples)

    return lambda kind="t5", examples=4, micro_batches=1: run(kind, examples, micro_batches)


@pytest.mark.parametrize("kind, stage, accumulation", ranks.alike)
def test_two_ranks_train_as_one(two_ranks, one_rank, kind, stage, accumulation):
    "Losses, their parts, token counts and gradient norms do not depend on ranks, stage or accumulation."
    expected, found = (
        history(one_rank(kind, ranks.examples_per_step(accumulation))[1].out),
        history(two_ranks / f"{kind}-stage{stage}x{accumulation}"),
    )
    assert len(expected) == len(found) == 4
    for want, got in zip(expected, found):
        assert got == ranks.log_row(want)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_on_one_rank_changes_nothing(one_rank, micro_batches):
    whole, accumulated = one_rank()[1].out, one_rank(micro_batches=micro_batches)[1].out
    for want, got in zip(history(whole), history(accumulated), strict=True):
        assert got == ranks.log_row(want)


@pytest.mark.parametrize("kind, stage, accumulation", ranks.alike)
def test_gathered_weights_are_equal(two_ranks, one_rank, kind, stage, accumulation):
    from safetensors.torch import load_file

    want, got = (
        load_file(one_rank(kind, ranks.examples_per_step(accumulation))[1].out / "model.safetensors"),
        load_file(two_ranks / f"{kind}-stage{stage}x{accumulation}" / "model.safetensors"),
    )
    assert want.keys() == got.keys()
    for name in want:
        assert (want[name] - got[name]).abs().max() < 2e-4


@pytest.mark.parametrize("metric", ["accuracy", "loss_counterfactual"])
def test_two_ranks_choose_the_same_best_student(two_ranks, tmp_path, metric):
    "Dev metrics, the step training stops at, the step that is kept and its weights are those of one rank."
    from safetensors.torch import load_file

    alone, found = ranks.chosen(tmp_path, metric), two_ranks / f"best-{metric}"
    want, got = ([row for row in history(folder) if "eval_loss" in row] for folder in (alone.out, found))
    assert [row["step"] for row in want] == [row["step"] for row in got] and alone.steps < 60
    for a, b in zip(want, got):
        assert b == pytest.approx(a, rel=2e-3)
    values = [row[f"eval_{metric}"] for row in got]
    best = max(values) if metric == "accuracy" else min(values)
    assert 0 < values.index(best) == len(values) - 3  # neither the first evaluation nor the last
    note = json.loads((found / "student.json").read_text())
    assert (
        note["metrics"][f"eval_{metric}"] == best == pytest.approx(alone.metrics[f"eval_{metric}"], rel=2e-3)
    )
    a, b = load_file(alone.out / "model.safetensors"), load_file(found / "model.safetensors")
    for name in a:
        assert (a[name] - b[name]).abs().max() < 0.05 * a[name].abs().max()


def test_two_ranks_train_adapters_as_one(two_ranks, tmp_path):
    from safetensors.torch import load_file

    alone = ranks.adapted(tmp_path / "lora").out
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        want, got = load_file(alone / file), load_file(two_ranks / "lora" / file)
        assert want.keys() == got.keys() and not any("lora" in name for name in want if "adapter" not in file)
        assert max((want[name] - got[name]).abs().max() for name in want) < 2e-4


def test_ranks_share_the_optimizer_state_and_stage_3_the_parameters(two_ranks, one_rank):
    held = {
        (stage, rank): json.loads((two_ranks / f"held-t5-{stage}x1-{rank}.json").read_text())
        for stage in range(4)
        for rank in range(2)
    }
    whole = one_rank()[0].state
    for rank in range(2):
        assert held[0, rank]["state"] >= 0.99 * whole
        for stage in (1, 2, 3):
            assert 0.45 * whole < held[stage, rank]["state"] < 0.55 * whole
        assert held[3, rank]["resident"] == 0 < held[2, rank]["resident"]


def test_two_runs_in_one_process_leave_no_trace(tmp_path):
    "A run between two equal runs changes nothing, and after them no Trainer or from_pretrained is on DeepSpeed."
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    before, state = dict(os.environ), torch.get_rng_state()
    first = ranks.run(tmp_path / "a", 2, 1)[1]
    ranks.run(tmp_path / "b", 3, 1, kind="llama", seed=3)
    again = ranks.run(tmp_path / "c", 2, 1)[1]
    assert history(first.out) == history(again.out)
    assert (first.out / "model.safetensors").read_bytes() == (again.out / "model.safetensors").read_bytes()
    assert dict(os.environ) == before and torch.equal(torch.get_rng_state(), state)
    assert not is_deepspeed_zero3_enabled() and not torch.distributed.is_initialized()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_finished_run_keeps_no_tensor(tmp_path, stage):
    "Neither weights nor optimizer nor buckets stay in memory: the seeds of a large student do not add up."
    import gc, torch

    def alive():
        gc.collect()
        return sum(
            {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if type(t) in (torch.Tensor, torch.nn.Parameter)
            }.values()
        )

    before = alive()
    ranks.run(tmp_path, stage, 1)
    assert alive() - before < 10_000  # the student has 45,000 bytes of weights, as many again for each moment


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "The folder of a run on so many ranks, under that stage, that nobody killed."
    folder = tmp_path_factory.mktemp("undisturbed")

    @functools.cache
    def run(size, stage):
        assert interrupted.attempt(folder / f"{size}x{stage}", size=size, stage=stage)
        return folder / f"{size}x{stage}"

    return run


def same_result(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert not (a / "checkpoints").exists()


@pytest.mark.parametrize(
    "size, stage, kills, continued_from",
    [
        (
            1,
            2,
            [("step", 3), ("save", 2), ("mark", 1), ("step", 7), ("export", 1), ("export", 2)],
            [0, 2, 2, 2, 6, 8, 8],
        ),
        (2, 2, [("step", 5), ("save", 3), ("step", 7, 1)], [0, 4, 4, 6]),
        (2, 3, [("save", 3, 1), ("sweep", 1)], [0, 0, 6]),
    ],
)
def test_killed_and_called_again_ends_in_the_same_bytes(
    undisturbed, tmp_path, size, stage, kills, continued_from
):
    """kill -9, of either rank: after a step, in the middle of a checkpoint's file, just before the checkpoint is
    marked whole, while the one before is removed, and while the finished student is written.
    """
    for what, at, *victim in kills:
        assert not interrupted.attempt(tmp_path / "run", (what, at), size, stage, *victim)
    assert interrupted.attempt(tmp_path / "run", size=size, stage=stage)
    same_result(tmp_path / "run", undisturbed(size, stage))
    assert [int(step) for step in (tmp_path / "run.0.started").read_text().split()] == continued_from


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="ten kills at random: set FAITHFUL_DISTILL_SLOW=1"
)
@pytest.mark.parametrize("size", [1, 2])
def test_ten_kills_at_random(undisturbed, tmp_path, size):
    """Stage, rank, moment and how long the other rank outlives it; FAITHFUL_DISTILL_SEED draws others.

    What was done is printed (pytest -s).
    """
    rng = random.Random(f"{os.environ.get('FAITHFUL_DISTILL_SEED', 0)} {size}")
    killed = runs = 0
    while killed < 10:
        run, stage, ended = tmp_path / str(runs), rng.randrange(4), False
        while not ended:
            kill, victim, grace = (
                interrupted.random_kill(rng) if killed < 10 else None,
                rng.randrange(size),
                rng.choice([0, 0.02, 0.3]),
            )
            ended = interrupted.attempt(run, kill, size, stage, victim, grace)
            killed += not ended
            print(
                f"run {runs} of {size} ranks under stage {stage}: {kill} on rank {victim} (grace"
                f" {grace}){' never came' if ended and kill else ''}",
                flush=True,
            )
        same_result(run, undisturbed(size, stage))
        runs += 1


def test_other_runs_and_other_numbers_of_ranks_are_refused(tmp_path):
    "A checkpoint of another run, or of two processes, is neither overwritten nor resumed."
    assert not interrupted.attempt(tmp_path / "run", ("step", 5), 2)
    given = dict(max_steps=interrupted.steps, batch_size=2, lr=1e-2, deepspeed=ranks.stage_config(2))

    def again(base=None, **more):
        base = base or ranks.base(dropout_rate=0.1)
        return train_student(base, ranks.records(), out=tmp_path / "run", **{**given, **more})

    with pytest.raises(BadInput, match=r"nproc_per_node 2|launch\(2, "):
        again()  # the second where a notebook ran in this process before
    with pytest.raises(BadInput, match="another run"):
        again(lr=1e-3)
    with pytest.raises(BadInput, match="another run"):
        again(ranks.base("llama"))
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/whole.json"))) == 2
    assert again(overwrite=True).steps == interrupted.steps


@pytest.mark.parametrize(
    "argv, module, ranks, nodes, expected",
    [
        (
            ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"],
            "ipykernel_launcher",
            2,
            1,
            "faithful_distill.training.launch.launch(2, ...)",
        ),
        (
            ["launch.py", "/tmp/gone/call.json"],
            "faithful_distill.training.launch",
            2,
            1,
            "faithful_distill.training.launch.launch(2, ...)",
        ),
        (
            ["launch.py", "/tmp/gone/call.json"],
            "faithful_distill.training.launch",
            1,
            1,
            "train_student(...)",
        ),
        (["-c"], None, 2, 1, "faithful_distill.training.launch.launch(2, ...)"),
        ([__file__, "--out", "a b"], None, 1, 1, f"{{python}} {__file__} --out 'a b'"),
        (
            [__file__],
            None,
            2,
            1,
            f"{{python}} -m torch.distributed.run --standalone --nproc_per_node 2 {__file__}",
        ),
        (
            ["cli.py", "train"],
            "faithful_distill.cli",
            2,
            1,
            "{python} -m torch.distributed.run --standalone --nproc_per_node 2 -m faithful_distill.cli train",
        ),
        (
            [__file__],
            None,
            8,
            2,
            (
                "{python} -m torch.distributed.run --nnodes 2 --rdzv_backend c10d --rdzv_endpoint"
                f" FIRST_NODE:29500 --nproc_per_node 4 {__file__}"
            ),
        ),
    ],
)
def test_the_error_names_a_command_that_works_from_here(monkeypatch, argv, module, ranks, nodes, expected):
    """Neither the kernel of a notebook nor the deleted call of `launch` is a command.

    A module goes by its name; several nodes need an address to meet at.
    """
    from types import ModuleType, SimpleNamespace
    from faithful_distill.ranks import resume_command

    main = ModuleType("__main__")
    main.__spec__ = module and SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert resume_command(ranks, nodes) == expected.format(python=Path(sys.executable).name)


@pytest.mark.parametrize(
    "given, nodes",
    [
        (dict(WORLD_SIZE="8", LOCAL_WORLD_SIZE="4"), 2),
        (dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4"), 1),
        (dict(WORLD_SIZE="4", LOCAL_SIZE="2"), 2),
        (dict(WORLD_SIZE="3"), 1),
    ],
)
def test_nodes_are_counted_as_the_launcher_says(monkeypatch, given, nodes):
    from faithful_distill.ranks import count_nodes

    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert count_nodes() == nodes


reference = here / "references" / "trajectories.json"


def trajectory(kind, folder):
    "T5 averages the loss per part, as the paper does, Llama per token, as training does by default."
    reduction = dict(t5="per_part", llama="per_token")[kind]
    result = train_student(
        ranks.base(kind),
        ranks.records(),
        out=folder / kind,
        max_steps=20,
        batch_size=2,
        lr=3e-3,
        log_every=1,
        reduction=reduction,
        deepspeed="cpu",
    )
    return [dict(loss=row["loss"], grad_norm=row["grad_norm"]) for row in history(result.out)]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_golden_trajectories(tmp_path, kind):
    """Loss and gradient norm of the first 20 steps are those recorded.

    Record anew with FAITHFUL_DISTILL_RECORD=1, and say why in the commit.
    """
    found = trajectory(kind, tmp_path)
    if os.environ.get("FAITHFUL_DISTILL_RECORD"):
        import deepspeed, torch, transformers

        kept = json.loads(reference.read_text()) if reference.exists() else {}
        write_json(
            reference,
            dict(
                kept,
                versions=dict(
                    torch=torch.__version__,
                    transformers=transformers.__version__,
                    deepspeed=deepspeed.__version__,
                ),
                **{kind: found},
            ),
        )
    recorded = json.loads(reference.read_text())
    assert len(found) == 20
    for step, (want, got) in enumerate(zip(recorded[kind], found)):
        assert got == pytest.approx(want, rel=1e-3), f"step {step + 1}, recorded with {recorded['versions']}"


def train(out, base=None, records=None, **more):
    return train_student(
        base or ranks.base(),
        ranks.records() if records is None else records,
        out=out,
        **{**dict(max_steps=6, batch_size=4, lr=1e-2, log_every=1, deepspeed="cpu"), **more},
    )


def at_step(n, act):
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == n:
                act(model)

    return At()


def whole(out):
    return sorted(p.parent.name for p in (out / "checkpoints").glob("*/whole.json"))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_checkpoints(tmp_path):
    spoil = at_step(3, lambda model: next(model.parameters()).data.fill_(float("nan")))
    with pytest.raises(BadInput, match="not a finite number in step 4"):
        train(tmp_path, save_every=2, callbacks=[spoil])
    assert whole(tmp_path) == ["checkpoint-2"] and not (tmp_path / "student.json").exists()
    clean = train(tmp_path / "clean")
    assert history(train(tmp_path, save_every=2).out) == history(
        clean.out
    )  # called again it goes on from there
    assert (tmp_path / "model.safetensors").read_bytes() == (clean.out / "model.safetensors").read_bytes()


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def second(model):
        with pytest.raises(
            BadInput, match=f"out: is being written by another process .got 'process {os.getpid()} on "
        ):
            train(out, overwrite=True)
        seen.append(sorted(p.name for p in out.rglob("*")))

    seen = []
    train(out, save_every=2, callbacks=[at_step(3, second)])
    assert "checkpoint-2" in seen[0] and not list(out.glob(".*"))


def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    import torch

    save, full = torch.save, []

    def maybe(obj, f, *args, **kwargs):
        if full:
            raise OSError(28, "No space left on device")
        return save(obj, f, *args, **kwargs)

    monkeypatch.setattr(torch, "save", maybe)
    with pytest.raises(BadInput, match="Make room"):
        train(tmp_path, save_every=2, callbacks=[at_step(3, lambda _: full.append(True))])
    assert whole(tmp_path) == ["checkpoint-2"]
    full.clear()
    assert train(tmp_path, save_every=2).steps == 6


def test_a_disk_that_is_really_full_is_a_clear_error(tmp_path):
    """The kernel refuses to let a file grow; a limit of this process stands in for the disk.

    The checkpoint before stays, and the run goes on from it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(BadInput, match="Make room"):
            train(
                tmp_path,
                save_every=2,
                callbacks=[
                    at_step(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1])))
                ],
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert whole(tmp_path) == ["checkpoint-2"]
    assert history(train(tmp_path, save_every=2).out) == history(train(tmp_path / "clean").out)


def test_a_gradient_that_is_not_finite_never_gets_into_a_checkpoint(tmp_path):
    def spoil(model):
        next(p for p in model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))

    with pytest.raises(BadInput, match="gradient is not finite in step 4"):
        train(tmp_path, save_every=2, callbacks=[at_step(3, spoil)])
    assert whole(tmp_path) == ["checkpoint-2"]


def test_checkpoints_by_themselves_change_no_byte_of_the_result(tmp_path, monkeypatch):
    from transformers import TrainerCallback
    from faithful_distill.training.trainer import AutoSave

    class Saved(TrainerCallback):
        steps = []

        def on_save(self, args, state, control, **_):
            self.steps.append(state.global_step)

    monkeypatch.setattr(AutoSave, "seconds", 0)
    monkeypatch.setattr(AutoSave, "ratio", 0)
    saved = train(tmp_path / "a", log_every=2, callbacks=[Saved()]).out
    assert Saved.steps == [2, 4]
    monkeypatch.undo()
    plain = train(tmp_path / "b", log_every=2, callbacks=[Saved()]).out
    assert Saved.steps == [2, 4]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (saved / name).read_bytes() == (plain / name).read_bytes()


def test_the_last_step_is_logged_and_every_student_has_a_card(tmp_path):
    out = train(tmp_path, max_steps=3, log_every=2).out
    assert [row["step"] for row in history(out)] == [2, 3]
    assert "for 3 steps on 5 factual and 4 counterfactual rationales" in (out / "README.md").read_text()


def test_metrics_go_to_reporters_that_are_there(tmp_path, monkeypatch):
    """One stands for all: through the Trainer's own callback, which gets the log.

    A missing package is reported before anything is computed.
    """
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="pip install tensorboard"):
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *package: None if name.startswith("tensorboard") else find_spec(name, *package),
        )
        train(tmp_path / "no", report_to="tensorboard")
    assert not (tmp_path / "no").exists()
    logged = []
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append((state.global_step, dict(logs)))

    monkeypatch.setitem(
        integration_utils.INTEGRATION_TO_CALLBACK, "json", Reporter
    )  # `json` is a module that is installed
    out = train(tmp_path / "yes", report_to="json").out
    assert [(step, logs["loss"]) for step, logs in logged if "loss" in logs] == [
        (row["step"], row["loss"]) for row in history(out)
    ]


def test_several_seeds_are_several_students(tmp_path):
    from faithful_distill.training.launch import train_seeds

    given = dict(max_steps=2, batch_size=4, log_every=1, deepspeed="cpu", prefixes="random")
    results = train_seeds(ranks.base(), ranks.records(), out=tmp_path, seeds=2, **given)
    spread = json.loads((tmp_path / "seeds.json").read_text())["metrics"]["loss"]
    a, b = (r.metrics["loss"] for r in results)
    assert (
        a != b
        and spread["values"] == [a, b]
        and spread["mean"] == pytest.approx((a + b) / 2)
        and spread["sd"] == pytest.approx(abs(a - b) / 2**0.5)
    )
    assert [
        r.seconds for r in train_seeds(ranks.base(), ranks.records(), out=tmp_path, seeds=2, **given)
    ] == [0, 0]


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen2", "gpt2"])
def test_causal_students_learn(tmp_path, kind):
    rows = history(train(tmp_path, ranks.base(kind), max_steps=10).out)
    assert (
        rows[-1]["loss"] < 0.9 * rows[0]["loss"]
        and rows[-1]["tokens_factual"] > rows[-1]["tokens_counterfactual"] > 0
    )


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3-offload"])
def test_every_configuration_that_is_shipped_trains_alike(tmp_path, name):
    want, got = history(train(tmp_path / "cpu").out), history(train(tmp_path / name, deepspeed=name).out)
    for a, b in zip(want, got, strict=True):
        assert b == ranks.log_row(a)


@pytest.mark.parametrize("ranks_", [1, 8])
@pytest.mark.parametrize("model", ["t5-3b", "t5-11b"])
def test_memory_with_offload_is_what_deepspeed_says(model, ranks_):
    """DeepSpeed's own estimator finds the largest layer of the model by itself.

    Gradients leave the GPU with the optimizer.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs, model_to_params
    from faithful_distill.training.sizing import meta_model, memory_table

    [row] = memory_table([model], [ranks_], ["zero3-offload"])
    parameters, layer = (
        sum(p.numel() for p in meta_model(model).parameters()),
        model_to_params(meta_model(model))[1],
    )
    host, gpu, _ = estimate_zero3_model_states_mem_needs(parameters, layer, ranks_, 1, True, True, True, 1.0)
    assert row["GB per GPU"] == pytest.approx(gpu / 1e9, abs=0.06)
    assert host / 1e9 - 1 <= row["GB main memory"] * ranks_ <= 1.5 * host / 1e9 + 1


def test_a_dry_run_of_the_authors_recipe_asks_no_hub(tmp_path, monkeypatch):
    """T5-3B's shape is known here, whoever's name stands before it; a folder of that name is what it holds.

    Every shipped configuration has its memory, main memory too.
    """
    import socket
    from click.testing import CliRunner
    from faithful_distill.cli import main

    def refuse(*_, **__):
        raise AssertionError("a connection is tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ranks.records()))

    def dry(*more):
        return (
            CliRunner()
            .invoke(
                main,
                [
                    "train",
                    "--rationales",
                    str(tmp_path / "records.jsonl"),
                    "--recipe",
                    "scott-t5-3b",
                    "--out",
                    str(tmp_path / "out"),
                    "--dry-run",
                    *more,
                ],
            )
            .output
        )

    assert re.search(
        r"zero2 +57(\.0)? +34\.2 +22\.8 +17\.1", dry()
    )  # the authors' fp32: 20 bytes a parameter on one
    text = dry("--precision", "bf16")
    assert (
        "google-t5/t5-3b: 2,851,598,336 parameters, 2,851,598,336 of them trained" in text
        and not (tmp_path / "out").exists()
    )
    on_gpu, in_host = text.split("main memory per process")
    rows = {
        name: [
            [float(x) for x in line.split()[-4:]]
            for line in part.splitlines()
            if line.split()[-5:-4] == [name]
        ]
        for part in (on_gpu,)
        for name in ("cpu", "zero2", "zero3", "zero3-offload")
    }
    assert (
        all(len(found) == 2 for found in rows.values()) and [45.6, 25.7, 15.7, 10.7] in rows["zero2"]
    )  # 16 bytes a parameter on one
    assert re.search(r"zero3-offload +57 +28.5 +14.3 +7.1", in_host)
    assert "2,851,598,336 parameters, 5,898,240 of them trained" in dry(
        "--lora", "r=8,target_modules=q+v"
    )  # two thin matrices of 1024 x 8 and 8 x 4096 beside each of 144
    ranks.base().model.save_pretrained(tmp_path / "t5-3b")
    assert "2,851,598,336" not in dry("--student", str(tmp_path / "t5-3b"))


@pytest.mark.parametrize(
    "match, given",
    [
        ("'rationales': there are no rationales", dict(records=[])),
        ("'dev': there are no rationales", dict(dev=[])),
        ("needs gold", dict(records=[r for r in ranks.records() if r["role"] == "counterfactual"])),
        ("--objective factual", dict(records=[r for r in ranks.records() if r["role"] == "gold"])),
        ("divide", dict(batch_size=3, accumulation=2)),
        ("dev", dict(metric="loss")),
        ("peft refuses", dict(lora=dict(rank=8))),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, match, given):
    with pytest.raises(BadInput, match=match):
        train(tmp_path / "out", **given)
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob("checkpoints/*"))


def whole_batch(student, records=None):
    "All the records' rows at once, and the model's logits."
    from faithful_distill.student.rows import collate, training_rows
    from faithful_distill.student.loss import student_logits

    batch = collate(training_rows(student, records or ranks.rationales()), student)
    return batch, student_logits(student.model, batch).detach()


def dev_loss(folder, records=None):
    "Loss of a finished student on the records, as plain transformers loads it."
    from faithful_distill.student.loss import distillation_loss
    from faithful_distill.student.model import load_student

    student = load_student(folder)
    batch, logits = whole_batch(student, records)
    how = dict(reduction=student.settings["reduction"])
    return float(distillation_loss(logits, batch["labels"], batch["counterfactual"], **how).total)


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("stage", [2, 3])
def test_lora_leaves_a_plain_student(tmp_path, kind, stage):
    "Only adapters are trained, and the merged student computes what the adapted one did."
    import copy

    import peft
    import torch
    from faithful_distill.student.model import load_student

    targets = dict(t5=["q", "v"], llama=["q_proj", "v_proj"], gpt2=["c_attn"])[kind]
    base = ranks.base(kind)
    result = train(
        tmp_path,
        base,
        deepspeed=ranks.stage_config(stage),
        lora=dict(r=2, lora_alpha=7, target_modules=targets),
        max_steps=8,
        dev=ranks.records(),
    )
    out, row = result.out, [row for row in history(result.out) if "loss" in row]
    assert row[-1]["loss"] < row[0]["loss"]
    assert history(out)[-1]["eval_loss"] == pytest.approx(dev_loss(out), rel=1e-4)  # adapted, then merged
    before, after = dict(base.model.named_parameters()), dict(load_student(out).model.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].data, after[name].data)}
    assert changed and all(any(t in name for t in targets) for name in changed)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), out / "adapter").merge_and_unload()
    for name, p in adapted.named_parameters():  # the adapter by itself, on the base model
        assert torch.allclose(p.data, after[name].data, atol=1e-5), name
    again = train(
        tmp_path / "again",
        base,
        deepspeed=ranks.stage_config(2),
        lora=dict(r=2, lora_alpha=7, target_modules=targets),
        max_steps=8,
    ).out
    for name, p in load_student(again).model.named_parameters():
        assert torch.allclose(p.data, after[name].data, atol=1e-5)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_model_on_dev_is_kept_and_training_stops(tmp_path, metric):
    """Dev says otherwise than the training data, so its loss must rise once they are known; and no accuracy is above 1.

    Patience 2 stops after the second evaluation in a row without a better one, and what is left is the student of
    the best evaluation.
    """
    dev = dict(loss=ranks.other_answers(), accuracy=ranks.records())[metric]
    result = train(tmp_path, dev=dev, metric=metric, patience=2, evaluate_every=2, max_steps=80, lr=0.02)
    evaluations = [row for row in history(tmp_path) if "eval_loss" in row]
    values = [row[f"eval_{metric}"] * (-1 if metric == "accuracy" else 1) for row in evaluations]
    assert result.steps == 2 * len(values) < 80 and len(values) == authors_stop(values)
    best = values.index(min(values))
    assert best == len(values) - 3 and result.metrics[f"eval_{metric}"] == evaluations[best][f"eval_{metric}"]
    if metric == "loss":
        assert dev_loss(tmp_path, dev) == pytest.approx(min(values), rel=1e-4)


def authors_stop(values):
    "The evaluation after which the authors' code stops: `no_progress > 1`, counted anew at each better loss."
    best, no_progress = float("inf"), 0
    for k, value in enumerate(values, 1):
        no_progress = 0 if value < best else no_progress + 1
        best = min(best, value)
        if no_progress > 1:
            return k
    return len(values)


class Broken(Exception):
    pass


def broken(*_, **__):
    raise Broken


@pytest.mark.parametrize("when", ["between two evaluations", "while the student is written"])
def test_a_run_that_stops_early_stops_there_after_an_interruption_too(tmp_path, monkeypatch, when):
    "Patience goes on counting where it was, and a run whose last step is in its checkpoint trains no further."

    whole = ranks.chosen(tmp_path, "loss_counterfactual")
    assert whole.steps == history(whole.out)[-1]["step"] < 60
    with monkeypatch.context() as patch, pytest.raises(Broken):
        if when.startswith("while"):
            patch.setattr(folder, "write_model", broken)
        ranks.chosen(
            tmp_path / "again",
            "loss_counterfactual",
            *([at_step(whole.steps - 1, broken)] if when.startswith("between") else []),
        )
    again = ranks.chosen(tmp_path / "again", "loss_counterfactual")
    assert again.steps == whole.steps
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_checkpoints_of_a_finished_run_go_even_if_it_died_before_they_went(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def dying(path, *args, **kwargs):
        if Path(path).name == "checkpoints":
            raise InterruptedError
        return remove(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(folder.shutil, "rmtree", dying)
        train(tmp_path / "out", save_every=2)
    assert (tmp_path / "out" / "student.json").exists() and (tmp_path / "out" / "checkpoints").exists()
    assert train(tmp_path / "out", save_every=2).seconds == 0
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_finished_run_that_was_not_written_is_only_written(tmp_path, monkeypatch):
    """The last step is in a checkpoint, in the middle of an epoch.

    Not one more is trained, at a learning rate that would show it.
    """

    given = dict(max_steps=5, save_every=1, schedule="constant")
    whole = train(tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(folder, "write_model", broken)
        train(tmp_path / "again", **given)
    again = train(tmp_path / "again", **given)
    assert again.steps == 5
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_bf16_and_recomputing_change_no_more_than_rounding(tmp_path, kind):
    from faithful_distill.training.settings import Settings
    from faithful_distill.training.train import prepared

    base = ranks.base(kind)
    plain, half, again = (
        history(train(tmp_path / name, base, **more).out)
        for name, more in (("a", {}), ("b", dict(precision="bf16")), ("c", dict(recompute=True)))
    )
    assert plain[-1]["loss"] < 0.9 * plain[0]["loss"]
    for a, b, c in zip(plain, half, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2) and c == ranks.log_row(a, 1e-5, 0)
    assert [row["loss"] for row in half] != [row["loss"] for row in plain]  # it was bf16
    assert prepared(base, Settings(recompute=True)).model.is_gradient_checkpointing
    assert not prepared(base, Settings()).model.is_gradient_checkpointing


@pytest.mark.parametrize("reduction", ["per_part", "per_token"])
def test_smoothed_labels_and_what_is_logged_of_them(tmp_path, reduction):
    """One step over all rationales: the logged loss and its parts are the smoothed ones, token by token.

    Dev stays unsmoothed.
    """
    row, dev = history(
        train(
            tmp_path,
            label_smoothing=0.2,
            alpha_cf=0.3,
            reduction=reduction,
            max_steps=1,
            batch_size=5,
            dev=ranks.records(),
            lr=1e-9,
        ).out
    )
    batch, logits = whole_batch(ranks.base())

    def part(counterfactual, e):
        tokens = [
            (logits[i, j].log_softmax(-1), int(label))
            for i, line in enumerate(batch["labels"])
            if bool(batch["counterfactual"][i]) == counterfactual
            for j, label in enumerate(line)
            if label != -100
        ]
        return sum(float(-(1 - e) * p[label] - e * p.mean()) for p, label in tokens) / len(tokens)

    def both(e):
        n, m = (
            row[f"tokens_{name}"] if reduction == "per_token" else 1 for name in ("factual", "counterfactual")
        )
        return (0.7 * n * part(False, e) + 0.3 * m * part(True, e)) / (0.7 * n + 0.3 * m)

    assert row["loss_factual"] == pytest.approx(part(False, 0.2), rel=1e-5) and row[
        "loss_counterfactual"
    ] == pytest.approx(part(True, 0.2), rel=1e-5)
    assert row["loss"] == pytest.approx(both(0.2), rel=1e-5)
    assert dev["eval_loss"] == pytest.approx(both(0), rel=1e-5)
    assert part(False, 0) != pytest.approx(part(False, 0.2), rel=1e-3)


def test_a_logged_loss_is_the_mean_of_its_steps_and_the_parts_of_their_tokens(tmp_path):
    one, three = history(train(tmp_path / "one").out), history(train(tmp_path / "three", log_every=3).out)
    for row in one:
        counterfactual = (
            row["loss_counterfactual"] or 0
        )  # None in the step of the beaver alone, which has none
        n, m = row["tokens_factual"], row["tokens_counterfactual"]
        mean = (row["loss_factual"] * n + counterfactual * m) / (n + m)  # over all tokens, at equal weights
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
    for k, row in enumerate(three):
        steps = one[3 * k : 3 * k + 3]
        assert row["loss"] == pytest.approx(sum(s["loss"] for s in steps) / 3, rel=1e-4)
        assert row["loss_factual"] == pytest.approx(
            sum(s["loss_factual"] * s["tokens_factual"] for s in steps) / row["tokens_factual"], rel=1e-5
        )


def test_adafactor_keeps_its_learning_rate(tmp_path):
    assert train(tmp_path, optimizer="adafactor", schedule="constant").history[-1]["learning_rate"] == 1e-2


def test_adafactor_depends_on_the_zero_stage_and_adamw_does_not(tmp_path):
    "Flat shares have no rows and columns to factor over; the recipe names the stage where there are none."
    from faithful_distill.training.settings import recipe

    losses = {
        (optimizer, stage): [
            row["loss"]
            for row in train(
                tmp_path / f"{optimizer}{stage}", optimizer=optimizer, deepspeed=ranks.stage_config(stage)
            ).history
        ]
        for optimizer in ("adamw", "adafactor")
        for stage in (0, 2)
    }
    assert losses["adamw", 0] == pytest.approx(losses["adamw", 2], rel=1e-4)
    a, b = losses["adafactor", 0], losses["adafactor", 2]
    assert a[0] == pytest.approx(b[0], rel=1e-4) and a[-1] != pytest.approx(b[-1], rel=1e-3)
    authors = recipe("scott-t5-3b")
    assert authors["optimizer"] == "adafactor" and authors["deepspeed"] == dict(
        zero_optimization=dict(stage=0)
    )


def test_the_authors_recipe_runs_on_a_small_t5(tmp_path):
    """Adafactor without relative steps on whole matrices (stage 0), fp32, linear decay after warm-up.

    The best epoch on dev by its factual loss is kept, and the second in a row that is no better is the last.
    """
    from transformers import TrainerCallback
    from faithful_distill.training.settings import recipe

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **_):
            self.zero, self.inner = args.deepspeed["zero_optimization"]["stage"], optimizer.optimizer
            while hasattr(self.inner, "optimizer"):
                self.inner = self.inner.optimizer
            self.group = dict(self.inner.param_groups[0])

        def on_train_end(self, *_, **__):
            self.factored = any("exp_avg_sq_row" in state for state in self.inner.state.values())

    seen, given = Seen(), recipe("scott-t5-3b")
    del given["student"]
    result = train(tmp_path, dev=ranks.records(), callbacks=[seen], max_steps=None, **given)
    group = seen.group
    assert (
        type(seen.inner).__name__ == "Adafactor"
        and not group["relative_step"]
        and not group["scale_parameter"]
        and seen.zero == 0
        and seen.factored
        and given["patience"] == 2
        and given["max_target"] == given["max_source"] == 128
    )
    steps, evaluations = (
        [row for row in history(tmp_path) if name in row] for name in ("loss", "eval_loss_factual")
    )
    values = [row["eval_loss_factual"] for row in evaluations]
    assert len(steps) == len(values) == result.steps == min(10, authors_stop(values))  # an epoch is a step
    assert max(row["learning_rate"] for row in steps) == pytest.approx(3e-5) and result.metrics[
        "eval_loss_factual"
    ] == min(values)
    assert (
        result.student.settings["engine"]["precision"] == "fp32"
        and result.student.settings["learn_tag"]
        and result.student.settings["list_choices"] is False
        and result.student.settings["recipe"] == "scott-t5-3b"
    )


def test_a_causal_student_without_padding_trains_as_one_with(tmp_path):
    "Llama and GPT-2 have no padding token; what stands in its place is never seen."
    with_pad, without = ranks.base("gpt2"), ranks.base("gpt2")
    without.tokenizer.pad_token = None
    assert without.pad == without.eos != with_pad.pad
    want, got = history(train(tmp_path / "a", with_pad).out), history(train(tmp_path / "b", without).out)
    for a, b in zip(want, got, strict=True):
        assert b == ranks.log_row(a, 1e-5, 0)


def test_rationales_that_are_shortened_are_counted(tmp_path):
    result = train(tmp_path, max_steps=1, max_target=16)
    words = [len(r["rationale"].split()) for r in ranks.records()]
    assert (
        result.rows["shortened"] == sum(n + 1 + 4 + 2 + 1 > 16 for n in words) > 0
    )  # tag, sentence, answer, end
    assert f"({result.rows['shortened']} rationales were shortened" in (tmp_path / "README.md").read_text()


def test_the_progress_bar_shows_loss_rate_and_time_left(tmp_path, monkeypatch, capfd):
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_step_end(self, *_, **__):
            time.sleep(0.1)  # a bar is drawn twice a second

    monkeypatch.setenv("FAITHFUL_DISTILL_PROGRESS", "1")
    result = train(tmp_path, max_steps=16, log_every=2, callbacks=[Slow()])
    shown = re.findall(
        r"training: +\d+%\|[^|]*\| (\d+)/16 \[\S+<(\S+), +([\d.]+)(?:step/s|s/step), loss=([\d.]+)\]",
        capfd.readouterr().err,
    )
    assert shown and all(0 < int(n) <= 16 and ":" in left and float(rate) > 0 for n, left, rate, _ in shown)
    assert {loss for *_, loss in shown} <= {f"{row['loss']:.3f}" for row in result.history}


def test_publishing_sends_the_student_and_never_its_checkpoints(tmp_path, monkeypatch):
    import huggingface_hub
    from fnmatch import fnmatch
    from faithful_distill.training.card import push_to_hub

    sent_to_hub = {}

    class Hub:
        def create_repo(self, name, **given):
            sent_to_hub["repo"] = (name, given)

        def upload_folder(self, **given):
            sent_to_hub["upload"] = given
            return "https://hub/me/student"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = train(tmp_path / "student", max_steps=1).out
    (out / "README.md").unlink()
    (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoints" / "checkpoint-1" / "state.pt").write_text("")
    assert push_to_hub(out, "me/student") == "https://hub/me/student" and (out / "README.md").exists()
    assert sent_to_hub["repo"] == ("me/student", dict(private=True, exist_ok=True)) and (
        sent_to_hub["upload"]["repo_id"],
        sent_to_hub["upload"]["folder_path"],
    ) == ("me/student", str(out))
    sent = {
        str(p.relative_to(out))
        for p in out.rglob("*")
        if p.is_file()
        and not any(
            fnmatch(str(p.relative_to(out)), pattern) for pattern in sent_to_hub["upload"]["ignore_patterns"]
        )
    }
    assert {"config.json", "model.safetensors", "README.md", "student.json"} <= sent and not any(
        "checkpoint" in name for name in sent
    )
    push_to_hub(out, "me/student", private=False)
    assert sent_to_hub["repo"][1]["private"] is False


parts = (
    "loss",
    "loss_factual",
    "loss_counterfactual",
    "tokens_factual",
    "tokens_counterfactual",
    "grad_norm",
    "learning_rate",
)


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    """The event file, read back one by one (length, checksum, event, checksum), has what metrics.jsonl has.

    Dev and its steps too.
    """
    Event = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed").Event
    out = train(tmp_path, max_steps=3, evaluate_every=2, dev=ranks.records(), report_to="tensorboard").out
    [file] = [p for p in (out / "tensorboard").rglob("events.out.tfevents.*")]
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event, at = Event.FromString(data[at + 12 : at + 12 + size]), at + size + 16
        found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
    rows = history(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3] and [
        row["step"] for row in rows if "eval_loss" in row
    ] == [2, 3]
    for row in rows:
        wanted = (
            {f"train/{name}": row[name] for name in parts}
            if "loss" in row
            else {
                f"eval/{name}": row[f"eval_{name}"]
                for name in ("loss", "loss_factual", "loss_counterfactual")
            }
        )
        for tag, value in wanted.items():
            assert found[tag, row["step"]] == pytest.approx(value, rel=1e-6), tag


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed: pip install wandb")
def test_wandb_gets_the_numbers_of_the_log(tmp_path, monkeypatch):
    """Offline: the run's file, a log in blocks of 32 kB, is under the student's name.

    It has what metrics.jsonl has.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    (tmp_path / "wandb").mkdir()
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true").items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # settings are read once; the run's file is whole when all is torn down
    try:
        out = train(
            tmp_path / "student", max_steps=3, evaluate_every=2, dev=ranks.records(), report_to="wandb"
        ).out
    finally:
        wandb.teardown()
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    data, at, records, record = file.read_bytes(), 7, [], b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            records.append(Record.FromString(record))
            record = b""  # whole, or the last piece
    assert [r.run.display_name for r in records if r.HasField("run")][0] == "student"
    found = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    for row in history(out):
        kind, wanted = (
            ("train", {name: row[name] for name in parts})
            if "loss" in row
            else (
                "eval",
                {name: row[f"eval_{name}"] for name in ("loss", "loss_factual", "loss_counterfactual")},
            )
        )
        [line] = [f for f in found if f.get("train/global_step") == row["step"] and f"{kind}/loss" in f]
        for name, value in wanted.items():
            assert line[f"{kind}/{name}"] == pytest.approx(value, rel=1e-6), name


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed: pip install wandb")
def test_two_students_are_two_runs_of_wandb_and_an_open_run_stays_open(tmp_path, monkeypatch):
    import wandb

    (tmp_path / "wandb").mkdir()
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true").items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    try:
        for seed in (0, 1):
            train(tmp_path / f"seed-{seed}", seed=seed, max_steps=2, report_to="wandb")
            assert wandb.run is None and len(list((tmp_path / "wandb").glob("offline-run-*"))) == seed + 1
        own = wandb.init()
        train(tmp_path / "mine", max_steps=2, report_to="wandb")
        assert wandb.run is own
    finally:
        wandb.teardown()


def test_answer_only_students_answer_at_once(tmp_path):
    from faithful_distill.student.answers import answer
    from faithful_distill.questions import Question

    result = train(tmp_path, answer_only=True, prefixes="none", max_steps=150)
    questions = [
        Question(r["id"], r["question"], tuple(r["choices"]), r["answer"])
        for r in ranks.records()
        if r["role"] == "gold"
    ]
    answers = answer(result.student, questions)
    assert [a.choice for a in answers] == [q.answer for q in questions]
    assert {a.rationale for a in answers} == {""}
    assert result.rows["counterfactual"] == 0 and result.student.prefix == "none"


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="starts two processes from cold: set FAITHFUL_DISTILL_SLOW=1",
)
def test_launched_from_here_on_two_processes(tmp_path):
    "The notebook's way: a base student on disk, two ranks outside this process, the result read back."
    from faithful_distill.training.launch import launch
    from faithful_distill.training.card import model_card

    base = ranks.base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    given = dict(max_steps=4, batch_size=4, lr=1e-2, log_every=1, warmup=0, deepspeed=ranks.stage_config(3))
    result = launch(2, tmp_path / "base", ranks.records(), out=tmp_path / "two", timeout=200, **given)
    alone = train_student(base, ranks.records(), out=tmp_path / "one", **given)
    for want, got in zip(history(alone.out), history(result.out)):
        assert got == ranks.log_row(want)
    assert "5 factual and 4 counterfactual" in model_card(result.out)
    with pytest.raises(BadInput, match="divide among 2 ranks"):
        launch(
            2,
            tmp_path / "base",
            ranks.records(),
            out=tmp_path / "three",
            timeout=200,
            **dict(given, batch_size=3),
        )


@pytest.mark.parametrize(
    "printed, said",
    [
        (
            "[rank0]: ValueError: first\n[rank0]: faithful_distill.files.BadInput: lr is high\n",
            "BadInput: lr is high",
        ),
        (
            "[rank1]: KeyError: 'a'\n[rank1]: TypeError: no state\n[rank0]: RuntimeError: peer is gone\n",
            "TypeError: no state",
        ),
        ("Traceback:\n  x\nAssertionError\n", "AssertionError"),
        ("Signal 9 (SIGKILL) received by PID 7\n", "SIGKILL"),
    ],
)
def test_what_failed_on_several_processes_is_named(printed, said):
    "Not the end of torchrun's summary, which follows it."
    from faithful_distill.ranks import error_line

    summary = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "=" * 1800
    assert said in error_line(printed + summary)
    assert "SIGKILL" in said or len(error_line(printed + summary).splitlines()) == 1


def test_launch_returns_what_the_run_noted(tmp_path, monkeypatch):
    import faithful_distill.training.launch as launching

    base = ranks.base()
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")

    def in_this_process(n, call, *_):
        launching.run_call(call[-1])
        return 0, ""

    monkeypatch.setattr(launching, "run_ranks", in_this_process)
    given = dict(out=tmp_path / "out", max_steps=1, batch_size=4)
    result = launching.launch(2, tmp_path / "base", ranks.records(), **given)
    times = json.loads((tmp_path / "out" / "times.json").read_text())
    again = train_student(tmp_path / "base", ranks.records(), **given)
    assert result.seconds == times["seconds"] > 0 == again.seconds
    assert result.cost == again.cost and result.cost["processor_seconds"] == times["processor_seconds"]


def test_the_environment_is_never_cleared(monkeypatch):
    "Other threads read it while a session ends; what was changed, added or removed within is as before."
    from faithful_distill.training.zero import deepspeed_session

    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("GONE", "1")
    monkeypatch.setattr(type(os.environ), "clear", lambda _: pytest.fail("all variables are gone"))
    before = dict(os.environ)
    with deepspeed_session():
        os.environ |= dict(KEPT="2", NEW="3")
        del os.environ["GONE"]
    assert dict(os.environ) == before


@pytest.fixture
def command(tmp_path):
    "The command line on a small student and its records, as one would type it."
    base = ranks.base(dropout_rate=0.1)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ranks.records()))
    (tmp_path / "faithful-distill").write_text("from faithful_distill.cli import main\nmain()\n")
    return [
        str(tmp_path / "faithful-distill"),
        "train",
        "--rationales",
        str(tmp_path / "records.jsonl"),
        "--student",
        str(tmp_path / "base"),
        "--batch-size",
        "4",
        "--log-every",
        "1",
    ]


def torchrun(n):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]


def test_the_command_trains_a_student_that_loads(tmp_path, command):
    """From files to a folder: what it prints, what it leaves, what a second call finds.

    Its options arrive.
    """
    from click.testing import CliRunner
    from transformers import AutoModelForSeq2SeqLM
    from faithful_distill.cli import main

    def call(*more):
        return CliRunner().invoke(
            main, [*command[1:], "--out", str(tmp_path / "out"), "--max-steps", "2", "--lr", "0.01", *more]
        )

    done = call()
    assert done.exit_code == 0 and f"{tmp_path / 'out'}: 2 steps, loss " in done.output, done.output
    note = json.loads((tmp_path / "out" / "student.json").read_text())
    assert str(tmp_path) not in json.dumps(note)  # the same file in every checkout
    assert (note["steps"], note["lr"], note["batch_size"], note["rows"]["factual"]) == (2, 0.01, 4, 5) and [
        row["step"] for row in history(tmp_path / "out")
    ] == [1, 2]
    changed = [
        not (a == b).all()
        for a, b in zip(
            AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").parameters(),
            AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").parameters(),
            strict=True,
        )
    ]
    assert all(changed)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert call().exit_code == 0 and (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    refused = call("--alpha-cf", "0.2")
    assert refused.exit_code == 2 and "another run" in refused.output


def test_the_card_has_the_settings_and_what_evaluate_measured(tmp_path):
    """Recipe and engine from training; then values with their intervals, as metrics.json has them.

    They stay when the card is written once more.
    """
    from click.testing import CliRunner
    from faithful_distill.cli import main
    from faithful_distill.lab.titles import score_title
    from faithful_distill.training.settings import recipe
    from faithful_distill.training.card import model_card

    train(tmp_path / "student", **recipe("tiny", max_steps=2, batch_size=4, precision="bf16"))
    rows = dict(
        re.findall(r"^\| (\S[^|]*) \| ([^|]*) \|$", (tmp_path / "student" / "README.md").read_text(), re.M)
    )
    assert {
        k: rows[k]
        for k in (
            "recipe",
            "epochs",
            "max_steps",
            "precision",
            "deepspeed",
            "ZeRO stage",
            "processes",
            "lr",
            "warmup",
        )
    } == dict(
        recipe="tiny",
        epochs="20",
        max_steps="2",
        precision="bf16",
        deepspeed="cpu",
        processes="1",
        lr="0.002",
        warmup="0.06",
        **{"ZeRO stage": "2"},
    )
    (tmp_path / "own.jsonl").write_text(
        "".join(
            json.dumps({k: r[k] for k in ("id", "question", "choices", "answer")}) + "\n"
            for r in ranks.records()
            if r["role"] == "gold"
        )
    )
    done = CliRunner().invoke(
        main,
        [
            "evaluate",
            "--data",
            str(tmp_path / "own.jsonl"),
            "--student",
            str(tmp_path / "student"),
            "--metrics",
            "perturb",
            "--draws",
            "1",
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path / "evaluation"),
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    measured = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    card = (tmp_path / "student" / "README.md").read_text()
    assert measured["accuracy"]["low"] is not None
    for name, m in measured.items():
        if m["value"] is not None and m["low"] is not None:
            assert (
                f"| {score_title(name)} (own.jsonl, dev) | {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}], n ="
                f" {m['n']} |" in card
            )
    assert card.startswith(model_card(tmp_path / "student").rstrip("\n")), "then who wrote it"
    assert (
        train(tmp_path / "student", **recipe("tiny", max_steps=2, batch_size=4, precision="bf16")).seconds
        == 0
    )  # still the same run


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="launches processes from cold: set FAITHFUL_DISTILL_SLOW=1",
)
def test_the_command_that_the_error_names_resumes(tmp_path, command):
    """Two processes from the command line, killed; one process is refused.

    The command that the error names ends in the bytes of a run never interrupted.
    """
    import psutil

    call = [*command, "--max-steps", "300", "--save-every", "20", "--out", str(tmp_path / "run")]
    first = subprocess.Popen(
        [*torchrun(2), *call], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "run" / "checkpoints").glob("*/whole.json")):
        time.sleep(0.05)
        assert first.poll() is None
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        process.kill()  # the workers of torchrun are in sessions of their own
    first.wait()
    alone = subprocess.run(
        [sys.executable, *call], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert alone.returncode == 2 and "was written by 2 processes, not 1" in alone.stderr
    named = re.search("`(.*?)`", alone.stderr)[1]
    done = subprocess.run(
        shlex.split(named),
        env=dict(environment(), PATH=str(Path(sys.executable).parent) + ":" + os.environ["PATH"]),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and "300 steps" in done.stdout, done.stderr[-2000:]
    subprocess.run(
        [*torchrun(2), *call[:-1], str(tmp_path / "whole")], env=environment(), check=True, timeout=200
    )
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="launches processes from cold: set FAITHFUL_DISTILL_SLOW=1",
)
def test_launchers_and_nodes_agree(tmp_path, command):
    "torchrun on one node, torchrun on two nodes of one process each, and the deepspeed launcher: the same student."
    from faithful_distill.ranks import free_port

    def call(out):
        return [*command, "--max-steps", "4", "--out", str(tmp_path / out)]

    subprocess.run([*torchrun(2), *call("one")], env=environment(), check=True, timeout=200)
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes",
                "2",
                "--node_rank",
                str(k),
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                port,
                "--nproc_per_node",
                "1",
                *call("two"),
            ],
            env=environment(),
        )
        for k in (0, 1)
    ]
    assert [node.wait(200) for node in nodes] == [0, 0]
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--no_local_rank",
        "--num_gpus",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(free_port()),
        *call("three"),
    ]
    subprocess.run(launcher, env=environment(), check=True, timeout=200)
    for other in ("two", "three"):
        assert (tmp_path / other / "model.safetensors").read_bytes() == (
            tmp_path / "one" / "model.safetensors"
        ).read_bytes()


@pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"),
    reason="launches processes from cold: set FAITHFUL_DISTILL_SLOW=1",
)
def test_a_host_file_without_ssh_trains_the_same_student(tmp_path, command):
    """deepspeed with a file of two hosts, started on each by hand, as where there is no ssh between them.

    The run counts both processes.
    """
    from faithful_distill.ranks import free_port

    def call(out, *more):
        return [*command, "--max-steps", "4", "--out", str(tmp_path / out), *more]

    subprocess.run([*torchrun(2), *call("one")], env=environment(), check=True, timeout=200)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = str(free_port())
    launchers = [
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--no_local_rank",
            "--hostfile",
            str(tmp_path / "hosts"),
            "--no_ssh",
            "--node_rank",
            str(k),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
            *call("two", "--save-every", "2"),
        ]
        for k in (0, 1)
    ]
    nodes = [
        subprocess.Popen(
            launcher, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for launcher in launchers
    ]
    printed = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert json.loads((tmp_path / "two" / "student.json").read_text())["engine"]["processes"] == 2


def test_another_rank_may_note_its_lock_while_this_one_looks(tmp_path, monkeypatch):
    "The folder is checked by every rank, in no order: a lock's note that is half written is nobody else's file."
    from faithful_distill.ownership import sole_writer
    from faithful_distill.training import folder

    seen, replace = [], os.replace

    def looked_at(source, target):
        seen.append(sorted(p.name for p in tmp_path.iterdir()))
        folder.check_out(tmp_path, None)
        replace(source, target)

    monkeypatch.setattr(os, "replace", looked_at)
    with sole_writer(tmp_path, lock=tmp_path / ".rank1.lock"):
        folder.check_out(tmp_path, None)
    assert any(name.startswith("..rank1.lock.holder.") for name in seen[0])


def test_a_part_that_had_no_token_is_no_number_for_reporters_and_null_in_the_file(tmp_path):
    from transformers import TrainerCallback

    class Seen(TrainerCallback):
        rows = []

        def on_log(self, args, state, control, logs=None, **_):
            self.rows.append(dict(logs))

    gold = [r for r in ranks.records() if r["role"] == "gold"]
    how = dict(max_steps=2, log_every=1, objective="factual", dev=gold, evaluate_every=1)
    done = train(tmp_path, **how, callbacks=[seen := Seen()])
    assert all(isinstance(v, (int, float)) for row in seen.rows for v in row.values())
    assert [row["loss_counterfactual"] for row in done.history if "loss" in row] == [None, None]
    assert [row["eval_loss_counterfactual"] for row in done.history if "eval_loss" in row] == [None, None]
    assert done.metrics["loss_counterfactual"] is done.metrics["eval_loss_counterfactual"] is None
