"""Run under torch.distributed.run by test_training.py: trains the same tiny student under every ZeRO stage and
accumulation, and writes down what each rank held.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from faithful_distill.records import read_records
from faithful_distill.student.model import tiny_student
from faithful_distill.training.train import train_student
from faithful_distill.training.zero import deepspeed_config

builds = {"beaver": "wood", "bird": "straw", "bee": "wax", "ant": "sand", "mole": "earth"}
choices = ["a dam", "a nest", "a hive", "a hill", "a tunnel"]


def records():
    "Rows of rationales: five animals, reasons of unequal length, a wrong reason for all but one."
    made = []
    for i, (animal, stuff) in enumerate(builds.items()):
        about = dict(
            id=animal, question=f"What does a {animal} build ?", choices=choices, answer=i, kind="choice"
        )
        made.append(dict(about, target=i, role="gold", rationale=f"it gathers {stuff} " * (i + 1)))
        if i:
            made.append(
                dict(about, target=i - 1, role="counterfactual", rationale=f"some {stuff} is far " * (6 - i))
            )
    return made


def rationales():
    return read_records(records())


def base(kind="t5", **config):
    return tiny_student(
        [r["question"] + " " + r["rationale"] for r in records()] + choices, kind, width=16, **config
    )


def stage_config(stage):
    config = deepspeed_config("cpu")
    config["zero_optimization"] = dict(config["zero_optimization"], stage=stage)
    if stage == 3:
        config["zero_optimization"] |= dict(
            stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=True
        )
    return config


class Held(TrainerCallback):
    "What this rank holds at the end: bytes of optimizer state, parameters that are resident."

    def on_train_end(self, args, state, control, model=None, optimizer=None, **_):
        inner = optimizer.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        self.state = sum(
            t.numel() * t.element_size()
            for s in inner.state.values()
            for t in s.values()
            if torch.is_tensor(t) and t.dim()
        )
        self.resident = sum(p.numel() for p in model.parameters())


def log_row(row, rel=2e-4, abs=2e-4):
    "A line of a log up to rounding, to compare with; a part without a token in that step is None in both."
    import pytest

    return {k: v if v is None else pytest.approx(v, rel=rel, abs=abs) for k, v in row.items()}


def examples_per_step(accumulation):
    """Of five examples, so that there are empty ones.

    With four micro-batches on two ranks one micro-batch is all empty.
    """
    return 8 if accumulation == 4 else 4


every = bool(os.environ.get("FAITHFUL_DISTILL_SLOW"))
alike = [
    (kind, stage, n)
    for kind, stages in (("t5", (0, 1, 2, 3)), ("llama", (2, 3)))
    for stage in stages
    for n in (1, 2, 4)
]
# two micro-batches: of T5 under the stages that share gradients; elsewhere one and four say the same
alike = [c for c in alike if every or c[2] != 2 or c[0] == "t5" and c[1] > 1]


def run(out, stage, accumulation, kind="t5", **more):
    "Both ways of averaging: Llama per part, T5 per token."
    held = Held()
    given = dict(
        max_steps=4,
        batch_size=examples_per_step(accumulation),
        accumulation=accumulation,
        lr=1e-2,
        log_every=1,
        warmup=0,
        reduction="per_part" if kind == "llama" else "per_token",
        deepspeed=stage_config(stage),
        callbacks=[held],
    )
    return held, train_student(base(kind), records(), out=out, **{**given, **more})


def other_answers():
    return [dict(r, answer=(r["answer"] + 1) % 5, target=(r["target"] + 1) % 5) for r in records()]


def chosen(folder, metric, *callbacks):
    """Evaluates on dev, stops early, goes back to its best step: under stage 3 by the answers it writes, under
    stage 2 by a loss that must rise once the answers are known by heart (dev has others).
    """
    given = dict(
        accuracy=dict(stage=3, dev=records(), evaluate_every=10, lr=0.03),
        loss_counterfactual=dict(stage=2, dev=other_answers(), evaluate_every=2, lr=0.02),
    )
    return run(
        folder / f"best-{metric}",
        accumulation=1,
        metric=metric,
        patience=2,
        max_steps=60,
        reduction="per_part",
        callbacks=callbacks,
        **given[metric],
    )[1]


def adapted(out):
    "Trains adapters under stage 3, where only rank 0 has the gathered weights."
    return run(out, 3, 1, lora=dict(r=2, target_modules=["q", "v"]), max_steps=2)[1]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind, stage, accumulation in alike:
        held, _ = run(folder / f"{kind}-stage{stage}x{accumulation}", stage, accumulation, kind)
        rank = torch.distributed.get_rank()
        (folder / f"held-{kind}-{stage}x{accumulation}-{rank}.json").write_text(
            json.dumps(dict(state=held.state, resident=held.resident))
        )
    for metric in ("accuracy", "loss_counterfactual"):
        chosen(folder, metric)
    adapted(folder / "lora")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
