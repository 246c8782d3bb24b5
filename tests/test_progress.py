"""Progress where no bar can move: lines, with the time left, and none for what is soon over."""

import time

from faithful_distill import progress as module


def test_a_pipe_gets_lines_with_the_time_left(monkeypatch, capsys):
    monkeypatch.delenv("FAITHFUL_DISTILL_PROGRESS", raising=False)
    monkeypatch.setattr(module, "shows_progress", lambda: False)
    list(module.progress(range(3), desc="quick"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_between_lines", 0.01)
    for _ in module.progress(range(4), desc="slow", unit="q"):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("slow: ") and line.endswith(" to go") for line in lines)
    assert "\r" not in "".join(lines) and "/4 q" in lines[0]
    monkeypatch.setenv("FAITHFUL_DISTILL_PROGRESS", "0")
    for _ in module.progress(range(4), desc="slow"):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""
