"""Whether two methods differ on the same questions, beyond the luck of which questions were asked.

    mustdrop significance results --a mustdrop_64 --b vanilla --task mini_gqa

Without --a and --b, every method is compared with the untouched model and with the other methods at its budget. The
difference is that of the mean score per question, in percentage points, with a paired bootstrap interval over images. p
is McNemar's exact test on the questions that one of the two answered better; Holm's correction is over all comparisons
of the table.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import pandas as pd
from tabulate import tabulate

from eval.report.published import AVERAGE
from eval.report.results import VANILLA, load, records
from eval.statistics import LEVEL, Comparison, compare, holm, over_tasks
from mustdrop.checks import shown
from mustdrop.command import Parser, command, path

HEADERS = ("task", "a", "b", "n", "a %", "b %", "a - b", "95 % interval", "only a", "only b", "p", "p (Holm)", "")
RIVAL = "rival"
"""Stands for the best method, at each budget, that is not MustDrop."""

OURS = "mustdrop"

Pair = tuple[dict, dict]
"""Two rows of a frame of results."""


def default_pairs(frame: pd.DataFrame) -> list[Pair]:
    """Every method against the untouched model, then methods with the same budget among each other.

    Pairs share model, task and seed.
    """
    pairs = []
    for _, group in frame.groupby("questions", sort=False):
        plain = records(group[group.method == VANILLA])
        reduced = sorted(records(group[group.method != VANILLA]), key=lambda row: -(row["retain"] or 0))
        pairs += [(one, base) for base in plain for one in reduced]
        pairs += [(one, two) for one, two in combinations(reduced, 2) if one["retain"] == two["retain"]]
    return pairs


def named_pairs(frame: pd.DataFrame, a: str, b: str) -> list[Pair]:
    """All pairs of two labels that share model, task and seed.

    Raises
    ------
    ValueError
        If there is none.
    """
    known = sorted(set(frame.label))
    for flag, name in (("--a", a), ("--b", b)):
        if name not in known:
            raise ValueError(f"{flag}: got {shown(name)}, expected one of {', '.join(known)}")
    both = product(*(records(frame[frame.label == name]) for name in (a, b)))
    pairs = [(one, two) for one, two in both if one["questions"] == two["questions"]]
    if not pairs:
        raise ValueError(f"--a, --b: {a} and {b} have no task in common")
    return pairs


def comparable(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The results whose per-sample lines can be read, and a line for every other."""
    fine, notes = [], []
    for samples in frame.samples:
        try:
            _ = samples.scores
            fine.append(True)
        except ValueError as error:
            fine.append(False)
            notes.append(f"{error}; it is left out")
    return frame[fine], notes


def table_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """Compare pairs of results; rows of text for the columns `HEADERS`, with Holm's correction over all of them.

    Raises
    ------
    ValueError
        If lines are missing or cannot be paired.
    """
    compared = [_compared(one, two) for one, two in pairs]
    return [
        [
            one["task"], _name(one), _name(two), str(found.n), f"{found.score_a:.1f}", f"{found.score_b:.1f}",
            f"{found.difference:+.1f}", "{:+.1f} to {:+.1f}".format(*found.interval), str(found.only_a),
            str(found.only_b), f"{found.p:.2g}", f"{p:.2g}", "*" if p < LEVEL else "",
        ]
        for (one, two), found, p in zip(pairs, compared, holm([found.p for found in compared]), strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class Against:
    """A method at a budget against a reference: per task, and on all tasks, None unless it has a result on each."""

    method: str
    reference: str
    retain: int
    tasks: dict[str, Comparison]
    average: Comparison | None


def against(frame: pd.DataFrame, reference: str) -> list[Against]:
    """All methods against one of them, by budget from many tokens to few.

    Parameters
    ----------
    frame : pandas.DataFrame
        Results of one model; of several seeds the first counts.
    reference : str
        A method, or `RIVAL`. Budgets at which it has no result are left out.

    Raises
    ------
    ValueError
        If the method has no results, or results are of several models.
    """
    first = _first_seeds(frame)
    tasks, methods = sorted(set(first.task)), sorted(set(first.method))
    if reference not in (*methods, RIVAL):
        raise ValueError(f"--against: got {shown(reference)}, expected {RIVAL} or one of {', '.join(methods)}")
    found = []
    for retain, here in sorted(first.groupby("retain"), key=lambda group: -group[0]):
        other = best_rival(here, len(tasks)) if reference == RIVAL else reference
        theirs = here[here.method == other]
        others = here[here.method != other].groupby("method") if len(theirs) else ()
        found += [Against(method, other, retain, *_by_task(mine, theirs, tasks)) for method, mine in others]
    return found


def leaders(frame: pd.DataFrame, tasks: Sequence[str], ranked: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
    """Methods at their budgets that no other is known to surpass.

    Parameters
    ----------
    frame : pandas.DataFrame
        Results of one model.
    tasks : sequence of str
        What the average is over.
    ranked : sequence of (method, budget)
        The best first within a budget, only such as have all tasks.

    Returns
    -------
    set of (method, budget)
        The first of every budget, and those whose paired interval to it holds 0.
    """
    groups = dict(iter(_first_seeds(frame).groupby(["method", "retain"])))
    best: dict[int, str] = {}
    for method, retain in ranked:
        best.setdefault(retain, method)

    def level(method: str, retain: int) -> bool:
        low, high = _by_task(groups[method, retain], groups[best[retain], retain], tasks)[1].interval
        return low <= 0 <= high

    return {(method, retain) for method, retain in ranked if method == best[retain] or level(method, retain)}


def best_rival(here: pd.DataFrame, tasks: int) -> str | None:
    """The method with the highest mean accuracy over all tasks that is not MustDrop, alone or with others."""
    rivals = here[[OURS not in method for method in here.method]].astype({"accuracy": float})
    means = rivals.groupby("method").accuracy.agg(["mean", "size"])
    means = means[means["size"] == tasks]["mean"]
    return None if means.empty else means.idxmax()


def against_table(rows: Sequence[Against]) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text; a star where Holm's correction over all averages leaves p below `LEVEL`."""
    tasks = sorted({task for row in rows for task in row.tasks})
    given = [row for row in rows if row.average is not None]
    corrected = dict(zip(map(id, given), holm([row.average.p for row in given]), strict=True))
    body = [
        [
            str(row.retain), row.method, row.reference, *(str(row.tasks.get(task, "-")) for task in tasks),
            "-" if row.average is None else f"{row.average}{'*' if corrected[id(row)] < LEVEL else ''}",
        ]
        for row in rows
    ]  # fmt: skip
    return ["tokens", "method", "minus", *tasks, AVERAGE], body


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
    frame, notes = load(args.results)
    tasks = sorted(set(frame.task))
    for task in args.task or []:
        if task not in tasks:
            raise ValueError(f"--task: got {shown(task)}, expected some of {', '.join(tasks)}")
    frame, unreadable = comparable(frame[frame.task.isin(args.task or tasks)])
    for note in notes + unreadable:
        print(f"note: {note}", file=sys.stderr)
    if frame.empty:
        raise ValueError("results: none has per-sample lines that can be compared")
    if args.against is not None:
        print(_against(frame, args.against, args.format))
        return 0
    pairs = default_pairs(frame) if args.a is None else named_pairs(frame, args.a, args.b or VANILLA)
    rows = table_rows(pairs)
    print(
        tabulate(rows, HEADERS, tablefmt=args.format, disable_numparse=True, colalign=("left",) * 3 + ("right",) * 10)
    )
    print(f"\n*: p < {LEVEL} after Holm's correction over {len(rows)} comparisons")
    return 0


def _against(frame: pd.DataFrame, reference: str, style: str) -> str:
    """Every method against one of them, with what the table means."""
    headers, body = against_table(against(frame, reference))
    text = tabulate(body, headers, tablefmt=style, disable_numparse=True, colalign=("right", "left", "left"))
    chosen = "; the best rival was chosen on these very questions" if reference == RIVAL else ""
    return (
        f"{text}\n\nPercentage points of the mean score per question, paired, with 95 % bootstrap intervals over "
        f"pictures; the average is over tasks.\n*: p < {LEVEL} after Holm's correction over the averages{chosen}."
    )


def _by_task(
    mine: pd.DataFrame, theirs: pd.DataFrame, tasks: Sequence[str]
) -> tuple[dict[str, Comparison], Comparison | None]:
    """Two methods on each task that both have, and on all `tasks` together where these are all there."""
    ours, others = ({row["task"]: row for row in records(frame)} for frame in (mine, theirs))
    found = {task: _compared(ours[task], others[task]) for task in tasks if task in ours and task in others}
    return found, over_tasks(list(found.values())) if len(found) == len(tasks) else None


def _compared(one: Mapping, two: Mapping) -> Comparison:
    try:
        return compare(one["samples"].scores, two["samples"].scores)
    except ValueError as error:
        raise ValueError(f"{one['task']}, {one['label']} and {two['label']}: {error}") from None


def _first_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    models = sorted(set(frame.model))
    if len(models) > 1:
        raise ValueError(f"--against: the results are of {' and '.join(models)}, expected those of one model")
    reduced = frame[frame.method != VANILLA].sort_values("seed", kind="stable")
    return reduced.drop_duplicates(["task", "method", "retain"])


def _name(row: Mapping) -> str:
    return f"{row['label']}-seed{row['seed']}" if row["seed"] else row["label"]


if __name__ == "__main__":
    sys.exit(main())
