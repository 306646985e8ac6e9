"""The per-sample lines of an evaluation: reading them, and the patches they say were kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from eval.provenance import replace_file

QUESTION_IDS = ("question_id", "questionId", "index", "id")
PICTURE_IDS = ("scene", "image_id", "imageId", "image_source", "video_name")
"""Where benchmarks keep a question's own name, and its picture's."""


def write_lines(path: Path, lines: Iterable[Mapping]) -> None:
    """Write a JSONL file in one step."""
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def names(document: Mapping, doc_id: int) -> dict[str, str]:
    """The question's own name and its picture's, where the benchmark gives them, else the number of its document."""

    def first(keys: Iterable[str]) -> str:
        return str(next((document[key] for key in keys if document.get(key) is not None), doc_id))

    return {"question_id": first(QUESTION_IDS), "picture": first(PICTURE_IDS)}


def pack(kept: Iterable[int], patches: int) -> str:
    """A set of patches as hexadecimal digits: one bit per patch in raster order, most significant first."""
    mask = np.zeros(patches, dtype=bool)
    mask[list(kept)] = True
    return np.packbits(mask).tobytes().hex()


def patches(packed: str, count: int) -> np.ndarray:
    """What `pack` packed, bool ``[count]``."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8), count=count).astype(bool)


def pack_stages(kept: Mapping[str, Mapping[int, list[int]]], count: int) -> dict[str, dict[str, str]]:
    """``Trace.kept`` for a JSONL line: ``{stage: {layer: packed}}``; a layer that keeps what the layer before kept is
    left out."""
    packed: dict[str, dict[str, str]] = {}
    for stage, layers in kept.items():
        packed[stage], previous = {}, None
        for layer, alive in layers.items():
            if alive != previous:
                packed[stage][str(layer)] = pack(alive, count)
            previous = alive
    return packed
