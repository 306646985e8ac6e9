"""Every method against one of them on the same questions, budget by budget: each task, and the average of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import norm

from eval.report.pairing import holm, paired
from eval.report.published import AVERAGE
from eval.report.results import VANILLA, Result
from eval.run.rows import RESAMPLES
from mustdrop.checks import shown

RIVAL = "rival"
"""Stands for the best method, at each budget, that is not MustDrop."""

OURS = "mustdrop"
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Mean score per question of a method minus another's, percentage points, with its 95 % interval."""

    value: float
    interval: tuple[float, float]
    p: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> Difference:
        """From a value and its bootstrap draws ``[resamples]``; p takes them as normal."""
        spread = draws.std()
        p = 2 * norm.sf(abs(value) / spread) if spread else 1.0
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(value, (float(low), float(high)), float(p))

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.interval[0]:+.1f} to {self.interval[1]:+.1f})"


@dataclass(frozen=True)
class Row:
    """A method at a budget against a reference: its difference per task, and on the average of all tasks."""

    method: str
    reference: str
    retain: int
    tasks: dict[str, Difference]
    average: Difference | None


def against(results: Sequence[Result], reference: str) -> list[Row]:
    """All methods against one of them, by budget from many tokens to few.

    Parameters
    ----------
    results : sequence of Result
        Of one model; of several seeds the first counts.
    reference : str
        A method, or `RIVAL`. Budgets at which it has no result are left out.

    Raises
    ------
    ValueError
        If the method has no results, or results are of several models.
    """
    cells = _cells(results)
    tasks, methods = (sorted({key[place] for key in cells}) for place in (0, 1))
    if reference not in (*methods, RIVAL):
        raise ValueError(f"--against: got {shown(reference)}, expected {RIVAL} or one of {', '.join(methods)}")
    found = []
    for retain in sorted({retain for _, _, retain in cells}, reverse=True):
        here = [method for method in methods if any((task, method, retain) in cells for task in tasks)]
        other = best_rival(cells, tasks, here, retain) if reference == RIVAL else reference
        for method in here if other in here else ():
            if method == other:
                continue
            pairs = _lines(cells, tasks, method, other, retain)
            found.append(Row(method, other, retain, *differences(pairs, len(tasks))))
    return found


def leaders(results: Sequence[Result], tasks: Sequence[str], ranked: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
    """Methods at their budgets that no other is known to surpass.

    Parameters
    ----------
    results : sequence of Result
        Of one model.
    tasks : sequence of str
        What the average is over.
    ranked : sequence of (method, budget)
        The best first within a budget, only such as have all tasks.

    Returns
    -------
    set of (method, budget)
        The first of every budget, and those whose paired interval to it holds 0.
    """
    cells = _cells(results)
    best: dict[int, str] = {}
    for method, retain in ranked:
        best.setdefault(retain, method)
    found = {(method, retain) for retain, method in best.items()}
    for method, retain in ranked:
        if method != best[retain]:
            average = differences(_lines(cells, tasks, method, best[retain], retain), len(tasks))[1]
            if average.interval[0] <= 0 <= average.interval[1]:
                found.add((method, retain))
    return found


def differences(pairs: Mapping[str, tuple[list, list]], tasks: int) -> tuple[dict[str, Difference], Difference | None]:
    """Per task and on average; the latter None unless all `tasks` are there. The bootstrap draws pictures, by task."""
    values, drawn = {}, {}
    for number, (task, (first, second)) in enumerate(pairs.items()):
        better, picture = paired(first, second)
        sums, counts = np.bincount(picture, better), np.bincount(picture)
        chosen = np.random.default_rng(number).integers(0, len(sums), (RESAMPLES, len(sums)))
        values[task] = 100 * float(better.mean())
        drawn[task] = 100 * sums[chosen].sum(1) / counts[chosen].sum(1)
    each = {task: Difference.of(values[task], drawn[task]) for task in values}
    if len(each) < tasks:
        return each, None
    return each, Difference.of(fmean(values.values()), np.mean(list(drawn.values()), axis=0))


def best_rival(cells: Mapping[tuple, Result], tasks: Sequence[str], methods: Sequence[str], retain: int) -> str | None:
    """The method with the highest mean accuracy over all tasks that is not MustDrop, alone or with others."""
    whole = [
        method for method in methods if OURS not in method and all((task, method, retain) in cells for task in tasks)
    ]

    def accuracy(method: str) -> float:
        return fmean(cells[task, method, retain].row["accuracy"] for task in tasks)

    return max(whole, key=accuracy, default=None)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; a star where Holm's correction over all averages leaves p below `LEVEL`."""
    tasks = sorted({task for row in rows for task in row.tasks})
    given = [row for row in rows if row.average is not None]
    corrected = dict(zip(map(id, given), holm([row.average.p for row in given]) if given else (), strict=True))
    body = [
        [
            str(row.retain), row.method, row.reference, *(str(row.tasks.get(task, "-")) for task in tasks),
            "-" if row.average is None else f"{row.average}{'*' if corrected[id(row)] < LEVEL else ''}",
        ]
        for row in rows
    ]  # fmt: skip
    return ["tokens", "method", "minus", *tasks, AVERAGE], body


def _lines(
    cells: Mapping[tuple, Result], tasks: Sequence[str], method: str, other: str, retain: int
) -> dict[str, tuple[list, list]]:
    """By task, the lines of two methods, for tasks that both have."""
    keys = {task: ((task, method, retain), (task, other, retain)) for task in tasks}
    return {task: tuple(cells[key].scored for key in both) for task, both in keys.items() if set(both) <= cells.keys()}


def _cells(results: Sequence[Result]) -> dict[tuple[str, str, int], Result]:
    models = sorted({result.row["model"] for result in results})
    if len(models) > 1:
        raise ValueError(f"--against: the results are of {' and '.join(models)}, expected those of one model")
    found: dict[tuple[str, str, int], Result] = {}
    for result in sorted(results, key=lambda one: one.row["seed"]):
        if result.row["method"] != VANILLA:
            found.setdefault((result.row["task"], result.row["method"], result.row["retain"]), result)
    return found
