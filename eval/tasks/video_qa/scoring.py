"""How an answer to a video question matches the expected one without a judge; lmms-eval calls these functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

EXACT, CONTAINED = "exact_match", "containment"
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def doc_to_visual(document: Mapping) -> list[str]:
    """The path of the video."""
    return [document["video"]]


def doc_to_text(document: Mapping, settings: Mapping | None = None) -> str:
    """The bare question, as Video-LLaVA's authors ask it."""
    return document["question"]


def process_results(document: Mapping, results: Sequence[str]) -> dict[str, float]:
    """Both matches of one answer, 0 or 1."""
    said, wanted = (words(text) for text in (results[0], document["answer"]))
    return {EXACT: float(said == wanted), CONTAINED: float(contains(said, wanted))}


def words(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and articles, small numbers as digits."""
    found = re.findall(r"\w+(?:'\w+)*", text.casefold())
    digits = {word: str(number) for number, word in enumerate(NUMBERS)}
    return [digits.get(word, word) for word in found if word not in ARTICLES] or found


def contains(said: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the wanted words are said one after another."""
    length = len(wanted)
    return length > 0 and any(said[start : start + length] == wanted for start in range(len(said) - length + 1))
