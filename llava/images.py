"""Opening images: from a file, an address, base64 text or a PIL image to upright 8-bit RGB, the same everywhere."""

from __future__ import annotations

import base64
import binascii
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, in pixels: where Pillow's own protection against decompression bombs begins."""

MAX_SIDE = 30_000
"""Longest side of an image, in pixels."""

DOWNLOAD_SECONDS = 30.0
"""Longest time for a whole download, from the request to the last byte."""

DOWNLOAD_BYTES = 1 << 26
"""Largest download, 64 MiB."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, HTTPException)
UNREADABLE += (RuntimeError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What reading a damaged or unsuitable file may raise."""

TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
NO_RANGE = {"I": "32-bit integers", "F": "floating-point numbers"}
BY_ALPHA = {"La": "LA", "RGBa": "RGBA", "P": "RGBA"}
"""Modes that Pillow turns into RGB only, or only without a warning about their transparency, by way of another."""

RUNS_PROGRAMS = ("EPS",)
"""Formats that Pillow hands to another program."""

_decoding = threading.Lock()


def _new_lock() -> None:
    """For the child of a fork: it has no copy of the thread that might hold the lock."""
    global _decoding
    _decoding = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """Open an image as a viewer shows it.

    Training, calibration and evaluation all open images here. An EXIF orientation is applied, as ``datasets`` does for
    benchmarks (LLaVA's own loader does not); transparency is dropped and the colours below it show, as LLaVA does; of
    16-bit samples the high byte counts; of an animation the first frame. Colour profiles and gamma are not applied.

    Parameters
    ----------
    source : str, os.PathLike or PIL.Image.Image
        A file, an ``http(s)://`` or ``data:`` address, or an image that is open already. A download may take
        `DOWNLOAD_SECONDS` and `DOWNLOAD_BYTES`; an image may have `MAX_PIXELS`, and `MAX_SIDE` on its longer side.

    Returns
    -------
    PIL.Image.Image
        RGB, upright, without metadata: opening it once more changes nothing, and gives the very same object.

    Raises
    ------
    ValueError
        If the image is missing, cannot be fetched, is too large, or is no image.
    """
    if not isinstance(source, str | os.PathLike | Image.Image):
        raise ValueError(f"image: got {type(source).__name__}, expected a path, an http(s) address or a PIL image")
    try:
        if type(source) is Image.Image and source.mode == "RGB" and not source.info and not source.getexif():
            _check_size(source)
            source.load()
            return source  # as this function returned it
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        address = os.fsdecode(source)
        with Image.open(_content(address), formats=_formats()) as image:
            return _upright_rgb(image)
    except UNREADABLE as error:
        raise ValueError(
            f"image {_shown(source)}: {_reason(error)}; expected a readable image file such as PNG or JPEG"
        ) from None


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Open an image that arrives as base64 text.

    Parameters
    ----------
    image : str or bytes
        An encoded image file, with or without a ``data:image/...;base64,`` prefix.

    Returns
    -------
    PIL.Image.Image
        The image, decoded, in the mode it was saved in and not yet turned; :func:`load_image` does the rest.

    Raises
    ------
    ValueError
        If the text is not base64 or what it encodes is no image.
    """
    text = image.decode("ascii", errors="replace") if isinstance(image, bytes) else image
    try:
        opened = Image.open(_from_base64(text), formats=_formats())
        _check_size(opened)
        with _strictly():
            opened.load()
        return opened
    except UNREADABLE as error:
        raise ValueError(
            f"image: base64 text of {len(text)} characters is no readable image ({_reason(error)})"
        ) from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels, turned as the EXIF orientation says, without metadata."""
    _check_size(image)
    with _strictly():
        turn = TURNED.get(_orientation(image))  # Pillow decodes a PNG to find its orientation
        rgb = _rgb(image)
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # the orientation has been applied: nobody shall apply it again
    return rgb


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; a copy."""
    if image.mode in NO_RANGE:
        raise ValueError(f"its samples are {NO_RANGE[image.mode]}, and nothing says which of them is white")
    if image.mode in SIXTEEN_BITS:  # Pillow would cut all above 255; of 16-bit colour it takes the high byte, too
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in BY_ALPHA:
        image = image.convert(BY_ALPHA[image.mode])
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, 1 to 8; None where there is none or the metadata are damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, KeyError, TypeError, IndexError, struct.error):  # what damaged tags raise
        return None


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"it has {width} x {height} pixels, none at all")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS} in all")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_SIDE} on a side")


@contextmanager
def _strictly() -> Iterator[None]:
    """Refuse truncated files, which other packages tell Pillow to fill up with grey, for the whole process."""
    with _decoding:
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in RUNS_PROGRAMS]


def _content(address: str) -> Path | BytesIO:
    """What Pillow can open."""
    scheme = address.partition(":")[0].lower()
    if scheme in ("http", "https") and "://" in address:
        return BytesIO(_download(address))
    if scheme == "data" and "," in address:
        return _from_base64(address)
    path = Path(address)
    if path.is_dir():
        raise IsADirectoryError
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if "://" in address and not path.exists():
        raise ValueError(f"{scheme}:// addresses are not fetched, only http:// and https://")
    return path


def _from_base64(text: str) -> BytesIO:
    return BytesIO(base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text))


class _WebOnly(HTTPRedirectHandler):
    """Follows redirects to http and https alone."""

    def redirect_request(self, request, file, code, message, headers, address):
        if not address.lower().startswith(("http://", "https://")):
            raise URLError(f"it is redirected to {address[:100]!r}, which is no http(s) address")
        return super().redirect_request(request, file, code, message, headers, address)


def _download(address: str) -> bytes:
    """An address's content. A thread of its own does the work: what trickles in forever cannot be stopped otherwise."""
    outcome: list[bytes | BaseException] = []
    until = time.monotonic() + DOWNLOAD_SECONDS

    def work() -> None:
        try:
            outcome.append(_read(address, until))
        except UNREADABLE as error:
            known = isinstance(error, URLError | HTTPException | ValueError) or not isinstance(error, OSError)
            outcome.append(error if known else URLError(str(error) or type(error).__name__))

    thread = threading.Thread(target=work, name="download", daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if not outcome:
        raise URLError(f"it takes longer than {DOWNLOAD_SECONDS:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _read(address: str, until: float) -> bytes:
    request = Request(address, headers={"User-Agent": "Mozilla/5.0 (llava)"})
    with build_opener(_WebOnly).open(request, timeout=DOWNLOAD_SECONDS) as response:
        content = bytearray()
        while block := response.read1(1 << 16):
            content += block
            if len(content) > DOWNLOAD_BYTES:
                raise URLError(f"it is larger than {DOWNLOAD_BYTES >> 20} MiB")
            if time.monotonic() > until:
                raise URLError(f"it takes longer than {DOWNLOAD_SECONDS:g} s")
        kind = response.headers.get_content_type()
    if kind in ("text/html", "application/xhtml+xml"):
        raise URLError(f"there is a web page ({kind}), not an image")
    return bytes(content)


def _reason(error: BaseException) -> str:
    """Why an image cannot be opened, in a few words on one line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, HTTPError):
        return f"it cannot be fetched: HTTP status {error.code} {error.reason}"
    if isinstance(error, URLError):
        return f"it cannot be fetched: {error.reason}"
    if isinstance(error, HTTPException):
        return f"it cannot be fetched: {type(error).__name__} {error}"
    if isinstance(error, UnidentifiedImageError):
        return "it cannot be read as an image: no known format"
    if isinstance(error, binascii.Error):
        return f"it is not base64: {error}"
    return f"it cannot be read as an image: {' '.join(str(error).split()) or type(error).__name__}"


def _shown(source: str | os.PathLike | Image.Image) -> str:
    """How a message calls an image."""
    if isinstance(source, Image.Image):
        return f"of mode {source.mode}"
    name = os.fsdecode(source)
    return repr(name if len(name) <= 200 else f"{name[:80]}...")
