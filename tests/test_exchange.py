"""Rationales from elsewhere and to elsewhere: published layouts, one's own rows, a dataset folder, overlap."""

import json
import logging

import pytest

from faithful_distill import (
    import_rationales,
    load_student,
    measure,
    overlap,
    publish_rationales,
    train_student,
)
from faithful_distill.exchange import published_rows, question_hash
from faithful_distill.faithfulness.external import read_published, read_rationales
from faithful_distill.files import BadInput
from faithful_distill.questions import Question
from faithful_distill.records import read_records
from faithful_distill.student.model import tiny_student

own = [
    dict(question="Who swims?", choices=["penguin", "camel"], answer="A", rationale="It hunts fish."),
    dict(
        question="Who walks?",
        choices=["penguin", "camel"],
        answer=0,
        rationale="Sand is its home. The answer is (b).",
    ),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["dicts", "frame", "jsonl", "csv", "parquet"])
def test_own_rationales_in_any_form_are_the_same_records(tmp_path, form):
    import pandas as pd

    frame = pd.DataFrame([row | dict(choices="|".join(row["choices"])) for row in own])
    frame["answer"] = frame["answer"].map(str)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    write(tmp_path / "r.jsonl", own)
    given = own if form == "dicts" else frame if form == "frame" else tmp_path / f"r.{form}"
    first, second = import_rationales(given)
    assert (first.role, first.rationale, first.target) == ("gold", "It hunts fish.", 0)
    assert (second.role, second.rationale, second.target) == ("counterfactual", "Sand is its home.", 1)
    assert [r.rationale for r in read_records(given)] == [row["rationale"] for row in own]  # as they are
    assert len({r.id for r in (first, second)}) == 2


def test_a_student_learns_from_four_fields_alone_and_knows_what_it_was_trained_on(tmp_path, caplog):
    words = sorted(
        {w for row in own for w in f"{row['question']} {row['rationale']} {' '.join(row['choices'])}".split()}
    )
    rows = [{k: row[k] for k in ("question", "choices", "answer", "rationale")} for row in own]
    rows[1]["answer"] = 1  # the choice that its rationale states
    student = tiny_student(words)
    out = train_student(student, rows, out=tmp_path / "student", alpha_cf=0.0, max_steps=1, batch_size=2).out
    trained = load_student(out)
    questions = [Question(f"other {i}", row["question"], row["choices"], 0) for i, row in enumerate(own)]
    new = Question("new", "Who flies?", ("penguin", "camel"), 0)
    assert trained.trained_on == {question_hash(q) for q in questions}
    with caplog.at_level(logging.WARNING, "faithful_distill"):
        measure(trained, [new], metrics=["controls"])
        assert "trained on" not in caplog.text
        measure(trained, [*questions, new], metrics=["controls"])
    assert "2 of 3 questions are among those that were trained on" in caplog.text


def test_rows_to_train_on_are_read_as_import_reads_them(tmp_path, caplog):
    from faithful_distill.training.train import checked_records

    row = dict(question="Where is a dog?", choices=["kennel", "river"], answer="kennel")
    rows = [row | {"rationale": f"It is wet. So the answer is {c}."} for c in row["choices"]]
    read = lambda given: [(r.rationale, r.target, r.role) for r in checked_records(given)]
    wanted = [("It is wet.", 0, "gold"), ("It is wet.", 1, "counterfactual")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    assert read(rows) == wanted and "1 of 2 state another answer than theirs" in caplog.text
    assert read(file) == read(iter(rows)) == read(import_rationales(rows)) == wanted
    said = dict(rows[1], role="gold", target=0)  # it says itself what it argues for
    assert read([said]) == [("It is wet. So the answer is river.", 0, "gold")]


def test_an_answer_that_is_corrected_is_not_the_one_that_counts():
    from faithful_distill.stated import stated_choice

    q = Question("q", "Where?", ("river", "tree"), None)
    for correction in ("Wait", "wait, no", "Actually", "No", "Hmm"):
        text = f"It swims. The answer is river. {correction}, the answer is tree."
        assert stated_choice(q, text) == 1, text


def test_wrong_names_are_named_with_the_remedy():
    for change, problem in (
        ({"explanation": "why"}, "row 1: field 'rationale'|columns={'rationale': 'explanation'}"),
        ({}, "row 1: is missing from a rationale record"),
    ):
        row = {k: own[0][k] for k in ("question", "choices", "answer")} | change
        with pytest.raises(BadInput, match=problem):
            read_records([row])
        with pytest.raises(BadInput, match=problem.split("|")[-1]):
            import_rationales([row])
    with pytest.raises(BadInput, match="Did you mean 'palm-svamp'"):
        import_rationales("folder", "palm-swamp")


steps = {
    "palm": (
        "cqa",
        dict(id="q", question="Who?", choices=["me", "you"], answer="you"),
        "Look. So the answer is (b) you.\n\nQ: x",
    ),
    "palm-esnli": (
        "esnli",
        dict(premise="It rains.", hypothesis="Wet.", label=1),
        "Rain. Answer: neutral\n\nPremise: x",
    ),
    "palm-anli1": (
        "anli1",
        dict(uid="u", premise="It rains.", hypothesis="Wet.", label=1, reason="?"),
        "Rain. So the answer is neutral.\n\nPremise: x",
    ),
    "palm-svamp": (
        "svamp",
        dict(input="Ann has 8 cows.\nShe sells 3. How many?", label="( 8.0 - 3.0 )"),
        "Less. The answer is (8 - 3).\n\nQ: x",
    ),
}


@pytest.mark.parametrize("layout", steps)
def test_layouts_of_distilling_step_by_step(tmp_path, layout):
    name, row, text = steps[layout]
    write(tmp_path / f"{name}_train.json", [row])
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "train_CoT_0.json").write_text(json.dumps([text]))
    [r] = import_rationales(tmp_path, layout)
    assert (r.role, r.rationale, r.teacher) == ("gold", text.split()[0], "PaLM 540B")
    assert r.choices[r.target] == {"palm": "you", "palm-svamp": "5"}.get(layout, "neutral")
    [read] = read_published(layout, tmp_path)  # the same parser
    assert read.prediction == r.target and read.was_cut


def test_real_published_files_make_records(real_data):
    palm = import_rationales(real_data / "palm_cqa", "palm", limit=2000)
    wrong = sum(r.role == "counterfactual" for r in palm) / len(palm)
    assert 0.15 < wrong < 0.35 and all("Q:" not in r.rationale for r in palm)
    gpt3 = import_rationales(real_data / "gpt3_csqa", "gpt3", limit=50)
    assert {r.role for r in gpt3} == {"gold"} and len({r.id for r in gpt3}) == 10
    assert all(len(r.extra["rating"]) == 3 for r in gpt3)
    rows = published_rows("palm", real_data / "palm_cqa", "test")
    assert len(rows) == 1221


def test_a_published_folder_is_what_the_hub_library_reads(tmp_path):
    import datasets

    records = import_rationales(own)
    folder = publish_rationales(records, tmp_path / "d", license="cc0-1.0", dataset="Penguins: a page")
    loaded = datasets.load_dataset(str(folder), "gold", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["rationale"][:] == ["It hunts fish."]
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["files"]["counterfactual.jsonl"]["rows"] == 1 and lineage["questions"] == 2
    described = json.loads((folder / "schema.json").read_text())["fields"]
    rows = [json.loads(line) for line in (folder / "gold.jsonl").read_text().splitlines()]
    assert all(described[name]["description"] for row in rows for name in row)
    publish_rationales(records[:1], folder)  # its own folder may be written anew
    assert not (folder / "counterfactual.jsonl").exists()
    (folder / "mine.txt").write_text("notes")
    with pytest.raises(BadInput, match="holds mine.txt"):
        publish_rationales(records, folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("notes")
    with pytest.raises(BadInput, match="of something else"):
        publish_rationales(records, foreign)
    assert (foreign / "README.md").read_text() == "notes"
    with pytest.raises(BadInput, match="no licence's name"):
        publish_rationales(records, tmp_path / "e", license="free: for\nall")


def test_published_without_questions_no_field_repeats_one(tmp_path):
    row = dict(
        id="1", question="Who swims?", choices=["penguin", "camel"], answer=0, rationale="It hunts fish."
    )
    extra = dict(
        answerKey="A",
        gold="penguin",
        options=["penguin", "camel"],
        question_stem="Who swims?",
        explanation="x",
    )
    folder = publish_rationales([row | extra], tmp_path / "d", questions=False)
    [published] = [json.loads(line) for line in open(folder / "gold.jsonl")]
    assert published.keys() == {"id", "rationale", "role", "split", "target"}
    with pytest.raises(BadInput, match="is that of another question.*in line 1"):
        publish_rationales([row, row | {"question": "Who walks?"}], tmp_path / "two")


def test_overlap_by_text_and_by_id():
    records = import_rationales(own)
    asked = [
        Question("x", "who swims", ("Camel", "penguin"), 1),
        Question(records[1].id, "Who sings?", ("penguin", "camel"), 0),
        Question("y", "Who flies?", ("penguin", "camel"), 0),
    ]
    found = overlap(records, asked)
    assert (found.n, found.ids, found.same_id_only) == (3, ("x",), (records[1].id,))
    assert "1 of 3 questions" in str(found)


def test_records_of_this_package_can_be_scored():
    gold, counterfactual = read_rationales([r.to_row() for r in import_rationales(own)])
    assert (gold.prediction, gold.question.answer) == (0, 0)
    assert (counterfactual.prediction, counterfactual.question.answer) == (1, 0)


def test_a_text_of_the_data_is_only_text_in_the_card_of_a_dataset(tmp_path):
    evil = "x\n\n# Buy\n\n<img src=x onerror=alert(1)> [a](https://example.org) | `b"
    row = dict(
        question="Which bird swims?", choices=["robin", "penguin"], answer=1, rationale="It hunts fish."
    )
    cards = []
    for name in ("plain", evil):
        made = [{**row, "id": "1", "role": "gold", "target": 1, "teacher": name}]
        folder = publish_rationales(made, tmp_path / name[:1], title=name, dataset=name)
        cards.append((folder / "README.md").read_text())
        assert json.loads((folder / "lineage.json").read_text())["made"][0]["teacher"] == name
    plain, card = cards
    for sign in ("\n", "|", "<", "](", "`"):
        assert card.count(sign) == plain.count(sign), sign


def test_a_card_that_was_changed_by_hand_is_published_as_it_is(tmp_path, caplog):
    from faithful_distill.ownership import sole_writer

    records = import_rationales(own)
    folder = publish_rationales(records, tmp_path / "d", title="One")
    publish_rationales(records, folder, title="Two")
    card = (folder / "README.md").read_text().replace("# Two", "# Mine")
    (folder / "README.md").write_text(card)
    publish_rationales(records, folder, title="Three")
    assert (folder / "README.md").read_text() == card and "changed by hand" in caplog.text
    with sole_writer(folder, folder / ".publish.lock"):
        with pytest.raises(BadInput, match="is being written by another process"):
            publish_rationales(records, folder)
