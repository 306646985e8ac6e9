"""Sample pictures with the patches that every method kept, as data for the viewer in a report's page."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path

import pandas as pd
from PIL import Image

from eval.report.results import ONE, Samples, ordered
from eval.run.records import is_number
from eval.run.samples import pack, patches
from eval.run.tiled import count, is_tiling, on_image, places
from llava.mm_utils import load_image

logger = logging.getLogger(__name__)

PICTURES = 24
"""Per task."""

MOST_PATCHES = 1 << 16

SIDE = 240
"""Longest side of a picture in the page, in pixels."""

STAGES = {
    "vision": "vision encoder, after block {}",
    "prefill": "prefill, after layer {}",
    "decode": "cache for decoding, layers from {}",
}


def viewers(frame: pd.DataFrame) -> list[dict]:
    """What the page draws: one viewer per model and task that has pictures.

    Parameters
    ----------
    frame : pandas.DataFrame
        Results; of several seeds the first is drawn.

    Returns
    -------
    list of dict
        ``model``, ``task``, ``labels`` (methods with budgets), ``pictures`` (data URIs, each once), and ``samples``:
        per document its ``picture``, ``question``, ``target``, ``type``, ``side`` and ``rows`` of the grid in patches,
        and ``methods``: label -> ``answer``, ``score``, ``tokens`` and ``stages``, pairs of a title and the kept
        patches, hexadecimal as `eval.run.samples.pack` makes them.
    """
    found = []
    first = frame.sort_values("seed", kind="stable").drop_duplicates(ONE)
    for (model, task), group in first.groupby(["model", "task"], sort=False):
        rows = ordered(group)
        labels = list(rows.label)
        files = _pictures(rows.samples)
        samples: dict[str, dict] = {}
        for name, source in zip(labels, rows.samples, strict=True):
            for line in _lines(source, files):
                sample = samples.setdefault(str(line["doc_id"]), _sample(line))
                sample["methods"][name] = _outcome(line)
        uris = {name: uri for name in files if name in samples and (uri := data_uri(files[name]))}
        samples = {name: sample for name, sample in samples.items() if name in uris}
        shown = list(dict.fromkeys(uris.values()))
        for name, sample in samples.items():
            sample["picture"] = shown.index(uris[name])
        if samples:
            in_order = [samples[name] for name in files if name in samples]
            found.append({"model": model, "task": task, "labels": labels, "pictures": shown, "samples": in_order})
    return found


def data_uri(file: Path) -> str | None:
    """A picture as a small JPEG inside an address; None if it cannot be read."""
    try:
        small = load_image(file)
    except ValueError as error:
        logger.warning("%s; it is left out", error)
        return None
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pictures(results: Iterable[Samples]) -> dict[str, Path]:
    """The first pictures of a task by the name of their document, in the documents' order."""
    folders = dict.fromkeys(result.picture_folder for result in results)
    files = {
        file.stem: file
        for folder in folders
        for file in folder.glob("*.jpg")
        if file.is_file() and not file.is_symlink()
    }
    names = sorted(files, key=lambda name: (int(name) if name.isdecimal() else 0, name))
    return {name: files[name] for name in names[:PICTURES]}


def _lines(result: Samples, files: Mapping[str, Path]) -> Iterable[dict]:
    """The lines about documents with a picture whose patches form one square, up to the first damaged one."""
    if not files or not result.file.with_suffix(".jsonl").is_file():
        return
    try:
        for line in result.lines():
            if str(line["doc_id"]) in files and _is_drawable(line):
                yield line
    except ValueError as error:
        logger.warning("%s; what follows is left out", error)


def _is_drawable(line: Mapping) -> bool:
    """Whether a line tells, of one image in tiles or with as many columns as rows, which patches were kept."""
    images, kept = line.get("images"), line.get("kept")
    if not (isinstance(images, list) and len(images) == 1 and isinstance(images[0], dict) and isinstance(kept, dict)):
        return False
    number, tokens = images[0].get("patches"), images[0].get("tokens")
    whole = isinstance(number, int) and 0 < number <= MOST_PATCHES and is_number(tokens) and _has_grid(line, number)
    texts = all(isinstance(line.get(name), str) for name in ("question", "answer"))
    return (
        whole and texts and is_number(line.get("mean_tokens")) and all(_is_packed(one, number) for one in kept.values())
    )


def _has_grid(line: Mapping, number: int) -> bool:
    tiles = line.get("tiles")
    return isqrt(number) ** 2 == number if tiles is None else is_tiling(tiles) and count(tiles) == number


def _is_packed(layers: object, number: int) -> bool:
    """Whether the sets of patches of a stage's layers are as `eval.run.samples.pack` writes them."""
    digits = f"(?:[0-9a-f]{{2}}){{{-(-number // 8)}}}"
    return isinstance(layers, dict) and all(
        isinstance(packed, str) and re.fullmatch(digits, packed) for packed in layers.values()
    )


def _sample(line: Mapping) -> dict:
    side = isqrt(line["images"][0]["patches"])
    rows, columns = places(line["tiles"]).shape if "tiles" in line else (side, side)
    return {
        "question": line["question"], "target": line.get("target", ""), "type": line.get("type", ""),
        "side": columns, "rows": rows, "methods": {},
    }  # fmt: skip


def _outcome(line: Mapping) -> dict:
    """Answer and masks of one method on one document; a stage of the language model that has every patch is left out.

    The vision encoder's are always there: it merges tokens, so that fewer of them may still stand for every patch.
    """
    (image,) = line["images"]
    stages = []
    masks = ((stage, *mask) for stage in STAGES for mask in line["kept"].get(stage, {}).items())
    for stage, layer, packed in masks:
        alive = patches(packed, image["patches"])
        standing = int(alive.sum())
        title = STAGES[stage].format(layer)
        if stage == "vision" and image["tokens"] < standing:
            title += f", in the end merged into {image['tokens']} tokens"
        if stage == "vision" or standing < image["patches"]:
            drawn = on_image(alive, line["tiles"]) if "tiles" in line else None
            stages.append([title, packed if drawn is None else pack(drawn.ravel().nonzero()[0], drawn.size)])
    return {
        "answer": line["answer"], "score": line.get("score"), "tokens": round(line["mean_tokens"], 1), "stages": stages,
    }  # fmt: skip
