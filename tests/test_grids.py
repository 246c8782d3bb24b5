"Every grid that travels with the package can be planned: notebooks, parameters, axes and references all fit."

import re

import pytest

from faithful_distill.lab.kept import read_by_figures, row_tables
from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.grid import load_grid


@pytest.mark.parametrize("name", sorted(p.stem for p in shipped("data", "grids").glob("*.yaml")))
def test_shipped_grids_plan(name, tmp_path):
    grid = load_grid(name)
    try:
        planned = grid.plan.runs(tmp_path)
    except Exception as e:
        if name not in (
            "bench",
            "real",
            "score_real",
            "simulators",
        ) or "names a file that is not there" not in str(e):
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
            "weight_student reduction=per_part weight=0.0"
        ],  # no counterfactual loss: no weight, nothing to reduce
        "evaluation method=contrastive CoT": ["weight reduction=per_part weight=0.0"],
    }
    for main, others in same.items():
        for other in others:
            assert planned[f"{other} seed=1"].folder == planned[f"{main} seed=1"].folder, other


def test_what_is_kept_of_the_study_is_what_its_figures_read_by_default():
    "One call keeps every file that a figure's notebook names for the study, under that name."
    tables, files = read_by_figures(load_grid("study"))
    kept = {f"study_{table}.csv" for table in [*tables, "times"]} | {f"study_{file}" for _, file in files}
    kept |= {f"study_{table}_rows.csv" for table in row_tables(load_grid("study"))}
    named = {
        found
        for p in shipped("nbs", "figures").glob("*.ipynb")
        for found in re.findall(r"data/results/(study_[\w.]+)", p.read_text(encoding="utf-8"))
    }
    assert named and named <= kept, named - kept


@pytest.mark.parametrize(
    "group, field, said",
    [
        ("{notebook: ../simple.ipynb}", "g.notebook", "leads out of its folder"),
        ("{notebook: sub/../simple.ipynb}", "g.notebook", "leads out of its folder"),
        ("{notebook: simple.ipynb, for: {n: [1, 2], size: {large: {n: 3}}}}", "g.for.size", "axis 'n' does"),
        (
            '{notebook: simple.ipynb, for: {n: [1, 2]}, skip: [{n: "1"}]}',
            "g.skip.n",
            "is not on the axis 'n'",
        ),
        (
            "{notebook: simple.ipynb, for: {n: [1, 2]}, skip: [{n: [1, 2]}]}",
            "g.skip.n",
            "is not on the axis 'n'",
        ),
        (
            "{notebook: simple.ipynb, for: {n: [8, 9]}, skip: [{n: 010}]}",
            "g.skip.n",
            "is not on the axis 'n'",
        ),
        ("{notebook: simple.ipynb, seeds: 1:30}", "seeds", "should be a number of seeds"),
        ("{notebook: simple.ipynb, for: {a: {x: {n: 1}}, b: {y: {n: 1}}}}", "g.for.b", "axis 'a' does"),
        ("{notebook: simple.ipynb, for: {a: {x: {seed: 1}}}}", "g.for.seed", "axis 'a' does"),
    ],
)
def test_a_grid_that_means_two_things_or_leads_elsewhere_is_refused(group, field, said, tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    cell = new_code_cell("n: int = 0\nseed: int = 0\nout: str = 'out'", metadata={"tags": ["parameters"]})
    (tmp_path / "grids" / "sub").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "grids"):
        nbformat.write(new_notebook(cells=[cell]), folder / "simple.ipynb")
    grid = tmp_path / "grids" / "g.yaml"
    grid.write_text(f"groups:\n  g: {group}\n")
    with pytest.raises(BadInput, match=said) as error:
        load_grid(grid)
    assert error.value.field == field and error.value.remedy


def test_a_seed_that_a_figure_names_must_be_among_those_chosen():
    "The study's first figure shows an example of seed 1."
    with pytest.raises(BadInput, match="Add it to the seeds \\(2\\): the grid reads it by name"):
        load_grid("study", seeds=[2]).plan.cells
    assert load_grid("study", seeds=[1, 2]).plan.cells


def notebook_with(path, parameters, source=""):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    cell = new_code_cell(parameters)
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=[cell, new_code_cell(source)]), path)
    return path


@pytest.mark.parametrize("default", ["b'a'", "{1, 2}", "1j", "...", r"'\ud800'", "[" * 3000])
def test_a_default_that_json_has_no_word_for_is_named(tmp_path, default):
    from faithful_distill.lab.keys import planned_run

    file = notebook_with(tmp_path / "n.ipynb", f"x = {default}\nout: str = 'o'")
    with pytest.raises(BadInput, match="n.ipynb: "):
        planned_run(file)


def test_a_notebook_that_is_nested_too_deeply_is_named(tmp_path):
    from faithful_distill.lab.declared import notebook_parameters

    (tmp_path / "n.ipynb").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="n.ipynb: is not a notebook: it is nested too deeply"):
        notebook_parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize(
    "groups, problem",
    [
        ("a: {notebook: %s.ipynb}" % ("n" * 300), "grid.yaml: field 'a.notebook': there is no such notebook"),
        (r'a: {notebook: n.ipynb, params: {x: "\ud800"}}', "grid.yaml: .*half a character"),
        (r'a: {notebook: n.ipynb, for: {x: ["\ud800"]}}', "grid.yaml: .*half a character"),
        ("a: {notebook: n.ipynb, params: {x: 5}}", r"grid.yaml: .*should be str .*\(got 5\)"),
    ],
)
def test_an_error_of_a_grid_names_the_grid(tmp_path, monkeypatch, groups, problem):
    from faithful_distill.lab.grid import load_grid

    notebook_with(tmp_path / "n.ipynb", "x: str = ''\nout: str = 'o'")
    (tmp_path / "grid.yaml").write_text("groups:\n  " + groups + "\n")
    monkeypatch.chdir(tmp_path.parent)
    for file in (tmp_path / "grid.yaml", f"{tmp_path.name}/grid.yaml"):  # absolute, and relative
        with pytest.raises(BadInput, match=problem):
            load_grid(file).plan.runs(tmp_path / "runs")


def test_cells_of_one_name_and_circles_name_their_file(tmp_path):
    from faithful_distill.lab.plan import Cell, From, Plan

    for cells in ([Cell("a", "n"), Cell("a", "n")], [Cell("a", "n", {"x": From("a")})]):
        with pytest.raises(BadInput, match="grid.yaml: "):
            Plan(cells, tmp_path / "grid.yaml")


def test_a_working_folder_that_is_gone_is_one_clear_line(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (["reproduce", "--dry-run"], ["train", "--rationales", "r", "--out", "o"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 2 and "the working folder is gone" in done.output
