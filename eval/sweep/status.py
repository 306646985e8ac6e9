"""What has become of every cell: on the terminal while the sweep runs, and in ``sweep.json``."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

from eval.run.cell import Cell, write_json
from eval.run.records import read_record

STATES = ("failed", "running", "queued", "waiting", "finished")
"""In the order in which they are shown."""

COLOURS = {"failed": "red", "running": "cyan", "queued": "yellow", "waiting": "dim", "finished": "green"}


class Answers:
    """Counts the lines of a growing JSONL file without reading any twice."""

    def __init__(self, file: Path):
        self.file, self.count, self.read = file, 0, 0

    def update(self) -> int:
        """Questions answered so far."""
        try:
            if self.file.stat().st_size < self.read:  # written anew by a job that resumes
                self.count = self.read = 0
            with self.file.open("rb") as file:
                file.seek(self.read)
                while block := file.read(1 << 20):
                    self.count += block.count(b"\n")
                    self.read += len(block)
        except OSError:
            self.count = self.read = 0
        return self.count


class Entry:
    """A cell and what has become of it.

    Attributes
    ----------
    state : str
        One of `STATES`.
    job, log : str, pathlib.Path or None
        The last job it was given to.
    reason : str
        Why it failed.
    row : dict or None
        Its numbers, once it is finished.
    """

    def __init__(self, cell: Cell, out: Path, any_commit: bool = False):
        self.cell, self.key, self.out, self.file = cell, cell.key, out, cell.file(out)
        if any_commit and not cell.finished(out):
            self.file = cell.made_by_other_code(out) or self.file
        self.state, self.job, self.log, self.reason, self.row = "waiting", None, None, "", None
        self.answers = Answers(self.file.with_suffix(".jsonl"))

    @property
    def name(self) -> str:
        """As people call it."""
        return f"{self.cell.model_name} {self.cell.task} {self.cell.label}"

    def finished(self) -> bool:
        """Look for the result; nothing else tells that a cell is finished. What is no complete result is none."""
        if self.row is None and self.file.is_file() and self.defect() is None:
            self.row = {**read_record(self.file)["row"], "model": self.cell.model_name}
        return self.row is not None

    def defect(self) -> str | None:
        """What is wrong with what lies in the result's place."""
        return self.cell.defect(self.out) if self.file == self.cell.file(self.out) else None


class Board:
    """All cells of a sweep.

    Parameters
    ----------
    cells : sequence of Cell
        In the order of the plan.
    out : pathlib.Path
        Results folder.
    settings, provenance : dict
        For ``sweep.json``.
    any_commit : bool
        Whether results of other versions of the code count.
    """

    def __init__(self, cells: Sequence[Cell], out: Path, settings: dict, provenance: dict, any_commit: bool = False):
        self.out, self.settings, self.provenance = out, settings, provenance
        self.entries = {entry.key: entry for entry in (Entry(cell, out, any_commit) for cell in cells)}
        for entry in self.entries.values():
            if entry.finished():
                entry.state = "finished"
            else:
                entry.cell.check_place(out)
        self.earlier = self.counts["finished"]
        self.start = time.monotonic()
        self._console = None
        self._stack = ExitStack()

    def __enter__(self) -> Board:
        """Show a live table, if there is a terminal."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._console = Console(stderr=True)
            live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)
            self._stack.enter_context(live)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        self._console = None

    def tell_defects(self) -> None:
        """One line for everything that lies in a result's place and is none."""
        for entry in self.entries.values():
            if entry.state != "finished" and (defect := entry.defect()):
                self.say(f"note: {defect}; it is computed again")

    @property
    def counts(self) -> Counter:
        """Cells per state."""
        return Counter(entry.state for entry in self.entries.values())

    def set(self, entry: Entry, state: str, reason: str = "") -> None:
        """Note a change of state. Without a terminal it gets a line; a failure gets one in any case."""
        if entry.state == state:
            return
        entry.state, entry.reason = state, reason
        self.save()
        if reason or (self._console is None and state in ("running", "finished")):
            more = reason or (f"score {entry.row['score']:.1f}" if entry.row else "")
            place = f"{self.counts['finished']}/{len(self.entries)}"
            self.say(f"[{place}] {entry.name}: {state}" + (f" ({more})" if more else ""))

    def say(self, text: str) -> None:
        """A line on stderr, above the table where there is one."""
        if self._console is None:
            print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False)

    def save(self) -> None:
        """Write ``sweep.json``."""
        cells = [
            {
                "label": entry.cell.label,
                "task": entry.cell.task,
                "model": entry.cell.model_name,
                "method": entry.cell.method,
                "retain": entry.cell.retain,
                "seed": entry.cell.seed,
                "key": entry.key,
                "state": entry.state,
                "reason": entry.reason or None,
                "job": entry.job,
                "log": None if entry.log is None else str(entry.log),
                "file": str(entry.file),
            }
            for entry in self.entries.values()
        ]
        write_json(self.out / "sweep.json", {"settings": self.settings, "cells": cells, "provenance": self.provenance})

    def questions(self, entry: Entry) -> int | None:
        """How many questions a cell has, as far as it is known."""
        same = (other.row["n"] for other in self.entries.values() if other.row and other.cell.task == entry.cell.task)
        return next(same, entry.cell.limit)

    def progress(self) -> float:
        """Cells that have been finished since the start, with parts of those that are under way."""
        done = self.counts["finished"] - self.earlier
        for entry in self.entries.values():
            if entry.state == "running" and (total := self.questions(entry)):
                done += min(entry.answers.update() / total, 1)
        return done

    def summary(self) -> str:
        """One line: cells per state, time so far and time left."""
        counts, elapsed, done = self.counts, time.monotonic() - self.start, self.progress()
        states = ", ".join(f"{counts[state]} {state}" for state in reversed(STATES) if counts[state])
        left = len(self.entries) - self.earlier - counts["failed"] - done
        rest = f", about {_duration(elapsed * left / done)} left" if done and left > 0 else ""
        return f"{states}; {_duration(elapsed)}{rest}"

    def _render(self):
        """The live table: as many cells as fit, those that need attention first."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        room = max(self._console.height - 6, 3)
        shown = sorted(self.entries.values(), key=lambda entry: STATES.index(entry.state))
        table = Table(box=None, pad_edge=False)
        for heading in ("task", "method", "state", "questions", "score"):
            table.add_column(heading, justify="right" if heading in ("questions", "score") else "left", no_wrap=True)
        several = len({entry.cell.model_name for entry in shown}) > 1
        for entry in shown[:room]:
            total = self.questions(entry)
            table.add_row(
                f"{entry.cell.model_name} {entry.cell.task}" if several else entry.cell.task,
                entry.cell.label,
                Text(entry.state, style=COLOURS[entry.state]),
                f"{entry.answers.update()}/{total or '?'}" if entry.state == "running" else str(total or ""),
                f"{entry.row['score']:.1f}" if entry.row else "",
            )
        more = [f"... and {len(shown) - room} more"] if len(shown) > room else []
        return Group(table, *more, Text(self.summary()))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
