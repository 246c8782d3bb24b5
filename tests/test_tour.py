"The tour's tables are what the pages say: after a page's title or first sentence changed, run nbs/index.ipynb anew."

import ast
import json

from faithful_distill.files import shipped


def last_value(source, names):
    "Run a cell, and give the value of its last expression."
    *before, last = ast.parse(source).body
    exec(compile(ast.Module(before, []), "index.ipynb", "exec"), names)
    return eval(compile(ast.Expression(last.value), "index.ipynb", "eval"), names)


def test_the_tour_lists_the_pages_as_they_are():
    cells = json.loads(shipped("nbs", "index.ipynb").read_text(encoding="utf-8"))["cells"]
    names, tables = {"shipped": shipped}, 0
    for cell in cells:
        stored = [
            o["data"]["text/markdown"]
            for o in cell.get("outputs", [])
            if "text/markdown" in o.get("data", {})
        ]
        for text in stored:
            tables += 1
            assert last_value("".join(cell["source"]), names).data == "".join(text), (
                "run nbs/index.ipynb anew"
            )
    assert tables == 3
