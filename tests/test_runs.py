"""The driver under real conditions: processes that are killed, two drivers at once, changed code, a warm kernel
against a cold one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import faithful_distill
from faithful_distill.files import BadInput
from faithful_distill.lab import declared, kernel as kernels, keys, plan as plans, runs
from faithful_distill.lab.declared import checked_parameters, notebook_parameters
from faithful_distill.lab.grid import _read_yaml, load_grid
from faithful_distill.lab.kernel import WarmKernel, progress_line
from faithful_distill.lab.keys import found_notebook, planned_run
from faithful_distill.lab.plan import Cell, From, Plan, run_plan
from faithful_distill.lab.runs import Busy, NotebookFailed, hold_run, run_notebook
from faithful_distill.lab.study import _gathering, forecast, gather, keep_results, reproduce
from faithful_distill.lab.tables import origin_of, read_table, tidy, write_table

PACKAGE = Path(faithful_distill.__file__).parent


def write_notebook(path: Path, parameters: str, *cells: str, prose="prose") -> Path:
    nb = new_notebook(
        cells=[
            new_markdown_cell(prose),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *map(new_code_cell, cells),
        ]
    )
    nb.metadata.kernelspec = {"name": "python3", "display_name": "python3", "language": "python"}
    for i, cell in enumerate(nb.cells):
        cell.id = f"c{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


METRICS = "import json; from pathlib import Path\nPath(out, 'metrics.json').write_text(json.dumps({'x': %s}))"


@pytest.fixture(scope="module")
def kernel():
    with WarmKernel() as k:
        yield k


@pytest.fixture
def simple(tmp_path):
    return write_notebook(
        tmp_path / "simple.ipynb", "n: int = 1\nname: str = 'a'\nout: str = 'out'", METRICS % "n"
    )


def result_bytes(runs: Path) -> dict[str, bytes]:
    "All that has to be equal between two executions: everything but times, locks and memory of durations."
    return {
        str(p.relative_to(runs)): p.read_bytes()
        for p in sorted(runs.rglob("*"))
        if p.is_file()
        and p.name != "times.json"
        and not any(part.startswith(".") or part == "times" for part in p.relative_to(runs).parts)
    }


# --- keys ----------------------------------------------------------------------------------------------------


def test_prose_outputs_and_comments_do_not_change_the_key_but_code_does(tmp_path):
    def key(**changes):
        spec = {"parameters": "n: int = 1\nout: str = 'out'", "code": "x = n + 1", "prose": "words"} | changes
        return planned_run(
            write_notebook(tmp_path / "nb.ipynb", spec["parameters"], spec["code"], prose=spec["prose"]),
            {"n": 5},
            tmp_path,
        ).name

    base = key()
    assert (
        key(prose="other words")
        == key(code="x = n+1  # add")
        == key(parameters="n: int = 2   # how many\nout: str = 'else'")
        == base
    )
    assert key(code="x = n + 2") != base
    assert key(parameters="n: int = 1\nm: int = 0\nout: str = 'out'") != base


def test_outputs_in_the_notebook_do_not_change_the_key(simple, tmp_path):
    base = planned_run(simple, {}, tmp_path).name
    nb = nbformat.read(simple, 4)
    nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text="old")]
    nbformat.write(nb, simple)
    assert planned_run(simple, {}, tmp_path).name == base


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.one_of(
            st.integers(), st.booleans(), st.text(max_size=5), st.none(), st.lists(st.integers(), max_size=3)
        ),
        max_size=4,
    )
)
def test_equal_keys_exactly_for_equal_parameters(tmp_path_factory, params):
    folder = tmp_path_factory.getbasetemp()
    nb = folder / "any.ipynb"
    if not nb.exists():
        write_notebook(nb, "a = None\nb = None\nc = None\nd = None\nout: str = ''", "1")
    full = lambda p: [p.get(k) for k in "abcd"]
    same = (
        planned_run(nb, dict(reversed(params.items())), folder).name == planned_run(nb, params, folder).name
    )
    assert same
    other = {**params, "a": "changed"}
    assert (planned_run(nb, other, folder).name == planned_run(nb, params, folder).name) == (
        json.dumps(full(other)) == json.dumps(full(params))
    )


def test_files_count_by_content_wherever_they_lie(tmp_path):
    nb = write_notebook(
        tmp_path / "reads.ipynb",
        "data: str = ''\nmodel_dir: str = ''\nfiles: list[str] = []\nout: str = 'out'",
        "1",
    )
    for place in "xy":
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "d.txt").write_text("same")
        (tmp_path / place / "model" / "w").write_text("w")
    plan = lambda place: planned_run(
        nb,
        {
            "data": f"{tmp_path}/{place}/d.txt",
            "model_dir": f"{tmp_path}/{place}/model",
            "files": [f"{tmp_path}/{place}/d.txt"],
        },
        tmp_path,
    )
    assert plan("x").name == plan("y").name
    (tmp_path / "y" / "model" / "w").write_text("other")
    assert plan("x").name != plan("y").name
    with pytest.raises(BadInput, match="model_dir.*not there"):
        planned_run(nb, {"model_dir": "nowhere"}, tmp_path)
    words = planned_run(
        nb, {"data": "csqa", "files": [".", "/", "a/b", "google/t5", "x" * 5000 + "/y"]}, tmp_path
    )
    assert words.values["data"] == "csqa" and words.provenance["inputs"] == {}, "words are words"


def test_relative_paths_are_the_callers_and_defaults_the_notebooks(tmp_path, monkeypatch):
    nb = write_notebook(tmp_path / "nbs" / "reads.ipynb", "data_path: str = 'd.txt'\nout: str = 'out'", "1")
    (tmp_path / "nbs" / "d.txt").write_text("beside the notebook")
    (tmp_path / "d.txt").write_text("where the caller is")
    monkeypatch.chdir(tmp_path)
    assert planned_run(nb, {}, tmp_path).values["data_path"] == f"{tmp_path}/nbs/d.txt"
    assert planned_run(nb, {"data_path": "d.txt"}, tmp_path).values["data_path"] == f"{tmp_path}/d.txt"


def test_a_path_inside_a_finished_run_counts_as_that_run(simple, tmp_path, kernel):
    nb = write_notebook(
        tmp_path / "reads.ipynb",
        "source: str = ''\nout: str = 'out'",
        "print(sorted(__import__('os').listdir(source)))",
        METRICS % "1",
    )
    first = run_notebook(simple, {}, tmp_path / "runs", kernel=kernel)
    second = run_notebook(nb, {"source": str(first)}, tmp_path / "runs", kernel=kernel)
    record = json.loads((second / "params.json").read_text())
    assert record["params"]["source"] == f"../{first.name}" and record["inputs"]["source"] == {
        "run": first.name,
        "file": "",
    }
    assert (
        planned_run(nb, {"source": str(first / "metrics.json")}, tmp_path / "runs").values["source"]
        == f"../{first.name}/metrics.json"
    )


@pytest.fixture
def copied_package(tmp_path):
    "A copy of the package, with two toy modules in wings of their own and a public name for the first."
    package = tmp_path / "lib" / "faithful_distill"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "student" / "toy.py").write_text(
        "def toy_answer():\n    from faithful_distill.teacher.speech import speak\n    return speak()\n"
    )
    (package / "teacher" / "speech.py").write_text("def speak(): return 1\n")
    for stub, line in [("__init__.pyi", "from .student.toy"), ("student/__init__.pyi", "from .toy")]:
        with open(package / stub, "a") as f:
            f.write(f"\n{line} import toy_answer as toy_answer\n")
    return package


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def python(package: Path, code: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def planned_in(package: Path, notebook: Path, field: str) -> list[str]:
    "Name of the notebook's run as a copy of the package plans it, and the keys of a field of its provenance."
    code = (
        "from faithful_distill.lab.keys import planned_run\n"
        f"run = planned_run({str(notebook)!r}, {{}}, 'runs')\n"
        f"print(run.name, *run.provenance[{field!r}])"
    )
    return python(package, code, package.parent.parent).split()


def test_changed_code_of_an_imported_module_recomputes_and_of_others_does_not(copied_package, tmp_path):
    nb = write_notebook(
        tmp_path / "uses.ipynb",
        "out: str = 'out'",
        "from faithful_distill import toy_answer",
        METRICS % "toy_answer()",
    )
    name, *modules = planned_in(copied_package, nb, "modules")
    assert modules == ["student.toy", "teacher.speech"]
    append(copied_package / "student" / "rows.py", "extra = 1\n")
    speech = copied_package / "teacher" / "speech.py"
    speech.write_text("def speak():\n    'Says it.'\n    return 1    # one\n")
    assert planned_in(copied_package, nb, "modules")[0] == name
    speech.write_text("def speak(): return 2\n")
    assert planned_in(copied_package, nb, "modules")[0] != name


def test_a_change_inside_a_wing_changes_the_keys_of_who_imports_it_through_the_face(copied_package, tmp_path):
    "What `train_student` needs lies in several wings; how figures are drawn is no part of it."
    nb = write_notebook(
        tmp_path / "uses.ipynb", "out: str = 'out'", "from faithful_distill import train_student"
    )
    name, *modules = planned_in(copied_package, nb, "modules")
    assert {"training.train", "student.loss", "records", "files"} <= set(modules)
    assert not [m for m in modules if m.startswith("lab.")]
    append(copied_package / "lab" / "plots.py", "\ncolour = 'red'\n")
    append(copied_package / "student" / "loss.py", "\n# a remark\n")
    assert planned_in(copied_package, nb, "modules")[0] == name
    append(copied_package / "student" / "loss.py", "\nscale = 2\n")
    assert planned_in(copied_package, nb, "modules")[0] != name


@pytest.mark.parametrize(
    "code",
    [
        "from faithful_distill.student import toy_answer",
        "import faithful_distill as fd\nfd.toy_answer()",
        "from faithful_distill.student.toy import toy_answer",
        "import faithful_distill.student.toy",
        "run(['-m', 'faithful_distill.student.toy'])",
    ],
)
def test_every_way_to_name_a_module_of_a_wing_counts(copied_package, tmp_path, code):
    nb = write_notebook(tmp_path / "uses.ipynb", "out: str = 'out'", code)
    name, *_ = planned_in(copied_package, nb, "modules")
    append(copied_package / "teacher" / "speech.py", "loud = True\n")
    assert planned_in(copied_package, nb, "modules")[0] != name


def test_the_state_of_the_package_is_that_of_its_wings_too(copied_package, tmp_path):
    state = lambda: python(
        copied_package, "from faithful_distill.lab.kernel import package_state as s; print(s())", tmp_path
    )
    seen = {state()}
    append(copied_package / "student" / "loss.py", "\nscale = 2\n")
    seen.add(state())
    append(copied_package / "student" / "__init__.pyi", "\nfrom .rows import Row as Row\n")
    seen.add(state())
    (copied_package / "training" / "new.py").write_text("")
    seen.add(state())
    assert len(seen) == 4 and state() in seen


def test_a_warm_kernel_is_replaced_when_the_package_changes(copied_package, tmp_path):
    nb = write_notebook(
        tmp_path / "uses.ipynb",
        "n: int = 0\nout: str = 'out'",
        "from faithful_distill import toy_answer",
        METRICS % "toy_answer()",
    )
    code = f"""
import json
from pathlib import Path
from faithful_distill.lab.kernel import WarmKernel
from faithful_distill.lab.runs import run_notebook
with WarmKernel() as kernel:
    for n in (0, 1):
        folder = run_notebook({str(nb)!r}, {{'n': n}}, 'runs', kernel=kernel)
        print(json.loads((folder / 'metrics.json').read_text())['x'])
        Path({str(copied_package / "teacher" / "speech.py")!r}).write_text('def speak(): return 22\\n')
"""
    assert python(copied_package, code, tmp_path).split() == ["1", "22"]


def test_data_that_travels_with_the_package_is_part_of_the_key(copied_package, tmp_path):
    (copied_package / "teacher" / "speech.py").write_text(
        "from faithful_distill.files import shipped\n"
        "def prompt(name): return shipped('data', 'prompts', name).read_text()\n"
    )
    (tmp_path / "lib" / "data" / "prompts").mkdir(parents=True)
    (tmp_path / "lib" / "data" / "prompts" / "csqa.txt").write_text("Q: one")
    nb = write_notebook(
        tmp_path / "uses.ipynb", "out: str = 'out'", "from faithful_distill.teacher.speech import prompt"
    )
    name, *data = planned_in(copied_package, nb, "shipped")
    assert data == ["data/prompts"]
    (tmp_path / "lib" / "data" / "prompts" / "csqa.txt").write_text("Q: two")
    assert planned_in(copied_package, nb, "shipped")[0] != name


def test_device_and_precision_are_part_of_the_key_where_models_are_computed_on_a_gpu(tmp_path, monkeypatch):
    "A figure's key is the same everywhere; on a CPU nothing is added."
    from faithful_distill.lab import keys

    def named(notebook):
        data = {"rationales_dir": str(tmp_path)} if "experiments" in notebook else {}
        return keys.planned_run(notebook, data).provenance

    trains, draws = "experiments/students.ipynb", "figures/fig02_students.ipynb"
    monkeypatch.setattr(keys, "accelerator", lambda: {})
    plain = named(trains)
    on = {}
    for device in ({"device": "H100", "precision": "bf16"}, {"device": "T4", "precision": "fp32"}):
        monkeypatch.setattr(keys, "accelerator", lambda device=device: device)
        on[device["device"]] = named(trains)
        assert on[device["device"]]["computed on"] == device
        assert named(draws)["key"] == keys.planned_run(draws, {}).provenance[
            "key"
        ] and "computed on" not in named(draws)
    assert "computed on" not in plain
    assert len({plain["key"], on["H100"]["key"], on["T4"]["key"]}) == 3


def test_annotations_are_read_and_not_executed(tmp_path):
    nb = write_notebook(
        tmp_path / "odd.ipynb",
        "a: print('executed') = 1\nb: list['Frame'] = []\nc: ().__class__ = 2\nout: str = 'out'",
    )
    assert checked_parameters(nb, {"a": "x", "b": ("y",)}) == {"a": "x", "b": ["y"], "c": 2}


# --- where there is no Unix ----------------------------------------------------------------------------------


def test_the_laboratory_can_be_imported_without_what_only_unix_has():
    code = """
import signal, sys, warnings
warnings.simplefilter("ignore")  # filelock says that its locks are weaker then
sys.modules |= dict.fromkeys(["fcntl", "resource", "grp", "pwd"])
del signal.SIGKILL
import faithful_distill.lab.study, faithful_distill.lab.kernel
print("imported")
"""
    assert python(PACKAGE, code, PACKAGE.parent) == "imported"


# --- one run -------------------------------------------------------------------------------------------------


def test_a_warm_kernel_is_like_a_new_one(tmp_path, kernel):
    spoil = write_notebook(
        tmp_path / "spoil.ipynb",
        "out: str = 'out'",
        "import os, sys, random\nos.environ['SPOILT'] = '1'; sys.path.insert(0, '/spoilt'); left = 1",
        "import matplotlib; import matplotlib.pyplot as plt; plt.figure(); plt.rcParams['font.size'] = 33;"
        " os.chdir('/')",
        METRICS.replace("out,", "__import__('os').environ['PWD_'] if 0 else _d,") % "1",
    )
    text = spoil.read_text().replace("os.chdir('/')", "_d = os.getcwd(); os.chdir('/')")
    spoil.write_text(text)
    look = write_notebook(
        tmp_path / "look.ipynb",
        "out: str = 'out'",
        "import os, sys, random\nimport numpy as np\nimport matplotlib.pyplot as plt",
        METRICS % "[os.environ.get('SPOILT'), '/spoilt' in sys.path, 'left' in globals(), random.random(),"
        " np.random.rand(), plt.get_fignums(), plt.rcParams['font.size'], os.environ['OMP_NUM_THREADS'],"
        " hash('x')]",
        "object()",
    )
    run_notebook(spoil, {}, tmp_path / "warm", kernel=kernel)
    run_notebook(look, {}, tmp_path / "warm", kernel=kernel)
    run_notebook(look, {}, tmp_path / "cold")
    warm, cold = result_bytes(tmp_path / "warm"), result_bytes(tmp_path / "cold")
    assert {k: warm[k] for k in cold} == cold and len(cold) == 3


def test_executed_notebooks_hold_no_times_and_no_warnings(tmp_path, kernel):
    nb = write_notebook(
        tmp_path / "talks.ipynb",
        "out: str = 'out'",
        "import sys, datetime\nprint('kept'); print(f'[{datetime.datetime.now()}] [INFO] started');"
        " print('warned', file=sys.stderr)",
        "object()",
        METRICS % "1",
    )
    folder = run_notebook(nb, {}, tmp_path / "runs", kernel=kernel)
    text, times = (folder / "talks.ipynb").read_text(), json.loads((folder / "times.json").read_text())
    output = json.dumps([c.outputs for c in nbformat.reads(text, 4).cells if c.cell_type == "code"])
    assert (
        "kept" in output
        and "INFO" not in output
        and "warned" not in output
        and "object at 0x..." in output
        and "duration" not in text
    )
    assert (
        any("INFO" in m for m in times["messages"])
        and "warned\n" in times["messages"]
        and len(times["cells"]) == 5
    )
    assert str(tmp_path) not in text + (folder / "params.json").read_text(), "nothing depends on the place"


def test_progress_inside_a_notebook_reaches_the_caller(tmp_path, kernel):
    nb = write_notebook(
        tmp_path / "loops.ipynb",
        "out: str = 'out'",
        "import time\nfrom faithful_distill.progress import progress\nfor _ in progress(range(4),"
        " desc='throwing'): time.sleep(0.4)",
        METRICS % "1",
    )
    run, heard, done = planned_run(nb, {}, tmp_path / "runs"), set(), threading.Event()

    def watch():
        while not done.wait(0.05):
            heard.add(progress_line(run.partial))

    watcher = threading.Thread(target=watch)
    watcher.start()
    folder = run_notebook(nb, {}, tmp_path / "runs", kernel=kernel)
    done.set()
    watcher.join()
    assert any(line.startswith("throwing") and "%" in line for line in heard), heard
    assert "throwing:" not in (folder / "loops.ipynb").read_text()
    assert json.loads((folder / "times.json").read_text())["messages"] == []
    assert not list(folder.glob(".*")), "nothing of it is left"


@pytest.mark.parametrize(
    "code, problem",
    [
        ("raise ValueError('no such answer')", "ValueError: no such answer"),
        ("import os; os.kill(os.getpid(), 9)", "kernel died"),
        ("import time; time.sleep(60)", "longer than allowed"),
        ("x = ", "SyntaxError"),
    ],
)
def test_a_failing_cell_is_named_and_its_notebook_left_and_the_kernel_goes_on(
    tmp_path, simple, kernel, code, problem
):
    nb = write_notebook(tmp_path / "fails.ipynb", "out: str = 'out'", "print('before')", code, METRICS % "1")
    with pytest.raises(NotebookFailed, match=problem) as caught:
        run_notebook(nb, {}, tmp_path / "runs", kernel=kernel, timeout=2)
    assert (
        caught.value.cell == 4
        and "before" in caught.value.notebook.read_text()
        and caught.value.notebook.parent.name.endswith(".partial")
    )
    assert run_notebook(simple, {}, tmp_path / "runs", kernel=kernel).is_dir()


def test_a_run_without_metrics_is_refused(tmp_path, kernel):
    nb = write_notebook(tmp_path / "forgets.ipynb", "out: str = 'out'", "x = 1")
    with pytest.raises(NotebookFailed, match="without writing metrics.json"):
        run_notebook(nb, {}, tmp_path / "runs", kernel=kernel)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[1, 2]", "holds a list; it should hold an object"),
        ('"done"', "holds a text"),
        ("3", "holds a number"),
        ("null", "holds null"),
        ("", "is not JSON: Expecting value"),
        ('{"x": 1', "is not JSON"),
        ('{"x": NaN}', "holds NaN"),
        ('{"x": [-Infinity]}', "holds -Infinity"),
        ('{"x": 1e999}', "holds 1e999"),
        ('{"x": "\\udcff"}', "is not JSON: 'utf-8' codec can't decode"),
        ("[" * 100000, "is not JSON"),
    ],
)
def test_metrics_that_are_no_object_of_numbers_are_refused_by_the_name_of_their_file(
    text, problem, simple, tmp_path
):
    from faithful_distill.lab.runs import _check_results

    run = planned_run(simple, {}, tmp_path / "runs")
    run.partial.mkdir(parents=True)
    data = text.encode().replace(rb"\udcff", b"\xff")
    (run.partial / "metrics.json").write_bytes(data)
    with pytest.raises(NotebookFailed) as failed:
        _check_results(run, ("metrics.json",))
    assert f"{run.partial / 'metrics.json'} {problem}" in str(failed.value)


def test_folders_of_kernels_lie_with_the_runs_and_those_of_killed_drivers_are_swept_away(
    simple, tmp_path, monkeypatch
):
    home = tmp_path / "runs" / ".kernels"
    code = (
        "import os, signal, sys; from pathlib import Path; from faithful_distill.lab import kernel\n"
        f"kernel._own_folder(Path({str(home)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    [left] = [p for p in home.iterdir() if p.is_dir()]
    assert left.stat().st_mode & 0o777 == 0o700
    used, lock = kernels._own_folder(home)
    (home / "note.txt").write_text("not a kernel's")
    monkeypatch.setattr(kernels.tempfile, "mkdtemp", lambda **_: pytest.fail("not with the runs"))
    run_notebook(simple, {}, tmp_path / "runs")
    assert {p.name for p in home.iterdir()} == {Path(used).name, f"{Path(used).name}.lock", "note.txt"}
    lock.release()


def test_a_full_disk_is_one_line_even_where_no_log_can_be_written(simple, tmp_path, monkeypatch):
    import errno

    from click.testing import CliRunner
    from faithful_distill import cli, commands
    from faithful_distill.lab import study

    (tmp_path / "g.yaml").write_text("groups: {a: {notebook: simple.ipynb}}")
    asked = ["reproduce", "--profile", str(tmp_path / "g.yaml"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(study, "run_plan", lambda *_, **__: [])

    def fails(error):
        def fail(*_, **__):
            raise error

        return fail

    monkeypatch.setattr(study, "gather", fails(OSError(errno.ENOSPC, "No space left on device", "x.png")))
    done = CliRunner().invoke(cli.main, asked)
    assert done.exit_code == 1 and done.output.endswith("Make room and call again.\n")
    assert done.output.count("\n") == 1 and "x.png" in done.output
    monkeypatch.setattr(study, "gather", fails(RuntimeError("odd")))
    monkeypatch.setattr(commands.tempfile, "NamedTemporaryFile", fails(OSError(errno.EROFS, "Read-only")))
    done = CliRunner().invoke(cli.main, asked)
    assert done.exit_code == 1 and done.output == "Error: RuntimeError: odd.\n"
    monkeypatch.setattr(plans, "open", fails(OSError(errno.ENOSPC, "full")), raising=False)
    plans._remember_seconds(tmp_path, "a", 1.0)  # a note that is not worth a run


def test_shipped_notebooks_are_found_and_others_named(tmp_path):
    with pytest.raises(BadInput, match="no such notebook"):
        found_notebook("experiments/nowhere.ipynb")
    assert found_notebook("00_files.ipynb").is_file()


# --- many runs -----------------------------------------------------------------------------------------------

JOURNAL = """
import json, time
from pathlib import Path
from faithful_distill.files import Journal
with Journal(Path(out, 'records.jsonl')) as journal:
    started_with = len(journal.records)
    for i in range(started_with, 5):
        time.sleep(pause)
        journal.append({'id': i, 'text': 'x' * 50})
Path(out, 'metrics.json').write_text(json.dumps({'n': len(journal.records)}))
"""


@pytest.fixture
def study(tmp_path):
    return written_study(tmp_path)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "What an undisturbed run of the study leaves, in another folder."
    folder = written_study(tmp_path_factory.mktemp("calm"))
    result = reproduce(folder / "toy.yaml", runs=folder / "runs")
    assert "7 computed" in result.summary()
    return result_bytes(folder / "runs")


def written_study(tmp_path):
    "A grid of four slow cells with journals, one that reads them, and a figure."
    write_notebook(
        tmp_path / "journal.ipynb", "pause: float = 0.05\nseed: int = 0\nout: str = 'out'", JOURNAL
    )
    write_notebook(
        tmp_path / "join.ipynb",
        "folders: list[str] = []\nout: str = 'out'",
        "from pathlib import Path",
        METRICS % "sum(len(Path(f, 'records.jsonl').read_text()) for f in folders)",
    )
    write_notebook(
        tmp_path / "draw.ipynb",
        "results: str = ''\nout: str = 'out'",
        "import csv\nfrom pathlib import Path\nrows = list(csv.DictReader(open(results)))\nPath(out,"
        " 'fig.png').write_bytes(repr(len(rows)).encode())",
    )
    write_notebook(
        tmp_path / "report.ipynb",
        "sections: list[str] = []\nout: str = 'out'",
        "from pathlib import Path\nPath(out, 'report.html').write_text(f'{len(sections)} figures')",
    )
    (tmp_path / "toy.yaml").write_text(
        "title: Toy\nseeds: 4\ngroups:\n  slow: {notebook: journal.ipynb}\n  joined:\n    notebook:"
        " join.ipynb\n    params: {folders: {each: slow}}\nfigures:\n  fig01:\n    notebook: draw.ipynb\n   "
        " params: {results: {table: [slow, joined]}}\nreport:\n  notebook: report.ipynb\n  params: {sections:"
        " {each: figures}}\n"
    )
    return tmp_path


def driver(study: Path, runs: str, *extra: str) -> subprocess.Popen:
    code = (
        f"import sys; from faithful_distill.lab.study import reproduce; r = reproduce('toy.yaml', runs={runs!r});"
        " print(r.summary()); sys.exit(not r.ok)"
    )
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "FAITHFUL_DISTILL_PROGRESS": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=study,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # whoever runs the tests in the background may have it ignored


def ends_well(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def test_seconds_and_memory_can_be_read_and_what_comes_of_them_is_kept_apart(tmp_path):
    write_notebook(tmp_path / "work.ipynb", "seed: int = 0\nout: str = 'out'", METRICS % "seed")
    write_notebook(
        tmp_path / "cost.ipynb",
        "times_path: str = ''\nout: str = 'out'",
        "from faithful_distill.lab.tables import read_table\ntable = read_table(times_path)",
        "from pathlib import Path\nPath(out, 'cost.md').write_text(' '.join(sorted(set(table.metric))) + ' '"
        " + str(sorted(set(table.seed))))",
    )
    (tmp_path / "toy.yaml").write_text(
        "seeds: 2\ngroups:\n  work: {notebook: work.ipynb}\nfigures:\n  cost: {notebook: cost.ipynb, params:"
        " {times_path: {times: work}}}\n  plain: {notebook: cost.ipynb, params: {times_path: {table:"
        " work}}}\n"
    )
    folder = reproduce(tmp_path / "toy.yaml", runs=tmp_path / "runs", workers=1).folder
    shown = (folder / "times" / "tables" / "cost.md").read_text()
    assert shown in (
        "peak_mib resumed seconds [0, 1]",
        "resumed seconds [0, 1]",
    ), "memory only where the system reports it"
    assert (folder / "tables" / "cost.md").read_text() == "x [0, 1]"
    times = read_table(folder / "times" / "times.csv")
    assert (
        len(times) in (4, 6)
        and (times[times.metric == "seconds"].value > 0).all()
        and (times[times.metric == "resumed"].value == 0).all()
    )
    assert (
        set(times.run) == {o.name for o in (tmp_path / "runs").glob("work-*")}
        and not (folder / "times" / "report.html").exists()
    ), "this figure left no section"
    assert "times" not in {
        p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.name in ("results.csv", "metrics.json")
    }


def test_shared_runs_are_named_and_figures_of_times_have_a_page_beside_the_report(tmp_path):
    write_notebook(tmp_path / "work.ipynb", "seed: int = 0\nout: str = 'out'", METRICS % "seed")
    write_notebook(
        tmp_path / "cost.ipynb",
        "times_path: str = ''\nout: str = 'out'",
        "from faithful_distill.lab.report import Draft\ndraft = Draft(out, 'Costs of it')\ntable ="
        " draft.read(times_path, group='')",
        "draft.table('cost', [['group', 'run'], *sorted(map(list, {(r.group, r.run) for r in"
        " table.itertuples()}))], 'Runs')\ndraft.finish('Words.')",
    )
    (tmp_path / "toy.yaml").write_text(
        "title: Toy\nseeds: 1\ngroups:\n  work: {notebook: work.ipynb}\n  again: {notebook:"
        " work.ipynb}\nfigures:\n  cost: {notebook: cost.ipynb, params: {times_path: {times: [work,"
        " again]}}}\n"
    )
    folder = reproduce(tmp_path / "toy.yaml", runs=tmp_path / "runs", workers=1).folder
    [run] = [p.name for p in (tmp_path / "runs").glob("work-*")]
    page = (folder / "times" / "report.html").read_text()
    assert "<h1>Toy: what it cost</h1>" in page and "Costs of it" in page and page.count(run) == 2
    assert not (folder / "report.html").exists() and (folder / "times" / "tables" / "cost.md").exists()


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(study, calm):
    "Killed ever later: when a kernel starts, at a journal's first line, between cells, and when few are left."
    finished = lambda name: [p for p in (study / "stormy").glob(f"{name}-*") if p.suffix != ".partial"]
    moments = [
        lambda: any((study / "stormy").glob("*.partial")),
        lambda: any(p.stat().st_size for p in (study / "stormy").glob("*.partial/records.jsonl")),
        lambda: len(finished("journal")) >= 2,
        lambda: len(finished("join")) == 1,
    ]
    for i, reached in enumerate(moments):
        process = driver(study, "stormy")
        until = time.time() + 120
        while not reached() and process.poll() is None and time.time() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and reached(), f"not killed at moment {i}"
    ends_well(driver(study, "stormy"))
    assert result_bytes(study / "stormy") == calm
    assert (study / "stormy" / "toy" / "report.html").read_text() == "1 figures"
    assert not list((study / "stormy").glob("*.partial"))


def test_a_second_run_computes_nothing_and_a_deleted_cell_only_itself(study):
    again = lambda **asked: reproduce(study / "toy.yaml", runs=study / "runs", workers=1, **asked)
    first = again()
    assert first.ok and {o.state for o in first.outcomes} == {"computed"}
    states = lambda result: {o.cell: o.state for o in result.outcomes if o.state != "there"}
    before = {p: p.stat().st_mtime_ns for p in (study / "runs").glob("*-*/*")}
    assert states(again()) == {}
    assert {p: p.stat().st_mtime_ns for p in (study / "runs").glob("*-*/*")} == before
    kept = result_bytes(study / "runs")
    shutil.rmtree(next(o.folder for o in first.outcomes if o.cell == "slow seed=2"))
    assert states(again()) == {"slow seed=2": "computed"}
    assert result_bytes(study / "runs") == kept
    assert states(again(seeds=5)) == {
        "slow seed=4": "computed",
        "joined": "computed",
        "fig01": "computed",
        "report": "computed",
    }
    draw = study / "draw.ipynb"
    draw.write_text(draw.read_text().replace("len(rows)", "len(rows) + 1"))
    assert states(again()) == {"fig01": "computed", "report": "computed"}, "a changed plot only the plot"


def test_two_drivers_at_once_share_the_work(study, calm):
    one, two = driver(study, "runs"), driver(study, "runs")
    output = ends_well(one) + ends_well(two)
    assert (
        output.count("computed ") >= 7
        and sum(line.startswith("[") and "computed" in line for line in output.splitlines()) == 7
    ), output
    assert result_bytes(study / "runs") == calm


def test_ctrl_c_stops_the_kernels_and_keeps_what_was_finished(study):
    text = (
        (study / "toy.yaml")
        .read_text()
        .replace("{notebook: journal.ipynb}", "{notebook: journal.ipynb, params: {pause: 30.0}}")
    )
    (study / "toy.yaml").write_text(text)
    process = driver(study, "runs")
    deadline = time.time() + 60
    while len(list((study / "runs").glob("*.partial/journal.ipynb"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    time.sleep(0.5)
    assert not [p for p in Path("/proc").glob("[0-9]*/cwd") if str(study) in _target(p)], "no kernel is left"


def _target(link):
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_failures_stop_only_what_reads_them(study, tmp_path):
    nb = study / "journal.ipynb"
    nb.write_text(nb.read_text().replace("time.sleep(pause)", "assert seed != 1"))
    result = reproduce(study / "toy.yaml", runs=study / "runs")
    assert not result.ok and {o.cell: o.state for o in result.broken} == {
        "slow seed=1": "failed",
        "joined": "skipped",
        "fig01": "skipped",
        "report": "skipped",
    }
    assert "slow seed=1" in result.summary() and "AssertionError" in result.summary()
    assert set(json.loads((result.folder / "metrics.json").read_text())) == {
        "slow seed=0",
        "slow seed=2",
        "slow seed=3",
    }


def test_only_runs_what_it_needs_and_the_forecast_says_what_and_how_long(study, capsys):
    result = reproduce(study / "toy.yaml", runs=study / "runs", only="slow*seed=0")
    assert [o.cell for o in result.outcomes] == ["slow seed=0"]
    reproduce(study / "toy.yaml", runs=study / "runs", dry_run=True)
    output = capsys.readouterr().out
    assert "there" in output and "6 of 7 to compute" in output and " s  slow seed=0" in output
    shutil.rmtree(result.outcomes[0].folder)
    assert "about" in forecast(load_grid(study / "toy.yaml"), study / "runs")
    assert [o.cell for o in reproduce(study / "toy.yaml", runs=study / "runs", only="fig01").outcomes][
        -1
    ] == "fig01"
    with pytest.raises(BadInput, match="Did you mean 'fig01'"):
        reproduce(study / "toy.yaml", runs=study / "runs", only="fog01")
    with pytest.raises(BadInput, match="workers"):
        reproduce(study / "toy.yaml", runs=study / "runs", workers=0)


def test_cells_of_a_group_are_foretold_by_those_that_have_run(study):
    "One computed cell is the trial for the others of its group; what is of another group stays unknown."
    grid = load_grid(study / "toy.yaml")
    before = forecast(grid, study / "runs", workers=1).splitlines()
    assert all("~" not in line for line in before) and "about" not in before[-1]
    (study / "runs").mkdir(exist_ok=True)
    plans._remember_seconds(study / "runs", "slow seed=0", 60.0)
    *cells, total = forecast(grid, study / "runs", workers=1).splitlines()
    lengths = {line.split("  (")[0].split("  ")[-1]: line[8:18].strip() for line in cells}
    slow = [name for name in lengths if name.startswith("slow")]
    assert lengths["slow seed=0"] == "60.0 s" and {lengths[n] for n in slow[1:]} == {"~60 s"}
    assert {lengths[n] for n in lengths if n not in slow} == {"?"}
    assert f"about {len(slow)}.0 min with 1 workers, {len(cells) - len(slow)} of unknown length" in total


def test_what_the_studys_runs_took_is_said_of_the_study_alone(tmp_path):
    "A grid of real questions has groups of the same names, whose runs take hours."
    from faithful_distill.lab.study import usual_seconds

    assert usual_seconds(load_grid("quickstart"))["rationales"] > 0
    assert usual_seconds(load_grid("real")) == {}


def test_the_grid_of_the_how_to_page_can_be_run(tmp_path):
    page = (Path(__file__).parents[1] / "docs/howto/own-grid.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    plan = load_grid(tmp_path / "mine.yaml").plan
    plan.runs(tmp_path / "runs")  # every parameter is known, and of its type
    assert len(plan.cells) == 7 and sum("alpha_cf=0.5" in name for name in plan.cells) == 2


def test_an_axis_called_like_a_parameter_sets_it(tmp_path, simple):
    grid = tmp_path / "toy.yaml"
    grid.write_text("groups:\n  main: {notebook: simple.ipynb, for: {n: {1: , 2: {n: 2}}}}\n")
    with pytest.raises(
        BadInput, match="'main.for.n': is called like a parameter of the notebook, which 1 does"
    ):
        load_grid(grid)
    grid.write_text("groups:\n  main: {notebook: simple.ipynb, for: {n: {few: {n: 1}, more: {n: 2}}}}\n")
    assert [cell.params["n"] for cell in load_grid(grid).plan.cells.values()] == [1, 2]


def test_how_long_a_run_took_is_not_taken_from_another_run_of_that_name(tmp_path, simple, capsys):
    "Two grids in one folder call different cells alike."
    for name, n in (("one", 1), ("two", 2)):
        grid = tmp_path / f"{name}.yaml"
        grid.write_text(f"groups:\n  main: {{notebook: simple.ipynb, params: {{n: {n}}}}}\n")
        reproduce(grid, runs=tmp_path / "runs", workers=1)
    known = tmp_path / "runs" / ".seconds.jsonl"
    rows = [json.loads(line) for line in known.read_text().splitlines()]
    runs = [name for name, _ in rows if name.startswith("simple-")]
    assert len(runs) == 2
    rows += [["main", 777.0], [runs[0], 41.0], ["main", 777.0]]
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    lines = []
    for name in ("one", "two"):
        reproduce(tmp_path / f"{name}.yaml", runs=tmp_path / "runs", dry_run=True)
        lines += [line for line in capsys.readouterr().out.splitlines() if line.startswith("there")]
    of = {run: line for run in runs for line in lines if run in line}
    assert "41.0 s" in of[runs[0]] and "777" not in of[runs[1]], lines


def test_the_forecast_counts_a_shared_run_once(tmp_path, simple, capsys):
    (tmp_path / "toy.yaml").write_text(
        "groups:\n  main: {notebook: simple.ipynb, for: {n: [1, 2]}}\n  ablation: {notebook: simple.ipynb,"
        " for: {n: [2, 3]}}\n"
    )
    ask = lambda **asked: (
        reproduce(tmp_path / "toy.yaml", runs=tmp_path / "runs", workers=1, **asked),
        capsys.readouterr().out,
    )[1].splitlines()
    output = ask(dry_run=True)
    assert (
        output[-1] == "3 of 3 to compute, 3 of unknown length, 1 cell shares a run with another"
        and [line.split()[0] for line in output[:-1]].count("shared") == 1
    )
    ask(only="ablation")
    for folder in (tmp_path / "runs").glob("simple-*"):
        shutil.rmtree(folder)
    (tmp_path / "runs" / ".seconds.jsonl").unlink()
    plans._remember_seconds(tmp_path / "runs", "ablation n=2", 60.0)
    plans._remember_seconds(tmp_path / "runs", "ablation n=3", 60.0)
    output = ask(dry_run=True)
    assert (
        output[-1]
        == "3 of 3 to compute, about 2.0 min with 1 workers, 1 of unknown length, 1 cell shares a run with"
        " another"
    ), "known by whichever name it was computed under"


def test_one_call_keeps_all_that_the_figures_of_a_profile_read(tmp_path, monkeypatch):
    """Groups that a figure reads together become one table, a file of a run is kept, and a figure drawn from what
    was kept is the same.
    """
    from click.testing import CliRunner
    from faithful_distill.cli import main

    write_notebook(
        tmp_path / "judge.ipynb",
        "strategy: str = ''\nseed: int = 0\nout: str = 'out'",
        "import json; from pathlib import Path\nPath(out, 'examples.json').write_text(json.dumps([strategy,"
        " seed]))\nPath(out, 'metrics.json').write_text(json.dumps({'supports': {'value': 0.5 + 0.1 * seed,"
        " 'low': 0.4, 'high': 0.7, 'n': 9}, 'detail': 1}))",
    )
    write_notebook(
        tmp_path / "draw.ipynb",
        "results: str = ''\nexamples: str = ''\nout: str = 'out'",
        "from pathlib import Path\nfrom faithful_distill.lab.tables import read_table\ntable ="
        " read_table(results)\nPath(out, 'fig.md').write_text(str(table[table.metric == 'supports'][['group',"
        " 'strategy', 'seed', 'value']].values.tolist()) + (open(examples).read() if examples else ''))",
    )
    (tmp_path / "toy.yaml").write_text(
        "seeds: 2\ngroups:\n  rationales: {notebook: judge.ipynb, for: {strategy: [greedy, contrast]}}\n "
        " strategies: {notebook: judge.ipynb, for: {strategy: [sampled]}}\n  unread: {notebook:"
        " judge.ipynb}\nfigures:\n  fig01: {notebook: draw.ipynb, params: {results: {table: [rationales,"
        " strategies]}, examples: {from: rationales, strategy: contrast, seed: 1, file: examples.json}}}\n "
        " fig02: {notebook: draw.ipynb, params: {results: {table: strategies}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(
        main, ["reproduce", "--profile", "toy.yaml", "--workers", "1", "--keep", "kept"]
    )
    assert done.exit_code == 0 and done.output.count("Kept: ") == 5, done.output
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {
        "toy_rationales.csv",
        "toy_strategies.csv",
        "toy_times.csv",
        "toy_examples.json",
        "toy_done.json",
        "origin.json",
    }
    for name in ("toy_rationales.csv", "toy_times.csv", "toy_examples.json"):
        origin = origin_of(tmp_path / "kept" / name)
        assert origin["version"] == faithful_distill.__version__ and len(origin["date"]) == 10, name
        assert origin["commit"] == (runs._commit() or "unknown")[:7]
    (tmp_path / "kept" / "toy_times.csv").write_text("another table")
    assert origin_of(tmp_path / "kept" / "toy_times.csv") == {"changed": True}
    both = read_table(tmp_path / "kept" / "toy_rationales.csv")
    assert set(zip(both.group, both.strategy)) == {
        ("rationales", "greedy"),
        ("rationales", "contrast"),
        ("strategies", "sampled"),
    } and set(both.metric) == {"supports"}
    assert json.loads((tmp_path / "kept" / "toy_examples.json").read_text()) == ["contrast", 1]
    drawn = run_notebook(
        tmp_path / "draw.ipynb",
        {
            "results": str(tmp_path / "kept" / "toy_rationales.csv"),
            "examples": str(tmp_path / "kept" / "toy_examples.json"),
        },
        tmp_path / "again",
        needs=(),
    )
    assert (drawn / "fig.md").read_text() == (tmp_path / "runs" / "toy" / "tables" / "fig.md").read_text()
    how = ["--only", "strategies", "--runs", "elsewhere", "--keep", "part"]  # of a part, what there is
    part = CliRunner().invoke(main, ["reproduce", "--profile", "toy.yaml", "--workers", "1", *how])
    assert part.exit_code == 0, part.output
    names = {"toy_rationales.csv", "toy_strategies.csv", "toy_times.csv", "toy_done.json", "origin.json"}
    assert {p.name for p in (tmp_path / "part").iterdir()} == names
    assert set(read_table(tmp_path / "part" / "toy_rationales.csv").group) == {"strategies"}
    how = ["--only", "strategies", "--runs", "elsewhere", "--compare", "kept"]
    compared = CliRunner().invoke(main, ["reproduce", "--profile", "toy.yaml", "--workers", "1", *how])
    assert compared.exit_code == 0 and "toy_rationales.csv: 2 of 2 rows the same" in compared.output
    for more, problem in ((["--keep", "kept"], "cannot be given beside"), ([], "keeps no result of toy")):
        how = ["--runs", "never", "--compare", "nowhere", *more]
        refused = CliRunner().invoke(main, ["reproduce", "--profile", "toy.yaml", *how])
        assert refused.exit_code == 2 and problem in refused.output and not (tmp_path / "never").exists()
    with pytest.raises(BadInput, match="is not a group"):
        keep_results(tmp_path / "runs" / "toy", tmp_path / "kept", {"rationales": ["rationale"]})
    with pytest.raises(BadInput, match="is not there"):
        keep_results(
            tmp_path / "runs" / "toy", tmp_path / "kept", ["strategies"], [("unread seed=0", "nothing.json")]
        )


def test_two_names_for_one_run_compute_it_once(simple, tmp_path):
    outcomes = run_plan(Plan([Cell("a", simple), Cell("b", simple, {"n": 1})]), tmp_path / "runs")
    assert (
        sorted(o.state for o in outcomes) == ["computed", "there"]
        and outcomes[0].folder == outcomes[1].folder
    )


def test_code_changed_while_the_plan_runs_is_noticed(tmp_path):
    victim = write_notebook(tmp_path / "victim.ipynb", "folder: str = ''\nout: str = 'out'", METRICS % "1")
    change = write_notebook(
        tmp_path / "change.ipynb",
        "out: str = 'out'",
        f"p = __import__('pathlib').Path({str(victim)!r}); p.write_text(p.read_text().replace(\"'x': 1\","
        " \"'x': 2\"))",
        METRICS % "1",
    )
    outcomes = run_plan(
        Plan([Cell("change", change), Cell("victim", victim, {"folder": From("change")})]),
        tmp_path / "runs",
    )
    assert [o.state for o in outcomes] == [
        "computed",
        "failed",
    ] and "changed while the plan was running" in outcomes[1].problem


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 12).flatmap(lambda n: st.lists(st.sets(st.integers(0, n)), min_size=n, max_size=n)),
    st.randoms(),
)
def test_the_order_is_the_given_one_as_far_as_what_cells_read_allows(others, random):
    "Against the plainest way: again and again the first cell, in the order given, whose inputs stand already."
    names = [f"cell{i}" for i in range(len(others))]
    random.shuffle(
        names
    )  # cell i reads only cells before it, so there is no circle; they are given in any order
    reads = {n: [f"cell{j}" for j in sorted(others[int(n[4:])]) if j < int(n[4:])] for n in names}
    slow, waiting = [], list(reads)
    while waiting:
        slow.append(next(n for n in waiting if set(reads[n]) <= set(slow)))
        waiting.remove(slow[-1])
    assert plans._in_order(reads) == slow


def test_ordering_looks_at_what_a_cell_reads_a_few_times():
    "However many there are: in a chain that is given from its end, each cell waits for the next one given."
    looked = 0

    class Others(list):
        def __iter__(self):
            nonlocal looked
            looked += 1
            return super().__iter__()

    n = 2000
    plans._in_order({str(i): Others([str(i + 1)] if i + 1 < n else []) for i in range(n)})
    assert looked <= 2 * n


def test_a_circle_is_named(simple):
    reads = [("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]
    with pytest.raises(BadInput, match="in a circle") as caught:
        Plan([Cell(name, simple, {"name": From(other)}) for name, other in reads])
    circle = re.findall(r"'(.)'", str(caught.value))
    assert set(zip(circle, circle[1:])) == set(reads[:3]), "and d is not part of it"


def wide_grid(folder: Path, n: int) -> Path:
    "A grid of n cells: half of them make something, each of the others reads one of these, and a figure reads all."
    values = ", ".join(map(str, range(n // 2)))
    write_notebook(folder / "reads.ipynb", "n: int = 1\nsource: str = ''\nout: str = 'out'", METRICS % "n")
    write_notebook(folder / "draws.ipynb", "results: str = ''\nout: str = 'out'", METRICS % "1")
    (folder / "wide.yaml").write_text(
        f"groups:\n  make: {{notebook: simple.ipynb, for: {{n: [{values}]}}}}\n"
        f"  read:\n    notebook: reads.ipynb\n    params: {{source: {{from: make}}}}\n    for: {{n: [{values}]}}\n"
        "    skip: [{n: 0}]\n"
        "figures:\n  all: {notebook: draws.ipynb, params: {results: {table: [make, read]}}}\n"
    )
    return folder / "wide.yaml"


def count_calls(function) -> int:
    "How many functions, of Python or of C, are called in `function`: a measure of work that no clock disturbs."
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_planning_takes_work_in_proportion_to_the_cells(simple, tmp_path, monkeypatch, capsys):
    "2,000 cells: each notebook is read a few times in all, the package once, and each cell is hashed once."
    counts = {}

    def counted(name, function):
        def wrapper(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return wrapper

    def dry_run(n):
        counts.clear()
        plan = lambda: reproduce(wide_grid(tmp_path, n), runs=tmp_path / "runs", dry_run=True)
        calls = count_calls(plan)
        assert f"{n} of {n} to compute" in capsys.readouterr().out
        return calls, dict(counts)

    dry_run(20)  # imports, and what is kept of the package's own files
    read = counted("code_cells", declared.code_cells)
    for module in (keys, declared):
        monkeypatch.setattr(module, "code_cells", read)
    for module, name in [
        (keys, "PackageCode"),
        (keys, "content_key"),
        (plans, "planned_run"),
    ]:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    few, many = dry_run(500), dry_run(2000)
    assert few[1]["code_cells"] == many[1]["code_cells"] <= 3 * 3, "three notebooks"
    assert few[1]["PackageCode"] == many[1]["PackageCode"] == 1
    assert many[1]["planned_run"] == 2000
    assert many[1]["content_key"] - few[1]["content_key"] == 1500
    assert many[0] < 5 * few[0], (few[0], many[0])


def test_two_thousand_cells_that_are_there_are_run_in_proportion_too(simple, tmp_path, capsys):
    "Nothing has to be computed; it is seen once for each cell."

    def run(n):
        grid = load_grid(wide_grid(tmp_path, n))
        for planned in grid.plan.runs(tmp_path / "runs").values():
            planned.folder.mkdir(parents=True, exist_ok=True)
            (planned.folder / "times.json").write_text("{}")
        calls = count_calls(lambda: run_plan(grid.plan, tmp_path / "runs"))
        assert f"{n} already there" in capsys.readouterr().out
        return calls

    run(20)
    assert run(1000) < 5 * run(250)


def test_scheduling_takes_work_in_proportion_to_the_cells(simple, tmp_path):
    "Half of the cells fail, so that the others are skipped; no notebook is run."

    def run(n):
        plan = load_grid(wide_grid(tmp_path, n)).plan
        planned = plan.runs(tmp_path / "runs")

        def through():
            schedule = plans._Schedule(plan, planned, set(plan.order), {})
            while schedule.active:
                name = schedule.next()
                if name:
                    schedule.note(planned[name].name, plans.Outcome(name, "failed", problem="no"))
            return schedule

        calls = count_calls(through)
        assert {o.state for o in through().outcomes.values()} == {"failed", "skipped"}
        return calls

    run(20)
    assert run(1000) < 5 * run(250)


def test_grid_numbers_are_read_as_written(tmp_path):
    (tmp_path / "g.yaml").write_text(
        "a: [1e-3, 3E5, 1.5, .5, -2, 2026-01-01, no, yes, 'true', true, null, 1e, e1, 0x1]"
    )
    assert _read_yaml(tmp_path / "g.yaml")["a"][:5] == [1e-3, 3e5, 1.5, 0.5, -2]
    assert _read_yaml(tmp_path / "g.yaml")["a"][5:13] == [
        "2026-01-01",
        "no",
        "yes",
        "true",
        True,
        None,
        "1e",
        "e1",
    ]


def test_tidy_bytes_do_not_depend_on_the_order_of_runs(simple, tmp_path, kernel):
    folders = [
        run_notebook(simple, {"n": n, "name": name}, tmp_path / "runs", kernel=kernel)
        for n in (2, 10)
        for name in ("None", "NA")
    ]
    one, other = (
        write_table(tmp_path / "1.csv", tidy(folders)),
        write_table(tmp_path / "2.csv", tidy(folders[::-1])),
    )
    assert one.read_bytes() == other.read_bytes()
    table = read_table(one)
    assert list(table.columns) == [
        "n_",
        "name",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "reason",
    ], "a parameter called n does not hide the n of a score"
    assert (
        table["n_"].tolist() == [2, 2, 10, 10]
        and table["name"].tolist() == ["NA", "None"] * 2
        and table["n"].isna().all()
    )


# --- what is already there -----------------------------------------------------------------------------------


def test_a_folder_that_gather_did_not_make_is_refused_before_anything_runs(simple, tmp_path):
    grid, runs = tmp_path / "precious.yaml", tmp_path / "runs"
    grid.write_text("groups:\n  a: {notebook: simple.ipynb}\n")
    (runs / "precious").mkdir(parents=True)
    (runs / "precious" / "thesis.txt").write_text("years of work")
    refused = lambda: pytest.raises(BadInput, match="precious.*something else than the results of a grid")
    with refused():
        reproduce(grid, runs=runs, workers=1)
    with refused():
        gather(load_grid(grid), runs)
    (runs / "precious" / "runs.json").write_text("[]")
    with refused():
        reproduce(grid, runs=runs, workers=1)
    assert (runs / "precious" / "thesis.txt").read_text() == "years of work" and not list(
        runs.glob("simple-*")
    )
    shutil.rmtree(runs / "precious")
    (runs / "precious").write_text("a file")
    with refused():
        reproduce(grid, runs=runs, workers=1)
    (runs / "precious").unlink()
    (runs / "precious").mkdir()
    assert reproduce(grid, runs=runs, workers=1).ok, "an empty folder is nobody's"


def test_two_grids_of_one_name_do_not_replace_each_others_results(simple, tmp_path):
    runs, here, there = tmp_path / "runs", tmp_path / "toy.yaml", tmp_path / "own" / "toy.yaml"
    here.write_text("groups:\n  a: {notebook: simple.ipynb}\n")
    there.parent.mkdir()
    there.write_text(f"groups:\n  b: {{notebook: {simple}}}\n")
    folder = reproduce(here, runs=runs, workers=1).folder
    with pytest.raises(BadInput, match="results of another grid of this name"):
        reproduce(there, runs=runs, workers=1)
    assert "a" in json.loads((folder / "runs.json").read_text())
    (folder / ".grid").unlink()
    assert reproduce(there, runs=runs, workers=1).ok, (
        "what an earlier version gathered does not say from which grid"
    )
    there.rename(tmp_path / "own" / "moved.yaml")
    there = (tmp_path / "own" / "moved.yaml").rename(tmp_path / "toy.yaml")
    assert reproduce(there, runs=runs, workers=1).ok, "a grid may move"


@pytest.mark.parametrize(
    "error, held", [(BlockingIOError(11, "held"), True), (OSError(37, "No locks available"), False)]
)
def test_only_a_held_lock_is_waited_for(simple, tmp_path, monkeypatch, error, held):
    "A file system without locks (ENOLCK) is not one where everything is locked."

    def flock(*_):
        raise error

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", flock)
    run = planned_run(simple, {}, tmp_path / "runs")
    if held:
        with pytest.raises(Busy), hold_run(run, wait=False):
            pass
        return
    with hold_run(run, wait=False) as lock:
        assert lock.name == f"{run.name}.kernel"
    with _gathering(tmp_path / "runs", "toy"):
        pass


def test_a_kernel_that_outlived_its_driver_keeps_others_out(simple, tmp_path, kernel):
    "The driver's lock was freed when it was killed; the kernel's is not, as long as the kernel lives."
    run = planned_run(simple, {}, tmp_path / "runs")
    run.partial.mkdir(parents=True)
    with hold_run(run, wait=False) as lock:
        kernel.start()
        kernel.refresh(run.partial, lock, 0)
    with pytest.raises(Busy), hold_run(run, wait=False):
        pass
    kernel.stop()
    with hold_run(run, wait=False):
        pass


def test_nobody_waits_for_a_run_that_is_finished(simple, tmp_path, kernel):
    "Its kernel has nothing to do now and holds the lock of the run it made last."
    run_notebook(simple, {}, tmp_path / "runs", kernel=kernel)
    with hold_run(planned_run(simple, {}, tmp_path / "runs"), wait=False):
        pass


def test_a_killed_kernel_is_not_started_again(monkeypatch):
    kernel = WarmKernel()
    kernel.kill()
    monkeypatch.setattr(kernels, "_launch", lambda _: pytest.fail("it was started"))
    with pytest.raises(RuntimeError, match="was killed"):
        kernel.start()


def test_a_kernel_that_is_killed_while_it_starts_leaves_no_process(monkeypatch):
    "Ctrl-C comes when a worker has just asked for a kernel: there is no process to be killed yet."
    kernel, started = WarmKernel(), []
    environment = kernels._kernel_environment

    def killed_meanwhile(*args):
        kernel.kill()
        return environment(*args)

    def end(pid):
        started.append(pid)
        return end_process(pid)

    end_process = kernels._end_process
    monkeypatch.setattr(kernels, "_kernel_environment", killed_meanwhile)
    monkeypatch.setattr(kernels, "_end_process", end)
    with pytest.raises(RuntimeError, match="was killed"):
        kernel.start()
    assert kernel.pid is None and started[-1] is not None
    with pytest.raises(ProcessLookupError):
        os.kill(started[-1], 0)


ONE = "groups:\n  a:\n    notebook: simple.ipynb\n"
ALIASES = "".join(
    f"@p{i}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for i, (a, b) in enumerate(zip("abcdefghi", "bcdefghij"))
)
odd_grids = {
    "for a list": (ONE + "    for: [1, 2]\n", "'a.for': should be a mapping"),
    "params a list": (ONE + "    params: [1]\n", "'a.params': should be a mapping"),
    "a scalar axis": (ONE + "    for: {n: 3}\n", "'a.for.n': should be a list"),
    "a scalar point": (ONE + "    for: {x: {p: 3}}\n", "'a.for.x.p': should be parameters"),
    "an axis that is a number": (ONE + "    for: {5: [1]}\n", "'a.for': should be a name"),
    "skip a text": (ONE + "    for: {n: [1]}\n    skip: abc\n", "'a.skip': should be a list"),
    "notebook a number": ("groups: {a: {notebook: 5}}\n", "'a.notebook': should be the name"),
    "no notebook": ("groups: {a: {notebook: }}\n", "names no notebook"),
    "notebook a folder": (
        "groups: {a: {notebook: '.'}}\n",
        "is not a notebook that can be read: Is a directory",
    ),
    "like a list": (ONE + "    like: [a]\n", "'a.like': is not another group"),
    "like itself": (ONE + "    like: a\n", "There is none"),
    "from a mapping": (ONE + "    params: {n: {from: {}}}\n", "is not a group"),
    "from a list of lists": (ONE + "    params: {n: {from: [[a]]}}\n", "is not a group"),
    "shipped a number": (ONE + "    params: {n: {shipped: 5}}\n", "'a: shipped': should be a path"),
    "file a number": (
        ONE + "  b:\n    notebook: simple.ipynb\n    params: {name: {from: a, file: 5}}\n",
        "'b: file': should be a path",
    ),
    "report empty": (ONE + "report:\n", "'report': should be a mapping"),
    "report a text": (ONE + "report: x\n", "'report': should be a mapping"),
    "a name that is a number": ("groups: {5: {notebook: simple.ipynb}}\n", "should be a name"),
    "title a list": ("title: [a]\n" + ONE, "'title': should be a text"),
    "a key that is a list": ("groups: {? [a] : {notebook: simple.ipynb}}\n", "a key is a list"),
    "a NUL": ("groups: \0\n", "is not YAML: unacceptable character"),
    "not UTF-8": (b"\xff\xfe\x00g", "is not UTF-8"),
    "no number": ("seeds: !!int x\n" + ONE, "is not YAML"),
    "a folder": (None, "cannot be read: Is a directory"),
    "a list that holds itself": (
        ONE + "    params: {name: &l [*l]}\n",
        "is not YAML: found unconstructable recursive",
    ),
    "a mapping that holds itself": (
        ONE + "    params: {name: &l {a: *l}}\n",
        "is not YAML: found unconstructable",
    ),
    "aliases in a parameter": (
        ONE + "    params:\n      name: &a [x, x, x, x, x, x, x, x, x, x]\n" + ALIASES.replace("@", "      "),
        "field 'groups.a.params.p3': stands for 1.11e+05 values",
    ),
    "aliases on an axis": (
        ONE
        + "    params: {name: &a [x, x, x, x, x, x, x, x, x, x]}\n    for:\n"
        + ALIASES.replace("@", "      "),
        "field 'groups.a.for.p3': stands for 1.11e+05 values",
    ),
    "aliases in the seeds": (
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + ALIASES.replace("@", "").replace("p8", "seeds") + ONE,
        "stands for 1.11e+05 values",
    ),
    "hundreds of levels": (ONE + "    params: {name: " + "[" * 900 + "]" * 900 + "}\n", "odd.yaml: is n"),
    "a hundred million seeds": (
        "seeds: 100000000\n" + ONE.replace("simple", "seeded"),
        "'seeds': are too many",
    ),
    "seeds of a group": (ONE.replace("simple", "seeded") + "    seeds: 10001\n", "'seeds': are too many"),
    "a negative seed": (
        ONE.replace("simple", "seeded") + "    seeds: [3, -1]\n",
        "should be from 0 to 2^32 - 1",
    ),
    "a large seed": (
        ONE.replace("simple", "seeded") + "    seeds: [4294967296]\n",
        "should be from 0 to 2^32 - 1",
    ),
    "a product of axes": (
        ONE + "    for: {%s}\n" % ", ".join(f"{c}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for c in "abcdefgh"),
        "field 'a': has 43,046,721 combinations of its axes",
    ),
    "seeds as an axis": (
        ONE.replace("simple", "seeded") + "    for: {seed: [3, 4, 5]}\n",
        "field 'a.for.seed': seeds are not an axis of `for`. Write `seeds: [...]` beside `for:`.",
    ),
    "seeds as an axis without a seed": (
        ONE + "    for: {seed: [3]}\n",
        "'a.for.seed': seeds are not an axis",
    ),
    **{
        f"{kind} of {path!r}": (
            ONE + f"  b:\n    notebook: simple.ipynb\n    params: {{name: {{{first}, {kind}: '{path}'}}}}\n",
            f"field 'b: {kind}': leads out of its folder",
        )
        for kind, first in (("file", "from: a"), ("shipped", "x: 1"))
        for path in (
            "../../../../etc/passwd",
            "a/../../b",
            "/etc/passwd",
            "..",
            "a\\..\\b",
            "C:\\x",
            "\\\\host\\x",
        )
    },
}


@pytest.mark.parametrize("name", odd_grids)
def test_odd_grids_are_one_line(simple, tmp_path, name):
    from click.testing import CliRunner
    from faithful_distill.cli import main

    text, problem = odd_grids[name]
    write_notebook(tmp_path / "seeded.ipynb", "seed: int = 0\nout: str = 'out'", METRICS % "seed")
    grid = tmp_path / "odd.yaml"
    grid.mkdir() if text is None else grid.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = CliRunner().invoke(
        main, ["reproduce", "--profile", str(grid), "--list", "--runs", str(tmp_path / "runs")]
    )
    assert done.exit_code == 2 and problem in done.output and done.output.count("\n") == 1, done.output


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        '{"cells": 3}',
        '{"cells": [{"cell_type": "code"}]}',
        '{"cells": [{"cell_type": "code", "source": 5}]}',
        '{"cells": [{"cell_type": "code", "source": "", "metadata": null}]}',
        b"\xff",
    ],
)
def test_files_that_are_no_notebooks_are_named(tmp_path, text):
    path = tmp_path / "odd.ipynb"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match="odd.ipynb: is "):
        notebook_parameters(path)


@pytest.mark.parametrize(
    "cell", ["seed: int = (\n", "seed: int = 0 if\n", "  seed: int = 0\nout: str = ''\n", "s: str = '''x\n"]
)
def test_a_parameters_cell_that_is_no_python_is_named(tmp_path, cell):
    with pytest.raises(BadInput, match="the parameters cell is not Python"):
        notebook_parameters(write_notebook(tmp_path / "odd.ipynb", cell))


def test_each_within_a_list_joins_it(simple, tmp_path):
    write_notebook(
        tmp_path / "join.ipynb", "folders: list[str] = []\nout: str = 'out'", METRICS % "len(folders)"
    )
    (tmp_path / "g.yaml").write_text(
        "groups:\n  a: {notebook: simple.ipynb, for: {n: [1, 2]}}\n  b: {notebook: join.ipynb, params:"
        " {folders: [{each: a}, {from: a, n: 1}]}}\n"
    )
    plan = load_grid(tmp_path / "g.yaml").plan
    assert (
        plan.cells["b"].params["folders"] == [From("a n=1"), From("a n=2"), From("a n=1")]
        and len(plan.runs(tmp_path / "runs")["b"].values["folders"]) == 3
    )


@pytest.mark.parametrize(
    "args",
    [
        ["reproduce", "--list", "--workers", "0"],
        ["reproduce", "--list", "--seeds", "0"],
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_done(args):
    from click.testing import CliRunner
    from faithful_distill.cli import main

    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2 and f"Invalid value for '{args[-2]}'" in done.output, done.output


def test_a_forecast_needs_a_worker(simple, tmp_path):
    (tmp_path / "g.yaml").write_text(ONE)
    with pytest.raises(BadInput, match="workers"):
        forecast(load_grid(tmp_path / "g.yaml"), tmp_path / "runs", workers=0)


TOY = "seeds: 1\ngroups:\n  a: {notebook: simple.ipynb}\nfigures:\n  fig: {notebook: draw.ipynb, params: {results: {table: a}}}\n"


@pytest.fixture
def toy(simple, tmp_path):
    "A grid with a figure whose run leaves a picture; and the folder of its runs."
    write_notebook(
        tmp_path / "draw.ipynb",
        "results: str = ''\nout: str = 'out'",
        "from pathlib import Path\nPath(out, 'fig.png').write_bytes(b'drawn')",
    )
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path / "toy.yaml", tmp_path / "runs"


def test_gathering_leaves_what_is_the_users(toy):
    grid, runs = toy
    folder = reproduce(grid, runs=runs, workers=1).folder
    assert (folder / "figures" / "fig.png").read_bytes() == b"drawn"
    for name in ("notes.txt", "figures/mine.png"):
        (folder / name).write_text("mine")
    grid.write_text(TOY.split("figures")[0])  # its figure comes no longer
    assert reproduce(grid, runs=runs, workers=1).ok
    assert not (folder / "figures" / "fig.png").exists()
    (folder / "figures" / "fig.png").write_text("mine")
    grid.write_text(TOY)
    with pytest.raises(BadInput, match="fig.png: is not of this package, and would be replaced"):
        reproduce(grid, runs=runs, workers=1)
    for name in ("notes.txt", "figures/mine.png", "figures/fig.png"):
        assert (folder / name).read_text() == "mine"
    (folder / "figures" / "fig.png").unlink()
    assert reproduce(grid, runs=runs, workers=1).ok and (folder / "figures" / "fig.png").exists()


def test_a_linked_folder_of_results_is_followed(toy, tmp_path):
    grid, runs = toy
    runs.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (runs / "toy").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert reproduce(grid, runs=runs, workers=1).ok
    assert (runs / "toy").is_symlink() and (tmp_path / "elsewhere" / "figures" / "fig.png").is_file()
    (runs / "toy" / ".grid").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="does not say which grid"):
        reproduce(grid, runs=runs, workers=1)


def test_kept_tables_replace_no_other_file_and_damaged_ones_are_named(toy, tmp_path):
    from faithful_distill.lab.study import keep_profile

    (grid, runs), kept = toy, tmp_path / "kept"
    kept.mkdir()
    (kept / "toy_a.csv").write_text("mine")
    with pytest.raises(BadInput, match="toy_a.csv: would be replaced, and is no kept result"):
        reproduce(grid, runs=runs, workers=1, keep=kept)
    assert not runs.exists() and (kept / "toy_a.csv").read_text() == "mine"
    (kept / "toy_a.csv").unlink()
    done = reproduce(grid, runs=runs, workers=1)
    for _ in range(2):
        keep_profile(grid, kept, runs)
    for wrong in (b"", b"\xff\xfe", b"group,metric,value,low,high,n\na,x,inf,,,1\n", b"group,value\na,1\n"):
        (kept / "toy_a.csv").write_bytes(wrong)
        with pytest.raises(BadInput, match="toy_a.csv: "):
            reproduce(grid, runs=tmp_path / "again", workers=1, keep=kept)
    (kept / "origin.json").write_text("[1]")
    with pytest.raises(BadInput, match="origin.json: is damaged"):
        reproduce(grid, runs=tmp_path / "again", workers=1, keep=kept)
    run = next(o.folder for o in done.outcomes if o.cell.startswith("a"))
    for wrong in ('{"x": NaN}', "5", None):
        (run / "metrics.json").unlink(missing_ok=True)
        if wrong:
            (run / "metrics.json").write_text(wrong)
        with pytest.raises(BadInput, match="metrics.json: .*computed anew"):
            gather(load_grid(grid), runs)


@pytest.mark.parametrize("text", [b"\xff\xfe", b'[null, 1]\n["a", "text"]\n["a", null]\n5\n', None])
def test_damaged_times_are_no_times(tmp_path, text):
    from faithful_distill.lab.plan import last_seconds

    path = tmp_path / ".seconds.jsonl"
    path.mkdir() if text is None else path.write_bytes(text + b'\n["b", 2.5]\n')
    assert last_seconds(tmp_path) == ({} if text is None else {"b": 2.5})
