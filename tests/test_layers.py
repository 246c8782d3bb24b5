"""The layers of the package, read from its imports: who may import whom, in order, without circles.

A module imports from its own wing and from the layers below, wherever the import stands: at the top or inside a
function. The rules are functions from a package folder to a list of offences; toy packages show that each rule
finds what it forbids.
"""

import ast
import graphlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import faithful_distill

PACKAGE = Path(faithful_distill.__file__).parent
LAYERS = (  # from the ground up; the wings of one layer do not import each other
    ("files", "hashes", "progress", "caches"),
    ("jsonl", "ownership"),
    ("formats", "ranks", "models", "replies"),
    ("connection",),
    ("served",),
    ("questions", "answer_sentences"),
    ("answer_rule",),
    ("question_rows",),
    ("layouts",),
    ("sources",),
    ("records",),
    ("lineage", "stated", "overlaps"),
    ("release", "published_files", "publishing"),
    ("exchange",),
    ("attention",),
    ("prefix_tree",),
    ("teacher", "student"),
    ("training",),
    ("reasoners",),
    ("faithfulness",),
    ("lab",),
    ("commands",),
    ("question_options",),
    ("data_commands", "teacher_commands", "training_commands", "score_commands", "lab_commands"),
    ("measure_commands",),
    ("cli",),
    ("__main__",),
)
LAYER_OF = {wing: number for number, wings in enumerate(LAYERS) for wing in wings}
COMMAND_LINE = {wing for wings in LAYERS[LAYER_OF["commands"] :] for wing in wings}
WITH_TORCH = {"attention", "prefix_tree"}  # what the wings share of reading with a model
GROUND = {wing for wings in LAYERS[: LAYER_OF["teacher"]] for wing in wings} - WITH_TORCH
MODEL_LIBRARIES = {
    *("torch", "transformers", "tokenizers", "datasets", "deepspeed", "accelerate", "peft", "safetensors"),
}


@dataclass(frozen=True)
class Import:
    "One import in a module of the package: of `name` from `target`, dotted names without the package's own."

    module: str
    line: int
    target: str  # a module of the package, '' the package itself; or another library
    name: str | None  # None: the module itself
    inside: bool  # of the package?
    at_top: bool  # carried out when the module is imported

    @property
    def where(self) -> str:
        return f"{self.module}, line {self.line}"


def modules_of(package: Path) -> dict[str, Path]:
    "Dotted name -> file of each module; a wing's own `__init__` is named as the wing."
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in found.items() if name not in ("", "_modidx")}


@cache
def imports_of(package: Path) -> list[Import]:
    modules, found = modules_of(package), []
    for module, file in modules.items():
        parts = module.split(".")
        above = [package.name, *(parts if file.name == "__init__.py" else parts[:-1])]
        for node, at_top in statements(ast.parse(file.read_text(encoding="utf-8"))):
            for target, name in names_in(node, above):
                inside = target == package.name or target.startswith(f"{package.name}.")
                short = target[len(package.name) + 1 :] if inside else target
                whole = f"{short}.{name}".strip(".")
                if inside and name and whole in modules:  # `from package.wing import module`
                    short, name = whole, None
                found.append(Import(module, node.lineno, short, name, inside, at_top))
    return found


def statements(tree, at_top: bool = True):
    "Every node below, and whether it is carried out when the module is imported: that is, in no function."
    for node in ast.iter_child_nodes(tree):
        yield node, at_top
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from statements(node, at_top and not function)


def names_in(node, above: list[str]) -> list[tuple[str, str | None]]:
    "(module, name) of each import in a statement; `above` is the package that a relative import starts from."
    if isinstance(node, ast.Import):
        return [(a.name, None) for a in node.names]
    if isinstance(node, ast.ImportFrom):
        base = above[: len(above) - node.level + 1] if node.level else []
        return [(".".join([*base, *filter(None, [node.module])]), a.name) for a in node.names]
    return []


def wing(module: str) -> str:
    return module.split(".")[0]


def out_of_order(package: Path) -> list[str]:
    "Imports that go up, or sideways into another wing of the same layer; and modules of no known wing."
    offences = [f"{m}: is in no wing" for m in modules_of(package) if wing(m) not in LAYER_OF]
    for i in imports_of(package):
        if not i.inside or wing(i.module) == wing(i.target) or wing(i.module) not in LAYER_OF:
            continue
        if (i.target, i.name) == ("", "__version__"):
            continue
        if LAYER_OF.get(wing(i.target), len(LAYERS)) >= LAYER_OF[wing(i.module)]:
            offences.append(f"{i.where}: imports {i.target or 'the package itself'}")
    return offences


def laboratory(package: Path) -> list[str]:
    "Imports of the laboratory from outside of it, but for the command line."
    return [
        f"{i.where}: imports {i.target}"
        for i in imports_of(package)
        if i.inside and wing(i.target) == "lab" and wing(i.module) not in {"lab", *COMMAND_LINE}
    ]


def circles(package: Path) -> list[str]:
    "A circle of modules that import each other, if there is one."
    graph = {m: set() for m in modules_of(package)}
    for i in imports_of(package):
        if i.inside and i.target:
            graph[i.module].add(i.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return [" <- ".join(e.args[1])]
    return []


def private(package: Path) -> list[str]:
    "Names with an underscore that a module takes from another one, by importing them or by a dot."

    def is_private(name):
        return name is not None and name.startswith("_") and not name.endswith("__")

    imports = [i for i in imports_of(package) if i.inside]
    offences = [f"{i.where}: {i.name}" for i in imports if is_private(i.name)]
    for module, file in modules_of(package).items():
        names = {i.target.split(".")[-1] for i in imports if i.module == module and i.name is None}
        for node, _ in statements(ast.parse(file.read_text(encoding="utf-8"))) if names else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in names and is_private(node.attr):
                    offences.append(f"{module}, line {node.lineno}: {node.value.id}.{node.attr}")
    return offences


def heavy_ground(package: Path) -> list[str]:
    "Model libraries that a ground module loads when it is imported."
    return [
        f"{i.where}: {i.target}"
        for i in imports_of(package)
        if wing(i.module) in GROUND and i.at_top and not i.inside and wing(i.target) in MODEL_LIBRARIES
    ]


RULES = [out_of_order, laboratory, circles, private, heavy_ground]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_its_layers(rule):
    offences = rule(PACKAGE)
    assert not offences, "\n".join(offences)


SOUND = {
    "files.py": "import json\nclass BadInput(ValueError): pass\n",
    "caches.py": "def device():\n    import torch\n    return torch.device('cpu')\n",
    "questions.py": "from toy.files import BadInput\n",
    "sources.py": "from .questions import BadInput\n",
    "teacher/engine.py": "import torch\nfrom .. import __version__\nfrom ..files import BadInput\n",
    "teacher/generate.py": "from .engine import torch\n_inner = 1\n",
    "student/rows.py": "from toy.questions import BadInput\n",
    "lab/world.py": "from toy.teacher.generate import torch\n",
    "cli.py": "def main():\n    from toy.lab.world import torch\n",
}
BROKEN = [
    (out_of_order, "files.py", "from .questions import BadInput", "files, line 1: imports questions"),
    (out_of_order, "caches.py", "import toy.files", "caches, line 1: imports files"),
    (out_of_order, "teacher/engine.py", "from ..student.rows import BadInput", "imports student.rows"),
    (
        out_of_order,
        "student/rows.py",
        "def f():\n    from toy.teacher import engine",
        "imports teacher.engine",
    ),
    (out_of_order, "student/rows.py", "from toy import answer", "imports the package itself"),
    (out_of_order, "helpers.py", "x = 1", "helpers: is in no wing"),
    (laboratory, "student/rows.py", "from ..lab import world", "student.rows, line 1: imports lab.world"),
    (
        laboratory,
        "training/train.py",
        "def f():\n    import toy.lab.world",
        "training.train, line 2: imports",
    ),
    (circles, "teacher/engine.py", "def f():\n    from .generate import torch", "teacher.generate"),
    (circles, "teacher/engine.py", "import toy.teacher.generate", "teacher.generate"),
    (private, "teacher/engine.py", "from .generate import _inner", "teacher.engine, line 1: _inner"),
    (private, "lab/world.py", "from toy.teacher import generate\nx = generate._inner", "generate._inner"),
    (heavy_ground, "questions.py", "import transformers.models", "questions, line 1: transformers.models"),
    (
        heavy_ground,
        "caches.py",
        "try:\n    from torch import nn\nexcept ImportError: pass",
        "caches, line 2: torch",
    ),
]


def toy(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        for parent in [(folder / "toy" / name).parent, folder / "toy"]:
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
        (folder / "toy" / name).write_text(text)
    return folder / "toy"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_package_offends_against_no_rule(rule, tmp_path):
    assert rule(toy(tmp_path, SOUND)) == []


@pytest.mark.parametrize("rule, file, text, offence", BROKEN)
def test_each_offence_is_found(rule, file, text, offence, tmp_path):
    found = rule(toy(tmp_path, SOUND | {file: f"{text}\n"}))
    assert len(found) == 1 and offence in found[0], found
