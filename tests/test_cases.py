"""Bad and odd inputs that were tried on the command line: each is accepted, or refused in one line that is no traceback.

The inputs lie in `shared/cases` beside the checkout; without them these tests are skipped."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.files import shipped

shared = Path(os.environ.get("FAITHFUL_DISTILL_SHARED", Path(__file__).resolve().parents[2] / "shared"))
inputs = shared / "cases" / "bad_input"
needs_cases = pytest.mark.skipif(not inputs.is_dir(), reason=f"there are no cases in {inputs}")


def listed():
    "(name, words of the command) of each line of commands.txt."
    if not inputs.is_dir():
        return []
    text = (inputs / "commands.txt").read_bytes().decode(errors="replace")
    lines = re.findall(r"^(A_\w+): faithful-distill (.*)$", text, re.MULTILINE)
    return [pytest.param(words, id=name) for name, words in lines]


def in_words(words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError:
        pytest.skip("is not a command line that can be read back")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    "A folder with what the commands name: the cases, two models, a student, its questions' rationales."
    folder = tmp_path_factory.mktemp("cases")
    (folder / "cases").symlink_to(shared / "cases")
    (folder / "FOLDER").mkdir()
    for name in ("teacher", "student"):
        shutil.copytree(shipped("data", "models", name), folder / "MODELS" / name)
    shutil.copytree(shipped("data", "models", "student"), folder / "A4" / "st")
    before = Path.cwd()
    os.chdir(folder)
    given = ["rationales", "--data", "world", "--split", "dev", "--limit", "9", "--max-new-tokens", "12"]
    assert CliRunner().invoke(main, [*given, "--out", "A4/dev.jsonl"]).exit_code == 0
    (folder / "A3").mkdir()
    shutil.copy("A4/dev.jsonl", "A3/tr.jsonl")
    yield folder
    os.chdir(before)


def check(done) -> str:
    "Accepted, or refused in one line; which of the two."
    assert "Traceback (most recent call last)" not in done.output, done.output[-2000:]
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    if done.exit_code == 0:
        return "accepted"
    errors = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert done.exit_code == 2 and len(errors) == 1, done.output[-2000:]
    return "one line"


@needs_cases
@pytest.mark.parametrize("words", listed())
def test_commands(words, scratch, record_property):
    words = in_words(words)
    missing = [w for w in words if w.startswith("MODELS/") and not (scratch / w).exists()]
    if missing:
        pytest.skip(f"{missing[0]} is a broken model; tests/test_models.py has its kind")
    named = [w for w in words[:-1] if w.startswith(("SCRATCH", "/dev", "/proc", "A3/", "A2/o_"))]
    if any(not w.startswith("A3/") or not Path(w).exists() for w in named):
        pytest.skip("needs files of the campaign that found it")
    if "100000000" in words or "csqa" in words and "--path" not in words:
        pytest.skip("asks for a hub, or for all memory")
    for word in words:
        if re.fullmatch(r"A\d*/[\w.]+", word):
            Path(word).parent.mkdir(exist_ok=True)
    done = CliRunner().invoke(main, [w.replace("SCRATCH", str(scratch)) for w in words])
    record_property("outcome", check(done))  # `pytest --junitxml` keeps it


@needs_cases
@pytest.mark.parametrize(
    "grid", sorted(p.name for p in inputs.glob("grid_*.yaml")) if inputs.is_dir() else []
)
def test_grids(grid, scratch, record_property):
    given = [
        "reproduce",
        "--profile",
        f"cases/bad_input/{grid}",
        "--runs",
        "runs",
        "--workers",
        "1",
        "--dry-run",
    ]
    record_property("outcome", check(CliRunner().invoke(main, given)))


@pytest.mark.parametrize(
    "words",
    [
        "rationales --data world --roles '' --out o",
        "rationales --data world --prompt ' ' --out o",
        "evaluate --data world --student s --metrics '' --out o",
        "measure --data world --model m --tags '' --out o",
        "score rows.jsonl --cut-at '' --out o",
        "train --rationales r.jsonl --student '' --out o",
    ],
)
def test_an_unset_variable_of_the_shell_is_no_choice(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, shlex.split(words))
    assert check(done) == "one line" and "is empty" in done.output, done.output
    assert not any(tmp_path.iterdir())
