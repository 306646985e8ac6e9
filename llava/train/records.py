"""Records in LLaVA's format: read from JSON or JSON Lines and looked over before the first step.

A record is ``{"id": ..., "image": name, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}``; ``image``
may be a list of names or missing. Without an image its text is text, whatever it says. What LLaVA's trainer accepts is
accepted: a conversation that begins with the assistant loses that turn, a last question without an answer is left out,
and an image that no ``<image>`` asks for is not used.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_templates

log = logging.getLogger(__name__)

ROLES = ("human", "gpt")

Turn = dict[str, str]
Record = dict[str, Any]


def read_records(path: str | Path) -> list[Record]:
    """Read a JSON list, or one record a line if the name ends with ``.jsonl``.

    Raises
    ------
    ValueError
        With one line, if there is no such file or it holds no records.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        records = _read_lines(text) if str(path).endswith(".jsonl") else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"data_path: {path} is not UTF-8 text (byte {error.start}); expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data_path: {path} is no valid JSON ({error}); expected a list of records") from None
    except OSError as error:
        raise ValueError(f"data_path: {path} cannot be read ({error.strerror})") from None
    if not isinstance(records, list) or not records:
        found = "an empty list" if records == [] else f"a {type(records).__name__}"
        raise ValueError(f"data_path: {path} holds {found}, expected a list of records with 'conversations'")
    return records


def _read_lines(text: str) -> list[Record]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return records


def name_record(records: Sequence[Record], index: int) -> str:
    """How messages name a record: ``record 3 of 10 (index 2, id 'x')``."""
    record = records[index]
    identity = f", id {record['id']!r:.60}" if isinstance(record, dict) and "id" in record else ""
    return f"record {index + 1} of {len(records)} (index {index}{identity})"


def look_over(records: Sequence[Record], version: str, image_folder: str | Path) -> None:
    """Check every record without decoding images, and say how many images will not be used.

    Raises
    ------
    ValueError
        With one line that names the first bad record, by number and id, and what is wrong with it.
    """
    unused = 0
    for index, record in enumerate(records):
        try:
            check_record(record, version, Path(image_folder))
        except ValueError as error:
            raise ValueError(f"data_path: {name_record(records, index)}: {error}") from None
        unused += bool(named_images(record)) and not images_of(record)
    if unused:
        log.warning("%d of %d records have an image but no <image> in their text: text only", unused, len(records))


def check_record(record: Record, version: str, image_folder: Path) -> None:
    """Raise ``ValueError`` if one record cannot be learned from, see :func:`look_over`."""
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}, expected a dict with 'conversations'")
    if record.get("video"):
        raise ValueError(f"video: got {record['video']!r:.60}, videos cannot be trained on; expected an image or text")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        found = "nothing" if "conversations" not in record else repr(turns)[:60]
        raise ValueError(f"conversations: got {found}, expected a list of turns")
    for place, turn in enumerate(turns):
        _check_turn(place, turn)
    if len(answered_turns(turns)) < 2 or not _alternate(turns_from_human(turns)):
        roles = [turn["from"] for turn in turns]
        raise ValueError(f"conversations: got turns of {roles}, they should alternate human, gpt and hold an answer")
    _check_images(record, image_folder)
    if conv_templates[version].sep_style is SeparatorStyle.PLAIN:
        _check_caption(record, version)


def _check_turn(place: int, turn: Turn) -> None:
    if not isinstance(turn, dict):
        raise ValueError(f"conversations[{place}]: got a {type(turn).__name__}, expected a dict with 'from', 'value'")
    if turn.get("from") not in ROLES:
        raise ValueError(f"conversations[{place}].from: got {turn.get('from')!r:.60}, expected 'human' or 'gpt'")
    if not isinstance(turn.get("value"), str):
        raise ValueError(f"conversations[{place}].value: got {turn.get('value')!r:.60}, expected a string")
    if not turn["value"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in turn["value"]):
        raise ValueError(f"conversations[{place}].value: holds half a surrogate pair, expected valid text")


def _alternate(turns: Sequence[Turn]) -> bool:
    return all(turn["from"] == ROLES[place % 2] for place, turn in enumerate(turns))


def turns_from_human(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns without a first one of the assistant."""
    return turns[1:] if turns and turns[0]["from"] == "gpt" else turns


def answered_turns(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The turns that are learned from: pairs of a question and its answer."""
    turns = turns_from_human(turns)
    return turns[: len(turns) // 2 * 2]


def named_images(record: Record) -> list[str | Callable]:
    """What a record calls its images, a single one as a list."""
    image = record.get("image")
    return [] if image is None else list(image) if isinstance(image, list) else [image]


def images_of(record: Record) -> list[str | Callable]:
    """The images that the text asks for, in order: all that are named, or none if no ``<image>`` does."""
    images = named_images(record)
    return images if count_marks(answered_turns(record["conversations"]), len(images)) else []


def count_marks(turns: Sequence[Turn], images: int) -> int:
    """Images that the turns ask for. With one image, several marks in one turn stand for it once, as in LLaVA."""
    counts = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    return sum(min(count, 1) for count in counts) if images == 1 else sum(counts) if images else 0


def _check_images(record: Record, folder: Path) -> None:
    images = named_images(record)
    marks = count_marks(answered_turns(record["conversations"]), len(images))
    if marks != len(images) and (marks, len(images)) != (0, 1):
        raise ValueError(f"image: got {len(images)} images and {marks} <image> marks in the text, expected as many")
    for image in images:
        if not isinstance(image, str) or not image:
            raise ValueError(f"image: got {image!r:.60}, expected the name of a file or a list of names")
        if not os.path.isfile(folder / image):
            reason = "is a folder" if os.path.isdir(folder / image) else "does not exist"
            raise ValueError(f"image: {str(folder / image)!r} {reason}, expected an image file below image_folder")


def _check_caption(record: Record, version: str) -> None:
    images, turns = len(images_of(record)), len(answered_turns(record["conversations"]))
    if images > 1 or turns != 2:
        raise ValueError(f"version: {version!r} takes one image and two turns, got {images} images and {turns} turns")
