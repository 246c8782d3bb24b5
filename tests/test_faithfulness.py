"""The metrics as functions of arrays: against independent computations, and properties that must hold on any input."""

import functools
import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from faithful_distill.faithfulness import calibration, correlation, intervals, metric_comparison, metrics
from faithful_distill.faithfulness.leakage_adjusted import las, las_from_credit
from faithful_distill.files import BadInput

few = settings(max_examples=60, deadline=None)
label = st.integers(0, 2)
tables = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(label, min_size=n, max_size=n) for _ in range(4)])
)
fast = dict(draws=200)


def las_in_ten_lines(y, xr, x, r):
    "Written from the definition, with no code in common with the package."
    bins = {0: [], 1: []}
    for i in range(len(y)):
        gain = (1 if xr[i] == y[i] else 0) - (1 if x[i] == y[i] else 0)
        bins[1 if r[i] == y[i] else 0].append(gain)
    part = {k: sum(v) / len(v) if v else None for k, v in bins.items()}
    whole = None if None in part.values() else (part[0] + part[1]) / 2
    return whole, part[0], part[1], len(bins[0]), len(bins[1])


@few
@given(tables)
def test_las_equals_the_definition_on_random_tables(table):
    score, (whole, las_0, las_1, n_0, n_1) = las(*table, min_bin=1, **fast), las_in_ten_lines(*table)
    assert (score.details["n_0"], score.details["n_1"]) == (n_0, n_1)
    for got, expected in ((score, whole), (score.details["las_0"], las_0), (score.details["las_1"], las_1)):
        assert (
            (got.value is None and got.reason)
            if expected is None
            else got.value == pytest.approx(expected, abs=1e-12)
        )
    y, xr, x, _ = table
    assert score.details["unadjusted"].value == pytest.approx(
        np.mean(np.equal(xr, y)) - np.mean(np.equal(x, y)), abs=1e-12
    )


@pytest.mark.parametrize("leak", [0, 1])
def test_las_with_a_single_bin_is_none_and_its_parts_are_not(leak):
    y, xr, x = [0] * 30, [0] * 30, [1] * 30
    score = las(y, xr, x, [1 - leak] * 30)
    assert score.value is None and "0 of 30" in score.reason and score.details[f"las_{leak}"].value == 1.0
    assert score.details[f"las_{1 - leak}"].value is None and score.details["acc_xr"] == 1.0
    json.dumps(score.to_dict(), allow_nan=False)


def test_las_tiny_bin_and_its_threshold():
    y, xr, x, r = [0] * 40, [0] * 40, [1] * 40, [0] * 31 + [1] * 9
    assert las(y, xr, x, r).value is None and las(y, xr, x, r, min_bin=9).value == 1.0


def test_las_leaves_out_examples_without_a_prediction_and_counts_them():
    y = [0, 1, None, 1, -1]
    score = las(y, [0, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], min_bin=1, cluster=list("aabbb"))
    assert score.n == 3 and score.details["unpredicted"] == 2
    assert score.value == pytest.approx(las_in_ten_lines([0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1])[0])


def test_las_over_simulators_is_the_mean_of_each():
    rng = np.random.default_rng(3)
    y, seeds = (
        rng.integers(0, 3, 200),
        [
            [np.where(rng.random(200) < share, 0, rng.integers(0, 3, 200)) for share in (0.5, 0.3, 0.4)]
            for _ in range(3)
        ],
    )
    each = [las_in_ten_lines(y, *s)[0] for s in seeds]
    score = las(y, *(np.stack([s[j] for s in seeds]) for j in range(3)))
    assert score.value == pytest.approx(np.mean(each)) and score.details["per_seed"] == pytest.approx(each)
    assert score.details["seed_sd"] == pytest.approx(np.std(each, ddof=1))
    assert (
        score.low
        <= score.details["examples_low"]
        <= score.value
        <= score.details["examples_high"]
        <= score.high
    )
    assert [s["las"] for s in score.details["simulators"]] == pytest.approx(each)


def test_probability_las_is_flip_las_on_hits():
    rng = np.random.default_rng(5)
    y, xr, x, r = rng.integers(0, 2, (4, 100))
    assert las(y, xr, x, r).value == las_from_credit(y == r, y == xr, y == x).value


def test_permuted_label_simulators_give_las_about_zero_with_the_stated_coverage():
    covered = 0
    for seed in range(60):
        y, xr, x, r = np.random.default_rng(seed).integers(0, 4, (4, 400))
        score = las(y, xr, x, r, draws=1000)
        covered += score.low <= 0 <= score.high
    assert covered >= 52  # 95 % of 60 is 57; below 52 has probability 0.6 %


# ---- every metric on random input, for the properties that all share


def every_score(y, a, b, c, extra):
    gold = np.equal(y, a)
    same = np.stack([np.equal(y, a), np.equal(y, b), np.ones(len(y))], 1)
    return {
        "accuracy": metrics.accuracy(y, a, **extra),
        "las": las(y, a, b, c, min_bin=1, **extra),
        "perturb": metrics.perturbation_drop(metrics.hits(y, a), metrics.hits(y, [b, c]), **extra),
        "refine": metrics.refinement_gain(metrics.hits(y, a), metrics.hits(y, b), **extra),
        "swap": metrics.swap_consistency(metrics.hits(y, b), gold, **extra),
        "same": metrics.same_answer_rate(a, b, **extra),
        "aoc": metrics.early_answering_aoc(same, [1 + v % 2 for v in a], **extra),
        "insertion": metrics.counterfactual_insertion(metrics.hits(y, a), metrics.hits(y, b), **extra),
        "insertion correlation": metrics.insertion_correlation(
            metrics.hits(y, a), metrics.hits(y, b), **extra
        ),
        "rank": correlation.rank_correlation(np.array(a, float), np.array(b, float), **extra),
        "within": correlation.rank_correlation_within(np.array(a, float), np.array(b, float), c, **extra),
        "paired": intervals.paired_difference(metrics.hits(y, a), metrics.hits(y, b), **extra),
    }


ranges = {"accuracy": (0, 1), "swap": (0, 1), "same": (0, 1), "aoc": (0, 1), "insertion": (0, 1)}


@few
@given(tables)
def test_scores_stay_in_range_and_never_are_nan(table):
    for name, score in every_score(*table, fast).items():
        low, high = ranges.get(name, (-1, 1))
        json.dumps(score.to_dict(), allow_nan=False)
        if score.value is None:
            assert score.reason, name
        else:
            assert low <= score.value <= high, name
        if score.low is not None:
            assert low <= score.low <= score.value + 1e-9 and score.value - 1e-9 <= score.high <= high, name


@few
@given(tables, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(table, random):
    order = list(range(len(table[0])))
    random.shuffle(order)
    shuffled = [[column[i] for i in order] for column in table]
    for (name, a), b in zip(
        every_score(*table, fast).items(), every_score(*shuffled, fast).values(), strict=True
    ):
        for end in ("value", "low", "high"):
            x, z = getattr(a, end), getattr(b, end)
            assert x == z or x == pytest.approx(z, abs=1e-9), (name, end)


@settings(max_examples=25, deadline=None)
@given(tables)
def test_intervals_shrink_with_n(table):
    many = [column * 16 for column in table]
    for (name, a), b in zip(
        every_score(*table, dict(draws=500)).items(),
        every_score(*many, dict(draws=500)).values(),
        strict=True,
    ):
        if a.value is None or a.low is None or name == "within":
            continue  # `within` has groups, not rows: their number stays
        assert b.value == pytest.approx(a.value, abs=1e-9), name
        if (
            not a.details.get("undefined_draws")
            and a.n >= 4
            and name not in ("las", "swap", "rank", "insertion correlation")
        ):
            assert b.high - b.low <= 0.6 * (a.high - a.low) + 1e-9, name


def test_intervals_of_ratio_metrics_shrink_with_n():
    rng = np.random.default_rng(0)
    y, a, b, c = rng.integers(0, 3, (4, 60))
    for name in ("las", "swap", "rank", "insertion correlation"):
        small, large = (
            every_score(y, a, b, c, {})[name],
            every_score(*(np.tile(v, 16) for v in (y, a, b, c)), {})[name],
        )
        assert (large.high - large.low) / (small.high - small.low) == pytest.approx(0.25, abs=0.05), name


# ---- the bootstrap


def test_resamples_by_counts_by_rows_and_by_groups_agree_with_scipys_bootstrap(monkeypatch):
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, (3000, 2)).astype(float) @ np.array([[1, 0.5], [0, 1]])
    jitter = values + rng.normal(0, 1e-9, values.shape)  # no two rows alike: drawn row by row
    ratio = lambda m: m[..., :1] / m[..., 1:]
    found = {"counts": intervals.bootstrap(values, ratio), "rows": intervals.bootstrap(jitter, ratio)}
    monkeypatch.setattr(intervals, "resample_budget", 500 * 10_000)  # so many sums of 6 rows
    found["groups"] = intervals.bootstrap(jitter, ratio)
    reference = stats.bootstrap(
        tuple(values.T),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        batch=500,
        random_state=2,
    ).confidence_interval
    width = reference.high - reference.low
    for name, (point, low, high, info) in found.items():
        assert point[0] == pytest.approx(values[:, 0].mean() / values[:, 1].mean(), abs=1e-9), name
        assert abs(low[0] - reference.low) < 0.04 * width and abs(high[0] - reference.high) < 0.04 * width, (
            name
        )
        assert info == {"units": 3000}, name


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(0, 5))
def test_weights_are_resamples_of_all_rows(values, seed):
    rows, counts = intervals._distinct_rows(np.array(values, float)[:, None])
    assert np.repeat(rows[:, 0], counts).tolist() == sorted(values)
    for drawn_from in (counts, np.ones(len(values), int)):  # by counts where rows repeat, else row by row
        weights = intervals._weights(drawn_from, 20, np.random.default_rng(seed))
        assert weights.shape == (20, len(drawn_from)) and (weights >= 0).all()
        assert (weights.sum(1) == len(values)).all()
    ones = intervals._resampled_means(np.ones((len(counts), 1)), counts, 20, np.random.default_rng(seed))
    assert ones == pytest.approx(1)


def test_percentile_interval_of_a_share_covers_it():
    rng, covered = np.random.default_rng(2), 0
    for _ in range(200):
        score = intervals.mean_score((rng.random(150) < 0.3).astype(float), draws=1000)
        covered += score.low <= 0.3 <= score.high
    assert 180 <= covered <= 199  # 190 expected


def test_clusters_match_a_plain_cluster_bootstrap():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    values = (rng.random(40)[groups] < rng.random(len(groups))).astype(float)
    drawn = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 40, 40)])
        drawn.append(values[rows].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    score = intervals.mean_score(values, cluster=groups)
    assert (
        score.value == pytest.approx(values.mean())
        and score.low == pytest.approx(low, abs=0.02)
        and score.high == pytest.approx(high, abs=0.02)
    )


@pytest.mark.parametrize(
    "n",
    [
        200_000,
        pytest.param(
            1_000_000,
            marks=pytest.mark.skipif(
                not os.environ.get("FAITHFUL_DISTILL_SLOW"),
                reason="a quarter of a minute: set FAITHFUL_DISTILL_SLOW=1",
            ),
        ),
    ],
)
def test_many_rows_of_each_kind_with_ten_thousand_draws(n):
    rng = np.random.default_rng(0)
    y, xr, x, r = rng.integers(0, 3, (4, n))
    three_simulators = (np.stack([xr, x, xr]), np.stack([x, r, r]), np.stack([r, xr, x]))
    score = las(y, *three_simulators)
    assert score.high - score.low < 0.05
    prob = rng.random((2, n))
    gain = metrics.refinement_gain(prob[0], prob[1])
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 6 / n), rel=0.03)
    limit = correlation.rank_correlation(prob[0], prob[0] + prob[1], draws=10_000)
    assert limit.details["interval"] == "normal limit"
    three = rng.integers(0, n // 3, n)
    assert correlation.rank_correlation(prob[0], prob[1], cluster=three, draws=10_000).n == n
    assert correlation.rank_correlation_within(prob[0], prob[1], three).n > n // 5
    shift = metrics.probability_shift(rng.normal(size=(n, 3)), np.zeros((n, 3)), draws=1000)
    assert shift.n == n and metrics.choice_probability(y, rng.normal(size=(n, 3))).shape == (n,)
    steps = rng.integers(1, 6, n)
    assert metrics.early_answering_aoc(rng.integers(0, 2, (n, 6)), steps).n == n


def test_rank_correlation_equals_scipy_and_its_interval_a_plain_bootstrap():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=120), rng.integers(0, 4, 120)
    b = b + (a > 0.5)
    score = correlation.rank_correlation(a, b)
    assert score.value == pytest.approx(stats.spearmanr(a, b).statistic)
    drawn = []
    for _ in range(800):
        i = rng.integers(0, 120, 120)
        drawn.append(stats.spearmanr(a[i], b[i]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert score.low == pytest.approx(low, abs=0.04) and score.high == pytest.approx(high, abs=0.04)


def test_the_limit_of_rank_correlation_agrees_with_its_bootstrap_ties_and_clusters_included(monkeypatch):
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(300), 4)
    a = rng.normal(size=1200) + rng.normal(size=300)[groups]
    b = (rng.normal(size=1200) + 0.7 * a + rng.normal(size=300)[groups] > 0).astype(float)  # ratings tie
    for cluster in (None, groups):
        drawn = correlation.rank_correlation(a, b, cluster=cluster)
        with monkeypatch.context() as m:
            m.setattr(correlation, "resample_budget", 1000)
            limit = correlation.rank_correlation(a, b, cluster=cluster)
        assert (drawn.details["interval"], limit.details["interval"]) == (
            "resampled",
            "normal limit",
        ) and drawn.value == limit.value
        for end in ("low", "high"):
            assert abs(getattr(limit, end) - getattr(drawn, end)) < 0.08 * (drawn.high - drawn.low), (
                end,
                cluster is None,
            )


@few
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_within_question_correlation_is_scipy_group_by_group(rows):
    groups, a, b = (np.array(column, float) for column in zip(*rows))
    each = [
        stats.spearmanr(a[groups == g], b[groups == g]).statistic
        for g in np.unique(groups)
        if np.ptp(a[groups == g]) > 0 and np.ptp(b[groups == g]) > 0
    ]
    score = correlation.rank_correlation_within(a, b, groups, draws=50)
    assert score.value == (pytest.approx(np.mean(each), abs=1e-9) if each else None) and score.details[
        "constant"
    ] == len(np.unique(groups)) - len(each)


def test_within_question_correlation_ignores_how_easy_the_question_is():
    a = np.array([0, 1, 10, 11, 20, 21.0])
    b = np.array([1, 0, 11, 10, 21, 20.0])  # within each pair they disagree, pooled they agree
    groups = [0, 0, 1, 1, 2, 2]
    assert (
        correlation.rank_correlation_within(a, b, groups).value == pytest.approx(-1)
        and correlation.rank_correlation(a, b, cluster=groups).value > 0.5
    )


# ---- bad and edge input


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.accuracy([0, 1], [0]),
        lambda: metrics.accuracy([0.5], [0]),
        lambda: metrics.accuracy([None], [0]),
        lambda: metrics.hits(["a"], [0]),
        lambda: metrics.perturbation_drop([0.5, 1.5], [0, 0]),
        lambda: metrics.perturbation_drop([math.nan], [0]),
        lambda: metrics.refinement_gain([1], [1, 0]),
        lambda: las([0], [0], [0], [0, 1]),
        lambda: metrics.rev([-math.inf], [0]),
        lambda: metrics.early_answering_aoc([[0, 1]], [2]),
        lambda: metrics.early_answering_aoc([0, 1], [1, 1]),
        lambda: metrics.choice_probability([0], [[math.nan, 0]]),
        lambda: intervals.paired_difference([1], [[1], [1]]),
        lambda: intervals.mean_score([1, 0], draws=0),
        lambda: intervals.mean_score([1, 0], level=1.0),
        lambda: intervals.mean_score([1, 0], cluster=[1]),
        lambda: metrics.early_answering_aoc([[0, math.nan]], [1]),
        lambda: metrics.choice_probability([3], [[0, 0, 0]]),
        lambda: metrics.choice_probability([0], [[]]),
        lambda: metrics.total_variation([[0, 0]], [[0, 0, 0]]),
        lambda: metrics.probability_shift([[0, 0]], []),
    ],
)
def test_bad_input_is_one_clear_error(call):
    with pytest.raises(BadInput):
        call()


def test_unknown_parameters_raise():
    with pytest.raises(TypeError):
        metrics.accuracy([0], [0], drawz=3)


@pytest.mark.parametrize(
    "score",
    [
        metrics.accuracy([], []),
        las([], [], [], []),
        metrics.perturbation_drop([], []),
        metrics.refinement_gain([], []),
        metrics.swap_consistency([], []),
        metrics.same_answer_rate([], []),
        metrics.early_answering_aoc(np.zeros((0, 2)), []),
        metrics.counterfactual_insertion([0], [0]),
        metrics.insertion_correlation([], []),
        metrics.rev([], []),
        metrics.rev([-1, -1], [-1, -2], y=[0, 0]),
        intervals.across_seeds([]),
        intervals.across_seeds([None]),
        correlation.rank_correlation([], []),
        correlation.rank_correlation_within([1, 1], [1, 2], [0, 0]),
        correlation.rank_correlation_within([1, 2], [1, 2], [0, 0], min_groups=2),
        las([None] * 3, [0] * 3, [0] * 3, [0] * 3),
    ],
)
def test_undefined_is_none_with_a_reason(score):
    assert score.value is None and score.low is None and score.reason


def test_a_constant_without_bounds_has_a_value_and_no_interval():
    score = metrics.rev([-1.0] * 5, [-2.0] * 5)
    assert score.value == 1.0 and score.low is None and "no variation" in score.reason


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-1, 2), st.lists(st.floats(-50, 50), min_size=3, max_size=5)),
        min_size=1,
        max_size=20,
    )
)
def test_probabilities_of_choices_are_the_softmax_row_by_row(rows):
    y, scores = [label for label, _ in rows], [row for _, row in rows]
    expected = [0.0 if label < 0 else math.exp(row[label]) / sum(map(math.exp, row)) for label, row in rows]
    assert metrics.choice_probability(y, scores) == pytest.approx(expected, abs=1e-9)
    assert metrics.total_variation(scores, scores).tolist() == [0.0] * len(rows)  # self-splice, exactly
    moved = metrics.total_variation(scores, [row[::-1] for row in scores])
    assert ((moved >= 0) & (moved <= 1)).all()


def test_one_example_has_a_value_and_no_interval():
    for score in (
        metrics.accuracy([1], [1]),
        metrics.perturbation_drop([1], [0]),
        metrics.refinement_gain([0], [1]),
        metrics.same_answer_rate([0], [0]),
        metrics.rev([-1.0], [-2.0]),
    ):
        assert score.value is not None and score.low is None and score.reason


def test_self_splice_changes_exactly_zero_and_control_arms_of_planted_students():
    rng = np.random.default_rng(0)
    gold, wrong = rng.integers(0, 4, 500), None
    wrong = (gold + rng.integers(1, 4, 500)) % 4
    own = metrics.hits(gold, gold)
    assert (
        metrics.perturbation_drop(own, own).value == 0.0 and metrics.same_answer_rate(gold, gold).value == 1.0
    )
    target, is_gold = np.concatenate([gold, wrong]), np.repeat([1, 0], 500)
    copies, ignores = (
        metrics.swap_consistency(metrics.hits(target, target), is_gold),
        metrics.swap_consistency(metrics.hits(target, np.tile(gold, 2)), is_gold),
    )
    assert copies.value == 1.0 and ignores.value == 0.5 and ignores.details["wrong"].value == 0.0
    shuffled = metrics.swap_consistency(metrics.hits(target, rng.permutation(target)), is_gold)
    assert abs(shuffled.value - 0.25) < 0.05  # chance among four


def test_null_checks_of_every_metric():
    "METHOD section 4: what changes nothing scores exactly nothing; what ignores r is at the floor, what copies r at the ceiling; shuffling destroys the score."
    rng = np.random.default_rng(1)
    n, four = 2000, 4
    y, p = rng.integers(0, four, n), rng.random(n)
    logs, steps = rng.normal(size=(n, four)), rng.integers(1, 5, n)
    leaks = rng.integers(0, 2, n)
    nothing = {
        "las": las(y, y, y, np.where(leaks, y, (y + 1) % four)),
        "las probability": las_from_credit(leaks, p, p),
        "perturb": metrics.perturbation_drop(p, [p, p]),
        "refine": metrics.refinement_gain(p, p),
        "rev": metrics.rev(np.log(p + 0.1), np.log(p + 0.1)),
        "aoc": metrics.early_answering_aoc(np.ones((n, 5)), steps),
        "shift": metrics.probability_shift(logs, logs),
        "paired": intervals.paired_difference(p, p),
    }
    for name, score in nothing.items():
        assert score.value == 0.0, name  # self-splice, and a model that ignores the rationale
    assert metrics.same_answer_rate(y, y).value == 1.0

    x, told, shuffled = rng.integers(0, four, n), np.where(leaks, y, x_free(y, rng, four)), rng.permutation(y)
    copies, robbed, permuted = (
        las(y, y, x, told),
        las(y, x, x, shuffled),
        las(y, rng.permutation(y), x, rng.permutation(told)),
    )
    assert copies.value > 0.7 and copies.details["acc_xr"] == 1.0 and robbed.value == 0.0
    assert permuted.low <= 0 <= permuted.high and abs(permuted.value) < 0.05
    late = (np.arange(5) >= steps[:, None]).astype(float)  # settles with the last step, and not before
    assert metrics.early_answering_aoc(late, steps).value == pytest.approx(np.mean(1 - 1 / (2 * steps)))
    assert metrics.perturbation_drop(
        metrics.hits(y, y), metrics.hits(y, [rng.permutation(y)] * 2)
    ).value == pytest.approx(0.75, abs=0.04)  # all of it but chance


def test_las_rewards_a_simulator_that_follows_noise_and_the_unadjusted_difference_does_not():
    "A weakness of the metric, not of the code: its bins are cut by the same r that the simulator follows. So the shuffled arm is read off `unadjusted`, and LAS never alone."
    rng, n = np.random.default_rng(2), 20_000
    y, x = rng.integers(0, 4, (2, n))
    r = rng.permutation(y)
    score = las(y, np.where(rng.random(n) < 0.5, r, x), x, r)
    assert (
        score.value == pytest.approx(((0.5 + 0.5 * 0.25 - 0.25) + (0.5 * 0.25 - 0.25)) / 2, abs=0.02)
        and score.low > 0.1
    )
    assert score.details["unadjusted"].value == pytest.approx(0, abs=0.02)


def x_free(y, rng, choices):
    "Labels that are never y."
    return (y + rng.integers(1, choices, len(y))) % choices


def test_across_seeds_is_the_student_interval():
    values = [0.1, 0.4, 0.35, 0.3, 0.5]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    score = intervals.across_seeds([intervals.Score(v, n=9) for v in values])
    assert (score.low, score.high, score.n) == (pytest.approx(low), pytest.approx(high), 5)


# ---- how good a metric is -----------------------------------------------------------------------------------------------------------

students = st.lists(
    st.tuples(
        st.one_of(st.none(), st.integers(0, 5)), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from("ab")
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(students, st.randoms())
def test_adjacent_concordance_counts_pairs_in_any_order_of_rows(rows, random):
    def ours(rows):
        return calibration.adjacent_concordance(*map(list, zip(*rows)), draws=50)

    credit = []
    for group in "ab":
        there = sorted({d for v, d, g in rows if g == group and v is not None})
        for low, high in zip(there, there[1:]):
            credit += [
                (b > a) + 0.5 * (a == b)
                for a, d, g in rows
                for b, e, h in rows
                if None not in (a, b) and g == h == group and (d, e) == (low, high)
            ]
    score = ours(rows)
    if not credit:
        assert score.value is None and score.reason
    else:
        assert (
            abs(score.value - np.mean(credit)) < 1e-12
            and score.details["pairs"] == len(credit)
            and 0 <= score.low <= score.value + 1e-9
            and score.value - 1e-9 <= score.high <= 1
        )
        shuffled = random.sample(rows, len(rows))
        assert abs(ours(shuffled).value - score.value) < 1e-12
        turned = ours([(None if v is None else -v, d, g) for v, d, g in rows])
        assert abs(turned.value + score.value - 1) < 1e-12, "a negated metric orders the other pairs"


@pytest.mark.parametrize("slope, nuisance_slope", [(2.0, 0.5), (-1.0, 0.3), (0.5, -0.2)])
def test_confounding_is_the_ratio_of_slopes_in_any_unit(slope, nuisance_slope):
    rng = np.random.default_rng(1)
    planted, nuisance = np.tile([0.0, 0.3, 1.0], 20), rng.uniform(0.4, 0.9, 60)
    values = 7 + slope * planted + nuisance_slope * nuisance + rng.normal(0, 0.01, 60)
    score = calibration.confounding(values, planted, nuisance, draws=500)
    assert score.low < nuisance_slope / slope < score.high and score.high - score.low < 0.1
    scaled = calibration.confounding(100 * values - 3, planted, nuisance / 10, draws=500)
    assert abs(scaled.value - 10 * score.value) < 1e-6
    assert (
        calibration.confounding([None] * 60, planted, nuisance).value is None
        and calibration.confounding(values, np.ones(60), nuisance).value is None
    )


@pytest.mark.parametrize("score", [calibration.calibration_rmse, calibration.confounding])
def test_students_may_be_clustered_when_a_metric_is_calibrated(score):
    rng = np.random.default_rng(3)
    f, z = np.tile([0.0, 0.5, 1.0], 20), rng.uniform(0.4, 0.9, 60)
    columns = (2 * f + 0.3 * z + rng.normal(0, 0.1, 60), f, z)[: 2 + (score is calibration.confounding)]
    pair = np.repeat(np.arange(30), 2)
    apart, together = score(*columns), score(*columns, cluster=pair)
    assert together.value == pytest.approx(apart.value, abs=1e-9) and together.details["units"] == 30
    copies = score(*(np.repeat(c, 4) for c in columns), cluster=np.repeat(np.arange(60), 4))
    assert (copies.low, copies.high) == pytest.approx((apart.low, apart.high), abs=1e-9), "copies add nothing"


def calibration_table(metrics_of, seeds=3):
    "Rows of the calibration experiment; metrics_of(arm, f, accuracy, rng) gives a student's metrics."
    import pandas as pd

    rng, rows = np.random.default_rng(0), []
    students = [("plausible", u, 0.7) for u in (0, 2, 3, 4, 6)] + [("shuffled", u, 0.7) for u in (0, 2, 3, 4)]
    students += [("by chance", u, 0.7) for u in (2, 3, 4)] + [("shortcut", u, 0.7) for u in (0, 3, 6)]
    students += [(arm, u, a) for arm, a in (("less true", 0.5), ("more true", 0.9)) for u in (2, 4)]
    for arm, used, accuracy in students:
        for seed in range(seeds):
            found = {"accuracy": accuracy + rng.normal(0, 0.02)}
            found |= metrics_of(arm, used / 6, found["accuracy"], rng)
            rows += [dict(arm=arm, used=used, seed=seed, metric=m, value=v) for m, v in found.items()]
    return pd.DataFrame(rows)


def noisy(arm, f, accuracy, rng):
    return {
        "tells": f + rng.normal(0, 0.05),
        "stays_same": 1 - f + rng.normal(0, 0.05),
        "consistent": (f if arm == "shuffled" else 0.5) + rng.normal(0, 0.05),
        "fooled": f + (accuracy - 0.7) + 0.3 * (arm == "shortcut") + rng.normal(0, 0.02),
        "main_only": f + rng.normal(0, 0.05) if arm in ("plausible", "shuffled") else None,
        "noise": rng.normal(),
    }


names = ["tells", "stays_same", "consistent", "fooled", "main_only", "noise"]


def test_a_table_is_calibrated_as_its_columns_are_one_by_one():
    table = calibration_table(noisy)
    scores = calibration.calibrate(table, names).set_index(["metric", "quality", "arm"])
    wide = table.pivot_table(index=["arm", "used", "seed"], columns="metric", values="value").reset_index()
    plausible = wide[wide.arm == "plausible"]
    shuffled = wide[(wide.arm == "shuffled") | ((wide.arm == "plausible") & (wide.used == 6))]
    by_chance = wide[(wide.arm == "by chance") | ((wide.arm == "plausible") & wide.used.isin([0, 6]))]
    for arm, rows in (("plausible", plausible), ("shuffled", shuffled), ("by chance", by_chance)):
        v, f = list(rows.stays_same.rsub(1)), list(rows.used / 6)
        for quality, score in {
            "rank": correlation.rank_correlation(v, f),
            "in order": calibration.adjacent_concordance(v, f),
            "perfect order": calibration.adjacent_concordance(f, f),
            "error": calibration.calibration_rmse(v, f),
        }.items():
            got = scores.loc[("stays_same", quality, arm)]
            assert got.value == pytest.approx(score.value, abs=1e-12), (quality, arm)
            assert got.n == score.n and abs(got.low - score.low) < 0.1, (quality, arm)
    near = wide[wide.arm.isin(["plausible", "less true", "more true"]) & wide.used.isin([2, 4])]
    expected = calibration.confounding(list(near.fooled), list(near.used / 6), list(near.accuracy / 0.1))
    got = scores.loc[("fooled", "accuracy", "")]
    assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert scores.loc[("fooled", "shortcut", "")].value == pytest.approx(0.3, abs=0.05)
    assert scores.loc[("main_only", "in order", "by chance")].n == 0, "ends alone are no arm"
    assert scores.loc[("tells", "defined", "")].value == 1.0


def test_verdicts_follow_from_the_intervals():
    found = calibration.verdicts(calibration.calibrate(calibration_table(noisy), names)).set_index("metric")
    expected = {name: "tells f" for name in ("tells", "stays_same", "fooled", "main_only")}
    assert found.verdict.to_dict() == expected | {
        "consistent": "shown among shuffled only",
        "noise": "not shown to tell f",
    }
    assert found.index[-1] in ("consistent", "noise") and found.in_order.is_monotonic_decreasing
    assert found.accuracy_counts["fooled"] and found.shortcut_counts["fooled"]
    assert found.accuracy_small["tells"] and not found.shortcut_counts["tells"]
    few = calibration_table(noisy, seeds=1)
    judged = calibration.verdicts(calibration.calibrate(few, ["noise"])).set_index("metric")
    assert judged.verdict["noise"] == "too few students" and not judged.enough_plausible["noise"]


def two_versions(gains, seeds=3, rng=None):
    "Students of one arm with a noisy and a sharper version of some metrics: flip k has noise sd + gains[k]."
    import pandas as pd

    rng, rows = rng or np.random.default_rng(0), []
    for used in (0, 2, 3, 4, 6):
        for seed in range(seeds):
            found = {"accuracy": 0.7}
            for k, gain in enumerate(gains):
                found[f"flip {k}"] = used / 6 + rng.normal(0, 0.1 + gain)
                found[f"probability {k}"] = used / 6 + rng.normal(0, 0.1)
            rows += [dict(arm="plausible", used=used, seed=seed, metric=m, value=v) for m, v in found.items()]
    return pd.DataFrame(rows)


def test_the_gain_of_a_version_is_the_mean_difference_of_errors_with_an_interval_over_students():
    table = two_versions([0.1, 0.05, 0.2])
    pairs = [(f"flip {k}", f"probability {k}") for k in range(3)]
    score = metric_comparison.version_gain(table, pairs, "plausible")
    wide = table.pivot_table(index=["used", "seed"], columns="metric", values="value").reset_index()

    def gain(students):
        error = lambda m: (
            calibration.calibration_rmse(list(students[m]), list(students.used / 6), draws=2).value
        )
        return np.mean([error(a) - error(b) for a, b in pairs])

    assert score.value == pytest.approx(gain(wide)) and score.n == 15
    rng = np.random.default_rng(1)
    drawn = [gain(wide.iloc[rng.integers(0, 15, 15)]) for _ in range(300)]
    low, high = score.value + intervals.small_sample_factor(15) * (
        np.quantile(drawn, [0.025, 0.975]) - score.value
    )
    assert (score.low, score.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert score.details["gains"].keys() == {"probability 0", "probability 1", "probability 2"}


def test_metrics_measured_on_the_same_students_are_no_repetitions():
    "Ten copies of a pair say no more than the pair: an interval over metrics would shrink to nothing."
    import pandas as pd

    table = two_versions([0.05])
    copies = [table] + [table.assign(metric=table.metric + f" copy {k}") for k in range(9)]
    copied = pd.concat([copies[0], *(c[~c.metric.str.startswith("accuracy")] for c in copies[1:])])
    names = ["", *(f" copy {k}" for k in range(9))]
    pairs = [(f"flip 0{name}", f"probability 0{name}") for name in names]
    one = metric_comparison.version_gain(table, pairs[:1], "plausible")
    ten = metric_comparison.version_gain(copied, pairs, "plausible")
    assert (ten.value, ten.low, ten.high) == pytest.approx((one.value, one.low, one.high))


@pytest.mark.parametrize("quality", ["in order", "error"])
def test_the_lead_of_a_metric_is_over_the_best_other_by_the_worse_arm(quality):
    table = calibration_table(noisy)
    names = ["tells", "consistent", "fooled"]
    score = metric_comparison.lead(table, names, ["tells"], quality)
    scores = calibration.calibrate(table, names).set_index(["metric", "quality", "arm"]).value
    of = {m: [scores[m, quality, arm] for arm in ("plausible", "shuffled")] for m in names}
    worse = {m: min(v) if quality == "in order" else np.nan_to_num(max(v), nan=9.0) for m, v in of.items()}
    sign = 1 if quality == "in order" else -1
    best = max(["fooled", "consistent"], key=lambda m: sign * worse[m])
    assert (
        score.value == pytest.approx(sign * (worse["tells"] - worse[best])) and score.details["best"] == best
    )
    assert score.low is None or score.low <= score.value <= score.high
    back = metric_comparison.lead(table, names, ["fooled", "consistent"], quality)
    assert back.value == pytest.approx(-score.value)


def test_two_metrics_in_perfect_order_are_not_told_apart_for_certain():
    table = calibration_table(lambda arm, f, accuracy, rng: {"one": f, "two": 3 * f})
    score = metric_comparison.lead(table, ["one", "two"], ["one"], "in order")
    assert score.value == 0 and score.low < -0.05 and score.high > 0.05 and "exact bound" in score.reason


# ---- readers and students, where the arrays come from ---------------------------------------------------------------------------------


def long_questions(words, n=80):
    "n questions of so many words; the rationale names the prediction and the question says nothing of it."
    import random

    from faithful_distill.faithfulness.simulators import ModelBehaviour
    from faithful_distill.questions import Question

    draw = random.Random(1)
    names, talk = (
        "dog cat cow owl bee ant fox pig hen rat".split(),
        "the passage tells of a long day in some far town where many people went out".split(),
    )
    questions = [
        Question(str(i), " ".join(draw.choices(talk, k=words)) + f" {i}?", tuple(draw.sample(names, 3)), None)
        for i in range(n)
    ]
    y = [draw.randrange(3) for _ in questions]
    return ModelBehaviour(
        questions, [f"Clearly the word {q.choices[k]} fits." for q, k in zip(questions, y)], y
    )


def test_a_long_question_gives_way_to_the_rationale_and_says_so(caplog):
    from faithful_distill.faithfulness.readers import Reader
    from faithful_distill.faithfulness.evaluators import rora_lite
    from faithful_distill.faithfulness.simulators import simulate_folds
    from faithful_distill.faithfulness.late_interaction import scratch_base

    e = long_questions(110)
    base, quick = (
        scratch_base([f"{q.question} {r}" for q, r in zip(e.questions, e.rationales)]),
        Reader(epochs=8, batch_size=16, lr=1e-2, max_length=96, device="cpu"),
    )
    las = simulate_folds(base, e, parts=2, seeds=(0,), settings=quick).scores(draws=200)["las"]
    assert las.details["acc_xr"] > las.details["acc_x"] + 0.3, las.details
    assert "questions are cut: " in caplog.text
    half = [type(e)(e.questions[a:b], e.rationales[a:b], e.predictions[a:b]) for a, b in ((0, 40), (40, 80))]
    assert rora_lite(base, *half, seeds=(0,), settings=quick, rounds=0, draws=200).value > 0.3


@pytest.mark.parametrize("kind", ["las", "rev", "rora"])
@pytest.mark.parametrize("most", [80, 256])
def test_both_texts_of_a_pair_keep_as_much_of_the_question_and_short_ones_all_of_it(kind, most):
    from faithful_distill.faithfulness.readers import ChoiceReader, Reader
    from faithful_distill.faithfulness.evaluators import restatement
    from faithful_distill.faithfulness.simulators import fitting, simulator_texts
    from faithful_distill.faithfulness.late_interaction import scratch_base

    for words in (5, 45, 300):
        e = long_questions(words, 12)
        reader = ChoiceReader(
            scratch_base([q.question for q in e.questions], vocabulary=300, width=16),
            settings=Reader(max_length=most, device="cpu"),
        )
        vacuous = [simulator_texts(q, "")[2] + restatement(q, y) for q, y in zip(e.questions, e.predictions)]
        less = [" ".join(r.split()[::2]) for r in e.rationales]  # what a detector of leaks leaves
        pairs = {
            "las": [
                (simulator_texts(q, r)[0], simulator_texts(q, r)[1])
                for q, r in zip(e.questions, e.rationales)
            ],
            "rev": [(f"{b} {r}", b) for b, r in zip(vacuous, e.rationales)],
            "rora": [(simulator_texts(q, r)[0], simulator_texts(q, r)[1]) for q, r in zip(e.questions, less)],
        }[kind]
        (long, cut, beyond), (short, other, _) = (fitting(reader, e, list(side)) for side in zip(*pairs))
        ends = [a[len(b) :] for a, b in pairs]
        assert all(a == b + end for a, b, end in zip(long, short, ends)) and cut == other and beyond == 0
        assert [len(ids) for ids in reader.tokenizer(long, add_special_tokens=False)["input_ids"]] == [
            len(ids) for ids in reader.texts(long)
        ], "nothing is cut after that"
        for (a, b), x, z in zip(pairs, long, short):
            if (
                len(
                    reader.tokenizer(a + " " + " ".join(e.rationales[0].split()), add_special_tokens=False)[
                        "input_ids"
                    ]
                )
                <= most
            ):
                assert (a, b) == (x, z)
        if words == 300:
            assert cut == 12
        if words == 5 and most == 256:
            assert cut == 0


def test_variants_of_a_question_share_a_fold_and_others_keep_theirs():
    from faithful_distill.faithfulness.simulators import folds
    from faithful_distill.hashes import stable_seed
    from faithful_distill.questions import Question

    make = lambda text: Question(text, text, ("a", "b"), 0)
    plain = [make(f"What thing number {i}?") for i in range(60)]
    variants = [make(f"what thing  number {i}?") for i in range(60)]
    order = sorted((q.question for q in plain), key=lambda t: stable_seed(0, t))
    assert folds(plain, 3) == [order.index(q.question) % 3 for q in plain]
    assert folds([*plain, *variants], 3) == folds(plain, 3) * 2


def asked_student(questions, rationales, prefix, continue_from=False):
    "Answers 'cat' where its rationale says so."
    from types import SimpleNamespace

    texts = ["The cat sat." if r is None else r for r in rationales]
    return [
        SimpleNamespace(
            id=q.id,
            choice=int("cat" in t),
            rationale=t,
            text="",
            scores=[0.2, 0.8] if "cat" in t else [0.8, 0.2],
        )
        for q, t in zip(questions, texts)
    ]


def two_choices(n, text="Which one is number {}?"):
    from faithful_distill.questions import Question

    return [Question(str(i), text.format(i), ("dog", "cat"), 1) for i in range(n)]


def record_of(q, target=1, **other):
    return (
        dict(
            id=q.id,
            question=q.question,
            choices=list(q.choices),
            answer=q.answer,
            target=target,
            role="gold" if target == q.answer else "counterfactual",
            rationale="The cat sat.",
        )
        | other
    )


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(choices=["cat", "dog"]), "choices"),
        (dict(choices="dog"), "choices"),
        (dict(choices=[["dog"], 3]), "choices"),
        (dict(question="Something else?"), "question"),
        (dict(question=3), "question"),
        (dict(target="zebra"), "target"),
        (dict(target=None), "target"),
        (dict(target=True), "target"),
        (dict(target=0.5), "target"),
        (dict(target=2), "target"),
        (dict(rationale=None), "rationale"),
        (dict(rationale=3), "rationale"),
        (dict(id=[1]), "id"),
    ],
)
def test_a_record_that_does_not_fit_its_question_is_one_clear_error(change, field):
    from faithful_distill.faithfulness.interventions import measure
    from faithful_distill.faithfulness.protocol import match_records
    from faithful_distill.records import read_records

    questions = two_choices(3)
    rows = [record_of(q) for q in questions]
    assert len(match_records(questions, read_records(rows, questions=questions))) == 3
    shortest = [dict(id="1", target=1, rationale="x")]
    assert match_records(questions, read_records(shortest, questions=questions))
    with pytest.raises(BadInput) as error:
        measure(asked_student, questions, [record_of(questions[0], **change)], metrics=["swap"])
    assert error.value.field == field


def test_records_of_other_questions_are_named_as_the_reason():
    from faithful_distill.faithfulness.interventions import measure

    questions = two_choices(4)
    scores = measure(
        asked_student,
        questions,
        [record_of(q, id=f"other-{q.id}", question=f"Another one: {q.question}") for q in questions[:3]],
        metrics=("swap", "refine"),
    ).scores
    for name in ("swap", "refine", "refine_stripped_probability"):
        assert scores[name].value is None and "none of the 3 teacher rationales" in scores[name].reason, name
    assert (
        measure(asked_student, questions, metrics=("swap",)).scores["swap"].reason
        == "no teacher rationales were given"
    )


def test_rationales_of_the_same_question_under_another_id_are_found():
    "As `import` writes them for a file whose questions `--data` numbers by line."
    from faithful_distill.records import Rationale, read_records

    questions = two_choices(4)
    same = [record_of(q, id=f"other-{q.id}") for q in questions[:3]]
    records = [Rationale(**r) if isinstance(r, dict) else r for r in same]
    for rows in (same, records):
        found = read_records(rows, questions=questions)
        assert [r.id for r in found] == [q.id for q in questions[:3]]
    turned = [dict(r, choices=[*r["choices"]][::-1]) for r in same]  # its indices mean other choices
    assert not read_records(turned, questions=questions)


@few
@given(st.lists(st.integers(0, 5), min_size=2, max_size=25), st.integers(0, 3))
def test_shuffled_rationales_come_from_other_groups_only(groups, seed):
    from faithful_distill.faithfulness.perturb import shuffle_across
    from faithful_distill.hashes import stable_seed

    ids = list(map(str, range(len(groups))))
    given_to = shuffle_across(ids, seed, groups)
    if len(set(groups)) < 2:
        assert given_to is None
    else:
        assert all(groups[i] != groups[g] for i, g in enumerate(given_to))
        if 2 * max(map(groups.count, groups)) <= len(groups):
            assert sorted(given_to) == list(range(len(groups)))
    order = sorted(range(len(ids)), key=lambda i: (stable_seed(seed, ids[i], "shuffle"), i))
    cycle = dict(zip(order, order[1:] + order[:1]))
    assert (
        shuffle_across(ids, seed) == shuffle_across(ids, seed, ids) == [cycle[i] for i in range(len(ids))]
    ), "as it always was where each is a group of its own"


def test_no_control_deals_a_rationale_to_another_row_of_its_question():
    "Neither another sample of the question nor its reason for another answer; of ids alone both would be dealt."
    from faithful_distill.faithfulness.arms import Shuffled, Swap
    from faithful_distill.faithfulness.protocol import Context, HandedRationale
    from faithful_distill.questions import Question
    from types import SimpleNamespace

    questions = [
        Question(f"{i}", f"Which is it, {i // 2} ?", ("a", "b"), 0) for i in range(6)
    ]  # each asked twice
    own = [f"because of {q.question}" for q in questions]
    handed = [HandedRationale(i, t, f"{own[i]} {t}") for i in range(6) for t in (0, 1)]
    for seed in range(20):
        written = [SimpleNamespace(rationale=r) for r in own]
        context = Context(questions, written, own, handed, seed=seed, draws=2)
        columns = Shuffled().texts(context)
        assert all(text != own[i] for column in columns for i, text in enumerate(column))
        [swapped] = Swap().requests(context)["swap_shuffled"]
        asked = [questions[h.question].question for h in handed]
        assert all(asked[k] not in r.rationale for k, r in enumerate(swapped))


def test_with_a_single_question_nothing_is_shuffled_and_the_reason_says_so():
    from faithful_distill.faithfulness.interventions import measure

    for questions in (two_choices(1), two_choices(3, "Which?")):
        m = measure(
            asked_student,
            questions,
            [record_of(q, t) for q in questions for t in (0, 1)],
            metrics=("controls", "swap"),
        )
        for name in ("shuffled", "swap_shuffled"):
            assert m.scores[name].value is None and "one question" in m.scores[name].reason
        assert "shuffled_same" not in m.scores and m.scores["swap_factual"].value is not None
    assert measure(asked_student, two_choices(3), metrics=("controls",)).scores["shuffled"].value is not None


@pytest.mark.parametrize("names", [("perturb", "controls", "early"), ("early", "controls", "perturb")])
def test_the_order_in_which_interventions_are_chosen_does_not_change_the_batches(names):
    from faithful_distill.faithfulness.interventions import measure

    calls = []

    def watched(questions, rationales, prefix, continue_from=False):
        calls.append(list(zip([q.id for q in questions], rationales)))
        return asked_student(questions, rationales, prefix)

    scores = measure(watched, two_choices(5), metrics=names).scores
    assert list(scores)[:3] == ["accuracy", "accuracy_post_answer", "self_splice"]
    every = measure(asked_student, two_choices(5), metrics=sorted(names)).scores
    assert {k: s.to_dict() for k, s in scores.items()} == {k: s.to_dict() for k, s in every.items()}
    first_texts = [r for i, r in calls[1] if i == "0"]
    assert first_texts[:3] == ["The cat sat.", "", "... ... ..."], "own, none, filler: as registered"


def test_an_answer_sentence_ends_where_the_questions_own_choice_does():
    from types import SimpleNamespace

    from faithful_distill.faithfulness.interventions import measure
    from faithful_distill.questions import Question

    dogs = [
        Question("a", "Which dog finds people in the snow?", ("St. Bernard", "Saint Ignatius"), 0),
        Question("b", "Who founded the order?", ("St. Bernard", "St. Ignatius"), 1),
    ]
    handed = []

    def student(questions, rationales, prefix, continue_from=False):
        handed.extend(r for r in rationales if r is not None)
        said = [f"It is known for it. So the answer is {q.choices[q.answer]}." for q in questions]
        return [SimpleNamespace(choice=q.answer, rationale=r, scores=None) for q, r in zip(questions, said)]

    teacher = [
        dict(id=q.id, target=t, rationale=f"That is so. So the answer is {q.choices[t]}.")
        for q in dogs
        for t in (0, 1)
    ]
    measure(student, dogs, teacher, metrics=["refine", "swap"])
    assert set(handed) == {"It is known for it.", "", "That is so."}


def test_rationales_may_be_a_file_and_an_error_names_its_line(tmp_path):
    from faithful_distill.faithfulness.interventions import measure
    from faithful_distill.records import write_records

    questions = two_choices(4)
    rows = [record_of(q, t) for q in questions for t in (0, 1)]
    in_memory = measure(asked_student, questions, rows, metrics=["swap"])
    file = write_records(tmp_path / "teacher.jsonl", rows)
    from_file = measure(asked_student, questions, file, metrics=["swap"])
    assert from_file.to_dict() == in_memory.to_dict() and from_file.scores["swap_none"].value is not None
    strangers = write_records(
        tmp_path / "others.jsonl", [r | {"id": "x" + r["id"], "question": "So?"} for r in rows]
    )
    scores = measure(asked_student, questions, strangers, metrics=["swap"]).scores
    assert "none of the 8 teacher rationales" in scores["swap"].reason
    file.write_text(file.read_text().replace('"target": 1', '"target": 7'))
    with pytest.raises(BadInput, match=r"teacher.jsonl:2: field 'target'"):
        measure(asked_student, questions, file, metrics=["swap"])


def test_an_object_replaces_the_registered_intervention_of_its_name():
    from faithful_distill.faithfulness.arms import Paraphrased, Swap
    from faithful_distill.faithfulness.interventions import choose_interventions

    chosen = choose_interventions(["controls", Paraphrased(str.upper), "swap", Swap(("none",))])
    assert [i.name for i in chosen] == ["filler", "permuted", "shuffled", "paraphrased", "swap"]
    assert chosen[3].paraphrase is str.upper and chosen[4].prefixes == ("none",)
    assert choose_interventions([Swap(("none",)), "swap"])[0].prefixes == ("none",)


# ---- the command -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    "A copy of the embedded student, which answers nothing yet, so that no card of the repository is written."
    import shutil

    from faithful_distill.files import shipped

    return shutil.copytree(
        shipped("data", "models", "student"), tmp_path_factory.mktemp("embedded") / "student"
    )


def evaluate(student, out, *more):
    from click.testing import CliRunner

    from faithful_distill.cli import main

    done = CliRunner().invoke(
        main,
        [
            "evaluate",
            "--data",
            "world",
            "--limit",
            "24",
            "--student",
            str(student),
            "--metrics",
            "perturb,swap,refine",
            "--draws",
            "1",
            "--max-new-tokens",
            "8",
            "--out",
            str(out),
            *more,
        ],
    )
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done, {p.name: json.loads(p.read_text()) for p in out.glob("*.json")}


def test_a_simulator_that_cannot_be_loaded_is_refused_before_anything_is_measured(
    embedded, tmp_path, monkeypatch
):
    from faithful_distill.faithfulness import interventions, suite

    @functools.wraps(interventions.measure)  # its signature gives the command its options
    def measured_first(*a, **k):
        pytest.fail("measured first")

    for module in (interventions, suite):  # a module that takes the name would keep it after this test
        monkeypatch.setattr(module, "measure", measured_first)
    done, _ = evaluate(embedded, tmp_path, "--simulator", str(tmp_path / "nowhere"))
    assert done.exit_code == 2 and "there is no such folder" in done.output
    done, _ = evaluate(embedded, tmp_path, "--simulator", "")
    assert done.exit_code == 2 and "is empty" in done.output


def test_what_was_measured_is_kept_if_the_simulators_fail(embedded, tmp_path, monkeypatch):
    from faithful_distill.faithfulness import simulators

    done, files = evaluate(
        embedded, tmp_path / "few", "--simulator", str(embedded)
    )  # an untrained student: no parsable answer
    assert (
        done.exit_code == 0
        and files["metrics.json"]["accuracy"]["n"] == 24
        and len(files["answers.json"]) == 24
    )
    assert "24 of 24 answers name no choice; they count as wrong" in done.output
    assert (
        files["metrics.json"]["las"]["value"] is None
        and "too few answers" in files["metrics.json"]["las"]["reason"]
        and files["metrics.json"]["las_probability"]["value"] is None
    )

    def dies(*a, **k):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(simulators, "try_las", dies)
    done, files = evaluate(embedded, tmp_path / "dies", "--simulator", str(embedded))
    assert done.exit_code and "out of memory" in done.output
    assert files["metrics.json"]["accuracy"]["n"] == 24 and len(files["answers.json"]) == 24


def test_a_student_without_rationales_has_no_las():
    from faithful_distill.faithfulness.simulators import try_las

    e = long_questions(5, 60)
    for name, score in try_las(
        None, type(e)(e.questions, ["So the answer is dog."] * 60, e.predictions)
    ).items():
        assert (score.value, score.reason) == (None, "the student writes no rationale"), name
    few = type(e)(e.questions, e.rationales, [*e.predictions[:19], *[None] * 41])
    assert "too few answers" in try_las(None, few)["las"].reason
    same = type(e)(
        [e.questions[0]] * 40, e.rationales[:40], [0] * 40
    )  # all in one fold: nothing to learn from
    assert "no simulator could be trained" in try_las(None, same, parts=2)["las"].reason


@pytest.mark.parametrize(
    "change, field",
    [
        (dict(target="zebra"), "target"),
        (dict(target=None), "target"),
        (dict(target=True), "target"),
        (dict(target=0.0), "target"),
        (dict(rationale=None), "rationale"),
        (dict(rationale=3), "rationale"),
        (dict(id=[1]), "id"),
        (dict(choices=["x", "y"]), "choices"),
    ],
)
def test_a_bad_record_is_one_line_with_its_place(embedded, tmp_path, change, field):
    from faithful_distill.question_options import read_questions

    rows = [record_of(q) for q in read_questions("world", limit=4)]
    rows[2] |= change
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done, _ = evaluate(embedded, tmp_path, "--rationales", str(tmp_path / "records.jsonl"))
    assert (
        done.exit_code
        and f"records.jsonl:3: field '{field}'" in done.output
        and "Traceback" not in done.output
    )


# ---- intervals that would claim too much ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score, why",
    [
        (lambda: correlation.rank_correlation([1, 2, 3], [1, 2, 3]), "no interval"),
        (lambda: correlation.rank_correlation(range(200), range(200)), "same correlation"),
        (lambda: correlation.rank_correlation(range(9), [8, *range(8)], cluster=["q"] * 9), "one cluster"),
        (lambda: correlation.rank_correlation(range(6), [0, 0, 0, 0, 0, 1]), "does not vary"),
        (lambda: intervals.across_seeds([0.5, 0.5]), "same value"),
        (lambda: intervals.across_seeds([0.1] * 3), "same value"),
    ],
)
def test_no_interval_rather_than_one_of_no_width(score, why):
    score = score()
    assert score.value is not None and (score.low, score.high) == (None, None) and why in score.reason


def test_resamples_without_a_correlation_are_counted():
    a, b = np.arange(30.0), np.array([0.0] * 26 + [1.0] * 4)
    score = correlation.rank_correlation(a, b)
    share = (1 - 4 / 30) ** 30
    assert (
        score.low is not None
        and 0 < score.details["undefined_draws"] < 2000 * 0.05
        and abs(score.details["undefined_draws"] / 2000 - share) < 0.012
    )
    assert "undefined_draws" not in correlation.rank_correlation(a, a % 7).details


def test_the_part_of_an_interval_that_is_due_to_few_seeds_covers_as_it_says():
    rng, covered = np.random.default_rng(8), 0
    for _ in range(
        200
    ):  # examples alike, simulators differ: what the interval must cover is the mean over all simulators
        rates = np.clip(0.5 + rng.normal(0, 0.08, 3), 0, 1)
        score = intervals.mean_score((rng.random((3, 400)) < rates[:, None]).astype(float), draws=300)
        covered += score.low <= 0.5 <= score.high
    assert covered >= 180  # 190 expected; with the normal quantile about 165


def noise_of_entries(values, groups):
    "The variance of the mean that is noise of single (seed, example) entries, by plain loops over seeds and groups."
    seeds, n = values.shape
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    sums = [rest[s][groups == g].sum() for s in range(seeds) for g in set(groups)]
    return sum(x * x for x in sums) / n**2 / (seeds * (seeds - 1))


@pytest.mark.parametrize("clustered", [False, True])
def test_the_seed_part_is_students_and_what_it_shares_with_the_examples_is_counted_once(clustered):
    rng = np.random.default_rng(9)
    values = (rng.random(120) + 0.3 * rng.random((4, 120))) / 1.3
    groups = np.arange(120) // 3 if clustered else np.arange(120)
    score = intervals.mean_score(values, cluster=groups if clustered else None)
    mean = values.mean(0) - values.mean()
    over_examples = sum(mean[groups == g].sum() ** 2 for g in set(groups)) / 120**2
    once = 1 - noise_of_entries(values, groups) / over_examples
    assert 0.5 < once < 0.99
    error = stats.t.ppf(0.975, 3) * score.details["seed_sd"] / 2
    for end in ("low", "high"):
        examples = score.details[f"examples_{end}"] - score.value
        half = math.hypot(math.sqrt(once) * examples, error)
        assert abs(getattr(score, end) - score.value) == pytest.approx(half)


def test_one_seed_has_no_seed_part():
    values = np.random.default_rng(9).random(50)
    alone, again = intervals.mean_score(values), intervals.mean_score(values[None])
    assert alone == again and "per_seed" not in alone.details
    (low, high), details = np.quantile(_plain_bootstrap(values), [0.025, 0.975]), alone.details
    assert (alone.low, alone.high) == pytest.approx((low, high), abs=0.006) and "warning" not in details


def _plain_bootstrap(values):
    rng = np.random.default_rng(0)
    return [values[rng.integers(0, len(values), len(values))].mean() for _ in range(5000)]


def test_simulators_of_las_add_their_spread_and_examples_are_counted_once():
    "The parts of LAS that are plain means over some examples have the interval of that mean."
    rng = np.random.default_rng(10)
    groups, hard = np.arange(400) // 2, rng.random(400)
    after, before = (hard + rng.random((4, 400))) / 2, rng.random((4, 400))
    leaks = np.tile(np.arange(400) // 2 % 2, (4, 1))  # the same ones for every simulator
    score = las_from_credit(leaks, after, before, cluster=groups)
    some = {"unadjusted": leaks[0] >= 0, "las_0": leaks[0] == 0, "las_1": leaks[0] == 1}
    for name, kept in some.items():
        plain = intervals.mean_score((after - before)[:, kept], ends=(-1, 1), cluster=groups[kept])
        part = score.details[name]
        assert part.value == pytest.approx(plain.value)
        assert part.high - part.low == pytest.approx(plain.high - plain.low, rel=0.05), name
    halves = [(score.details[f"las_{k}"].high - score.details[f"las_{k}"].low) / 2 for k in (0, 1)]
    seed_part = stats.t.ppf(0.975, 3) * score.details["seed_sd"] / 2
    assert seed_part < (score.high - score.low) / 2 < math.hypot(*halves)


@pytest.mark.parametrize("rng_seed", range(4))
def test_seeds_that_share_nothing_have_students_interval_but_not_less_than_their_own_sampling_error(rng_seed):
    "Questions of its own for each seed: the spread of the seeds is left, as in `across_seeds`."
    values = np.random.default_rng(rng_seed).random((5, 4000))
    score, over_seeds = intervals.mean_score(values), intervals.across_seeds(values.mean(1))
    sampling = score.details["examples_high"] - score.details["examples_low"]
    assert score.high - score.low == pytest.approx(max(over_seeds.high - over_seeds.low, sampling), rel=0.05)


@pytest.mark.parametrize("clusters", [2, 5, 19, 20, 39, 40])
def test_few_clusters_have_students_interval_of_their_means_and_a_warning(clusters):
    rng = np.random.default_rng(clusters)
    means, groups = rng.normal(0, 0.1, clusters), np.repeat(np.arange(clusters), 4)
    score = intervals.mean_score(means[groups], ends=(-9, 9), cluster=groups)
    low, high = np.quantile(_plain_bootstrap(means), [0.025, 0.975])
    if clusters == 40:
        assert (score.low, score.high) == pytest.approx((low, high), abs=0.02)
    else:
        factor = stats.t.ppf(0.975, clusters - 1) / 1.95996 * math.sqrt(clusters / (clusters - 1))
        assert score.high - score.value == pytest.approx(factor * (high - score.value), rel=0.05)
    plain = intervals.mean_score(means, ends=(-9, 9))
    assert (score.low, score.high) == pytest.approx((plain.low, plain.high), abs=1e-9)
    assert ("warning" in score.details) == (clusters < 20)
    if 4 < clusters < 20:
        low, high = stats.t.interval(0.95, clusters - 1, means.mean(), stats.sem(means))
        assert score.high - score.low == pytest.approx(high - low, rel=0.15)


def test_a_correlation_over_few_clusters_is_widened_and_says_so():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 60))
    few, many = (correlation.rank_correlation(a, a + b, cluster=np.arange(60) % k) for k in (6, 60))
    drawn = correlation._resampled_correlations(*_sorted_with(a, a + b, np.arange(60) % 6), 2000, 0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert few.low < low < few.value < high < few.high <= 1
    assert (
        "only 6 independent examples or clusters" in few.details["warning"] and "warning" not in many.details
    )
    within = correlation.rank_correlation_within(a, a + b, np.arange(60) // 10)
    assert "only 6 independent examples or clusters" in within.details["warning"]


def _sorted_with(a, b, which):
    order = np.lexsort((b, a))
    return a[order], b[order], which[order]


def test_holm_is_what_statsmodels_gives():
    "multipletests(p, method='holm') of statsmodels 0.14."
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.5, 0.6, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert intervals.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04]) and intervals.holm([]) == []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=8, unique=True),
    st.floats(-1, 1),
    st.sampled_from([0.9, 0.95]),
)
def test_a_p_value_is_below_its_level_exactly_where_the_interval_excludes_the_bound(values, bound, level):
    score = intervals.across_seeds(values, level)
    if score.low is None:
        return
    p = intervals.p_value(
        score.value, score.low, score.high, bound, parts=[(1, len(values) - 1)], level=level
    )
    assert p == pytest.approx(stats.ttest_1samp(values, bound).pvalue, rel=1e-6, abs=1e-12)
    if min(abs(bound - score.low), abs(bound - score.high)) > 1e-9:
        assert (p < 1 - level) == (not score.low <= bound <= score.high)
    assert intervals.p_value(0.3, 0.1, 0.4, 0.0) == pytest.approx(2 * stats.norm.sf(1.5 * 1.959964), rel=1e-4)
    assert intervals.p_value(0.3, 0.1, 0.4, 0.5) == pytest.approx(2 * stats.norm.sf(2 * 1.959964), rel=1e-4)


slow = pytest.mark.skipif(
    not __import__("os").environ.get("FAITHFUL_DISTILL_SLOW"), reason="simulates: set FAITHFUL_DISTILL_SLOW=1"
)


@slow
@pytest.mark.parametrize("seeds, n, seed_sd, shared", [
    (5, 50, 0.0, True), (5, 50, 0.03, True), (5, 300, 0.0, True), (5, 300, 0.03, True), (3, 50, 0.03, True),
    (3, 300, 0.05, True), (5, 50, 0.03, False), (5, 300, 0.0, False), (3, 100, 0.05, False),
])  # fmt: skip
@pytest.mark.parametrize("paired", [False, True])
def test_intervals_of_several_seeds_cover_as_they_say(seeds, n, seed_sd, shared, paired):
    "1,500 repetitions: a standard error of 0.6 points."
    rng, covered = np.random.default_rng(n + seeds), 0

    def outcomes():
        hard = rng.uniform(-0.35, 0.35, (1 if shared else seeds, n))
        return hard, rng.normal(0, seed_sd, (seeds, 1))

    def drawn(hard, of_seed):
        return (rng.random((seeds, n)) < np.clip(0.5 + hard + of_seed, 0, 1)).astype(float)

    for _ in range(1500):
        hard, of_seed = outcomes()
        if paired:  # a and b share the questions; each has seeds of its own
            other = rng.normal(0, seed_sd, (seeds, 1))
            score = intervals.paired_difference(drawn(hard, of_seed), drawn(hard, other), draws=300)
            covered += score.low <= 0 <= score.high
        else:
            score = intervals.mean_score(drawn(hard, of_seed), draws=300)
            covered += score.low <= 0.5 <= score.high
    assert 0.93 <= covered / 1500 <= 0.975


@slow
@pytest.mark.parametrize(
    "clusters, least", [(5, 0.91), (10, 0.925), (19, 0.925), (20, 0.925), (40, 0.915), (75, 0.93)]
)
def test_intervals_over_clusters_cover_as_they_say(clusters, least):
    "All repetitions share the seed of their resamples, so few resamples would err alike in all of them."
    rng, covered = np.random.default_rng(clusters), 0
    for _ in range(1500):
        rate, which = np.repeat(rng.random(clusters), 20), np.repeat(np.arange(clusters), 20)
        score = intervals.mean_score((rng.random(len(rate)) < rate).astype(float), cluster=which, draws=2000)
        covered += score.low <= 0.5 <= score.high
    assert least <= covered / 1500 <= 0.975


def test_draws_of_an_intervention_are_averaged_for_each_example():
    rng, covered = np.random.default_rng(11), 0
    for _ in range(400):
        after = (rng.random((3, 60)) < rng.choice([0.5, 0.9], 60)).astype(int)
        score = metrics.same_answer_rate(np.ones(60, int), after, draws=300)
        covered += score.low <= 0.7 <= score.high
    assert (
        score.value == pytest.approx(after.mean()) and covered >= 370
    )  # 380 expected; with draws taken for seeds about 330


def test_seeds_that_agree_by_chance_leave_an_interval():
    score = intervals.mean_score([[1, 1, 0] * 10, [0, 1, 1] * 10])
    assert score.high - score.low > 0.15


def guesses_of_two_methods(rng, seeds, n, leak=0.5):
    import pandas as pd

    index = [(m, s, i) for m in "ab" for s in range(seeds) for i in range(n)]
    rows = pd.DataFrame(index, columns=["method", "seed", "id"])
    for name, share in (("guess_r", leak), ("guess_xr", 0.6), ("guess_x", 0.4)):
        rows[name] = (rng.random(len(rows)) < share).astype(float)
    return rows


def test_a_difference_of_las_counts_the_sampling_of_examples_once():
    from faithful_distill.lab.pairs import las_difference

    score = las_difference(guesses_of_two_methods(np.random.default_rng(2), 4, 300), "method", "a", "b")
    over_seeds = intervals.across_seeds(score.details["per_seed"])
    sampling = score.details["examples_high"] - score.details["examples_low"]
    assert score.high - score.low == pytest.approx(max(over_seeds.high - over_seeds.low, sampling), rel=0.05)


def test_a_difference_of_las_is_undefined_where_one_has_no_las():
    from faithful_distill.lab.pairs import las_difference

    rows = guesses_of_two_methods(np.random.default_rng(3), 2, 60)
    assert las_difference(rows, "method", "a", "b").value is not None
    leaking = rows.assign(guess_r=rows.guess_r.where((rows.method == "b") | (rows.id < 4), 1.0))
    score = las_difference(leaking, "method", "a", "b")
    assert score.value is None and "at least 10 are needed" in score.reason


@pytest.mark.parametrize("seeds, examples, seed_sd", [(3, 60, 0.1), (3, 60, 0.01), (1, 6, 0.0)])
def test_a_family_of_null_claims_is_decided_wrongly_as_seldom_as_corrected_claims_say(
    seeds, examples, seed_sd
):
    from faithful_distill.lab.claims import corrected, decided
    from faithful_distill.lab.pairs import as_difference

    rng, wrong = np.random.default_rng(seeds), 0
    for _ in range(60):
        tables = rng.normal(0, seed_sd, (20, seeds, 1)) + rng.normal(0, 0.1, (20, seeds, examples))
        scores = (intervals.mean_score(t.clip(-1, 1), ends=(-1, 1), draws=100) for t in tables)
        claims = corrected([decided("differs", as_difference(s)) for s in scores])
        wrong += any(c["holds"] is not None for c in claims)
    assert wrong <= 8  # 3 expected; read as normal 12 and more


def _by_text(questions, rationales, prefix, continue_from=False):
    "A student whose answers depend on the question's text, and on the rationale it is given if there is one."
    from types import SimpleNamespace

    from faithful_distill.hashes import stable_seed

    found = []
    for q, text in zip(questions, rationales):
        own = f"because {stable_seed(0, q.question) % 7}. It is so, and more"
        said = own if text is None else text
        choice = (stable_seed(1, q.question, said) % 5) or None
        scores = [float(stable_seed(2, q.question, said, k) % 90) / 30 for k in range(len(q.choices))]
        found.append(SimpleNamespace(rationale=said, choice=choice and choice - 1, scores=scores))
    return found


def test_rows_of_one_question_are_one_cluster_whatever_is_measured():
    "Each question asked three times over, with its choices in another order: no interval is narrower for it."
    from faithful_distill.faithfulness.interventions import measure, measure_insertion
    from faithful_distill.questions import Question

    def asked(copies):
        return [
            Question(f"{i}/{k}", f"Which is number {i} ?", tuple("abcd"), i % 4)
            for k in range(copies)
            for i in range(60)
        ]

    chosen = ("early", "swap", "refine", "filler")
    teacher = [dict(id=q.id, target=i, rationale=f"it is {i}") for q in asked(3) for i in range(2)]
    about = lambda copies: [r for r in teacher if int(r["id"].split("/")[1]) < copies]
    once, thrice = (
        measure(_by_text, asked(n), about(n), metrics=chosen, prefix="none").scores
        | measure_insertion(_by_text, asked(n), ["very", "quite"], per_question=2)
        for n in (1, 3)
    )
    width = lambda score: score.high - score.low
    same = [n for n, s in once.items() if s.low is not None and not n.startswith(("swap_shuffled", "inser"))]
    assert len(same) > 20
    for name in same:
        assert width(thrice[name]) == pytest.approx(width(once[name]), rel=0.1), name


def test_evaluate_resamples_facts_of_the_world(embedded, tmp_path, monkeypatch):
    from faithful_distill.faithfulness import interventions, suite

    asked = {}

    @functools.wraps(interventions.measure)
    def measured(student, questions, *a, interval, **k):
        asked["ids"], asked["clusters"] = [q.id for q in questions], interval["cluster"]
        raise BadInput("stops here")

    for module in (interventions, suite):
        monkeypatch.setattr(module, "measure", measured)
    evaluate(embedded, tmp_path)
    facts = [" ".join(id.split("-")[1:-1]) for id in asked["ids"]]
    assert asked["clusters"] == facts and len(facts) == 24


@pytest.mark.parametrize(
    "text, steps, phrase",
    [
        ("因为猫吃鱼，所以不吃石头。石头很硬！", ["因为猫吃鱼，所以不吃石头。", "石头很硬！"], "石头"),
        ("ネコは魚を食べます。「石は硬い。」だから食べません。", ["ネコは魚を食べます。", "「石は硬い。」", "だから食べません。"], "魚"),
        ("แมวชอบกินปลา มันไม่กินหิน", ["แมวชอบกินปลา ", "มันไม่กินหิน"], "หิน"),
        ("बिल्ली मछली खाती है। पत्थर नहीं।", ["बिल्ली मछली खाती है।", "पत्थर नहीं।"], "पत्थर"),
    ],
)  # fmt: skip
def test_what_is_done_word_by_word_is_done_in_scripts_without_blanks_too(text, steps, phrase):
    from faithful_distill.faithfulness import perturb

    plain = text.replace(" ", "")
    assert perturb.split_steps(text) == steps and perturb.join_words(steps) == text
    words = perturb.split_steps(text, "word", max_steps=99)
    assert len(words) >= 6 and "".join(words).replace(" ", "") == plain
    moved = perturb.permute_words(text, 1)
    assert moved != text and sorted(moved.replace(" ", "")) == sorted(plain)
    assert perturb.filler(text).split() == ["..."] * len(words)
    assert text not in (placed := perturb.insert_word(text, "very", 1)) and "very" in placed.split()
    assert phrase not in perturb.strip_words(text, phrase) and perturb.mentions(text, phrase)
    replaced = perturb.TokenPerturber(None, [text])(text, 0.5, 1)
    assert replaced != text and len(perturb.words_of(replaced)) == len(words)


def test_what_is_spelled_like_a_control_token_is_replaced_as_text_is():
    from faithful_distill.faithfulness.perturb import TokenPerturber
    from faithful_distill.faithfulness.late_interaction import scratch_base

    tokenizer = scratch_base(["a robin sings and its pad is soft"], 300).tokenizer
    perturb = TokenPerturber(tokenizer)
    assert perturb("a robin <pad> sings", 0, 1) == "a robin <pad> sings"
    for seed in range(20):
        assert "<pad>" not in perturb("a robin <pad> sings", 1, seed)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_phrase_is_found_with_its_letters_composed_or_not(form):
    import unicodedata

    from faithful_distill.faithfulness import perturb

    text, phrase = (unicodedata.normalize(form, t) for t in ("un café noir, des cafés", "café"))
    for other in ("café", phrase):
        assert perturb.mentions(text, other) and "caf" not in perturb.strip_words(text, other)


def test_a_text_of_one_token_is_damaged_too_and_unknown_words_stay():
    from faithful_distill.faithfulness import perturb

    of_words = perturb.TokenPerturber(None, ["see lamp yes", "see chair yes"], least=1)
    assert (
        all(of_words("lamp", 0.5, seed) != "lamp" for seed in range(5)) and of_words("lamp", 0, 1) == "lamp"
    )
    assert of_words("unheard", 0.5, 1) == "unheard"
    assert [w for w in of_words("see unheard of", 1, 1).split()][1:] == ["unheard", "of"]


def test_adding_mistakes_counts_steps_in_which_nothing_can_be_replaced():
    from faithful_distill.faithfulness.arms import AddingMistakes
    from faithful_distill.faithfulness.interventions import measure
    from faithful_distill.questions import Question
    from faithful_distill.reasoners.protocol import Scripted

    asked = [Question(f"q{i}", f"which thing number {i}?", ("lamp", "chair"), i % 2) for i in range(6)]
    student = Scripted(True, lambda q: f"see {q.choices[q.answer]}, yes")
    mistakes = AddingMistakes(step="word", rho=0.5)
    found = measure(student, asked, metrics=[mistakes], interval=dict(draws=50)).scores["adding_mistakes"]
    assert found.details["undamaged"] == 0
    none = measure(student, asked, metrics=[AddingMistakes(step="word", rho=0.0)], interval=dict(draws=50))
    assert none.scores["adding_mistakes"].details["undamaged"] == 18


def test_las_without_a_least_size_is_undefined_where_a_part_is_empty():
    score = las([0] * 12, [0] * 12, [0] * 12, [0] * 12, min_bin=0, draws=20)
    assert score.value is None and "at least 1 are needed" in score.reason


def test_shares_of_ordered_pairs_of_few_students_are_widened_and_say_so():
    rng, levels = np.random.default_rng(4), np.repeat([0.0, 0.5, 1.0], 4)
    score = calibration.adjacent_concordance((levels + rng.normal(0, 1, 12)).tolist(), levels.tolist())
    many = calibration.adjacent_concordance(rng.normal(size=48).tolist(), np.repeat(levels, 4).tolist())
    assert "only 12" in score.details["warning"] and "warning" not in many.details
    weights = calibration.student_weights([(f, 0) for f in levels], 2000, 0)
    pairs = calibration.adjacent_pairs(
        levels + np.random.default_rng(4).normal(0, 1, 12), list(levels), [0] * 12
    )
    drawn = sum(np.einsum("di,ij,dj->d", weights[:, a], c, weights[:, b]) for _, a, b, c in pairs) / 32
    low = score.value - intervals.small_sample_factor(12) * (score.value - np.quantile(drawn, 0.025))
    assert score.low == pytest.approx(max(0, low))


@pytest.mark.filterwarnings("error")
def test_an_undefined_number_of_few_rows_has_no_ends_and_no_warning():
    ratio = lambda means: means[..., :1] / means[..., 1:]
    rows = np.array([[1.0, 1.0], [1.0, -1.0]] * 15)  # the mean is 1 / 0, those of most resamples are not
    point, low, high, details = intervals.bootstrap(rows, ratio, draws=200)
    assert np.isinf(point[0]) and np.isnan([low[0], high[0]]).all() and details["undefined_draws"] < 100


def test_a_correlation_with_what_varies_by_rounding_alone_is_undefined():
    score = metrics.insertion_correlation([0.3, 0.1 + 0.2, 0.3], [0, 1, 0])
    assert score.value is None and score.reason == "shift is the same for every insert"


def test_a_p_value_with_a_part_of_no_weight_is_that_of_the_rest():
    p = intervals.p_value(0.9, 0.88, 0.92, 0.0, parts=[(1, None), (0, 4)])
    assert p == intervals.p_value(0.9, 0.88, 0.92, 0.0, parts=[(1, None)])


def question_rows(rng, seeds, spread, n=200):
    "Rows of two methods: a is right more often by a share that differs between seeds."
    rows = [
        {"method": m, "seed": s, "id": i, "right": float(rng.random() < 0.4 + (m == "a") * (0.2 + d))}
        for s, d in zip(range(seeds), spread)
        for m in "ab"
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_a_difference_over_questions_holds_the_spread_of_the_seeds():
    from faithful_distill.lab.pairs import question_difference

    rows = question_rows(np.random.default_rng(0), 4, [-0.2, -0.1, 0.1, 0.2])
    score = question_difference(rows, "method", "a", "b", "right")
    over_seeds = intervals.across_seeds(score.details["per_seed"])
    assert score.high - score.low > 0.95 * (over_seeds.high - over_seeds.low)
    wide = rows.pivot_table(index=["seed", "id"], columns="method", values="right")
    grid = (wide.a - wide.b).unstack("id").to_numpy()
    plain = intervals.mean_score(grid, ends=(-1, 1))
    assert score.value == pytest.approx(plain.value, abs=1e-12)
    assert (score.low, score.high) == pytest.approx((plain.low, plain.high), abs=0.01)


def test_a_difference_over_some_pairs_of_answers_is_the_mean_of_the_seeds_means():
    from faithful_distill.lab.pairs import question_difference

    rows = question_rows(np.random.default_rng(1), 3, [0.0, 0.1, 0.2])
    wide = rows.pivot_table(index=["id", "seed"], columns="method", values="right")
    errs = wide.b == 0
    score = question_difference(rows, "method", "a", "b", "right", where=errs)
    by_hand = [(wide.a - wide.b)[errs & (wide.index.get_level_values("seed") == s)].mean() for s in range(3)]
    assert score.value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert score.details["per_seed"] == pytest.approx(by_hand) and score.low < score.value < score.high
    assert question_difference(rows, "method", "a", "b", "right", where=errs & False).value is None
