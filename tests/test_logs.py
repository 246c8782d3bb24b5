"Logs of other programs, read by `read_rationales` without renaming a field; answers that are numbers; judges' marks."

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithful_distill.faithfulness import logs, numeric
from faithful_distill.faithfulness.external import read_rationales
from faithful_distill.faithfulness.scoring import score_rationales
from faithful_distill.files import BadInput

labels, texts = ["A", "B", "C"], ["hive", "sea", "moon"]
csqa = dict(id="c", question="Where do bees live?", choices=dict(label=labels, text=texts), answerKey="A")
said = "Bees build hives. So the answer is (A) hive."


def lm_eval(doc_id=0, **changed):
    "A row of `--log_samples` for a generated text."
    row = dict(
        doc_id=doc_id, doc=csqa, target="A", arguments={"gen_args_0": {"arg_0": "Q", "arg_1": {"until": []}}}
    )
    row |= dict(resps=[[said]], filtered_resps=[said], filter="none", metrics=["exact_match"], doc_hash="x")
    return row | changed


def compared(target="0", likelihoods=("-1.5", "-4.0", "-9"), doc=csqa):
    "A row of `--log_samples` for choices whose likelihoods were compared."
    resps = [[[v, "False"]] for v in likelihoods]
    asked = {f"gen_args_{k}": {"arg_0": "Q", "arg_1": f" {t}"} for k, t in enumerate(texts)}
    return dict(
        doc_id=5,
        doc=doc,
        target=target,
        arguments=asked,
        resps=resps,
        filtered_resps=[r[0] for r in resps],
        filter="none",
    )


def sample(**changed):
    message = dict(role="assistant", content=said)
    row = dict(id=1, epoch=1, input="Where do bees live?", choices=texts, target="A", messages=[])
    row |= dict(output=dict(model="m", choices=[dict(message=message)], completion=said), scores={})
    return row | changed


def batch(text=said, **changed):
    body = dict(
        object="chat.completion", choices=[dict(index=0, message=dict(role="assistant", content=text))]
    )
    row = dict(id="b", custom_id="q1", response=dict(status_code=200, request_id="r", body=body), error=None)
    return row | changed


asked = [dict(id="q1", question="Where do bees live?", choices=texts, answer=0)]
record = dict(
    id="c",
    split="dev",
    question="Where do bees live?",
    choices=texts,
    answer=0,
    target=1,
    role="counterfactual",
)
record |= dict(rationale="Fish do.", perturbed=0, tokens=3, stop="stop", alpha=0.5, seed=0, version="0")


def written(folder, name, rows):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name, rows, expected",
    [
        ("samples_csqa.jsonl", [lm_eval()], (texts, 0, 0, said)),
        ("samples_likelihoods.jsonl", [compared()], (texts, 0, 0, "")),
        ("inspect.jsonl", [sample()], (texts, 0, 0, said)),
        ("batch_output.jsonl", [batch()], (texts, 0, 0, said)),
        ("rationales.jsonl", [record], (texts, 0, 1, "Fish do.")),
        (
            "own.jsonl",
            [dict(question="Where do bees live?", choices=texts, gold="A", rationale=said)],
            (texts, 0, 0, said),
        ),
    ],
)
def test_each_structure_is_recognised(tmp_path, caplog, name, rows, expected):
    [one] = read_rationales(written(tmp_path, name, rows), questions=asked)
    found = list(one.question.choices), one.question.answer, one.prediction, one.rationale
    assert found == expected and one.question.question == "Where do bees live?"
    assert "not read" not in caplog.text


@pytest.mark.parametrize("indent", [None, 1])
def test_an_inspect_log_is_one_document(tmp_path, indent):
    log = dict(
        version=2,
        status="success",
        eval={"task": "t"},
        samples=[sample(), sample(id=2), sample(id=2, epoch=2)],
    )
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log, indent=indent))
    assert [b.question.id for b in read_rationales(path)] == ["1", "2", "2/2"]
    (tmp_path / "list.json").write_text(json.dumps([lm_eval(), lm_eval(1)], indent=indent))
    assert len(read_rationales(tmp_path / "list.json")) == 2


def test_thinking_is_part_of_the_rationale_and_a_scorers_answer_is_the_prediction():
    parts = [dict(type="reasoning", reasoning="Bees fly."), dict(type="text", text="It is a hive.")]
    output = dict(choices=[dict(message=dict(role="assistant", content=parts))])
    [one] = read_rationales([sample(output=output, scores={"choice": dict(value="C", answer="A")})])
    assert one.rationale == "Bees fly.\nIt is a hive." and one.prediction == 0
    chat = dict(choices=[dict(message=dict(reasoning_content="Hm.", content="The answer is C."))])
    [two] = read_rationales([batch(response=dict(status_code=200, body=chat))], questions=asked)
    assert two.rationale == "Hm.\nThe answer is C." and two.prediction == 2


def test_what_is_passed_over_is_counted_and_said(caplog):
    rows = [
        batch(),
        batch(custom_id="q2", error={"message": "late"}),
        batch(response=dict(status_code=500, body={})),
    ]
    assert len(read_rationales(rows, questions=asked)) == 1
    assert "2 rows passed over: a request that failed" in caplog.text
    caplog.clear()
    assert len(read_rationales([sample(), sample(id=3, error="boom")])) == 1
    assert "1 rows passed over: a sample that ended in an error" in caplog.text
    strict, flexible = (
        lm_eval(filter="strict", filtered_resps=["(C)"]),
        lm_eval(filter="flexible", filtered_resps=["B"]),
    )
    [one] = read_rationales([strict, flexible])
    assert one.prediction == 2 and "the filter 'flexible', as 'strict' is read" in caplog.text


def test_repeats_are_rows_of_one_question():
    [a, b] = read_rationales(
        [lm_eval(resps=[[said, "The answer is B."]], filtered_resps=[[said, "The answer is B."]])]
    )
    assert (a.question.id, b.question.id) == ("0/1", "0/2") and a.group == b.group
    assert (a.prediction, b.prediction) == (0, 1)


@pytest.mark.parametrize(
    "target, doc, gold",
    [
        ("1", dict(csqa, answerKey=None), 1),
        ("0", dict(question="Two and two?", choices=["1", "0", "4"]), 0),  # the harness writes an index
        (2, dict(question="Which?", options={"A": "x", "B": "y", "C": "z"}), 2),
        ("0", dict(passage="...", question="Is it?"), 0),  # the choices are what likelihoods were asked of
    ],
)
def test_the_right_choice_of_a_harness_row(target, doc, gold):
    [one] = read_rationales([compared(target, doc=doc)])
    assert one.question.answer == gold and one.prediction == 0


BAD = [
    ([lm_eval(doc={"text": "no question"})], r":1: field 'doc': has no text of the question"),
    ([lm_eval(), lm_eval(1, resps=[[3]])], r":2: field 'resps': holds neither texts nor likelihoods"),
    ([compared(likelihoods=("-1", "-2"))], r":1: field 'resps': holds 2 likelihoods for 3 choices"),
    ([sample(target="Z")], r":1: field 'target': must be the letter or the text of one choice"),
    ([sample(output={"choices": [{}]})], r":1: field 'output.choices.message': is missing"),
    ([batch(custom_id="q9")], r":1: field 'custom_id': is the id of none of the questions \(got 'q9'\)"),
    (
        [batch(response=dict(status_code=200, body={"text": "x"}))],
        r"field 'response.body': has neither choices nor output",
    ),
    (
        [lm_eval(), sample()],
        r":2: .*has the structure of Inspect samples, the rows before that of lm-eval",
    ),
    (
        [lm_eval() | sample()],
        r":1: .*has the structure of lm-evaluation-harness samples and of Inspect samples",
    ),
    ([{"text": "hello"}], r":1: field 'question': is missing. Is it 'text'"),
    ([batch(error={"m": 1})], r"contains no rationale"),
]


@pytest.mark.parametrize("rows, says", BAD)
def test_what_is_no_log_is_one_line(tmp_path, rows, says):
    path = written(tmp_path, "log.jsonl", rows)
    with pytest.raises(BadInput, match=says) as e:
        read_rationales(path, questions=asked)
    assert "log.jsonl" in str(e.value) and "\n" not in str(e.value)


def test_a_batch_output_needs_its_questions(tmp_path):
    with pytest.raises(BadInput, match="field 'custom_id'.*all that a batch output holds.*--questions FILE"):
        read_rationales([batch()])
    with pytest.raises(BadInput, match="q.jsonl:1: field 'id': is missing from a question"):
        read_rationales([batch()], questions=written(tmp_path, "q.jsonl", [dict(question="?")]))
    with pytest.raises(BadInput, match="is a binary Inspect log.*inspect log dump"):
        read_rationales(tmp_path / "a.eval")


def test_a_format_of_ones_own_joins_the_others(monkeypatch):
    monkeypatch.setattr(logs, "log_formats", dict(logs.log_formats))

    @logs.register_log_format("mine", lambda row: "frage" in row)
    def rows(row, reading):
        return [dict(question=row["frage"], choices=row["wahl"], rationale=row["grund"], gold=0)]

    [one] = read_rationales([dict(frage="Wo?", wahl=["hier", "da"], grund="So the answer is da.")])
    assert one.prediction == 1


# ---- numbers


@pytest.mark.parametrize(
    "said, number",
    {
        "-$5": -5,
        "$-5": -5,
        "\u20135": -5,
        "\u22125 degrees": -5,
        "minus 5": -5,
        "$5 m": 5e6,
        "5 m": 5,
        "$1.5M": 1.5e6,
        "$1.5M a year": 1.5e6,
        "2.5 billion people": 2.5e9,
        "3 dozen": 36,
        "x = 6": 6,
        "5 kids, not pets": 5,
        **dict.fromkeys(
            "not 5|- 5|5,5|1 001|\u221a4|3 + 3|2 x 2|12:30|5 and a half|5\u00bd|1.5K|1.5 M|\u22605|> 5|5.5.5|1_000"
            "|10^6|minus five|5 hundred thousand|1 1/2 cups|5-6 cups".split("|")
        ),
    }.items(),
)
def test_a_stated_number_is_read_with_sign_and_scale_or_not_at_all(said, number):
    assert numeric.stated_number(f"So the answer is {said}.") == number
    assert numeric.stated_number(f"#### {said}") == number


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6).map(lambda v: round(v, 3)))
def test_a_number_is_read_however_it_is_written(value):
    for text in (
        f"{value}",
        f"{value:,}",
        f"${value}" if value >= 0 else f"{value}",
        f" {value}%",
        f"{value}.",
    ):
        assert numeric.same_number(numeric.as_number(text), value)
    assert numeric.stated_number(f"It costs 7 and 8. So the answer is {value:,}.") == pytest.approx(value)
    assert numeric.stated_number(f"It costs 7.\n#### {value}") == pytest.approx(value)
    assert numeric.stated_number(f"#### 7.5\nNo: the answer is {value}.") == pytest.approx(
        value
    )  # the last one counts


def gsm(text, target="18", **changed):
    doc = dict(question="How many eggs are sold?", answer="16 - 3 + 5\n#### 18")
    return lm_eval(doc=doc, target=target, resps=[[text]], filtered_resps=[text], **changed)


def test_answers_that_are_numbers_are_scored_where_no_choices_are_needed():
    texts = ["16 - 3 + 5 = 18 eggs. The answer is $18.00.", "It is 17.\n#### 17", "She sells some eggs."]
    rows = [gsm(t, doc_id=k) for k, t in enumerate(texts)]
    rows += [gsm("x", doc_id=9, filter="none") | dict(filtered_resps=["18"])]
    scored = score_rationales(rows, interval=dict(draws=200))
    s = scored.scores
    assert s["accuracy"].value == 0.5 and s["unparsable"].value == 0.25 and s["length"].value > 1
    assert [row["prediction"] for row in scored.rows] == [18.0, 17.0, None, 18.0]
    for name in ("las", "rev", "rora_lite"):
        assert s[name].value is None and "answers are numbers" in s[name].reason
    assert s["names_prediction"].reason == "answers are numbers, not choices"
    json.dumps(scored.to_dict(), allow_nan=False)


def test_numbers_are_asked_for_by_null_and_never_guessed():
    row = dict(question="How many?", rationale="#### 5", gold=5)
    with pytest.raises(
        BadInput, match="field 'choices': is missing.* Give null where the answer is a number"
    ):
        read_rationales([row])
    [one] = read_rationales([dict(row, choices=None)])
    assert one.correct and read_rationales([one.to_row()]) == [one]
    with pytest.raises(BadInput, match="line 1: field 'gold': must be a number"):
        read_rationales([dict(row, choices=None, gold="five")])
    with pytest.raises(BadInput, match="line 2: field 'choices': must be null in all rows or in none"):
        read_rationales([dict(row, choices=None), dict(row, choices=["a", "b"], gold=0)])


# ---- judges


def judged(i, **more):
    row = dict(
        id=str(i),
        question=f"Which is {i}?",
        choices=["this", "that"],
        gold=0,
        prediction=i % 2,
        rationale="so",
    )
    return row | more


def test_marks_of_judges_are_kept_apart_from_peoples():
    rows = [judged(i, rating=[i % 3, i % 3], judge={"a": i % 3, "b": 2 - i % 3}) for i in range(30)]
    s = score_rationales(rows, metrics=["ratings", "judges"], interval=dict(draws=200)).scores
    assert s["rater_ac2"].value == s["rater_kappa"].value == 1.0
    assert (
        s["judge_kappa"].value < 0 and s["judge"].value == 1.0 and s["judge"].details["judges"] == ["a", "b"]
    )
    one = score_rationales(
        [judged(i, human=i % 3, judge=i % 3) for i in range(30)], metrics=["judges"], interval=dict(draws=200)
    ).scores
    assert one["judge_human_ac2"].value == one["judge_human_kappa"].value == 1.0
    assert one["judge_kappa"].reason == "no rationale has several judges"
    none = score_rationales(
        [judged(i) for i in range(5)], metrics=["judges"], interval=dict(draws=200)
    ).scores
    assert none["judge"].reason == "no judge's marks are given"


def test_marks_of_judges_are_paired_by_name_and_their_scale_is_not_taken_from_the_marks():
    marks = [{"a": i % 3, "b": min(i % 3 + 1, 3)} for i in range(30)]
    mixed = [dict(reversed(m.items())) if i % 2 else m for i, m in enumerate(marks)]
    kappa = [
        score_rationales(
            [judged(i, judge=m, rating=3) for i, m in enumerate(given)],
            metrics=["judges", "ratings"],
            interval=dict(draws=100),
        ).scores
        for given in (marks, mixed)
    ]
    assert kappa[0]["judge_kappa"].value == kappa[1]["judge_kappa"].value
    rating = kappa[0]["rating"]
    assert (rating.value, rating.low) == (3.0, None) and "no bounds" in rating.reason


@pytest.mark.parametrize(
    "marks, says",
    [
        (dict(judge="good"), "field 'judge': must be a number"),
        (dict(judge={"a": None}), "field 'judge': must be a number"),
        (dict(rating=1, human=1), "field 'human': is given beside 'rating'"),
    ],
)
def test_marks_that_are_none_are_one_line(marks, says):
    with pytest.raises(BadInput, match=says):
        read_rationales([judged(1, **marks)])


def test_marks_too_fine_for_categories_have_a_reason():
    s = score_rationales(
        [judged(i, judge=[i / 40, i / 50]) for i in range(40)], metrics=["judges"], interval=dict(draws=200)
    ).scores
    assert s["judge_ac2"].value is None and "too many different values" in s["judge_ac2"].reason


def test_the_command_reads_a_batch_output_with_its_questions(tmp_path):
    from click.testing import CliRunner
    from faithful_distill.cli import main

    output = written(tmp_path, "output.jsonl", [batch()])
    command = ["score", str(output), "--metrics", "ratings", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code != 0 and "--questions FILE" in done.output
    done = CliRunner().invoke(main, [*command, "--questions", str(written(tmp_path, "q.jsonl", asked))])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"]["value"] == 1.0
