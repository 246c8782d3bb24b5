"What is kept of a study, made into runs again, kept again, and compared."

import json
import os
import threading
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from faithful_distill.files import BadInput
from faithful_distill.lab import kept as kept_module
from faithful_distill.lab.grid import load_grid
from faithful_distill.lab.kept import Kept, grid_with_kept, left_out, read_by_figures
from faithful_distill.lab.replication import compare_profile, compare_tables
from faithful_distill.lab.study import keep_profile, reproduce
from faithful_distill.lab.tables import note_origin, origin_of, read_origins, read_table

WRITE = """import json
from pathlib import Path
Path(out, "s.json").write_text(json.dumps({"of": [who, seed]}))
Path(out, "seconds.json").write_text(json.dumps(str(Path(out).absolute())))
for name in ("rows.jsonl", "other.jsonl"):
    found = [{"id": "q", "role": role, "found": f"{name} {who} {role}"} for role in ("gold", "counterfactual")]
    Path(out, name).write_text("".join(json.dumps(row) + "\\n" for row in found))
Path(out, "metrics.json").write_text(json.dumps({"found": {"value": seed / 10, "low": None, "high": None, "n": 1}}))"""
DRAW = """from pathlib import Path
text = lambda path: Path(path).read_text() if path else ""
Path(out, "drawn.csv").write_text("".join(map(text, [results, rows, first, second, *several])))"""


@pytest.fixture
def study(tmp_path):
    "Writes a grid of three groups and a figure; gives its file, and the folders of runs and of kept tables."
    for name, parameters, code in (
        ("write", "who: str = ''\nread: str = ''\nseed: int = 0\nout: str = ''", WRITE),
        (
            "draw",
            "results: str = ''\nrows: str = ''\nfirst: str = ''\nsecond: str = ''\nseveral: list[str] = []\nout: str = ''",
            DRAW,
        ),
    ):
        tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[tagged, new_code_cell(code)]), tmp_path / f"{name}.ipynb")

    def write(drawn: str, read: str = "''", more: str = "who: c") -> tuple[Path, Path, Path]:
        (tmp_path / "toy.yaml").write_text(f"""
seeds: [1, 2]
groups:
  a: {{notebook: write.ipynb, params: {{who: a}}}}
  b: {{notebook: write.ipynb, params: {{who: b, read: {read}}}}}
  c: {{notebook: write.ipynb, params: {{{more}}}}}
figures:
  draw: {{notebook: draw.ipynb, params: {drawn}}}
""")
        return tmp_path / "toy.yaml", tmp_path / "runs", tmp_path / "kept"

    return write


def computed_and_kept(file: Path, runs: Path, kept: Path, **how):
    "Which cells were computed, before all is kept."
    made = reproduce(file, runs=runs, workers=1, keep=kept, **how)
    assert made.ok, made.summary()
    keep_profile(file, kept, runs, how.get("seeds"))
    return [o.cell for o in made.outcomes if o.state == "computed"]


def drawn_text(file: Path, runs: Path) -> str:
    return (load_grid(file).plan.runs(runs)["draw"].folder / "drawn.csv").read_text()


def test_runs_that_were_made_from_kept_tables_are_not_compared_with_these(study, tmp_path):
    file, runs, kept = study("{results: {table: [a, b]}, first: {from: a, seed: 1, file: s.json}}")
    computed_and_kept(file, runs, kept, only=["draw"])
    whole = compare_profile(file, kept, runs)
    assert whole.same and sum(t.rows for t in whole.tables) == 5
    again = tmp_path / "again"
    assert computed_and_kept(file, again, kept, only=["draw"]) == ["draw"]
    with pytest.raises(BadInput, match="all runs of toy in .* were made from such"):
        compare_profile(file, kept, again)
    mixed = tmp_path / "mixed"
    reproduce(file, runs=mixed, workers=1, only=["a*seed=2", "b*seed=2"])
    assert computed_and_kept(file, mixed, kept, only=["draw"]) == ["draw"]
    found = compare_profile(file, kept, mixed)
    assert found.same and [(t.name, t.rows) for t in found.tables] == [("toy_a.csv", 2)]
    assert found.restored == 2 and "2 runs were made from kept tables" in str(found)


@pytest.mark.parametrize("role", ["gold", "counterfactual"])
def test_each_role_of_a_question_is_compared(tmp_path, role):
    head = "group,seed,id,role,growth\n"
    (tmp_path / "kept.csv").write_text(f"{head}a,1,q,counterfactual,0.5\na,1,q,gold,0.25\n")
    altered = (tmp_path / "kept.csv").read_text().replace(f"{role},0.", f"{role},1.")
    (tmp_path / "new.csv").write_text(altered)
    found = compare_tables(tmp_path / "new.csv", tmp_path / "kept.csv")
    assert (found.rows, found.same) == (2, 1)


def test_rows_that_nothing_tells_apart_are_all_compared(tmp_path):
    (tmp_path / "kept.csv").write_text("group,id,found\na,q,1\na,q,2\n")
    (tmp_path / "new.csv").write_text("group,id,found\na,q,3\na,q,2\n")
    found = compare_tables(tmp_path / "new.csv", tmp_path / "kept.csv")
    assert (found.rows, found.same, found.unknown) == (2, 1, 0)


def test_what_is_kept_again_keeps_its_origin_and_what_was_planted(study, tmp_path):
    file, runs, kept = study(
        "{results: {table: a}, rows: {rows: b}, first: {from: a, seed: 1, file: s.json}}"
    )
    computed_and_kept(file, runs, kept)
    names = ["toy_a.csv", "toy_b_rows.csv", "toy_s.json"]
    for name in names:
        note_origin([kept / name], "0.0.9", "2020-02-02", "abcdef0", {"a": "by construction"})
    computed_and_kept(file, tmp_path / "again", kept)
    planted = {"planted": {"a": "by construction"}}
    old = {"version": "0.0.9", "date": "2020-02-02", "commit": "abcdef0"} | planted
    assert [origin_of(kept / name) for name in names] == [old] * 3
    keep_profile(file, tmp_path / "elsewhere", tmp_path / "again")
    assert origin_of(tmp_path / "elsewhere" / "toy_a.csv") == old
    mixed = tmp_path / "mixed"  # a seed of each: both origins
    reproduce(file, runs=mixed, workers=1, only=["a*seed=2"])
    computed_and_kept(file, mixed, kept)
    assert origin_of(kept / "toy_a.csv")["version"].startswith("0.0.9, ")
    assert origin_of(kept / "toy_a.csv")["date"] > "2020-02-02"
    assert read_origins(kept)["toy_a.csv"]["planted"] == planted["planted"]


def test_times_of_what_was_computed_before_stay_among_the_kept(study, tmp_path):
    file, runs, kept = study("{results: {table: a}, rows: {rows: b}}")
    computed_and_kept(file, runs, kept, seeds=[1])
    times = lambda: read_table(kept / "toy_times.csv").query("group in ('a', 'b')")
    before = times()
    assert computed_and_kept(file, tmp_path / "again", kept, seeds=[1], only=["draw"]) == ["draw"]
    assert times().to_csv() == before.to_csv() and len(before) == 6
    assert computed_and_kept(file, tmp_path / "again", kept, only=["draw"]) == [
        "a seed=2",
        "b seed=2",
        "draw",
    ]
    assert times().query("seed == 1").to_csv(index=False) == before.to_csv(index=False)
    assert list(zip(times()["group"], times()["seed"])) == [
        (g, s) for g in "ab" for s in (1, 2) for _ in range(3)
    ]


def test_files_that_a_figure_reads_in_a_list_are_kept(study, tmp_path):
    file, runs, kept = study("{results: {table: a}, several: {each: a, file: s.json}}")
    computed_and_kept(file, runs, kept, only=["draw"])
    assert computed_and_kept(file, tmp_path / "again", kept, only=["draw"]) == ["draw"]
    assert drawn_text(file, tmp_path / "again") == drawn_text(file, runs)
    assert {p.name for p in kept.glob("*s.json")} == {"toy_a_seed=1_s.json", "toy_a_seed=2_s.json"}
    one = tmp_path / "one"  # the name does not depend on how many seeds there are
    assert computed_and_kept(file, one, tmp_path / "first", only=["draw"], seeds=[1]) == ["a seed=1", "draw"]
    assert computed_and_kept(file, one, tmp_path / "first", only=["draw"], seeds=[2]) == ["a seed=2", "draw"]
    assert computed_and_kept(file, tmp_path / "last", tmp_path / "first", only=["draw"]) == ["draw"]


@pytest.mark.parametrize("measured", ["s.json", "seconds.json"])
def test_how_long_it_took_is_no_result_that_must_come_again(study, tmp_path, measured):
    file, runs, kept = study(f"{{results: {{table: a}}, several: {{each: a, file: {measured}}}}}")
    computed_and_kept(file, runs, kept)
    assert reproduce(file, runs=tmp_path / "again", workers=1).ok
    found = compare_profile(file, kept, tmp_path / "again")
    assert found.same and [t.name for t in found.tables if "seed" in t.name] == [
        f"toy_a_seed={seed}_s.json" for seed in (1, 2) if measured == "s.json"
    ]


def test_files_of_one_name_are_kept_apart(study, tmp_path):
    file, runs, kept = study(
        "{first: {from: a, seed: 1, file: s.json}, second: {from: b, seed: 1, file: s.json}}"
    )
    computed_and_kept(file, runs, kept, only=["draw"])
    assert computed_and_kept(file, tmp_path / "again", kept, only=["draw"]) == ["draw"]
    assert (
        drawn_text(file, tmp_path / "again") == drawn_text(file, runs) == '{"of": ["a", 1]}{"of": ["b", 1]}'
    )


def test_files_without_a_namesake_keep_their_names():
    names = {profile: set(read_by_figures(load_grid(profile))[1].values()) for profile in ("study", "real")}
    assert names == {"study": {"examples.json"}, "real": {"samples.json"}}


def test_rows_of_another_file_are_kept_as_they_are(study, tmp_path):
    file, runs, kept = study("{results: {rows: a}, rows: {rows: a, file: other.jsonl}}")
    computed_and_kept(file, runs, kept, only=["draw"])
    assert "other.jsonl a gold" in (kept / "toy_a_other_rows.csv").read_text()
    assert "rows.jsonl a gold" in (kept / "toy_a_rows.csv").read_text()
    assert computed_and_kept(file, tmp_path / "again", kept, only=["draw"]) == ["draw"]
    assert drawn_text(file, tmp_path / "again") == drawn_text(file, runs)


def test_a_cell_that_is_asked_for_is_computed_though_all_that_reads_it_is_kept(study, tmp_path):
    file, runs, kept = study("{results: {table: b}}", read="{from: a}")
    computed_and_kept(file, runs, kept)
    assert computed_and_kept(file, tmp_path / "idle", kept, only=["b"]) == []
    again = tmp_path / "again"
    made = reproduce(file, runs=again, workers=1, keep=kept, only=["a"])
    assert [(o.cell, o.state) for o in made.outcomes] == [("a seed=1", "computed"), ("a seed=2", "computed")]


def test_what_a_cell_that_is_asked_for_reads_is_computed_as_a_whole(study):
    "The kept table of a does not hold the folder that b reads, so a is not made from it."
    file, runs, kept = study("{results: {table: [a, c]}}", read="{from: a}", more="read: {from: b}")
    computed_and_kept(file, runs, kept)
    grid, again = grid_with_kept(file, kept), runs.with_name("again")
    every = ["a seed=1", "a seed=2", "c seed=1", "c seed=2"]
    assert [sorted(found) for found in left_out(grid, Kept(grid, kept), again)] == [
        every,
        ["b seed=1", "b seed=2"],
    ]
    done, idle = left_out(grid, Kept(grid, kept), again, named=["b seed=1"])
    assert sorted(done) == every[1:] and idle == {"b seed=2"}


def test_two_drivers_make_one_run_of_kept_rows(study, tmp_path, monkeypatch):
    "The second waits for the first, and finds its run; neither removes what the other is writing."
    file, runs, kept = study("{results: {table: a}, first: {from: a, seed: 1, file: s.json}}")
    computed_and_kept(file, runs, kept)
    again = tmp_path / "again"
    again.mkdir()
    grid = grid_with_kept(file, kept)
    run, name = grid.plan.runs(again)["a seed=1"], "a seed=1"
    begun, go_on, write, errors, written = threading.Event(), threading.Event(), os.rename, [], []

    def slow_rename(source, target):
        if Path(target) == run.folder:
            written.append(source)
            begun.set()
            go_on.wait(5)
        write(source, target)

    def restore():
        try:
            assert Kept(grid, kept).restore(name, run)
        except BaseException as e:
            errors.append(e)

    monkeypatch.setattr(kept_module.os, "rename", slow_rename)
    drivers = [threading.Thread(target=restore) for _ in range(2)]
    drivers[0].start()
    assert begun.wait(20)
    drivers[1].start()
    drivers[1].join(1)
    go_on.set()
    for driver in drivers:
        driver.join(20)
    assert not errors and len(written) == 1 and run.finished
    assert json.loads((run.folder / "s.json").read_text()) == {"of": ["a", 1]}
    assert not list(again.glob(".*.kept"))
