"""The package opens at once, and the wheel carries what the commands need."""

import subprocess
import sys
from pathlib import Path

import pytest

import faithful_distill

heavy = {
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "papermill",
    "pandas",
    "numpy",
    "matplotlib",
    "seaborn",
    "scipy",
}


@pytest.mark.parametrize("statement", ["import faithful_distill", "from faithful_distill.cli import main"])
def test_nothing_heavy_is_imported(statement):
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not heavy & {m.split(".")[0] for m in done.stdout.split()}


def test_public_names_are_where_the_front_says():
    for name in faithful_distill.__all__:
        assert callable(getattr(faithful_distill, name)), name


def test_no_room_imports_nbdev_or_fastcore():
    for module in Path(faithful_distill.__file__).parent.rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        if module.name != "_modidx.py":
            assert "fastcore" not in text and "import nbdev" not in text, module


def test_notebooks_carry_no_run_metadata():
    import json

    root = Path(faithful_distill.__file__).parents[1] / "nbs"
    for path in root.rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size < 500_000, path
        for cell in nb["cells"]:
            assert set(cell["metadata"]) <= {"tags"} and cell.get("execution_count") is None, path
        if path.parent.name in ("experiments", "figures"):
            assert sum("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]) == 1, path
