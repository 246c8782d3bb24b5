"""The files beside the code: versions agree, links lead somewhere, and what they tell people to run is there."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml

import faithful_distill
from faithful_distill.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "llms.txt",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/howto/*.md"),
        ROOT / "data/README.md",
    ]
)
PAGES = [p for p in PAGES if p.name not in ("cli.md", "report.md")]  # made by `make docs`
name_of = lambda page: str(page.relative_to(ROOT))


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def code(page, *languages):
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page):
    "The words after `faithful-distill` in shell blocks, and in code between prose."
    text = page.read_text(encoding="utf-8")
    inline = "\n".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))
    for line in "\n".join([*code(page, "bash", "shell"), inline]).splitlines():
        if found := re.search(r"(?:^|[ )])faithful-distill\)? +([a-z]\w*)(.*)", line):
            yield found[1], re.findall(r"(?<=\s)--[a-z][\w-]*", found[2])


def test_one_version_everywhere():
    version = settings()["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert version == faithful_distill.__version__ == citation["version"] == newest
    assert (
        citation["license"] == settings()["license"] and citation["repository-code"] == settings()["git_url"]
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, heading = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        path = (page.parent / target).resolve() if target else page
        if "docs" in page.parts and "pages" in Path(target).parts:  # the site's copy of the notebooks
            path = ROOT / "nbs" / target.split("pages/")[1]
        made = page.parent == ROOT / "docs" and target in ("api.md", "cli.md", "report.md")
        assert made or path.exists(), f"{name_of(page)}: {link}"
        if heading and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert heading in slugs, f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    for name, options in commands(page):
        assert name in main.commands, f"{name_of(page)}: faithful-distill {name}"
        known = {
            o
            for p in main.commands[name].get_params(click.Context(main.commands[name]))
            for o in (*p.opts, *p.secondary_opts)
        } | {"--help"}
        assert {*options} <= known, f"{name_of(page)}: faithful-distill {name}: {sorted({*options} - known)}"
    targets = {*re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    asked = re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {*asked} <= targets, name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_python_examples_import_is_there(page):
    for text in code(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "faithful_distill":
                module = import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{name_of(page)}: {node.module}.{alias.name}"


def test_the_hosted_gate_is_the_local_one():
    flow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs and (ROOT / ".ci" / "run").is_file() and "make docs" in runs
    lowest = min(flow["jobs"]["test"]["strategy"]["matrix"]["python"], key=lambda v: int(v.split(".")[1]))
    assert lowest == settings()["min_python"]
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert isinstance(yaml.safe_load(form.read_text(encoding="utf-8")), dict), form


def test_the_site_s_links_are_checked(tmp_path):
    "The checker that `make docs` runs finds a missing page, a missing anchor, and what is loaded from elsewhere."
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    checker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checker)
    good = '<a href="b.html#x">b</a> <a href="#top" id="top">top</a> <a href="https://example.org">e</a>'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="x">x</p>')
    assert list(checker.problems(tmp_path)) == []
    bad = '<a href="c.html">c</a> <a href="b.html#y">y</a> <script src="https://example.org/s.js"></script>'
    (tmp_path / "a.html").write_text(bad)
    assert len(list(checker.problems(tmp_path))) == 3


def readme_table():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "docs/readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_results_that_the_notebooks_show():
    table, readme = readme_table(), (ROOT / "README.md").read_text(encoding="utf-8")
    for notebook in table.cells:
        assert table.stored(notebook) in readme, "run docs/readme_table.py"
        assert table.with_table(readme, table.stored(notebook), notebook) == readme
        assert "| a \\1 |" in table.with_table(readme, "| a \\1 |", notebook)
        with pytest.raises(SystemExit, match="must hold once"):
            table.with_table("# No marks", "x", notebook)


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_sites_report_says_what_the_figures_say(tmp_path):
    "Every stored verdict and picture of the study's figures, and where the tables come from; nothing is typed in."
    spec = importlib.util.spec_from_file_location("study_page", ROOT / "docs/study_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.study_page(ROOT, tmp_path / "pictures")
    claims = module.stored(ROOT / "nbs/figures/claims.ipynb")["claims"]
    said = [c for c in claims if c["against"]]
    assert len(claims) > len(said) > 0 and all(f"- **{c['word']}**: {c['text']}" in page for c in claims)
    assert page.index("What the words mean") < page.index(claims[0]["text"])
    assert f"Of {len(claims) - len(said)} claims" in page and "What would speak against the method" in page
    named = set(re.findall(r"generated_pictures/(\w+\.png)", page))
    assert named == {p.name for p in (tmp_path / "pictures").iterdir()} and len(named) > 10
    for table in ("study_evaluation.csv", "study_rationales.csv"):
        assert f"`{table}` was made by version" in page


@pytest.mark.parametrize(
    ("found", "said", "code", "exits"),
    [
        ("", "Connection refused", 1, 77),
        ("torch 2.6.0 CVE-1", "Connection pool is full, discarding", 1, 1),
        ("", "No known vulnerabilities found", 0, 0),
        ("", "No module named cyclonedx", 1, 1),
    ],
)
def test_an_audit_passes_over_an_unreachable_service_and_nothing_else(tmp_path, found, said, code, exits):
    stub = f"import sys; print({found!r}); print({said!r}, file=sys.stderr); sys.exit({code})"
    (tmp_path / "pip_audit.py").write_text(stub)
    audit = Path(__file__).with_name("audit.py")
    done = subprocess.run([sys.executable, audit], env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == exits
