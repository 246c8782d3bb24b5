"""The whole pipeline at a size of seconds: rationales, students, evaluation, figures, report; the second time
nothing is computed."""

import json
import re

from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.lab.study import reproduce


def test_the_pipeline_end_to_end(tmp_path):
    first = CliRunner().invoke(main, ["reproduce", "--profile", "smoke", "--runs", str(tmp_path)])
    assert first.exit_code == 0, first.output
    page = (tmp_path / "smoke" / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"data:image/(?:png|svg\+xml);base64,", page)) >= 3 and not re.search(
        r"(src|href)=[\"']https?:", page
    )
    metrics = json.loads((tmp_path / "smoke" / "metrics.json").read_text())
    evaluated = {name: m for name, m in metrics.items() if name.startswith("evaluation")}
    assert len(evaluated) == 3
    for m in evaluated.values():
        for name, score in m.items():
            if isinstance(score, dict) and "value" in score:
                assert score["value"] is not None or score["reason"], name
        assert m["n"] == 16
    again = reproduce("smoke", runs=tmp_path)
    assert again.ok and {o.state for o in again.outcomes} == {"there"}
