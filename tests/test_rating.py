"Rating rationales blind: the form in a real browser, what it saves, and what is made of it."

import json
import re
import shutil
import subprocess

import pytest

from faithful_distill.faithfulness.external import read_rationales
from faithful_distill.files import BadInput
from faithful_distill.lab import rating

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
EVIL = "</script><img src=x onerror=document.documentElement.dataset.ran=1> & 'quotes' \u2028"


def rows(name, n=6):
    asked = lambda i: dict(question=f"Where is {i}? {EVIL}", choices=["here", "there <b>"])
    return [
        asked(i) | dict(id=f"{name}-{i}", prediction=i % 2, rationale=f"It is so {name[:1]}. {EVIL}")
        for i in range(n)
    ]


def loaded(page: str, folder, driver: str = "") -> str:
    "The page as it stands in a browser once the driver has run."
    file = folder / "tried.html"
    file.write_text(page + (f"<script>{driver}</script>" if driver else ""), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    assert "</html>" in dom, "the browser has not loaded the page"
    return dom


RATE_ALL = """
const saved = [], make = URL.createObjectURL;
URL.createObjectURL = (blob) => { blob.text().then((t) => saved.push(t) && (document.documentElement.dataset.saved = encodeURIComponent(t))); return make(blob); };
HTMLAnchorElement.prototype.click = function () { document.documentElement.dataset.file = this.download; };  // no download
at("rater").value = "Ada B";
at("rater").dispatchEvent(new Event("input"));
at("start").click();
at("next").click();  // nothing is marked yet
document.documentElement.dataset.refused = at("note").textContent;
const shown = [];
for (let k = 0; k < data.items.length; k++) {
  shown.push(at("rationale").textContent);
  document.querySelectorAll("#marks fieldset").forEach((box, j) => box.querySelectorAll("input")[(k + j) % 3].click());
  at("next").click();
}
document.documentElement.dataset.shown = shown.length;
document.documentElement.dataset.images = document.querySelectorAll("img").length;
document.documentElement.dataset.kept = localStorage.length;
"""


@browser
def test_the_form_is_filled_in_and_saves_what_score_reads(tmp_path):
    methods = {"Contrastive": rows("c"), "Greedy": rows("g")}
    form = rating.write_rating_form(methods, tmp_path / "study", title=f"Study {EVIL}")
    page = form.read_text(encoding="utf-8")
    assert not re.search("contrastive|greedy|[cg]-[0-9]", page, re.IGNORECASE)
    bare = re.sub(r"<meta http-equiv=[^>]*>", "", page)
    assert bare != page
    dom = loaded(bare, tmp_path, RATE_ALL)
    attribute = lambda name: re.search(f'<html[^>]*data-{name}="([^"]*)"', dom)[1]
    assert "mark every line" in attribute("refused") and attribute("shown") == "12"
    assert attribute("images") == "0" and attribute("kept") == "1" and "data-ran" not in dom
    assert attribute("file") == "ratings-Ada-B.jsonl"
    from urllib.parse import unquote

    saved = tmp_path / "ratings-ada.jsonl"
    saved.write_text(unquote(attribute("saved")), encoding="utf-8")
    key = tmp_path / "study" / "key.json"
    marks = rating.read_marks([saved], key)
    assert {name: len(items) for name, items in marks.items()} == {
        "supports": 12,
        "informative": 12,
        "sound": 12,
    }
    assert {rater for items in marks.values() for given in items.values() for rater in given} == {"Ada B"}
    written = rating.write_rated(marks, key, "supports", tmp_path / "rated")
    assert [p.name for p in sorted(written)] == ["Contrastive.jsonl", "Greedy.jsonl"]
    read = read_rationales(sorted(written)[0])
    assert len(read) == 6 and {b.ratings[0] for b in read} <= {0.0, 1.0, 2.0}
    assert {b.question.id for b in read} == {f"c-{i}" for i in range(6)}


@browser
def test_the_form_runs_under_its_own_policy_and_no_other_script_does(tmp_path):
    page = rating.write_rating_form({"a": rows("a", 2)}, tmp_path / "study").read_text(encoding="utf-8")
    probe = "document.documentElement.dataset.ran=1"
    dom = loaded(page.replace("</main>", f"</main><p id=probe></p><script>{probe}</script>"), tmp_path)
    assert re.search('<html[^>]*data-ready="yes"', dom), "the page's own script must run"
    assert not re.search("<html[^>]*data-ran", dom)
    changed = page.replace('let rater = ""', 'let other = 1, rater = ""')
    assert not re.search("<html[^>]*data-ready", loaded(changed, tmp_path)), (
        "a changed script must be refused"
    )


def study(tmp_path, n=8):
    methods = {"A": rows("a", n), "B": rows("b", n)}
    rating.write_rating_form(methods, tmp_path)
    return json.loads((tmp_path / "key.json").read_text())


def saved(tmp_path, known, rater, mark):
    lines = [
        dict(study=known["study"], code=c, rater=rater, marks={"supports": mark(of)})
        for c, of in known["items"].items()
    ]
    path = tmp_path / f"ratings-{rater}.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_preference_is_between_rationales_to_one_question(tmp_path):
    known = study(tmp_path)
    files = [saved(tmp_path, known, r, lambda of: 2 if of["method"] == "A" else 1) for r in ("x", "y")]
    [one] = [
        p
        for p in rating.preferences(rating.read_marks(files, tmp_path / "key.json"), tmp_path / "key.json")
        if p.criterion == "supports"
    ]
    assert (one.better, one.worse, one.share.value, one.share.n, one.means, one.holds) == (
        "A",
        "B",
        1.0,
        8,
        (2.0, 1.0),
        True,
    )
    ties = [saved(tmp_path, known, r, lambda of: 1) for r in ("x", "y")]
    [even] = rating.preferences(
        {"supports": rating.read_marks(ties, tmp_path / "key.json")["supports"]}, tmp_path / "key.json"
    )
    assert even.share.value == 0.5 and even.holds is None
    agreed = rating.rater_agreement(
        rating.read_marks(files, tmp_path / "key.json"), tmp_path / "key.json", draws=200
    )
    assert agreed["supports"]["ac2"].value == 1.0


def test_a_question_is_one_whatever_the_order_of_its_choices(tmp_path):
    turned = [
        r | dict(choices=r["choices"][::-1], question=r["question"].upper().replace("QUOTES", "quotes"))
        for r in rows("b", 6)
    ]
    rating.write_rating_form({"A": rows("a", 6), "B": turned}, tmp_path)
    known = json.loads((tmp_path / "key.json").read_text())
    marks = rating.read_marks([saved(tmp_path, known, "x", lambda of: 1)], tmp_path / "key.json")
    assert {
        p.share.n for p in rating.preferences({"supports": marks["supports"]}, tmp_path / "key.json")
    } == {6}


def test_only_questions_of_all_methods_are_asked_and_codes_tell_nothing(tmp_path):
    items, key = rating.blind_items({"A": rows("a", 8), "B": rows("b", 5)}, seed=3)
    assert len(items) == 10 and {of["method"] for of in key.values()} == {"A", "B"}
    assert set(items[0]) == {"code", "question", "choices", "rationale", "answer"}
    assert rating.blind_items({"A": rows("a", 8), "B": rows("b", 5)}, seed=3)[0] == items
    assert [i["code"] for i in rating.blind_items({"A": rows("a", 8), "B": rows("b", 5)}, seed=4)[0]] != [
        i["code"] for i in items
    ]
    with pytest.raises(BadInput, match="have no question in common"):
        rating.blind_items({"A": rows("a", 2), "B": [dict(r, question="Else?") for r in rows("b", 1)]})


BAD = {
    "another study": (dict(study="other"), "field 'study': is another study"),
    "unknown code": (dict(code="zzz"), "field 'code': is not in the key"),
    "unknown mark": (dict(marks={"supports": 7}), "field 'marks.supports': is no mark of this form"),
    "unknown criterion": (dict(marks={"taste": 1}), "field 'marks.taste': is no mark of this form"),
    "no rater": (dict(rater=None), "field 'rater': is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_form_has_not_saved_is_one_line(tmp_path, name):
    known = study(tmp_path, 2)
    changed, says = BAD[name]
    row = (
        dict(study=known["study"], code=next(iter(known["items"])), rater="x", marks={"supports": 1})
        | changed
    )
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({k: v for k, v in row.items() if v is not None}))
    with pytest.raises(BadInput, match=rf"r.jsonl:1: {says}"):
        rating.read_marks([file], tmp_path / "key.json")


def test_a_rater_who_marks_twice_differently_is_told(tmp_path):
    known = study(tmp_path, 2)
    first = saved(tmp_path, known, "x", lambda of: 1)
    again = tmp_path / "again.jsonl"
    again.write_text(first.read_text())
    assert rating.read_marks([first, again], tmp_path / "key.json")["supports"]
    again.write_text(first.read_text().replace('"supports": 1', '"supports": 2'))
    with pytest.raises(BadInput, match="again.jsonl:1: field 'code': is marked twice"):
        rating.read_marks([first, again], tmp_path / "key.json")


def test_two_methods_that_would_share_a_file_and_a_key_that_is_none_are_refused(tmp_path):
    folder = tmp_path / "form"
    rating.write_rating_form({"full method": rows("a", 2), "full-method": rows("b", 2)}, folder)
    key = folder / "key.json"
    known = json.loads(key.read_text())
    name = next(iter(known["criteria"]))
    mark = next(iter(known["criteria"][name]))
    saved = [
        {"study": known["study"], "code": code, "rater": "r", "marks": {name: mark}}
        for code in known["items"]
    ]
    file = tmp_path / "marks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in saved))
    marks = rating.read_marks([file], key)
    with pytest.raises(BadInput, match="would both be written"):
        rating.write_rated(marks, key, name, tmp_path / "rated")
    file.write_text(json.dumps(saved[0] | {"marks": 3}) + "\n")
    with pytest.raises(BadInput, match="must be an object"):
        rating.read_marks([file], key)
    for text in ("{}", "no JSON", None):
        key.unlink() if text is None else key.write_text(text)
        with pytest.raises(BadInput, match="is no key of a form"):
            rating.read_marks([file], key)
