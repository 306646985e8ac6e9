"""Sample pictures with the patches that every method kept, as data for the viewer in a report's page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path

from PIL import Image

from eval.collect import Result, label, ordered
from eval.samples import patches

PICTURES = 24
"""Per task."""

SIDE = 240
"""Longest side of a picture in the page, in pixels."""

STAGES = {
    "vision": "vision encoder, after block {}",
    "prefill": "prefill, after layer {}",
    "decode": "cache for decoding, layers from {}",
}


def viewers(results: Iterable[Result]) -> list[dict]:
    """What the page draws: one viewer per model and task that has pictures.

    Parameters
    ----------
    results : iterable of Result
        Finished cells; of several seeds the first is drawn.

    Returns
    -------
    list of dict
        ``model``, ``task``, ``labels`` (methods with budgets), ``pictures`` (data URIs, each once), and ``samples``:
        per document its ``picture``, ``question``, ``target``, ``type``, ``side`` of the grid in patches and
        ``methods``: label -> ``answer``, ``score``, ``tokens`` and ``stages``, pairs of a title and the kept patches,
        hexadecimal as `eval.samples.pack` makes them.
    """
    groups: dict[tuple, dict[str, Result]] = {}
    for result in sorted(results, key=lambda one: one.row["seed"]):
        key = (result.row["model"], result.row["task"])
        groups.setdefault(key, {}).setdefault(result.label, result)
    found = []
    for (model, task), by_label in groups.items():
        labels = [label(row["method"], row["retain"]) for row in ordered(one.row for one in by_label.values())]
        files = _pictures(by_label.values())
        samples: dict[str, dict] = {}
        for name in labels:
            for line in _lines(by_label[name], files):
                sample = samples.setdefault(str(line["doc_id"]), _sample(line))
                sample["methods"][name] = _outcome(line)
        uris = {name: data_uri(files[name]) for name in files if name in samples}
        shown = list(dict.fromkeys(uris.values()))
        for name, sample in samples.items():
            sample["picture"] = shown.index(uris[name])
        if samples:
            in_order = [samples[name] for name in files if name in samples]
            found.append({"model": model, "task": task, "labels": labels, "pictures": shown, "samples": in_order})
    return found


def data_uri(file: Path) -> str:
    """A picture as a small JPEG inside an address."""
    with Image.open(file) as picture:
        small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pictures(results: Iterable[Result]) -> dict[str, Path]:
    """The first pictures of a task by the name of their document, in the documents' order."""
    folders = dict.fromkeys(result.picture_folder for result in results)
    files = {file.stem: file for folder in folders for file in folder.glob("*.jpg")}
    names = sorted(files, key=lambda name: (int(name) if name.isdecimal() else 0, name))
    return {name: files[name] for name in names[:PICTURES]}


def _lines(result: Result, files: Mapping[str, Path]) -> Iterable[dict]:
    """The lines about documents with a picture whose patches form one square."""
    if not files or not result.samples.is_file():
        return
    for line in result.lines():
        images = line.get("images", [])
        one = len(images) == 1 and isqrt(images[0]["patches"]) ** 2 == images[0]["patches"]
        if str(line["doc_id"]) in files and "kept" in line and one:
            yield line


def _sample(line: Mapping) -> dict:
    return {
        "question": line["question"], "target": line.get("target", ""), "type": line.get("type", ""),
        "side": isqrt(line["images"][0]["patches"]), "methods": {},
    }  # fmt: skip


def _outcome(line: Mapping) -> dict:
    """Answer and masks of one method on one document; a stage of the language model that has every patch is left out.

    The vision encoder's are always there: it merges tokens, so that fewer of them may still stand for every patch.
    """
    (image,) = line["images"]
    stages = []
    masks = ((stage, *mask) for stage in STAGES for mask in line["kept"].get(stage, {}).items())
    for stage, layer, packed in masks:
        count = int(patches(packed, image["patches"]).sum())
        title = STAGES[stage].format(layer)
        if stage == "vision" and image["tokens"] < count:
            title += f", in the end merged into {image['tokens']} tokens"
        if stage == "vision" or count < image["patches"]:
            stages.append([title, packed])
    return {
        "answer": line["answer"], "score": line.get("score"), "tokens": round(line["mean_tokens"], 1), "stages": stages,
    }  # fmt: skip
