"""Bad input of many kinds: one clear error, nothing of the user's replaced, nothing silently wrong."""

import gzip
import http.server
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import faithful_distill
from faithful_distill import rationalize
from faithful_distill.exchange import import_rationales
from faithful_distill.faithfulness.external import read_rationales
from faithful_distill.faithfulness.numeric import as_number
from faithful_distill.files import BadInput, write_json
from faithful_distill.formats import read_rows, rows_of
from faithful_distill.ownership import own_folder, own_lines, write_card
from faithful_distill.publishing import publish_rationales
from faithful_distill.question_rows import as_questions
from faithful_distill.questions import Question
from faithful_distill.reasoners.cached import CachedReasoner
from faithful_distill.reasoners.protocol import FunctionReasoner
from faithful_distill.reasoners.served import label_scores
from faithful_distill.records import read_records, write_records
from faithful_distill.served import ServedModel
from faithful_distill.sources import load_questions
from faithful_distill.stated import stated_choice
from faithful_distill.student.answers import Answer
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.training.card import model_card

Q = Question("q1", "What flies?", ("a bird", "a cup"), 0)
ROW = dict(id="q1", question="What flies?", choices=["a bird", "a cup"], answer=0, rationale="It has wings.")
OURS = dict(ROW, kind="choice", split="", dataset="", explanation="")
del OURS["rationale"]


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# What is not ours is not replaced


def test_a_command_writes_again_what_it_wrote_and_nothing_else(tmp_path):
    own_folder(tmp_path, "score", ["metrics.json"])
    write_json(tmp_path / "metrics.json", {})
    assert own_folder(tmp_path, "score", ["metrics.json"]) == tmp_path
    with pytest.raises(BadInput, match="of something else"):
        own_folder(tmp_path, "evaluate", ["metrics.json"])
    with pytest.raises(BadInput, match="read as input"):
        own_folder(tmp_path, "score", ["metrics.json"], [str(tmp_path / "metrics.json")])
    own_folder(tmp_path, "score", ["report.html"])
    own_folder(tmp_path, "score", ["metrics.json", "report.html"])  # both calls' names are known


@pytest.mark.parametrize("there", ["my notes\n", '{"mine": 1}\n', "[1]\n"])
def test_a_list_of_bad_records_replaces_neither_the_data_nor_another_file(tmp_path, there):
    data, other = written(tmp_path / "q.jsonl", OURS, {"bad": 1}), tmp_path / "notes.txt"
    other.write_text(there)
    for target in (data, other):
        before = target.read_bytes()
        with pytest.raises(BadInput, match="would be replaced"):
            load_questions(str(data), skip_bad=str(target))
        assert target.read_bytes() == before
    rejected = tmp_path / "rejected.jsonl"
    for _ in range(2):  # its own list is written anew
        assert len(load_questions(str(data), skip_bad=str(rejected))) == 1
    assert json.loads(rejected.read_text())["line"] == 2


def test_records_are_not_written_over_their_source_or_another_text(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    source, thesis = written(tmp_path / "r.jsonl", ROW), tmp_path / "thesis.tex"
    thesis.write_text("mine")
    for target in (source, thesis):
        before = target.read_bytes()
        done = CliRunner().invoke(main, ["import", str(source), "--out", str(target)])
        assert done.exit_code == 2 and "would be replaced" in done.output
        assert target.read_bytes() == before
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        assert CliRunner().invoke(main, ["import", str(source), "--out", str(out)]).exit_code == 0


def test_publishing_again_loses_nothing_when_it_fails(tmp_path):
    folder, records = tmp_path / "pub", [ROW, dict(ROW, target=1, rationale="It is flung.")]
    publish_rationales(records, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for wrong in (dict(ROW, note=float("nan")), dict(ROW, prompt=["x"]), dict(ROW, version={})):
        with pytest.raises(BadInput):
            publish_rationales([wrong], folder)
    with pytest.raises(BadInput, match="read as input"):
        publish_rationales(folder / "gold.jsonl", folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "lineage.json").write_text('{"of": "faithful_distill"}')
    (foreign / "README.md").write_text("mine")
    with pytest.raises(BadInput, match="of something else"):
        publish_rationales(records, foreign)


def test_a_card_that_was_changed_by_hand_is_left(tmp_path, caplog):
    write_card(tmp_path, "# A student\n")
    write_card(tmp_path, "# The same student\n")
    assert "# The same student" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# The same student\n\nMy own words.\n")
    write_card(tmp_path, "# A student\n")
    assert "My own words." in (tmp_path / "README.md").read_text() and "changed by hand" in caplog.text
    assert model_card.__doc__


# Files and rows


@pytest.mark.parametrize("more", ["\n[]", " garbage", '\n{"id": 2}'])
def test_text_after_a_json_array_is_an_error(tmp_path, more):
    (tmp_path / "q.json").write_text(json.dumps([OURS]) + more)
    with pytest.raises(BadInput, match="text after its JSON array"):
        list(read_rows(tmp_path / "q.json"))
    (tmp_path / "q.json").write_text(json.dumps([OURS]) + " \n\n")
    assert len(list(read_rows(tmp_path / "q.json"))) == 1


def test_a_file_packed_twice_and_a_pipe_are_named_as_such(tmp_path):
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(gzip.compress(b"{}\n")))
    with pytest.raises(BadInput, match="packed twice"):
        list(read_rows(tmp_path / "q.jsonl.gz"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadInput, match="no plain file"):
        read_rationales(tmp_path / "pipe.jsonl")


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    table = pa.table([["a"], ["b"]], names=["question", "question"])
    parquet.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(BadInput, match="names a column twice"):
        list(read_rows(tmp_path / "q.parquet"))


@pytest.mark.parametrize("n", [2, 9, 12])
@pytest.mark.parametrize("named", ["choice{}", "option_{}", "letters"])
def test_all_columns_of_choices_are_read(n, named):
    names = [chr(ord("A") + i) if named == "letters" else named.format(i + 1) for i in range(n)]
    row = dict(question="Which?", answer="x0") | {name: f"x{i}" for i, name in enumerate(names)}
    [q] = as_questions([row])
    assert q.choices == tuple(f"x{i}" for i in range(n))
    [beside] = as_questions([row | {"q": "no choice"}]) if named == "letters" and n < 12 else [q]
    assert beside.choices == q.choices


@pytest.mark.parametrize(
    "field, value", [("id", 7), ("dataset", 5), ("explanation", ["x"]), ("choices", "abc")]
)
def test_a_row_with_all_our_fields_is_checked_like_any_other(field, value):
    if field == "choices":
        with pytest.raises(BadInput):
            as_questions(load_questions([OURS | {field: value}]))
        [q] = as_questions(load_questions([OURS | {"choices": {"A": "x", "B": "y"}}]))
        assert q.choices == ("x", "y")
    else:
        try:
            [q] = as_questions(load_questions([OURS | {field: value}]))
        except BadInput:
            return
        assert all(isinstance(getattr(q, name), str) for name in ("id", "dataset", "explanation"))


def test_a_slice_of_a_dataset_is_rows():
    found = load_questions([OURS, OURS | {"id": "q2"}])
    assert [q.id for q in as_questions(rows_of(found[:2]))] == ["q1", "q2"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("note", float("inf")),
        ("growth", [float("nan")]),
        ("alpha", float("nan")),
        ("note", {1, 2}),
        ("teacher", 5),
    ],
)
def test_what_cannot_be_written_is_refused_when_it_is_read(tmp_path, field, value):
    with pytest.raises(BadInput) as e:
        read_records([ROW | {field: value}])
    assert e.value.field == field


def test_dates_of_a_table_are_kept_as_texts(tmp_path):
    from datetime import date

    [r] = read_records([ROW | {"when": date(2020, 1, 2)}])
    write_records(tmp_path / "r.jsonl", [r])
    assert json.loads((tmp_path / "r.jsonl").read_text())["when"] == "2020-01-02"


def test_two_fields_for_the_answer_must_agree():
    assert read_records([ROW | {"gold": "a bird"}])[0].answer == 0
    for other in ({"gold": "a cup"}, {"answerKey": "B"}, {"gold": 1}):
        with pytest.raises(BadInput, match="another field gives"):
            read_records([ROW | other])
    unnamed = {k: v for k, v in ROW.items() if k != "answer"}
    assert read_records([unnamed | {"gold": "a bird", "answerKey": "A"}])[0].answer == 0
    with pytest.raises(BadInput, match="another field gives"):
        read_records([unnamed | {"gold": "a bird", "answerKey": "B"}])


def test_answers_inside_very_many_wrappings_are_read_at_all():
    deep = "\\text{" * 5 + "a bird" + "}" * 5
    assert stated_choice(Q, f"So the answer is {deep}.") == 0
    assert stated_choice(Q, "The answer is " + "$" * 50_000) is None
    assert stated_choice(Q, "The answer is " + "\\text{" * 5_000 + "a" + "}" * 5_000) is None


# Rationales of others


def test_score_reads_tables(tmp_path):
    text = (
        'question,A,B,prediction,gold,rationale,rating\nWhat flies?,a bird,a cup,A,B,It has wings.,"[3, 4]"\n'
    )
    (tmp_path / "t.csv").write_text(text)
    [r] = read_rationales(tmp_path / "t.csv")
    assert (r.question.choices, r.prediction, r.gold, r.ratings) == (("a bird", "a cup"), 0, 1, (3.0, 4.0))
    (tmp_path / "u.csv").write_text("question,choices,rationale\nWhat flies?,a bird|a cup,It has wings.\n")
    assert read_rationales(tmp_path / "u.csv")[0].question.choices == ("a bird", "a cup")


def test_score_takes_columns_of_other_names(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    table = tmp_path / "theirs.csv"
    table.write_text(
        "q,first,second,why,key\nWhat flies?,a bird,a cup,It has wings. So the answer is (a).,0\n"
    )
    asked = ["score", str(table), "--metrics", "ratings", "--out", str(tmp_path / "o"), "--columns"]
    done = CliRunner().invoke(main, [*asked, "question=q,choices=first+second,rationale=why,gold=key"])
    assert done.exit_code == 0, done.output
    [row] = [json.loads(line) for line in open(tmp_path / "o" / "scores.jsonl")]
    assert (row["prediction"], row["gold"]) == (0, 0)
    done = CliRunner().invoke(main, [*asked, "question=q,choices=first+second,rationale=wyh,gold=key"])
    assert (
        done.exit_code and "theirs.csv:2: field 'columns': there is no such column (got 'wyh')" in done.output
    )
    with pytest.raises(BadInput, match="--columns rationale=reasoning"):
        read_rationales([{"question": "What flies?", "choices": ["a bird", "a cup"], "reasoning": "Wings."}])


@pytest.mark.parametrize("name, text", [("a.jsonl", "{}\n"), ("a.csv", "question\nx\n"), ("a.json", "[{}]")])
def test_broken_bytes_are_said_in_the_same_words_for_every_format(tmp_path, name, text):
    packed, other, gone = tmp_path / f"{name}.gz", tmp_path / name, tmp_path / "gone" / name
    packed.write_bytes(gzip.compress((text * 500 if name != "a.json" else text + " " * 5000).encode())[:-9])
    other.write_bytes(text.replace("}", '"é": 1}').replace("x", "é").encode("latin-1"))
    for path, problem in (
        (packed, "cannot be unpacked: .*The file was cut off"),
        (other, "is not UTF-8 text: .*Convert the file to UTF-8"),
        (gone, "there is no such file"),
    ):
        with pytest.raises(BadInput, match=problem):
            list(read_rows(path))


def test_a_row_behind_the_limit_is_not_read():
    rows = [{"q": "What flies?", "choices": ["a bird", "a cup"], "rationale": "Wings."}, {"other": 1}]
    assert len(read_rationales(rows, columns={"question": "q"}, limit=1)) == 1


@pytest.mark.parametrize("given", [1, 1.0, "1", "1.0"])
def test_a_number_that_is_another_choice_is_ambiguous(given):
    row = {"question": "How many?", "choices": ["1", "2", "3"], "rationale": "", "gold": given}
    with pytest.raises(BadInput, match="is ambiguous"):
        read_rationales([row])
    with pytest.raises(BadInput, match="is ambiguous"):
        as_questions([dict(question="How many?", choices=["1", "2", "3"], answer=given)])
    assert read_rationales([row | {"choices": ["4", "5", "6"]}])[0].question.answer == 1


def test_a_report_says_that_it_rests_on_few_questions(tmp_path):
    from faithful_distill.faithfulness.suite import measure_suite
    from faithful_distill.lab.measure_report import write_suite

    page = lambda n: write_suite(measured(n), tmp_path / str(n), "t").read_text(encoding="utf-8")
    questions = lambda n: [Question(f"q{i}", f"What is {i}?", ("a bird", "a cup"), 0) for i in range(n)]
    answer = lambda q, text: Answer(q.id, text or "It flies.", q.choices[0], 0, [-0.1, -2.0], False)
    reasoner = FunctionReasoner(
        lambda questions, texts, *_: [answer(*pair) for pair in zip(questions, texts)]
    )
    measured = lambda n: measure_suite(reasoner, questions(n), metrics=["controls"], interval={"draws": 50})
    assert "on fewer than 20 independent questions" in page(8)
    assert "independent questions" not in page(30)


def test_a_folder_to_import_is_told_its_layout(tmp_path):
    (tmp_path / "commonsenseqa_train.csv").write_text("")
    with pytest.raises(BadInput, match="is a folder.*--layout gpt3"):
        import_rationales(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="Name a file in it, or a layout: palm"):
        import_rationales(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            "train --rationales {file} --method factual --alpha-cf 0.9 --out {out}",
            "--alpha-cf.*--method factual",
        ),
        (
            "import {folder} --layout palm --columns rationale=x --out {out}",
            "'columns': cannot be given with a layout",
        ),
        ("reproduce --profile smoke --seeds 3 --seed 1 --list", "'--seed': cannot be given beside --seeds"),
        (
            "measure --data world --limit 2 --model {student} --style student --prompt csqa --out {out}",
            "'prompt': cannot be given",
        ),
        (
            "measure --data world --limit 2 --model {student} --style student --dtype float16 --out {out}",
            "'dtype': cannot be given",
        ),
        (
            "measure --data world --limit 2 --model {student} --style student --tags <a>,</a> --out {out}",
            "'tags': cannot be given",
        ),
        (
            "rationales --data world --limit 2 --shots 3 --out {out}",
            "'shots': there are no worked examples to show",
        ),
        (
            "rationales --data world --limit 2 --prompt {empty} --out {out}",
            "'prompt': there are no worked examples",
        ),
        (
            "rationales --data world --teacher http://127.0.0.1:9/v1 --dtype float16 --out {out}",
            "'dtype': cannot be",
        ),
        (
            "rationales --data world --teacher http://127.0.0.1:9/v1 --scores --out {out}",
            "'scores': cannot be given",
        ),
        (
            "score {file} --simulator scrach --out {out}",
            "is no simulator .got 'scrach'.. Did you mean 'scratch'",
        ),
        ("score {file} --simulator fine-tuned: --out {out}", "names no model .got 'fine-tuned:'"),
    ],
)
def test_an_option_without_effect_is_refused(arguments, said, tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped

    (tmp_path / "empty.jsonl").write_text("")
    row = dict(
        question="What flies?", choices=["a bird", "a cup"], prediction=0, answer=0, rationale="Wings."
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    named = dict(
        file=tmp_path / "rows.jsonl", empty=tmp_path / "empty.jsonl", folder=tmp_path, out=tmp_path / "o"
    )
    named["student"] = shipped("data", "models", "student")
    done = CliRunner().invoke(main, [word.format(**named) for word in arguments.split()])
    assert done.exit_code == 2 and re.search(said, done.output), done.output


def test_a_path_in_a_folder_that_is_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    from faithful_distill.sources import load_questions

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "questions").write_text("")
    (tmp_path / "in" / "loop").symlink_to("loop")
    for name, remedy in (("in/questoins", "Did you mean 'in/questions'"), ("in/loop", "Or give a file")):
        with pytest.raises(BadInput, match=f"is neither a known dataset nor a file.*{remedy}"):
            load_questions(name)
    with pytest.raises(BadInput, match="'choices': is one text"):
        Question("a", "b", "cd", 0)


@pytest.mark.parametrize("given", ["1e999", "9" * 400, 10**400, "1e999/1e999"])
def test_a_number_that_is_not_finite_is_none(given):
    assert as_number(given) is None


def test_one_mark_to_cut_at_is_one_mark():
    assert (
        read_rationales([ROW | {"rationale": "It has wings. cat Q"}], cut_at="cat")[0].rationale
        == "It has wings."
    )


BATCH = {
    "custom_id": "q1",
    "response": {"status_code": 200, "body": {"choices": [{"message": {"content": "x"}}]}},
}
SAMPLE = {"id": 1, "input": "What?", "target": "A", "choices": ["x", "y"], "output": {"completion": "x"}}
LM_EVAL = {
    "doc": {"question": "What?", "choices": ["x", "y"]},
    "target": 0,
    "resps": [[["-1", ""]], [["-2", ""]]],
}
RECORD = ROW | {"role": "gold", "target": 0}


@pytest.mark.parametrize(
    "row, field",
    [
        (BATCH | {"response": "ok"}, "response"),
        (BATCH | {"response": {"body": {"choices": [5]}}}, "response.body.choices"),
        (BATCH | {"response": {"body": {"choices": [None]}}}, "response.body.choices"),
        (SAMPLE | {"output": {"choices": {"a": 1}}}, "output.choices"),
        (SAMPLE | {"input": 5}, "input"),
        (LM_EVAL | {"target": True}, "gold"),
        (LM_EVAL | {"resps": [[[-(10**400), ""]], [[-1, ""]]]}, "resps"),
        (RECORD | {"choices": 5}, "choices"),
        (RECORD | {"target": -1}, "target"),
        (RECORD | {"target": True}, "target"),
    ],
)
def test_a_log_with_a_wrong_field_is_refused_by_its_name(tmp_path, row, field):
    with pytest.raises(BadInput) as e:
        read_rationales(written(tmp_path / "log.jsonl", row), questions=[OURS])
    assert e.value.field == field and e.value.line == 1


def test_a_question_twice_and_a_fault_in_the_questions_are_told(tmp_path):
    log = written(tmp_path / "log.jsonl", BATCH)
    with pytest.raises(BadInput, match="already used in line 1"):
        read_rationales(log, questions=[OURS, OURS])
    asked = written(tmp_path / "q.jsonl", OURS | {"answer": "a dog"})
    with pytest.raises(BadInput) as e:
        read_rationales(log, questions=asked)
    assert str(e.value.file) == str(asked) and e.value.line == 1
    assert read_rationales(log, questions=[OURS | {"choices": "a bird|a cup", "answer": "B"}])[0].gold == 1


def test_text_after_a_log_of_one_document_is_an_error(tmp_path):
    document = json.dumps({"samples": [SAMPLE]})
    (tmp_path / "log.json").write_text(document)
    assert len(read_rationales(tmp_path / "log.json")) == 1
    for more in (document, "garbage"):
        (tmp_path / "log.json").write_text(f"{document}\n{more}\n")
        with pytest.raises(BadInput, match="more text after"):
            read_rationales(tmp_path / "log.json")
    (tmp_path / "log.json").write_text(document.replace('{"samples"', '{"samples": [], "samples"'))
    with pytest.raises(BadInput, match="occurs twice"):
        read_rationales(tmp_path / "log.json")


def test_published_files_with_wrong_records_name_file_and_line(tmp_path):
    cqa = dict(id="1", question="What?", choices=["x", "y"], answer="x")
    (tmp_path / "train_CoT_0.json").write_text('["so x", "so y"]')
    for wrong in (cqa | {"answer": "z"}, cqa | {"choices": [1, 2]}, cqa | {"answer": 0}):
        written(tmp_path / "cqa_train.json", cqa, wrong)
        with pytest.raises(BadInput) as e:
            import_rationales(tmp_path, "palm")
        assert (e.value.file.name, e.value.line) == ("cqa_train.json", 2)
    (tmp_path / "train_CoT_0.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="is not JSON"):
        import_rationales(tmp_path, "palm")
    with pytest.raises(BadInput, match="published files"):
        import_rationales([ROW], "palm")


# Reasoners


def answer_with(**changed):
    given = dict(id="q1", rationale="r", text="a bird", choice=0, scores=[-1.0, -2.0], truncated=False)
    return Answer(**(given | changed))


@pytest.mark.parametrize(
    "answers",
    [
        None,
        [],
        "no",
        [answer_with(choice=99)],
        [answer_with(choice=-1)],
        [answer_with(choice=True)],
        [answer_with(choice="a bird")],
        [answer_with(rationale=None)],
    ],
)
def test_a_function_that_answers_otherwise_is_refused(answers):
    with pytest.raises(BadInput) as e:
        FunctionReasoner(lambda *_: answers).ask([Q])
    assert e.value.field == "reasoner"


def test_kept_answers_that_were_edited_are_refused_by_file_and_line(tmp_path):
    def reasoner(*_):
        return [answer_with()]

    path = tmp_path / "answers.jsonl"
    kept = CachedReasoner(reasoner, path)
    kept.ask([Q])
    kept.close()
    first, row = path.read_text().splitlines()
    good = json.loads(row)
    bad = [{"choice": 77}, {"choice": "x"}, {"scores": ["a", "b"]}, {"rationale": None}, {"key": [1]}]
    for wrong in (*bad, {"problem": 3}, {"text": None}, {"truncated": "no"}):
        path.write_text(f"{first}\n{json.dumps(good | wrong)}\n")
        with pytest.raises(BadInput) as e:
            CachedReasoner(reasoner, path)
        assert e.value.line == 2
    path.write_text(f"{first}\n{json.dumps(good | {'scores': [-1.0, -2.0, -3.0]})}\n")
    with pytest.raises(BadInput, match="another question"):
        CachedReasoner(reasoner, path).ask([Q])


def test_likelihoods_that_are_not_finite_are_refused(tmp_path):
    def reasoner(*_):
        return [answer_with(scores=[float("nan"), -1.0])]

    with pytest.raises(BadInput, match="not finite"):
        CachedReasoner(reasoner, tmp_path / "a.jsonl").ask([Q])


def test_without_a_label_among_the_next_tokens_no_choice_is_preferred():
    assert label_scores(Q, [("The", -0.1)]) is None
    found = label_scores(Q, [("a", -0.5), ("b", -9999.0)])
    assert found[0] == pytest.approx(-0.5) and found[1] == pytest.approx(-9999.0)


# Servers


class Liar(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + self.server.short))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        body = json.dumps({"data": [{"id": "m"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def liar():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.short, server.replies = 0, [{}]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def model_of(server, **how):
    return ServedModel(f"http://127.0.0.1:{server.server_address[1]}/v1", **({"retries": 0} | how))


def chatted(server, **how):
    return model_of(server, **how).chat([[{"role": "user", "content": "x"}]], 5, top=3)[0]


MESSAGE = {"choices": [{"message": {"content": "hi"}}]}


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"choices": None},
        {"choices": ["x"]},
        {"choices": {"0": {}}},
        {"choices": [{"message": "hi"}]},
        {"choices": [{"text": 5}]},
        {"choices": [{"message": {"content": 5}}]},
        b"[" * 100_000,
        b"<html>",
        [1],
    ],
)
def test_a_reply_that_is_none_is_one_error(liar, reply):
    pytest.importorskip("openai")
    liar.replies = [reply]
    with pytest.raises(BadInput) as e:
        chatted(liar)
    assert e.value.field == "model"


@pytest.mark.parametrize(
    "more, top",
    [
        ({"usage": "x"}, ()),
        ({"usage": {"completion_tokens": [5]}}, ()),
        ({"logprobs": "x"}, ()),
        ({"logprobs": {"content": [{"top_logprobs": [{"token": None, "logprob": -1}]}]}}, ()),
        ({"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": -(10**400)}]}]}}, ()),
        ({"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": -1}]}]}}, (("a", -1.0),)),
    ],
)
def test_what_surrounds_a_reply_may_be_missing_or_wrong(liar, more, top):
    pytest.importorskip("openai")
    usage = {name: more[name] for name in more if name == "usage"}
    rest = {name: more[name] for name in more if name != "usage"}
    liar.replies = [{"choices": [MESSAGE["choices"][0] | rest]} | usage]
    reply = chatted(liar)
    assert (reply.text, reply.top, reply.tokens) == ("hi", top, 1)


def test_parts_of_a_message_and_half_characters_are_read(liar):
    pytest.importorskip("openai")
    liar.replies = [{"choices": [{"message": {"content": [{"type": "text", "text": "hi"}]}}]}]
    assert chatted(liar).text == "hi"
    liar.replies = [b'{"choices": [{"message": {"content": "\\ud800!"}}]}']
    assert chatted(liar).text == "\ufffd!"


def test_an_error_in_place_of_a_reply_is_asked_again(liar, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    liar.replies = [{"error": {"message": "overloaded"}}, MESSAGE]
    assert chatted(liar, retries=1).text == "hi"
    liar.replies = [{"error": {"message": "overloaded"}}]
    with pytest.raises(BadInput, match="overloaded"):
        chatted(liar)


def test_a_reply_that_breaks_off_is_one_error(liar):
    pytest.importorskip("openai")
    liar.replies, liar.short = [MESSAGE], 1000
    with pytest.raises(BadInput, match="broke off|does not answer"):
        chatted(liar, timeout=3.0)


@pytest.mark.parametrize(
    "how", [{"timeout": float("nan")}, {"retries": 0.5}, {"concurrency": "8"}, {"price": "12"}]
)
def test_settings_of_a_wrong_type_are_named(how):
    with pytest.raises(BadInput) as e:
        ServedModel("http://127.0.0.1:9/v1", **how)
    assert e.value.field == next(iter(how))


def test_paid_replies_of_a_served_teacher_outlive_a_spent_budget(tmp_path):
    pytest.importorskip("openai")
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.files import shipped
    from faithful_distill.lab.loopback import serve_locally
    from faithful_distill.teacher.loading import load_teacher

    asked, out = [], tmp_path / "r.jsonl"

    def count(request, response):
        if request and "prompt" in request:
            asked.append(request["prompt"])

    data = written(
        tmp_path / "q.jsonl", *(OURS | {"id": f"q{i}", "question": f"What flies {i}?"} for i in range(4))
    )
    with serve_locally(load_teacher(shipped("data", "models", "teacher")), count) as url:
        how = [
            "rationales",
            "--data",
            str(data),
            "--teacher",
            url,
            "--strategy",
            "greedy",
            "--max-new-tokens",
            "4",
        ]
        how += ["--concurrency", "1", "--out", str(out)]
        spent = CliRunner().invoke(main, [*how, "--budget", "60"])
        assert spent.exit_code == 2 and "is kept in" in spent.output, spent.output
        first = len(asked)
        done = CliRunner().invoke(main, how)
        assert done.exit_code == 0, done.output
    assert 0 < first < len(asked) == len(set(asked)) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "r.jsonl"]


@pytest.mark.parametrize(
    "given, words",
    [
        (["--budget", "60"], "cannot be given for a local teacher"),
        (["--limit", "1" + "0" * 20], "is not in the range"),
        (["--samples", "999999999"], "is not in the range"),
        (["--columns", "question=a,question=b"], "is given twice"),
    ],
)
def test_options_without_an_effect_or_a_bound_are_refused(tmp_path, given, words):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    done = CliRunner().invoke(
        main, ["rationales", "--data", "world", "--out", str(tmp_path / "r.jsonl"), *given]
    )
    assert done.exit_code == 2 and words in done.output, done.output


@pytest.mark.parametrize(
    "command", [["measure", "--model", "x"], ["evaluate", "--student", "x"], ["rationales"]]
)
def test_data_that_are_not_named_are_asked_for(tmp_path, command):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "o")])
    assert done.exit_code == 2 and "--data" in done.output and "is missing" in done.output.lower(), (
        done.output
    )


def test_a_file_whose_name_begins_like_the_world_is_a_file(tmp_path, monkeypatch):
    from faithful_distill.question_options import read_questions

    monkeypatch.chdir(tmp_path)
    for name in ("worldcup.jsonl", "world-capitals.jsonl"):
        written(tmp_path / name, OURS)
        assert [q.id for q in read_questions(name, None, "dev", None, None, None, None)] == ["q1"]


def test_another_measurement_is_checked_before_anything_is_asked(tmp_path):
    from faithful_distill.lab.measure_report import read_suite

    written(tmp_path / "rows.jsonl", {"id": "x"}, {"credit": 5})
    with pytest.raises(BadInput, match="not as a measurement has it"):
        read_suite(tmp_path)


def test_a_linked_folder_is_not_written_to(tmp_path):
    (tmp_path / "mine").mkdir()
    own_folder(tmp_path / "out", "score", ["report"])
    (tmp_path / "out" / "report").symlink_to(tmp_path / "mine")
    with pytest.raises(BadInput, match="is a link"):
        own_folder(tmp_path / "out", "score", ["report"])


def test_lines_that_may_be_written_again_are_known_by_their_fields(tmp_path):
    path = tmp_path / "r.jsonl"
    own_lines(path, ["id"])
    path.write_text("")
    own_lines(path, ["id"])
    write_records(path, read_records([ROW]))
    own_lines(path, ["id", "role"])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="of something else"):
        own_lines(path, ["id"])


@pytest.fixture(scope="module")
def teacher():
    from faithful_distill import load_teacher

    return load_teacher(Path(faithful_distill.__file__).parents[1] / "data" / "models" / "teacher")


@pytest.mark.parametrize(
    "given, problem",
    [
        (dict(gold_ids=None), "field 'gold_ids': is no list"),
        (dict(gold_ids="ab"), "field 'gold_ids': is no list"),
        (dict(gold_ids=[5, 6]), r"field 'gold_ids\[0\]': is no list"),
        (dict(gold_ids=[[5], ["x"]]), r"field 'gold_ids\[1\]': holds what is no token id \(got 'x'\)"),
        (dict(gold_ids=[[5.0], [6]]), "no token id"),
        (dict(gold_ids=[[True], [6]]), "no token id"),
        (dict(perturbed_ids=[None, [5]]), r"field 'perturbed_ids\[0\]': is no list"),
        (dict(perturbed_ids=[[[[5]]], [5]]), "no token id"),
        (dict(token_budget="much"), "field 'token_budget'"),
    ],
)
def test_contexts_that_are_no_token_ids(teacher, given, problem):
    rows = dict(gold_ids=[[5, 6], [7]], perturbed_ids=[[5], [7]]) | given
    with pytest.raises(BadInput, match=problem):
        contrastive_generate(teacher.model, **rows, max_new_tokens=2)


def test_tensors_and_arrays_are_contexts(teacher):
    written = lambda *ids: [g.tokens for g in contrastive_generate(teacher.model, *ids, max_new_tokens=3)]
    gold, perturbed = [[5, 6], [7, 8]], [[5, 5], [7, 7]]
    lists = written(gold, perturbed)
    assert written(torch.tensor(gold), torch.tensor(perturbed)) == lists
    assert written(np.array(gold), [torch.tensor(p) for p in perturbed]) == lists
    assert written(iter(gold), iter([[p] for p in perturbed])) == lists
    assert written([list(np.array(g)) for g in gold], [[*torch.tensor(p)] for p in perturbed]) == lists
    with pytest.raises(BadInput, match="field 'model': is no model"):
        contrastive_generate(teacher, gold)


@pytest.mark.parametrize("found", [None, [1.0], "x", [float("nan")] * 4, ["a"] * 4])
def test_a_selection_gives_a_number_for_each(teacher, found):
    question = dict(question="What flies?", choices=["a bird", "a cup"], answer=0)
    how = dict(strategy="sampled", samples=2, select=lambda rationales: found, max_new_tokens=2)
    with pytest.raises(BadInput, match="field 'select': must"):
        rationalize(teacher, [question], **how)
    with pytest.raises(BadInput, match="field 'samples'"):
        rationalize(teacher, [question], samples="2")
    with pytest.raises(BadInput, match="is no name of a file"):
        rationalize(teacher, [question], out=3)
    with pytest.raises(BadInput, match="must be a list of roles"):
        rationalize(teacher, [question], roles=[])


def test_an_import_replaces_no_other_rationales(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    source = written(tmp_path / "source.jsonl", ROW)
    asked = ["import", str(source), "--out", str(tmp_path / "out.jsonl")]
    for _ in range(2):  # the same once more is no loss
        assert CliRunner().invoke(main, asked).exit_code == 0
    computed = write_records(tmp_path / "out.jsonl", read_records([ROW | {"id": "q2"}])).read_bytes()
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2 and "holds other rationales, which would be replaced" in done.output
    assert (tmp_path / "out.jsonl").read_bytes() == computed
    with open(tmp_path / "out.jsonl", "a") as f:
        f.write("and my notes\n")
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 2 and "is of something else" in done.output


@pytest.mark.parametrize(
    "given, problem",
    [
        (dict(parts="3"), r"field 'parts': must be a whole number, at least 2 \(got '3'\)"),
        (dict(parts=1), "field 'parts': must be a whole number, at least 2"),
        (dict(cut_at=[5]), "field 'cut_at': is no list of texts"),
        (dict(cut_at=5), "field 'cut_at': is no list of texts"),
        (dict(train_limit=None), "field 'train_limit': must be a whole number"),
        (dict(seeds=range(10**9)), "field 'seeds': must be a list of 1 to 10,000 seeds"),
        (dict(seeds=[]), "field 'seeds': must be a list of 1 to 10,000 seeds"),
        (dict(seeds=[0.5]), "field 'seeds': must be a whole number"),
    ],
)
def test_a_call_of_the_suite_is_checked_first(given, problem):
    from faithful_distill.faithfulness.scoring import score_rationales

    with pytest.raises(BadInput, match=problem):
        score_rationales([ROW], **given)


def test_no_memory_is_filled_with_seeds(tmp_path):
    from click.testing import CliRunner

    from faithful_distill.cli import main
    from faithful_distill.training.launch import train_seeds

    for seeds in (10**9, range(10**9), [], [1, 1], 1.5):
        with pytest.raises(BadInput, match="field 'seeds': must be 1 to 10,000 different seeds"):
            train_seeds("student", [ROW], out=tmp_path, seeds=seeds)
    for asked in (["train", "--rationales", "r", "--seeds"], ["score", "r", "--simulators"]):
        done = CliRunner().invoke(main, [*asked, str(10**9), "--out", str(tmp_path)])
        assert done.exit_code == 2 and "is not in the range 1<=x<=10000" in done.output


def test_a_worked_example_has_a_text_as_its_rationale(tmp_path):
    from faithful_distill.teacher.prompts import few_shot

    for rationale in (5, ["It has wings."], {"a": 1}, True):
        file = written(tmp_path / "shots.jsonl", ROW, ROW | {"rationale": rationale})
        with pytest.raises(BadInput, match="shots.jsonl:2: field 'rationale': must be a text"):
            few_shot(str(file))
        file.unlink()


def test_a_measurement_to_compare_with_is_checked_through(tmp_path):
    from faithful_distill.lab.measure_report import read_suite

    arm = dict(rationale="It has wings.", text="a bird", choice=0, scores=[-1.0, -2.0])
    good = dict(id="q", question="What flies?", choices=["a bird", "a cup"], gold=0)
    good |= dict(arms={"written": arm}, credit={"written": 1.0, "filler": None})
    written(tmp_path / "rows.jsonl", good)
    assert read_suite(tmp_path)[1] == [good]
    for field, wrong in [
        ("credit", {}),
        ("credit", {"written": "a"}),
        ("credit", {"written": 1.0, "filler": [1]}),
        ("gold", 2),
        ("gold", "a"),
        ("choices", [1, 2]),
        ("arms", {}),
        ("arms", {"written": 3}),
        ("arms", {"written": {k: v for k, v in arm.items() if k != "choice"}}),
        ("arms", {"written": arm | {"choice": 2}}),
        ("arms", {"written": arm | {"choice": "a"}}),
        ("arms", {"written": arm | {"scores": [-1.0]}}),
        ("arms", {"written": arm | {"text": 5}}),
    ]:
        written(tmp_path / "rows.jsonl", good | {field: wrong})
        with pytest.raises(BadInput, match=f"rows.jsonl:1: field '{field}': is not as a measurement has it"):
            read_suite(tmp_path)


@pytest.mark.parametrize(
    "given, problem",
    [
        (dict(limit=-1), "field 'limit': must be a whole number, at least 0"),
        (dict(limit=1.5), "field 'limit': must be a whole number"),
        (dict(path=3), "field 'path': is no name of a file or folder"),
        (dict(skip_bad=3), "field 'skip_bad': is no name of a file or folder"),
        (dict(data="n" * 5000), "is neither a known dataset nor a file"),
        (dict(data="csqa", path="n" * 5000), "nnn: "),
        (dict(skip_bad="n" * 5000), "cannot be written"),
    ],
)
def test_where_questions_are_from_is_checked(given, problem):
    with pytest.raises(BadInput, match=problem):
        load_questions(**({"data": [ROW]} | given))


def test_numbers_of_numpy_are_numbers(teacher, tmp_path):
    assert len(load_questions([OURS], limit=np.int64(1))) == 1
    how = dict(max_new_tokens=np.int64(2), strategy="greedy", roles=["gold"], out=tmp_path / "r.jsonl")
    for _ in range(2):
        [r] = rationalize(teacher, [OURS], seed=np.int64(3), **how)
        assert r.seed == 3
    with pytest.raises(BadInput, match=r"field 'seed': must be a whole number \(got None\)"):
        rationalize(teacher, [OURS], seed=None, **how)


@pytest.mark.parametrize(
    "given, problem",
    [
        (dict(metrics=None), "field 'metrics': must be a list of names"),
        (dict(metrics=[5]), "field 'metrics': must be a list of names"),
        (dict(draws=1.5), r"field 'draws': must be a whole number, at least 1 \(got 1.5\)"),
        (dict(interval={"lvl": 0.9}), "field 'interval.lvl': is not a setting of an interval"),
        (dict(interval={"level": 2}), "field 'interval.level': must lie between 0 and 1"),
        (dict(interval={"draws": 0}), "field 'interval.draws': must be a whole number"),
    ],
)
def test_a_measurement_is_checked_before_anything_is_asked(given, problem):
    from faithful_distill.faithfulness.interventions import measure
    from faithful_distill.faithfulness.suite import measure_suite

    def never(*_):
        raise AssertionError("was asked")

    for call in (measure, measure_suite):
        with pytest.raises(BadInput, match=problem):
            call(never, [OURS], **given)


def test_credits_are_lists():
    from faithful_distill.faithfulness.metrics import perturbation_drop

    with pytest.raises(BadInput, match="field 'own': must be a list of numbers"):
        perturbation_drop(1, 1)


def test_a_student_is_asked_by_its_folder_and_rationales_are_texts():
    from faithful_distill.student.answers import answer

    student = Path(faithful_distill.__file__).parents[1] / "data" / "models" / "student"
    [a] = answer(student, [OURS], ["It has wings."])
    assert a.rationale == "It has wings." and len(a.scores) == 2
    for wrong in ([5], [["a"]]):
        with pytest.raises(BadInput, match="field 'rationales': must be texts"):
            answer(student, [OURS], wrong)
