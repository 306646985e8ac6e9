"""What each stage of a method kept and merged, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval.run.asking import AskedModel
from eval.run.visuals import Visual
from llava.video import Video
from mustdrop import Trace

PANEL = 240
"""Longest side of a panel in pixels."""

MOST_STAGES = 7
"""Stages that are drawn of one method; of more, evenly spaced ones, the first and the last among them."""

DIMMED = np.array([236, 236, 236], dtype=np.float32)
OUTLINE = np.array([220, 20, 60], dtype=np.uint8)
_MARGIN, _TITLE, _FONT = 8, 34, 12


@dataclass(frozen=True)
class View:
    """A view of an image or a frame of a video, and which patch shows which place of it.

    `patches` int `[rows, columns]` are numbered through the prompt as `Trace` does; -1 where none is shown.
    """

    image: int
    number: int
    patches: np.ndarray


@dataclass(frozen=True)
class Stage:
    """What a stage has left: its title, the patches still stood for, and those that share a token."""

    title: str
    kept: frozenset[int]
    merged: list[list[int]] = field(default_factory=list)


def views_of(trace: Trace, baseline: Trace) -> list[View]:
    """The views of a prompt, from a trace in which every patch entered the decoder: its own, or the baseline's.

    Empty where neither tells, of a model whose tokens have no places.
    """
    counts = [image["patches"] for image in trace.images]
    for told in (trace, baseline):
        places = told.places
        whole = places is not None and len(places) == sum(counts)
        if whole and [image["patches"] for image in told.images] == counts:
            ends = [0, *accumulate(counts)]
            return [
                View(image, number, grid)
                for image, (first, end) in enumerate(pairwise(ends))
                for number, grid in _grids(places[first:end], first)
            ]
    return []


def _grids(places: Sequence[tuple[int, int, int]], first: int) -> list[tuple[int, np.ndarray]]:
    """The grid of each view of an image whose patches, numbered from `first`, stand at (view, row, column)."""
    table = np.array(places)
    grids = []
    for view in np.unique(table[:, 0]):
        own = np.flatnonzero(table[:, 0] == view)
        rows, columns = table[own, 1], table[own, 2]
        grid = np.full((rows.max() + 1, columns.max() + 1), -1)
        grid[rows, columns] = first + own
        grids.append((int(view), grid))
    return grids


def stages_of(trace: Trace) -> list[Stage]:
    """The stages after which fewer patches are stood for, and what enters the decoder."""
    groups = [patches for patches in trace.tokens if len(patches) > 1]
    entering = frozenset(patch for patches in trace.tokens for patch in patches)
    title = f"entering the decoder: {trace.vision_tokens[0]} tokens" + (f", {len(groups)} merged" if groups else "")
    found = [Stage(f"vision encoder, after block {block}", frozenset(k)) for block, k in trace.kept["vision"].items()]
    found.append(Stage(title, entering, groups))
    for layer, kept in trace.kept["prefill"].items():
        found.append(_later(f"after decoder layer {layer}: {trace.vision_tokens_after[layer]} tokens", kept, groups))
    for layer, kept in trace.kept["decode"].items():
        tokens = trace.cache_lengths[layer] - trace.text_tokens
        found.append(_later(f"cached by layer {layer}: {tokens} tokens", kept, groups))
    everything = frozenset(range(sum(image["patches"] for image in trace.images)))
    shown, before = [], everything
    for stage in found:
        if stage.kept != before or (stage.title == title and groups):
            shown.append(stage)
        before = stage.kept
    return _thinned(shown)


def _later(title: str, kept: Sequence[int], groups: Sequence[list[int]]) -> Stage:
    """A stage in the decoder, where a merged token stays or goes as a whole."""
    alive = frozenset(kept)
    return Stage(title, alive, [group for group in groups if group[0] in alive])


def _thinned(stages: list[Stage]) -> list[Stage]:
    if len(stages) <= MOST_STAGES:
        return stages
    return [stages[round(number)] for number in np.linspace(0, len(stages) - 1, MOST_STAGES)]


def background(loaded: AskedModel, visual: Visual, view: View) -> Image.Image:
    """The image that a view's grid lies on: what the vision tower sees, or, of tiles, the whole image."""
    rows, columns = view.patches.shape
    frame = visual.frames[min(view.number, len(visual.frames) - 1)] if isinstance(visual, Video) else visual
    seen = loaded.seen(frame) or frame.convert("RGB")
    if view.number or seen.width * rows == seen.height * columns:
        return seen
    return ImageOps.fit(seen, _size(view, max(seen.size))) if loaded.seen(frame) is None else seen


def _size(view: View, longest: int = PANEL) -> tuple[int, int]:
    """Width and height in pixels of a view's panel."""
    rows, columns = view.patches.shape
    scale = longest / max(rows, columns)
    return max(1, round(columns * scale)), max(1, round(rows * scale))


def panel(image: Image.Image, view: View, stage: Stage) -> Image.Image:
    """A view with what is gone dimmed, and an outline around every group of patches that share a token."""
    size = _size(view)
    kept = np.isin(view.patches, list(stage.kept))
    owner = np.arange(view.patches.size).reshape(view.patches.shape)  # a patch that shares with nobody owns itself
    grouped = np.zeros_like(kept)
    for number, group in enumerate(stage.merged):
        own = np.isin(view.patches, group)
        owner[own], grouped[own] = -1 - number, True
    across = np.arange(size[0]) * view.patches.shape[1] // size[0]
    down = np.arange(size[1]) * view.patches.shape[0] // size[1]
    pixels = np.asarray(image.convert("RGB").resize(size), dtype=np.float32)
    alive = kept[down][:, across][..., None]
    drawn = np.where(alive, pixels, 0.18 * pixels + 0.82 * DIMMED).astype(np.uint8)
    drawn[_edges(owner[down][:, across], grouped[down][:, across])] = OUTLINE
    return Image.fromarray(drawn)


def _edges(owner: np.ndarray, grouped: np.ndarray) -> np.ndarray:
    """Pixels at which a group of patches ends, bool `[height, width]`."""
    edge = np.zeros_like(grouped)
    edge[1:] |= (owner[1:] != owner[:-1]) & (grouped[1:] | grouped[:-1])
    edge[:, 1:] |= (owner[:, 1:] != owner[:, :-1]) & (grouped[:, 1:] | grouped[:, :-1])
    return edge


def sheet(
    loaded: AskedModel, visuals: Sequence[Visual], trace: Trace, baseline: Trace, heading: str
) -> Image.Image | None:
    """One image of all views (rows) at all stages (columns); None where the model does not tell where tokens stand."""
    views, stages = views_of(trace, baseline), stages_of(trace)
    if not views:
        return None
    rows = []
    for view in views:
        image = background(loaded, visuals[view.image], view)
        whole = Stage(f"image {view.image + 1}, view {view.number + 1}", frozenset(view.patches.flatten().tolist()))
        rows.append([(stage.title, panel(image, view, stage)) for stage in (whole, *stages)])
    return _arranged(rows, heading)


def _arranged(rows: list[list[tuple[str, Image.Image]]], heading: str) -> Image.Image:
    """Titled panels in rows under a heading."""
    high = [max(image.height for _, image in row) + _TITLE + _MARGIN for row in rows]
    width = len(rows[0]) * (PANEL + _MARGIN) + _MARGIN
    whole = Image.new("RGB", (width, sum(high) + _TITLE), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(_FONT)
    draw.text((_MARGIN, _MARGIN), heading, fill="black", font=font)
    top = _TITLE
    for row, height in zip(rows, high, strict=True):
        for number, (title, image) in enumerate(row):
            left = _MARGIN + number * (PANEL + _MARGIN)
            draw.text((left, top), _wrapped(title, draw, font), fill="black", font=font, spacing=1)
            whole.paste(image, (left, top + _TITLE))
        top += height
    return whole


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont) -> str:
    """A text in lines that are no wider than a panel."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= PANEL:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def terminal(image: Image.Image, columns: int) -> str:
    """An image as half blocks in 24-bit colours, two pixels in a character."""
    height = max(2, round(image.height * columns / image.width) // 2 * 2)
    pixels = np.asarray(image.convert("RGB").resize((columns, height)))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        pairs = zip(upper.tolist(), lower.tolist(), strict=True)
        lines.append("".join(f"\x1b[38;2;{_rgb(up)}m\x1b[48;2;{_rgb(low)}m\u2580" for up, low in pairs) + "\x1b[0m")
    return "\n".join(lines)


def _rgb(color: Sequence[int]) -> str:
    return ";".join(map(str, color))
