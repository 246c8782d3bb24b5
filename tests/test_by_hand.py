"""Experiments run by papermill itself: every parameter is shown, and a misspelt one is refused inside the notebook."""

import re
from pathlib import Path

import papermill
import pytest

from faithful_distill.files import shipped
from faithful_distill.lab.keys import notebook_parameters
from faithful_distill.lab.parameters import settle

EXPERIMENTS = sorted(shipped("nbs", "experiments").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=lambda p: p.stem)
def test_papermill_shows_every_parameter(notebook):
    "`papermill --help-notebook` lists what can be set: its own parser must understand each line of the cell."
    shown = papermill.inspect_notebook(str(notebook))
    declared = notebook_parameters(notebook)
    assert [*shown] == [*declared]
    for name, parameter in declared.items():
        assert re.sub(r"\s", "", shown[name]["inferred_type_name"]) == re.sub(r"\s", "", parameter.kind), name
        assert "|" not in parameter.kind, f"{name}: papermill reads Optional[...] only"


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_settles_its_parameters_at_once(notebook):
    import json

    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", []))
    assert re.search(r"^settle\(globals\(\)\)$", "".join(cells[at + 1]["source"]), re.MULTILINE)


def test_every_default_path_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for notebook in EXPERIMENTS:
        names = {name: p.default for name, p in notebook_parameters(notebook).items()}
        settle(names)
        for name, value in names.items():
            if isinstance(value, str):
                assert not value.startswith("../"), (notebook.stem, name)
                assert value.startswith("runs/") or "data/" not in value or Path(value).exists(), (
                    notebook.stem,
                    name,
                )
