"""Whether two methods differ on the same questions, beyond the luck of which questions were asked.

    mustdrop significance results --a mustdrop_64 --b vanilla --task mini_gqa

Without --a and --b, every method is compared with the untouched model and with the other methods at its budget. The
difference is that of the mean score per question, in percentage points, with a paired bootstrap interval. p is exact
McNemar's where scores are 0 or 1, that of a paired t-test where answers can be half right; Holm's correction is over
all comparisons of the table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import binomtest, ttest_rel
from tabulate import tabulate

from eval.report import against
from eval.report.pairing import holm, picture_numbers, question_pairs, question_scores
from eval.report.results import VANILLA, Result, collect, same_questions
from eval.run.rows import bootstrap_interval
from mustdrop.checks import shown
from mustdrop.command import Parser, command, path

LEVEL = 0.05
HEADERS = ("task", "a", "b", "n", "a %", "b %", "a - b", "95 % interval", "only a", "only b", "p", "p (Holm)", "")


@dataclass(frozen=True)
class Comparison:
    """Two methods on the questions that both answered.

    Attributes
    ----------
    n : int
        Number of these questions.
    score_a, score_b, difference : float
        Mean score per question in percent, and a minus b in percentage points.
    interval : tuple of float
        95 % interval of the difference.
    only_a, only_b : int
        Questions that a, or b, answered better.
    p : float
        Probability of a difference at least as large if the two were equally good.
    """

    n: int
    score_a: float
    score_b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p: float


def compare(a: Sequence[Mapping], b: Sequence[Mapping]) -> Comparison:
    """Compare two cells by their per-sample lines.

    The bootstrap draws pictures, where lines name them: questions about one picture are not independent.

    Raises
    ------
    ValueError
        If no question is in both, or lines have no score.
    """
    pairs = question_pairs(a, b)
    first, second = question_scores(pairs)
    better, picture = first - second, picture_numbers(pairs)
    sums, counts = np.bincount(picture, better), np.bincount(picture)
    low, high = bootstrap_interval(lambda drawn: sums[drawn].sum() / counts[drawn].sum(), len(sums))
    only_a, only_b = int((better > 0).sum()), int((better < 0).sum())
    if not better.any():
        p = 1.0
    elif np.isin([first, second], (0, 1)).all():
        p = binomtest(only_a, only_a + only_b).pvalue
    else:
        p = ttest_rel(first, second).pvalue
    return Comparison(
        len(pairs), 100 * first.mean(), 100 * second.mean(), 100 * better.mean(), (100 * low, 100 * high),
        only_a, only_b, float(p),
    )  # fmt: skip


def default_pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Every method against the untouched model, then methods with the same budget among each other.

    Pairs share model, task and seed.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(same_questions(result), []).append(result)
    pairs = []
    for group in groups.values():
        plain = [one for one in group if one.row["method"] == VANILLA]
        reduced = sorted((one for one in group if one not in plain), key=lambda one: -(one.row["retain"] or 0))
        pairs += [(one, base) for base in plain for one in reduced]
        pairs += [(one, two) for one, two in combinations(reduced, 2) if one.row["retain"] == two.row["retain"]]
    return pairs


def named_pairs(results: Sequence[Result], a: str, b: str) -> list[tuple[Result, Result]]:
    """All pairs of two labels that share model, task and seed.

    Raises
    ------
    ValueError
        If there is none.
    """
    known = sorted({result.label for result in results})
    for flag, name in (("--a", a), ("--b", b)):
        if name not in known:
            raise ValueError(f"{flag}: got {shown(name)}, expected one of {', '.join(known)}")
    pairs = [
        (one, two)
        for one in results
        for two in results
        if (one.label, two.label) == (a, b) and same_questions(one) == same_questions(two)
    ]
    if not pairs:
        raise ValueError(f"--a, --b: {a} and {b} have no task in common")
    return pairs


def comparable(results: Iterable[Result]) -> tuple[list[Result], list[str]]:
    """The results whose per-sample lines can be read, and a line for every other."""
    found, notes = [], []
    for result in results:
        try:
            _ = result.scored
            found.append(result)
        except ValueError as error:
            notes.append(f"{error}; it is left out")
    return found, notes


def table_rows(pairs: Sequence[tuple[Result, Result]]) -> list[list[str]]:
    """Compare pairs of cells; rows of text for the columns `HEADERS`, with Holm's correction over all of them.

    Raises
    ------
    ValueError
        If a cell's lines are missing or cannot be paired.
    """
    compared = []
    for one, two in pairs:
        try:
            compared.append(compare(one.scored, two.scored))
        except ValueError as error:
            raise ValueError(f"{one.row['task']}, {one.label} and {two.label}: {error}") from None
    corrected = holm([found.p for found in compared])
    return [
        [
            one.row["task"], _name(one), _name(two), str(found.n), f"{found.score_a:.1f}", f"{found.score_b:.1f}",
            f"{found.difference:+.1f}", f"{found.interval[0]:+.1f} to {found.interval[1]:+.1f}", str(found.only_a),
            str(found.only_b), f"{found.p:.2g}", f"{p:.2g}", "*" if p < LEVEL else "",
        ]
        for (one, two), found, p in zip(pairs, compared, corrected, strict=True)
    ]  # fmt: skip


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("significance", description=__doc__)
    new.add_argument("results", type=path, nargs="+", help="results folders")
    new.add_argument("--a", help="method and budget, such as mustdrop_64")
    new.add_argument("--b", help="what to compare it with (default: vanilla)")
    new.add_argument(
        "--against",
        metavar="METHOD",
        help="instead: every method against this one at every budget, on each task and on average; rival: against the "
        "best at each budget that is not MustDrop",
    )
    new.add_argument("--format", choices=("simple", "github"), default="simple", help="(default: %(default)s)")
    new.add_argument("--task", nargs="+", help="only these tasks of lmms-eval, such as mini_gqa")
    args = new.parse_args(argv)
    if args.b is not None and args.a is None:
        raise ValueError("--b: needs --a as well")
    if args.against is not None and args.a is not None:
        raise ValueError("--against: compares all methods; leave out --a and --b")
    results, notes = collect(args.results)
    tasks = sorted({result.row["task"] for result in results})
    for task in args.task or []:
        if task not in tasks:
            raise ValueError(f"--task: got {shown(task)}, expected some of {', '.join(tasks)}")
    results, unreadable = comparable(result for result in results if result.row["task"] in (args.task or tasks))
    for note in notes + unreadable:
        print(f"note: {note}", file=sys.stderr)
    if not results:
        raise ValueError("results: none has per-sample lines that can be compared")
    if args.against is not None:
        print(_against(results, args.against, args.format))
        return 0
    pairs = default_pairs(results) if args.a is None else named_pairs(results, args.a, args.b or VANILLA)
    rows = table_rows(pairs)
    print(
        tabulate(rows, HEADERS, tablefmt=args.format, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 10)
    )
    print(f"\n*: p < {LEVEL} after Holm's correction over {len(rows)} comparisons")
    return 0


def _against(results: Sequence[Result], reference: str, style: str) -> str:
    """The table of `eval.report.against` with what it means."""
    headers, body = against.table(against.against(results, reference))
    text = tabulate(body, headers, tablefmt=style, disable_numparse=True, colalign=("right", "left", "left"))
    chosen = "; the best rival was chosen on these very questions" if reference == against.RIVAL else ""
    return (
        f"{text}\n\nPercentage points of the mean score per question, paired, with 95 % bootstrap intervals over "
        f"pictures; the average is over tasks.\n*: p < {LEVEL} after Holm's correction over the averages{chosen}."
    )


def _name(result: Result) -> str:
    return f"{result.label}-seed{result.row['seed']}" if result.row["seed"] else result.label


if __name__ == "__main__":
    sys.exit(main())
