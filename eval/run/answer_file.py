"""The answers of an evaluation as they come: in memory, and line by line in a JSONL file from which one can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from eval.provenance import naming_file
from eval.run.records import read_answers
from eval.run.samples import write_lines


class AnswerFile:
    """The lines of one process.

    Parameters
    ----------
    file : Path or None
        Where they are kept; None keeps them in memory alone.
    resume : bool
        Whether answers that the file holds count. Whatever else it holds is thrown away.
    """

    def __init__(self, file: Path | None, resume: bool = False):
        self.file, self.records = file, []
        self.known: dict[tuple, dict] = {}
        if file is not None:
            lines = [line for line in read_answers(file) if "skipped" not in line] if resume else []
            self.known = {_key((line["doc_id"], line["task"], line["split"])): line for line in lines}
            write_lines(file, lines)

    def take_up(self, document: Sequence) -> dict | None:
        """The line that the file had of a document (number, task, split), if any; from now on it counts as recorded."""
        line = self.known.get(_key(document))
        if line is not None:
            self.records.append(line)
        return line

    def noted(self, *names: str) -> dict:
        """Some fields of the first line of an earlier process that has all of them; empty if none has."""
        found = next((line for line in self.known.values() if all(name in line for name in names)), {})
        return {name: found[name] for name in names if found}

    def write(self, line: dict) -> None:
        """Record a line."""
        self.records.append(line)
        if self.file is not None:
            with naming_file(self.file), self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _key(document: Sequence) -> tuple[str, str, str]:
    return tuple(str(part) for part in document)


def rank_files(samples: Path) -> list[Path]:
    """The files that the processes of this run write instead of one: itself if there is one process."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return [samples]
    return [samples.with_suffix(f".rank{rank}{samples.suffix}") for rank in range(processes)]
