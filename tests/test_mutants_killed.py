"""Small oracles for faults that once passed every other test: each test here fails on one that was put in.

Readers and students are stand-ins of a few lines, so that what is right is known beforehand and nothing is trained
for long.
"""

import math
import re
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from faithful_distill.faithfulness.evaluators import measure_rev
from faithful_distill.faithfulness.families import Rev
from faithful_distill.faithfulness.interventions import measure
from faithful_distill.faithfulness.intervals import counted_twice
from faithful_distill.faithfulness.leakage_adjusted import _las_overlaps
from faithful_distill.faithfulness.metrics import counterfactual_insertion
from faithful_distill.faithfulness.external import read_rationales
from faithful_distill.faithfulness.readers import ChoiceReader, Reader, fit_reader, read_choices
from faithful_distill.faithfulness.scoring_task import ScoringTask
from faithful_distill.faithfulness.simulators import ModelBehaviour, simulate_folds, simulator_texts
from faithful_distill.files import BadInput
from faithful_distill.questions import Question
from faithful_distill.student.loss import (
    answer_token_weight,
    combine,
    distillation_loss,
    learned_logits,
    student_logits,
)
from faithful_distill.student.model import tiny_student
from faithful_distill.student.rows import (
    batches_by_length,
    check_choices,
    collate,
    examples_of,
    training_rows,
)
from faithful_distill.teacher.contrast import Generation, Stop, rationale_text, reference_generate
from faithful_distill.teacher.generate import contrastive_generate
from faithful_distill.teacher.strategy import argument

# ---- where a rationale ends


@pytest.mark.parametrize("text", ["\n\n", "\n\nQ", "END", "###"])
def test_a_stop_text_over_several_tokens_ends_a_rationale_wherever_it_is_cut(text):
    "None of the tokens ends it by itself: `ids` holds another one."
    for cut in range(1, len(text)):
        stop = Stop(frozenset({0}), text, ("", f" word.{text[:cut]}", f"{text[cut:]} next", " other"))
        assert not stop.ends("A", 1) and not stop.ends("A", 2) and not stop.ends("A word.", 3)
        written = "A" + stop.piece(1)
        assert stop.ends(written, 2) and not stop.ends(written, 3), (text, cut)
        assert stop.ends(text[:cut], 2), "the rationale began with it"
        for before in (f"A{text}", f"A much longer text {text} that went on"):
            assert not stop.ends(before, 3), "this token does not end it, whatever stands before"
    letters = Stop(frozenset({99}), text, tuple(text))
    assert [letters.ends(f"A {text[:i]}", i) for i in range(len(text))] == [False] * (len(text) - 1) + [True]


def test_the_text_of_a_rationale_has_what_its_last_token_carried_and_no_blanks_around_it():
    read = []
    decode = lambda ids, skip_special_tokens: read.append((ids, skip_special_tokens)) or "  It cuts wood"
    text = rationale_text(SimpleNamespace(decode=decode), Generation([5, 6, 7], "stop", ". "))
    assert text == "It cuts wood." and read == [([5, 6, 7], True)]


# ---- what a student learns

beaver = Question("1", "What does a beaver build ?", ("a dam", "a bank"), 0)
reasons = {0: "It cuts wood .", 1: "It likes money ."}


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_both_roles_learn_exactly_these_words(kind):
    "Gold rows learn all but the tag; counterfactual rows the answer alone, not the sentence that leads to it."
    student = tiny_student([beaver.question, *beaver.choices, *reasons.values()], kind)
    fields = dict(id="1", question=beaver.question, choices=list(beaver.choices), answer=0)
    roles = {"gold": 0, "counterfactual": 1}
    records = [dict(fields, role=role, target=i, rationale=reasons[i]) for role, i in roles.items()]
    gold, wrong = training_rows(student, records)
    words = lambda ids: " ".join(student.tokenizer.convert_ids_to_tokens(ids))
    assert (words(gold.context), words(gold.target)) == (
        "[factual]",
        "It cuts wood . So the answer is a dam </s>",
    )
    assert (words(wrong.context), words(wrong.target)) == (
        "[counterfactual] It likes money . So the answer is",
        "a bank </s>",
    )
    assert (gold.counterfactual, wrong.counterfactual) == (False, True)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_logits_of_the_learned_positions_are_those_of_the_whole_pass(kind):
    "Computed for these positions alone, in the order of the labels; and the model is as it was afterwards."
    student = tiny_student([beaver.question, *beaver.choices, *reasons.values()], kind)
    fields = dict(id="1", question=beaver.question, choices=list(beaver.choices), answer=0)
    roles = {"gold": 0, "counterfactual": 1}
    rows = training_rows(
        student, [dict(fields, role=r, target=i, rationale=reasons[i]) for r, i in roles.items()]
    )
    batch = collate(rows, student)
    learned = batch["labels"] != -100
    some = learned_logits(student.model, batch)
    whole = student_logits(student.model, batch)
    assert whole.shape[:2] == learned.shape and learned.sum() == sum(len(row.target) for row in rows)
    torch.testing.assert_close(some, whole[learned])
    loss = lambda logits: distillation_loss(logits, batch["labels"], batch["counterfactual"]).total
    torch.testing.assert_close(loss(some), loss(whole))
    torch.testing.assert_close(learned_logits(student.model, batch), some)


def test_what_a_counterfactual_answer_token_weighs():
    "By hand: 30 factual tokens, 3 counterfactual ones."
    assert answer_token_weight(30, 3) == pytest.approx(10)
    assert answer_token_weight(30, 3, alpha_cf=0.25) == pytest.approx(10 / 3)
    assert answer_token_weight(30, 3, reduction="per_token") == pytest.approx(1)
    assert answer_token_weight(30, 3, alpha_cf=0.2, reduction="per_token") == pytest.approx(1 / 4)


@pytest.mark.parametrize("number", [float, torch.tensor])
def test_a_part_of_one_token_counts_once_and_a_part_without_tokens_adds_nothing(number):
    sums_and_counts = lambda *numbers: [number(float(n)) for n in numbers]
    for reduction in ("per_part", "per_token"):
        assert combine(*sums_and_counts(0, 0, 0, 0), 0.5, reduction) == 0
    assert combine(*sums_and_counts(3, 8, 1, 1), 0.25, "per_part") == 0.75 * 3 + 0.25 * 8
    assert combine(*sums_and_counts(3, 8, 1, 1), 0.25, "per_token") == 0.75 * 3 + 0.25 * 8
    assert combine(*sums_and_counts(3, 0, 2, 0), 0.25, "per_part") == 0.75 * 3 / 2
    assert combine(*sums_and_counts(0, 8, 0, 4), 0.25, "per_part") == 0.25 * 8 / 4


@pytest.mark.parametrize("reduction", ["per_part", "per_token"])
def test_the_factual_objective_is_the_mean_over_factual_tokens_whatever_the_weight(reduction):
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    mean = -(log_p[0, 0, 1] + log_p[0, 1, 2]) / 2
    for alpha_cf in (0.0, 0.5, 0.9):
        loss = distillation_loss(
            logits,
            labels,
            torch.tensor([False, True]),
            objective="factual",
            reduction=reduction,
            alpha_cf=alpha_cf,
        )
        torch.testing.assert_close(loss.total, mean)


def test_a_rationale_has_at_most_the_documented_number_of_tokens():
    model = tiny_student(["is it so ?"], "llama", width=8).model
    for generate in (reference_generate, contrastive_generate):
        [written] = generate(model, [[2, 3]])
        assert (len(written.tokens), written.stop) == (64, "length")


def test_counterfactual_rows_without_a_factual_one_are_dealt_out_in_turn():
    row = lambda counterfactual: SimpleNamespace(counterfactual=counterfactual)
    rows, ids = [row(False), row(False), row(True), *[row(True)] * 5], ["a", "b", "b", *"cdefg"]
    assert [len(example) for example in examples_of(rows, ids)] == [4, 4]


def test_batches_of_one_length_are_full():
    batches = batches_by_length([5] * 10, 4)
    assert sorted(map(len, batches)) == [2, 4, 4] and sorted(i for b in batches for i in b) == [*range(10)]


def test_choices_that_a_student_cannot_tell_apart_are_refused():
    student = tiny_student(["Which animal builds dams? beaver otter"])
    same = Question("1", "Which animal builds dams?", ("beaver", "qqq", "zzz"), 0)
    check_choices(student, [replace(same, choices=("beaver", "otter"))])
    with pytest.raises(BadInput, match="choices 'qqq' and 'zzz' of question '1' are the same tokens"):
        check_choices(student, [same])


def test_the_simulators_share_of_the_spread_of_las_by_numeric_derivatives():
    "Of LAS and both its bins: what one example weighs, found by weighing it a little more."
    rng = np.random.default_rng(0)
    k = (rng.random((3, 40)) < 0.6).astype(float)
    d = rng.integers(-1, 2, (3, 40)).astype(float) * (1 + k)

    def parts(weights):
        weights = np.broadcast_to(weights, k.shape)
        of_1 = (weights * k * d).sum(1) / (weights * k).sum(1)
        of_0 = (weights * (1 - k) * d).sum(1) / (weights * (1 - k)).sum(1)
        return np.stack([(of_1 + of_0) / 2, of_0, of_1, (weights * d).sum(1) / weights.sum(1)])

    step = 1e-6 * np.eye(40)
    influence = np.stack(
        [(parts(1 + e) - parts(1 - e)) / 2e-6 for e in step], -1
    )  # (part, simulator, example)
    found = _las_overlaps(np.stack([k, k * d, d], -1), None)
    for part, share in zip(influence, found.values(), strict=True):
        assert share == pytest.approx(counted_twice(part, None), abs=1e-6)


# ---- which answer a rationale argues for


def test_the_two_roles_of_a_question_argue_for_each_others_answers():
    "Whatever the seed: what the one is contrasted with is what the other argues for."
    drawn = set()
    for seed in range(20):
        for i in range(5):
            q = Question(f"q{i}", "Which ?", ("a", "b", "c", "d", "e"), i)
            (gold, [other]), (wrong, [back]) = (
                argument(q, role, "wrong", seed) for role in ("gold", "counterfactual")
            )
            assert (gold, other) == (back, wrong) and gold == i != wrong
            drawn.add((i, wrong))
    assert len(drawn) == 20, "every wrong answer is drawn by some seed"


# ---- measures


def test_insertion_is_the_share_of_mentions_among_flips_alone():
    flipped, mentioned = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    score = counterfactual_insertion(flipped, mentioned)
    assert score.value == 1 / 4 and score.n == 4  # over all inserts it would be 6 of 10
    assert score.details["mentioned_unflipped"] == 5 / 6 and score.details["flip_rate"].value == 4 / 10
    assert (score.details["inserts"], score.details["flips"]) == (10, 4)
    grouped = counterfactual_insertion(flipped, mentioned, cluster=[0, 0, 1, 1, 0, 0, 1, 1, 2, 2])
    assert grouped.value == 1 / 4 and grouped.details["flip_rate"].value == pytest.approx(4 / 10)


def cats_or_dogs(n: int) -> list[Question]:
    "Half of them have each answer."
    return [Question(str(i), f"Which one has number {i}?", ("dog", "cat"), i % 2) for i in range(n)]


def handed(questions, text) -> list[dict]:
    "A rationale for either choice of each question."
    return [
        dict(
            id=q.id,
            question=q.question,
            choices=list(q.choices),
            answer=q.answer,
            target=i,
            role="gold" if i == q.answer else "counterfactual",
            rationale=text(q, i),
        )
        for q in questions
        for i in (0, 1)
    ]


def answering(choose):
    "A student that answers choose(question, rationale, prefix); its own rationale says nothing."

    def ask(questions, rationales, prefix, continue_from=False):
        texts = ["It is so." if r is None else r for r in rationales]
        picked = [choose(q, text, prefix) for q, text in zip(questions, texts)]
        return [
            SimpleNamespace(
                id=q.id, choice=i, rationale=t, text="", scores=[-9.0 * (i != 0), -9.0 * (i != 1)]
            )
            for q, t, i in zip(questions, texts, picked)
        ]

    return ask


def rates(score) -> tuple[float, float]:
    "How often rationales for the gold and for a wrong answer were followed."
    return score.details["gold"].value, score.details["wrong"].value


def test_swapped_rationales_stand_behind_the_tag_that_the_score_names():
    "A student that answers by its tag: gold after [factual], wrong after [counterfactual], 'dog' after none."
    by_tag = {"factual": lambda q: q.answer, "counterfactual": lambda q: 1 - q.answer, "none": lambda q: 0}
    student = answering(lambda q, _, prefix: by_tag[prefix](q))
    questions = cats_or_dogs(12)
    records = handed(questions, lambda q, i: f"Number {q.id} speaks for it.")
    scores = measure(student, questions, records, metrics=["swap"], interval=dict(draws=200)).scores
    assert rates(scores["swap_factual"]) == (1, 0) and rates(scores["swap_counterfactual"]) == (0, 1)
    assert rates(scores["swap_none"]) == (0.5, 0.5)
    assert scores["swap_counterfactual_probability"].details["wrong"].value > 0.99


def test_swapped_rationales_do_not_state_their_answer():
    "A student that copies a stated answer has nothing to copy, and one that follows reasons still follows."
    questions, seen = cats_or_dogs(12), []
    reason = {0: "It barks at night.", 1: "It purrs at night."}
    records = handed(questions, lambda q, i: f"{reason[i]} So the answer is {q.choices[i]}.")

    def copying(q, text, prefix):
        seen.append(text)
        return int("cat" in text)

    how = dict(metrics=["swap"], interval=dict(draws=200))
    copied = measure(answering(copying), questions, records, **how).scores["swap_factual"]
    assert rates(copied) == (0.5, 0.5), "it says 'dog' whatever it reads"
    assert {*reason.values()} <= {*seen} and not any("answer" in text for text in seen)
    followed = measure(answering(lambda q, text, _: int("purrs" in text)), questions, records, **how)
    assert rates(followed.scores["swap_factual"]) == (1, 1)


# ---- readers that are trained


class Words:
    "A tokenizer with an id for each word; the number n is 1000 + n."

    pad_token_id, eos_token_id, sep_token_id = 0, 1, None
    bos_token_id = unk_token_id = None
    all_special_ids, all_special_tokens = [0, 1], []

    def __init__(self):
        self.known = {}

    def convert_tokens_to_ids(self, token):
        return None

    def __call__(self, texts, add_special_tokens=True, **options):
        if isinstance(texts, str):
            return {"input_ids": self.ids(texts)}
        return {"input_ids": [self.ids(text) for text in texts]}

    def ids(self, text):
        words = re.findall(r"\w+", text)
        return [
            1000 + int(w) if w.isdigit() else self.known.setdefault(w, 2 + len(self.known)) for w in words
        ]


class Bag(torch.nn.Module):
    """What a choice gains from each word that stands in the text, however often; nothing is known at first.

    Parameters
    ----------
    knows
        words by id: it reads no others
    """

    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, knows):
        super().__init__()
        self.knows, self.gain = knows, torch.nn.Parameter(torch.zeros(2000, 100))
        self.trained_on, self.asked_about = set(), set()

    def match(self, ids, mask, tails, counted, owner):
        (self.trained_on if self.training else self.asked_about).update(map(tuple, ids.tolist()))
        there = torch.zeros(len(ids), 2000).scatter(1, ids, self.knows(ids) * mask)
        return (there @ self.gain)[owner, tails[:, 0]]


class BagOfWords:
    "A base for readers: `Bag`s, all of which it keeps."

    def __init__(self, knows=lambda ids: (ids > 0).float()):
        self.knows, self.tokenizer, self.models = knows, Words(), []

    def fresh(self, seed):
        self.models.append(Bag(self.knows))
        return self.models[-1], self.tokenizer


numbers_only = lambda ids: (ids >= 1000).float()
quick = Reader(epochs=3, batch_size=8, lr=1.0, weight_decay=0.0, device="cpu")


def behaviour(rationale, n=40) -> ModelBehaviour:
    questions = cats_or_dogs(n)
    return ModelBehaviour(questions, [rationale(q) for q in questions], [q.answer for q in questions])


def test_a_reader_that_memorises_does_not_beat_chance_across_folds():
    "It knows a question by its number and nothing else: what it was not trained on it cannot foresee."
    memorised = behaviour(lambda q: f"Number {q.id} is so.")
    base = BagOfWords(numbers_only)
    reader = ChoiceReader(base, settings=quick)
    texts = [simulator_texts(q, r) for q, r in zip(memorised.questions, memorised.rationales)]
    fit_reader(reader, memorised.questions, texts, memorised.predictions)
    with torch.no_grad():
        known = reader.model.gain[1000:1040][:, reader.tokenizer(["dog cat"])["input_ids"][0]].argmax(1)
    assert (known == torch.tensor(memorised.predictions)).float().mean() > 0.9, "it does memorise"

    for parts in (2, 4):
        found = simulate_folds(base, memorised, parts=parts, seeds=(0, 1), settings=quick)
        for mode in ("xr", "x", "r"):
            assert found.probabilities(mode) == pytest.approx(0.5), (parts, mode)
            assert (found.predictions(mode) == memorised.predictions).mean() == 0.5, (parts, mode)


def test_a_reader_whose_loss_is_not_finite_is_refused_and_its_settings_cannot_change():
    explained = behaviour(lambda q: f"Number {q.id} is so.", n=10)
    reader = ChoiceReader(BagOfWords(), settings=replace(quick, lr=math.inf))
    texts = [simulator_texts(q, r)[:1] for q, r in zip(explained.questions, explained.rationales)]
    with pytest.raises(BadInput, match=r"field 'lr': .* not finite .got inf.. Choose a lower"):
        fit_reader(reader, explained.questions, texts, explained.predictions)
    with pytest.raises(BadInput, match="field 'y': are 9 for 10 questions"):
        fit_reader(reader, explained.questions, texts, explained.predictions[1:])
    with pytest.raises(BadInput, match="field 'texts': are 9 for 10 questions"):
        read_choices(reader, explained.questions, explained.rationales[1:])
    with pytest.raises(FrozenInstanceError):  # one default serves all readers
        Reader().epochs = 1


def test_a_reader_is_not_trained_on_the_rows_that_choose_its_epoch():
    explained = behaviour(lambda q: f"Number {q.id} is so.")
    reader = ChoiceReader(BagOfWords(), settings=quick)
    texts = [simulator_texts(q, r)[:1] for q, r in zip(explained.questions, explained.rationales)]
    fit_reader(reader, explained.questions, texts, explained.predictions)
    number = lambda rows: {max(row) for row in rows}
    trained, held_out = number(reader.model.trained_on), number(reader.model.asked_about)
    assert len(held_out) == 4 and not trained & held_out and len(trained | held_out) == 40


def test_rationales_that_decide_the_answer_have_a_positive_rev_and_others_none():
    """A reader of which words are there: those of the restatement are in every text, among the choices.

    So all it can tell the answers apart by is the rationale.
    """
    telling = behaviour(lambda q: "It purrs." if q.answer else "It barks.")
    silent = behaviour(lambda q: "It is so.")
    base = BagOfWords(lambda ids: ((ids > 0) & (ids < 1000)).float())
    half = lambda e: (e.part(range(20)), e.part(range(20, 40)))
    slow = replace(quick, epochs=10, lr=0.1)
    some = dict(seeds=(0, 1), settings=slow)
    score = measure_rev(base, *half(telling), **some, draws=200)
    assert math.log(2) / 2 < score.low <= score.value < math.log(2) + 0.01
    assert measure_rev(base, *half(silent), **some, draws=200).value == pytest.approx(0, abs=0.1)

    rows = [
        dict(
            id=q.id,
            question=q.question,
            choices=list(q.choices),
            answer=q.answer,
            prediction=q.answer,
            rationale=r,
        )
        for q, r in zip(telling.questions, telling.rationales)
    ]
    task = ScoringTask(read_rationales(rows), simulator=base, parts=2, interval=dict(draws=200), **some)
    scores, _ = Rev().compute(task)
    assert scores["rev"].value > math.log(2) / 2, "a file of such rationales through `score`"
