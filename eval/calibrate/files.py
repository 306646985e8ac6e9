"""The YAML file of a method's calibrated settings: one entry of ``at`` for every budget, with where it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from eval.provenance import replace_file
from mustdrop.checks import shown
from mustdrop.config import budgets_of, read_settings

ENTRY = re.compile(r"  (\S+): \{.*\}")


@dataclass
class MethodFile:
    """A method's file as text, so that what calibration did not find stays as it was written.

    Parameters
    ----------
    path : Path
        Where it is, or will be.
    head : list of str
        The lines up to ``at:``.
    entries : dict of str to list of str
        The lines of every budget: comments, then its fields on one line.
    """

    path: Path
    head: list[str]
    entries: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, method: str, model: str) -> MethodFile:
        """What there is of the file; a new one if there is none.

        Raises
        ------
        ValueError
            If it is another method's, or has more than entries of one line to be added to.
        """
        title = f"# {method} on {_line(model)}: vision tokens per decoder layer, by the authors' meter -> the settings."
        if not os.path.lexists(path):
            return cls(path, [title, f"method: {method}", "at:"])
        settings = read_settings(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        found = cls(path, lines[: lines.index("at:") + 1] if "at:" in lines else lines)
        waiting: list[str] = []
        for line in lines[len(found.head) :]:
            waiting.append(line)
            if entry := ENTRY.fullmatch(line):
                found.entries[entry[1]], waiting = waiting, []
        whole = settings.keys() == {"method", "at"} and list(budgets_of(settings)) == list(found.entries)
        if settings.get("method") != method or not whole or waiting:
            right = f"method: {method} and, under at, every budget's fields on one line"
            raise ValueError(f"out: {shown(str(path))} cannot be added to, it must have {right}; move it away")
        return found

    def add(self, budget: int, fields: dict, notes: Sequence[str]) -> None:
        """Put a budget's fields in the place of what it had, or among the others: the largest budget comes first."""
        flow = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
        self.entries[str(budget)] = [*(f"  # {_line(note)}" for note in notes), f"  {budget}: {flow}"]
        self.entries = dict(sorted(self.entries.items(), key=lambda entry: -float(entry[0])))

    def write(self) -> None:
        """Write the file in one step."""
        lines = [*self.head, *(line for entry in self.entries.values() for line in entry)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, ("\n".join(lines) + "\n").encode())


def _line(text: str) -> str:
    return " ".join(text.split())
