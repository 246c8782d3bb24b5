"Rationales in other words: read from a file, asked of a server, and the control over them."

import json

import pytest
from click.testing import CliRunner

from faithful_distill.cli import main
from faithful_distill.faithfulness.paraphrases import Paraphrases, read_paraphrases, with_paraphrases
from faithful_distill.faithfulness.suite import measure_suite
from faithful_distill.files import BadInput, shipped
from faithful_distill.lab.world import world_questions
from faithful_distill.reasoners.protocol import Scripted


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, field",
    [
        (dict(rationale="a"), "paraphrase"),
        (dict(paraphrase="a"), "rationale"),
        (dict(rationale="a", paraphrase=None), "paraphrase"),
        (dict(rationale=["a"], paraphrase="b"), "rationale"),
        (dict(rationale=" It  swims.\n", paraphrase="Swimming."), "paraphrase"),
    ],
)
def test_a_file_of_paraphrases_says_what_is_wrong_and_where(tmp_path, row, field):
    file = lines(tmp_path / "p.jsonl", dict(rationale="It swims.", paraphrase="It is a swimmer."), row)
    with pytest.raises(BadInput, match=f"p.jsonl:2: field '{field}'"):
        read_paraphrases(file)


def test_the_control_tells_a_reader_of_meaning_from_a_reader_of_words(tmp_path):
    "One reader copies what is named, the other answers by whether the text is the one it wrote."
    questions = world_questions("choice", "dev", limit=12)
    write = lambda q: f"It is {q.choices[q.answer]}, they say."
    other = lambda text: text.replace("It is", "That must be").replace(", they say", "")
    by_meaning = measure_suite(
        Scripted(True, write=write), questions, metrics=["paraphrased", "permuted"], paraphrases=other
    )
    assert by_meaning.scores["paraphrased_same"].value == 1.0
    assert by_meaning.scores["paraphrased"].value == 0.0

    class ByWords(Scripted):
        def read(self, questions, rationales):
            return super().read(questions, [r if r.startswith("It is") else "" for r in rationales])

    by_words = measure_suite(
        ByWords(True, write=write), questions, metrics=["paraphrased"], paraphrases=other
    ).scores
    assert by_words["paraphrased_same"].value < 0.6 and by_words["paraphrased_same"].n == 12
    none = measure_suite(Scripted(True, write=write), questions, metrics=["paraphrased"]).scores[
        "paraphrased"
    ]
    assert none.value is None and "--paraphrases" in none.reason


def test_rationales_without_a_paraphrase_are_left_out_and_counted(tmp_path, caplog):
    file = lines(
        tmp_path / "p.jsonl", dict(rationale="a b", paraphrase="c"), dict(rationale="d", paraphrase="d")
    )
    with caplog.at_level("INFO", logger="faithful_distill"):
        assert Paraphrases(file).all(["a  b", "", "x", "d"]) == ["c", "", None, "d"]
    assert "2 of 3 rationales have a paraphrase, 1 of them the same words" in caplog.text
    assert with_paraphrases(("perturb", "controls"), file)[1:] == ["perturb", "controls"]


def test_by_command_measured_once_more_with_paraphrases(tmp_path):
    teacher = str(shipped("data", "models", "teacher"))
    asked = ["measure", "--model", teacher, "--style", "worked", "--data", "world-choice", "--limit", "3"]
    asked += ["--max-new-tokens", "8", "--draws", "1", "--out", str(tmp_path / "o"), "--metrics"]
    first = CliRunner().invoke(main, [*asked, "permuted"])
    assert first.exit_code == 0, first.output
    rows = [json.loads(line) for line in (tmp_path / "o" / "rows.jsonl").read_text().splitlines()]
    own = {row["arms"]["own"]["rationale"] for row in rows}
    file = lines(tmp_path / "p.jsonl", *(dict(rationale=r, paraphrase=f"Indeed {r}") for r in own))
    again = CliRunner().invoke(main, [*asked, "permuted,paraphrased", "--paraphrases", str(file)])
    assert again.exit_code == 0, again.output
    assert f"{len(own)} answers computed" in again.output
    scores = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert scores["paraphrased_same"]["n"] == 3
    lost = CliRunner().invoke(main, [*asked, "paraphrased", "--paraphrases", str(tmp_path / "nowhere.jsonl")])
    assert lost.exit_code == 2 and "nowhere.jsonl" in lost.output and "Traceback" not in lost.output


def test_a_server_writes_them_each_once(tmp_path):
    pytest.importorskip("openai")
    from faithful_distill.lab.loopback import serve_locally
    from faithful_distill.teacher.loading import load_teacher

    asked = []

    def reworded(body, response):
        if "messages" not in body:
            return response
        text = body["messages"][-1]["content"].rsplit("\n\n", 1)[1]
        asked.append(text)
        choice = response["choices"][0]
        choice["message"]["content"] = f"  In other words:\n{text} "
        choice["finish_reason"] = "length" if text == "cut" else "stop"
        return response

    with serve_locally(load_teacher(shipped("data", "models", "teacher")), reworded) as url:
        found = Paraphrases(url, cache=tmp_path / "asked.jsonl").all(["a b", "cut", "a b", ""])
        assert found == ["In other words: a b", None, "In other words: a b", ""]
        assert sorted(asked) == ["a b", "cut"]
        Paraphrases(url, cache=tmp_path / "asked.jsonl").all(["a b"])
    assert len(asked) == 2
