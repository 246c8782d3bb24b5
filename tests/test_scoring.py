"""Trained readers against plain ones, and rationales of any origin through `score_rationales`."""

import json
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithful_distill.faithfulness.external import read_published, read_rationales, stated_choice, surface
from faithful_distill.faithfulness.families import Family, families, register
from faithful_distill.faithfulness.intervals import Score, mean_score
from faithful_distill.faithfulness.late_interaction import scratch_base
from faithful_distill.faithfulness.readers import ChoiceReader, Reader, reading_scores
from faithful_distill.faithfulness.scoring import score_rationales
from faithful_distill.faithfulness.scoring_task import ScoringTask, _some_groups, find_writer
from faithful_distill.faithfulness.simulators import ModelBehaviour, cross_fitted
from faithful_distill.files import BadInput
from faithful_distill.lab.score_report import _control_text, write_scored
from faithful_distill.questions import Question
from faithful_distill.student.model import tiny_student

words = ["what is it", "a red cow said so", "the sky", "cow", "two cows of the sky", "sky", "red"]
asked = [
    Question("a", "what is it", ("cow", "two cows of the sky", "sky"), 0),
    Question("b", "the sky said", ("red", "cow"), 1),
    Question("c", "it", ("sky", "cow", "red"), 1),
]
texts = ["what is it a red cow", "the sky", "a red cow said so the sky is two cows of it"]


class Base:
    "An encoder-decoder of another family than T5."

    def __init__(self):
        import torch
        import transformers

        self.tokenizer = tiny_student(words).tokenizer
        config = transformers.BartConfig(
            vocab_size=len(self.tokenizer),
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            decoder_start_token_id=1,
            dropout=0.0,
            attention_dropout=0.0,
            forced_eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.BartForConditionalGeneration(config)


def plain_scores(reader, text, tail):
    "One text, one choice, no padding, no cache."
    import torch

    source = torch.tensor([[*reader.before, *text, *reader.after]])
    target = [*tail, reader.tokenizer.eos_token_id]
    decoder = torch.tensor([[reader.model.config.decoder_start_token_id, *target[:-1]]])
    logp = reader.model(input_ids=source, decoder_input_ids=decoder, use_cache=False).logits.log_softmax(-1)[
        0
    ]
    return sum(logp[i, t] for i, t in enumerate(target))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_choices_that_share_a_cache_score_and_learn_like_choices_read_one_by_one(family):
    import torch

    reader = ChoiceReader(
        tiny_student(words, seed=3) if family == "t5" else Base(), settings=Reader(device="cpu")
    )
    ids, choices = reader.texts(texts), reader.choices(asked)

    def both(scores):
        reader.model.zero_grad()
        sum(s[0] for s in scores).backward()
        return torch.cat([p.grad.flatten() for p in reader.model.parameters() if p.grad is not None])

    table = reading_scores(reader, ids, choices)
    slow = [[plain_scores(reader, t, tail) for tail in row] for t, row in zip(ids, choices)]
    for fast_row, slow_row in zip(table, slow):
        assert fast_row[: len(slow_row)].tolist() == pytest.approx([s.item() for s in slow_row], abs=1e-4)
        assert (fast_row[len(slow_row) :] == -1e9).all()
    assert torch.allclose(
        both([row.log_softmax(-1) for row in table]),
        both([torch.stack(row).log_softmax(-1) for row in slow]),
        atol=1e-4,
    )


def encoder_folder(folder):
    "A tiny BERT with random weights, as a folder of `transformers`."
    import transformers

    tokenizer = tiny_student(
        [*words, *(r["question"] + " " + r["rationale"] for r in rows_of_a_file)]
    ).tokenizer
    tokenizer.add_special_tokens({"sep_token": "[SEP]"})
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["encoder", "from scratch"])
def test_readers_that_join_or_match_do_not_see_their_neighbours(kind, tmp_path):
    import torch

    reader = ChoiceReader(
        encoder_folder(tmp_path) if kind == "encoder" else scratch_base(words, vocabulary=300, width=16),
        settings=Reader(device="cpu"),
    )
    reader.model.eval()
    ids, choices = reader.texts(texts), reader.choices(asked)
    with torch.inference_mode():
        together = reading_scores(reader, ids, choices)
        alone = [
            [reading_scores(reader, [t], [[tail]]).item() for tail in row] for t, row in zip(ids, choices)
        ]
    for row, expected in zip(together.tolist(), alone):
        assert row[: len(expected)] == pytest.approx(expected, abs=1e-4) and set(row[len(expected) :]) <= {
            -1e9
        }


def test_simulators_from_an_encoder_checkpoint(tmp_path):
    scored = score_rationales(rows_of_a_file, simulator=encoder_folder(tmp_path), metrics=("las",), **cheap)
    assert sound(scored)["gain"].n == 60 and scored.facts["simulator"] == str(tmp_path)


# ---- a file of rationales: bad input, undefined scores, order

rows_of_a_file = [
    dict(
        id=f"q{i}",
        question=f"Which of the things is number {i}?",
        choices=["lamp", "spoon", "turtle"],
        gold=i % 3,
        prediction=(i + (i % 5 == 0)) % 3,
        rationale=f"it is the {['lamp', 'spoon', 'turtle'][(i + (i % 5 == 0)) % 3]} of the house",
    )
    for i in range(60)
]


@pytest.fixture(autouse=True)
def no_model_at_hand(monkeypatch):
    "Where no simulator is named, it is the one that needs no model, whatever lies in this machine's cache."
    from faithful_distill.faithfulness import simulator_registry

    monkeypatch.setattr(simulator_registry, "model_at_hand", lambda name: None)


cheap = dict(parts=2, seeds=(0,), settings=Reader(epochs=2, batch_size=16), interval=dict(draws=200))


def changed(**fields):
    return dict(rows_of_a_file[1], **fields)


def without(field):
    return {k: v for k, v in rows_of_a_file[1].items() if k != field}


@pytest.mark.parametrize(
    "row, field, said",
    [
        (changed(prediction="sea"), "prediction", "null where the answer could not be parsed"),
        (changed(prediction=3), "prediction", "must be one of the choices"),
        (changed(prediction=-1), "prediction", "must be one of the choices"),
        (changed(prediction=True), "prediction", "must be one of the choices"),
        (changed(gold="(d)"), "gold", "must be one of the choices"),
        (without("rationale"), "rationale", "is missing"),
        (without("question"), "question", "is missing"),
        (changed(rationale=7), "rationale", "must be a text"),
        (changed(choices="lamp"), "choices", "is one text"),
        (changed(choices=["lamp"]), "choices", "at least two"),
        (changed(question=" "), "question", "empty"),
        (changed(rating="good"), "rating", "must be a number"),
        (changed(rating=[1, float("nan")]), "rating", "must be a number"),
        (changed(id="q0"), "id", "already used in line 1"),
        (changed(model=["a"]), "model", "must be a text"),
        (changed(model={"a": 1}), "model", "must be a text"),
        (changed(model=5), "model", "must be a text"),
        (changed(rating=10**400), "rating", "is too large"),
        (changed(rating=True), "rating", "must be a number"),
        (changed(rationale="x \ud83d"), "rationale", "half a character"),
        (changed(choices=["a", "\ud83d"], gold=0, prediction=0), "choices", "half a character"),
        (changed(id="\ud83d"), "id", "half a character"),
    ],
)
def test_bad_rows_name_file_line_field_and_remedy(tmp_path, row, field, said):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, (rows_of_a_file[0], row))))
    with pytest.raises(BadInput) as caught:
        read_rationales(file)
    assert f"own.jsonl:2: field '{field}'" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    "said, choice",
    [
        ("(a) or (b).", None),
        ("(a) cat.", None),
        ("(b) cat", 1),
        ("(b) the cat because it purrs", 1),
        ("(b).", 1),
        ("(B), as cats purr.", 1),
        ("(b)", 1),
        ("cat", 1),
        ("(d) cat", None),
        ("(a) dog, not (b) cat.", None),
        ("(a) dog house", None),
        ("(c) dog house (its own)", 2),
        ("(c) dog house, which is (c)", 2),
        ("(b) or the dog", None),
        ("(b) kitty", 1),
        ("(b) orchid", 1),
        ("either (a) or (b)", None),
        ("dog or cat", None),
        ("(a) dog (s)", 0),
    ],
)
def test_a_letter_is_an_answer_where_nothing_after_it_says_another(said, choice):
    q = Question("q", "Which?", ("dog", "cat", "dog house"), None)
    assert stated_choice(q, f"It barks. So the answer is {said}") == choice
    assert (
        stated_choice(
            Question("q", "Which?", ("vitamin (b)", "iron"), None), "The answer is (a) vitamin (b)."
        )
        == 0
    )
    assert (
        stated_choice(
            Question("q", "What is missing in twist?", ("bend", "and shout"), None),
            "The answer is (b) and shout.",
        )
        == 1
    )


@pytest.mark.parametrize(
    "said, choice",
    [
        ("dog because it barks.", 0),
        ("the dog.", 0),
        ("dog house, for dogs.", None),
        ("dog and not cat.", None),
        ("kitty.", None),
        ("cat. It is not a dog.", 1),
        ("(b) cat. It is not (a).", 1),
    ],
)
def test_an_answer_in_words_ends_with_the_choice_and_its_sentence(said, choice):
    q = Question("q", "Which?", ("dog", "cat", "dogs", "dog house"), None)
    assert stated_choice(q, f"It barks. So the answer is {said}") == choice


wrapped = [
    ("the answer is B.", 1),
    ("The answer is **(B)**", 1),
    ("The answer is **B**.", 1),
    ("The answer is **B. cat**", 1),
    (r"The final answer is $\boxed{B}$", 1),
    (r"The final answer is \boxed{\text{(B)}}.", 1),
    (r"The answer is $\boxed{cat}$.", 1),
    ("Answer: B", 1),
    ("**Answer:** B", 1),
    ("**Answer: B**", 1),
    ("Final answer: (b) cat", 1),
    ("The answer is B. cat", 1),
    ("The answer is B) cat", 1),
    ("The answer is B: cat", 1),
    ("The answer is B - cat", 1),
    ("The answer is option B.", 1),
    ("The answer is choice (b).", 1),
    ("The answer is B, because cats purr.", 1),
    ("The answer is b", 1),
    ("The answer is `B`.", 1),
    ("The answer is __B__", 1),
    ("The answer is B or C.", None),
    ("The answer is B. dog", None),
    ("The answer is Z.", None),
    ("The answer is A cat.", 1),  # an article
    ("The answer is not B.", None),
    (r"\boxed{B}", 1),
    (r"$\boxed{\text{(B)}}$.", 1),
    (r"\boxed{cat}", 1),
    (r"\boxed{A} or \boxed{B}", None),
    (r"\boxed{B}. \boxed{B}", 1),
    (r"\boxed{7}", None),
    (r"\boxed{A}. So the answer is B.", 1),
]


@pytest.mark.parametrize("text, choice", wrapped)
def test_a_letter_is_read_however_it_is_wrapped(text, choice):
    q = Question("q", "Which?", ("dog", "cat", "dog house"), None)
    for before in ("It purrs. ", "It purrs.\n\n"):
        assert stated_choice(q, before + text) == choice, before
        if choice is not None:
            [row] = read_rationales(
                [dict(question="Which?", choices=list(q.choices), rationale=before + text)]
            )
            assert row.reasons.startswith("It purrs") and not {"nswer", "boxed"} & set(row.reasons.split())


@pytest.mark.parametrize("unread, warned", [(3, True), (2, False)])
def test_it_is_said_where_most_rows_have_no_readable_answer(unread, warned, caplog):
    row = dict(question="Which?", choices=["dog", "cat"])
    said = ["It barks."] * unread + ["It barks. So the answer is dog."] * 2
    read_rationales([dict(row, rationale=text, id=str(i)) for i, text in enumerate(said)])
    assert [f"{unread} of 5 rows have no readable answer" in m for m in caplog.messages] == [True] * warned
    assert all("'prediction'" in m for m in caplog.messages)


def test_a_letter_that_is_another_choices_text_is_no_answer():
    minerals = ["Enzymes", "zinc", "Relieve pain", "B"]
    q = Question("q", "Which?", tuple(minerals), None)
    assert stated_choice(q, "The answer is B.") is None and stated_choice(q, "The answer is (b).") == 1
    row = dict(question="Which?", choices=minerals, rationale="It helps.")
    for field in ("prediction", "gold"):
        with pytest.raises(BadInput, match=f"line 1: field '{field}': is ambiguous"):
            read_rationales([dict(row, **{field: "B"})])
    digits = dict(question="How many?", choices=["1", "2", "3"], rationale="I counted.")
    for said in (2, "2"):
        with pytest.raises(BadInput, match="line 1: field 'prediction': is ambiguous"):
            read_rationales([dict(digits, prediction=said)])
    [one] = read_rationales([dict(digits, prediction="(b)", gold="3")])
    assert (one.prediction, one.question.answer) == (1, 2) and read_rationales(
        [one.to_row() | {"id": "line 1"}]
    ) == [one]
    with pytest.raises(BadInput, match="fits 2 choices that read the same"):
        read_rationales([dict(row, choices=["bank", "sea", "bank"], prediction="bank")])


@pytest.mark.parametrize(
    "question, choices, text, counted",
    [
        ("猫喜欢吃什么？", ["鱼", "石头"], "因为猫喜欢吃鱼，所以选鱼。", False),
        ("猫は何を食べますか。", ["魚", "石"], "ネコはさかなが好きです。", False),
        ("แมวกินอะไร", ["ปลา", "หิน"], "แมวชอบกินปลา", False),
        ("고양이는 무엇을 먹나요?", ["생선", "돌"], "고양이는 생선 먹나요", True),
        ("बिल्ली क्या खाती है?", ["मछली", "पत्थर"], "बिल्ली मछली खाती है", True),
        ("What does 猫 mean?", ["cat", "dog"], "The sign 猫 is read as cat", True),
    ],
)
def test_words_are_counted_only_where_a_script_parts_them(question, choices, text, counted, caplog):
    [b] = read_rationales([dict(question=question, choices=choices, prediction=0, rationale=text)])
    numbers = surface(b)
    assert all((v is not None) == counted for v in numbers.values())
    assert len(caplog.messages) == (not counted) and all(
        "without blanks between" in m for m in caplog.messages
    )
    if counted:
        assert numbers["names_prediction"] == 1 and 0 < numbers["question_overlap"] < 1


def saints(choices: str, rationales: str) -> list[dict]:
    "Ninety rationales that say nothing but their answer, a saint's name with its title spelt in one of two ways."
    names = "Paul Louis Helena Lucia Thomas Martin George Anton Moritz Kitts Vincent Clara".split()
    rng, rows = Random(0), []
    for i in range(90):
        three, y = rng.sample(names, 3), rng.randrange(3)
        rows.append(
            dict(
                question=f"Which place is number {i} on the list?",
                choices=[f"{choices} {name}" for name in three],
                prediction=y,
                rationale=f"That is how it is. So the answer is {rationales} {three[y]}.",
            )
        )
    return rows


def test_an_answer_that_holds_a_dot_leaks_no_more_than_one_without():
    spelt = {(c, r): saints(c, r) for c, r in (("St.", "St."), ("St.", "Saint"), ("Saint", "Saint"))}
    seen = {
        t for rows in spelt.values() for r in rows for t in (*r["choices"], r["question"], r["rationale"])
    }
    asked = dict(cheap, metrics=("las",), simulator=scratch_base(sorted(seen)), settings=Reader(epochs=8))
    found = {name: score_rationales(rows, **asked) for name, rows in spelt.items()}
    first = found["St.", "St."].scores
    for name in ("leakage", "las", "gain"):  # the same choices, the same rationales once the answer is off
        assert found["St.", "Saint"].scores[name].to_dict() == first[name].to_dict(), name
    for one in found.values():
        assert one.scores["length"].value == 5 and one.scores["leakage"].value < 0.45
        assert {row["names_prediction"] for row in one.rows} == {0.0}


def test_fields_that_are_not_read_are_named_with_the_one_that_was_meant(caplog):
    read_rationales([dict(without("gold"), answer=1, ratings=[1, 2], source="web")])
    assert caplog.messages == [
        "the rationales: not read: the fields 'answer' (is it 'gold'?), 'ratings' (is it 'rating'?), 'source'"
    ]
    caplog.clear()
    read_rationales([dict(without("prediction"), predicted=1, answer=1, Rating=2)])
    assert [m for m in caplog.messages if "not read:" in m] == [
        "the rationales: not read: the fields 'predicted' (is it 'prediction'?), 'answer' (is it"
        " 'prediction'?), 'Rating' (is it 'rating'?)"
    ]
    caplog.clear()
    read_rationales([dict(r, answer=1) for r in rows_of_a_file])
    assert caplog.messages == ["the rationales: not read: the fields 'answer'"]
    caplog.clear()
    assert [b.question.id for b in read_rationales([dict(r, id=None) for r in rows_of_a_file[:2]])] == [
        "line 1",
        "line 2",
    ] and not caplog.messages


def test_records_of_this_package_are_read_and_empty_cut_marks_are_refused():
    record = dict(
        id="q",
        split="dev",
        question="Which?",
        choices=["a", "b"],
        answer=0,
        target=1,
        role="counterfactual",
        rationale="b is it",
    )
    [one] = read_rationales([record])
    assert (one.question.id, one.question.answer, one.prediction) == ("q/counterfactual", 0, 1)
    with pytest.raises(BadInput, match="field 'cut_at': is empty"):
        read_rationales(rows_of_a_file, cut_at=["Q:", ""])


def test_bad_files_and_calls(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for call in (
        lambda: read_rationales(tmp_path / "empty.jsonl"),
        lambda: read_rationales(tmp_path / "none.jsonl"),
        lambda: score_rationales(rows_of_a_file, metrics=["lass"]),
        lambda: score_rationales(rows_of_a_file, parts=1),
        lambda: score_rationales(rows_of_a_file, seeds=()),
        lambda: score_rationales(
            [changed(model="a"), dict(rows_of_a_file[2], model="b")], metrics=["interventions"]
        ),
        lambda: score_rationales(rows_of_a_file, simulator=str(tmp_path), **cheap),
    ):
        with pytest.raises(BadInput):
            call()


def sound(scored):
    "Every score has a value in its interval, or a reason; nothing is NaN; every name of the suite is there."
    json.dumps(scored.to_dict(), allow_nan=False)
    json.dumps(scored.rows, allow_nan=False)
    for name, s in scored.scores.items():
        assert s.value is not None or s.reason, name
        if s.low is not None:
            assert s.low - 1e-9 <= s.value <= s.high + 1e-9, name
    return scored.scores


edge_cases = {
    "one example": (rows_of_a_file[:1], {"las": "too few", "rating": "no human ratings"}),
    "no rationale has a word": (
        [dict(r, rationale="So the answer is lamp.") for r in rows_of_a_file],
        {
            "las": "no rationale has a word",
            "rev": "no rationale has a word",
            "vacuousness": "no rationale has a word",
        },
    ),
    "empty rationales": (
        [dict(r, rationale="") for r in rows_of_a_file],
        {"rora_lite": "no rationale has a word", "question_overlap": "no rationale"},
    ),
    "nothing parsed": (
        [dict(r, prediction=None) for r in rows_of_a_file],
        {"las": "0 examples with a prediction", "names_prediction": "no prediction"},
    ),
    "no gold": (
        [{k: v for k, v in r.items() if k != "gold"} for r in rows_of_a_file[:5]],
        {"accuracy": "no gold answers", "perturb": "needs the model", "swap": "needs the model"},
    ),
    "one question": ([dict(r, question="Which?") for r in rows_of_a_file], {"las": "on 1 questions"}),
    "ratings all the same": (
        [dict(r, rating=[1, 1]) for r in rows_of_a_file[:6]],
        {"rating_length": "the same in every row", "rater_agreement": "the same in every row"},
    ),
}


@pytest.mark.parametrize("case", edge_cases)
def test_what_does_not_apply_is_none_with_the_reason(case):
    rows, reasons = edge_cases[case]
    scores = sound(score_rationales(rows, **cheap))
    for name, said in reasons.items():
        assert scores[name].value is None and said in scores[name].reason, (name, scores[name])


def test_every_interval_and_every_head_is_of_the_level_that_was_asked_for(tmp_path):
    rated = [
        dict(r, rating=[(i * 3) % 7, i % 5], rationale=r["rationale"] + " so" * (i % 7))
        for i, r in enumerate(rows_of_a_file)
    ]
    half, usual = (
        score_rationales(rated, metrics=("ratings",), interval=dict(draws=400, level=level))
        for level in (0.5, 0.95)
    )
    for name in ("rating_length", "rater_agreement", "rating", "length"):
        a, b = half.scores[name], usual.scores[name]
        assert a.details["level"] == 0.5 and a.high - a.low < 0.6 * (b.high - b.low), name
    page = write_scored(half, tmp_path).read_text()
    assert "50 % interval" in page.replace("\xa0", " ") and "95 %" not in page.replace("\xa0", " ")


@pytest.mark.parametrize(
    "other, said",
    [
        ((0.02, 0.3), "does not hold"),
        ((-0.3, -0.1), "holds, they mislead"),
        ((-0.1, 0.1), "holds, it does not differ significantly from 0"),
        ((-0.3, 0.4), "inconclusive"),
    ],
)
def test_a_wide_interval_is_no_control_that_holds(other, said):
    assert said in _control_text(Score(sum(other) / 2, *other, 60), Score(0.4, 0.3, 0.5, 60))


def test_one_class_and_bins_that_all_leak_and_restated_questions():
    same = [dict(r, prediction=0, rationale=r["question"]) for r in rows_of_a_file]
    scores = sound(score_rationales(same, metrics=("las", "rev", "rora"), **cheap))
    assert "one class only" in scores["rev"].reason and "one class only" in scores["rora_lite"].reason
    assert scores["restates_question"].value == scores["question_overlap"].value == 1.0
    leaks = [
        dict(r, prediction=r["gold"], rationale=" ".join([r["choices"][r["gold"]]] * 9))
        for r in rows_of_a_file
    ]
    las = sound(
        score_rationales(
            leaks, metrics=("las",), **{**cheap, "settings": Reader(epochs=6, batch_size=8, lr=1e-2)}
        )
    )["las"]
    assert (
        las.value is None
        and "does not leak" in las.reason
        and las.details["n_1"] > 50
        and las.details["las_1"].value is not None
    )


def test_scores_of_trained_simulators_do_not_depend_on_the_order_of_the_file():
    some = [dict(r, rating=[i % 3]) for i, r in enumerate(rows_of_a_file)]
    one, other = (
        score_rationales(order, metrics=("las", "controls", "rev", "ratings"), **cheap)
        for order in (some, some[::-1])
    )
    for name, s in one.scores.items():
        if s.value is not None:
            assert other.scores[name].value == pytest.approx(s.value, abs=1e-6), name
    assert [r["gain"] for r in one.rows] == pytest.approx([r["gain"] for r in other.rows[::-1]], abs=1e-5)


words_of_text = st.text("abc .", max_size=12)
a_row = st.fixed_dictionaries(
    {
        "question": st.sampled_from(["what is a", "is b c", "c"]),
        "choices": st.just(["a b", "b", "c"]),
        "prediction": st.sampled_from([0, 1, 2, None]),
        "gold": st.sampled_from([0, 1, None]),
        "rationale": st.one_of(words_of_text, st.none()),
        "rating": st.one_of(st.none(), st.lists(st.integers(0, 1), max_size=3)),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(a_row, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_any_small_file_is_scored_whatever_its_order(rows, random):
    rows = [dict(r, id=str(i)) for i, r in enumerate(rows)]
    shuffled = random.sample(rows, len(rows))
    one, other = (
        sound(score_rationales(some, metrics=("ratings",), interval=dict(draws=50)))
        for some in (rows, shuffled)
    )
    for name, s in one.items():
        if name == "rater_agreement":
            continue  # the first rater is compared with the others: which one is first is the file's affair
        assert s.value == other[name].value or s.value == pytest.approx(other[name].value, abs=1e-9), name


def test_everyone_is_scored_by_simulators_that_never_saw_the_question():
    twice = read_rationales([dict(r, id=f"{r['id']}/{k}") for r in rows_of_a_file for k in range(2)])
    e = ModelBehaviour(
        [b.question for b in twice], [b.rationale for b in twice], [b.prediction for b in twice]
    )
    seen = cross_fitted(
        e,
        lambda train, test: np.array(
            [q.question in {t.question for t in train.questions} for q in test.questions]
        ),
        3,
    )
    sizes = cross_fitted(e, lambda train, test: np.full(len(test.questions), len(train.questions)), 3)
    assert seen.sum() == 0 and set(sizes) == {80.0}


@pytest.mark.parametrize("n, most", [(3000, 600), (70, 600), (601, 600), (10, 3)])
def test_a_part_of_the_file_is_whole_questions_spread_evenly(n, most):
    groups = [f"{i // 5:04}" for i in range(n)]
    chosen = _some_groups(groups, most)
    assert (
        all(groups.count(g) == [groups[i] for i in chosen].count(g) for g in {groups[i] for i in chosen})
        and min(n, most) - 5 <= len(chosen) <= min(n, most) + 5
    )


def test_what_fails_late_is_said_early_or_takes_nothing_with_it(tmp_path, monkeypatch):
    from faithful_distill.faithfulness import families as module

    named = [dict(r, model=str(tmp_path / "gpt-4o")) for r in rows_of_a_file]
    scores = sound(score_rationales(named, metrics=("las", "interventions"), **cheap))
    assert (
        scores["gain"].n == 60
        and "is no folder here" in scores["perturb"].reason
        and "gpt-4o" in scores["perturb"].reason
    )
    trained = []
    monkeypatch.setattr(module, "simulate", lambda base, train, *_, **__: trained.append(train))
    for asked in (dict(model=str(tmp_path / "gpt-4o")), dict(simulator=str(tmp_path / "gpt-4o"))):
        with pytest.raises(BadInput, match="there is no such folder"):
            score_rationales(rows_of_a_file, **asked, **cheap)
    assert not trained

    def broken(*_, **__):
        raise BadInput("is out of luck today")

    monkeypatch.setattr(module, "simulate", broken)
    scores = sound(score_rationales(rows_of_a_file, metrics=("las", "controls", "rev"), **cheap))
    assert (
        scores["las"].reason == scores["gain_shuffled"].reason == "is out of luck today"
        and scores["rev"].value is not None
    )


def test_a_question_with_most_of_the_rows_leaves_nothing_to_train_on():
    skewed = [dict(r, question="Which?") for r in rows_of_a_file[:30]] + rows_of_a_file[30:36]
    scores = sound(score_rationales(skewed, **cheap))
    assert (
        all(
            "one question has most of the rows" in scores[name].reason
            for name in ("las", "las_shuffled", "rev", "rora_lite")
        )
        and scores["length"].n == 36
    )


def test_a_part_of_few_questions_still_has_questions_to_train_and_to_test_on(monkeypatch):
    from faithful_distill.faithfulness import families as module

    groups = [str(i // 1000) for i in range(6000)]
    chosen = _some_groups(groups, 600, 6)
    assert len(chosen) == 600 and {g: [groups[i] for i in chosen].count(g) for g in set(groups)} == {
        str(g): 100 for g in range(6)
    }
    assert _some_groups(["a", "b", *["c"] * 9000], 600, 6)[:2] == [0, 1]
    monkeypatch.setattr(module, "_most_rora", 60)
    few = [dict(r, id=f"{i}", question=f"Which is it, {i % 6}?") for i, r in enumerate(rows_of_a_file * 10)]

    def logs(base, train, test, *_):
        assert len(train.questions) >= 20
        return np.full((2, 1, len(test.questions)), -1.0), 1.0

    monkeypatch.setattr(module, "rora_logs", logs)
    assert sound(score_rationales(few, metrics=("rora",), **cheap))["rora_lite"].n == 60


def test_with_the_model_at_hand_interventions_join_in(tmp_path):
    rows = [dict(r, model=student_folder(tmp_path)) for r in rows_of_a_file[:8]]
    scores = sound(score_rationales(rows, metrics=("interventions",), interval=dict(draws=100)))
    assert (
        scores["self_splice"].value == 1.0
        and scores["perturb"].n == scores["reproduced"].n == scores["early_answering"].n == 8
    )
    assert "no teacher rationales" in scores["swap"].reason and scores["las"].reason.startswith(
        "not asked for"
    )


def student_folder(folder):
    student = tiny_student([r["question"] + " " + r["rationale"] for r in rows_of_a_file])
    student.model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return str(folder)


def test_interventions_resample_questions_and_their_accuracy_is_of_gold_answers_only(tmp_path):
    model = student_folder(tmp_path)
    asked = dict(metrics=("interventions",), model=model, interval=dict(draws=400))
    once = [{k: v for k, v in dict(r, prediction=0).items() if k != "id"} for r in rows_of_a_file[:12]]
    one, many = (score_rationales(once * k, **asked).scores for k in (1, 4))
    for name in (
        "model_accuracy",
        "model_accuracy_post_answer",
        "reproduced",
        "filler_same",
        "early_answering",
    ):
        assert (
            many[name].n == 4 * one[name].n
            and many[name].high - many[name].low > 0.7 * (one[name].high - one[name].low) > 0
        ), name
    missing = score_rationales(
        [{k: v for k, v in r.items() if k != "gold" or i} for i, r in enumerate(once)], **asked
    ).scores
    rest = score_rationales(once[1:], **asked).scores
    for name in ("model_accuracy", "model_accuracy_post_answer"):
        assert missing[name].value == rest[name].value and missing[name].n == 11
    assert (
        missing["perturb"].details["credit of"].startswith("prediction")
        and one["perturb"].details["credit of"] == "gold answer"
        and missing["perturb"].n == 12
    )
    none = sound(score_rationales([{k: v for k, v in r.items() if k != "gold"} for r in once], **asked))
    assert none["model_accuracy"].reason == "no gold answers are given" and none["perturb"].n == 12


def test_results_are_written_before_they_are_said(tmp_path, monkeypatch):
    import click
    from faithful_distill.score_commands import score

    def closed(*_, **__):
        raise BrokenPipeError  # `score ... | head -1`

    monkeypatch.setattr(click, "echo", closed)
    file, out = tmp_path / "own.jsonl", tmp_path / "scored"
    file.write_text("\n".join(map(json.dumps, rows_of_a_file[:4])))
    with pytest.raises(BrokenPipeError):
        score(
            str(file),
            out=str(out),
            metrics=["ratings"],
            parts=3,
            simulators=1,
            train_limit=4000,
            test_limit=3000,
        )
    assert {p.name for p in out.iterdir()} >= {"metrics.json", "scores.jsonl", "report.html"}


# ---- families


def test_a_registered_family_is_asked_for_by_name_scored_and_held_against_ratings(tmp_path):
    @register
    class Vowels(Family):
        "Share of vowels."

        name, scores, columns = "vowels", ("vowels",), ("vowels",)

        def compute(self, task):
            if not any(b.rationale for b in task.rows):
                raise BadInput("no rationale has a letter")
            share = [sum(c in "aeiou" for c in b.rationale) / 99 for b in task.rows]
            return {"vowels": mean_score(share, **task.over(range(len(share))))}, {"vowels": share}

    try:
        rated = [dict(r, rationale="a" * (i % 9), rating=i % 9) for i, r in enumerate(rows_of_a_file)]
        scored = score_rationales(rated, metrics=("vowels", "ratings"), **cheap)
        assert sound(scored)["rating_vowels"].value == pytest.approx(1.0)
        assert scored.rows[8]["vowels"] == 8 / 99 and scored.scores["vowels"].n == 60
        assert "vowels" in write_scored(scored, tmp_path).read_text()
        assert "vowels" not in score_rationales(rated, metrics=("ratings",), **cheap).scores
        bare = [dict(r, rationale="") for r in rated]
        assert (
            score_rationales(bare, metrics=("vowels",)).scores["vowels"].reason == "no rationale has a letter"
        )
    finally:
        del families["vowels"]
    with pytest.raises(
        BadInput, match="must be one of las, controls, rev, rora, ratings, judges, interventions"
    ):
        score_rationales(rows_of_a_file, metrics=("vowels",))


def test_every_family_gives_the_scores_and_columns_that_it_names(tmp_path):
    rows = [dict(r, rating=[i % 3, i % 2]) for i, r in enumerate(rows_of_a_file)]
    scored = score_rationales(rows, model=student_folder(tmp_path), **cheap)
    for family in families.values():
        assert set(family.scores) <= set(sound(scored)), family.name
        assert set(family.columns) <= set(scored.rows[0]), family.name


def test_the_writer_is_a_model_or_a_reason(tmp_path):
    rows = read_rationales(rows_of_a_file[:2])
    student, reason = find_writer(rows)
    assert student is None and reason.startswith("needs the model that wrote the rationales: give its folder")
    named = read_rationales([dict(rows_of_a_file[0], model=str(tmp_path / "absent"))])
    assert find_writer(named).student is None and "is no folder here" in find_writer(named).reason
    (tmp_path / "absent").mkdir()
    assert find_writer(named).student is None and "cannot be loaded" in find_writer(named).reason
    (tmp_path / "absent").rmdir()
    with pytest.raises(BadInput, match="there is no such folder"):
        find_writer(rows, str(tmp_path / "absent"))
    student, reason = find_writer(named, student_folder(tmp_path))
    assert student.tokenizer is not None and reason == ""


@pytest.mark.parametrize(
    "name", ["attacker/tracking-repo", "gpt2", "https://a.b/c", "../no/such", "a\0b", "x" * 5000]
)
def test_a_file_never_chooses_what_is_fetched(name, tmp_path, monkeypatch):
    "Its model is asked for nowhere unless it is a folder with all of a model; the caller's is."
    from faithful_distill.faithfulness import scoring_task

    asked = []

    def load(name):
        asked.append(name)
        raise BadInput("cannot be loaded")

    monkeypatch.setattr(scoring_task, "load_student", load)
    monkeypatch.chdir(tmp_path)
    rows = [dict(r, model=name) for r in rows_of_a_file[:3]]
    reason = score_rationales(rows, metrics=("interventions",)).scores["perturb"].reason
    assert asked == [] and "is no folder here" in reason and "--model" in reason
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "attacker/x"}')
    rows = [dict(r, model="adapter") for r in rows]
    reason = score_rationales(rows, metrics=("interventions",)).scores["perturb"].reason
    assert asked == [] and "is an adapter" in reason and "--model" in reason
    with pytest.raises(BadInput, match="cannot be loaded"):
        score_rationales(rows, metrics=("interventions",), model=name)
    assert asked == [name]
    for field in ("model", "simulator"):
        with pytest.raises(BadInput, match=f"field '{field}': is empty"):
            score_rationales(rows_of_a_file, **{field: ""}, **cheap)


# ---- nothing computed is lost, and long runs say so


def test_what_is_computed_is_handed_over_family_by_family_the_quick_ones_first():
    seen = []
    rows = [dict(r, rating=i % 3) for i, r in enumerate(rows_of_a_file)]
    metrics = ("ratings", "controls", "las")
    final = score_rationales(rows, metrics=metrics, after=seen.append, **cheap)
    assert [s.facts["not yet computed"] for s in seen] == [
        "las, controls, ratings",
        "controls, ratings",
        "ratings",
    ]
    assert "accuracy" in seen[0].scores and "las" not in seen[0].scores and "leak" not in seen[0].rows[0]
    assert seen[1].scores["las"].to_dict() == final.scores["las"].to_dict() and "leak" in seen[1].rows[0]
    assert "not yet computed" not in final.facts


def file_of_rows(folder, n=60):
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(dict(r, rating=1)) + "\n" for r in rows_of_a_file[:n]))
    return str(file)


def test_the_command_keeps_what_is_computed_when_a_later_family_breaks_or_the_disk_is_full(
    tmp_path, monkeypatch
):
    import errno

    from click.testing import CliRunner
    from faithful_distill.cli import main
    from faithful_distill.faithfulness import families as module
    from faithful_distill.lab import score_report

    def break_down(*_, **__):
        raise RuntimeError("the machine went away")

    monkeypatch.setattr(module, "cross_fitted", break_down)
    asked = ["score", file_of_rows(tmp_path), "--metrics", "las,ratings", "--out"]
    done = CliRunner().invoke(main, [*asked, str(tmp_path / "out")])
    assert done.exit_code == 1 and "the machine went away" in done.output.splitlines()[-1]
    kept = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert kept["accuracy"]["value"] is not None and kept["facts"]["not yet computed"] == "las, ratings"
    assert len((tmp_path / "out" / "scores.jsonl").read_text().splitlines()) == 60
    assert [p.name for p in (tmp_path / "out").glob(".*")] == [".faithful_distill"], "its own names"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(score_report, "write_numbers", full)
    done = CliRunner().invoke(main, [*asked, str(tmp_path / "full")])
    assert done.exit_code == 1 and "accuracy" in done.output  # shown, as it cannot be written
    assert done.output.splitlines()[-1].endswith("No space left on device. Make room and call again.")
    assert "Traceback" not in done.output


def test_one_score_at_a_time_in_a_folder(tmp_path):
    from click.testing import CliRunner
    from faithful_distill.cli import main
    from faithful_distill.ownership import sole_writer

    (tmp_path / "out").mkdir()
    asked = ["score", file_of_rows(tmp_path, 2), "--metrics", "ratings", "--out", str(tmp_path / "out")]
    with sole_writer(tmp_path / "out", tmp_path / "out" / ".score.lock"):
        done = CliRunner().invoke(main, asked)
        assert done.exit_code == 2 and "is being written by another process" in done.output
        assert not (tmp_path / "out" / "metrics.json").exists()
    assert CliRunner().invoke(main, asked).exit_code == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        ".faithful_distill",
        "metrics.json",
        "scores.jsonl",
        "report.html",
        "report",
    }


def test_simulators_train_on_no_more_than_the_limit_and_it_is_said(monkeypatch):
    from faithful_distill.faithfulness import families as module

    sizes, real = [], module.simulate

    def simulate(base, train, test, **given):
        sizes.append(
            (len(train.questions), len({q.id for q in train.questions} & {q.id for q in test.questions}))
        )
        return real(base, train, test, **given)

    monkeypatch.setattr(module, "simulate", simulate)
    scored = score_rationales(rows_of_a_file, metrics=("las",), train_limit=20, **cheap)
    assert sizes == [(20, 0)] * 2 and sound(scored)["las"].n == 60
    assert scored.facts["simulators are trained on"] == "20 of about 30 rows each, drawn evenly"
    assert (
        "simulators are trained on" not in score_rationales(rows_of_a_file, metrics=("las",), **cheap).facts
    )
    with pytest.raises(BadInput, match="field 'train_limit': must be 20 rows or more"):
        score_rationales(rows_of_a_file, train_limit=5, **cheap)


def test_simulators_are_asked_about_whole_questions_up_to_the_limit_and_it_is_said(monkeypatch):
    shared = [{k: row[k] for k in ("question", "choices", "gold")} for row in rows_of_a_file]
    rows = [row | shared[i - i % 2] for i, row in enumerate(rows_of_a_file)]  # two rationales a question
    whole = score_rationales(rows, metrics=("las", "controls", "rev"), **cheap)
    scored = score_rationales(rows, metrics=("las", "controls", "rev"), test_limit=30, **cheap)
    of = {
        name: scored.scores[name].n for name in ("accuracy", "las", "gain_shuffled", "rev", "simulator_gold")
    }
    assert of["accuracy"] == 60 and {n for name, n in of.items() if name != "accuracy"} == {30}, of
    assert scored.scores["las"].details["examples_of"] == 60
    asked = [i for i, row in enumerate(scored.rows) if row["gain"] is not None]
    assert len(asked) == 30 and len({i // 2 for i in asked}) == 15  # both rows of a question, or neither
    assert min(asked) < 8 and max(asked) > 50  # from all of the file
    fact = "30 of 60 rows with a prediction: all rows of questions drawn evenly"
    assert scored.facts["simulators are asked about"] == fact
    assert "simulators are asked about" not in whole.facts and whole.scores["las"].n == 60
    assert "examples_of" not in whole.scores["las"].details
    with pytest.raises(BadInput, match="field 'test_limit': must be 30 rows or more"):
        score_rationales(rows_of_a_file, test_limit=5, **cheap)


def test_a_long_run_is_announced_before_it_begins_and_its_trial_changes_nothing(
    tmp_path, monkeypatch, caplog
):
    from faithful_distill.faithfulness import scoring

    rows, asked = rows_of_a_file[:40], dict(metrics=("las", "interventions"), model=student_folder(tmp_path))
    announced = lambda: sum("will take" in record.getMessage() for record in caplog.records)
    with monkeypatch.context() as quick:
        quick.setattr(scoring, "estimate", lambda task, wanted: 59.0)
        plain = score_rationales(rows, **asked, **cheap).to_dict()
    assert not announced()
    pace, of_few, trials = scoring._pace, scoring._seconds_of_few, []
    monkeypatch.setattr(scoring, "_pace", lambda task: trials.append(pace(task)) or (1.0, 0.5))
    monkeypatch.setattr(scoring, "_seconds_of_few", lambda *a: trials.append(of_few(*a)) or 7200.0)
    begun = []
    slow = score_rationales(rows, **asked, after=lambda s: begun.append(announced()), **cheap).to_dict()
    # 2 parts, 1 seed, 20 rows, 2 epochs of one second each; 3 x 40 texts of half a second
    assert "40 rationales will take about 2 hours" in caplog.text and begun[0] == 1 and slow == plain
    assert len(trials) == 2 and all(seconds > 0 for seconds in trials[0])
    trained = families["las"].work(ScoringTask(read_rationales(rows), **cheap))
    assert trained == (2 * 20 * 2, 3 * 40)


def test_what_is_only_read_takes_time_too(monkeypatch):
    "A frozen simulator trains on nothing; its texts are read all the same."
    from types import SimpleNamespace

    from faithful_distill.faithfulness import scoring

    monkeypatch.setattr(scoring, "_pace", lambda task: (0.0, 0.5))
    only_reads = SimpleNamespace(work=lambda task: (0, 120), needs="simulators")
    assert scoring.estimate(None, [only_reads]) == 60.0


# ---- the two published sets


def palm_files(folder, texts, n_questions=2):
    questions = [
        dict(id=f"q{i}", question=f"Which, {i}?", choices=["dog", "cat", "dog"][: 2 + i], answer="dog")
        for i in range(n_questions)
    ]
    (folder / "cqa_test.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "test_CoT_1.json").write_text(json.dumps(texts[1:]))
    (folder / "test_CoT_0.json").write_text(json.dumps(texts[:1]))


def test_published_files_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(BadInput, match="must be one of palm, .*gpt3"):
        read_published("cot", tmp_path)
    for name in ("palm", "gpt3"):
        with pytest.raises(BadInput, match="no such file"):
            read_published(name, tmp_path, "test")
    said = ["It barks. So the answer is (b) cat.\n\nQ: What?", "It barks.\n\nQ: So the answer is (a)."]
    palm_files(tmp_path, said)
    first, second = read_published("palm", tmp_path, "test")
    assert (first.prediction, first.question.answer, first.reasons) == (1, 0, "It barks.")
    assert (second.prediction, second.question.answer) == (None, None)  # "dog" occurs twice
    assert len(read_published("palm", tmp_path, "test", limit=1)) == 1
    palm_files(tmp_path, said, n_questions=1)
    with pytest.raises(BadInput, match="2 rationales for 1 questions"):
        read_published("palm", tmp_path, "test")
    (tmp_path / "test_CoT_1.json").write_text('{"a": 1}')
    with pytest.raises(BadInput, match="test_CoT_1.json.*must be a JSON list of texts"):
        read_published("palm", tmp_path, "test")
    palm_files(tmp_path, said[:1], n_questions=1)
    (tmp_path / "cqa_test.json").write_text('{"id": "q", "question": "Which?", "choices": ["a", "b"]}')
    with pytest.raises(BadInput, match="cqa_test.json: field 'answer': is missing"):
        read_published("palm", tmp_path, "test")
    (tmp_path / "commonsenseqa_test.csv").write_text("Input.id,Input.question\nq,Which?\n")
    with pytest.raises(BadInput, match="commonsenseqa_test.csv: field 'Answer.acceptable': is missing"):
        read_published("gpt3", tmp_path, "test")


def test_raters_of_one_question_saw_the_same_explanations(tmp_path):
    head = ["Input.id", "Input.question", "Input.answer_choices", "Input.gold_label", "Answer.acceptable"]
    head += [f"Input.explanation_{k}" for k in range(1, 6)]
    rows = [["q", "Which?", "dog, or cat", "cat", accepted, *"vwxyz"] for accepted in ("", "2|5")]
    file = tmp_path / "commonsenseqa_test.csv"
    file.write_text("\n".join(",".join(f'"{c}"' for c in row) for row in (head, *rows)))
    read = read_published("gpt3", tmp_path, "test")
    assert [sum(b.ratings) for b in read] == [0, 1, 0, 0, 1] and [b.rationale for b in read] == [*"vwxyz"]
    rows[1][-1] = "another"
    file.write_text("\n".join(",".join(f'"{c}"' for c in row) for row in (head, *rows)))
    with pytest.raises(BadInput, match="must have the same explanations for every rater"):
        read_published("gpt3", tmp_path, "test")


def test_palm_is_cut_and_what_cannot_be_parsed_is_counted(real_data):
    read = read_published("palm", real_data / "palm_cqa", "train")
    unparsed = [b for b in read if b.prediction is None]
    assert len(read) == 9741 and len(unparsed) == 288 and not any("Q:" in b.rationale for b in read)
    right = sum(b.prediction == b.question.answer for b in read if b.question.answer is not None) / len(read)
    assert 0.74 < right < 0.77
    assert all("either" in b.rationale or "answer is" in b.rationale for b in unparsed[:20])
    assert not any("So the answer is" in b.reasons for b in read)


def test_gpt3_has_five_explanations_with_three_ratings_each(real_data):
    read = read_published("gpt3", real_data / "gpt3_csqa", "train")
    assert len(read) == 4955 and len({b.group for b in read}) == 991 and {len(b.ratings) for b in read} == {3}
    first = next(b for b in read if b.question.question.startswith("Where can you likely buy many poems"))
    choices = ("literature book", "bookshelf", "poetry book", "book of poetry", "book store")
    assert first.question.choices == choices and first.prediction == 4
