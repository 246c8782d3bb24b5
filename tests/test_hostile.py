"Data that wants to be run: no script, handler or link of its own in a report or a model card, seen in a browser."

import json
import re
import shutil
import subprocess

import mistune
import pytest

from faithful_distill.lab import report, tables
from faithful_distill.lab.claims import claim

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

RUN = "document.documentElement.dataset.ran=1"
HOSTILE = [
    f"<script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f"<svg onload={RUN}>",
    f'"><details open ontoggle={RUN}>',
    f"</title></style></table><script>{RUN}</script>",
    f'[b](https://x/`" autofocus tabindex=1 onfocus={RUN} x="`)',
    f'[b](https://x" autofocus onfocus="{RUN})',
    f"[b](javascript:{RUN})",
    f"[b](JaVa&#115;cript&colon;{RUN})",
    f"[b](&#1;javascript:{RUN})",
    f"<javascript:{RUN}>",
    f"![b](javascript:{RUN})",
    f'![x](x"onerror={RUN})',
    f"[b][c]\n\n[c]: javascript:{RUN}",
    f'``` "onmouseover={RUN}\nx\n```',
    f"`<img src=x onerror={RUN}>",
    f"| a |\n|---|\n| <img src=x onerror={RUN}> |",
    f"\0{0}\0<img src=x onerror={RUN}>\u00007\0",
    f"{{{{ 7 * 191 }}}}{{% raw %}}<script>{RUN}</script>",
    f"`\n---\ntags: [evil]\n---\n<iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"<a href='javascript:{RUN}'>\ud800</a>",
]
TRY_ALL = """<script>
for (const a of document.querySelectorAll("a")) if (!/^https?:/.test(a.href)) a.click();
for (const e of document.querySelectorAll("body *")) e.dispatchEvent(new Event("mouseover"));
</script>"""


def ran(page: str, folder) -> bool:
    "Whether anything in a page runs, loaded in a browser that clicks whatever leads nowhere on the net."
    file = folder / "tried.html"
    file.write_text(page + TRY_ALL, encoding="utf-8", errors="replace")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    assert "</html>" in dom, "the browser has not loaded the page"
    return re.search("<html[^>]*data-ran", dom) is not None


def without_policy(page: str) -> str:
    "A page that rests on its escapes alone."
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    assert bare != page
    return bare


def hostile_report(path):
    everything = " ".join(HOSTILE)
    table = tables.markdown_table([["a", "b"], *([x, x] for x in HOSTILE)])
    path.parent.mkdir(exist_ok=True)
    (path.parent / "table.md").write_text(table, errors="replace")
    section = report.Section(
        everything,
        "\n\n".join(HOSTILE),
        tables=[("table", everything)],
        claims=[claim(x, None, remark=x) for x in HOSTILE],
        folder=str(path.parent),
    )
    facts = dict(zip(HOSTILE, HOSTILE))
    return report.build_report(path, everything, everything, [section] * 3, facts=facts, footer=everything)


@browser
def test_nothing_in_a_report_runs_whatever_its_texts(tmp_path, monkeypatch):
    page = hostile_report(tmp_path / "a" / "r.html").read_text(encoding="utf-8")
    assert "1337" not in page and "\0" not in page
    assert not ran(without_policy(page), tmp_path)
    unescaped = mistune.Markdown(mistune.HTMLRenderer(escape=False))
    monkeypatch.setattr(report, "_markdown", unescaped)
    page = hostile_report(tmp_path / "b" / "r.html").read_text(encoding="utf-8")
    assert ran(without_policy(page), tmp_path), "the test must see a script that runs"


@browser
def test_nothing_in_the_report_of_a_scored_file_runs(tmp_path):
    from faithful_distill.faithfulness.scoring import score_rationales
    from faithful_distill.lab.score_report import write_scored

    whole = [x.replace("\ud800", "") for x in HOSTILE]
    rows = [
        {"id": x, "question": x, "choices": ["yes" + x, "no"], "prediction": 0, "rationale": x, "rating": i}
        for i, x in enumerate(whole)
    ]
    for i, model in enumerate((whole[5], whole[1])):
        scored = score_rationales([r | {"model": model} for r in rows], metrics=["ratings", "interventions"])
        page = write_scored(scored, tmp_path / str(i), f"Rationales of {whole[i]}").read_text(
            encoding="utf-8"
        )
        assert not ran(without_policy(page), tmp_path)


def test_text_of_data_is_shown_as_it_is():
    for x in HOSTILE:
        shown = report.prose(report.literal(x))
        assert re.findall(r"<\w+", shown) == ["<p"], x


def hostile_note(x):
    from faithful_distill.training.settings import Settings

    return dict(
        base=x,
        steps=3,
        best_step=2,
        metrics={x: x},
        measured={f"las ({x}, dev)": dict(value=None, n=0, reason=x)},
        rows=dict(factual=5, counterfactual=4, shortened=x),
        data=dict(questions=x, teachers=[x, x]),
        engine={"precision": x, "ZeRO stage": x, "processes": 1},
        **Settings().model_dump(exclude={"precision"}) | {"recipe": x},
    )


@pytest.mark.parametrize("x", HOSTILE)
def test_a_card_has_its_own_front_matter_lines_and_cells_only(x):
    from faithful_distill.training.card import card_text

    plain, card = (card_text(hostile_note(base), data=base) for base in ("a", x))
    assert card.count("\n") == plain.count("\n") and card.count("|") == plain.count("|")
    assert card.split("---\n")[1] == plain.split("---\n")[1] and "evil]\n" not in card
    assert card.count("`") == plain.count("`") and not re.search(r"<|\]\(", card)
    json.dumps(card).encode()


@browser
def test_nothing_in_a_card_runs_in_a_viewer_that_trusts_it(tmp_path, monkeypatch):
    from faithful_distill.training import card

    trusting = mistune.Markdown(mistune.HTMLRenderer(escape=False))
    pages = lambda: "<html>" + "".join(trusting(card.card_text(hostile_note(x), data=x)) for x in HOSTILE)
    assert not ran(pages(), tmp_path)
    monkeypatch.setattr(card, "inert", lambda value: value)
    assert ran(pages(), tmp_path), "the test must see a script that runs"
