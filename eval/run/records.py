"""Results read back. Whoever reads one does it here: nothing that a file holds is used before it has been checked."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mustdrop import read

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?!\.+$)[\w.-]+")
"""Names that may become part of a path: no separators, and not the folder itself or the one above."""

Check = tuple[Callable[[object], bool], str]
"""Whether a value is right, and what would be."""


class BadRecord(ValueError):
    """A file that is no complete result; the message, one line, names it and says what is wrong."""


def file_name(text: str) -> str:
    """A text as part of a file's name: whatever is not a letter, a digit or one of _ . - becomes _."""
    return re.sub(r"[^\w.-]", "_", text)


def is_number(value: object) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int) -> Check:
    return lambda value: is_number(value) and isinstance(value, int) and value >= least, f"a whole number from {least}"


def _is_budget(value: object) -> bool:
    """A number of tokens, or a share of an image's."""
    return is_number(value) and (0 < value <= 1 if isinstance(value, float) else value >= 0)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]} or null"


def _every(check: Check, kind: type, what: str) -> Check:
    """All entries of a list, or all values of a mapping."""
    values = (lambda value: value.values()) if kind is dict else iter
    return lambda value: isinstance(value, kind) and all(check[0](one) for one in values(value)), what


TEXT: Check = (lambda value: isinstance(value, str), "text")
NAMED: Check = (
    lambda value: isinstance(value, str) and bool(NAME.fullmatch(value)),
    "a name of letters, digits, _ . -",
)
FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
NUMBER: Check = (is_number, "a finite number")
BUDGET: Check = (_is_budget, "a whole number from 0, or a share up to 1")
NUMBERS = _every(NUMBER, list, "a list of finite numbers")
INTERVAL: Check = (lambda value: NUMBERS[0](value) and len(value) == 2, "two finite numbers")
MAPPING: Check = (lambda value: isinstance(value, dict), "a mapping")
BY_NAME = _every(_or_none(NUMBER), dict, "a mapping of finite numbers")
BY_TYPE = _every(
    (lambda value: MAPPING[0](value) and is_number(value.get("accuracy")) and is_number(value.get("n")), ""),
    dict, "a mapping of {accuracy, n}",
)  # fmt: skip
COSTS = _every(
    (lambda value: MAPPING[0](value) and is_number(value.get("full")) and is_number(value.get("used")), ""),
    dict, "a mapping of {full, used}",
)  # fmt: skip

ROW: dict[str, Check] = {
    "model": TEXT, "task": NAMED, "benchmark": NAMED, "synthetic": FLAG, "method": NAMED, "retain": _or_none(BUDGET),
    "seed": _whole(0), "limit": _or_none(_whole(1)), "metric": TEXT, "score": NUMBER, "score_ci95": INTERVAL,
    "accuracy": NUMBER, "ci95": INTERVAL, "n": _whole(1), "accuracy_by_type": BY_TYPE, "mean_tokens": NUMBER,
    "mean_tokens_official": NUMBER, "flops_reduction": _or_none(NUMBER), "flops_reductions": BY_NAME,
    "cache_bytes": NUMBER,
}  # fmt: skip
"""What every row has."""

SOME_ROWS: dict[str, Check] = {
    **{f"{part}_ms": _or_none(NUMBER) for part in ("vision", "prefill", "selector", "decode")},
    "skipped": _whole(0), "beyond_context": _whole(0), "bits": _whole(1),
    "matches": BY_NAME, "tokens_per_view": NUMBERS, "model_base": TEXT,
    "selector_macs": _or_none(_whole(0)), "selector_prompt": _or_none(BY_NAME),
}  # fmt: skip
MACHINE = _every(_or_none(NUMBER), dict, "a mapping of numbers")
PROVENANCE: dict[str, Check] = {
    "date": TEXT, "git_commit": _or_none(TEXT), "machine": _or_none(MACHINE), "command": TEXT, "device": TEXT,
    "dtype": TEXT, "versions": MAPPING,
}  # fmt: skip
"""What provenance may have."""

DOCUMENT: Check = (lambda value: isinstance(value, str) or _whole(0)[0](value), "a number or a name")
PLACE: dict[str, Check] = {"task": TEXT, "doc_id": DOCUMENT}
SCORED: dict[str, Check] = {**PLACE, "question_id": DOCUMENT}
MAYBE_SCORED: dict[str, Check] = {"picture": TEXT, "score": NUMBER}
"""What a line has, and may have, that is compared with others."""

ANSWER: dict[str, Check] = {**PLACE, "split": TEXT, "answer": TEXT}
MEASURED: dict[str, Check] = {
    "mean_tokens": NUMBER, "mean_tokens_official": NUMBER, "cache_bytes": NUMBER,
    "times_ms": _every(NUMBER, dict, "a mapping of finite numbers"), "text_tokens": _whole(0), "vision_tokens": NUMBERS,
    "images": _every(MAPPING, list, "a list of mappings"),
}  # fmt: skip
"""What the line of an answered question has."""

MAYBE_ANSWERED: dict[str, Check] = {
    "flops": COSTS, "kept": MAPPING, "tiles": MAPPING, "skipped": TEXT, "selector_macs": _whole(0),
    "selector_prompt": BY_NAME,
}  # fmt: skip


def read_record(file: Path) -> dict:
    """One finished evaluation.

    Parameters
    ----------
    file : pathlib.Path
        Its JSON file.

    Returns
    -------
    dict
        ``row`` as `ROW` describes it, ``identity`` and ``provenance`` (mappings, empty where there are none).

    Raises
    ------
    BadRecord
        If it is not there, cannot be read, or lacks something.
    """
    content = read_json(file)
    row, identity, made = (content.get(name, {}) for name in ("row", "identity", "provenance"))
    for name, part in (("row", row), ("identity", identity), ("provenance", made)):
        if not isinstance(part, dict):
            raise BadRecord(f"results: {str(file)!r}: {name}: got {_shown(part)}, expected a mapping")
    wrong = _wrong(row, ROW, SOME_ROWS, "row.") or _wrong(made, {}, PROVENANCE, "provenance.")
    if wrong:
        raise BadRecord(f"results: {str(file)!r} {wrong}")
    return {**content, "row": row, "identity": identity, "provenance": made}


def read_json(file: Path) -> dict:
    """A JSON file that holds a mapping; `BadRecord` if it does not."""
    try:
        content = read.read_json(file)
    except ValueError as error:
        raise BadRecord(f"results: {str(file)!r} is no cell's result: {_in_short(error, file)}") from None
    if not isinstance(content, dict):
        raise BadRecord(f"results: {str(file)!r} is no cell's result: it holds {_shown(content)}, expected a mapping")
    return content


def read_lines(file: Path) -> Iterator[dict]:
    """The per-sample lines of a finished evaluation, one at a time: a large benchmark's do not fit into memory.

    Raises
    ------
    BadRecord
        At the first line that is none.
    """
    number = 0
    try:
        with file.open("rb") as lines:
            for number, text in enumerate(lines, 1):
                line = _line(text)
                wrong = "is no JSON object" if line is None else _wrong(line, SCORED, MAYBE_SCORED, "")
                if wrong:
                    raise BadRecord(f"results: {str(file)!r}, line {number} {wrong}")
                yield line
    except OSError as error:
        raise BadRecord(f"results: {str(file)!r} cannot be read ({_in_short(error)})") from None


def read_answers(file: Path) -> list[dict]:
    """The lines of an evaluation that goes on: what a killed run left half written, or is no answer, is left out.

    A file that is not there, or cannot be read, has none.
    """
    try:
        lines = file.read_bytes().splitlines() if file.is_file() else []
    except OSError:
        return []
    answers = [line for line in map(_line, lines) if line is not None and _is_answer(line)]
    if len(answers) < len(lines):
        logger.warning("note: results: %r: %d lines are no whole answers", str(file), len(lines) - len(answers))
    return answers


def _is_answer(line: Mapping) -> bool:
    measured = {} if "skipped" in line else MEASURED
    return _wrong(line, {**ANSWER, **measured}, MAYBE_ANSWERED, "") is None


def _line(text: bytes) -> dict | None:
    """A line's mapping, None if it holds none."""
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _wrong(content: Mapping, needed: Mapping[str, Check], optional: Mapping[str, Check], where: str) -> str | None:
    """The first field that is missing or not what it should be."""
    for name in needed:
        if name not in content:
            return f"lacks {where}{name}"
    for name, (fits, right) in {**needed, **optional}.items():
        if name in content and not fits(content[name]):
            return f"has {where}{name} {_shown(content[name])}, expected {right}"
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_short(error: BaseException, file: Path | None = None) -> str:
    return " ".join(str(error).removeprefix(f"{file}: ").split())[:120] or type(error).__name__
