"""Puts results into README.md as the notebooks show them, each between two marks.

Run after `make figures`, which calls it."""

import json
import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
cells = {
    "nbs/figures/fig02_students.ipynb": "of_last",
    "nbs/figures/fig05_swap.ipynb": "in after_prefix}",
    "nbs/figures/claims.ipynb": "sides.append",
    "nbs/figures/fig13_calibration.ipynb": "in_short = ",
    "nbs/figures/fig14_real.ipynb": '"readme.md"',
}


def stored(notebook: str, root: Path = root) -> str:
    "What the cell of a notebook shows that is meant for the README."
    found = json.loads((root / notebook).read_text(encoding="utf-8"))
    cell = next(c for c in found["cells"] if cells[notebook] in "".join(c["source"]))
    shown = [o["data"]["text/markdown"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
    return "".join(shown[-1])


def with_table(readme: str, table: str, notebook: str) -> str:
    "README.md with the table between the notebook's marks, which must be there."
    first, last = f"<!-- from {notebook} -->", "<!-- end -->"
    block = re.compile(rf"(?<={re.escape(first)}\n).*?(?=\n{re.escape(last)})", re.DOTALL)
    text, n = block.subn(lambda _: table, readme)
    if n != 1:
        raise SystemExit(f"README.md must hold once: {first} ... {last}")
    return text


if __name__ == "__main__":
    file = root / "README.md"
    text = file.read_text(encoding="utf-8")
    for notebook in cells:
        text = with_table(text, stored(notebook), notebook)
    file.write_text(text, encoding="utf-8")
