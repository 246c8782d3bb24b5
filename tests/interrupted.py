"Training in processes that are killed: loaded once in a fork server, so that a killed run costs a second and not ten."
import multiprocessing, os, random, signal, sys
from pathlib import Path

import ranks

steps = 8


def kill_now(): os.kill(os.getpid(), signal.SIGKILL)


def arm(kill, diary):
    "Arrange for this process to kill itself: ('step', n) at the end of step n, ('save', n) halfway through the n-th file of a checkpoint, ('mark', n) before the n-th checkpoint is marked whole, ('export', 1) when the finished student's weights lie in the hidden folder, ('export', 2) when they are in place and no more. The step each attempt begins from is written down."
    import torch
    from transformers import TrainerCallback
    from faithful_distill import trainer, training
    what, at = kill or ("never", 0)
    calls = [0]

    def counted():
        calls[0] += 1
        return calls[0] == at
    save, mark = torch.save, trainer.write_json

    def dying_save(obj, f, *args, **kwargs):
        save(obj, f, *args, **kwargs)
        if what == "save" and isinstance(f, (str, os.PathLike)) and counted():
            os.truncate(f, os.path.getsize(f)//2)
            kill_now()

    def dying_mark(path, obj):
        if what == "mark" and counted(): kill_now()
        return mark(path, obj)
    write_model = training.write_model

    def dying_export(student, state, out):
        if what == "export" and at == 1: student.tokenizer.save_pretrained = lambda *_: kill_now()
        write_model(student, state, out)
        if what == "export": kill_now()
    torch.save, trainer.write_json, training.write_model = dying_save, dying_mark, dying_export

    class Kill(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            with open(diary, "a") as f: f.write(f"{state.global_step}\n")
        def on_step_end(self, args, state, control, **_):
            if what == "step" and state.global_step == at: kill_now()
    return Kill()


def work(out, kill, rank, size, port):
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONWARNINGS="ignore")
    if size > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = open(Path(out).with_suffix(f".{rank}.log"), "a")
    import torch
    torch.set_num_threads(1)
    from faithful_distill.training import train_student
    train_student(ranks.base(dropout_rate=0.1), ranks.records(), out=out, max_steps=steps, batch_size=2, lr=1e-2, save_every=2, log_every=1, deepspeed=ranks.stage_config(2), callbacks=[arm(kill, Path(out).with_suffix(f".{rank}.begun"))])
    if size > 1: torch.distributed.barrier(); torch.distributed.destroy_process_group()


def attempt(out, kill=None, size=1):
    "One run, killed or not, on `size` ranks; True if it came to its end."
    from faithful_distill.trainer import free_port
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["ranks", "deepspeed", "faithful_distill.trainer", "faithful_distill.training", "peft"])
    processes = [context.Process(target=work, args=(str(out), kill if rank == 0 else None, rank, size, port)) for rank in range(size)]
    for p in processes: p.start()
    processes[0].join(120)
    for p in processes[1:]:
        if processes[0].exitcode != 0: p.kill()
        p.join(60)
    return all(p.exitcode == 0 for p in processes)


def random_kill(rng): return rng.choice([("step", rng.randint(1, steps)), ("save", rng.randint(1, 5)), ("mark", rng.randint(1, 2)), ("export", rng.randint(1, 2))])
