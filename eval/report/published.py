"""Figures that papers print, with their sources: ``published.yaml`` read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mustdrop.read import read_yaml

FILE = Path(__file__).with_suffix(".yaml")
VANILLA = "vanilla"
AVERAGE = "average"
"""The column of the mean share of vanilla."""


@dataclass(frozen=True)
class Column:
    """A benchmark in tables: its title, the decimals that papers print, and what is counted."""

    title: str
    decimals: int
    unit: str

    @property
    def rounding(self) -> float:
        """How far a printed figure may lie from what was measured: half a unit of its last digit."""
        return 0.5 * 10.0**-self.decimals


@dataclass(frozen=True)
class Row:
    """What one source prints for one method at one average number of vision tokens; ``values`` by column.

    ``judged`` says that a language model scored the answers.
    """

    method: str
    retain: int
    source: str
    values: dict[str, float]
    judged: bool = False


@dataclass(frozen=True)
class Model:
    """A model as papers call it, the checkpoints that are this model, and all rows about it."""

    title: str
    checkpoints: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def columns(self) -> list[str]:
        """Every column that some row has a figure for, in the papers' order."""
        return list(dict.fromkeys(column for row in self.rows for column in row.values))


@dataclass(frozen=True)
class Figure:
    """One printed figure and the paper it was read in."""

    value: float
    source: str


def find(model: str, column: str, method: str, retain: int | None) -> list[Figure]:
    """What papers print, one figure per source that prints one; papers differ about some methods.

    Parameters
    ----------
    model : str
        A name in ``published.yaml`` or that of one of its checkpoints; an unknown one has no published figures.
    column : str
        Benchmark, such as ``gqa``.
    method : str
        Name of a method, or ``vanilla``.
    retain : int or None
        Average number of vision tokens; not looked at for ``vanilla``.
    """
    return [Figure(row.values[column], row.source) for row in rows(model, method, retain) if column in row.values]


def rows(model: str, method: str, retain: int | None) -> list[Row]:
    """The published rows of a method, one per source; the parameters are those of `find`."""
    name = canonical(model)
    if name is None:
        return []
    found = (row for row in models()[name].rows if row.method == method)
    return [row for row in found if method == VANILLA or row.retain == retain]


def canonical(model: str) -> str | None:
    """The papers' name of a model or of a checkpoint; None if nothing is published about it."""
    return next((name for name, facts in models().items() if model == name or model in facts.checkpoints), None)


def columns() -> dict[str, Column]:
    """All columns by name."""
    return _read(FILE)[0]


def models() -> dict[str, Model]:
    """All models by name."""
    return _read(FILE)[1]


@cache
def _read(file: Path) -> tuple[dict[str, Column], dict[str, Model]]:
    content = read_yaml(file)
    known = {name: Column(**facts) for name, facts in content["columns"].items()}
    found = {}
    for name, facts in content["models"].items():
        listed = tuple(Row(**row) for row in facts["rows"])
        for row in listed:
            _check(row, known, f"{file.name}: {name}, {row.method} at {row.retain}")
        found[name] = Model(facts["title"], tuple(facts["checkpoints"]), listed)
    return known, found


def _check(row: Row, known: dict[str, Column], where: str) -> None:
    if not row.source:
        raise ValueError(f"{where}: source is {row.source!r}, expected the paper that prints the row")
    for column, value in row.values.items():
        if column not in known:
            raise ValueError(f"{where}: {column} is no column, expected one of {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {column} is {value!r}, expected a number")
