"""What a table shows and what there is for it: a checked layout, our rows and the published ones."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from statistics import fmean

import pandas as pd

from eval.checkpoints import is_embedded
from eval.methods import CONFIGS
from eval.report import published
from eval.report.published import AVERAGE
from eval.report.results import COSTS, VANILLA, over_seeds, records
from eval.tasks.registry import TASKS
from mustdrop.checks import LONGEST, hint, shown
from mustdrop.command import LARGEST
from mustdrop.read import read_yaml

SHOW = ("ours", "published", "difference")
SHOWN_COSTS = {cost.table[0]: (cost.table[1], column) for column, cost in COSTS.items() if cost.table}
"""What a layout's `costs` may name: its heading, and the column of the frame."""


@dataclass(frozen=True)
class Layout:
    """What a table shows; the keys of its YAML file.

    Attributes
    ----------
    title : str
        Heading.
    model : str, optional
        As ``published.yaml`` or its results call it. What is left out here and below is taken from the results.
    columns : tuple of str, optional
        Benchmarks (``gqa``), or tasks of lmms-eval (``mini_gqa``).
    budgets : tuple of int, optional
        Average numbers of vision tokens.
    methods : tuple of str, optional
        Names, without ``vanilla``, which always comes first. If left out, the best average of a budget comes first, and
        methods whose number of tokens is none of the budgets come last.
    show : tuple of str
        Some of ``ours``, ``published`` and ``difference``.
    costs : tuple of str
        Some of ``tokens``, ``flops`` and ``time``, means over the columns.
    notes : tuple of str
        Sentences for below the table.
    """

    title: str
    model: str | None = None
    columns: tuple[str, ...] | None = None
    budgets: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    show: tuple[str, ...] = SHOW
    costs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableRow:
    """One method at one budget: our rows by column, and the rows that papers print, one per source."""

    method: str
    retain: int | None
    ours: dict[str, dict]
    printed: list[published.Row]

    def difference(self, column: str, row: published.Row) -> float | None:
        """Ours minus published, None where either is missing or they were scored in different ways."""
        if column not in self.ours or column not in row.values or self.ours[column]["synthetic"]:
            return None
        if row.judged and not TASKS[self.ours[column]["task"]].judge:
            return None
        return self.ours[column]["score"] - row.values[column]

    def beyond_noise(self, column: str, row: published.Row) -> bool | None:
        """Whether a published figure lies outside our 95 % interval, widened by the rounding of what was printed."""
        if self.difference(column, row) is None:
            return None
        low, high = self.ours[column]["score_ci95"]
        rounding = published.columns()[column].rounding
        return not low - rounding <= row.values[column] <= high + rounding

    def shares(self) -> dict[str, float]:
        """Percent of vanilla by column, where ours and the untouched model's are there."""
        return {column: row["share"] for column, row in self.ours.items() if row["share"] is not None}

    def cost(self, name: str) -> float | None:
        """One of `SHOWN_COSTS`, the mean over our rows; None where one does not have it."""
        values = [row[SHOWN_COSTS[name][1]] for row in self.ours.values()]
        return fmean(values) if values and None not in values else None


def read_layout(path: Path, found: Iterable[str] = ()) -> Layout:
    """Read and check a table's YAML file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    found : iterable of str
        Names of methods that are known from results.

    Raises
    ------
    ValueError
        With one line that names the key, the value and what would be right.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; a table is YAML with the keys {', '.join(_KEYS)}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a mapping with the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ValueError(f"{path}: {key[:LONGEST]} is no key of a table{hint(key, _KEYS)}; its keys are {known}")
    for key, field in _KEYS.items():
        if key not in content and field.default is MISSING:
            raise ValueError(f"{path}: {key} is missing")
    for key, value in content.items():
        _check_type(path, key, value)
    layout = Layout(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    if layout.columns and layout.model:
        _check_names(path, "columns", layout.columns, known_columns(layout.model))
    _check_names(path, "show", layout.show, SHOW)
    _check_names(path, "costs", layout.costs, list(SHOWN_COSTS))
    _check_names(path, "methods", layout.methods or (), _known_methods(layout.methods or (), found))
    return layout


def complete(layout: Layout, frame: pd.DataFrame) -> Layout:
    """The layout with model, columns and budgets taken from the results where it leaves them out.

    Raises
    ------
    ValueError
        If the results are of several models, or there are none.
    """
    models = [] if frame.empty else sorted(set(frame.model))
    if layout.model is None and len(models) != 1:
        raise ValueError(f"model: the table leaves it out, and the results are of {' and '.join(models) or 'none'}")
    model = layout.model or models[0]
    mine = [] if frame.empty else records(frame[_of_model(frame, model)])
    if models and not mine and published.canonical(model) is None and not is_embedded(model):
        known = ", ".join(dict.fromkeys([*models, *published.models()]))
        raise ValueError(f"model: got {shown(model)}, without results or published figures, expected {known}")
    tasks = sorted({row["task"] if row["synthetic"] else row["benchmark"] for row in mine})
    budgets = sorted({row["retain"] for row in mine if row["method"] != VANILLA}, reverse=True)
    return replace(
        layout, model=model, columns=layout.columns or tuple(tasks), budgets=layout.budgets or tuple(budgets)
    )


_KEYS = {field.name: field for field in fields(Layout)}


def known_columns(model: str) -> list[str]:
    """Benchmarks and tasks that a table of a model can have."""
    from eval.tasks import BENCHMARKS, LOCAL

    name = published.canonical(model)
    printed = published.models()[name].columns if name else []
    ours = [task for key, benchmark in BENCHMARKS.items() for task in (key, benchmark.mini, benchmark.stock)]
    return [column for column in dict.fromkeys([*printed, *ours, *LOCAL]) if column != AVERAGE]


def table_rows(layout: Layout, frame: pd.DataFrame) -> list[TableRow]:
    """Vanilla, then every method at every budget, of a `complete` layout.

    Raises
    ------
    ValueError
        If results of two checkpoints both are the layout's model.
    """
    rows = [] if frame.empty else records(over_seeds(frame[_of_model(frame, layout.model)]))
    models = sorted({row["model"] for row in rows})
    if len(models) > 1:
        raise ValueError(
            f"model: the results hold {' and '.join(models)}, which all are {layout.model}; name one of them"
        )
    found = []
    for method, retain in [(VANILLA, None), *_wanted(layout, rows)]:
        mine = [row for row in rows if row["method"] == method and retain in (None, row["retain"])]
        ours = {column: row for column in layout.columns for row in mine if _fills(row, column)}
        ours = published.with_means(ours, layout.columns)
        printed = published.rows(layout.model, method, retain)
        found.append(TableRow(method, retain, ours, [row for row in printed if set(row.values) & set(layout.columns)]))
    return found if layout.methods else _best_first(layout, found)


def _wanted(layout: Layout, rows: Sequence[Mapping]) -> list[tuple[str, int | None]]:
    """Methods and budgets of a table's lines."""
    pairs = sorted({(row["method"], row["retain"]) for row in rows if row["method"] != VANILLA})
    methods = layout.methods or list(dict.fromkeys(method for method, retain in pairs if retain in layout.budgets))
    others = [] if layout.methods else [pair for pair in pairs if pair[0] not in methods]
    alone = [method for method in methods if published.rows(layout.model, method, None)]  # without a budget
    budgeted = [(method, budget) for budget in layout.budgets for method in methods if method not in alone]
    return [*budgeted, *((method, None) for method in alone), *others]


def _best_first(layout: Layout, found: Sequence[TableRow]) -> list[TableRow]:
    """The lines in the order of their averages, budget by budget; those that lack a column last."""
    place = {budget: number for number, budget in enumerate((None, *layout.budgets))}

    def rank(line: TableRow) -> tuple:
        shares = line.shares().values()
        whole = len(shares) == len(layout.columns)
        return place.get(line.retain, len(place)), not whole, -fmean(shares) if shares else 0.0

    return sorted(found, key=rank)


def _of_model(frame: pd.DataFrame, wanted: str) -> pd.Series:
    """Which results are of a model, or of a checkpoint that papers call so."""
    return frame.model.map(lambda found: published.is_of(found, wanted))


def _fills(row: Mapping, column: str) -> bool:
    """Whether a row belongs into a column: a synthetic one only under its own name."""
    return row["task"] == column or (row["benchmark"] == column and not row["synthetic"])


def printed_shares(row: published.Row, model: str, columns: Sequence[str]) -> dict[str, float]:
    """Percent of the published vanilla by column."""
    base = published.rows(model, VANILLA, None)[0].values
    return {column: 100 * row.values[column] / base[column] for column in columns if column in row.values}


def printed_average(row: published.Row, model: str, columns: Sequence[str]) -> float:
    """The average share that a source prints for exactly these columns, else the one that its figures give."""
    if AVERAGE in row.values and set(columns) == set(row.values) - {AVERAGE}:
        return row.values[AVERAGE]
    return fmean(printed_shares(row, model, columns).values())


def average_difference(layout: Layout, line: TableRow, row: published.Row) -> tuple[float | None, int]:
    """Our average share of vanilla minus the published one, over the columns that both have; how many these are."""
    ours = {column: share for column, share in line.shares().items() if line.difference(column, row) is not None}
    theirs = printed_shares(row, layout.model, list(ours))
    return (fmean(ours.values()) - printed_average(row, layout.model, list(ours)) if ours else None), len(theirs)


def _check_type(path: Path, key: str, value: object) -> None:
    if key in ("title", "model"):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}: {key} is {shown(value)}, expected text")
        return
    kind, what = (int, "whole numbers above 0") if key == "budgets" else (str, "texts" if key == "notes" else "names")
    fine = (
        isinstance(value, list)
        and value
        and all(isinstance(item, kind) and not isinstance(item, bool) and item for item in value)
    )
    if not fine or (kind is int and not 1 <= min(value) <= max(value) <= LARGEST):
        raise ValueError(f"{path}: {key} is {shown(value)}, expected a list of {what}")
    double = next((item for item in value if value.count(item) > 1), None)
    if double is not None:
        raise ValueError(f"{path}: {key} has {shown(double)} twice")


def _check_names(path: Path, key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{path}: {key} has {shown(name)}{hint(name, known)}, expected some of {', '.join(known)}")


def _known_methods(wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    """Methods with published figures, with results, or with a file, which may compose others.

    The registry, whose import takes seconds, is only asked about what is none of these.
    """
    known = {row.method for model in published.models().values() for row in model.rows} | set(found)
    known |= {re.sub(r"_\d+$", "", file.stem) for file in CONFIGS.rglob("*.yaml")}
    if not set(wanted) <= known:
        from mustdrop.registry import available_methods

        known.update(available_methods())
    return sorted(known - {VANILLA})
