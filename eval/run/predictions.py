"""Answers to video questions in the authors' form: JSON objects with ``id``, ``question``, ``answer`` and ``pred``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.run.cell import Cell
from eval.run.records import BadRecord
from eval.run.samples import write_lines

FIELDS = ("id", "question", "answer", "pred")


def file_of(cell: Cell, out: Path) -> Path:
    """Where a cell's predictions are written."""
    return out / "predictions" / cell.task / f"{cell.label}-{cell.key}.jsonl"


def write(file: Path, scored: Sequence[Mapping]) -> None:
    """Write predictions from lmms-eval's samples."""
    write_lines(file, map(_prediction, scored))


def _prediction(sample: Mapping) -> dict:
    document = sample["doc"]
    return {
        "id": document["question_id"],
        "question": document["question"],
        "answer": document["answer"],
        "pred": sample["filtered_resps"][0],
    }


def read(file: Path) -> list[dict]:
    """The predictions of a file.

    Raises
    ------
    ValueError
        With one line, if it is not there, a line is no prediction, or an id is there twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"predictions: {str(file)!r} cannot be read ({reason})") from None
    found: dict[str, dict] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        entry = _entry(line)
        if entry is None:
            raise BadRecord(f"predictions: {str(file)!r}, line {number} is no JSON object with {', '.join(FIELDS)}")
        if found.setdefault(str(entry["id"]), entry) is not entry:
            raise BadRecord(f"predictions: {str(file)!r}, line {number}: id {entry['id']!r} is there twice")
    if not found:
        raise BadRecord(f"predictions: {str(file)!r} holds none")
    return list(found.values())


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str | int | float) for name in FIELDS):
        return None
    return {name: str(entry[name]) for name in FIELDS}
