"""Kinds of images that people have: modes, orientation, shapes, sizes, damage, addresses. All are told apart by what
they look like."""

from __future__ import annotations

import base64
import random
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile, features
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava import images, mm_utils
from llava.mm_utils import expand2square, load_image, load_image_from_base64, process_images, shrink_padded
from llava.train.dataset import load_image as load_for_training

PAD, CROP = SimpleNamespace(image_aspect_ratio="pad"), SimpleNamespace(image_aspect_ratio=None)
ANYRES = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def of_palette(*colors: tuple[int, int, int]) -> Image.Image:
    """Stripes of the palette's first colors."""
    image = Image.fromarray(np.arange(len(colors), dtype=np.uint8).repeat(8)[None].repeat(8, 0))
    image = image.convert("P")
    image.putpalette([channel for color in colors for channel in color])
    return image


# What they look like


def test_palettes_tell_images_with_the_same_indices_apart(loaded):
    first, second = of_palette(RED, GREEN), of_palette(BLUE, RED)
    assert first.tobytes() == second.tobytes()
    one, two, again = loaded._pixels([first, second, of_palette(RED, GREEN)])
    assert not torch.equal(one, two) and one is again
    alone = [loaded._pixels([image])[0] for image in (first, second)]
    assert torch.equal(one, alone[0]) and torch.equal(two, alone[1])


def test_the_same_look_in_another_mode_or_file_is_encoded_once(loaded):
    image = of_palette(RED, GREEN)
    others = [image.convert("RGB"), Image.open(BytesIO(encoded(image))), image.convert("RGBA")]
    assert len({id(tiles) for tiles in loaded._pixels([image, *others])}) == 1


def test_transparency_is_dropped_and_the_colors_below_show(tmp_path):
    rgba = Image.new("RGBA", (4, 4), (*RED, 0))
    palette = of_palette(RED, GREEN)
    palette.info["transparency"] = bytes([0, 128])
    palette.save(tmp_path / "palette.png")
    gray = Image.new("LA", (4, 4), (200, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(rgba).getpixel((0, 0)) == RED
        assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == RED
        assert load_image(gray).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_8_bits_is_read(mode):
    image = Image.new(mode, (3, 2))
    assert (load_image(image).mode, load_image(image).size) == ("RGB", (3, 2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_high_byte_counts(tmp_path, kind):
    values = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    path = tmp_path / f"deep.{kind.lower()}"
    Image.fromarray(values).save(path)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]
    assert np.asarray(load_image(Image.open(path)))[0, :, 2].tolist() == [0, 0, 1, 0x12, 0x80, 0xFF]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_without_a_white_are_refused(mode):
    with pytest.raises(ValueError, match=r"nothing says which of them is white"):
        load_image(Image.new(mode, (3, 2), 7))


def test_a_profile_or_gamma_changes_nothing():
    image = noise(5, 4)
    plain, tagged = (Image.open(BytesIO(encoded(image, **more))) for more in ({}, {"icc_profile": b"profile"}))
    assert load_image(plain).tobytes() == load_image(tagged).tobytes()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_image_counts(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    path = tmp_path / f"moving.{kind.lower()}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert load_image(path).getpixel((3, 3)) == RED


# Orientation


def oriented(orientation: int, kind: str) -> bytes:
    """Red at the left and green at the right of a wide image, with an EXIF tag."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_datasets_does(tmp_path, kind, orientation):
    from datasets import Image as Feature

    content = oriented(orientation, kind)
    (tmp_path / "phone").write_bytes(content)
    expected = Feature().decode_example({"bytes": content, "path": None}).convert("RGB")
    for source in (tmp_path / "phone", Image.open(BytesIO(content)), expected):
        assert load_image(source).tobytes() == expected.tobytes() and load_image(source).size == expected.size


def test_orientation_is_applied_once_and_everywhere(tmp_path, processor, loaded):
    path = tmp_path / "phone.png"
    path.write_bytes(oriented(6, "PNG"))
    upright = load_image(path)
    assert upright.size == (16, 32) and upright.getpixel((8, 2)) == RED
    assert load_image(upright).tobytes() == upright.tobytes() == load_image(Image.open(path).convert("RGB")).tobytes()
    assert load_for_training is load_image
    assert torch.equal(process_images([path], processor, PAD), process_images([upright], processor, PAD))
    turned, same = loaded._pixels([Image.open(path), upright])
    assert turned is same
    prepared = loaded.prepare([loaded.prompt("?", 1)], [[Image.open(path)]])
    assert prepared["image_sizes"] == [(16, 32)]
    assert loaded.seen(Image.open(path)).tobytes() == loaded.seen(upright).tobytes()


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_metadata_do_not_matter(exif):
    image = noise(8, 8)
    image.info["exif"] = exif
    assert load_image(image).tobytes() == image.tobytes()


# Shapes and sizes


@pytest.mark.parametrize("size", [(31, 7), (7, 31), (640, 480), (333, 1000), (1000, 1), (1, 999), (513, 512), (90, 2)])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_shrinking_first_gives_the_same_pixels_to_the_bit(size, resample):
    image, color = noise(*size), (122, 116, 104)
    expected = expand2square(image, color).resize((28, 28), resample)
    assert shrink_padded(image, color, 28, resample).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(300, 200), (90, 400)])
def test_large_images_have_the_pixels_they_always_had(processor, monkeypatch, size):
    image = noise(*size)
    usual = process_images([image], processor, PAD)
    monkeypatch.setattr(mm_utils, "LARGEST_SQUARE", 50)
    assert torch.equal(process_images([image], processor, PAD), usual)


@pytest.mark.parametrize("config", [PAD, CROP, ANYRES])
@pytest.mark.parametrize("size", [(12000, 1)])
def test_thin_images_take_little_memory(processor, config, size):
    image = Image.new("RGB", size, RED)
    tracemalloc.start()
    pixels = process_images([image], processor, config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.isfinite().all() and peak < 30e6


def test_thin_images_never_become_a_large_one(processor, monkeypatch):
    """Pillow's memory is not Python's: no image that is made may have many pixels."""
    made, new, resize = [], Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest, **more: made.append(size) or resize(self, size, *rest, **more)
    )
    for config in (PAD, CROP, ANYRES):
        for size in ((12000, 1), (1, 12000)):
            process_images([new("RGB", size, RED)], processor, config)
    assert made and max(width * height for width, height in made) <= 12000 * mm_utils.STRIP


@pytest.mark.parametrize("size", [(30_001, 1), (1, 1_000_000)])
def test_images_longer_than_that_are_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels, more than 30000 on a side"):
        load_image(Image.new("RGB", size))


def test_the_middle_of_a_thin_image_is_what_is_seen(processor):
    image = Image.new("RGB", (4000, 2), RED)
    image.paste(GREEN, (1900, 0, 2100, 2))
    middle = process_images([Image.new("RGB", (28, 28), GREEN)], processor, CROP)
    torch.testing.assert_close(process_images([image], processor, CROP), middle)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(ValueError, match=r"image of mode RGB: .* 0.*none at all"):
        load_image(Image.new("RGB", size))


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    bomb = encoded(Image.new("1", (400, 300)))
    (tmp_path / "bomb.png").write_bytes(bomb)
    monkeypatch.setattr(images, "MAX_PIXELS", 100_000)
    for attempt in (
        lambda: load_image(tmp_path / "bomb.png"),
        lambda: load_image(Image.open(BytesIO(bomb))),
        lambda: load_image_from_base64(base64.b64encode(bomb)),
    ):
        with pytest.raises(ValueError, match="400 x 300 pixels, more than 100000") as error:
            attempt()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own protection gives one line, too
    with pytest.raises(ValueError, match=r"bomb\.png.*decompression bomb"):
        load_image(tmp_path / "bomb.png")


# Damage


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused_whatever_others_have_set(tmp_path, monkeypatch, kind, share):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # lmms-eval does, for the whole process
    content = encoded(noise(64, 64), kind)
    path = tmp_path / "half"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"half'.*expected a readable image file") as error:
        load_image(path)
    assert "\n" not in str(error.value) and ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match="base64"):
        load_image_from_base64(base64.b64encode(path.read_bytes()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF", "ICO", "TGA"])
def test_flipped_bytes_give_an_image_or_one_line(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content, draw = encoded(noise(31, 24), kind), random.Random(0)
    for _ in range(40):
        damaged = bytearray(content[: draw.choice([len(content), draw.randrange(len(content))])])
        for place in draw.choices(range(min(len(damaged), 300)), k=4) if damaged else ():
            damaged[place] = draw.choice([0, 127, 255])
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert load_image(tmp_path / "damaged").mode == "RGB"
        except ValueError as error:
            assert "\n" not in str(error) and "damaged'" in str(error)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "ftp://x/y.png", "file:///etc/passwd", "", "~"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="image '") as error:
        load_image(name)
    assert "\n" not in str(error.value)


def test_pipes_and_loops_do_not_hang(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop"):
        with pytest.raises(ValueError, match=f"{name}'"):
            load_image(tmp_path / name)


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="no known format"):
        load_image(tmp_path / "x.eps")


# Addresses


def test_data_addresses():
    text = "data:image/png;base64," + base64.b64encode(encoded(Image.new("L", (3, 2), 9))).decode()
    assert load_image(text).size == (3, 2) and load_image(text).mode == "RGB"
    with pytest.raises(ValueError, match=r"image 'data:.*expected a readable image"):
        load_image("data:text/html,<p>")


Reply = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], str]]:
    """Starts a web server whose answers a function gives; returns its address."""
    servers = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(OSError):  # the client may have had enough
                    reply(self)

            def log_message(self, *message) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/image.png"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer(content: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def test_an_image_is_downloaded_and_redirects_on_the_web_are_followed(serve):
    address = serve(answer(encoded(Image.new("RGB", (3, 2), RED))))
    assert load_image(address).getpixel((0, 0)) == RED
    assert load_image(serve(answer(b"", status=302, Location=address))).size == (3, 2)
    assert load_image(address.replace("http", "HTTP", 1)).size == (3, 2)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1:9/x.png", "data:image/png;base64,AA=="])
def test_redirects_elsewhere_are_not_followed(serve, target):
    with pytest.raises(ValueError, match=r"cannot be fetched: .*(redirected|not allowed)"):
        load_image(serve(answer(b"", status=302, Location=target)))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (answer(b"<html>Not found</html>", "text/html"), "a web page"),
        (answer(b"{}", "application/json"), "no known format"),
        (answer(b"", status=404), "HTTP status 404"),
        (answer(b"", status=500), "HTTP status 500"),
        (answer(b"short", **{"Content-Length": "500"}), "expected a readable"),
    ],
)
def test_addresses_with_no_image(serve, reply, words):
    with pytest.raises(ValueError, match=words) as error:
        load_image(serve(reply))
    assert "\n" not in str(error.value)


def test_downloads_end(serve, monkeypatch):
    monkeypatch.setattr(images, "DOWNLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 0.5)
    ended = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not ended.wait(0.05):
            handler.wfile.write(b"x")

    def never_begins(handler: BaseHTTPRequestHandler) -> None:
        while not ended.wait(0.05):
            handler.wfile.write(b"H")

    for reply, words in ((endless, "larger than 1 MiB"), (trickle, "longer than"), (never_begins, "longer than")):
        with pytest.raises(ValueError, match=words):
            load_image(serve(reply))
    ended.set()
