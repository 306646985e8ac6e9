"""A benchmark's question before it is asked, and errors that name its document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from eval.run.inference import UnfitQuestion
from eval.run.visuals import Visual


@dataclass(frozen=True)
class Question:
    """A document that is to be answered: its number among the requests, where it is, what it says and shows."""

    index: int
    where: tuple
    context: str
    document: dict
    images: list[Visual]


@contextmanager
def naming(places: Sequence[Sequence]) -> Iterator[None]:
    """What goes wrong inside gets the task and the numbers of its documents in front."""
    try:
        yield
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        numbers = ", ".join(str(doc_id) for doc_id, *_ in places)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnfitQuestion(f"{places[0][1]}, document{'s' * (len(places) > 1)} {numbers}: {reason}") from error


def place(where: Sequence) -> dict:
    """Where a document is, as the lines of answers say it."""
    doc_id, task, split = where
    return {"task": task, "split": split, "doc_id": doc_id}
