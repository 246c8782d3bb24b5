"""Experiments run by papermill itself: every parameter is shown, and a misspelt one is refused inside the notebook."""

import re
from dataclasses import fields
from pathlib import Path

import papermill
import pytest
from test_bench import run_cells

from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.declared import notebook_parameters
from faithful_distill.lab.parameters import settle
from faithful_distill.teacher.strategy import Strategy, as_strategy, strategies

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


class Enough(Exception):
    "The teacher has been asked."


@pytest.mark.parametrize(
    "dials, expected",
    [
        ({}, strategies["contrastive-wrong"]),
        (dict(beta=0.5, temperature=0.7, perturbation="empty", alpha=0.3), Strategy("empty", 0.3, 0.5, 0.7)),
        (dict(alpha=0), Strategy()),
    ],
)
def test_every_dial_of_decoding_reaches_the_teacher(tmp_path, dials, expected):
    "What a strategy is made of can be set in the notebook; what is not given stays the strategy's own."
    asked = []

    def rationalize(teacher, questions, strategy, **how):
        asked.append(as_strategy(strategy, **{f.name: how[f.name] for f in fields(Strategy)}))
        raise Enough

    instead = {"rationalize": rationalize, "load_teacher": lambda *_, **__: object()}
    with pytest.raises(Enough):
        run_cells("rationales", tmp_path, instead, n_train=1, n_dev=1, n_test=1, **dials)
    assert asked == [expected]


def test_a_dial_of_decoding_is_refused_where_no_teacher_decodes(tmp_path):
    with pytest.raises(BadInput, match="'beta': does not apply to 'true'"):
        run_cells("rationales", tmp_path, strategy="true", beta=0.5, n_train=1, n_dev=1, n_test=1)


def test_a_word_that_a_parameter_does_not_take_is_refused_by_grid_and_by_notebook(tmp_path):
    from faithful_distill.lab.declared import checked_parameters
    from faithful_distill.lab.parameters import check_choice

    students, evaluate = (shipped("nbs", "experiments", f"{n}.ipynb") for n in ("students", "evaluate"))
    wrong = "field 'method': must be one of answer-only, factual, counterfactual .got 'counterfactuel'.*'counterfactual'"
    with pytest.raises(BadInput, match=wrong):
        checked_parameters(students, {"method": "counterfactuel"})
    assert checked_parameters(students, {"method": "factual"})["method"] == "factual"
    with pytest.raises(BadInput, match="should be int or null .got 'None'.*The default is"):
        checked_parameters(evaluate, {"n_test": "None"})
    declared = 'method: str = "counterfactual"  # one of answer-only, factual or counterfactual'
    names = {"In": ["", declared, "# Parameters\nmethod = 'counterfactuel'\n"]}
    with pytest.raises(BadInput, match=wrong):
        settle(names)
    check_choice("strategy", "any", "a name of `strategies`; one of them is greedy")
