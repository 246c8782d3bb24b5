"Training in processes that are killed: loaded once in a fork server, so that a killed run costs a second and not ten."

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import ranks

steps = 8


def kill_now():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill, diary, rank):
    """Arrange for this process to kill itself, and write down that it did and the step each attempt begins from.

    ('step', n): at the end of step n.
    ('save', n): halfway through the n-th file this rank writes of a checkpoint.
    ('mark', n): before the n-th checkpoint is marked whole (on another rank than 0: before it says that its files
    are there).
    ('sweep', n): within the removal of the checkpoint that the n-th mark makes superfluous (on another rank: as
    soon as the files of all are there, while rank 0 marks and removes).
    ('export', 1): when the finished student's weights lie in the hidden folder; ('export', 2): when they are in
    place and no more. On another rank: before the weights are gathered, and when rank 0 is done.
    """
    import torch
    from transformers import TrainerCallback

    what, at = kill or ("never", 0)
    calls = [0]

    def die():
        with open(diary.with_suffix(".killed"), "a") as f:
            f.write(f"{what} {at}\n")
        kill_now()

    def counted():
        calls[0] += 1
        return calls[0] == at

    save = torch.save

    def dying_save(obj, f, *args, **kwargs):
        save(obj, f, *args, **kwargs)
        if what == "save" and isinstance(f, (str, os.PathLike)) and counted():
            os.truncate(f, os.path.getsize(f) // 2)
            die()

    torch.save = dying_save
    (arm_first if rank == 0 else arm_other)(what, at, counted, die)

    class Kill(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            with open(diary, "a") as f:
                f.write(f"{state.global_step}\n")

        def on_step_end(self, args, state, control, **_):
            if what == "step" and state.global_step == at:
                die()

    return Kill()


def arm_first(what, at, counted, die):
    "Rank 0 marks checkpoints, removes them and writes the student."
    from faithful_distill.training import checkpoints, folder

    mark, sweep, write_model = checkpoints.write_json, checkpoints.shutil.rmtree, folder.write_model

    def dying_mark(path, obj):
        if what == "mark" and counted():
            die()
        return mark(path, obj)

    def dying_sweep(path, **kwargs):
        if what == "sweep" and counted():
            for file in [p for p in sorted(path.rglob("*")) if p.is_file()][:1]:
                file.unlink()
            die()
        sweep(path, **kwargs)

    def dying_export(student, state, out):
        if what == "export" and at == 1:
            student.tokenizer.save_pretrained = lambda *_: die()
        write_model(student, state, out)
        if what == "export":
            die()

    checkpoints.write_json, checkpoints.shutil = dying_mark, SimpleNamespace(rmtree=dying_sweep)
    folder.write_model = dying_export


def arm_other(what, at, counted, die):
    "Other ranks say that their files are there, and give their share of the weights."
    from faithful_distill.training import checkpoints, train

    on_save, write_student = checkpoints.AtomicCheckpoints.on_save, train.write_student

    def dying_on_save(self, *args, **kwargs):
        if what == "mark" and counted():
            die()
        on_save(self, *args, **kwargs)
        if what == "sweep" and counted():
            die()

    def dying_export(*args, **kwargs):
        if what == "export" and at == 1:
            die()
        result = write_student(*args, **kwargs)
        if what == "export":
            die()
        return result

    checkpoints.AtomicCheckpoints.on_save, train.write_student = dying_on_save, dying_export


def work(out, kill, rank, size, port, stage):
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONWARNINGS="ignore")
    if size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    sys.stderr = open(Path(out).with_suffix(f".{rank}.log"), "a")
    import torch

    torch.set_num_threads(1)
    from faithful_distill.training.train import train_student

    train_student(
        ranks.base(dropout_rate=0.1),
        ranks.records(),
        out=out,
        max_steps=steps,
        batch_size=2,
        lr=1e-2,
        save_every=2,
        log_every=1,
        deepspeed=ranks.stage_config(stage),
        callbacks=[arm(kill, Path(out).with_suffix(f".{rank}.started"), rank)],
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # not where the student was finished already


def attempt(out, kill=None, size=1, stage=2, victim=0, grace=0.0):
    """One run on `size` ranks under a ZeRO stage, `victim` killed or none; True if it came to its end.

    As a launcher does, the others are brought down `grace` seconds after the first that died. What fails without
    having been killed is an error.
    """
    from faithful_distill.ranks import free_port

    context, port, out = multiprocessing.get_context("forkserver"), free_port(), Path(out)
    context.set_forkserver_preload(
        ["ranks", "deepspeed", "faithful_distill.training.trainer", "faithful_distill.training.train", "peft"]
    )
    before = deaths(out, victim)
    processes = [
        context.Process(
            target=work, args=(str(out), kill if rank == victim else None, rank, size, port, stage)
        )
        for rank in range(size)
    ]
    for p in processes:
        p.start()
    until = time.monotonic() + 120
    while all(p.exitcode in (None, 0) for p in processes) and any(p.is_alive() for p in processes):
        if not connection.wait(
            [p.sentinel for p in processes if p.is_alive()], max(0, until - time.monotonic())
        ):
            break
    hangs = all(p.exitcode in (None, 0) for p in processes) and any(p.is_alive() for p in processes)
    for p in processes:
        p.join(grace)
        p.kill()
        p.join()
    assert not hangs, f"{out} hangs: {kill} on rank {victim}, stage {stage}"
    if all(p.exitcode == 0 for p in processes):
        return True
    assert kill and deaths(out, victim) == before + 1, (
        f"nobody was killed: {kill} on rank {victim}, stage {stage}, exit codes"
        f" {[p.exitcode for p in processes]}\n"
        + "".join(p.read_text()[-2000:] for p in sorted(out.parent.glob(f"{out.name}.*.log")))
    )
    return False


def deaths(out, rank):
    "How often so far a rank of this run was killed."
    diary = out.with_suffix(f".{rank}.killed")
    return len(diary.read_text().splitlines()) if diary.exists() else 0


def random_kill(rng):
    return rng.choice(
        [
            ("step", rng.randint(1, steps)),
            ("save", rng.randint(1, 5)),
            ("mark", rng.randint(1, 2)),
            ("sweep", rng.randint(1, 2)),
            ("export", rng.randint(1, 2)),
        ]
    )
