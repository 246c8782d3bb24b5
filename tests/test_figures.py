"""Figures: stable bytes, small files, nothing cut off or overlapping; tables and reports that survive hostile text."""

import functools
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import stats

from faithful_distill.files import BadInput, shipped
from faithful_distill.lab import comparisons, heatmaps, plots, report, style, tables
from faithful_distill.lab.claims import (
    against,
    bottom_line,
    claim,
    corrected,
    decided,
    decided_of_all,
    note_on,
)

METHODS = [
    "answer only",
    "greedy CoT",
    "contrastive CoT",
    "greedy + counterfactual",
    "full method",
    "true rationales",
]


def scores(**axes) -> pd.DataFrame:
    "A long table over the given axes and three seeds."
    rng = np.random.default_rng(0)
    rows = [{}]
    for name, values in axes.items():
        rows = [{**r, name: v} for r in rows for v in values]
    return pd.DataFrame(
        [
            {
                **r,
                "seed": s,
                "value": float(np.clip(rng.normal(0.6, 0.1), 0, 1)),
                "low": None,
                "high": None,
                "n": 360,
                "reason": "",
            }
            for r in rows
            for s in range(3)
        ]
    )


def drawings():
    dots = comparisons.summarise(scores(dataset=["csqa", "yes / no"], method=METHODS), ["dataset", "method"])
    curve = comparisons.summarise(scores(method=METHODS, rho=[0, 0.5, 1]), ["method", "rho"])
    sides = comparisons.summarise(scores(method=METHODS[1:], side=["own", "oracle"]), ["method", "side"])
    cross = comparisons.summarise(
        scores(method=METHODS[1:3], prefix=["factual", "none"], target=["gold", "wrong"]),
        ["method", "prefix", "target"],
    )
    strip = heatmaps.Strip(
        "greedy", [" A", " spar", "row", " sings", "."], [0.0, 1.0, -2.0, 3.0, 0.1], "a note"
    )
    yield "dots", lambda: plots.dots(dots, "method", "dataset", label="accuracy", percent=True, bars=True)
    yield "lines", lambda: plots.lines(curve, "rho", "method", xlabel="share", label="accuracy", percent=True)
    yield "slopes", lambda: plots.slopes(sides, "side", "method", percent=True)
    yield "matrix", lambda: heatmaps.matrix(cross, "prefix", "target", "method", label="share")
    yield "strip", lambda: heatmaps.heat_strip([strip], "What sings?\nRationale for: bird.")


@pytest.mark.parametrize("name, draw", list(drawings()), ids=lambda v: v if isinstance(v, str) else "")
def test_the_same_figure_is_the_same_bytes_and_small(name, draw, tmp_path):
    first = [p.read_bytes() for p in style.save_figure(draw(), tmp_path / name)]
    again = [p.read_bytes() for p in style.save_figure(draw(), tmp_path / name)]
    assert first == again and len(first[0]) < 60_000
    assert (
        first[0].startswith(b"\x89PNG")
        and b"<svg" in first[1]
        and first[2].startswith(b"%PDF")
        and b"CreationDate" not in first[2]
    )


@pytest.mark.parametrize("name, draw", list(drawings()), ids=lambda v: v if isinstance(v, str) else "")
def test_no_two_words_overlap(name, draw):
    figure = draw()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [
        t
        for axes in figure.axes
        for t in [
            *axes.texts,
            axes.title,
            axes.xaxis.label,
            axes.yaxis.label,
            *axes.get_xticklabels(),
            *axes.get_yticklabels(),
            *_left_title(axes),
        ]
        if t.get_text().strip()
        and t.get_visible()
        and axes.get_visible()
        and (axes.axison or t in axes.texts)
    ]
    from matplotlib.text import Text

    boxes = [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts]
    shared = [
        (a, b)
        for i, (a, x) in enumerate(boxes)
        for b, y in boxes[i + 1 :]
        if min(x.x1, y.x1) - max(x.x0, y.x0) > 1.5 and min(x.y1, y.y1) - max(x.y0, y.y0) > 3.5
    ]
    assert len(boxes) >= 4 and not shared


def _left_title(axes):
    return [axes._left_title]


def test_a_figure_with_everything_missing_still_draws_and_says_why(tmp_path):
    none = pd.DataFrame(
        [
            {"method": m, "value": None, "low": None, "high": None, "n": 0, "reason": "empty bin"}
            for m in METHODS
        ]
    )
    summary = comparisons.summarise(none, ["method"])
    figure = plots.dots(summary, "method")
    assert any("empty bin" in t.get_text() for t in figure.axes[0].texts)
    style.save_figure(figure, tmp_path / "none", ["png"])
    assert tables.crossed(summary, "method")[1][1] == "– (empty bin)"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.5, 10))
def test_separated_places_keep_their_order_and_distance_and_move_no_more_than_needed(places, gap):
    moved = style.separated(places, gap)
    order = sorted(range(len(places)), key=lambda i: places[i])
    assert all(moved[b] - moved[a] >= gap - 1e-6 for a, b in zip(order, order[1:]))
    if all(places[b] - places[a] >= gap for a, b in zip(order, order[1:])):
        assert moved == pytest.approx(places)
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcxyz ", min_size=1, max_size=9), min_size=1, max_size=25), st.integers(120, 500))
def test_strip_boxes_stay_inside_and_apart(tokens, width):
    places = heatmaps.token_boxes(tokens, width)
    for (x, line, w), (x2, line2, _) in zip(places, places[1:]):
        assert line2 > line or (line2 == line and x2 >= x + w - 1e-9)
    starts_word = [t[:1].isspace() or i == 0 for i, t in enumerate(tokens)]
    assert all(
        x == 0 or s or line == places[i - 1][1]
        for i, ((x, line, _), s) in enumerate(zip(places, starts_word))
    )


def test_colours_are_fixed_and_distinct_and_so_are_markers():
    for group in (
        METHODS,
        ["greedy", "contrastive-empty", "contrastive-wrong", "all-wrong", "sampled"],
        ["factual", "counterfactual", "none"],
    ):
        looks = style.looks(group)
        assert len({c for c, _ in looks.values()}) == len({m for _, m in looks.values()}) == len(group)
        assert all(style.looks([name])[name] == look for name, look in looks.items()), "whoever else is there"


@pytest.mark.parametrize("kind", [None, "deuteranopia", "protanopia"])
def test_methods_differ_for_every_colour_vision(kind):
    from matplotlib.colors import to_rgb

    # Viénot, Brettel and Mollon (1999), linear RGB
    matrices = {
        None: np.eye(3),
        "protanopia": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
        "deuteranopia": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
    }
    seen = [
        np.clip(matrices[kind] @ np.power(to_rgb(style.looks([m])[m][0]), 2.2), 0, 1) ** (1 / 2.2)
        for m in METHODS
    ]
    assert min(np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[i + 1 :]) > 0.15


def test_summaries_count_seeds_and_questions_and_keep_the_order():
    table = scores(method=["z", "a"])
    summary = comparisons.summarise(table, ["method"])
    assert (
        summary.method.tolist() == ["z", "a"]
        and summary.seeds.tolist() == [3, 3]
        and summary.n.tolist() == [360, 360]
    )
    assert tables.n_text(summary.iloc[0]) == "n = 360 × 3"


def test_paired_differences_pair_and_refuse_ambiguity():
    table = scores(method=["a", "b"], metric=["accuracy", "las"])
    twice = pd.concat([table, table.assign(value=0.5)])
    with pytest.raises(BadInput, match="several rows"):
        comparisons.difference(twice[twice.metric == "las"], "method", "a", "b")
    one = table[table.metric == "las"]
    gap = comparisons.difference(one, "method", "a", "b")
    a, b = (one[one.method == m].value.to_numpy() for m in "ab")
    assert (
        gap["value"] == pytest.approx((a - b).mean())
        and gap["seeds"] == 3
        and gap["low"] < gap["value"] < gap["high"]
    )
    assert comparisons.difference(one, "method", "a", "c")["value"] is None


def test_tables_escape_what_would_break_them():
    rows = [["name | x", "50 %"], ["a_b & c", r"$\x$ {y} #1 ~ ^"]]
    assert tables.markdown_table(rows).splitlines()[0].count(" | ") == 1
    latex = tables.latex_table(rows, "A & B", "tab:x")
    assert (
        r"a\_b \& c & \$\textbackslash{}x\$ \{y\} \#1 \textasciitilde{} \textasciicircum{} \\" in latex
        and r"\toprule" in latex
        and r"\caption{A \& B}" in latex
    )


class Page(HTMLParser):
    "Tags that are opened and not closed, and everything a page would fetch."

    void = ("meta", "img", "br", "hr", "link")

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.fetched, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and not v.startswith(("data:", "#"))]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.wrong.append(tag)  # HTML reads <p/> as <p>

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def section_folder(tmp_path):
    folder = tmp_path / "fig"
    style.save_figure(
        plots.dots(comparisons.summarise(scores(method=METHODS), ["method"]), "method"),
        folder / "fig01",
        ["png"],
    )
    tables.save_rows([["method", "x"], ["a|b", "<b>1</b>"]], folder / "fig01")
    report.write_section(
        folder,
        report.Section(
            "Figures <1>",
            "Text with <script>alert(1)</script>, `a < b` and\n\n- one\n- two",
            [("fig01", 'Caption "quoted" & <i>')],
            [("fig01", "Table")],
            [
                claim("A beats B", True, {"value": 0.1, "low": 0.05, "high": 0.2, "n": 5}),
                claim("C < D", None, None, remark="no seeds"),
            ],
        ),
    )
    return folder


def test_a_report_is_whole_escaped_and_fetches_nothing(section_folder, tmp_path):
    page = report.build_report(
        tmp_path / "r.html",
        "Title & <more>",
        "Lead **bold**",
        [section_folder],
        facts={"Seeds": 5, "a<b": "c"},
    )
    text, parsed = page.read_text(), Page()
    parsed.feed(text)
    assert (
        not parsed.wrong
        and not parsed.open
        and not parsed.fetched
        and "script" not in parsed.tags
        and parsed.tags.count("img") == 2  # its one picture, and once more as the key picture
    )
    assert (
        "✓ holds" in text
        and "? inconclusive" in text
        and "0.10 [0.05, 0.20]" in text
        and "a|b" in text
        and "&lt;b&gt;1&lt;/b&gt;" in text
    )
    assert (
        report.build_report(
            tmp_path / "again.html",
            "Title & <more>",
            "Lead **bold**",
            [section_folder],
            facts={"Seeds": 5, "a<b": "c"},
        ).read_bytes()
        == page.read_bytes()
    )


def test_a_section_without_its_picture_is_refused(section_folder, tmp_path):
    with pytest.raises(BadInput, match="is not there"):
        report.write_section(tmp_path, report.Section("x", figures=[("fig02", "")]))
    with pytest.raises(BadInput, match="left no section.json"):
        report.build_report(tmp_path / "r.html", "t", "", [tmp_path])


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab *`_<>&\"'[](){}|-#\n0123456789%=×", max_size=60))
@example("0  \n0")
def test_any_prose_is_well_formed(text):
    parsed = Page()
    parsed.feed(report.prose(text))
    assert not parsed.wrong and not parsed.open and "script" not in parsed.tags


def test_the_report_notebook_gathers_what_figures_left(section_folder, tmp_path):
    from faithful_distill.lab.runs import run_notebook

    folder = run_notebook(
        "figures/report.ipynb",
        {"title": "T", "sections": [str(section_folder)]},
        tmp_path / "runs",
        needs=("report.html", "metrics.json"),
    )
    assert json.loads((folder / "metrics.json").read_text()) == {
        "claims": {"holds": 1, "fails": 0, "open": 1},
        "against": {"holds": 0, "fails": 0, "open": 0},
        "sections": 1,
    }
    page = (folder / "report.html").read_text()
    assert "<h1>T</h1>" in page and "<code>times/report.html</code>" in page


# ---- the figures of the repository are what its tables give -------------------------------------------------------------------------

DRAWN_WITH = "3.11"  # matplotlib that drew the stored pictures; another version places text a pixel elsewhere
FIGURES = sorted(p for p in shipped("nbs", "figures").glob("*.ipynb") if p.stem != "report")


def _run_again(path: Path, out: Path, monkeypatch, tables: Path | None = None) -> list[dict]:
    """Executes a figure notebook in this process, from its own folder and with its own defaults but `out`, and `study_*.csv` or `calibration.csv` of another folder
    instead of the repository's tables if one is given; its cells with new outputs."""
    shell = pytest.importorskip("execnb.shell")
    from execnb.nbio import read_nb

    notebook = read_nb(path)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = re.sub(r"(?m)^out: str = .*$", f"out: str = {str(out)!r}", parameters.source)
    if tables:
        parameters.source = re.sub(
            r"\.\./\.\./data/results/(?:study|quickstart)_(?=\w+\.csv)", f"{tables}/study_", parameters.source
        ).replace("../../data/results/calibration.csv", f"{tables}/calibration.csv")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []  # a cell that now shows nothing keeps what it showed otherwise
    monkeypatch.chdir(path.parent)
    __import__("matplotlib.pyplot").pyplot.close("all")  # figures that other tests left open would be shown
    shell.CaptureShell().run_all(notebook, exc_stop=True)
    return notebook.cells


def _shown(cells) -> list[tuple[str, str]]:
    "What cells show to a reader: text, Markdown, and pictures as base64; no warnings, such as that of a font cache that is made."
    found = []
    for output in (
        o
        for c in cells
        if c["cell_type"] == "code"
        for o in c.get("outputs", [])
        if o.get("name") != "stderr"
    ):
        for kind, value in [("text", output["text"])] if "text" in output else output.get("data", {}).items():
            if kind in ("text", "text/markdown", "image/png"):
                found.append((kind, "".join(value).strip()))
    return found


def _pixels(png: str):
    import base64
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), dtype=float)


@pytest.mark.parametrize("path", FIGURES, ids=lambda p: p.stem)
def test_stored_figures_are_what_the_tables_in_the_repository_give(path, tmp_path, monkeypatch):
    import matplotlib

    stored = _shown(json.loads(path.read_text(encoding="utf-8"))["cells"])
    again = _shown(_run_again(path, tmp_path, monkeypatch))
    assert stored, f"{path.name} has no stored outputs; run `make figures`"
    assert [kind for kind, _ in again] == [kind for kind, _ in stored], "run `make figures`"
    for (kind, old), (_, new) in zip(stored, again):
        if kind != "image/png":
            assert new == old, "run `make figures`"
        elif matplotlib.__version__.startswith(DRAWN_WITH):
            a, b = _pixels(old), _pixels(new)
            assert a.shape == b.shape and np.abs(a - b).mean() < 0.5, "run `make figures`"
    report.read_section(tmp_path)


def made_up_scores(metrics: dict[str, float], rng, n=360) -> list[dict]:
    "A row for each metric around a given value; None makes it undefined."
    rows = [
        (m, v, None if v is None else float(np.clip(rng.normal(v, 0.02), -1, 1))) for m, v in metrics.items()
    ]
    return [
        {
            "metric": m,
            "value": x,
            "low": x and x - 0.05,
            "high": x and x + 0.05,
            "n": 0 if v is None else n,
            "reason": "empty bin" if v is None else "",
        }
        for m, v, x in rows
    ]


@pytest.fixture(scope="module")
def made_up_tables(tmp_path_factory) -> Path:
    "Tables of a study that never was: two seeds, all labels that the figures know, every metric; LAS undefined for one method, and in the learning curve for all."
    from faithful_distill.lab.tables import write_table

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    student = {
        "accuracy": 0.6,
        "own_supports_own": 0.5,
        "las": 0.1,
        "perturb": 0.2,
        "refine": 0.2,
        "refine_stripped": 0.1,
        "oracle_accuracy": 0.8,
        "oracle_stripped_accuracy": 0.7,
    }
    student |= {
        f"swap_{prefix}.{side}": 0.4
        for prefix in ("factual", "counterfactual", "none")
        for side in ("gold", "wrong")
    }
    student |= {f"perturb_at.{rho}": 0.6 - 0.2 * rho for rho in (0, 0.1, 0.25, 0.5, 0.75, 1)}
    teacher = {
        f"test.{role}.{kind}.{what}": v
        for role in ("gold", "counterfactual")
        for kind in style.kinds
        for what, v in [("supports", 0.7), ("vacuous", 0.2), ("argues against", 0.1)]
    }
    teacher |= {f"test.gold.{kind}.tokens": 9.0 for kind in style.kinds}
    axes_of = {
        "evaluation": ({}, METHODS, student),
        "size": ({"size": ["small", "large"]}, METHODS[1:5], student),
        "shortcut": ({"shortcut": [0.0, 0.5, 1.0]}, METHODS[1:5], student),
        "curve": ({"n_train": [100, 400]}, METHODS[:5], student | {"las": None}),
        "weight": ({"reduction": ["per_part", "per_token"], "weight": [0.1, 0.5, 0.9]}, [""], student),
        "rationales": ({}, style.strategies, teacher),
        "vacuous": ({"vacuous": [0.0, 0.4]}, style.strategies[:4], teacher),
        "alpha": ({"alpha": [0.0, 0.5, 0.9]}, [""], teacher),
        "unstated": ({"unstated": [0.0, 1.0]}, style.strategies[:4], teacher),
        "objectives": (
            {"objective": ["factual", "counterfactual", "margin", "multitask"]},
            [""],
            student | {"early_answering": 0.3, "mediation_indirect": 0.2},
        ),
        "objective_student": (
            {"objective": ["factual", "margin"]},
            [""],
            {f"cost.{name}": 0.9 for name in ("rows_read", "tokens_read", "tokens_factual")},
        ),
        "times": ({"group": ["student", "evaluation"]}, METHODS, {"seconds": 1.0, "peak_mib": 1.0}),
    }
    for name, (axes, names, metrics) in axes_of.items():
        points = [{}]
        for axis, values in {
            **axes,
            "strategy" if metrics is teacher else "method": names,
            "seed": [0, 1],
        }.items():
            points = [{**p, axis: v} for p in points for v in values]
        if name == "weight":
            points += [
                {"reduction": "per_part", "weight": 0.0, "method": "", "seed": s} for s in (0, 1)
            ]  # without the loss there is nothing to average
        write_table(
            folder / f"study_{name}.csv",
            pd.DataFrame(
                [
                    {"group": name, **p, **row}
                    for p in points
                    for row in made_up_scores(
                        metrics | ({"las": None} if p.get("method") == "answer only" else {}), rng
                    )
                ]
            ),
        )
    rows = [
        {"group": "evaluation", "method": method, "seed": seed, "id": f"choice-{i}", **made_up_row(rng)}
        for method in METHODS
        for seed in (0, 1)
        for i in range(60)
    ]
    write_table(folder / "study_evaluation_rows.csv", pd.DataFrame(rows))
    return folder


def made_up_row(rng) -> dict:
    "What an evaluation notes of one question."
    flips = ("accuracy", "supports_own", "swap_wrong", "guess_xr", "guess_x", "guess_r")
    shares = {name: float(rng.integers(0, 3)) / 2 for name in ("own", "perturbed", "shuffled")}
    return {name: int(rng.integers(0, 2)) for name in flips} | shares


@pytest.fixture(scope="module")
def drawn_of_made_up(made_up_tables, tmp_path_factory):
    "Draws a figure notebook of the made-up tables, once; the folder of its section."

    @functools.cache
    def draw(path):
        out = tmp_path_factory.mktemp(path.stem)
        with pytest.MonkeyPatch.context() as patch:
            _run_again(path, out, patch, made_up_tables)
        return out

    return draw


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in FIGURES
        if re.search("data/results/(study|quickstart)_", p.read_text(encoding="utf-8"))
        and p.stem not in ("claims", "fig14_real")
    ],
    ids=lambda p: p.stem,
)
def test_figures_of_the_study_draw_whatever_seeds_and_levels_are_there(path, drawn_of_made_up):
    tmp_path = drawn_of_made_up(path)
    section = report.read_section(tmp_path)
    assert section.figures and section.tables and "No results" not in section.text
    assert all((tmp_path / f"{name}.png").stat().st_size < 60_000 for name, _ in section.figures)
    cells = [
        c
        for name, _ in section.tables
        if not name.endswith("costs")  # counts, which have no interval
        for row in (tmp_path / f"{name}.md").read_text().splitlines()[2:]
        for c in row.split(" | ")[1:]
    ]
    if path.stem != "fig12_cost":
        assert all(
            "2 seeds" in caption and "n = " in caption
            for name, caption in section.figures
            if name != "fig01_tokens"
        )
        assert any("[" in c for c in cells)  # all but those of seeds that agree
        assert all("n = " in c or "empty bin" in c or c.strip(" |") in ("–", "") for c in cells), cells


def test_a_figure_without_results_draws_nothing_and_says_so(tmp_path, monkeypatch):
    _run_again(_figure("fig02"), tmp_path / "out", monkeypatch, tmp_path / "nowhere")
    section = report.read_section(tmp_path / "out")
    assert (
        not section.figures and not section.tables and "`study_evaluation.csv` is not there" in section.text
    )


def _figure(name: str) -> Path:
    return next(p for p in FIGURES if p.stem.split("_")[0] == name)


def _one_table(folder: Path, name: str, rows: list[dict]) -> Path:
    "A study's table of rows that lack but their intervals; its folder."
    from faithful_distill.lab.tables import write_table

    write_table(
        folder / f"study_{name}.csv",
        pd.DataFrame([{"group": name, "low": None, "high": None, "n": 300, "reason": "", **r} for r in rows]),
    )
    return folder


def test_claims_and_figures_tell_the_loss_from_the_rationales(tmp_path, monkeypatch):
    "Where contrastive CoT is as good as the full method, the latter beats greedy CoT by its rationales, not by its loss; and the other way round."
    level = {
        "greedy CoT": {
            "swap_factual.wrong": 0.4,
            "las": 0.1,
            "perturb": 0.1,
            "refine": -0.1,
            "refine_stripped": 0.1,
            "accuracy": 0.6,
        },
        "contrastive CoT": {
            "swap_factual.wrong": 0.8,
            "las": 0.1,
            "perturb": 0.1,
            "refine": 0.2,
            "refine_stripped": 0.1,
            "accuracy": 0.6,
        },
        "full method": {
            "swap_factual.wrong": 0.8,
            "las": 0.3,
            "perturb": 0.3,
            "refine": 0.2,
            "refine_stripped": 0.3,
            "accuracy": 0.75,
        },
    }
    wobble = {
        "greedy CoT": [0.0, 0.01, -0.01],
        "contrastive CoT": [0.01, 0.0, -0.01],
        "full method": [-0.01, 0.01, 0.0],
    }
    tables = _one_table(
        tmp_path,
        "evaluation",
        [
            {"method": m, "seed": s, "metric": metric, "value": v + wobble[m][s]}
            for m, scores in level.items()
            for metric, v in scores.items()
            for s in range(3)
        ],
    )
    holds = {}
    for name in ("claims", "fig04", "fig05"):
        _run_again(_figure(name), tmp_path / name, monkeypatch, tables)
        section = report.read_section(tmp_path / name)
        holds |= {c["text"]: c["holds"] for c in section.claims}
        if name != "claims":
            assert (
                "full method against contrastive CoT" in section.figures[0][1]
                or "against contrastive CoT: " in section.figures[0][1]
            )
    found = lambda *words: {v for text, v in holds.items() if all(w in text for w in words)}
    assert found("wrong answer", "greedy CoT", "20 points") == {True} and found(
        "The loss alone", "wrong answer", "contrastive CoT"
    ) == {None}
    assert found("With the prefix factual", "greedy CoT") == {True} and found(
        "With the prefix factual", "contrastive CoT"
    ) == {None}
    assert (
        found("The loss alone", "LAS")
        == found("The loss alone", "replaced")
        == found("The loss alone", "taken out")
        == {True}
    )
    assert found("gains more accuracy than contrastive CoT", "taken out") == {True} and found(
        "gains more accuracy than contrastive CoT from the teacher's rationale"
    ) == {True, None}
    assert found("one-sided", "2 points less accurate") == {True}, "15 points more are no reason against it"


@pytest.mark.parametrize(
    "weights, against",
    [([0.0, 0.1, 0.5, 0.9], "no counterfactual loss"), ([0.1, 0.5, 0.9], "a weight of 0.1")],
)
def test_weights_are_compared_with_no_counterfactual_loss_if_that_was_run(
    weights, against, tmp_path, monkeypatch
):
    "The students without the loss were trained once, under per_part, and are what per_token is compared with too."
    level = lambda w, r: {
        "accuracy": 0.6 - 0.2 * w * (r == "per_part"),
        "swap_factual.wrong": 0.3 + 0.5 * min(w, 0.5),
        "las": 0.1,
        "own_supports_own": 0.5,
    }
    tables = _one_table(
        tmp_path,
        "weight",
        [
            {
                "reduction": r,
                "weight": w,
                "seed": s,
                "metric": m,
                "value": v + 0.001 * (s - 1) * (1 + w) * (w > 0),
            }
            for r in ("per_part", "per_token")
            for w in weights
            if w > 0 or r == "per_part"
            for m, v in level(w, r).items()
            for s in range(3)
        ],
    )
    _run_again(_figure("fig09"), tmp_path / "out", monkeypatch, tables)
    section = report.read_section(tmp_path / "out")
    assert {(c["text"].split(",")[0], "less accurate" in c["text"]): c["holds"] for c in section.claims} == {
        ("Averaged per part", False): True,
        ("Averaged per part", True): False,
        ("Averaged per token", False): True,
        ("Averaged per token", True): True,
    }
    caption = section.figures[0][1]
    assert (
        all(against in c["text"] for c in section.claims)
        and f"A weight of 0.5 against {against}, per part: accuracy" in caption
    )
    assert (
        ("students of both lines are the same" in caption)
        == ("from none at all" in section.text)
        == (0.0 in weights)
    )
    rows = [
        r.split(" | ")
        for r in (tmp_path / "out" / "fig09_weight.md").read_text().splitlines()
        if "weight 0 " in r
    ]
    assert len(rows) == 4 * (0.0 in weights) and all(r[1] == r[2].removesuffix(" |") for r in rows)


def test_what_was_not_measured_has_no_panel_and_the_caption_says_why(made_up_tables, tmp_path, monkeypatch):
    drawn, real = {}, plots.lines

    def lines(summary, *args, **options):
        drawn.setdefault(name, []).extend(dict.fromkeys(summary.panel))
        return real(summary, *args, **options)

    monkeypatch.setattr(plots, "lines", lines)
    for name in ("fig06", "fig11"):
        _run_again(_figure(name), tmp_path / name, monkeypatch, made_up_tables)
    captions = {name: report.read_section(tmp_path / name).figures[0][1] for name in drawn}
    assert (
        "LAS" in drawn["fig06"]
        and "Not shown" not in captions["fig06"]
        and "LAS" not in drawn["fig11"]
        and len(drawn["fig11"]) == 3
    )
    assert (
        captions["fig11"].endswith(" Not shown: LAS (empty bin).")
        and "LAS" not in (tmp_path / "fig11" / "fig11_learning_curve.md").read_text()
    )


@pytest.mark.parametrize("helps, costs", [([0.95], [0.0]), ([], []), ([0.0, 0.6, 0.95], [])])
def test_the_shortcut_figure_says_where_the_loss_helps_and_costs_by_accuracy_and_by_swap(
    helps, costs, tmp_path, monkeypatch
):
    "Accuracy as planted, and following reasons for a wrong answer the other way round."
    effect = lambda s: 0.2 * (s in helps) - 0.2 * (s in costs)
    rows = [
        {
            "shortcut": s,
            "method": m,
            "metric": metric,
            "seed": i,
            "value": (
                0.5 + sign * effect(s) * (m == "full method") + (0.01, -0.01, 0.003)[i] * (m == "full method")
            ),
        }
        for s in (0.0, 0.6, 0.95)
        for m in ("greedy CoT", "contrastive CoT", "full method")
        for metric, sign in (("accuracy", 1), ("swap_factual.wrong", -1))
        for i in range(3)
    ]
    _run_again(_figure("fig10"), tmp_path / "out", monkeypatch, _one_table(tmp_path, "shortcut", rows))
    caption, listed = (
        report.read_section(tmp_path / "out").figures[1][1],
        lambda found: ", ".join(f"{s:g}" for s in found) or "none",
    )
    unclear = listed([s for s in (0.0, 0.6, 0.95) if s not in helps + costs])
    assert (
        f"By accuracy, against contrastive CoT, it helps at strengths {listed(helps)}; costs at"
        f" {listed(costs)}; no significant difference at {unclear}." in caption
    )
    assert (
        f"wrong answer are followed, it helps at strengths {listed(costs)}; costs at {listed(helps)}; no"
        f" significant difference at {unclear}." in caption
    )


def _times(group: str, run: str, seconds: float, **labels) -> list[dict]:
    return [
        {
            "group": group,
            "run": run,
            "strategy": "",
            "method": "",
            **labels,
            "metric": m,
            "value": v,
            "n": None,
        }
        for m, v in (("seconds", seconds), ("peak_mib", 1000.0), ("resumed", 0.0))
    ]


def test_costs_count_a_shared_run_once_and_name_their_groups(tmp_path, monkeypatch):
    rows = [
        r
        for s in (0, 1)
        for r in _times("student", f"student-{s}", 60.0 + 60 * s, method="full method", seed=s)
    ]
    rows += [
        r
        for s in (0, 1)
        for r in _times("curve_student", f"student-{s}", 60.0 + 60 * s, method="full method", seed=s)
    ]  # the same two runs
    rows += _times("curve_student", "student-2", 300.0, method="greedy CoT", seed=0)
    _run_again(_figure("fig12"), tmp_path / "out", monkeypatch, _one_table(tmp_path, "times", rows))
    section, table = (
        report.read_section(tmp_path / "out"),
        [
            r.strip("| ").split(" | ")
            for r in (tmp_path / "out" / "fig12_cost.md").read_text().splitlines()[2:]
        ],
    )
    assert [r[:3] for r in table] == [
        ["student (training)", "90.0, 2 runs", "3.0"],
        ["curve_student", "300.0, 1 run", "5.0"],
        ["all of these", "160.0 [−150.3, 470.3], n = 3", "8.0"],
    ]
    caption = dict(map(tuple, section.tables))["fig12_cost"]
    assert (
        "for the groups student, curve_student: 3 runs, each counted once" in caption
        and "2 more lines" in caption
        and "whole study" not in str(section)
    )


def test_costs_of_a_table_that_names_no_runs_say_so(tmp_path, monkeypatch):
    rows = [
        {k: v for k, v in r.items() if k != "run"}
        for s in (0, 1)
        for r in _times("student", "", 60.0, method="full method", seed=s)
    ]
    _run_again(_figure("fig12"), tmp_path / "out", monkeypatch, _one_table(tmp_path, "times", rows))
    assert (
        "2 lines; the table does not say"
        in dict(map(tuple, report.read_section(tmp_path / "out").tables))["fig12_cost"]
    )


def test_metrics_of_too_few_students_are_not_called_blind(tmp_path, monkeypatch):
    "REV of three seeds is judged, LAS and RORA-lite of one are not; by-chance students without a value borrow none from the ends of the scale."
    from faithful_distill.lab.tables import read_table, write_table

    table = read_table(shipped("data", "results", "calibration.csv"))
    given = {"rev": ("REV", {0, 1, 2}), "las": ("LAS, in one of its versions,", {0})}
    given["rora_lite"] = ("RORA-lite", {0})
    changed = table
    for metric, (_, rest) in given.items():
        chosen = changed.metric.str.match(rf"{metric}(_probability)?(_unadjusted|\.unadjusted)?$")
        first = changed[chosen & (changed.seed == 0)]
        changed = pd.concat([changed[~chosen], *(first.assign(seed=s) for s in rest)])
    write_table(tmp_path / "calibration.csv", changed)
    _run_again(_figure("fig13"), tmp_path / "out", monkeypatch, tmp_path)
    section = report.read_section(tmp_path / "out")
    few = section.text.split("Too few students to tell, for not even a perfect order of them would pass: ")[
        1
    ].split("\n")[0]
    for name, rest in given.values():
        text = f"{name} orders the planted levels where idle rationales are plausible"
        [verdict] = [c for c in section.claims if c["text"] == text]
        too_few = "too few students to tell" in verdict["remark"]
        assert too_few == (name.split(",")[0] in few) == (len(rest) == 1)
        versions = re.findall(r"(\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\]", verdict["remark"].split("too few")[0])
        above, below = (all(float(v[end]) > 0.5 for v in versions) for end in (1, 2))
        assert versions and verdict["holds"] is (True if above else None if below else False)
    means = table[table.metric == "accuracy"].groupby(["arm", "used"]).value.mean()
    ranges = {
        arm: comparisons.points(means[arm].max() - means[arm].min()) for arm in ("plausible", "shuffled")
    }
    assert (
        "RORA-lite (n = 5)" in few
        and f"differs by at most: plausible, {ranges['plausible']}; shuffled, {ranges['shuffled']}"
        in section.text
    )
    cells = [
        r.strip("| ").split(" | ") for r in (tmp_path / "out" / "fig13_metrics.md").read_text().splitlines()
    ]
    by_chance = {r[0]: r[cells[0].index("neighbours in order, by chance")] for r in cells[2:]}
    assert (
        by_chance["RORA-lite"] == "–"
        and by_chance["swap, flip"].startswith("1.00 [")
        and all(c == "–" or ", n = " in c for r in cells[2:] for c in r[1:-1])
    )


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("fig01", "one teacher"),
        ("fig06", "one base student of each size"),
        ("fig07", "one teacher at each share"),
        ("fig08", "one teacher"),
    ],
)
def test_captions_say_what_seeds_do_not_redraw(
    name, phrase, drawn_of_made_up, made_up_tables, tmp_path, monkeypatch
):
    "No interval here says how another teacher or base would come out; parameters stand in the caption only if the table gives them."
    from faithful_distill.lab.tables import read_table, write_table

    captions = [
        caption
        for figure, caption in report.read_section(drawn_of_made_up(_figure(name))).figures
        if figure != "fig01_tokens"
    ]
    assert captions and all(phrase in c for c in captions) and "seed redraws" in captions[0]
    if name != "fig06":
        return
    assert "Parameters" not in captions[0]
    table = read_table(made_up_tables / "study_size.csv")
    counts = pd.DataFrame(
        [
            {"group": "base", "size": size, "seed": 0, "metric": "parameters.student", "value": v, "n": None}
            for size, v in (("small", 120_000.0), ("large", 910_000.0))
        ]
    )
    write_table(tmp_path / "study_size.csv", pd.concat([table, counts]))
    _run_again(_figure(name), tmp_path / "again", monkeypatch, tmp_path)
    assert "Parameters: small 0.12 M, large 0.91 M." in report.read_section(tmp_path / "again").figures[0][1]


# ---- differences --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_difference_is_the_paired_t_interval(pairs):
    table = pd.DataFrame(
        [
            {"method": m, "seed": i, "value": v, "low": None, "high": None, "n": 100, "reason": ""}
            for i, pair in enumerate(pairs)
            for m, v in zip("ab", pair)
        ]
    )
    found, expected = (
        comparisons.difference(table, "method", "a", "b"),
        stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs]),
    )
    assert (
        found["value"] == pytest.approx(np.mean([a - b for a, b in pairs]), abs=1e-9)
        and found["seeds"] == len(pairs)
        and found["n"] == 100
    )
    if np.std([a - b for a, b in pairs]) > 1e-6:
        assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-7)


def test_differences_pair_the_same_seeds_only_and_say_when_there_are_none():
    rows = [("a", 0, 0.9), ("a", 1, 0.8), ("b", 1, 0.5), ("b", 2, 0.1)]
    table = pd.DataFrame(
        [
            {"method": m, "seed": s, "value": v, "low": v - 0.03, "high": v + 0.04, "n": 50, "reason": ""}
            for m, s, v in rows
        ]
    )
    found = comparisons.difference(table, "method", "a", "b")
    assert (
        found["seeds"] == 1
        and found["value"] == pytest.approx(0.3)
        and (found["low"], found["high"]) == pytest.approx((0.25, 0.35))
    ), "3 and 4 make 5"
    assert (
        comparisons.difference(table, "method", "a", "c")["value"] is None
        and decided("x", comparisons.difference(table, "method", "a", "c"))["holds"] is None
    )
    with pytest.raises(BadInput, match="several rows"):
        comparisons.paired(pd.concat([table, table]), "method", "a", "b")


def difference_of(value, half, seeds=5, **more):
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": 9,
        "seeds": seeds,
        "reason": "",
    } | more


def test_verdicts_are_corrected_for_their_number():
    "By pencil: p = 2 t(4) of value / (half / 2.776); Holm over three of four claims, the fourth has no interval."
    from scipy import stats

    claims = [decided(f"{k}", difference_of(0.2, half)) for k, half in enumerate((0.05, 0.17, 0.19))]
    claims.append(decided("none", difference_of(0.1, 0.1) | {"low": None, "high": None}))
    p = [2 * stats.t.sf(0.2 / half * stats.t.ppf(0.975, 4), 4) for half in (0.05, 0.17, 0.19)]
    assert [c.get("p") for c in claims] == [*map(pytest.approx, p), None]
    found = corrected(claims)
    assert [c["holds"] for c in claims] == [True, True, True, None]
    assert [c["holds"] for c in found] == [True, None, None, None]
    assert (
        found[1]["p_holm"] == pytest.approx(2 * p[1])
        and "not decided as one of 3 claims" in found[1]["remark"]
    )
    assert "corrected for their number (Holm)" in note_on(found)
    assert "0.15 of them would be decided by chance" in note_on(claims)


def test_chance_decides_any_of_a_corrected_family_in_at_most_one_study_of_twenty():
    rng, wrong, uncorrected = np.random.default_rng(0), 0, 0
    from faithful_distill.faithfulness.intervals import across_seeds

    for _ in range(200):
        scores = [across_seeds(rng.normal(0, 0.1, 5)) for _ in range(12)]
        claims = [decided("x", s.to_dict() | {"seeds": 5}) for s in scores]
        uncorrected += any(c["holds"] is not None for c in claims)
        wrong += any(c["holds"] is not None for c in corrected(claims))
    assert wrong <= 18 and uncorrected > 60  # 10 and 92 expected


def test_a_claim_on_all_fails_only_by_what_survives_its_number():
    inside, outside = difference_of(0.0, 0.02), difference_of(0.08, 0.02)
    barely = difference_of(0.08, 0.029)
    many = {f"{k}": inside for k in range(20)}
    decide = lambda scores: decided_of_all("x", scores, -0.05, 0.05)["holds"]
    assert decide(many) is True and decide({}) is None
    assert decide(many | {"wide": difference_of(0.0, 0.2)}) is None
    assert decide({"a": outside}) is False and decide({"a": barely}) is False
    assert decide({f"{k}": barely for k in range(2)} | {"c": difference_of(0.0, 0.2)}) is None


@pytest.mark.parametrize("name", ["claims", "fig01"])
def test_a_pooled_claim_is_split_by_kind_and_what_is_planted_is_called_so(name, tmp_path, monkeypatch):
    "A gain on multiple choice alone shows as one; the mark of what is planted comes from the table's origin."
    level = lambda strategy, kind: 0.9 if strategy != "greedy" and kind == "choice" else 0.6
    rows = [
        {
            "strategy": strategy,
            "seed": seed,
            "metric": f"test.{role}.{kind}.{what}",
            "value": abs(
                level(strategy, kind) + 0.004 * (seed * (1 + len(strategy)) % 5) - (what == "vacuous")
            ),
        }
        for strategy in ("greedy", "contrastive-empty", "contrastive-wrong")
        for role in ("gold", "counterfactual")
        for kind in style.kinds
        for what in ("supports", "vacuous")
        for seed in range(5)
    ]
    folder = _one_table(tmp_path, "rationales", rows)
    for planted in ({}, {"contrastive-empty": "its corpus was made so"}):
        tables.note_origin([folder / "study_rationales.csv"], "9.9", "2026-01-01", "abcdef0", planted)
        _run_again(_figure(name), tmp_path / "out", monkeypatch, folder)
        section = report.read_section(tmp_path / "out")
        claims = [c for c in section.claims if "the right answer, " in c["text"]]
        wrong = {c["text"].split("(")[-1]: c["holds"] for c in claims if "contrastive-wrong" in c["text"]}
        assert [wrong[f"{n} alone)"] for n in style.kinds.values()] == [True, None, None], wrong
        assert wrong["all kinds of questions, pooled)"] is True
        marked = {"planted" in c["text"] + c["remark"] for c in section.claims if "-empty" in c["text"]}
        unmarked = {"planted" in c["text"] + c["remark"] for c in section.claims if "-wrong" in c["text"]}
        assert marked == {bool(planted)} and unmarked == {False}
        assert "version 9.9, commit abcdef0" in section.text and section.note
        assert ("its corpus was made so" in section.text) == bool(planted)


def test_every_stored_figure_says_which_version_its_table_comes_from():
    results = shipped("data", "results")
    read = {
        name
        for path in FIGURES
        for name in re.findall(r"data/results/([\w]+\.csv)", path.read_text(encoding="utf-8"))
    }
    for name in filter(lambda name: (results / name).is_file(), read):
        origin = tables.origin_of(results / name)
        assert origin.keys() >= {"version", "date", "commit"}, f"{name}: note its origin anew"
    for path in FIGURES:
        shown = "".join(
            text for kind, text in _shown(json.loads(path.read_text())["cells"]) if kind == "text"
        )
        if "draft.read(" in path.read_text(encoding="utf-8") and "No results yet" not in shown:
            assert "was made by version" in shown, path.name


def test_a_table_that_was_changed_does_not_pass_for_the_one_whose_origin_is_noted(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n")
    tables.note_origin([tmp_path / "t.csv"], "1", "2026-01-01", "c")
    assert tables.origin_of(tmp_path / "t.csv") == {"version": "1", "date": "2026-01-01", "commit": "c"}
    (tmp_path / "t.csv").write_text("a\n2\n")
    assert tables.origin_of(tmp_path / "t.csv") == {"changed": True}


@pytest.mark.parametrize(
    "low, high, above, holds",
    [
        (0.01, 0.2, 0, True),
        (0.0, 0.2, 0, None),
        (-0.01, 0.2, -0.02, True),
        (-0.2, -0.1, 0, False),
        (-0.2, 0.0, 0, False),
        (0.1, 0.3, 0.2, None),
    ],
)
def test_a_claim_holds_only_if_the_whole_interval_does_and_fails_only_if_none_of_it_does(
    low, high, above, holds
):
    assert (
        decided(
            "x",
            {"value": (low + high) / 2, "low": low, "high": high, "n": 9, "seeds": 5, "reason": ""},
            above,
        )["holds"]
        is holds
    )


def test_a_value_that_few_seeds_have_is_no_value():
    rows = [
        {
            "method": m,
            "seed": s,
            "value": v,
            "low": None,
            "high": None,
            "n": 12,
            "reason": "" if v is not None else "too few",
        }
        for m, values in (("a", (0.5, None, None)), ("b", (0.5, 0.7, None)))
        for s, v in enumerate(values)
    ]
    a, b = comparisons.summarise(pd.DataFrame(rows), ["method"]).to_dict("records")
    assert (
        pd.isna(a["value"])
        and a["seeds"] == 1
        and a["reason"].startswith("defined in 1 of 3 seeds only; too few")
    )
    assert b["value"] == pytest.approx(0.6) and b["seeds"] == 2


def test_numbers_that_are_missing_stay_missing_in_labels_and_in_pools(tmp_path):
    labels = pd.DataFrame(
        {"alpha": ["0.5", "", "1"], "size": ["small", "", "2"], "metric": "x", "value": 0.0}
    )
    tables.write_table(tmp_path / "t.csv", labels)
    read = tables.read_results(tmp_path / "t.csv")
    assert read.alpha.tolist()[::2] == [0.5, 1.0] and pd.isna(read.alpha[1])
    assert read["size"].tolist() == ["small", "", "2"]
    parts = pd.DataFrame(
        {
            "kind": ["a", "b"],
            "seed": 0,
            "value": [0.5, None],
            "low": [0.4, None],
            "high": [0.6, None],
            "n": [10, 0],
            "reason": ["", "empty"],
        }
    )
    assert comparisons.pooled(parts, "kind").n.tolist() == [10]


def test_every_strategy_of_the_teacher_has_a_look_and_a_place():
    from faithful_distill.teacher.strategy import strategies

    assert [name for name in style.strategies if name != "true"] == sorted(
        strategies, key=style.strategies.index
    )
    looks = [style.named_look(name) for name in strategies]
    assert len(set(looks)) == len(looks) and None not in looks


def test_a_second_axis_is_refused_and_never_pooled(tmp_path):
    "A figure by alpha of a grid that varies beta too: its levels ask the same questions, and are no repetitions."
    rows = [
        dict(alpha=a, beta=b, seed=s, metric="accuracy", value=0.5 + a * b, low=0.4, high=0.9, n=8, reason="")
        for a in (0.0, 0.5)
        for b in (0.0, 0.1)
        for s in (0, 1)
    ]
    path = tmp_path / "r.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    draft = report.Draft(tmp_path, "A figure")
    with pytest.raises(BadInput, match=r"varies in beta as well \(0.0, 0.1\).*any_axis"):
        draft.read(path, alpha=0.0, seed=0)
    assert (
        len(draft.read(path, alpha=0.0, beta=0.0, seed=0)) == len(draft.read(path, pooled_by_hand=True)) == 8
    )
    pd.DataFrame(rows)[lambda t: t.beta == 0.1].to_csv(path, index=False)
    assert len(draft.read(path, alpha=0.0, seed=0)) == 4


def test_what_speaks_against_the_method_is_told_apart_and_counted_apart(tmp_path):
    "It is decided like any claim; that it holds is bad news, and is never counted as a claim of the method that holds."
    gap = {"value": 0.1, "low": 0.05, "high": 0.15, "n": 100, "seeds": 1, "reason": ""}
    claims = [against(decided("It costs accuracy", gap)), claim("It is faithful", True)]
    section = report.Section("Students", claims=claims, main=True)
    blocks = [report.sample_block("greedy", "A <b>bird</b>.", "wings", right=True)]
    blocks += [report.sample_block("asked to argue for wings", "")]
    section.samples = [report.sample("What flies?", ["wings", "roots"], 0, {"teacher": blocks, "none": []})]
    page = report.build_report(tmp_path / "r.html", "Title", "Lead.", [section]).read_text()
    words = (
        "Of 1 claim, 1 holds",
        "Of 1 finding that would speak against the method, 1 holds",
        "What speaks against it: It costs accuracy",
        "What was claimed",
        '<span class="verdict yes">✓ holds</span>',
        "It is faithful",
        "What would speak against the method",
        '<span class="verdict no">✓ holds</span>',
        "Examples to browse",
        "A &lt;b&gt;bird&lt;/b&gt;.",
        "(none)",
    )
    at = 0
    for word in words:
        at = page.index(word, at)
    assert page.count("<small>answers</small>") == 1, "a rationale alone is no answer"
    assert "<h4>none</h4>" not in page


def test_a_report_begins_with_its_bottom_line_a_picture_and_what_its_words_mean(tmp_path):
    "Findings against the method are told as plainly as those for it, and terms stand before the verdicts that use them."
    claims = [
        claim("The full method has a higher LAS than greedy CoT", False),
        claim("The swap is followed", True),
    ]
    (tmp_path / "f.png").write_bytes(shipped("data", "results", "quickstart.png").read_bytes())
    section = report.Section(
        "Students", "Text.", [("f", "A caption")], claims=claims, folder=str(tmp_path), main=True
    )
    page = report.build_report(tmp_path / "r.html", "Title", "Lead.", [section]).read_text()
    places = [
        page.index(words)
        for words in (
            "Of 2 claims, 1 holds",
            "What does not hold: The full method has a higher LAS",
            "data:image/png",
            "leakage-adjusted simulatability",
            "What was claimed",
        )
    ]
    assert places == sorted(places)
    assert "vacuous</dt>" not in page and "<dt>full method</dt>" in page
    assert "prefers-color-scheme: dark" in page
    assert (
        bottom_line([]) == ""
        and "What the words mean"
        not in report.build_report(tmp_path / "e.html", "Title", "Lead.").read_text()
    )


def test_an_interval_of_a_share_ends_at_0_and_100_per_cent_and_one_of_a_difference_does_not():
    from faithful_distill.lab.tables import cell_text

    score = {"value": 0.9, "low": 0.7, "high": 1.1, "n": 20, "seeds": 1, "reason": ""}
    assert cell_text(score, percent=True) == "90 % [70, 100], n = 20"
    low = score | {"value": 0.05, "low": -0.1, "high": 0.2}
    assert cell_text(low, percent=True) == "5 % [0, 20], n = 20"
    assert cell_text(low, percent=True, points=True).startswith("5 points [−10, 20]")


def test_training_averages_as_the_seeds_that_decide_say():
    "Per token if it supports more on the fresh seeds, and loses at most 2 points of following and of accuracy."
    from faithful_distill.lab.claims import corrected, decided
    from faithful_distill.lab.comparisons import as_scores, difference
    from faithful_distill.lab.tables import read_table
    from faithful_distill.training.settings import Settings

    table = read_table(shipped("data", "results", "study_objectives.csv"))
    pair = ("counterfactual per token", "counterfactual")
    margins = {"own_supports_own": 0.0, "swap_factual.wrong": -0.02, "accuracy": -0.02}
    claims = []
    for metric, above in margins.items():
        rows = table[table.metric == metric][["objective", "seed", *as_scores]]
        claims.append(decided(metric, difference(rows, "objective", *pair), above))
    better = all(c["holds"] for c in corrected(claims))
    assert Settings().reduction == ("per_token" if better else "per_part")
