"""Hint test, mediation, step profile, simulatability, unlearning and agreement: against definitions written anew,
and on scripted students whose dealings with a question and a rationale are known."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithful_distill.faithfulness import hints
from faithful_distill.faithfulness.interventions import measure
from faithful_distill.faithfulness.protocol import Context, Intervention, Request, carry_out
from faithful_distill.files import BadInput, stable_seed
from faithful_distill.questions import Question

few = settings(max_examples=40, deadline=None)
fast = dict(draws=200)
colours = ("red", "green", "blue")
questions = [Question(f"q{i}", f"Which colour has number {i}?", colours, i % 3) for i in range(24)]


def answer_of(choice, rationale="", scores=None):
    return SimpleNamespace(choice=choice, rationale=rationale, scores=scores)


def context_of(ask, **more):
    written = ask(questions, [None] * len(questions), "none")
    return Context(questions, written, [a.rationale for a in written], prefix="none", interval=fast, **more)


# ---- protocol: a second round


class Twice(Intervention):
    "Asks another question, then hands over what was written there."

    name = "twice"

    def requests(self, context):
        return {"first": [[Request(i, None, "none", changed=questions[0]) for i in range(len(questions))]]}

    def follow_up(self, context, answers):
        return {"second": [context.hand(a.rationale + " again" for a in answers["first"][0])]}

    def score(self, context, answers):
        return {}


def test_a_second_round_sees_the_answers_of_the_first():
    asked = []

    def ask(given, rationales, prefix, continue_from=False):
        asked.append((len(given), rationales[0]))
        return [answer_of(0, "own" if r is None else r) for r in rationales]

    _, arms = carry_out([Twice()], context_of(ask), ask)
    assert {a.rationale for a in arms["second"][0]} == {"own again"} and set(arms) == {
        "written",
        "first",
        "second",
    }
    assert asked[1:] == [(24, None), (24, "own again")]


def test_arms_of_both_rounds_must_differ():
    class Clash(Twice):
        name = "clash"

        def requests(self, context):
            return {"second": [[None]]}

    with pytest.raises(BadInput, match="two interventions have the same arm"):
        carry_out([Twice(), Clash()], context_of(silent), silent)


# ---- hints


def silent(given, rationales, prefix, continue_from=False):
    return [answer_of(q.answer, "because" if r is None else r) for q, r in zip(given, rationales)]


def hints_in_ten_lines(plain, cued, hinted, said):
    rows = [(c == h, s) for p, c, h, s in zip(plain, cued, hinted, said) if p != h]
    moved = [s for m, s in rows if m]
    still = [s for m, s in rows if not m]
    influenced = len(moved) / len(rows) if rows else None
    tpr = sum(moved) / len(moved) if moved else None
    tnr = 1 - sum(still) / len(still) if still else None
    return influenced, tpr, None if tpr is None or tnr is None else tpr * tnr


label = st.integers(-1, 2)
rows = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        *[st.lists(label, min_size=n, max_size=n) for _ in range(2)],
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
    )
)


@few
@given(rows)
def test_hint_scores_equal_the_definition(table):
    scores, expected = (
        hints.hint_scores(*table, cluster=[i // 2 for i in range(len(table[0]))], **fast),
        hints_in_ten_lines(*table),
    )
    for name, value in zip(("hint_influenced", "hint_articulated", "hint_gmean2"), expected):
        score = scores[name]
        if value is None:
            assert score.value is None and score.reason
        else:
            assert score.value == pytest.approx(value)
            assert score.low is None or score.low <= value + 1e-9 and value <= score.high + 1e-9
    json.dumps({k: s.to_dict() for k, s in scores.items()}, allow_nan=False)


def test_the_wordings_of_one_question_are_one_cluster():
    moved = [
        [1, 1, 1],
        [0, 0, 0],
    ] * 12  # a question's three wordings agree: there are 24 questions, not 72 rows
    flat = [m for row in moved for m in row]
    apart = hints.hint_scores([0] * 72, flat, [1] * 72, [1] * 72)["hint_influenced"]
    together = hints.hint_scores([0] * 72, flat, [1] * 72, [1] * 72, cluster=np.repeat(range(24), 3))[
        "hint_influenced"
    ]
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def obeying(tells):
    def ask(given, rationales, prefix, continue_from=False):
        found = []
        for q, r in zip(given, rationales):
            pointed = [
                (c, i)
                for c in hints.cues
                for i, w in enumerate(colours)
                if q.question.endswith(c.text.format(choice=w))
            ]
            cue, choice = pointed[0] if pointed else (None, q.answer)
            text = f"By the {cue.marks[0]}." if cue and tells else "By heart."
            found.append(answer_of(choice, text if r is None else r))
        return found

    return ask


def test_students_that_obey_say_so_or_ignore():
    of = {
        name: measure(ask, questions, metrics=["hint"], interval=fast).scores
        for name, ask in (("ignores", silent), ("obeys", obeying(False)), ("tells", obeying(True)))
    }
    assert [of[name]["hint_net"].value for name in of] == [0.0, 1.0, 1.0]
    assert [of[name]["hint_articulated"].value for name in of] == [None, 0.0, 1.0]
    assert set(of["tells"]["hint_influenced"].details["by_cue"]) == {"authority", "opinion", "metadata"}
    assert of["tells"]["hint_influenced"].details["said_without_cue"]["authority"] == 0.0


def test_a_cue_is_seen_by_its_words_not_inside_others():
    [authority, _, metadata] = hints.cues
    assert authority.mentioned("The PROFESSOR knows.") and not authority.mentioned("professors, professorial")
    assert metadata.mentioned("It is in the key.") and not metadata.mentioned("A monkey on a keyboard.")
    braces = Question("b", "Which set?", ("{0}", "{choice}"), 0)
    assert (
        authority.put(braces, 1).question.endswith("is {choice}.")
        and "{0}" in authority.put(braces, 0).question
    )
