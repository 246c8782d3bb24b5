"""The four public datasets load whole, with their irregularities; bad records are named."""

import gzip
import json
from collections import Counter

import pytest

from faithful_distill.answer_rule import answer_index
from faithful_distill.files import BadInput
from faithful_distill.question_rows import as_dataset, as_questions, require_answers
from faithful_distill.questions import Question, match_choice, choice_text, normalized, perturbed_index
from faithful_distill.sources import Source, load_questions, questions_from, register_source, sources

counts = [
    ("csqa", "train", 9741),
    ("csqa", "dev", 1221),
    ("csqa", "test", 1140),
    ("strategyqa", "train", 2061),
    ("strategyqa", "dev", 229),
    ("creak", "train", 10176),
    ("creak", "dev", 1371),
    ("creak", "test", 1371),
    ("qasc", "train", 8134),
    ("qasc", "dev", 926),
    ("qasc", "test", 920),
]


@pytest.mark.parametrize("name,split,n", counts)
def test_real_files_load_whole(real_data, name, split, n):
    questions = as_questions(load_questions(name, split, path=real_data / name))
    assert len(questions) == n and len({q.id for q in questions}) == n
    assert all((q.answer is None) == (split == "test") for q in questions)
    assert all(q.question == q.question.strip() for q in questions)
    if split == "test":
        with pytest.raises(BadInput, match="labelled split"):
            require_answers(questions)


def test_real_files_irregularities(real_data):
    csqa = as_questions(load_questions("csqa", "train", path=real_data / "csqa"))
    twins = [q for q in csqa if len(set(map(normalized, q.choices))) < len(q.choices)]
    gold_twins = [
        q for q in twins if sum(normalized(c) == normalized(q.choices[q.answer]) for c in q.choices) > 1
    ]
    assert len(twins) == 122 and len(gold_twins) == 42
    for q in twins:
        assert len({normalized(choice_text(q, i)) for i in range(len(q.choices))}) == len(q.choices)
        assert normalized(q.choices[perturbed_index(q)]) != normalized(q.choices[q.answer])
    creak = as_questions(load_questions("creak", "dev", path=real_data / "creak" / "dev.json"))
    rows = [json.loads(line) for line in (real_data / "creak" / "dev.json").read_text().splitlines()]
    assert [q.choices[q.answer] for q in creak] == [r["label"] for r in rows]
    raw = json.loads((real_data / "strategyqa" / "dev.json").read_text())
    strategy = as_questions(load_questions("strategyqa", "dev", path=real_data / "strategyqa"))
    assert [q.choices[q.answer] == "yes" for q in strategy] == [r["answer"] for r in raw]
    qasc = as_questions(load_questions("qasc", "train", path=real_data / "qasc"))
    assert {len(q.choices) for q in qasc} == {8} and max(Counter(q.question for q in qasc).values()) > 1


def test_wrong_answers_depend_on_nothing_but_seed_and_id(real_data):
    questions = as_questions(load_questions("csqa", "dev", path=real_data / "csqa", limit=300))
    forward = {q.id: perturbed_index(q, 5) for q in questions}
    assert forward == {q.id: perturbed_index(q, 5) for q in reversed(questions)}
    assert forward != {q.id: perturbed_index(q, 6) for q in questions}


bad_rows = [
    ({"choices": ["a", "b"], "answer": 0}, "question"),
    ({"question": " ", "choices": ["a", "b"], "answer": 0}, "question"),
    ({"question": "Q", "choices": ["a"], "answer": 0}, "choices"),
    ({"question": "Q", "choices": ["a", ""], "answer": 0}, "choices"),
    ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "answer"),
    ({"question": "Q", "choices": ["a", "b"], "answer": -1}, "answer"),
    ({"question": "Q", "choices": ["a", "b"], "answer": "c"}, "answer"),
    ({"question": "Q", "choices": ["a", "A "], "answer": "a"}, "answer"),
    ({"question": "Q", "choices": ["a", "b"], "answer": True}, "answer"),
    ({"question": "Q", "choices": ["a", "b"], "answer": 0.5}, "answer"),
    ({"question": "Q", "choices": ["a", "b"], "answer": 0, "kind": "essay"}, "kind"),
    ({"question": "Q", "choices": "ab", "answer": 0}, "choices"),
]


@pytest.mark.parametrize("row,field", bad_rows)
def test_bad_records_name_file_line_and_field(tmp_path, row, field):
    good = {"question": "Q", "choices": ["a", "b"], "answer": "b"}
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n{json.dumps(good)}\n")
    with pytest.raises(BadInput) as error:
        load_questions(path)
    assert (error.value.field, error.value.line) == (field, 3) and str(error.value).startswith(f"{path}:3: ")
    assert len(load_questions(path, skip_bad=tmp_path / "rejected.jsonl")) == 2
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["field"]) for r in rejected] == [(3, field)]


def test_broken_lines_and_wrong_kinds_of_file(tmp_path, real_data):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "Q", "choices": ["a", "b"], "answer": 0}\n{"question": \n')
    with pytest.raises(BadInput, match="own.jsonl:2: broken JSON"):
        load_questions(path)
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"sentence": "Soup is solid.", "label": "true"}\n')  # no ex_id: nobody's layout
    with pytest.raises(BadInput, match="torn.jsonl:1: field 'question': is missing. Is it 'sentence'"):
        load_questions(torn)
    with pytest.raises(BadInput, match="dev.json:2: field 'ex_id'"):
        load_questions("creak", "dev", path=real_data / "strategyqa" / "dev.json")
    with pytest.raises(BadInput, match="neither a known dataset nor a file"):
        load_questions("cqsa")
    with pytest.raises(BadInput, match="not a split"):
        load_questions("strategyqa", "validation", path=tmp_path)


def test_duplicate_ids(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"id": "1", "question": "Q", "choices": ["a", "b"], "answer": 0}\n' * 2)
    with pytest.raises(BadInput, match="own.jsonl:2: field 'id': was already used in line 1"):
        load_questions(path)


def test_through_datasets_on_disk(tmp_path, real_data):
    "A folder written by `datasets` goes through the code of the hub."
    import datasets

    rows = [json.loads(line) for line in (real_data / "qasc" / "dev.jsonl").read_text().splitlines()[:50]]
    flat = [
        dict(
            id=r["id"],
            question=r["question"]["stem"],
            answerKey=r["answerKey"],
            combinedfact=r["combinedfact"],
            choices={k: [c[k] for c in r["question"]["choices"]] for k in ("text", "label")},
        )
        for r in rows
    ]
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(flat)}).save_to_disk(tmp_path / "qasc")
    local = as_questions(load_questions("qasc", "dev", path=real_data / "qasc", limit=50))
    assert as_questions(load_questions("qasc", "dev", path=tmp_path / "qasc")) == local


rule = [  # answer, choices, kind, index or what the error says
    (0, ["a", "b"], "choice", 0),
    (1, ["1", "2"], "choice", "is ambiguous"),  # an index, and the text of another choice
    ("1", ["1", "2"], "choice", "is ambiguous"),
    (2, ["1", "2", "3"], "choice", "is ambiguous"),
    ("2", ["1", "2", "3"], "choice", "is ambiguous"),
    ("3", ["1", "2", "3"], "choice", 2),  # 3 is no index here
    (1, ["0", "1."], "choice", 1),  # both readings agree
    ("7", ["5", "7"], "choice", 1),
    ("(b)", ["1", "2"], "choice", 1),
    ("B", ["x", "y"], "choice", 1),
    ("b.", ["x", "y"], "choice", 1),
    ("z", ["x", "y"], "choice", "is not among the choices"),
    ("B", ["A", "B"], "choice", 1),
    ("(b)", ["B", "x"], "choice", 1),
    ("B", ["Enzymes", "zinc", "B"], "choice", "is ambiguous: .* 1 \\('zinc'\\) or 2 \\('B'\\)"),
    (" B. ", ["a", "b"], "choice", 1),  # case, blanks and full stops do not count
    ("(b)", ["a", "c"], "choice", 1),
    ("b", ["B", "a"], "choice", "is ambiguous"),
    ("a", ["a", "A "], "choice", "fits 2 choices that read the same"),
    ("c", ["a", "b"], "choice", "is not among the choices"),
    (True, ["a", "b"], "choice", "is true/false"),
    (True, ["yes", "no"], "boolean", 0),
    (True, ["no", "yes"], "boolean", 1),
    ("true", ["no", "yes"], "boolean", 1),
    (False, ["true", "false"], "statement", 1),
    ("no", ["true", "false"], "statement", 1),
    (None, ["a", "b"], "choice", None),
]


@pytest.mark.parametrize("answer, choices, kind, expected", rule)
def test_the_answer_rule(answer, choices, kind, expected):
    if isinstance(expected, str):
        with pytest.raises(BadInput, match=expected) as error:
            answer_index(answer, choices, kind)
        assert error.value.field == "answer" and error.value.value is answer
        return
    found = answer_index(answer, choices, kind)
    assert found == expected and type(found) is type(expected)


def read_toy(row):
    return dict(question=row["q"], choices=row["c"].split(), answer=row.get("a"))


@pytest.fixture
def toy():
    register_source("toy", Source(read=read_toy, files={"train": "toy.jsonl", "dev": "toy_dev.jsonl"}))
    yield "toy"
    del sources["toy"]


def test_a_registered_dataset_is_loaded_as_the_others_are(toy, tmp_path):
    (tmp_path / "toy.jsonl").write_text('{"q": "Who?", "c": "me you", "a": 1}\n{"q": "Where?"}\n')
    with pytest.raises(BadInput, match=r"toy.jsonl:2: cannot be read as a question: KeyError: 'c'"):
        load_questions("toy", path=tmp_path)
    [q] = as_questions(load_questions("toy", path=tmp_path, limit=1))
    assert (q.id, q.choices, q.answer, q.dataset) == ("toy-1", ("me", "you"), 1, "toy")
    with pytest.raises(BadInput, match="is not on the hub"):
        load_questions("toy")
    with pytest.raises(BadInput, match="field 'split': is not a split.*toy has train, dev"):
        load_questions("toy", "test", path=tmp_path)
    assert load_questions(tmp_path / "toy.jsonl", limit=1)[0]["question"] == "Who?"  # known by its layout


def test_a_dataset_is_not_replaced_by_another_of_its_name(toy):
    register_source("toy", sources["toy"])
    with pytest.raises(BadInput, match="is the name of another dataset"):
        register_source("toy", Source(read=read_toy, files={"train": "other.jsonl"}))
    with pytest.raises(BadInput, match="names a split that files= does not have"):
        register_source("new", Source(read=read_toy, files={"train": "t"}, hub_splits={"dev": "validation"}))
    assert "new" not in sources


@pytest.mark.parametrize("choices", [None, ["yes", "no"], ["no", "yes"], ["No", "Yes."]])
@pytest.mark.parametrize(
    "answer, word",
    [(True, "yes"), (False, "no"), ("true", "yes"), ("no", "no"), ("yes", "yes"), ("False", "no")],
)
def test_yes_and_no_go_by_their_words_not_by_their_order(tmp_path, choices, answer, word):
    path = tmp_path / "own.jsonl"
    path.write_text(
        json.dumps({"question": "Q", "kind": "boolean", "choices": choices, "answer": answer}) + "\n"
    )
    [q] = as_questions(load_questions(path))
    assert normalized(q.choices[q.answer]) == word


@pytest.mark.parametrize(
    "kind, choices",
    [
        ("boolean", ["false", "true"]),
        ("boolean", ["yes", "no", "maybe"]),
        ("boolean", ["yes", "yes"]),
        ("statement", ["yes", "no"]),
        ("statement", ["a", "b"]),
    ],
)
@pytest.mark.parametrize("answer", [True, "yes", 0])
def test_choices_that_are_not_those_of_the_kind_are_refused(tmp_path, kind, choices, answer):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "Q", "kind": kind, "choices": choices, "answer": answer}) + "\n")
    with pytest.raises(
        BadInput, match="own.jsonl:1: field 'choices': must be (yes and no|true and false) for the kind"
    ):
        load_questions(path)
    with pytest.raises(BadInput, match="must be .* for the kind"):
        as_questions([{"id": "1", "question": "Q", "kind": kind, "choices": choices, "answer": 0}])


csqa = {
    "id": "1",
    "answerKey": "A",
    "question": {"stem": "s", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]},
}
flat = {"id": "1", "answerKey": "A", "question": "s", "choices": {"label": ["A", "B"], "text": ["x", "y"]}}
asked = {"question": "Q", "choices": ["a", "b"], "answer": 0}
odd_rows = [
    ("csqa", csqa | {"question": {"stem": "s", "choices": [1, 2]}}, "label"),
    ("csqa", csqa | {"question": {"stem": "s", "choices": ["a", "b"]}}, "label"),
    ("csqa", csqa | {"combinedfact": 5}, "combinedfact"),
    ("csqa", csqa | {"answerKey": ["A"]}, "answerKey"),
    ("csqa", flat | {"choices": {"label": ["A", "B"], "text": ["x", None]}}, "choices"),
    ("csqa", flat | {"choices": {"label": [["A"], ["B"]], "text": ["x", "y"]}}, "choices"),
    ("csqa", flat | {"choices": {"label": ["A", "B", "C"], "text": ["x", "y"]}}, "choices"),
    ("strategyqa", {"qid": "1", "question": "s", "answer": True, "facts": [5]}, "facts"),
    ("strategyqa", {"qid": "1", "question": "s", "answer": True, "facts": 5}, "facts"),
    ("creak", {"ex_id": "1", "sentence": "s", "label": "true", "explanation": 5}, "explanation"),
    ("creak", {"ex_id": "1", "sentence": "s", "label": 0}, "label"),
    ("creak", {"ex_id": "1", "sentence": "s", "label": ["true"]}, "label"),
    (None, asked | {"kind": ["x"]}, "kind"),
    (None, asked | {"kind": []}, "kind"),
    (None, asked | {"id": ["x"]}, "id"),
    (None, asked | {"id": 0.5}, "id"),
    (None, asked | {"id": True}, "id"),
    (None, asked | {"explanation": 5}, "explanation"),
    (None, asked | {"split": 5}, "split"),
    (None, asked | {"choices": [["a"], ["b"]]}, "choices"),
    (None, asked | {"question": 5}, "question"),
]


@pytest.mark.parametrize("name, row, field", odd_rows)
def test_fields_of_another_type_are_named_and_can_be_left_out(tmp_path, name, row, field):
    path, rejected = tmp_path / "own.jsonl", tmp_path / "rejected.jsonl"
    path.write_text(json.dumps(row) + "\n")
    load = lambda **more: load_questions(name, path=path, **more) if name else load_questions(path, **more)
    with pytest.raises(BadInput) as error:
        load()
    assert (
        (error.value.field, error.value.line) == (field, 1)
        and str(error.value).startswith(f"{path}:1: ")
        and "<class" not in str(error.value)
    )
    with pytest.raises(BadInput, match="there are no questions.*left out is in .*rejected.jsonl"):
        load(skip_bad=rejected)
    assert json.loads(rejected.read_text())["field"] == field


def test_what_no_check_foresaw_is_named_by_file_and_line(tmp_path, monkeypatch):
    from faithful_distill import sources as module

    monkeypatch.setattr(module, "plain_fields", lambda row: row["question"].strip() and None | row)
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(asked) + "\n")
    with pytest.raises(BadInput, match="own.jsonl:1: cannot be read as a question: TypeError"):
        load_questions(path)


def test_files_without_questions_and_sets_without_any(tmp_path):
    path = tmp_path / "own.jsonl"
    for text in ("", "[]", "\n\n"):
        path.write_text(text)
        with pytest.raises(BadInput, match="own.jsonl: there are no questions"):
            load_questions(path)
    path.write_bytes(b"[" + b" " * 70 + b"\xff]")
    with pytest.raises(BadInput, match="is not UTF-8"):
        load_questions(path)
    assert (
        as_dataset([]).column_names == list(as_dataset(as_questions([asked | {"id": "1"}])).column_names)
        and as_questions(as_dataset([])) == []
    )


def test_a_missing_id_is_made_whether_it_is_left_out_or_null(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (asked | {"id": None}, asked, asked | {"id": 7})))
    assert load_questions(path)["id"] == ["own-1", "own-2", "7"]


def test_a_folder_for_the_list_of_bad_records_is_refused_before_anything_is_read(tmp_path):
    from click.testing import CliRunner
    from faithful_distill.cli import main

    with pytest.raises(BadInput, match="is a folder, not a file"):
        load_questions("csqa", path=tmp_path / "nowhere", skip_bad=tmp_path)
    done = CliRunner().invoke(
        main,
        [
            "rationales",
            "--data",
            "world",
            "--limit",
            "1",
            "--skip-bad",
            str(tmp_path),
            "--out",
            str(tmp_path / "r.jsonl"),
        ],
    )
    assert (
        done.exit_code == 2
        and "cannot be given for the world" in done.output
        and not (tmp_path / "r.jsonl").exists()
    )


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    "row, index",
    [
        ({"choices": ["ice", "steam"], "answer": "B"}, 1),
        ({"choices": ["ice", "steam"], "answerKey": "B"}, 1),
        ({"choices": ["ice", "steam"], "gold": 1}, 1),
        ({"choices": ["ice", "steam"], "gold": "steam", "answer": "b", "answerKey": "(B)"}, 1),
        ({"choices": {"text": ["fog", "ice", "rain"], "label": ["1", "2", "3"]}, "answerKey": "3"}, 2),
        ({"choices": {"text": ["fog", "ice", "rain"], "label": ["3", "1", "2"]}, "answerKey": "3"}, 0),
        ({"choices": {"text": ["fog", "ice"], "label": ["C", "D"]}, "answer": "d"}, 1),
        ({"choices": [{"text": "fog", "label": "A"}, {"text": "ice", "label": "B"}], "answer": "B"}, 1),
        ({"choices": ["ice", "steam"], "answerKey": ""}, None),
        ({"choices": ["ice", "steam"], "answer": None, "label": "x"}, None),
    ],
)
def test_letters_labels_and_other_names_of_the_answer(tmp_path, row, index):
    [q] = as_questions(load_questions(write_rows(tmp_path / "own.jsonl", {"question": "Q"} | row)))
    assert q.answer == index and all(isinstance(c, str) for c in q.choices)


@pytest.mark.parametrize(
    "row, field, problem",
    [
        ({"label": 1}, "label", "If it is the answer"),
        ({"correct_answer": "ice"}, "correct_answer", "If it is the answer"),
        ({"answer_idx": 1}, "answer_idx", "If it is the answer"),
        ({"Answer": "ice"}, "Answer", "If it is the answer"),
        ({"target": "ice"}, "target", "If it is the answer"),
        ({"answer": 0, "gold": 1}, "gold", "is another choice than 'answer' says"),
        ({"answerKey": "E"}, "answerKey", "is not among the choices"),
        (
            {"choices": {"text": ["2", "1"], "label": ["1", "2"]}, "answerKey": "1"},
            "answerKey",
            "is ambiguous",
        ),
        ({"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": 1}, "answer", "is ambiguous"),
        ({"choices": [str(i) for i in range(27)], "answer": 0}, "choices", "at most 26"),
        ({"explanation": "half \ud83d", "answer": 0}, "explanation", "lone surrogate"),
        ({"id": "\ud83d", "answer": 0}, "id", "lone surrogate"),
    ],
)
def test_answers_that_would_be_guessed_or_lost_are_refused(tmp_path, row, field, problem):
    good = {"question": "Q", "choices": ["ice", "steam"], "answer": 0}
    path = write_rows(tmp_path / "own.jsonl", good, {"question": "Q", "choices": ["ice", "steam"]} | row)
    with pytest.raises(BadInput, match=problem) as error:
        load_questions(path)
    assert (error.value.field, error.value.line) == (field, 2) and str(error.value).startswith(f"{path}:2: ")
    assert len(load_questions(path, skip_bad=tmp_path / "rejected.jsonl")) == 1


def test_half_a_character_in_memory_is_named():
    with pytest.raises(BadInput, match="field 'choices': row 1: contains a lone surrogate"):
        as_questions([asked | {"id": "1", "choices": ["a", "\ud83d"]}])


def test_records_of_other_splits_are_passed_over_and_counted(tmp_path, caplog):
    row = {"question": "Q", "choices": ["x", "y"], "answer": 0}
    path = write_rows(tmp_path / "own.jsonl", row | {"split": "train"}, row | {"split": "test"}, row)
    assert load_questions(path, "train")["id"] == ["own-1", "own-3"]
    assert caplog.messages == [f"{path}: 1 records passed over, of other splits than 'train': 'test' (1)"]
    path = write_rows(tmp_path / "own.jsonl", row | {"split": "validation"}, row | {"split": "test"})
    assert load_questions(path, "dev")["id"] == ["own-1"]
    with pytest.raises(BadInput, match="All 2 are of another split than 'train': ask for 'validation'"):
        load_questions(path, "train")


def test_a_field_that_is_almost_one_that_is_read_is_named(tmp_path, caplog):
    row = {"question": "Q", "choices": ["x", "y"], "answer": 0, "explaination": "why", "source": "web"}
    load_questions(write_rows(tmp_path / "own.jsonl", row))
    assert [m.split("own.jsonl: ")[1] for m in caplog.messages] == [
        "not read: the field 'explaination' (is it 'explanation'?)"
    ]


@pytest.mark.parametrize("kind", ["array", "lines", "array.gz", "lines.gz"])
def test_only_as_much_of_a_file_is_read_as_is_asked_for(tmp_path, kind):
    import gzip
    import tracemalloc

    rows = [
        {"question": f"Q {i} " + "word " * 200, "choices": ["x", "y"], "answer": i % 2} for i in range(3000)
    ]
    text = json.dumps(rows) if kind.startswith("array") else "".join(json.dumps(r) + "\n" for r in rows)
    path = tmp_path / f"own.{kind}"
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    del rows
    load_questions(path, limit=1)  # the library `datasets` is loaded
    tracemalloc.start()
    assert len(load_questions(path, limit=3)) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 700_000 < 3_000_000 < len(text)
    found = as_questions(load_questions(path))
    assert [q.answer for q in found] == [i % 2 for i in range(3000)] and len({q.id for q in found}) == 3000


def test_what_follows_the_limit_is_not_even_read(tmp_path):
    path = write_rows(tmp_path / "own.jsonl", {"question": "Q", "choices": ["x", "y"], "answer": 0})
    path.write_text(path.read_text() + "broken\n")
    assert len(load_questions(path, limit=1)) == 1


@pytest.mark.parametrize(
    "item, problem",
    [
        (
            '{"question": "Q", "choices": ["x", "y"], "answer": 0, "answer": 1}',
            "field 'answer': occurs twice",
        ),
        ('{"question": "\\ud83d", "choices": ["x", "y"], "answer": 0}', "field 'question': contains a lone"),
        ("7", "is not a JSON object"),
    ],
)
def test_items_of_an_array_that_are_no_records_are_named_or_left_out(tmp_path, item, problem):
    good = '{"question": "Q", "choices": ["x", "y"], "answer": 0}'
    path = tmp_path / "own.json"
    path.write_text(f"[\n{good},\n{item},\n{good}]")
    with pytest.raises(BadInput, match=f"own.json:3: {problem}"):
        load_questions(path)
    assert len(load_questions(path, skip_bad=tmp_path / "rejected.jsonl")) == 2


@pytest.mark.parametrize(
    "text", ['[{"question": "Q"', "[", '[{"question": "Q"},', '[{"question" 1}]', '[{"question": tru']
)
def test_an_array_that_is_broken_or_cut_off_is_one_line(tmp_path, text):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(BadInput, match="own.json:1: (broken JSON|the JSON array does not end|field)"):
        load_questions(tmp_path / "own.json")


def test_a_local_copy_beside_the_world_is_refused():
    from faithful_distill.question_options import read_questions

    with pytest.raises(BadInput, match="field 'path': cannot be given for the world"):
        read_questions("world", path="somewhere")


different = [
    ("−5", "5"), ("<5", "5"), ("≠5", "5"), ("~5", "5"), ("√2", "2"), ("¬A", "A"), ("½", "1"), (">5", "<5"),
    ("की", "कि"), ("กิ", "กี"), ("5!", "5"), ("!A", "A"), ("!=5", "=5"), ("1/2", "12"), ("1/2", "1 2"),
    ("3:1", "3 1"), ("2*3", "2 3"), ("x²", "x"), ("$5", "€5"), ("5°", "5"), ("5′", "5"), ("5'", '5"'),
    ("5%", "5‰"), (".5", "5"), ("-.5", ".5"), ("-√2", "√2"), ("-x", "x"), ("O-", "O"), ("O+", "O-"),
    ("a - b", "b"), ("a < b", "b"), ("5-3", "5 3"), ("5 - 3", "5 3"), ("∞", "-∞"), ("[1, 2]", "(1, 2)"),
    ("A∧B", "A∨B"), ("x^2", "x 2"), ("é", "e"), ("C#", "C"), ("🙂", "🙃"), ("A|B", "A B"), ("±5", "5"),
]  # fmt: skip


@pytest.mark.parametrize("meant, other", different)
def test_signs_and_marks_with_a_meaning_belong_to_the_text(meant, other):
    q = Question("q", "?", (meant, "none of these"), None)
    assert match_choice(q, other) is None and match_choice(q, meant) == match_choice(q, f" {meant}.") == 0
    q = Question("q", "?", (meant, other), None)
    assert (match_choice(q, meant), match_choice(q, other)) == (0, 1)


same = [
    ("bird", "The bird!"), ("ice-cream", "ice cream"), ("bird", "**bird**"), ("bird", '"bird"'), ("5", '"5"'),
    ("covid-19", "COVID 19"), ("don't", "don’t"), ("caf\u00e9", "cafe\u0301"), ("鱼", "鱼。"), ("鱼", "「鱼」"),
    ("−5", "-5"), ("1990–1995", "1990-1995"), ("bird", "- bird"), ("5 %", "5%"), ("washington d.c", "Washington D.C."),
    ("a bird", "bird,"), ("bird", "¿bird?"), ("ปลา", "ปลา"), ("ア", "ア。"),
]  # fmt: skip


@pytest.mark.parametrize("meant, other", same)
def test_punctuation_and_the_way_of_writing_marks_do_not_count(meant, other):
    assert match_choice(Question("q", "?", (meant, "none of these"), None), other) == 0


def test_choices_that_read_like_a_text_are_those_that_normalise_to_it():
    "The shortcut by the first word passes over none; checked against the plain comparison."
    from faithful_distill.answer_rule import _reading_like
    from faithful_distill.questions import normalized

    texts = [
        "3",
        " 3. ",
        ".5",
        "5",
        "The  Bank",
        "the bank.",
        "bank",
        "caf\u00e9",
        "cafe\u0301",
        "",
        ".",
        "\u212a",
        "k",
        "K.",
    ]
    for text in texts:
        expected = [i for i, c in enumerate(texts) if normalized(c) == normalized(text)]
        assert _reading_like(text, [*texts, 3, None]) == expected, text


def test_a_dataset_is_the_same_in_however_many_parts_it_is_made(monkeypatch):
    from faithful_distill import question_rows as module

    asked = [
        module.Question(
            f"q{i}", f"Which is {i}?", ("a", "b", "c")[: 2 + i % 2], [None, 0, 1][i % 3], explanation="é"
        )
        for i in range(25)
    ]
    whole = module.as_dataset(asked)
    monkeypatch.setattr(module, "islice", lambda rows, n: [one for _, one in zip(range(7), rows)])
    parts = module.as_dataset(iter(asked))
    assert module.as_questions(parts) == module.as_questions(whole) == asked
    assert parts.features == whole.features == module.as_dataset([]).features
    assert (
        whole._fingerprint
        == module.as_dataset(asked)._fingerprint
        != module.as_dataset(asked[1:])._fingerprint
    )


# --- every door to the same questions ------------------------------------------------------------

own = [
    dict(question="Where are books?", choices=["library", "sea"], answer="library"),
    dict(question="Who, then?", choices=["me", "you"], answer="B"),
    dict(question="What?", choices=["this", "that"], answer=1),
]


def doors(folder):
    "(name, what is given) for each way in."
    import datasets
    import pandas as pd

    as_cells = pd.DataFrame([q | dict(choices="|".join(q["choices"])) for q in own])
    texts = [q | dict(answer=str(q["answer"])) for q in own]
    lines = "".join(json.dumps(q) + "\n" for q in own)
    for name, content in (("own.jsonl", lines), ("own.json", json.dumps(own))):
        (folder / name).write_text(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        yield name, folder / name
        yield f"{name}.gz", folder / f"{name}.gz"
    as_cells.to_csv(folder / "own.csv", index=False)
    as_cells.to_csv(folder / "own.tsv", index=False, sep="\t")
    as_cells.to_csv(folder / "semicolons.csv", index=False, sep=";")
    pd.DataFrame(texts).to_parquet(folder / "own.parquet")
    for name in ("own.csv", "own.tsv", "semicolons.csv", "own.parquet"):
        yield name, folder / name
    yield "dicts", own
    yield "data frame", pd.DataFrame(own)
    yield "Dataset", datasets.Dataset.from_list(texts)
    yield "DatasetDict", datasets.DatasetDict(train=datasets.Dataset.from_list(texts))


def test_every_door_gives_the_same_questions(tmp_path):
    wanted = [(q["question"], tuple(q["choices"]), a) for q, a in zip(own, (0, 1, 1))]
    for name, given in doors(tmp_path):
        loaded = as_questions(load_questions(given))
        assert [(q.question, q.choices, q.answer) for q in loaded] == wanted, name
        assert len({q.id for q in loaded}) == 3 and {q.split for q in loaded} == {"train"}, name
        if name != "DatasetDict":
            assert [(q.question, q.choices, q.answer) for q in questions_from(given)] == wanted, name
    assert as_questions(load_questions(own[0]))[0].answer == 0  # one dict


def test_columns_of_other_names(tmp_path):
    rows = [dict(q=dict(stem="Who?"), A="me", B="you", right="B", answer="It is you.")]
    theirs = dict(question="q.stem", choices=["A", "B"], answer="right", explanation="answer")
    [q] = as_questions(load_questions(rows, columns=theirs))
    assert (q.question, q.choices, q.answer, q.explanation) == ("Who?", ("me", "you"), 1, "It is you.")
    for columns, problem in (
        (theirs | {"answer": "rihgt"}, "row 1: there is no such column.*Did you mean 'right'"),
        ({"awnser": "right"}, "is no field of ours.*Did you mean 'answer'"),
        ({"right": "answer"}, "Say answer=right"),
        ({"choices": 3}, "must be a column's name"),
    ):
        with pytest.raises(BadInput, match=problem):
            load_questions(rows, columns=columns)


def test_a_dataset_of_this_package_comes_back_as_it_was():
    "Though its choices are digits, which no answer of a stranger's file could choose from."
    questions = [Question(str(i), "Which?", ("1", "2", "3"), i, split="train", dataset="d") for i in range(3)]
    assert (
        as_questions(as_dataset(questions))
        == as_questions(load_questions(as_dataset(questions)))
        == questions
    )
    with pytest.raises(BadInput, match="ambiguous"):
        as_questions([dict(question="Which?", choices=["1", "2", "3"], answer=1)])


@pytest.mark.parametrize(
    "name,file", [("creak", "dev.json"), ("strategyqa", "dev.json"), ("csqa", "dev_rand_split.jsonl")]
)
def test_a_known_layout_is_recognised_without_its_name(real_data, name, file):
    found = as_questions(load_questions(real_data / name / file, "dev", limit=20))
    named = as_questions(load_questions(name, "dev", path=real_data / name, limit=20))
    strip = lambda qs: [(q.id, q.question, q.choices, q.answer, q.kind, q.explanation) for q in qs]
    assert strip(found) == strip(named)


layouts = {
    "arc-easy": dict(
        id="a", question="Who?", choices=dict(text=["me", "you"], label=["1", "2"]), answerKey="2"
    ),
    "openbookqa": dict(
        id="o", question_stem="Who?", choices=dict(text=["me", "you"], label=["A", "B"]), answerKey="B"
    ),
    "boolq": dict(question="is it you", passage="It is not.", answer=False),
    "piqa": dict(goal="Boil it.", sol1="Cold.", sol2="Hot.", label=1),
    "esnli": dict(premise="It rains.", hypothesis="It is wet.", label=1, explanation_1="Rain."),
    "anli1": dict(uid="u", premise="It rains.", hypothesis="It is wet.", label=1, reason="Rain."),
    "svamp": dict(ID="s", Body="Ann has 8 cows", Question="What if 3 more?", Answer="11.0", Equation="8+3"),
    "ecqa": dict(q_no="e", q_text="Who?", q_ans="you", taskB="You.")
    | {f"q_op{i}": f"no {i}" for i in range(1, 6)},
}
layouts["ecqa"]["q_op2"] = "you"


@pytest.mark.parametrize("answer", ["nan", "1_000", "inf", 10**400, "1e999", float("nan"), "five"])
def test_an_answer_of_svamp_is_a_finite_number(answer):
    with pytest.raises(BadInput, match="field 'Answer': is not a number"):
        sources["svamp"].read(layouts["svamp"] | {"Answer": answer})
    [q] = as_questions(load_questions([layouts["svamp"] | {"Body": f"Ann has {'9' * 400} cows"}]))
    assert "inf" not in q.choices and q.choices[q.answer] == "11"


@pytest.mark.parametrize("name", layouts)
def test_layouts_of_the_hub(tmp_path, name):
    "By name from a folder as `datasets` reads one, and from a table without a name."
    hub_split = sources[name].hub_splits.get("dev", "test" if name == "svamp" else "dev")
    (tmp_path / f"{hub_split}.jsonl").write_text(json.dumps(layouts[name]) + "\n")
    import datasets

    loaded = datasets.DatasetDict({hub_split: datasets.Dataset.from_list([layouts[name]])})
    loaded.save_to_disk(tmp_path / "hub")
    [q] = as_questions(load_questions(name, "test" if name == "svamp" else "dev", path=tmp_path / "hub"))
    right = {"svamp": "11", "boolq": "no", "piqa": "Hot.", "esnli": "neutral", "anli1": "neutral"}
    assert q.choices[q.answer] == right.get(name, "you")
    [unnamed] = as_questions([*load_questions([layouts[name]])])
    assert (unnamed.question, unnamed.choices, unnamed.answer) == (q.question, q.choices, q.answer)


@pytest.mark.parametrize(
    "names",
    ["A B C", "a b c", "choice1 choice2 choice3", "option_a option_b option_c", "Choice 0,Choice 1,Choice 2"],
)
def test_choices_in_columns_of_their_own(tmp_path, names):
    names = names.split(",") if "," in names else names.split()
    file = tmp_path / "quiz.csv"
    rows = ["Where is milk kept?,oven,fridge,garage,B", "Which is hot?,ice,fire,,b"]
    file.write_text("\n".join([f"question,{','.join(names)},answer", *rows]) + "\n")
    first, second = questions_from(file)
    assert (first.choices, first.answer) == (("oven", "fridge", "garage"), 1)
    assert (second.choices, second.answer) == (("ice", "fire"), 1)  # an empty cell at the end is no choice


@pytest.mark.parametrize("header", ["A", "A,C", "B,C", "A,grade"])
def test_columns_that_are_no_choices_are_not_taken_for_them(tmp_path, header):
    file = tmp_path / "quiz.csv"
    file.write_text(f"question,{header},answer\nWhich?,{','.join('x' for _ in header.split(','))},x\n")
    with pytest.raises(BadInput, match=r"quiz.csv:2: field 'choices': is missing.*--columns choices=A\+B"):
        load_questions(file)


def test_columns_may_be_said_as_on_the_command_line(tmp_path):
    row = {"q": "Which is hot?", "one": "ice", "two": "fire", "right": 1}
    columns = {"question": "q", "choices": "one+two", "answer": "right"}
    [q] = questions_from(load_questions([row], columns=columns))
    assert q.choices == ("ice", "fire") and q.answer == 1
    named = {**row, "one+two": ["snow", "sun"]}  # a column of that very name is meant
    [q] = questions_from(load_questions([named], columns=columns))
    assert q.choices == ("snow", "sun")


def test_an_empty_cell_before_a_choice_shifts_no_answer(tmp_path):
    from faithful_distill.exchange import import_rationales
    from faithful_distill.faithfulness.external import read_rationales

    file = tmp_path / "quiz.csv"
    file.write_text("q,A,B,C,D,label,why\nWhere is a dog?,,kennel,river,tree,B,It is tame.\n")
    named = {"question": "q", "choices": "A+B+C+D", "answer": "label"}
    for read, columns in (
        (load_questions, named),
        (import_rationales, named | {"rationale": "why"}),
        (read_rationales, {"question": "q", "choices": "A+B+C+D", "gold": "label", "rationale": "why"}),
    ):
        with pytest.raises(BadInput, match="quiz.csv:2: field 'A': is empty, but 'D' after it is not"):
            read(file, columns=columns)
    with pytest.raises(BadInput, match="The column 'A' is empty before others"):
        load_questions(file, columns={"question": "q", "answer": "label"})
    file.write_text("question,A,B,C,answer,rationale\nWhere is a dog?,kennel,river,,A,It is tame.\n")
    [r] = import_rationales(file)
    assert r.choices == ("kennel", "river") and r.answer == 0 and not r.extra


def test_an_answer_is_the_number_of_a_column_that_is_numbered_from_one():
    from faithful_distill.faithfulness.external import read_rationales

    row = {"sentence": "It was too big.", "option1": "trophy", "option2": "case"}
    answered = lambda answer, **how: as_questions(load_questions([row | {"answer": answer}], **how))[0].answer
    listed = {"question": "sentence", "choices": "option1+option2"}
    for columns in ({"question": "sentence"}, listed):
        read = [answered(answer, columns=columns) for answer in ("1", "2", "B", "(b)", "case", 2, 2.0)]
        assert read == [0, 1, 1, 1, 1, 1, 1]
        for unclear in (1, 1.0, "0", "3"):
            with pytest.raises(BadInput, match="ambiguous|is not among the choices"):
                answered(unclear, columns=columns)
    scored = {
        "question": "Who?",
        "choice1": "me",
        "choice2": "you",
        "rationale": "",
        "gold": "2",
        "prediction": "1",
    }
    assert [(r.gold, r.prediction) for r in read_rationales([scored])] == [(1, 0)]
    labelled = {
        "question": "Who?",
        "choices": {"label": ["1", "2", "3"], "text": ["a", "b", "c"]},
        "answer": 3,
    }
    assert as_questions([labelled])[0].answer == 2, "an index out of range is a label"
    for answer in (1, "1", 0.0):
        with pytest.raises(BadInput, match="is a number.*Write true or false"):
            as_questions([{"question": "Can pigs fly?", "kind": "boolean", "answer": answer}])


def test_choices_of_a_data_frame_are_written_alike():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        [dict(question="2+1?", A=1, B=2, C=3, answer="C"), dict(question="1+1?", A=2, B=4, answer="A")]
    )
    assert [q.choices for q in as_questions(frame)] == [("1", "2", "3"), ("2", "4")]
    for wrong in (["x"], True, {"a": 1}, float("nan")):
        with pytest.raises(BadInput, match="field 'A': row 1: is not a text or a number"):
            as_questions([dict(question="Who?", A=wrong, B="you", answer=0)])


def test_a_split_that_nobody_knows_is_refused_unless_the_records_name_it():
    row = {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1}
    with pytest.raises(BadInput, match="field 'split': is no split.*Did you mean 'test'"):
        load_questions([row], "tets")
    assert len(load_questions([row], "validation")) == 1
    assert len(load_questions([{**row, "split": "pilot"}], "pilot")) == 1


def test_questions_without_an_answer_are_counted_and_the_first_is_named():
    from faithful_distill.question_rows import require_answers

    row = {"question": "Which is hot?", "choices": ["ice", "fire"]}
    rows = [{**row, "id": str(i), "answer": 1 if i else None} for i in (1, 2, 0)]
    with pytest.raises(BadInput, match="1 of 3 questions have no answer.*number 3 .id '0'."):
        require_answers(rows)
    with pytest.raises(BadInput, match="2 of 2 questions have no answer.*columns answer=NAME"):
        require_answers([{**row, "id": i} for i in "ab"])


def test_a_name_in_other_letters_is_known_again():
    from faithful_distill.files import did_you_mean

    assert did_you_mean("LAS", ["accuracy", "las"]) == "Did you mean 'las'?"
    assert did_you_mean("xyz", map(str, range(50))).endswith("39, and 10 more.")
