"""How sure a number is: intervals by the bootstrap, differences by McNemar's exact test, and nothing else.

A share of right answers has Wilson's interval instead. A comparison is paired: the same questions, images drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.05
"""Below it a p-value, after Holm's correction, counts as a difference."""

RESAMPLES = 2000
QUESTION = ["task", "question_id", "doc_id"]
"""What names a question; some benchmarks name several the same, hence the document's number."""


def share_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share; it treats questions as independent, though several may share an image."""
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(statistic: Callable[[np.ndarray], float], units: int, resamples: int = RESAMPLES) -> np.ndarray:
    """A score of resampled units, float ``[resamples]``.

    Parameters
    ----------
    statistic : callable
        The score of the units whose indices, int ``[units]``, it is given.
    units : int
        How many units there are to draw from: questions, pairs of them, or images.
    resamples : int
        Number of draws, always the same ones.
    """
    if units < 2:
        return np.full(resamples, float(statistic(np.arange(units))))
    drawn = stats.bootstrap(
        (np.arange(units),), statistic, n_resamples=resamples, vectorized=False, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return drawn.bootstrap_distribution


def percentiles(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds a share `level` of draws ``[resamples]``, as much left out below as above."""
    low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap_interval(statistic: Callable[[np.ndarray], float], units: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a score; the parameters are those of `bootstrap`."""
    return percentiles(bootstrap(statistic, units))


@dataclass(frozen=True)
class Comparison:
    """Two methods on the questions that both answered.

    Attributes
    ----------
    n : int
        Number of these questions.
    score_a, score_b, difference : float
        Mean score per question in percent, and a minus b in percentage points; of several tasks the mean over tasks.
    interval : tuple of float
        95 % interval of the difference.
    only_a, only_b : int
        Questions that a, or b, answered better.
    draws : numpy.ndarray
        The difference in each resample, ``[resamples]``.
    """

    n: int
    score_a: float
    score_b: float
    only_a: int
    only_b: int
    draws: np.ndarray

    @property
    def difference(self) -> float:
        return self.score_a - self.score_b

    @property
    def interval(self) -> tuple[float, float]:
        return percentiles(self.draws)

    @property
    def p(self) -> float:
        """Probability of questions at least as unevenly won if the two were equally good: McNemar's exact test."""
        won = self.only_a + self.only_b
        return float(stats.binomtest(self.only_a, won).pvalue) if won else 1.0

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.difference:+.1f} ({low:+.1f} to {high:+.1f})"


def compare(a: Sequence[Mapping] | pd.DataFrame, b: Sequence[Mapping] | pd.DataFrame) -> Comparison:
    """Compare two evaluations by their per-sample lines.

    The bootstrap draws images, where lines name them: questions about one image are not independent.

    Raises
    ------
    ValueError
        If no question is in both, or lines have no score.
    """
    both = _scores(a).merge(_scores(b).drop_duplicates(QUESTION, keep="last"), on=QUESTION, suffixes=("_a", "_b"))
    if both.empty:
        raise ValueError("no question was answered by both")
    if both[["score_a", "score_b"]].isna().any(axis=None):
        raise ValueError("a line has no score, so its cell was never finished")
    better = both.score_a - both.score_b
    image = both.picture_a.where(both.picture_a.notna(), both.index.astype(str))  # who names none stands alone
    by_image = better.groupby(image)
    sums, counts = by_image.sum().to_numpy(), by_image.size().to_numpy()
    draws = bootstrap(lambda drawn: 100 * sums[drawn].sum() / counts[drawn].sum(), len(sums))
    means = 100 * both[["score_a", "score_b"]].mean()
    return Comparison(len(both), *map(float, means), int((better > 0).sum()), int((better < 0).sum()), draws)


def over_tasks(found: Sequence[Comparison]) -> Comparison:
    """The same comparison on several tasks as one: scores averaged over tasks, questions of all of them counted."""
    rng = np.random.default_rng(0)  # all tasks drew the same numbers: their order is mixed, as tasks are independent
    return Comparison(
        n=sum(one.n for one in found),
        score_a=fmean(one.score_a for one in found),
        score_b=fmean(one.score_b for one in found),
        only_a=sum(one.only_a for one in found),
        only_b=sum(one.only_b for one in found),
        draws=np.mean([rng.permutation(one.draws) for one in found], axis=0),
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """Probabilities ``[tests]`` after Holm's step-down correction."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(raised, 1)[np.argsort(order)]


def _scores(lines: Sequence[Mapping] | pd.DataFrame) -> pd.DataFrame:
    """Question, image and score of per-sample lines."""
    found = pd.DataFrame(lines, columns=[*QUESTION, "picture", "score"], dtype=object)
    found[QUESTION] = found[QUESTION].astype(str)
    return found.astype({"score": float})
