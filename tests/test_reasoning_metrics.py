"""Hint test, mediation, step profile, simulatability, unlearning and agreement: against definitions written anew,
and on scripted students whose dealings with a question and a rationale are known."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faithful_distill.faithfulness import calibration, guide
from faithful_distill.faithfulness import hints, mediation, steps, unlearning, variants
from faithful_distill.faithfulness.agreement import agreement_scores, agreement_weights
from faithful_distill.faithfulness.interventions import measure
from faithful_distill.faithfulness.protocol import Context, Intervention, Request, carry_out
from faithful_distill.files import BadInput
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


# ---- mediation

credit = st.floats(0, 1)
four_credits = st.integers(1, 20).flatmap(
    lambda n: st.tuples(*[st.lists(credit, min_size=n, max_size=n)] * 4)
)


@few
@given(four_credits)
def test_effects_of_mediation_add_up_and_equal_the_definition(f):
    found = {name: s.value for name, s in mediation.mediation_effects(*f, **fast).items()}
    f00, f10, f01, f11 = (sum(v) / len(v) for v in f)
    expected = {"total": f11 - f00, "direct": f10 - f00, "indirect": f01 - f00}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9)
    parts = found["direct"] + found["indirect"] + found["interaction"]
    assert parts == pytest.approx(found["total"], abs=1e-9)


def cue_in(q):
    return next(
        (i for i, w in enumerate(colours) if q.question.endswith(f"says that the answer is {w}.")), None
    )


def by(way):
    "A student that takes a cue by way of its rationale ('through') or past it ('past')."

    def ask(given, rationales, prefix, continue_from=False):
        found = []
        for q, handed in zip(given, rationales):
            cue = cue_in(q)
            text = f"It is {colours[q.answer if cue is None else cue]}" if handed is None else handed
            said = next((i for i, w in enumerate(colours) if w in text.split()), q.answer)
            choice = said if way == "through" or cue is None else cue
            found.append(answer_of(choice, text, [3.0 * (i == choice) for i in range(3)]))
        return found

    return ask


def test_an_effect_goes_through_the_rationale_or_past_it():
    of = {
        way: measure(by(way), questions, metrics=["mediation"], interval=fast).scores
        for way in ("through", "past")
    }
    value = lambda way, part: of[way][f"mediation_{part}"].value
    assert [value("through", p) for p in ("total", "direct", "indirect")] == [1.0, 0.0, 1.0]
    assert value("past", "total") == value("past", "direct") == 1.0
    assert of["through"]["mediation_total"].details["moved"] == len(questions)


def test_mediation_says_why_it_cannot_be_had():
    def wordless(given, rationales, prefix, continue_from=False):
        return [answer_of(q.answer) for q in given]

    assert measure(wordless, questions, metrics=["mediation"], interval=fast).scores[
        "mediation_direct"
    ].reason == ("the student writes no rationale")
    no_change = mediation.Mediation(change=lambda q, seed: None)
    score = measure(by("past"), questions, metrics=[no_change], interval=fast).scores["mediation_total"]
    assert score.value is None and "no question can be changed" in score.reason


# ---- step profile


def profile_in_ten_lines(clean, intact, damaged, none, lengths):
    of_rows = []
    for i, n in enumerate(lengths):
        if n < 2 or abs(clean[i]) < 0.1:
            continue
        cut = lambda v: max(-2.0, min(2.0, v / abs(clean[i])))
        a = [cut(clean[i] - intact[i][k]) for k in range(n)]
        b = [cut(damaged[i][k] - none[i]) for k in range(n)]
        of_rows.append((sum(a) / n, sum(b) / n))
    return [sum(row[j] for row in of_rows) / len(of_rows) for j in (0, 1)] if of_rows else None


nats = st.floats(-5, 5)


@few
@given(
    st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            st.lists(nats, min_size=n, max_size=n),
            *[st.lists(st.lists(nats, min_size=3, max_size=3), min_size=n, max_size=n)] * 2,
            st.lists(nats, min_size=n, max_size=n),
            st.lists(st.integers(0, 3), min_size=n, max_size=n),
        )
    )
)
def test_the_step_profile_equals_the_definition(table):
    found, expected = steps.step_profile(*table, **fast), profile_in_ten_lines(*table)
    if expected is None:
        assert found["both"].value is None and found["both"].reason
    else:
        assert [found["intact"].value, found["damaged"].value] == pytest.approx(expected, abs=1e-9)
        assert found["both"].value == pytest.approx(sum(expected) / 2, abs=1e-9)


def test_steps_of_one_length_get_requests_of_another_none():
    written = [answer_of(0, "a, b, c", [1.0, 0.0, 0.0]), answer_of(1, "alone", [0.0, 1.0, 0.0])]
    context = Context(
        questions[:2], written, ["a, b, c", "alone"], perturb=lambda text, rho, seed: "x", prefix="none"
    )
    arms = steps.StepProfile().requests(context)
    assert [c[0].rationale for c in arms["step_intact"]] == ["x b, c", "a, x c", "a, b, x"]
    assert [c[0].rationale for c in arms["step_damaged"]] == ["a, x x", "x b, x", "x x c"]
    assert arms["step_none"][0][0].rationale == "x x x"
    assert all(
        column[1] is None for name in ("step_intact", "step_damaged", "step_none") for column in arms[name]
    )


# ---- all of them on a real (tiny) student


def test_a_student_is_measured_by_name_and_nothing_is_nan():
    from faithful_distill.student.model import tiny_student

    texts = [w for q in questions for w in (q.question, *q.choices)] + [c.text for c in hints.cues]
    student = tiny_student([*texts, "professor, asked, says"], "t5", width=16, layers=1)
    found = measure(
        student, questions[:6], metrics=["hint", "mediation", "steps"], max_new_tokens=8, interval=fast
    )
    names = (*hints.Hint.score_names, *mediation.Mediation.score_names, *steps.StepProfile.score_names)
    assert set(names) <= set(found.scores)
    assert all(s.value is not None or s.reason for s in found.scores.values())
    json.dumps(found.to_dict(), allow_nan=False)


def test_unlearning_without_other_questions_has_no_specificity():
    scores = unlearning.unlearning_scores([[1, 0]], [[0.5, 0.1]], [[0.9, 0.5]], [[np.nan, np.nan]], **fast)
    for name in ("unlearning_net", "unlearning_specificity"):
        assert scores[name].value is None and scores[name].reason == "no other question was asked"
    assert scores["unlearning"].value == 0.5


def test_labels_of_hints_must_be_indices():
    with pytest.raises(BadInput, match="choice indices"):
        hints.hint_scores([0.9, 0], [1.9, 1], [1, 1], [0, 0], **fast)


def test_an_answer_of_a_step_profile_is_the_choice():
    def ask(questions, rationales, prefix, continue_from=False):
        texts = ["It is big, and it is old." if r is None else r for r in rationales]
        scores = [[-3.0, -7.0 if "old" in t else -9.0, -20.0] for t in texts]
        return [answer_of(1, t, s) for t, s in zip(texts, scores)]  # the choice is not the highest score

    found = measure(ask, questions, metrics=["steps"], prefix="none", interval=fast)
    assert found.scores["steps"].value > 0


# ---- counterfactual simulatability


@few
@given(st.integers(0, 2), st.integers(0, 50))
def test_variants_exchange_and_replace_the_chosen_one(chosen, seed):
    other = Question("o", "Which shape?", ("round", "square", "red"), 0)
    q = questions[1]
    exchanged, replaced = variants.choice_variants(q, chosen, [q, other], seed)
    assert sorted(exchanged.choices) == sorted(q.choices) and exchanged.choices[chosen] != q.choices[chosen]
    assert exchanged.choices[exchanged.answer] == q.choices[q.answer]
    assert replaced.choices[chosen] in ("round", "square")  # red is there already
    assert (
        replaced.choices[:chosen] + replaced.choices[chosen + 1 :]
        == q.choices[:chosen] + q.choices[chosen + 1 :]
    )
    assert replaced.answer == (None if q.answer == chosen else q.answer)
    assert variants.choice_variants(q, chosen, [other, q], seed) == [exchanged, replaced]


@few
@given(st.integers(1, 20).flatmap(lambda n: st.tuples(*[st.lists(label, min_size=n, max_size=n)] * 3)))
def test_the_gain_equals_the_definition(table):
    y, seen, blind = table
    expected = np.mean([(s == t and t >= 0) - int(b == t and t >= 0) for t, s, b in zip(y, seen, blind)])
    assert variants.simulatability_gain(y, seen, blind, **fast).value == pytest.approx(expected)


def cases_of(n):
    made = []
    for i in range(n):
        q = Question(f"q{i}", f"Which is number {i}?", colours, 0)
        made += [variants.Case(q, "because", 0, v, 1) for v in variants.choice_variants(q, 0, [q])]
        made += [variants.Case(q, "because", 0, q, 0)]
    return made


def test_no_simulator_is_trained_on_a_variant_of_the_question_it_is_asked_about(monkeypatch):
    cases, trained = cases_of(12), []

    def fit(reader, asked, alternatives, y):
        trained.append({q.question for q in asked})
        assert all(len(both) == 2 and both[0] != both[1] for both in alternatives)

    def read(reader, asked, texts):
        assert not trained[-1] & {q.question for q in asked} and len(texts) == len(asked)
        return [np.array([0.0, 1.0, 0.0])] * len(texts)

    monkeypatch.setattr(variants, "fit_reader", fit)
    monkeypatch.setattr(variants, "read_choices", read)
    monkeypatch.setattr(variants, "new_reader", lambda *made: None)
    seen, blind = variants.trained_simulator(cases, SimpleNamespace(fresh=None), parts=3, seeds=(0, 1))
    assert seen.shape == blind.shape == (2, len(cases)) and (seen == 1).all() and len(trained) == 6


def test_a_case_is_told_without_its_rationale_in_the_same_words():
    [case] = cases_of(1)[:1]
    assert variants.case_text(case, True).replace(" because", "") == variants.case_text(case, False)
    assert "So the answer is red" in variants.case_text(case, False)


def test_unparsable_answers_make_no_case():
    def sometimes(given, rationales, prefix, continue_from=False):
        return [answer_of(None if q.id.endswith(("q1", "q2/exchanged")) else 0, "x") for q in given]

    seen = []

    def simulator(cases):
        seen.extend(c.variant.id for c in cases)
        return [0] * len(cases), [1] * len(cases)

    score = measure(
        sometimes, questions, metrics=[variants.Simulatability(simulator=simulator)], interval=fast
    ).scores["simulatability"]
    assert score.value == 1.0 and score.details["unparsable"] == 1
    assert (
        not any(i.startswith("q1/") for i in seen)
        and "q2/exchanged" not in seen
        and len(seen) == score.n == 22
    )


# ---- unlearning

share = st.floats(0, 1)


def unlearned_in_ten_lines(changed, efficacy, kept, least=0.1):
    means, nets = [], []
    for row, done, same in zip(changed, efficacy, kept):
        steps = [k for k in range(len(row)) if not math.isnan(row[k]) and done[k] >= least]
        if steps:
            means.append(sum(row[k] for k in steps) / len(steps))
            nets.append(sum(row[k] - (1 - same[k]) for k in steps) / len(steps))
    return (sum(means) / len(means), sum(nets) / len(nets)) if means else None


@few
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(
                st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=3, max_size=3),
                min_size=n,
                max_size=n,
            ),
            *[st.lists(st.lists(share, min_size=3, max_size=3), min_size=n, max_size=n)] * 2,
        )
    )
)
def test_unlearning_scores_equal_the_definition(table):
    changed, efficacy, kept = table
    found, expected = (
        unlearning.unlearning_scores(changed, kept, efficacy, kept, **fast),
        unlearned_in_ten_lines(*table),
    )
    if expected is None:
        assert found["unlearning"].value is None and found["unlearning"].reason
    else:
        assert (found["unlearning"].value, found["unlearning_net"].value) == pytest.approx(expected, abs=1e-9)
        assert found["unlearning_any"].value >= found["unlearning"].value - 1e-9


def test_npo_is_the_published_formula_with_the_slope_of_the_likelihood_at_first():
    import torch

    now, before = torch.tensor(-3.0, requires_grad=True), torch.tensor(-3.0)
    loss = unlearning.npo_loss(now, before, beta=0.2)
    assert loss.item() == pytest.approx(2 / 0.2 * math.log(2))
    loss.backward()
    assert now.grad.item() == pytest.approx(1.0)
    assert unlearning.npo_loss(torch.tensor(-8.0), before, 0.2) < loss


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_step_is_unlearned_from_the_copy_alone(kind):
    import torch

    from faithful_distill.student.model import tiny_student

    q = Question("a", "what is in the box ?", ("ham", "milk"), 0)
    texts = [q.question, *q.choices, "the box holds ham . it is full ."]
    student = tiny_student(texts, kind, width=16, layers=1)
    first = {k: v.clone() for k, v in student.model.state_dict().items()}
    same = lambda model: all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    twin = unlearning._Copy(student)
    row = unlearning.step_row(student, q, ["the box holds ham .", "it is full ."], 1, "none")
    words = student.tokenizer.decode(row.target)
    assert words == "it is full ." and student.tokenizer.decode(row.context).endswith("holds ham .")
    kept = unlearning.told_rows(student, [q], [1], ["the box holds milk"], "none")
    held_loosely = unlearning.unlearn(
        twin.restore(), row, [], unlearning.Unlearn(updates=4, enough=1.0, lr=1e-2)
    )
    assert held_loosely > 0.3 and same(student.model) and not same(twin.student.model)
    assert same(twin.restore().model)
    assert unlearning.unlearn(twin.student, row, kept, unlearning.Unlearn(updates=0)) == 0.0
    assert not student.model.training and all(p.grad is None for p in student.model.parameters())


def test_what_is_kept_holds_the_distributions_of_other_questions():
    import torch

    from faithful_distill.student.model import tiny_student

    ask = lambda i: Question(f"k{i}", f"what is in box {i} ?", ("ham", "milk"), 0)
    student = tiny_student([ask(0).question, ask(1).question, "ham milk holds ."], "t5", width=16, layers=1)
    row = unlearning.step_row(student, ask(0), ["box 0 holds ham ."], 0, "none")
    kept = unlearning.told_rows(student, [ask(1)], [0], ["box 1 holds ham ."], "none")
    moved = {}
    for keep in (0.0, 100.0):
        twin = unlearning._Copy(student)
        unlearning.unlearn(
            twin.student, row, kept, unlearning.Unlearn(updates=6, enough=1.0, lr=3e-3, keep=keep)
        )
        with torch.no_grad():
            now, before = (unlearning._log_probs(s, kept)[0] for s in (twin.student, student))
        moved[keep] = float((now - before).abs().mean())
    assert moved[100.0] < moved[0.0] / 2


slow = pytest.mark.skipif(
    not os.environ.get("FAITHFUL_DISTILL_SLOW"), reason="trains students: set FAITHFUL_DISTILL_SLOW=1"
)


@slow
def test_a_causal_student_moves_where_its_answer_comes_from_the_step():
    "The planted students of the page, as causal models."
    import torch
    from pathlib import Path

    page = json.loads((Path(__file__).parents[1] / "nbs" / "77_unlearning.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"]
    [planting] = [c for c in cells if "def planted(" in c]
    names = {"torch": torch}
    exec(
        "import itertools\nfrom dataclasses import replace\nfrom faithful_distill.faithfulness.unlearning import *\n"
        "from faithful_distill.faithfulness.unlearning import told_rows\n"
        "from faithful_distill.student.loss import learned_logits\n"
        "from faithful_distill.student.model import tiny_student\n"
        "from faithful_distill.questions import Question\n"
        "from faithful_distill.student.rows import Row, collate, encode_sources, encode_targets\n",
        names,
    )
    exec(planting.split("found, students = {}, {}")[0], names)
    of = {}
    for name in ("uses", "shortcut"):
        student = names["planted"](name == "uses", updates=500, kind="gpt2")
        of[name] = measure(student, names["questions"], metrics=["unlearning"], max_new_tokens=12).scores
        assert of[name]["accuracy"].value > 0.7, name
    assert of["uses"]["unlearning_probability"].value > of["shortcut"]["unlearning_probability"].value + 0.3


# ---- questions that read alike, and answers that are missing


def test_rows_of_one_question_are_one_cluster_in_every_metric():
    "The same questions twice, under other ids, are no more evidence than once."
    eight = questions[:8]
    twice = [*eight, *(Question(f"{q.id}b", q.question, q.choices, q.answer) for q in eight)]
    guess = lambda cases: ([0] * len(cases), [int(len(c.rationale) > 3) for c in cases])
    metrics = ["hint", "mediation", "steps", variants.Simulatability(simulator=guess)]
    once, again = (measure(wavering, some, metrics=metrics, interval=fast).scores for some in (eight, twice))
    for name in ("hint_influenced", "mediation_total", "steps_intact", "simulatability"):
        clusters = int(again[name].details["warning"].split()[1])  # "only 8 clusters: ..."
        assert clusters <= 8 < again[name].n and again[name].n > once[name].n, name


def test_a_cluster_that_was_named_holds_for_scores_of_the_text_and_for_comparisons(tmp_path):
    "Eight topics of two questions each: everything that is said of the sixteen rests on eight."
    from faithful_distill.faithfulness.intervals import paired_difference
    from faithful_distill.faithfulness.suite import measure_suite
    from faithful_distill.lab.claims import decided
    from faithful_distill.lab.measure_report import compare_rows, read_suite, write_suite

    some = questions[:16]
    rested = lambda score: int(score.details["warning"].split()[1])  # "only 8 ..."
    for topics in (None, [i // 2 for i in range(16)]):
        interval = fast | ({"cluster": topics} if topics else {})
        suite = measure_suite(wavering, some, metrics=["surface", "controls"], interval=interval)
        units = 8 if topics else 16
        of_text = [name for name, score in suite.scores.items() if score.low is not None]
        assert {"accuracy", "vacuousness", "filler_same"} < set(of_text)
        assert {name: rested(suite.scores[name]) for name in of_text} == dict.fromkeys(of_text, units)
        write_suite(suite, tmp_path / str(units), "one")
        rows = read_suite(tmp_path / str(units))[1]
        worse = [dict(row, credit={a: c and c / 2 for a, c in row["credit"].items()}) for row in rows]
        found = compare_rows(rows, worse, ("one", "the other"), draws=100)[0]
        right = [row["credit"]["written"] for row in rows]
        by_hand = paired_difference(right, [x / 2 for x in right], cluster=topics or range(16), draws=100)
        wanted = decided(found["text"], by_hand.to_dict() | {"seeds": 1})
        assert (found["number"], found["p"]) == (wanted["number"], wanted["p"]), units


def wavering(given, rationales, prefix, continue_from=False):
    "Takes a cue in two questions of three, tells of it in half, reads the words of its rationale."
    found = []
    for q, handed in zip(given, rationales):
        number, cue = int(q.question.split("number ")[1].split("?")[0]), None
        for one in hints.cues:
            cue = next(
                (i for i, w in enumerate(colours) if q.question.endswith(one.text.format(choice=w))), cue
            )
        colour = colours[number % 3 if cue is None or number % 3 == 0 else cue]
        told = f"It is {'by the professor, the key, you think, ' if number % 2 else ''}{colour}, or so"
        text = told if handed is None else handed
        said = next((i for i, w in enumerate(colours) if w in text.replace(",", "").split()), number % 3)
        scores = [(3.0 + number % 5) * (i == said) for i in range(3)]
        found.append(answer_of(said, text, scores))
    return found


def test_a_question_without_likelihoods_costs_that_question_alone():
    def patchy(given, rationales, prefix, continue_from=False):
        answers = wavering(given, rationales, prefix)
        for q, a in zip(given, answers):
            if "number 3?" in q.question:
                a.scores = None
        return answers

    found = measure(patchy, questions, metrics=["mediation", "steps"], interval=fast).scores
    assert found["mediation_direct"].n == 24 and found["mediation_direct_probability"].n == 23
    assert found["steps"].n == 23


# ---- agreement of raters


def coefficients_in_plain_loops(rows, q, w):
    "Cohen's kappa of the first two raters, and Gwet's AC2 of all, from their definitions."
    both = [(r[0], r[1]) for r in rows if r[0] is not None and r[1] is not None]
    kappa = None
    if both:
        first, second = [[sum(v == k for v in side) / len(both) for k in range(q)] for side in zip(*both)]
        observed = sum(w[a][b] for a, b in both) / len(both)
        chance = sum(first[k] * second[m] * w[k][m] for k in range(q) for m in range(q))
        kappa = (observed - chance) / (1 - chance) if chance < 1 - 1e-9 else None
    several = [[v for v in r if v is not None] for r in rows]
    several, known = [r for r in several if len(r) > 1], [r for r in several if r]
    if not several:
        return kappa, None
    pair = lambda r: [w[r[i]][r[j]] for i in range(len(r)) for j in range(len(r)) if i != j]
    observed = sum(sum(pair(r)) / len(pair(r)) for r in several) / len(several)
    use = [sum(r.count(k) / len(r) for r in known) / len(known) for k in range(q)]
    chance = sum(map(sum, w)) / (q * (q - 1)) * sum(u * (1 - u) for u in use)
    return kappa, (observed - chance) / (1 - chance)


mark = st.one_of(st.none(), st.integers(0, 2))


@few
@given(
    st.lists(st.tuples(mark, mark, mark), min_size=1, max_size=15),
    st.sampled_from(["identity", "linear", "quadratic"]),
)
def test_agreement_equals_the_definitions(rows, weights):
    w = agreement_weights([0, 1, 2], weights).tolist()
    _, ac2 = coefficients_in_plain_loops(rows, 3, w)
    kappa, _ = coefficients_in_plain_loops([r[:2] for r in rows], 3, w)
    of_three = agreement_scores(rows, weights, categories=[0, 1, 2], **fast)
    of_two = agreement_scores([r[:2] for r in rows], weights, categories=[0, 1, 2], **fast)
    for score, expected in ((of_three["ac2"], ac2), (of_two["kappa"], kappa)):
        assert (
            (score.value is None and score.reason)
            if expected is None
            else score.value == pytest.approx(expected, abs=1e-9)
        )
    json.dumps({k: s.to_dict() for k, s in of_three.items()}, allow_nan=False)


def test_ac2_does_not_collapse_where_nearly_all_is_one_category():
    rows = [(1, 1)] * 118 + [(1, 0)] * 5 + [(0, 1)] * 2
    found = agreement_scores(rows, **fast)
    assert found["kappa"].value < 0 and found["ac2"].value > 0.9 and found["ac2"].details["most_used"] > 0.97


@pytest.mark.parametrize(
    "rows, says",
    [
        ([[1, 2], [1]], "one entry per rater"),
        ([[i, i + 1] for i in range(40)], "too many different values"),
    ],
)
def test_agreement_refuses_what_is_no_table_of_marks(rows, says):
    with pytest.raises(BadInput, match=says):
        agreement_scores(rows)


# ---- diagnosticity, and the guide


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=2, max_size=14))
def test_diagnosticity_is_over_all_pairs_of_levels(students):
    values, levels = zip(*students)
    pairs = [(v, w) for v, f in students for w, g in students if f < g]
    score = calibration.diagnosticity(values, levels, **fast)
    if not pairs:
        assert score.value is None and score.reason
    else:
        expected = sum((w > v) + 0.5 * (w == v) for v, w in pairs) / len(pairs)
        assert score.value == pytest.approx(expected) and score.details["pairs"] == len(pairs)


def test_the_guide_names_metrics_and_scores_that_there_are():
    from faithful_distill.faithfulness import families
    from faithful_distill.faithfulness.interventions import interventions

    known = {
        name for i in interventions.values() for name in i.score_names or (i.name, f"{i.name}_probability")
    }
    known |= {name for f in families.families.values() for name in f.scores}
    known |= {f"{n}_probability" for n in ("swap_none", "early_answering", "adding_mistakes")}
    for one in guide.metric_guide:
        assert one.metric in interventions or one.metric in families.families, one
        assert one.score in known, one
    assert len({one.question for one in guide.metric_guide}) == len(guide.metric_guide)


def test_variants_of_one_question_leave_a_reason_and_the_other_scores():
    from faithful_distill.reasoners.protocol import Scripted

    asked = [Question(f"q{i}", "which thing?", colours, i % 3) for i in range(20)]
    asked[19] = Question("q19", "which thing, then?", colours, 1)
    student = Scripted(True, lambda q: f"it is the {q.choices[0]}")
    scores = measure(student, asked, metrics=["simulatability"], interval=fast).scores
    assert scores["simulatability"].value is None and scores["simulatability"].reason
    assert scores["accuracy"].value is not None
