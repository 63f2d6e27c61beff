"""Intervals, paired tests, false-discovery control and the recovery curve, on stored results.

Outcomes are bimodal: a run recovers the target or it does not. Recovery rates therefore lead, then medians, then means.

One rule for numerical failures holds in every function here. A run has failed where its ``failed`` flag is set or its
value is not finite. A failed run leaves its own arm's estimates; of a paired comparison both members leave, for keeping
the other would compare two different sets of seeds. Rates of two arms taken each by itself may therefore differ by
something else than their paired difference. `failure_bound` gives the bound to set beside such an estimate.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from jaxkd import checks

__all__ = [
    "Interval",
    "MeanInterval",
    "PairedDifference",
    "PairedRates",
    "Proportion",
    "RecoveryCurve",
    "Summary",
    "failure_bound",
    "false_discovery",
    "mcnemar",
    "paired_difference",
    "recovery_curve",
    "recovery_rate",
    "summarise",
    "t_interval",
    "wilson_interval",
]

_ELEMENTS_AT_ONCE = 100_000  # resamples × runs held at once: the working arrays then stay in cache
_MAX_NEWTON_STEPS = 200
_NEWTON_TOLERANCE = 1e-7  # of a step, relative: separated runs give steep slopes


class Interval(NamedTuple):
    """Lower and upper confidence limit, in the units of what is estimated; NaN where there is nothing to estimate."""

    low: float
    high: float


@dataclass(frozen=True)
class Proportion:
    """A rate ``count / total`` with its confidence limits; NaN where ``total`` is zero."""

    count: int
    total: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedRates:
    """Two arms' recovery over the same seeds: the paired 2×2 table, McNemar's p-value, difference of rates (a − b)."""

    only_a: int
    only_b: int
    both: int
    neither: int
    pairs: int
    p_value: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a − b over pairs of seeds, its bootstrap limits (both in the values' units), a permutation p-value."""

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int


@dataclass(frozen=True)
class Summary:
    """Location and spread, in the values' units, of the ``count`` runs left after ``failed`` ones were taken out."""

    median: float
    lower_quartile: float
    upper_quartile: float
    mean: float
    sd: float
    count: int
    failed: int


@dataclass(frozen=True)
class MeanInterval:
    """A mean of ``count`` values with Student's confidence limits, all in the values' units."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, eq=False)
class RecoveryCurve:
    """Recovery as a logistic curve of one abscissa: the log-odds are ``intercept + slope · x``.

    ``critical`` is the abscissa above which a run recovers more often than not. An infinite value says on which side of
    the runs it lies: −inf, every run recovered and it lies below them; +inf, none did and it lies above them. NaN says
    that the curve does not rise, so that no such boundary exists. ``critical_interval`` is NaN unless ``critical`` is
    finite; where one of its limits is infinite, the runs do not bound the critical abscissa on that side.

    Attributes:
        intercept: Log-odds of recovery at x = 0.
        slope: Log-odds per unit of the abscissa.
        critical: In units of the abscissa, see above.
        intercept_interval: Confidence limits of ``intercept``.
        slope_interval: Confidence limits of ``slope``.
        critical_interval: Confidence limits of ``critical``.
        confidence: Level of every interval.
        runs: Runs fitted, failed ones left out.
        clusters: Clusters among them.
        resamples: [num_resamples, 2], intercept and slope of each bootstrap resample; a row of NaN where the resample
            does not determine a slope, because its runs share one abscissa.
    """

    intercept: float
    slope: float
    critical: float
    intercept_interval: Interval
    slope_interval: Interval
    critical_interval: Interval
    confidence: float
    runs: int
    clusters: int
    resamples: NDArray[np.float64]

    def probability(self, x: ArrayLike) -> NDArray[np.float64]:
        """Fitted probability of recovery at abscissae ``x``, in the shape of ``x``."""
        return special.expit(self.intercept + self.slope * np.asarray(x, float))

    def band(self, x: ArrayLike) -> Interval:
        """Pointwise confidence band of `probability` at ``x``: two arrays in the shape of ``x``."""
        x = np.asarray(x, float)
        log_odds = self.resamples[:, 0] + x[..., None] * self.resamples[:, 1]
        return _percentile_interval(special.expit(log_odds), self.confidence)


def wilson_interval(count: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, NaN where ``total`` is zero.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22:209.

    Raises:
        ValueError: unless 0 <= count <= total, both whole numbers, and 0 < confidence < 1.
    """
    checks.whole("total", total, least=0)
    checks.whole("count", count, least=0, most=total)
    checks.number("confidence", confidence, above=0, below=1)
    if total == 0:
        return Interval(np.nan, np.nan)
    limits = stats.binomtest(count, total).proportion_ci(confidence, method="wilson")
    return Interval(float(limits.low), float(limits.high))


def recovery_rate(recovered: ArrayLike, failed: ArrayLike | None = None, confidence: float = 0.95) -> Proportion:
    """Share of the runs that recovered among those that did not fail, with Wilson's interval.

    With failures scored as not recovered instead: ``recovery_rate(failure_bound(recovered, failed))``.

    Args:
        recovered: [seeds], true or false (or 1 and 0; NaN counts as failed).
        failed: [seeds], true where a run failed numerically; None where none did.
        confidence: Level of the interval.

    Raises:
        ValueError: for other values than these, or shapes that differ.
    """
    outcome, usable = _outcomes(recovered, failed, "recovered")
    count, total = int(outcome[usable].sum()), int(usable.sum())
    return Proportion(count, total, count / total if total else np.nan, *wilson_interval(count, total, confidence))


def mcnemar(
    recovered_a: ArrayLike,
    recovered_b: ArrayLike,
    failed_a: ArrayLike | None = None,
    failed_b: ArrayLike | None = None,
    confidence: float = 0.95,
) -> PairedRates:
    """Compare two arms' recovery over the same seeds by McNemar's exact test.

    Where only one arm of a pair recovered, under the null it is either with equal odds: a two-sided binomial test
    (McNemar 1947, Psychometrika 12:153). The difference of rates has Newcombe's square-and-add score interval (method
    10 of Newcombe 1998, Stat. Med. 17:2635); being no inversion of the exact test, it may disagree with it at the edge.
    Without pairs, p-value and difference are NaN.

    Args:
        recovered_a: [seeds], true or false (or 1 and 0; NaN counts as failed).
        recovered_b: [seeds], the other arm on the same seeds in the same order.
        failed_a: [seeds], true where a run of arm a failed numerically; None where none did.
        failed_b: [seeds], the same of arm b. A pair in which either failed is left out.
        confidence: Level of the interval.

    Raises:
        ValueError: for other values than these, or shapes that differ.
    """
    checks.number("confidence", confidence, above=0, below=1)
    a, usable_a = _outcomes(recovered_a, failed_a, "recovered_a")
    b, usable_b = _outcomes(recovered_b, failed_b, "recovered_b")
    a, b = _complete_pairs(a, usable_a, b, usable_b, "recovered")
    both, only_a, only_b, neither = (int(np.sum(cell)) for cell in (a & b, a & ~b, ~a & b, ~a & ~b))
    pairs, discordant = a.size, only_a + only_b
    if pairs == 0:
        return PairedRates(0, 0, 0, 0, 0, np.nan, np.nan, np.nan, np.nan)
    p_value = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    limits = _newcombe_interval(both, only_a, only_b, neither, confidence)
    return PairedRates(only_a, only_b, both, neither, pairs, p_value, (only_a - only_b) / pairs, *limits)


def paired_difference(
    values_a: ArrayLike,
    values_b: ArrayLike,
    failed_a: ArrayLike | None = None,
    failed_b: ArrayLike | None = None,
    num_resamples: int = 9999,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Mean difference a − b over seeds, with a paired BCa bootstrap interval and a permutation p-value.

    The interval resamples pairs (Efron 1987, J. Am. Stat. Assoc. 82:171). The two-sided p-value swaps the arms within
    pairs, over all swaps where there are at most ``num_resamples`` of them, and so tests the mean that is reported
    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 15). Where all differences are equal the
    interval is that one point; with fewer than two pairs interval and p-value are NaN.

    Args:
        values_a: [seeds], of any unit; not finite counts as failed.
        values_b: [seeds], the other arm on the same seeds in the same order.
        failed_a: [seeds], true where a run of arm a failed numerically; None where none did.
        failed_b: [seeds], the same of arm b. A pair in which either failed is left out.
        num_resamples: Bootstrap resamples, and permutations at most.
        seed: Of the resampling.
        confidence: Level of the interval.

    Raises:
        ValueError: for other values than these, or shapes that differ.
    """
    checks.number("confidence", confidence, above=0, below=1)
    checks.whole("num_resamples", num_resamples, least=1)
    a, usable_a = _values(values_a, failed_a, "values_a")
    b, usable_b = _values(values_b, failed_b, "values_b")
    a, b = _complete_pairs(a, usable_a, b, usable_b, "values")
    difference, pairs = a - b, a.size
    mean = float(difference.mean()) if pairs else np.nan
    if pairs < 2:
        return PairedDifference(mean, np.nan, np.nan, np.nan, pairs)

    rng = np.random.default_rng(seed)
    batch = max(1, _ELEMENTS_AT_ONCE // pairs)
    p_value = stats.permutation_test(
        (a, b),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=num_resamples,
        batch=batch,
        rng=rng,
    ).pvalue
    # BCa divides by the spread, so differences that are equal but for rounding are taken as equal.
    rounding = 8 * np.finfo(float).eps * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(difference) <= rounding:
        return PairedDifference(mean, mean, mean, float(p_value), pairs)
    limits = stats.bootstrap(
        (difference,),
        np.mean,
        n_resamples=num_resamples,
        batch=batch,
        confidence_level=confidence,
        method="BCa",
        rng=rng,
    ).confidence_interval
    return PairedDifference(mean, float(limits.low), float(limits.high), float(p_value), pairs)


def failure_bound(values: ArrayLike, failed: ArrayLike | None = None) -> NDArray[np.float64]:
    """Give ``values`` with every failed run scored as 0, in the same shape.

    What is computed from the result stands beside the estimate that leaves failures out. It is a lower bound of an
    arm's own mean or rate where 0 is the least that a run can have: of a mass, of recovery and of a reward that is
    never negative, not of a reward such as a log-density, which has no least value. Of a difference of two arms it is
    no bound but one more estimate: failures of the arm that is subtracted raise it.

    Args:
        values: Of any shape and unit; not finite counts as failed.
        failed: In the shape of ``values``, true where a run failed numerically; None where none did.

    Raises:
        ValueError: for other values than these, or shapes that differ.
    """
    values = np.asarray(values, float)
    return np.where(_usable(values, failed, "values"), values, 0.0)


def summarise(values: ArrayLike, failed: ArrayLike | None = None) -> Summary:
    """Median, quartiles, mean and sample standard deviation (n − 1) of the runs that did not fail.

    NaN stands for what is undefined: everything without runs, the standard deviation with one.

    Args:
        values: [seeds], of any unit; not finite counts as failed.
        failed: [seeds], true where a run failed numerically; None where none did.

    Raises:
        ValueError: unless one-dimensional, or if the shapes differ.
    """
    values, usable = _values(values, failed, "values")
    kept, failures = values[usable], int(np.sum(~usable))
    if kept.size == 0:
        return Summary(np.nan, np.nan, np.nan, np.nan, np.nan, 0, failures)
    lower, median, upper = np.quantile(kept, [0.25, 0.5, 0.75])
    sd = kept.std(ddof=1) if kept.size > 1 else np.nan
    return Summary(float(median), float(lower), float(upper), float(kept.mean()), float(sd), kept.size, failures)


def t_interval(values: ArrayLike, confidence: float = 0.95, failed: ArrayLike | None = None) -> MeanInterval:
    """Mean with Student's t interval, for few seeds: at three, the standard error times 4.30.

    With fewer than two values the limits are NaN.

    Args:
        values: [seeds], of any unit; not finite counts as failed.
        confidence: Level of the interval.
        failed: [seeds], true where a run failed numerically; None where none did.

    Raises:
        ValueError: unless one-dimensional, if the shapes differ, or unless 0 < confidence < 1.
    """
    checks.number("confidence", confidence, above=0, below=1)
    summary = summarise(values, failed)
    if summary.count < 2:
        return MeanInterval(summary.mean, np.nan, np.nan, summary.count)
    half_width = float(stats.t.isf((1 - confidence) / 2, summary.count - 1)) * summary.sd / np.sqrt(summary.count)
    return MeanInterval(summary.mean, float(summary.mean - half_width), float(summary.mean + half_width), summary.count)


def false_discovery(p_values: ArrayLike, rate: float = 0.05) -> NDArray[np.bool_]:
    """Mark the cells that are significant at a false-discovery rate, over all cells together.

    Source: Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57:289.

    Args:
        p_values: Of any shape; NaN, a cell without a test, is neither counted nor marked.
        rate: Expected share of false marks that is allowed among the marks.

    Returns:
        True where significant, in the shape of ``p_values``.

    Raises:
        ValueError: unless the p-values are NaN or within [0, 1], and 0 < rate < 1.
    """
    checks.number("rate", rate, above=0, below=1)
    p_values = np.asarray(p_values, float)
    tested = ~np.isnan(p_values)
    outside = tested & ~((p_values >= 0) & (p_values <= 1))
    if outside.any():
        raise ValueError(f"p_values must be NaN or within [0, 1], got {p_values[outside][0]}")
    significant = np.zeros(p_values.shape, bool)
    if tested.any():
        significant[tested] = stats.false_discovery_control(p_values[tested], method="bh") <= rate
    return significant


def recovery_curve(
    abscissa: ArrayLike,
    recovered: ArrayLike,
    cluster: ArrayLike,
    num_resamples: int = 999,
    seed: int = 0,
    confidence: float = 0.95,
    failed: ArrayLike | None = None,
) -> RecoveryCurve:
    """Fit recovery against one abscissa by penalised logistic regression, with cluster-bootstrap intervals.

    Recovery is often separated: every run above some mass recovers, none below, and maximum likelihood then diverges.
    The likelihood is therefore multiplied by Jeffreys' prior (Firth 1993, Biometrika 80:27; Heinze and Schemper 2002,
    Stat. Med. 21:2409), which keeps the fit finite, also where all runs recover or none does. Fitted probabilities lean
    towards one half by it (Puhr et al. 2017, Stat. Med. 36:2302), which matters only for few runs.

    Runs of one seed share base, data and keys, hence whole seeds are resampled (Field and Welsh 2007, J. R. Stat. Soc.
    B 69:369); the intervals are percentiles. In a resample whose curve does not rise the critical abscissa is taken as
    −inf or +inf, as its curve is above or below one half at the mean abscissa: the limit of ever flatter rising curves.
    With one cluster the intervals are NaN.

    Args:
        abscissa: [runs], say log10 of the reference's target mass, or the exact Gibbs log-odds. NaN counts as failed.
        recovered: [runs], true or false (or 1 and 0; NaN counts as failed).
        cluster: [runs], which runs belong together: the seed of each.
        num_resamples: Bootstrap resamples.
        seed: Of the resampling.
        confidence: Level of the intervals.
        failed: [runs], true where a run failed numerically; None where none did.

    Raises:
        ValueError: for other values than these; for shapes that differ; for an infinite abscissa (dropping a mass of
            zero would favour recovery: floor it); for fewer than two distinct abscissae among runs that did not fail.
    """
    checks.number("confidence", confidence, above=0, below=1)
    checks.whole("num_resamples", num_resamples, least=1)
    outcome, usable = _outcomes(recovered, failed, "recovered")
    x, labels = np.asarray(abscissa, float), np.asarray(cluster)
    for name, array in (("abscissa", x), ("cluster", labels)):
        if array.shape != outcome.shape:
            raise ValueError(f"{name} must have the shape of recovered, {outcome.shape}, got {array.shape}")
    usable &= ~np.isnan(x)
    x, outcome, labels = x[usable], outcome[usable], labels[usable]
    if np.isinf(x).any():
        raise ValueError("abscissa must be finite or NaN, got an infinite value; floor the mass before its logarithm")
    if x.size == 0 or np.ptp(x) <= 1e-9 * np.abs(x).max():
        raise ValueError(f"abscissa must hold two distinct values or more, got {np.unique(x).size} in {x.size} runs")

    centre, scale = x.mean(), x.std()
    z = (x - centre) / scale
    clusters, member = np.unique(labels, return_inverse=True)
    fitted, critical = _fit_resamples(z, outcome, np.ones((1, x.size)))
    drawn = np.full((num_resamples, 2), np.nan)
    drawn_critical = np.full(num_resamples, np.nan)
    if clusters.size > 1:
        draws = np.random.default_rng(seed).multinomial(
            clusters.size, np.full(clusters.size, 1 / clusters.size), num_resamples
        )
        at_once = max(1, _ELEMENTS_AT_ONCE // x.size)
        for start in range(0, num_resamples, at_once):
            block = slice(start, start + at_once)
            drawn[block], drawn_critical[block] = _fit_resamples(z, outcome, draws[block, member].astype(float))

    def unstandardise(coefficients):
        slope = coefficients[:, 1] / scale
        return np.stack([coefficients[:, 0] - slope * centre, slope], axis=1)

    [[intercept, slope]] = unstandardise(fitted)
    resamples = unstandardise(drawn)
    critical, critical_interval = float(centre + scale * critical[0]), Interval(np.nan, np.nan)
    if np.isfinite(critical):
        critical_interval = _percentile_interval(centre + scale * drawn_critical, confidence)
    elif 0 < outcome.sum() < outcome.size:
        critical = np.nan
    return RecoveryCurve(
        intercept=float(intercept),
        slope=float(slope),
        critical=critical,
        intercept_interval=_percentile_interval(resamples[:, 0], confidence),
        slope_interval=_percentile_interval(resamples[:, 1], confidence),
        critical_interval=critical_interval,
        confidence=confidence,
        runs=x.size,
        clusters=clusters.size,
        resamples=resamples,
    )


def _fit_resamples(z, outcome, weights):
    """Firth coefficients [b, 2] and critical abscissae [b] for z: [n], outcome: [n], copies of each run: [b, n]."""
    coefficients = np.full((len(weights), 2), np.nan)
    drawn = weights > 0
    spread = np.where(drawn, z, -np.inf).max(axis=1) - np.where(drawn, z, np.inf).min(axis=1)
    determined = spread > 1e-5  # below it the information matrix is singular to rounding
    coefficients[determined] = _firth(z, outcome, weights[determined])

    intercept, slope = coefficients.T
    recovered, runs = weights @ outcome, weights.sum(axis=1)
    all_or_none = (recovered == 0) | (recovered == runs)
    rising = (slope > 0) & ~all_or_none
    critical = np.where(all_or_none, recovered == runs, intercept > 0)
    critical = np.where(critical, -np.inf, np.inf)
    critical[rising] = -intercept[rising] / slope[rising]
    return coefficients, np.where(determined | all_or_none, critical, np.nan)


def _firth(z, outcome, weights):
    """Maximise the logistic likelihood times Jeffreys' prior by damped Newton steps, each resample on its own.

    z: [n], outcome: [n], weights (copies of each run): [b, n]. Returns intercept and slope: [b, 2].
    """
    coefficients = np.zeros((len(weights), 2))
    value, step = _firth_step(z, outcome, weights, coefficients)
    active = np.arange(len(weights))
    for _ in range(_MAX_NEWTON_STEPS):
        size = np.abs(step[active]) / (1 + np.abs(coefficients[active]))
        active = active[size.max(axis=1) > _NEWTON_TOLERANCE]
        if active.size == 0:
            return coefficients
        proposal = coefficients[active] + step[active]
        new_value, new_step = _firth_step(z, outcome, weights[active], proposal)
        accepted = new_value >= value[active]
        step[active[~accepted]] /= 2
        rows = active[accepted]
        coefficients[rows], value[rows], step[rows] = proposal[accepted], new_value[accepted], new_step[accepted]
    raise RuntimeError(f"penalised logistic regression did not converge in {_MAX_NEWTON_STEPS} steps")


def _firth_step(z, outcome, weights, coefficients):
    """Penalised log-likelihood [b] at ``coefficients`` [b, 2], and the step [b, 2] uphill from there.

    The step is Newton's, with curvatures taken as positive where the likelihood is not concave (Dauphin et al. 2014,
    arXiv 1406.2572): uphill, and no shorter where it is nearly flat. Fisher scoring, which takes the prior for flat,
    swings to and fro where two abscissae carry all runs and creeps where runs are separated.
    """
    powers = z[:, None] ** np.arange(5)
    log_odds = coefficients[:, :1] + coefficients[:, 1:] * z
    probability = special.expit(log_odds)
    variance = probability * (1 - probability)
    weighted = weights * variance
    s = (weighted @ powers).T  # s[k]: weighted sum of variance · z^k; the information matrix is [[s0, s1], [s1, s2]]
    t = (weighted * (1 - 2 * probability) @ powers).T  # its derivative along coefficient j is t[k + j]
    q = (weighted * (1 - 6 * variance) @ powers).T  # and the derivative of t[k] is q[k + j]
    determinant = s[0] * s[2] - s[1] ** 2
    singular = ~(determinant > 0)
    determinant = np.where(singular, np.nan, determinant)
    value = (weights * special.log_expit(np.where(outcome, log_odds, -log_odds))).sum(axis=1)
    value = np.where(singular, -np.inf, value + 0.5 * np.log(determinant))

    d = [s[0] * t[2 + j] + s[2] * t[j] - 2 * s[1] * t[1 + j] for j in (0, 1)] / determinant

    def curvature(i, j):
        second = s[0] * q[2 + i + j] + s[2] * q[i + j] - 2 * s[1] * q[1 + i + j]
        second += t[i] * t[2 + j] + t[j] * t[2 + i] - 2 * t[1 + i] * t[1 + j]
        return s[i + j] - 0.5 * (second / determinant - d[i] * d[j])

    u0, u1 = ((weights * (outcome - probability)) @ powers[:, :2]).T + 0.5 * d
    c0, c1, c2 = curvature(0, 0), curvature(0, 1), curvature(1, 1)
    concave = (c0 > 0) & (c0 * c2 > c1**2)
    c0, c1, c2 = np.where(concave, (c0, c1, c2), _with_positive_curvatures(c0, c1, c2, s))
    step = np.stack([c2 * u0 - c1 * u1, c0 * u1 - c1 * u0], axis=1) / (c0 * c2 - c1**2)[:, None]
    return value, step


def _with_positive_curvatures(c0, c1, c2, s):
    """Of symmetric matrices [[c0, c1], [c1, c2]], [b] each: with their eigenvalues' sizes in place of these.

    An eigenvalue is no smaller than a millionth of the information's trace, so that no step is endless.
    """
    middle, apart = (c0 + c2) / 2, np.hypot((c0 - c2) / 2, c1)
    least = 1e-6 * (s[0] + s[2])
    high, low = (np.maximum(np.abs(middle + sign * apart), least) for sign in (1, -1))
    # The matrix is middle + apart · (reflection), and a function of its eigenvalues likewise.
    turn = (high - low) / 2 / np.where(apart > 0, apart, 1.0)
    return (high + low) / 2 + turn * (c0 - c2) / 2, turn * c1, (high + low) / 2 - turn * (c0 - c2) / 2


def _newcombe_interval(both, only_a, only_b, neither, confidence):
    """Newcombe (1998), method 10: Wilson's limits of either rate, combined with the pairs' correlation."""
    pairs = both + only_a + only_b + neither
    count_a, count_b = both + only_a, both + only_b
    rate_a, rate_b = count_a / pairs, count_b / pairs
    low_a, high_a = wilson_interval(count_a, pairs, confidence)
    low_b, high_b = wilson_interval(count_b, pairs, confidence)
    margins = count_a * (pairs - count_a) * count_b * (pairs - count_b)
    association = both * neither - only_a * only_b
    # A positive association narrows the interval, so the method takes half a pair's worth off it first.
    corrected = max(association - pairs / 2, 0) if association > 0 else association
    correlation = corrected / np.sqrt(margins) if margins else 0.0

    def combine(x, y):
        return np.sqrt(max(x**2 - 2 * correlation * x * y + y**2, 0.0))

    return Interval(
        float(rate_a - rate_b - combine(rate_a - low_a, high_b - rate_b)),
        float(rate_a - rate_b + combine(high_a - rate_a, rate_b - low_b)),
    )


def _percentile_interval(resamples, confidence):
    """Outer percentiles over the last axis, NaN resamples left out; order statistics, for infinities do not average."""
    resamples = resamples[..., ~np.isnan(resamples).reshape(-1, resamples.shape[-1]).any(axis=0)]
    if resamples.shape[-1] == 0:
        nothing = np.full(resamples.shape[:-1], np.nan)[()]
        return Interval(nothing, nothing)
    tail = (1 - confidence) / 2
    return Interval(
        np.quantile(resamples, tail, axis=-1, method="lower"),
        np.quantile(resamples, 1 - tail, axis=-1, method="higher"),
    )


def _complete_pairs(a, usable_a, b, usable_b, name):
    if a.shape != b.shape:
        raise ValueError(f"{name}_a and {name}_b must pair the same seeds, got {a.size} and {b.size}")
    keep = usable_a & usable_b
    return a[keep], b[keep]


def _values(values, failed, name):
    """One-dimensional values and which of them did not fail."""
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {values.shape}")
    return values, _usable(values, failed, name)


def _outcomes(recovered, failed, name):
    """Recovery as booleans, and which of them did not fail."""
    values, usable = _values(recovered, failed, name)
    strange = ~(np.isnan(values) | (values == 0) | (values == 1))
    if strange.any():
        raise ValueError(f"{name} must hold true and false (or 1, 0, NaN), got {values[strange][0]}")
    return values == 1, usable


def _usable(values, failed, name):
    usable = np.isfinite(values)
    if failed is None:
        return usable
    failed = np.asarray(failed)
    if failed.shape != values.shape:
        raise ValueError(f"failed must have the shape of {name}, {values.shape}, got {failed.shape}")
    if not np.isin(failed, (0, 1)).all():
        raise ValueError(f"failed must hold true and false (or 1 and 0), got {failed[~np.isin(failed, (0, 1))][0]}")
    return usable & ~failed.astype(bool)
