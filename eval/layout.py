"""What a table shows and what there is for it: a checked layout, our rows and the published ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from statistics import fmean

from eval import published
from eval.collect import VANILLA, Result, merge_seeds
from eval.published import AVERAGE

SHOW = ("ours", "published", "difference")


@dataclass(frozen=True)
class Layout:
    """What a table shows; the keys of its YAML file.

    Attributes
    ----------
    title, model : str
        Heading, and the model as ``eval/published.yaml`` or its results call it.
    columns : tuple of str
        Benchmarks (``gqa``), or tasks of lmms-eval (``mini_gqa``).
    budgets : tuple of int
        Average numbers of vision tokens.
    methods : tuple of str
        Names, without ``vanilla``, which always comes first.
    show : tuple of str
        Some of ``ours``, ``published`` and ``difference``.
    """

    title: str
    model: str
    columns: tuple[str, ...]
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    show: tuple[str, ...] = SHOW


@dataclass(frozen=True)
class Line:
    """One method at one budget: our rows by column, and the rows that papers print, one per source."""

    method: str
    retain: int | None
    ours: dict[str, dict]
    printed: list[published.Row]

    def difference(self, column: str, row: published.Row) -> float | None:
        """Ours minus published, None where either is missing."""
        if column not in self.ours or column not in row.values or self.ours[column]["synthetic"]:
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
        shares = {column: row["share_of_vanilla"] for column, row in self.ours.items()}
        return {column: 100 * share for column, share in shares.items() if share is not None}


def read_layout(path: Path) -> Layout:
    """Read and check a table's YAML file.

    Raises
    ------
    ValueError
        With one line that names the key, the value and what would be right.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: no such file; a table is YAML with the keys {', '.join(_KEYS)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a mapping with the keys {', '.join(_KEYS)}")
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"{path}: {key} is no key of a table{_hint(key, _KEYS)}; its keys are {', '.join(_KEYS)}")
    for key, field in _KEYS.items():
        if key not in content and field.default is MISSING:
            raise ValueError(f"{path}: {key} is missing")
    for key, value in content.items():
        _check_type(path, key, value)
    layout = Layout(**{key: tuple(value) if isinstance(value, list) else value for key, value in content.items()})
    _check_names(path, "columns", layout.columns, known_columns(layout.model))
    _check_names(path, "show", layout.show, SHOW)
    _check_names(path, "methods", layout.methods, _known_methods(layout.methods))
    return layout


_KEYS = {field.name: field for field in fields(Layout)}


def known_columns(model: str) -> list[str]:
    """Benchmarks and tasks that a table of a model can have."""
    from eval.tasks import BENCHMARKS

    name = published.canonical(model)
    printed = published.models()[name].columns if name else []
    ours = [task for key, benchmark in BENCHMARKS.items() for task in (key, benchmark.mini, benchmark.stock)]
    return [column for column in dict.fromkeys([*printed, *ours]) if column != AVERAGE]


def lines(layout: Layout, results: Iterable[Result]) -> list[Line]:
    """Vanilla, then every method at every budget.

    Raises
    ------
    ValueError
        If results of two checkpoints both are the layout's model.
    """
    rows = [row for row in merge_seeds(results) if _same_model(row["model"], layout.model)]
    models = sorted({row["model"] for row in rows})
    if len(models) > 1:
        raise ValueError(
            f"model: the results hold {' and '.join(models)}, which all are {layout.model}; name one of them"
        )
    wanted = [(VANILLA, None), *((method, budget) for budget in layout.budgets for method in layout.methods)]
    found = []
    for method, retain in wanted:
        mine = [row for row in rows if row["method"] == method and retain in (None, row["retain"])]
        ours = {column: row for column in layout.columns for row in mine if _fills(row, column)}
        printed = published.rows(layout.model, method, retain)
        found.append(Line(method, retain, ours, [row for row in printed if set(row.values) & set(layout.columns)]))
    return found


def _same_model(found: str, wanted: str) -> bool:
    name = published.canonical(wanted)
    return found == wanted or (wanted == name and published.canonical(found) == name)


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


def average_difference(layout: Layout, line: Line, row: published.Row) -> tuple[float | None, int]:
    """Our average share of vanilla minus the published one, over the columns that both have; how many these are."""
    ours = {column: share for column, share in line.shares().items() if line.difference(column, row) is not None}
    theirs = printed_shares(row, layout.model, list(ours))
    return (fmean(ours.values()) - printed_average(row, layout.model, list(ours)) if ours else None), len(theirs)


def _check_type(path: Path, key: str, value: object) -> None:
    if key in ("title", "model"):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}: {key} is {value!r}, expected text")
        return
    kind, what = (int, "whole numbers above 0") if key == "budgets" else (str, "names")
    fine = (
        isinstance(value, list)
        and value
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
    if not fine or (kind is int and min(value) < 1):
        raise ValueError(f"{path}: {key} is {value!r}, expected a list of {what}")
    double = next((item for item in value if value.count(item) > 1), None)
    if double is not None:
        raise ValueError(f"{path}: {key} has {double!r} twice")


def _check_names(path: Path, key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{path}: {key} has {name!r}{_hint(name, known)}, expected some of {', '.join(known)}")


def _known_methods(wanted: Iterable[str]) -> list[str]:
    """Methods with published figures; the registry, whose import takes seconds, is only asked about others."""
    known = {row.method for model in published.models().values() for row in model.rows}
    if not set(wanted) <= known:
        from mustdrop.registry import available_methods

        known.update(available_methods())
    return sorted(known - {VANILLA})


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
