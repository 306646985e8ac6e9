"""Videos: evenly spaced frames of a file, and what vision towers take of them. No torchvision, PyAV reads the files."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.constants import FRAMES
from llava.images import MAX_PIXELS
from llava.mm_utils import process_images

if TYPE_CHECKING:
    from av import VideoFrame

logger = logging.getLogger(__name__)

TRUNCATED = 0.9
"""A file of whose frames, by its own header, a smaller share can be decoded is taken to be truncated."""

NO_VIDEO = ("tty",)
"""FFmpeg's formats that any text file passes for."""

_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""What turns a frame upright, by the signs of a display matrix whose axes point right and down."""

_SETTINGS = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "resample", "rescale_factor")


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video that a model sees, RGB and of one size, and what messages call it."""

    frames: tuple[Image.Image, ...]
    name: str = "video"

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"video {self.name!r}: it has no frames, expected at least 1")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


def frame_indices(total: int, count: int = FRAMES) -> list[int]:
    """Numbers of `count` evenly spaced frames of `total`, the first and the last among them, cut to integers."""
    return np.linspace(0, total - 1, count).astype(int).tolist()


def load_video(source: str | os.PathLike, count: int = FRAMES) -> Video:
    """Evenly spaced frames of a video file.

    Frames are counted in the file itself, because headers may say 0 or something else, and shown upright, as a display
    matrix says. Of a video with fewer frames than `count` some are shown several times, as the authors' code does.

    Parameters
    ----------
    source : str or os.PathLike
        A file on this machine that FFmpeg can read. Addresses are not fetched.
    count : int
        Number of frames.

    Returns
    -------
    Video
        `count` frames, by `frame_indices`.

    Raises
    ------
    ValueError
        In one line that names the file: it is missing, no video, damaged, or has fewer than two frames.
    """
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"video: got {type(source).__name__}, expected the path of a video file")
    check_pyav()
    name = os.fsdecode(source)
    with _naming(name):
        path = _file(name)
        total, declared = _count_packets(path)
        frames = _decode(path, frame_indices(total, count)) if total else ({}, 0)
        if frames[1] != total and frames[1]:  # packets without a frame of their own: count what was decoded
            total = frames[1]
            frames = _decode(path, frame_indices(total, count))
        found = frames[1]
        if found < TRUNCATED * declared:
            raise ValueError(f"only {found} of its {declared} frames can be decoded; it is damaged or truncated")
        if found < 2:
            raise ValueError(f"it has {found or 'no'} frame{'' if found else 's'}, expected a video")
        if found < count:
            logger.warning("video %r: it has %d frames, of the %d shown some are the same", name, found, count)
        if None in frames[0].values():
            number = next(index for index, frame in frames[0].items() if frame is None)
            raise ValueError(f"it is damaged: frame {number} cannot be decoded whole")
        return Video(tuple(frames[0][index] for index in frame_indices(found, count)), name)


def check_pyav() -> None:
    """Raise ValueError if PyAV, which reads and writes videos, is not installed."""
    if find_spec("av") is None:
        raise ValueError("video: PyAV is not installed, which reads video files; pip install '.[video]'")


def _file(name: str) -> str:
    """An absolute path, so that FFmpeg takes a file's name for no address."""
    if not os.path.exists(name):
        raise ValueError("there is no such file")
    if not os.path.isfile(name):
        raise ValueError("it is a folder or no regular file")
    if not os.path.getsize(name):
        raise ValueError("the file is empty")
    return os.path.abspath(name)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What cannot be read becomes one line that names the file."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        reason = f"it cannot be read as a video ({error.strerror or type(error).__name__})"
    except (OSError, MemoryError) as error:
        reason = f"it cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    except ValueError as error:
        reason = " ".join(str(error).split())
    else:
        return
    shown = name if len(name) <= 200 else f"{name[:80]}..."
    raise ValueError(f"video {shown!r}: {reason}") from None


@contextmanager
def _opened(path: str) -> Iterator[tuple]:
    """A container and the video stream that players show."""
    import av

    with av.open(path) as container:
        if container.format.name in NO_VIDEO:
            raise ValueError("it cannot be read as a video (it is text)")
        if not container.streams.video:
            raise ValueError("it has no pictures, only sound or data")
        stream = container.streams.best("video")  # not the cover of a sound file
        stream.thread_type = "AUTO"
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"its frames have {width} x {height} pixels, more than {MAX_PIXELS}")
        yield container, stream


def _count_packets(path: str) -> tuple[int, int]:
    """Packets of the video stream that hold something, nothing decoded, and how many frames the header says."""
    with _opened(path) as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream)), stream.frames


def _decode(path: str, wanted: Collection[int]) -> tuple[dict[int, Image.Image | None], int]:
    """The wanted frames by their numbers, RGB, None for a damaged one, and how many there are in all."""
    kept, total, wanted = {}, 0, set(wanted)
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if total in wanted:
                kept[total] = None if frame.is_corrupt else _upright(frame)
            total += 1
    return kept, total


def _upright(frame: VideoFrame) -> Image.Image:
    """A frame as its display matrix turns it; phones store films as the sensor lies."""
    image = frame.to_image()
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return image
    turn = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]]  # where the x axis goes, where the y axis goes
    way = _TURNS.get(tuple(np.sign(turn).tolist()))
    return image if way is None else image.transpose(way)


class FrameProcessor:
    """Frames to pixels as Video-LLaVA does it: short side resized, centre cropped, scaled, normalised.

    It takes the place of transformers' video processors, which need torchvision. The authors also flip frames left to
    right with probability 1/2, at test time too; that is left out.

    Parameters
    ----------
    settings : mapping
        Of an image or video processor: `size`, `crop_size`, `do_center_crop`, `image_mean`, `image_std`, `resample`,
        `rescale_factor`; what is left out is CLIP's at 224 pixels.
    """

    def __init__(self, settings: Mapping):
        given = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        short = given.setdefault("size", {"shortest_edge": 224}).get("shortest_edge")
        given.setdefault("do_center_crop", short is not None)
        if short is not None:
            given.setdefault("crop_size", {"height": short, "width": short})
        self.frames = CLIPImageProcessorPil(**given)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels that it makes."""
        size = self.frames.crop_size if self.frames.do_center_crop else self.frames.size
        return size["height"], size["width"]

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **_: object) -> dict[str, torch.Tensor]:
        """`pixel_values_videos` of videos, each a sequence of frames: float32 `[videos, frames, 3, height, width]`.

        Raises
        ------
        ValueError
            If videos differ in their number of frames.
        """
        counts = sorted({len(video) for video in videos})
        if len(counts) != 1:
            raise ValueError(f"videos: got {counts} frames in one batch, expected one number")
        frames = [frame for video in videos for frame in video]
        pixels = self.frames(frames, return_tensors="pt")["pixel_values"]
        return {"pixel_values_videos": pixels.unflatten(0, (len(videos), counts[0]))}


def process_video(video: Video, image_processor: CLIPImageProcessorPil, config: object) -> torch.Tensor:
    """A video for our own LLaVA: one image whose views are the frames.

    Parameters
    ----------
    video : Video
        Its frames; they are padded to squares where `config.image_aspect_ratio` says so, else cropped, never cut into
        tiles.
    image_processor : CLIPImageProcessorPil
        The vision tower's.
    config : object
        The model's configuration.

    Returns
    -------
    torch.Tensor
        Float32 `[frames, 3, side, side]`, an entry of `images`; its prompt has one `<image>` for it.

    Raises
    ------
    ValueError
        If the model stitches the views of an image to one grid, which frames are not.
    """
    kind = getattr(config, "mm_patch_merge_type", None) or "flat"
    if kind != "flat":
        raise ValueError(f"video {video.name!r}: mm_patch_merge_type is {kind!r}, expected 'flat': frames are no tiles")
    pad = getattr(config, "image_aspect_ratio", None) == "pad"
    return process_images(video.frames, image_processor, _AspectRatio("pad" if pad else None))


@dataclass(frozen=True)
class _AspectRatio:
    """A configuration that says nothing else."""

    image_aspect_ratio: str | None
