"""From lmms-eval's results to scores: per question, the headline, and the headline of resampled questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eval.tasks.registry import TASKS

Resampled = Callable[[np.ndarray], float]
ROTATION = 1_000_000
"""MMBench's rotations of a question's options have its index plus multiples of this."""


def headline(task: str, results: Mapping[str, object]) -> float:
    """A task's headline score in the units papers print.

    Parameters
    ----------
    task : str
        A key of `TASKS`.
    results : mapping
        lmms-eval's ``results["results"][task]``. Of several metrics, those without a question are missing there.

    Raises
    ------
    KeyError
        If no metric is there.
    """
    keys = [f"{metric},none" for metric in TASKS[task].metrics]
    values = [float(results[key]) for key in keys if key in results]
    if not values:
        raise KeyError(f"{task}: lmms-eval's results have none of {keys}")
    return TASKS[task].scale * sum(values)


def question_scores(task: str, samples: Sequence[Mapping]) -> list[float]:
    """How right each answer is, 0 to 1.

    Parameters
    ----------
    task : str
        A key of `TASKS`.
    samples : sequence of mapping
        lmms-eval's ``results["samples"][task]``.
    """
    entries = _entries(task, samples)
    if TASKS[task].scoring == "options":
        return _option_scores(entries)
    return [_score(entry) for entry in entries]


def statistic(task: str, samples: Sequence[Mapping]) -> tuple[Resampled, int]:
    """The headline score as a function of the questions it is computed from, for bootstrap intervals.

    Parameters
    ----------
    task : str
        A key of `TASKS`.
    samples : sequence of mapping
        lmms-eval's ``results["samples"][task]``.

    Returns
    -------
    score : callable
        From indices of units, int ``[any number]``, to the score in the units papers print. For ``range(units)`` it is
        `headline`, except where a judge was asked.
    units : int
        How many there are: pairs where questions are scored in pairs, MMBench's questions without their rotations, else
        questions.
    """
    scoring, entries = TASKS[task].scoring, _entries(task, samples)
    if scoring == "f1":
        return _f1(entries), len(entries)
    if scoring == "pairs":
        return _points(entries)
    scores = question_scores(task, samples)
    values = np.array(_all_rotations(entries, scores) if scoring == "options" else scores)
    return (lambda drawn: float(100 * values[drawn].mean())), len(values)


def _entries(task: str, samples: Sequence[Mapping]) -> list:
    """What lmms-eval recorded of every sample under the first of the task's metrics that is there."""
    metrics = TASKS[task].metrics
    return [next(sample[metric] for metric in metrics if metric in sample) for sample in samples]


def _score(entry: float | Mapping) -> float:
    """A number, a dictionary with a ``score``, or SEED-Bench's with two letters to compare."""
    if not isinstance(entry, Mapping):
        return float(entry)
    if "score" in entry:
        return float(entry["score"])
    return float(entry["pred"].lower().strip() == entry["answer"].lower().strip())


def _option_scores(entries: Sequence[Mapping]) -> list[float]:
    """Whether lmms-eval's rules find the right option in an answer."""
    import pandas
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rules, answers = MMBench_Evaluator(), {entry["index"]: entry["answer"] for entry in entries}
    table = pandas.DataFrame(list(entries), dtype=object)  # any other type is ten times slower to take rows from
    rows = (table[number : number + 1] for number in range(len(table)))
    return [float(rules.eval_sub_data(row, answers, static_only=True)) for row in rows]


def _all_rotations(entries: Sequence[Mapping], scores: Sequence[float]) -> list[float]:
    """One score per question of MMBench: the worst of its rotations."""
    worst: dict[int, float] = {}
    for entry, score in zip(entries, scores, strict=True):
        question = entry["index"] % ROTATION
        worst[question] = min(score, worst.get(question, score))
    return [worst[entry["index"]] for entry in entries if entry["index"] < ROTATION]


def _f1(entries: Sequence[Mapping]) -> Resampled:
    """POPE's F1 of the answer yes, in percent; as there, a missed yes counts only if the answer was no."""
    truth = np.array([entry["ground_truth"] == "yes" for entry in entries])
    yes, no = (np.array([entry["prediction"] == word for entry in entries]) for word in ("yes", "no"))
    hits, errors = truth & yes, (~truth & yes).astype(int) + (truth & no)

    def score(drawn: np.ndarray) -> float:
        right, wrong = int(hits[drawn].sum()), int(errors[drawn].sum())
        return 200 * right / (2 * right + wrong) if right else 0.0

    return score


def _points(entries: Sequence[Mapping]) -> tuple[Resampled, int]:
    """MME's points: per category the mean over pairs of the share that is right plus whether both are, in percent.

    A category of which no pair was drawn keeps the points that all its pairs have together: with few pairs that
    happens, and says nothing about the answers.
    """
    pairs: dict[tuple[str, object], list[float]] = {}
    for entry in entries:
        pairs.setdefault((entry["category"], entry["question_id"]), []).append(entry["score"])
    points = np.array([50 * sum(scores) + 100 * (sum(scores) == 2) for scores in pairs.values()])
    names, category = np.unique([name for name, _ in pairs], return_inverse=True)
    whole = np.bincount(category, points) / np.bincount(category)

    def score(drawn: np.ndarray) -> float:
        count = np.bincount(category[drawn], minlength=len(names))
        total = np.bincount(category[drawn], points[drawn], minlength=len(names))
        return float(np.where(count, total / np.maximum(count, 1), whole).sum())

    return score, len(pairs)
