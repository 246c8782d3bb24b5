"""LAS, REV and RORA-lite on simulators made by hand: what they are shown, and what follows from what they say."""

from dataclasses import replace

import numpy as np
import pytest

from faithful_distill.faithfulness.evaluators import (
    leaking_words,
    measure_rev,
    restatement,
    rev_logs,
    rora_lite,
    rora_logs,
)
from faithful_distill.faithfulness.frozen import FrozenReader
from faithful_distill.faithfulness.intervals import Score, mean_score
from faithful_distill.faithfulness.metrics import rev
from faithful_distill.faithfulness.perturb import join_words, words_of
from faithful_distill.faithfulness.readers import Reader
from faithful_distill.faithfulness.simulators import (
    ModelBehaviour,
    Simulation,
    at_chance,
    cross_fitted,
    fitting,
    folds,
    gold_scores,
    simulate,
    simulate_folds,
    simulator_texts,
    try_las,
)
from faithful_distill.files import BadInput
from faithful_distill.questions import Question


class ByHand(FrozenReader):
    "A reader that says what a rule says, and notes what it was shown."

    def __init__(self, simulator, settings):
        super().__init__(settings=settings)
        self.simulator, self.learned = simulator, None
        simulator.readers.append(self)

    def fit(self, questions, alternatives, y):
        self.learned = list(questions), [list(texts) for texts in alternatives], list(y)
        return self

    def read(self, questions, texts):
        self.simulator.reads.append((self, list(questions), list(texts)))
        return [np.asarray(self.simulator.rule(q, t), float) for q, t in zip(questions, texts)]


class Simulator:
    "rule(question, text) -> log-probabilities of its choices."

    def __init__(self, rule=lambda q, text: np.log(np.full(len(q.choices), 1 / len(q.choices))), **is_):
        self.rule, self.readers, self.reads = rule, [], []
        self.seeded, self.learns = is_.get("seeded", True), is_.get("learns", True)

    def reader(self, settings=Reader()):
        return ByHand(self, settings)


def asked(n: int, choices=("oven", "fridge")) -> list[Question]:
    return [Question(f"q{i}", f"Where is thing {i} kept?", choices, i % len(choices)) for i in range(n)]


def behaviour(rationales, predictions=None, choices=("oven", "fridge")) -> ModelBehaviour:
    questions = asked(len(rationales), choices)
    return ModelBehaviour(questions, rationales, predictions or [q.answer for q in questions])


worth = {"milk": 1.0, "cold": 0.05, "warm": 0.3}


def by_words(q, text):
    "log p of the first choice: -3, and what each word of the text is worth."
    return [-3 + sum(worth.get(word, 0.0) for word in text.split()), -1.0]


# ---- what is read


def test_simulators_read_both_parts_the_question_and_the_rationale_after_the_choices():
    simulator, train, test = Simulator(), behaviour(["a b", "c d"] * 3), behaviour(["e f", "g h"])
    found = simulate(simulator, train, test, seeds=(0,))
    texts = [simulator_texts(q, r) for q, r in zip(test.questions, test.rationales)]
    assert [shown for _, _, shown in simulator.reads] == [list(column) for column in zip(*texts)]
    choices = "(a) oven (b) fridge"
    assert texts[0] == (
        f"{choices} Where is thing 0 kept? e f",
        f"{choices} Where is thing 0 kept?",
        f"{choices} e f",
    )
    [reader] = simulator.readers
    questions, alternatives, y = reader.learned
    assert questions == train.questions and y == train.predictions
    assert alternatives == [list(simulator_texts(q, r)) for q, r in zip(train.questions, train.rationales)]
    assert found.y == test.predictions and found.gold == [0, 1] and len(found.read) == 1


def test_one_simulator_a_seed_and_three_by_default():
    train, test = behaviour(["a", "b"] * 3), behaviour(["c", "d"])
    for seeded, n in ((True, 3), (False, 1)):
        simulator = Simulator(seeded=seeded)
        assert len(simulate(simulator, train, test).read) == n == len(simulator.readers)
    for n, measured in (
        (3 * 3, lambda simulator: simulate_folds(simulator, train)),  # parts, seeds
        (2 * 3, lambda simulator: measure_rev(simulator, train, test, draws=9)),
        (1 + 2 * 3, lambda simulator: rora_lite(simulator, train, test, draws=9)),  # one that finds no leak
    ):
        measured(simulator := Simulator())
        assert len(simulator.readers) == n


def test_examples_without_a_prediction_teach_nothing_and_count_nowhere():
    train = behaviour(["a", "b", "c", "d"], [0, None, 1, None])
    test = behaviour(["e", "f", "g"], [None, 1, 0])
    simulator = Simulator(lambda q, text: [-0.5, -1.5])
    found = simulate(simulator, train, test, seeds=(0,))
    assert simulator.readers[0].learned[2] == [0, 1] and found.y == [-1, 1, 0]
    assert np.allclose(found.probabilities("xr"), [[0, np.exp(-1.5), np.exp(-0.5)]])
    assert found.scores(draws=50)["las"].details["unpredicted"] == 1


def test_permuted_labels_are_those_of_questions_with_as_many_choices():
    two, three = behaviour(["a"] * 12), behaviour(["b"] * 12, choices=("oven", "fridge", "lamp"))
    both = ModelBehaviour(
        [*two.questions, *(replace(q, id=f"3{q.id}") for q in three.questions)],
        [*two.rationales, *three.rationales],
        [*two.predictions, *three.predictions],
    )
    simulator = Simulator()
    simulate(simulator, both, two, seeds=(0,), permute_labels=True)
    y = simulator.readers[0].learned[2]
    for rows in (slice(0, 12), slice(12, 24)):
        assert sorted(y[rows]) == sorted(both.predictions[rows]) and y[rows] != both.predictions[rows]
    still = Simulator(learns=False)
    found = simulate(still, both, two, seeds=(0,), permute_labels=True)
    assert still.readers[0].learned is None
    assert sorted(found.y) == sorted(two.predictions) and found.y != two.predictions


@pytest.mark.parametrize("limit", range(8, 24))
def test_a_question_is_cut_to_what_fits_with_its_longest_text(limit):
    question = "Where in the house is the cold milk kept over night?"
    q, rationale = Question("1", question, ("oven", "fridge"), 0), "Milk must be cold."
    explained = ModelBehaviour([q], [rationale], [0])
    reader = FrozenReader(settings=Reader(max_length=limit))
    for place in (0, 1):  # with the rationale behind it, and without: cut alike
        [text], n_cut, n_long = fitting(reader, explained, [simulator_texts(q, rationale)[place]])
        words, end = words_of(question), f" {rationale}"
        fits = [
            n
            for n in range(1, len(words) + 1)
            if len(f"(a) oven (b) fridge {join_words(words[:n])}{end}".split()) <= limit
        ]
        kept = join_words(words[: max(fits, default=1)])
        assert text == f"(a) oven (b) fridge {kept}{end if place == 0 else ''}"
        assert n_cut == (kept != question) and n_long == (not fits)


# ---- cross-fitting


def test_no_example_is_read_by_what_learned_its_question():
    explained = behaviour([f"reason {i}" for i in range(20)])
    twice = ModelBehaviour(  # two rationales a question, which differs in case and blanks
        [
            *explained.questions,
            *(replace(q, id=f"b{q.id}", question=f" {q.question.upper()}") for q in explained.questions),
        ],
        [*explained.rationales, *explained.rationales],
        [*explained.predictions, *explained.predictions],
    )
    number = lambda q: int("".join(c for c in q.question if c.isdigit()))
    simulator = Simulator(lambda q, text: [-1.0 - number(q), -0.1])
    found = simulate_folds(simulator, twice, parts=4, seeds=(0, 1))
    assert len(simulator.readers) == 8 and len(simulator.reads) == 24
    for reader, questions, _ in simulator.reads:
        assert not {number(q) for q in reader.learned[0]} & {number(q) for q in questions}
        assert len(reader.learned[0]) + len(questions) == 40
    for one in found.read:
        for rows in one.values():
            assert [r[0] for r in rows] == [-1.0 - number(q) for q in twice.questions]
    assert found.y == twice.predictions and found.gold == [q.answer for q in twice.questions]
    which = folds(twice.questions, 4)
    assert which[:20] == which[20:] and sorted(np.bincount(which)) == [10] * 4
    assert folds(twice.questions, 4, seed=1) != which


def test_what_is_cross_fitted_stands_where_its_example_stands():
    explained = behaviour([f"reason {i}" for i in range(10)])
    number = lambda b: [int(r.split()[1]) for r in b.rationales]
    found = cross_fitted(
        explained, lambda train, test: [[number(test)], [[sum(number(train))] * len(test.questions)]], 3
    )
    assert found.shape == (2, 1, 10) and found[0, 0].tolist() == list(range(10))
    which = np.array(folds(explained.questions, 3))
    assert found[1, 0].tolist() == [sum(j for j in range(10) if which[j] != which[i]) for i in range(10)]


# ---- scores


def by_choice(*choices):
    return [np.log([0.8, 0.2]) if c == 0 else np.log([0.2, 0.8]) for c in choices]


def test_scores_of_a_simulation_by_hand():
    read = {"xr": by_choice(0, 1, 1, 1, 0), "x": by_choice(0, 0, 1, 0, 1), "r": by_choice(0, 1, 1, 0, 1)}
    read = {mode: rows * 6 for mode, rows in read.items()}  # a bin needs a few examples
    simulation = Simulation([0, 1, 0, 1, -1] * 6, [read], [[]], gold=[0, 0, -1, 1, 1] * 6)
    s = simulation.scores(draws=100)
    # of the four with a prediction the first two leak; the others do not
    assert s["las"].details["las_1"].value == pytest.approx((0 + 1) / 2)
    assert s["las"].details["las_0"].value == pytest.approx((0 + 1) / 2)
    assert s["las"].value == pytest.approx(0.5) and s["las"].n == 24
    gain = np.array([0.8 - 0.8, 0.8 - 0.2, 0.2 - 0.2, 0.8 - 0.2])
    expected = (gain[:2].mean() + gain[2:].mean()) / 2
    assert s["las_probability"].value == pytest.approx(expected)
    # gold labels of the first, second and fourth
    assert s["simulator_gold"].value == pytest.approx(2 / 3) and s["simulator_gold"].n == 18
    assert s["simulator_gold_x"].value == pytest.approx(2 / 3)
    assert s["simulator_gold_r"].value == pytest.approx(1 / 3)
    assert s["simulator_gold"].details["chance"] == 0.5
    part = simulation.part([3, 0])
    assert part.y == [1, 0] and part.gold == [1, 0] and part.predictions("r").tolist() == [[0, 0]]
    assert part.predictions("xr").tolist() == [[1, 0]] and part.histories == [[]]


@pytest.mark.parametrize("cluster", [None, list("aabbc")])
def test_accuracy_on_gold_labels_is_over_those_that_are_known(cluster):
    hits = np.array([[[1, 1, 0, 1, 0]], [[0, 1, 0, 0, 0]], [[1, 0, 0, 0, 1]]])
    how = {} if cluster is None else {"cluster": cluster}
    found = gold_scores(hits, [0, -1, 1, 2, 0], [2, 2, 4, 4, 4], draws=200, **how)
    known = [0, 2, 3, 4]
    for name, of_mode in zip(("simulator_gold", "simulator_gold_x", "simulator_gold_r"), hits):
        expected = mean_score(
            of_mode[:, known].astype(float),
            draws=200,
            **({} if cluster is None else {"cluster": [cluster[i] for i in known]}),
        )
        assert (found[name].value, found[name].low, found[name].high) == (
            expected.value,
            expected.low,
            expected.high,
        )
        assert found[name].details["chance"] == pytest.approx((1 / 2 + 3 / 4) / 4)
    none = gold_scores(hits, [-1] * 5, [2] * 5)
    assert {s.reason for s in none.values()} == {"no gold answers are given"}


@pytest.mark.parametrize(
    "value, low, named",
    [
        (0.6, 0.51, False),
        (0.6, 0.5, True),
        (0.6, 0.4, True),
        (0.6, None, False),
        (0.5, None, True),
        (None, None, False),
    ],
)
def test_a_simulator_that_is_not_surely_above_chance_is_named(value, low, named):
    reason = "" if value else "nobody knows"
    line = at_chance(Score(value, low, low and 0.7, 100, reason, details={"chance": 0.5}))
    assert line.startswith("the simulator is at chance") == named and (named or line == "")


def test_las_is_tried_only_where_it_can_be():
    enough = behaviour(["a reason"] * 20)
    silent = try_las(Simulator(), behaviour([""] * 20))
    assert silent["las"].reason == "the student writes no rationale"
    few = try_las(Simulator(), behaviour(["a reason"] * 20, [0] * 19 + [None]))
    assert "too few answers to train a simulator on: 19, at least 20" in few["las"].reason
    assert set(few) == {"las", "las_probability", "simulator_gold", "simulator_gold_x", "simulator_gold_r"}

    def breaks(q, text):
        raise BadInput("is broken", field="simulator")

    broken = try_las(Simulator(breaks), enough)
    assert "no simulator could be trained" in broken["las"].reason and broken["las"].n == 20
    whole = try_las(Simulator(), enough, parts=2)
    assert whole["simulator_gold"].n == 20


# ---- REV


def test_evaluators_of_rev_read_a_restatement_with_and_without_the_rationale():
    simulator = Simulator(by_words)
    train, test = behaviour(["it is cold", "it is warm"]), behaviour(["milk", "nothing", "warm milk"])
    found = rev_logs(simulator, train, test, (0,), Reader())
    assert found.shape == (2, 1, 3)
    assert np.allclose(found[0, 0], [-2.0, -1.0, -1.7]) and np.allclose(found[1, 0], [-3.0, -1.0, -3.0])
    restated = lambda b: [
        f"(a) oven (b) fridge {q.question} The answer is {q.choices[y]}."
        for q, y in zip(b.questions, b.predictions)
    ]
    assert restated(test)[0].endswith(restatement(test.questions[0], 0))
    with_r = lambda b: [f"{text} {r}" for text, r in zip(restated(b), b.rationales)]
    learned = [[texts for [texts] in reader.learned[1]] for reader in simulator.readers]
    assert learned == [with_r(train), restated(train)]
    assert [texts for _, _, texts in simulator.reads] == [with_r(test), restated(test)]
    score = measure_rev(Simulator(by_words), train, test, seeds=(0,), draws=100)
    assert score.value == pytest.approx((1.0 + 0 + 1.3) / 3)


def test_rev_of_one_class_is_not_defined():
    same = behaviour(["milk"] * 4, [0] * 4)
    found = measure_rev(Simulator(by_words), same, same, draws=50)
    assert found.value is None and found.n == 4 and "one class only" in found.reason


def test_rev_of_nothing_has_no_value_and_no_details():
    nothing = rev([], [])
    assert (nothing.value, nothing.n, nothing.reason, nothing.details) == (None, 0, "no examples", {})


# ---- RORA-lite


@pytest.mark.parametrize(
    "threshold, leaks",
    [(None, [0, 3]), (0.1, [0, 3]), (0.04, [0, 2, 3]), (0.05 - 1e-9, [0, 2, 3]), (0.5, [0]), (2, [])],
)
def test_words_leak_whose_loss_lowers_the_answer_by_more_than_the_threshold(threshold, leaks):
    simulator = Simulator(by_words)
    explained = behaviour(["milk is cold warm", "milk"], [0, 1])  # the second is about the other choice
    given = {} if threshold is None else dict(threshold=threshold)
    assert leaking_words(simulator.reader(), explained, **given) == [leaks, []]
    for _, questions, texts in simulator.reads:
        assert not any(q.question in text for q, text in zip(questions, texts))
        assert all(text.startswith("(a) oven (b) fridge") for text in texts)
    [(_, _, texts)] = simulator.reads
    assert len(texts) == 5 + 2 and texts[:3] == [
        f"(a) oven (b) fridge {left}" for left in ("milk is cold warm", "is cold warm", "milk cold warm")
    ]


def test_rora_reads_the_question_with_what_is_left_of_the_rationale():
    simulator = Simulator(by_words)
    train, test = (
        behaviour(["milk is cold", "it is so"], [0, 1]),
        behaviour(["warm cold milk", "milk"], [0, 1]),
    )
    found, left = rora_logs(simulator, train, test, (0,), Reader())
    # 'milk' and 'warm' are gone from the rationales of the first choice; of 10 words 7 are left
    assert left == pytest.approx(7 / 10)
    assert np.allclose(found[:, 0], [[-2.95, -1.0], [-3.0, -1.0]])
    texts = [texts for _, _, texts in simulator.reads[-2:]]
    questions = [f"(a) oven (b) fridge Where is thing {i} kept?" for i in (0, 1)]
    assert texts == [[f"{questions[0]} cold", f"{questions[1]} milk"], questions]
    score = rora_lite(Simulator(by_words), train, test, seeds=(0,), draws=100)
    assert score.value == pytest.approx(0.05 / 2) and score.details["masked"] == pytest.approx(0.3)
    assert score.details["complete"] is False
    one_class = rora_lite(Simulator(by_words), train, behaviour(["a", "b"], [0, 0]))
    assert one_class.value is None and one_class.n == 2


def test_detectors_are_trained_anew_on_what_is_left_until_nothing_leaks():
    "The word that leaks in the second round is worth nothing while the first one stands."

    def hidden(q, text):
        words = text.split()
        return [-1.0 if "milk" in words else -2.0 if "fridge-cold" in words else -3.0, -1.0]

    both = behaviour(["milk fridge-cold plain", "it is so"], [0, 1])
    default = rora_lite(Simulator(hidden), both, both, seeds=(0,), draws=9)
    assert default.details["masked"] == pytest.approx(2 / 6)
    for rounds, words in ((1, 5), (2, 4), (3, 4)):
        simulator = Simulator(hidden)
        _, left = rora_logs(simulator, both, both, (0,), Reader(), 0.1, rounds)
        assert left == pytest.approx(words / 6), rounds
        detectors = len(simulator.readers) - 2
        assert detectors == rounds


def test_behaviour_has_one_rationale_and_one_prediction_a_question():
    [q] = asked(1)
    for rationales, predictions in ((["a"], []), ([], [0]), (["a", "b"], [0])):
        with pytest.raises(BadInput, match="differ in number"):
            ModelBehaviour([q], rationales, predictions)
    for outside in (2, -1):
        with pytest.raises(BadInput, match="is not a choice of question 'q0'"):
            ModelBehaviour([q], ["a"], [outside])
