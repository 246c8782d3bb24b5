"""The notebook that makes a teacher for real questions: what it reads, what it leaves out, and its smoke run."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from faithful_distill.files import BadInput
from faithful_distill.lab.grid import load_grid
from faithful_distill.lab.keys import notebook_parameters

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "experiments" / "real_teacher.ipynb"
SHARED = Path(os.environ.get("FAITHFUL_DISTILL_SHARED", Path(__file__).parents[2] / "shared")) / "data"
CHOICES = ["bank", "park", "lake", "shop", "school"]


def executed(upto: str = "", **params) -> dict:
    "The namespace after the notebook's code cells with these parameters, up to the cell that holds `upto`."
    space = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        if upto and upto in source:
            return space
        exec(compile(source, "real_teacher", "exec"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space.update(params)
    return space


def csqa_row(name, stem, key="A"):
    return {
        "id": name,
        "answerKey": key,
        "question": {
            "stem": stem,
            "question_concept": "x",
            "choices": [{"label": x, "text": t} for x, t in zip("ABCDE", CHOICES)],
        },
    }


@pytest.fixture
def folders(tmp_path):
    """Six training questions and what two models wrote about them, and one dev question.

    One of the training questions is the dev question, but for a blank.
    """
    train = [csqa_row(f"t{i}", f"Where is money number {i}?") for i in range(5)] + [
        csqa_row("t5", "Where do people swim?")
    ]
    texts = [
        "Money is kept safe. So the answer is (a) bank.\n\nQ: invented? So the answer is (c) lake.",
        "It must be (b) or so. So the answer is (b) park.\n\nQ: more",
        "Both hold. So the answer is either (a) bank or (b) park.",
        "Both hold. So the answer is (a) bank or (d) shop.",
        "So the answer is (a) bank.",
        "Water. So the answer is (c) lake.",
    ]
    for folder in ("csqa", "palm", "gpt3"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csqa" / "train_rand_split.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
    (tmp_path / "csqa" / "dev_rand_split.jsonl").write_text(
        json.dumps(csqa_row("d0", "Where do  people swim?", "C")) + "\n"
    )
    asked = [
        {"id": r["id"], "question": r["question"]["stem"], "choices": CHOICES, "answer": "bank"}
        for r in train
    ]
    (tmp_path / "palm" / "cqa_train.json").write_text("".join(json.dumps(q) + "\n" for q in asked))
    for part, some in enumerate((texts[:4], texts[4:])):
        (tmp_path / "palm" / f"train_CoT_{part}.json").write_text(json.dumps(some))
    explained = ["Banks keep money.", "Nonsense.", "", "Two votes.", "One vote."]
    with (tmp_path / "gpt3" / "commonsenseqa_train.csv").open("w", newline="") as f:
        out = csv.writer(f)
        asked = ["Input.id", "Input.question", "Input.answer_choices", "Input.gold_label"]
        out.writerow([*asked, *(f"Input.explanation_{i}" for i in range(1, 6)), "Answer.acceptable"])
        choices = ", ".join(CHOICES[:-1]) + f", or {CHOICES[-1]}"
        for name, accepted in (
            ("t0", "1|4"),
            ("t0", "1|4|5"),
            ("t0", "1|3"),
            ("t1", "5"),
            ("t1", ""),
            ("t1", ""),
            ("t2", ""),
            ("t2", ""),
            ("t2", ""),
            ("t5", "1|2|3|4|5"),
        ):
            out.writerow([name, f"Where is {name}?", choices, "bank", *explained, accepted])
    return {f"{k}_dir": str(tmp_path / k) for k in ("csqa", "palm", "gpt3")} | {"out": str(tmp_path / "out")}


def test_what_is_read_and_what_is_left_out(folders):
    space = executed("def made_tokenizer", **folders)
    assert [(q.id, stated, text) for q, stated, text in space["documents"]] == [
        ("t0", 0, "Money is kept safe."),
        ("t1", 1, "It must be (b) or so."),  # PaLM; the second argues for a wrong answer
        ("t0", 0, "Banks keep money."),
        ("t0", 0, "Two votes."),
        ("t1", 0, "One vote."),
    ]  # GPT-3: two votes of three, or the most there are
    assert dict(space["counts"]) == {
        "palm: used": 2,
        "palm: used, argues for a wrong answer": 1,
        "palm: no single answer": 2,
        "palm: nothing but the answer": 1,
        "palm: not a training question": 1,
        "gpt3: used": 3,
        "gpt3: not accepted": 9,
        "gpt3: not a training question": 1,
    }


def test_folders_that_do_not_fit_are_refused(folders):
    with pytest.raises(BadInput, match="given together"):
        executed("def made_tokenizer", **folders | {"csqa_dir": ""})
    (Path(folders["palm_dir"]) / "train_CoT_1.json").unlink()
    with pytest.raises(BadInput, match="4 rationales for 6 questions"):
        executed("def made_tokenizer", **folders)


def test_the_real_files():
    if not (SHARED / "palm_cqa").is_dir():
        pytest.skip(f"the real files are not in {SHARED}")
    space = executed(
        "def made_tokenizer",
        palm_dir=str(SHARED / "palm_cqa"),
        gpt3_dir=str(SHARED / "gpt3_csqa"),
        csqa_dir=str(SHARED / "csqa"),
    )
    counts = space["counts"]
    palm = {name: n for name, n in counts.items() if name.startswith("palm") and "argues" not in name}
    assert sum(palm.values()) == 9741 and palm["palm: no single answer"] >= 182, "182 state no letter at all"
    assert counts["gpt3: used"] + counts["gpt3: not accepted"] <= 991 * 5
    assert len(space["dev"]) == 1221 and not any(
        "\n" in text or "So the answer is" in text or not text for _, _, text in space["documents"]
    )


def test_the_smoke_run_and_the_same_teacher_again(tmp_path):
    made = executed(out=str(tmp_path / "a"))
    again = executed(
        out=str(tmp_path / "b"), model_dir=str(tmp_path / "a" / "model"), results=str(tmp_path / "results")
    )
    for name in ("greedy", "contrastive-empty", "contrastive-wrong"):
        rows = [
            json.loads(line)
            for line in (tmp_path / "a" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert [r["role"] for r in rows] == ["gold", "counterfactual"] * 8 and all(
            (r["target"] == r["answer"]) == (r["role"] == "gold") for r in rows
        )
        assert (tmp_path / "a" / f"{name}.jsonl").read_text(encoding="utf-8") == (
            tmp_path / "b" / f"{name}.jsonl"
        ).read_text(encoding="utf-8")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text(encoding="utf-8"))
    assert (
        metrics["rationales"]["greedy"]["gold"]["growth"]["n"] == 8
        and metrics["held out"] == again["held"] == made["held"]
    )
    table = (tmp_path / "results" / "real_teacher.csv").read_text(encoding="utf-8").splitlines()
    assert (
        table[0] == "strategy,role,measure,value,low,high,n"
        and len(table) == 1 + 3 * (8 + 6)
        and not list((tmp_path / "a").glob("checkpoint*"))
    )


def test_growth_is_the_difference_of_two_log_probabilities(tmp_path):
    "One record, token by token, without padding."
    import torch

    space = executed(out=str(tmp_path))
    record = replace(space["records"]["greedy"][1], rationale="A bank keeps money.")
    tokenizer, model, q = space["tokenizer"], space["teacher"].model, space["by_id"][record.id]
    slow = []
    for i in (record.target, q.answer):
        begin = tokenizer(space["context"](q, i)).input_ids
        ids = tokenizer(space["text_of"](q, i, record.rationale)).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        slow.append(
            sum(logits[k - 1, ids[k]].item() for k in range(len(begin), len(ids))) / (len(ids) - len(begin))
        )
    filler = replace(record, rationale="Money is a thing that people keep in a safe place for a long time.")
    fast = [space["log_p"]([record, filler], state)[0] for state in (space["stated"], space["other"])]
    assert fast == pytest.approx(slow, abs=1e-4)


def test_the_grid_names_parameters_that_exist(tmp_path, monkeypatch):
    plan = load_grid("real").plan
    for cell in plan.cells.values():
        assert set(cell.params) <= set(notebook_parameters(NOTEBOOK))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="not there"):
        plan.runs(tmp_path / "runs")
