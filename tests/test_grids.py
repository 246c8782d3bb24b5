"Every grid that travels with the package can be planned: notebooks, parameters, axes and references all fit."

import re

import pytest

from faithful_distill.lab.study import read_by_figures
from faithful_distill.files import shipped
from faithful_distill.lab.grid import load_grid


@pytest.mark.parametrize("name", sorted(p.stem for p in shipped("data", "grids").glob("*.yaml")))
def test_shipped_grids_plan(name, tmp_path):
    grid = load_grid(name)
    try:
        planned = grid.plan.runs(tmp_path)
    except Exception as e:
        if name not in ("bench", "real", "score_real") or "names a file that is not there" not in str(e):
            raise
        pytest.skip(f"reads files that a user brings: {e}")
    assert len(planned) == len(grid.plan.cells) > 0


def test_an_ablation_shares_the_runs_of_the_main_comparison(tmp_path):
    "A level that the main comparison has too is the same run folder, so it is computed once."
    planned = load_grid("study").plan.runs(tmp_path)
    same = {
        "student method=full method": [
            "weight_student reduction=per_part weight=0.5",
            "size_student method=full method size=large",
            "curve_student method=full method n_train=1200",
        ],
        "evaluation method=full method": [
            "weight reduction=per_part weight=0.5",
            "size method=full method size=large",
            "curve method=full method n_train=1200",
        ],
        "student method=contrastive CoT": [
            f"weight_student reduction={r} weight=0.0" for r in ("per_part", "per_token")
        ],  # no counterfactual loss: no weight, nothing to reduce
        "evaluation method=contrastive CoT": [
            f"weight reduction={r} weight=0.0" for r in ("per_part", "per_token")
        ],
    }
    for main, others in same.items():
        for other in others:
            assert planned[f"{other} seed=1"].folder == planned[f"{main} seed=1"].folder, other


def test_what_is_kept_of_the_study_is_what_its_figures_read_by_default():
    "One call keeps every file that a figure's notebook names for the study, under that name."
    tables, files = read_by_figures(load_grid("study"))
    kept = {f"study_{table}.csv" for table in [*tables, "times"]} | {f"study_{file}" for _, file in files}
    named = {
        found
        for p in shipped("nbs", "figures").glob("*.ipynb")
        for found in re.findall(r"data/results/(study_[\w.]+)", p.read_text(encoding="utf-8"))
    }
    assert named and named <= kept, named - kept
