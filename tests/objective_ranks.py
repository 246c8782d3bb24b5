"Run under torch.distributed.run by test_objectives.py: trains a student by every objective under every ZeRO stage."

import sys
from pathlib import Path

import torch

import ranks
from test_objectives import on_two_ranks, train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for objective, kind, stage in on_two_ranks:
        out = folder / f"{objective}-{kind}-{stage}"
        accumulation = 2 if stage == 2 else 1  # with four examples a step, one of each rank and micro-batch
        train(out, objective, kind, accumulation=accumulation, deepspeed=ranks.stage_config(stage))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
