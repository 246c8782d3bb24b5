"""The benchmarks: what they measure is the same work, what they write down fits the stored tables."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.grid import load_grid
from faithful_distill.lab.declared import notebook_parameters

slow = pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="runs a benchmark: set FAITHFUL_DISTILL_SLOW=1"
)


def run_cells(name: str, out: Path, instead: dict | None = None, **params) -> dict:
    """The names that a notebook defines, executed here; `instead` replaces some as soon as they are defined."""
    notebook = json.loads(shipped("nbs", "experiments", f"{name}.ipynb").read_text(encoding="utf-8"))
    names = {"display": lambda *_: None}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                assert params.keys() <= names.keys()
                names |= {"out": str(out), **params}
            names |= {name: value for name, value in (instead or {}).items() if name in names}
    return names


def columns_of(name: str) -> list[str]:
    return list(pd.read_csv(shipped("data", "results", f"{name}.csv")).columns)


def test_the_grid_asks_for_parameters_that_the_notebooks_have():
    assert load_grid("bench").name == "bench"
    for name in ("bench_decode", "bench_train", "bench_evaluate"):
        declared = notebook_parameters(shipped("nbs", "experiments", f"{name}.ipynb"))
        assert all(p.kind and p.help for p in declared.values()), declared


@slow
def test_every_way_of_decoding_writes_the_same_tokens(tmp_path):
    run_cells("bench_decode", tmp_path, new=12)
    table = pd.read_csv(tmp_path / "bench_decode.csv")
    assert list(table.columns) == columns_of("bench_decode")
    assert table.way.tolist() == list("abcdef") * 2 and set(table.lengths) == {"fixed", "mixed"}
    compared = table.dropna(subset=["of"])
    assert set(compared.way) == set("bdf") and (compared.agree == compared.of).all()
    assert (compared[compared.lengths == "mixed"].of < 2 * 2 * 12).all(), "some end before the last token"
    assert "ours, gold + counterfactual" in (tmp_path / "bench_decode.md").read_text(encoding="utf-8")


@slow
def test_lines_measured_anew_replace_earlier_ones(tmp_path):
    run_cells("bench_decode", tmp_path / "1", lengths=["fixed"], sizes=[2], ways="ad", new=4)
    first = tmp_path / "1" / "bench_decode.csv"
    run_cells(
        "bench_decode", tmp_path / "2", lengths=["fixed"], sizes=[2, 3], ways="a", new=4, earlier=str(first)
    )
    table = pd.read_csv(tmp_path / "2" / "bench_decode.csv")
    assert list(zip(table.n, table.way)) == [(2, "a"), (2, "d"), (3, "a")]


@slow
def test_a_way_that_the_memory_is_too_small_for_costs_the_others_nothing(tmp_path):
    import torch

    def too_large(teacher, task, guided):
        raise torch.OutOfMemoryError("no memory left")

    instead = {"of_transformers": too_large}
    run_cells("bench_decode", tmp_path, instead, lengths=["fixed"], ways="abd", new=4)
    table = pd.read_csv(tmp_path / "bench_decode.csv").set_index("way")
    assert table.repeats.to_dict() == {"a": 2, "b": 0, "d": 2} and table.seconds.notna().tolist() == [
        True,
        False,
        True,
    ]
    assert "out of memory" in (tmp_path / "bench_decode.md").read_text(encoding="utf-8")


@slow
def test_models_have_the_size_of_their_namesakes(tmp_path):
    import torch

    names = run_cells("bench_decode", tmp_path, models=[], device="cpu")
    names["device"] = "meta"
    millions = {kind: names["teacher_of"](kind).num_parameters() / 1e6 for kind in names["teachers"]}
    assert 30 < millions["gpt_neox"] < 60 and 30 < millions["llama"] < 60
    assert 20e3 < millions["gpt-neox-20b"] < 21e3 and 6.5e3 < millions["llama-7b"] < 7e3
    with pytest.raises(BadInput, match="must be a folder or some of tiny, gpt_neox"):
        names["teacher_of"]("bert")
    assert torch.get_num_threads() == 1


@slow
def test_the_floor_counts_each_distinct_token_once(tmp_path):
    "By hand: two contexts of 5 tokens that share 4, three new tokens; q and o, k and v, the MLP, norms, the output."
    names = run_cells("bench_decode", tmp_path, models=[])
    small = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    names["teachers"]["one layer"] = ("Llama", names["tiny"] | small)
    teacher = names["teacher_of"]("one layer")
    inner, outward = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32, 101 * 32
    # 4 + 1 + 1 tokens of prompt and 2 + 2 fed back; logits of 2 and of 4
    expected = 2 * (inner * (6 + 4) + outward * (2 + 4))
    assert names["operations"](teacher, [[[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]], [[7, 8, 9]]) == expected
    names["operations_a_second"], names["bytes_a_second"] = 1e15, 1e6
    floor = names["floor_seconds"](teacher, [[[1, 2, 3], [1, 2, 4]]], [[7, 8]])
    assert floor == 2 * 4 * (inner + outward) / 1e6, "two passes over all weights"


@slow
def test_stored_tokens_agree_and_announced_memory_is_near_the_measured(tmp_path):
    from faithful_distill.teacher.choice import Row
    from faithful_distill.teacher.contrast import Generation
    from faithful_distill.caches import token_budget
    from faithful_distill.teacher.engine import SharedPrefix, needed_bytes

    table = pd.read_csv(shipped("data", "results", "bench_decode.csv"))
    compared = table[(table.dtype == "float32") & table.way.isin(list("bdf"))]
    assert (compared.agree == compared.of).all() and (compared.of > 0).all()
    names = run_cells("bench_decode", tmp_path, models=[], prompt=500, question=80, new=48)
    chosen = table[
        (table.way == "d") & (table.lengths == "fixed") & (table.dtype == "float32") & (table.n >= 32)
    ]
    assert len(chosen)
    for line in chosen.itertuples():
        teacher = names["teacher_of"](line.model)
        task = names["random_task"](line.n, teacher.config.vocab_size, False)
        rows = [Row(i, [g, w], 48, Generation()) for i, (g, w) in enumerate(zip(task.gold, task.wrong))]
        size = SharedPrefix(teacher, rows, token_budget(teacher)).size()
        assert 0.6 < sum(needed_bytes(teacher, *size)) / 2**20 / line.memory < 1.4, line


@slow
def test_training_and_evaluation_are_the_same_work_in_every_way(tmp_path):
    run_cells("bench_train", tmp_path, configurations=["cpu", "zero2"])
    table = pd.read_csv(tmp_path / "bench_train.csv").fillna({"config": ""})
    assert list(table.columns) == columns_of("bench_train")
    assert list(zip(table.what, table.config)) == [("train", "cpu"), ("train", "zero2"), ("evaluate", "")]
    assert (table.same < 1e-3).all() and (table.less > 1).all()


@slow
def test_a_tree_gives_the_answers_of_batches_and_of_one_text_at_a_time(tmp_path):
    run_cells("bench_evaluate", tmp_path)
    table = pd.read_csv(tmp_path / "bench_evaluate.csv")
    assert list(table.columns) == columns_of("bench_evaluate")
    line = table.iloc[0]
    assert line.same < 1e-3 and line.requests > 3 * 20 and line["plain requests"] == 12
    again = dict(questions=2, sample=2, earlier=str(tmp_path / "bench_evaluate.csv"))
    run_cells("bench_evaluate", tmp_path / "2", **again)
    assert pd.read_csv(tmp_path / "2" / "bench_evaluate.csv").questions.tolist() == [3, 2]


@slow
def test_a_card_gives_rate_memory_and_utilisation(tmp_path):
    "Without a known peak there is no utilisation but a reason; with one it is FLOP/s over peak."
    import torch

    run_cells("bench_train", tmp_path, measure=["card"], configurations=["zero2"])
    line = pd.read_csv(tmp_path / "bench_card.csv").iloc[0]
    if not torch.cuda.is_available():
        assert pd.isna(line.mfu) and "give `peak`" in line.reason
    assert (line.student, line.precision, line.measured) == ("t5-tiny", "bf16", 1) and line.memory > 1e8
    earlier = str(tmp_path / "bench_card.csv")
    both = {"configurations": ["zero2", "zero3"], "peak": 2.0, "recompute": True, "earlier": earlier}
    run_cells("bench_train", tmp_path / "peak", measure=["card"], **both)
    table = pd.read_csv(tmp_path / "peak" / "bench_card.csv")
    assert list(zip(table.config, table.recompute)) == [("zero2", False), ("zero2", True), ("zero3", True)]
    known = table[table.recompute]
    assert known.mfu.tolist() == pytest.approx((known.flops_per_second / 2e12).tolist(), rel=1e-3)


@slow
def test_model_flop_are_those_that_torch_counts_row_by_row(tmp_path):
    names = run_cells("bench_train", tmp_path, measure=[])
    learner = names["learner"]
    for row in [row for step in names["planned_steps"]() for example in step for row in example]:
        batch = names["collate"]([row], learner)
        counted = names["flop"](lambda: names["learned_logits"](learner.model, batch))
        lengths = len(row.source), len(row.context) + len(row.target), len(row.target)
        assert 3 * counted == names["t5_flop"](learner.model.config, *lengths)
    assert [names["peak_of"](name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")] == [989, 756]
    assert names["peak_of"]("NVIDIA A100-SXM4-80GB") == 312 and names["peak_of"]("AMD EPYC") is None


@slow
def test_students_have_the_size_of_their_namesakes(tmp_path):
    import torch

    from faithful_distill.training.sizing import count_parameters

    names = run_cells("bench_train", tmp_path, measure=[])
    with torch.device("meta"):
        made = names["random_student"]("t5-base", ["which way"], vocabulary=300)
    assert made.model.num_parameters() == count_parameters("t5-base")[0] and made.name == "t5-base"
    with pytest.raises(BadInput, match="t5-3b"):
        names["random_student"]("t5-3c", ["which way"])
