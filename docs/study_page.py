"""The study's report as a page of the site: the bottom line, the terms, the verdicts and the pictures, from the notebooks as stored.

Nothing is computed: every line is what a figure notebook shows, and says which version its tables come from."""

import base64
import json
import re
from pathlib import Path

import yaml

verdict_line = re.compile(r"^(holds|does not hold|inconclusive) +(?:\(against ([^)]+)\) )?(.+)$")
origin_line = re.compile(r"^`\S+` (?:was|comes|is) .*$")
holds = {"holds": True, "does not hold": False, "inconclusive": None}


def sections(root: Path) -> list[str]:
    "Names of the figure notebooks of the study's report, in its order."
    grid = yaml.safe_load((root / "data/grids/study.yaml").read_text(encoding="utf-8"))
    return grid["report"]["params"]["sections"]["each"]


def stored(notebook: Path) -> dict:
    "Title, first sentence, pictures (PNG), claims and origins of a figure notebook, as its outputs show them."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    head = "".join(cells[0]["source"]).splitlines()
    outputs = [o for c in cells for o in c.get("outputs", [])]
    lines = [line for o in outputs for line in "".join(o.get("text", [])).splitlines()]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    claims = [
        {"holds": holds[m[1]], "against": m[2] or "", "text": m[3], "word": m[1]}
        for m in filter(None, map(verdict_line.match, lines))
    ]
    return {
        "title": head[0].removeprefix("# "),
        "sentence": next((line[2:] for line in head if line.startswith("> ")), ""),
        "pictures": [base64.b64decode("".join(p)) for p in pictures],
        "claims": claims,
        "origins": [line for line in lines if origin_line.match(line)],
    }


def listed(claims: list[dict]) -> str:
    "Claims as a list, their verdicts in bold."
    return "\n".join(f"- **{c['word']}**: {c['text']}" for c in claims) + "\n"


def study_page(root: Path, pictures: Path) -> str:
    "The page, in Markdown; the pictures are written to the folder `pictures` beside it."
    from faithful_distill.lab.claims import bottom_line, by_side
    from faithful_distill.lab.titles import terms_in

    pictures.mkdir(parents=True, exist_ok=True)
    found = {name: stored(root / f"nbs/figures/{name}.ipynb") for name in sections(root)}
    claims = found["claims"]["claims"]
    short = [
        {**c, "text": ": ".join(c["text"].split(": ")[: 2 if "loss alone" in c["text"] else 1])}
        for c in claims
    ]
    words = terms_in(" ".join(c["text"] for f in found.values() for c in f["claims"]))
    parts = ["# The study's report\n", bottom_line(short) + "\n"]
    parts += ["This page shows the stored pictures and verdicts; each heading leads to its notebook.\n"]
    parts += ["## What the words mean\n", *(f"**{term}**: {meaning}\n" for term, meaning in words.items())]
    for name, f in found.items():
        parts.append(f"## [{f['title']}](pages/figures/{name}.ipynb)\n\n{f['sentence']}\n")
        for k, png in enumerate(f["pictures"], 1):
            file = pictures / f"{name}_{k}.png"
            file.write_bytes(png)
            parts.append(f"![{f['title']}, picture {k}](generated_pictures/{file.name})\n")
        for side, some in by_side(f["claims"]):
            heading = f"**What would speak against {side}:**\n" if side else ""
            parts += [heading, listed(some)]
        parts += ["", *(f"{line}\n" for line in f["origins"])]
        if not f["pictures"] and not f["claims"]:
            parts.append("No results of it are stored with this version.\n")
    return "\n".join(parts)
