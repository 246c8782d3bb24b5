"The benchmark of training: what it writes down, and the work it says is done."
import csv, json

import pytest
from click.testing import CliRunner

from faithful_distill.cli import main


@pytest.fixture
def palm(tmp_path):
    "A folder as the public one: eight questions, nine texts."
    folder = tmp_path/"data"/"palm_cqa"
    folder.mkdir(parents=True)
    rows = [dict(question=f"Which way goes number {i} ?", choices=["left", "right"], answer=["left", "right"][i % 2]) for i in range(8)]
    (folder/"cqa_train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder/"train_CoT_0.json").write_text(json.dumps([f"it turns there {'again '*(i % 3)}" for i in range(9)]))
    return folder.parent


def bench(palm, out, *more):
    done = CliRunner().invoke(main, ["bench", "train", "--data", str(palm), "--steps", "3", "--rounds", "1", "--batch-size", "4", "--out", str(out), *more])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output, list(csv.DictReader(open(out, newline="")))


def test_configurations_stand_side_by_side_and_each_replaces_itself(palm, tmp_path):
    said, lines = bench(palm, tmp_path/"b.csv", "--only", "train", "--deepspeed", "cpu", "--deepspeed", "zero2")
    assert [(line["what"], line["config"]) for line in lines] == [("train", "cpu"), ("train", "zero2")] and "zero2): " in said
    _, lines = bench(palm, tmp_path/"b.csv", "--only", "train", "--deepspeed", "zero2")
    assert sorted(line["config"] for line in lines) == ["cpu", "zero2"] and all(float(line["same"]) < 1e-3 for line in lines)


def test_a_card_says_rate_memory_and_use(palm, tmp_path):
    "Without a known peak there is no utilisation but a reason; with one it is FLOP/s over peak. The FLOP are the rows' own, counted once more by torch."
    said, [line] = bench(palm, tmp_path/"c.csv", "--card", "tiny", "--deepspeed", "zero2")
    import torch
    if not torch.cuda.is_available(): assert line["mfu"] == "" and "give --peak" in line["reason"] and "utilisation unknown" in said
    assert (line["student"], line["config"], line["precision"], line["measured"]) == ("t5-tiny", "zero2", "bf16", "1") and float(line["memory"]) > 1e8
    said, lines = bench(palm, tmp_path/"c.csv", "--card", "tiny", "--deepspeed", "zero2", "--deepspeed", "zero3", "--peak", "2")
    assert [line["config"] for line in lines] == ["zero2", "zero3"] and said.count("of the device's peak") == 2
    for line in lines: assert float(line["mfu"]) == pytest.approx(float(line["flops_per_second"])/2e12, rel=1e-3) and line["reason"] == ""


def test_model_flop_of_a_step_are_those_torch_counts_row_by_row(palm):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from faithful_distill import train_bench as room
    from faithful_distill.student import collate, learned_logits
    from faithful_distill.training import make_settings, make_units
    records = room.palm_records(palm)
    student = room.subword_student([r["question"] + r["rationale"] for r in records], vocabulary=400)
    made, _ = make_units(student, records, make_settings({}))
    for row in [row for unit in made for row in unit]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: learned_logits(student.model, collate([row], student))
        assert 3*counter.get_total_flops() == room.t5_flops(student.model.config, len(row.source), len(row.context) + len(row.target), len(row.target))


def test_sizes_are_those_of_the_named_models():
    import torch
    from faithful_distill import train_bench as room
    from faithful_distill.files import BadInput
    from faithful_distill.recipes import t5_parameters
    with torch.device("meta"): student = room.subword_student(["which way"], "t5-base", vocabulary=300)
    assert sum(p.numel() for p in student.model.parameters()) == t5_parameters("t5-base") and student.name == "t5-base"
    with pytest.raises(BadInput, match="t5-3b"): room.subword_student(["which way"], "t5-3c")
