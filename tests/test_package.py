"""The package opens at once, and the wheel carries what the commands need."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import faithful_distill
from test_layers import PACKAGE, imports_of, modules_of

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


def test_no_module_imports_nbdev_or_fastcore():
    for module in Path(faithful_distill.__file__).parent.rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        if module.name != "_modidx.py":
            assert "fastcore" not in text and "import nbdev" not in text, module


unix_only = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "spwd", "readline")
loaded_before = (  # libraries that take other ways on Windows, and would not be loaded without these modules here
    *(
        "accelerate",
        "datasets",
        "matplotlib.pyplot",
        "nbclient",
        "pandas",
        "papermill",
        "scipy.stats",
        "seaborn",
    ),
    *("torch", "transformers.trainer"),
)
on_windows = """
import importlib, json, os, signal, sys

before, blocked, modules = json.loads(sys.argv[1])
for name in before:
    importlib.import_module(name)
for name in blocked:
    sys.modules[name] = None
for name in ("SIGKILL", "SIGALRM", "SIGUSR1", "SIGHUP", "SIGQUIT"):
    delattr(signal, name)
for name in ("fork", "killpg", "getuid", "geteuid", "getpgid", "setsid", "getloadavg", "sched_getaffinity"):
    delattr(os, name)
for name in modules:
    try:
        importlib.import_module(name)
    except Exception as e:
        print(f"{name}: {type(e).__name__}: {e}")
"""


def failures_on_windows(modules, blocked, before=(), **more):
    "Import modules where what only Unix has is not there; the lines 'module: error' of those that fail."
    given = json.dumps([list(before), list(blocked), list(modules)])
    call = [sys.executable, "-c", on_windows, given]
    return subprocess.run(call, capture_output=True, text=True, check=True, **more).stdout


def test_every_module_can_be_imported_on_windows():
    "DeepSpeed is not there either: only training itself needs it."
    modules = ["faithful_distill", *(f"faithful_distill.{name}" for name in sorted(modules_of(PACKAGE)))]
    failures = failures_on_windows(modules, [*unix_only, "deepspeed"], loaded_before)
    assert not failures, failures


def test_what_only_unix_has_is_missed(tmp_path):
    "The test above finds a module that needs it: a library, a signal, or a function."
    lines = {"a": "import fcntl", "b": "from signal import SIGKILL", "c": "from os import fork"}
    for name, line in lines.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\n")
    (tmp_path / "d.py").write_text("def stop():\n    import signal\n    return signal.SIGKILL\n")
    failures = failures_on_windows("abcd", unix_only, cwd=tmp_path)
    assert [line[0] for line in failures.splitlines()] == ["a", "b", "c"]


def test_no_module_imports_what_only_unix_has():
    "Not inside a function either: locks are `filelock`'s."
    found = [f"{i.where}: {i.target}" for i in imports_of(PACKAGE) if i.target.split(".")[0] in unix_only]
    assert not found, found


def test_notebooks_carry_no_run_metadata():
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


DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "IPython": "ipython"}
OPTIONAL = {
    "wandb",
    "peft",
    "tensorboardX",
    "tensorboard",
    "gguf",
    "openai",
    "xllamacpp",
}  # used where they are there


def requirements() -> dict[str, str]:
    "What settings.ini requires: name in the registry's spelling -> the bounds."
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(Path(faithful_distill.__file__).parents[1] / "settings.ini", encoding="utf-8")
    found = [re.fullmatch(r"([\w.-]+)(.*)", r) for r in ini["DEFAULT"]["requirements"].split()]
    return {m[1].lower().replace("_", "-"): m[2] for m in found}


def test_everything_imported_is_required_and_everything_required_has_a_lower_bound():
    imported = set()
    for path in Path(faithful_distill.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "faithful_distill", *OPTIONAL}
    wanted = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    assert wanted and wanted <= requirements().keys(), wanted - requirements().keys()
    assert not [name for name, bounds in requirements().items() if ">=" not in bounds]


def test_what_is_installed_here_is_within_the_bounds():
    for name, bounds in requirements().items():
        assert SpecifierSet(bounds).contains(metadata.version(name), prereleases=True), name
