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
