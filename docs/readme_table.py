"""Puts the results on real questions into README.md: the short table that figure 14 shows, between two marks.

Run after `make figures`, which calls it."""

import json
import re
from pathlib import Path

root = Path(__file__).resolve().parents[1]
marks = "<!-- from nbs/figures/fig14_real.ipynb -->", "<!-- end -->"
block = re.compile(rf"(?<={re.escape(marks[0])}\n).*(?=\n{re.escape(marks[1])})", re.DOTALL)


def stored(root: Path = root) -> str:
    "The table as figure 14 shows it."
    notebook = json.loads((root / "nbs/figures/fig14_real.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if '"readme.md"' in "".join(c["source"]))
    shown = [o["data"]["text/markdown"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
    return "".join(shown[0])


def with_table(readme: str, table: str) -> str:
    "README.md with the table between the marks, which must be there."
    text, n = block.subn(lambda _: table, readme)
    if n != 1:
        raise SystemExit(f"README.md must hold once: {marks[0]} ... {marks[1]}")
    return text


if __name__ == "__main__":
    file = root / "README.md"
    file.write_text(with_table(file.read_text(encoding="utf-8"), stored()), encoding="utf-8")
