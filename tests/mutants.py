"""How many small faults would the tests notice? Cosmic Ray puts them, one at a time, into a copy of the tree.

Run by `make mutants`; options go into ARGS: `make mutants ARGS="--sample 20 contrast loss"`. Everything lies in
`build/mutants`: the copy, and for each module a session of Cosmic Ray, so that a run that was ended goes on where
it was. A session belongs to the text of its module and tests; when they change, a new one begins.
"""

import argparse
import ast
import hashlib
import os
import random
import shlex
import shutil
import sys
import time
from itertools import islice
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome
from filelock import FileLock, Timeout

root = Path(__file__).resolve().parents[1]
build = root / "build" / "mutants"
copied = (
    "faithful_distill",
    "tests",
    "data",
    "nbs",
    "pyproject.toml",
    "settings.ini",
    "setup.py",
    "README.md",
)

# Of each module the tests that look at it, cheap ones first: with -x the first failure ends the run.
killers = "tests/test_mutants_killed.py"
modules = {
    "contrast": ("teacher/contrast.py", f"{killers} tests/test_decoding.py"),
    "loss": ("student/loss.py", f"{killers} tests/test_student.py"),
    "rows": ("student/rows.py", f"{killers} tests/test_student.py"),
    "metrics": ("faithfulness/metrics.py", f"{killers} tests/test_faithfulness.py"),
    "simulators": (
        "faithfulness/simulators.py",
        f"tests/test_simulators.py {killers} tests/test_faithfulness.py tests/test_scoring.py",
    ),
    "evaluators": (
        "faithfulness/evaluators.py",
        f"tests/test_simulators.py {killers} tests/test_faithfulness.py tests/test_scoring.py",
    ),
}


def copy_tree() -> Path:
    "A fresh copy of what the tests need, and its place."
    tree, left_out = build / "tree", shutil.ignore_patterns("__pycache__", "runs", "raw", "cache")
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in copied:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, ignore=left_out)
        elif (root / name).is_file():
            shutil.copy2(root / name, tree / name)
    return tree


def test_command(tests: str, options: str) -> str:
    "One line for pytest, on the copy."
    pytest = f"{shlex.quote(sys.executable)} -m pytest -x -q --tb=line -p no:cacheprovider"
    return f"{pytest} {options} {tests}".replace("  ", " ")


def session_path(name: str, tree: Path, command: str) -> Path:
    "Where the results for this module and these tests lie."
    path, tests = modules[name]
    files = [tree / "faithful_distill" / path, *(tree / test for test in tests.split())]
    content = b"".join(f.read_bytes() for f in files) + command.encode()
    return build / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.sqlite"


def is_a_fault(item, text: str) -> bool:
    "Is this mutant a program, and another one? What does not even parse tests nothing."
    [m] = item.mutations
    mutated = mutate_code(text, get_operator(m.operator_name)(**(m.operator_args or {})), m.occurrence)
    try:
        return mutated is not None and ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def annotations(text: str) -> list[tuple]:
    "(start, end) of every annotation, each as (line, column)."
    found = []
    for node in ast.walk(ast.parse(text)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def places_in(db: WorkDB, path: Path) -> list:
    "All places for a fault, in an order that does not change; none in annotations, where it would do nothing."
    if not db.num_work_items:
        init([path], db, {})
    passive, found = annotations(path.read_text(encoding="utf-8")), []
    for item in db.work_items:
        [m] = item.mutations
        inside = any(a <= m.start_pos and m.end_pos <= b for a, b in passive)
        if m.operator_name != "core/NoOp" and not inside:
            found.append(item)
    return sorted(found, key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))


def drawn(places: list, text: str, sample: int, seed: str) -> list:
    "A sample of the faults (0: all of them), found one by one, for each costs a second or two."
    order = random.Random(seed).sample(places, len(places)) if sample else places
    return list(islice((item for item in order if is_a_fault(item, text)), sample or None))


def outcome(result) -> str:
    "'killed', 'timeout', 'survived' or 'error'."
    if result.test_outcome == TestOutcome.KILLED:
        return "timeout" if result.output == "timeout" else "killed"
    return "survived" if result.test_outcome == TestOutcome.SURVIVED else "error"


def try_faults(name: str, tree: Path, asked) -> dict:
    "Put in the faults of one module that are asked for; counts by outcome, and the survivors' diffs."
    path, tests = tree / "faithful_distill" / modules[name][0], modules[name][1]
    command = test_command(tests, asked.pytest)
    began = time.monotonic()
    unharmed, output = run_tests(command, asked.cap)
    if unharmed != TestOutcome.SURVIVED:
        sys.exit(f"{name}: the tests fail without any fault, or take over {asked.cap} s\n{output[-2000:]}")
    took = time.monotonic() - began
    print(f"{name}: the tests take {took:.0f} s on the unchanged module", flush=True)
    if took > asked.cap / 2:
        print(
            f"  over half of --cap {asked.cap:.0f}: on a busy machine survivors may pass for timeouts",
            flush=True,
        )
    with use_db(session_path(name, tree, command), WorkDB.Mode.create) as db:
        places = places_in(db, path)
        chosen = drawn(places, path.read_text(encoding="utf-8"), asked.sample, f"{asked.seed} {name}")
        results = dict(db.results)
        for number, item in enumerate(chosen, 1):
            if item.job_id not in results:
                results[item.job_id] = mutate_and_test(item.mutations, command, asked.cap)
                db.set_result(item.job_id, results[item.job_id])
            [m], found = item.mutations, outcome(results[item.job_id])
            print(f"  {number}/{len(chosen)} line {m.start_pos[0]} {m.operator_name}: {found}", flush=True)
    found = [results[item.job_id] for item in chosen]
    counts = {
        kind: sum(outcome(r) == kind for r in found) for kind in ("killed", "timeout", "survived", "error")
    }
    diffs = [r.diff for r in found if outcome(r) == "survived"]
    return dict(counts, places=len(places), tried=len(chosen), diffs=diffs)


def report(results: dict[str, dict]) -> None:
    "Survivors as diffs, then one line per module and one for all. Tests that hang count as killed."
    for name, found in results.items():
        for diff in found["diffs"]:
            changed = [line for line in diff.splitlines()[3:] if line[:1] in "@+-"]
            print("", f"{name}: survived", *changed, sep="\n")
    columns = ("places", "tried", "killed", "timeout", "survived", "error")
    rows = {name: [found[c] for c in columns] for name, found in results.items()}
    rows["all"] = [sum(column) for column in zip(*rows.values())]
    print("", f"{'module':<12}" + "".join(f"{c:>10}" for c in (*columns, "kill rate")), sep="\n")
    for name, numbers in rows.items():
        _, tried, killed, timeout, _, error = numbers
        rate = f"{100 * (killed + timeout) / (tried - error):.0f} %" if tried > error else "-"
        print(f"{name:<12}" + "".join(f"{n:>10}" for n in (*numbers, rate)))


def main() -> None:
    parser = argparse.ArgumentParser(description="How many small faults would the tests notice?")
    parser.add_argument(
        "modules", nargs="*", metavar="module", help=f"some of {', '.join(modules)}; default: all"
    )
    parser.add_argument(
        "--sample", type=int, default=0, help="so many faults of each module, drawn; 0: all of them"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--cap", type=float, default=600, help="seconds after which tests with a fault are ended"
    )
    parser.add_argument("--pytest", default="", help="more options for pytest, such as '-k \"not slow\"'")
    asked = parser.parse_args()
    if unknown := [name for name in asked.modules if name not in modules]:
        parser.error(f"{', '.join(unknown)}: must be some of {', '.join(modules)}")
    if asked.sample < 0 or asked.cap <= 0:
        parser.error("--sample must not be negative, and --cap must be positive")
    os.environ.setdefault("FAITHFUL_DISTILL_SHARED", str(root.parent / "shared"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(build / "hypothesis")
    build.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(build / "lock", timeout=0):
            os.environ["PYTHONPATH"] = str(tree := copy_tree())
            os.chdir(tree)
            report({name: try_faults(name, tree, asked) for name in asked.modules or modules})
    except Timeout:
        sys.exit(f"{build}: another run is at work there")


if __name__ == "__main__":
    main()
