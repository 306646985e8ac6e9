"""Figures that papers print, with their sources: ``published.yaml`` read and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import hypot
from pathlib import Path
from statistics import fmean

from mustdrop.read import read_yaml

FILE = Path(__file__).with_suffix(".yaml")
VANILLA = "vanilla"
AVERAGE = "average"
"""The column of the mean share of vanilla."""


@dataclass(frozen=True)
class Column:
    """A benchmark in tables: its title, the decimals that papers print, what is counted, and whose mean it is."""

    title: str
    decimals: int
    unit: str
    mean_of: tuple[str, ...] = ()

    @property
    def rounding(self) -> float:
        """How far a printed figure may lie from what was measured: half a unit of its last digit."""
        return 0.5 * 10.0**-self.decimals


@dataclass(frozen=True)
class Row:
    """What one source prints for one method at one average number of vision tokens; ``values`` by column.

    ``retain`` is None for a method without a budget. ``judged`` says that a language model scored the answers.
    """

    method: str
    retain: int | None
    source: str
    values: dict[str, float]
    judged: bool = False


@dataclass(frozen=True)
class Share:
    """Percent of vanilla that one source prints for a method at some retentions, over benchmarks of its own choice."""

    method: str
    source: str
    retain: list[int]
    values: list[float]

    def at(self, budgets: Collection[int]) -> dict[int, float]:
        """What is printed at some of the numbers of tokens."""
        return {retain: value for retain, value in zip(self.retain, self.values, strict=True) if retain in budgets}


@dataclass(frozen=True)
class Model:
    """A model as papers call it, the checkpoints that are this model, all rows about it, and shares beside them."""

    title: str
    checkpoints: tuple[str, ...]
    rows: tuple[Row, ...]
    shares: tuple[Share, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Every column that some row has a figure for, in the papers' order."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))


def rows(model: str, method: str, retain: int | None) -> list[Row]:
    """What papers print about a method, one row per source that prints one; papers differ about some methods.

    Parameters
    ----------
    model : str
        A name in ``published.yaml`` or that of one of its checkpoints; an unknown one has no published figures.
    method : str
        Name of a method, or ``vanilla``.
    retain : int or None
        Average number of vision tokens; not looked at for ``vanilla``.
    """
    name = canonical(model)
    if name is None:
        return []
    found = (row for row in models()[name].rows if row.method == method)
    return [row for row in found if method == VANILLA or row.retain == retain]


def shares(model: str) -> tuple[Share, ...]:
    """Shares of vanilla that papers print of a model beside their figures."""
    name = canonical(model)
    return models()[name].shares if name else ()


def canonical(model: str) -> str | None:
    """The papers' name of a model or of a checkpoint; None if nothing is published about it."""
    return next((name for name, facts in models().items() if model == name or model in facts.checkpoints), None)


def is_of(found: str, wanted: str) -> bool:
    """Whether a checkpoint is the one that is wanted, or one of those that papers call so."""
    return found == wanted or (wanted in models() and found in models()[wanted].checkpoints)


def with_means(ours: Mapping[str, Mapping], names: Collection[str]) -> dict[str, Mapping]:
    """Our rows by column, and of the columns `names` those that are means of others which are all there.

    Numbers are averaged, questions counted together, intervals joined as those of independent benchmarks.
    """
    parts = {name: [ours.get(part) for part in known.mean_of] for name, known in columns().items() if name in names}
    return {**ours, **{name: _mean(name, rows) for name, rows in parts.items() if rows and all(rows)}}


def _mean(name: str, rows: Sequence[Mapping]) -> dict:
    def mean(key: str) -> object:
        values = [row[key] for row in rows]
        if all(type(value) in (int, float) for value in values):
            return fmean(values)
        return None if None in values else values[0]

    score = fmean(row["score"] for row in rows)
    below, above = (hypot(*(row["score_ci95"][end] - row["score"] for row in rows)) / len(rows) for end in (0, 1))
    own = {"task": name, "benchmark": name, "n": sum(row["n"] for row in rows), "seeds": rows[0]["seeds"]}
    return {**{key: mean(key) for key in rows[0]}, **own, "score_ci95": [score - below, score + above]}


def columns() -> dict[str, Column]:
    """All columns by name."""
    return _read(FILE)[0]


def models() -> dict[str, Model]:
    """All models by name."""
    return _read(FILE)[1]


@cache
def _read(file: Path) -> tuple[dict[str, Column], dict[str, Model]]:
    content = read_yaml(file)
    known = {
        name: Column(**{**facts, "mean_of": tuple(facts.get("mean_of", ()))})
        for name, facts in content["columns"].items()
    }
    found = {}
    for name, facts in content["models"].items():
        listed = tuple(Row(**row) for row in facts["rows"])
        for row in listed:
            _check(row, known, f"{file.name}: {name}, {row.method} at {row.retain}")
        shares = tuple(Share(**share) for share in facts.get("shares", ()))
        for share in shares:
            _check_share(share, f"{file.name}: {name}, shares, {share.method}")
        found[name] = Model(facts["title"], tuple(facts["checkpoints"]), listed, shares)
    return known, found


def _check(row: Row, known: dict[str, Column], where: str) -> None:
    for column in row.values:
        if column not in known:
            raise ValueError(f"{where}: {column} is no column, expected one of {', '.join(known)}")
    _check_figures(row.source, row.values, where)


def _check_share(share: Share, where: str) -> None:
    if len(share.retain) != len(share.values) or not all(type(retain) is int and retain > 0 for retain in share.retain):
        raise ValueError(f"{where}: retain is {share.retain!r}, expected a number of vision tokens for each value")
    _check_figures(share.source, share.at(share.retain), where)


def _check_figures(source: str, values: Mapping[str | int, float], where: str) -> None:
    if not source:
        raise ValueError(f"{where}: source is {source!r}, expected the paper that prints the row")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name} is {value!r}, expected a number")
