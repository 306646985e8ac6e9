"""What a question shows: images and videos, in the order in which its prompt names them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, DEFAULT_VIDEO_TOKEN
from llava.images import load_image
from llava.video import Video, load_video

Visual = Image.Image | Video
TOKENS = {"image": DEFAULT_IMAGE_TOKEN, "video": DEFAULT_VIDEO_TOKEN}
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
RECENT = 8
"""Videos whose frames are kept: benchmarks ask several questions about one."""


def open_visual(source: object) -> Visual:
    """An image, RGB and upright, or a video; of paths, those that end as image files do are images.

    Raises
    ------
    ValueError
        With one line, if it is neither or cannot be read.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, Image.Image):
        return load_image(source)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return load_image(path) if path.lower().endswith(IMAGE_FILES) else _recent(path, _state(path))
    kind = type(source).__name__
    raise ValueError(f"it brings a {kind}, only images, videos and paths of such files are supported")


def read(visual: Visual) -> Visual:
    """A visual that is open already, as `open_visual` gives it."""
    return visual if isinstance(visual, Video) else load_image(visual)


def kinds_of(visuals: Sequence[Visual]) -> list[str]:
    """``image`` or ``video`` for each."""
    return ["video" if isinstance(visual, Video) else "image" for visual in visuals]


def placed(question: str, kinds: Sequence[str]) -> list[str] | None:
    """The text before, between and after the tokens with which a question places its visuals.

    None where it does not: then its visuals come first, and what it says of ``<image>`` and ``<video>`` is text.
    """
    tokens = {TOKENS[kind] for kind in kinds}
    if not tokens:
        return None
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(tokens)))})", question)
    return pieces[::2] if pieces[1::2] == [TOKENS[kind] for kind in kinds] else None


def _state(path: str) -> tuple[int, int] | None:
    """What changes when a file does."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(RECENT)
def _recent(path: str, state: tuple[int, int] | None) -> Video:
    return load_video(path)
