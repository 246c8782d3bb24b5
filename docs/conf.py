"""The site: every notebook as stored (nothing is executed), the API from its docstrings, the command line from itself.

Built by `make docs`, offline, warnings as errors."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

here = Path(__file__).parent
root = here.parent
sys.path.insert(0, str(here))
from study_page import study_page  # noqa: E402


repository = "https://github.com/faithful-distill/faithful_distill"


def stage():
    "Copies what lies outside this folder, and writes the pages that the package itself knows best."
    for name in ("pages", "project", "generated", "generated_pictures"):
        shutil.rmtree(here / name, ignore_errors=True)
    for source in sorted(root.glob("nbs/**/*.ipynb")):
        if ".ipynb_checkpoints" not in source.parts:
            target = here / "pages" / source.relative_to(root / "nbs")
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")  # what is not part of the site is in the repository
            text = re.sub(r"\]\((?:\.\./)+(?=data/|tests/|README)", f"]({repository}/blob/main/", text)
            target.write_text(as_read(text), encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        copy(root / name, here / "project" / name)
    (here / "cli.md").write_text(command_line(), encoding="utf-8")
    (here / "api.md").write_text(reference(), encoding="utf-8")
    report = study_page(root, here / "generated_pictures")
    (here / "report.md").write_text(report, encoding="utf-8")


def as_read(notebook: str) -> str:
    "A notebook without what nbdev is told in it, its outputs' links leading to the pages of the site."
    nb = json.loads(notebook)
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines(keepends=True)
            cell["source"] = "".join(line for line in lines if not line.startswith("#|"))
        for output in cell.get("outputs", []):
            shown = output.get("data", {}).get("text/markdown")
            if shown is not None:
                output["data"]["text/markdown"] = re.sub(r"\.ipynb(?=[)#])", ".html", "".join(shown))
    nb["cells"] = [cell for cell in nb["cells"] if "".join(cell["source"]).strip()]
    return json.dumps(nb)


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


wings = {
    "Data": "files formats questions layouts sources records lineage release stated published_files publishing overlaps exchange",
    "Teacher": "teacher.*",
    "Student": "student.*",
    "Training": "training.*",
    "Reasoners": "reasoners.*",
    "Faithfulness": "faithfulness.*",
    "Laboratory": "lab.*",
}


def reference() -> str:
    "The library's pages of reference, a part for each wing: every module that has public names."
    package = root / "faithful_distill"
    parts = [
        "# Library reference\n",
        "Every function and class that is public, with its parameters, errors and sources.\n",
    ]
    for title, patterns in wings.items():
        files = [f for p in patterns.split() for f in sorted(package.glob(f"{p.replace('.', '/')}.py"))]
        public = [
            f for f in files if re.search(r"^__all__ = \['", f.read_text(encoding="utf-8"), re.MULTILINE)
        ]
        names = [
            ".".join(("faithful_distill", *f.relative_to(package).with_suffix("").parts)) for f in public
        ]
        hidden = [
            name
            for name in names
            if name.rpartition(".")[2] in import_module(name.rpartition(".")[0]).__all__
        ]
        body = "\n".join(f"   {name}" for name in names if name not in hidden)
        parts.append(
            f"## {title}\n\n```{{eval-rst}}\n.. autosummary::\n   :toctree: generated\n\n{body}\n```\n"
        )
        parts += [by_itself(name) for name in hidden]
    return "\n".join(parts)


def by_itself(module: str) -> str:
    "A link to the page of a module whose name its wing has given to something in it, where a summary would find that."
    page = here / "project" / f"{module}.md"
    text = f"# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"
    page.write_text(text, encoding="utf-8")
    return f"```{{toctree}}\n:maxdepth: 1\n\nproject/{module}\n```\n"


def command_line() -> str:
    "The reference of the command line: the help that the commands print themselves."
    ask = lambda *words: (
        subprocess.run(
            [sys.executable, "-m", "faithful_distill", *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    from faithful_distill.cli import main

    parts = ["# The command line\n", "```text\n" + ask() + "```\n"]
    parts += [f"## {name}\n\n```text\n{ask(name)}```\n" for name in main.commands]
    return "\n".join(parts)


def setup(app):
    "Formulas are MathML, which browsers draw themselves: no script, no network."
    from latex2mathml.converter import convert

    def mathml(self, node, display: str, around: str):
        text = re.sub(r"\\arg\s*\\(max|min)", r"\\mathrm{arg\\,\1}", node.astext())
        tag = f'<{around} class="math">{convert(text, display=display)}</{around}>'
        self.body.append(tag)
        from docutils.nodes import SkipNode

        raise SkipNode

    def notebooks_as_pages(app, name, text):
        if name.startswith("howto/") or name == "method":  # which are also read in the repository
            text[0] = re.sub(r"\]\((\.\./)*\.\./nbs/", r"](\1pages/", text[0])

    app.connect("source-read", notebooks_as_pages)
    inline = lambda self, node: mathml(self, node, "inline", "span")
    block = lambda self, node: mathml(self, node, "block", "div")
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("autodoc-process-docstring", code_in_backticks, priority=1)


def code_in_backticks(app, what, name, obj, options, lines):
    "Docstrings are written as people read them: `name` is code, and may have a plural s behind it."
    for i, line in enumerate(lines):
        if re.fullmatch(r"\*{1,2}\w+", line.strip()):  # the name of a parameter
            continue
        parts = re.split(r"(`+[^`]+`+)", line)  # prose, code, prose, ...
        parts[::2] = [re.sub(r"\*(?=[\w*])|\|", r"\\\g<0>", prose) for prose in parts[::2]]
        parts[1::2] = [f"``{code.strip('`')}``" for code in parts[1::2]]
        plural = [k for k in range(1, len(parts), 2) if re.match(r"\w", parts[k + 1])]
        for k in plural:
            parts[k] += r"\ "
        lines[i] = "".join(parts)


stage()

project = "faithful_distill"
author = "The faithful_distill authors"
copyright = "2026 onwards, The faithful_distill authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
toc_object_entries = False
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "faithful_distill"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_repository": "", "navigation_with_keys": True}

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # outputs have tables
myst_enable_extensions = ["dollarmath", "colon_fence", "tasklist"]
myst_heading_anchors = 3
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "imported-members": False}
napoleon_google_docstring = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
