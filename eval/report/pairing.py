"""What comparisons share: the same questions of two cells, and the correction for many tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def paired(a: Sequence[Mapping], b: Sequence[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Per question that is in both: a's score minus b's, and its picture's number; errors are `question_pairs`'s."""
    pairs = question_pairs(a, b)
    first, second = question_scores(pairs)
    return first - second, picture_numbers(pairs)


def question_pairs(a: Sequence[Mapping], b: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """The lines of every question that is in both; ValueError if there is none, or a line has no score."""
    other = {_question(line): line for line in b}
    pairs = [(line, other[_question(line)]) for line in a if _question(line) in other]
    if not pairs:
        raise ValueError("no question was answered by both")
    if any("score" not in line for pair in pairs for line in pair):
        raise ValueError("a line has no score, so its cell was never finished")
    return pairs


def question_scores(pairs: Sequence[tuple[Mapping, Mapping]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both sides, float ``[questions]`` each."""
    return tuple(np.array([pair[side]["score"] for pair in pairs], float) for side in (0, 1))


def picture_numbers(pairs: Sequence[tuple[Mapping, Mapping]]) -> np.ndarray:
    """Number of every pair's picture; a line that names none stands alone."""
    names = [line.get("picture", str(number)) for number, (line, _) in enumerate(pairs)]
    return np.unique(names, return_inverse=True)[1]


def holm(p: Sequence[float]) -> np.ndarray:
    """Probabilities ``[tests]`` after Holm's step-down correction."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(raised, 1)[np.argsort(order)]


def _question(line: Mapping) -> tuple:
    """A question's name; some benchmarks name several alike, hence the document's number."""
    return line["task"], str(line["question_id"]), line["doc_id"]
