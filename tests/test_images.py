"""From picture files to pixel tensors."""

import base64
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    load_image,
    load_image_from_base64,
    load_image_processor,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
)

PAD = SimpleNamespace(image_aspect_ratio="pad")
CROP = SimpleNamespace(image_aspect_ratio=None)
RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture(scope="module")
def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


@pytest.fixture(scope="module")
def golden_processor(golden: Path) -> CLIPImageProcessorPil:
    return load_image_processor(golden / "model_clip")


@pytest.fixture(scope="module")
def golden_pixels(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "preprocess.safetensors")


@pytest.fixture(scope="module")
def golden_facts(golden: Path) -> dict:
    return json.loads((golden / "preprocess.json").read_text())


class TestGolden:
    @pytest.mark.parametrize("name", ["img1", "img3"])
    @pytest.mark.parametrize(("mode", "config"), [("pad", PAD), ("none", CROP)])
    def test_pixels(self, golden, golden_processor, golden_pixels, name, mode, config):
        pixels = process_images([load_image(golden / "images" / f"{name}.png")], golden_processor, config)
        torch.testing.assert_close(pixels, golden_pixels[f"{name}_{mode}"], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["img1", "img2", "noise", "smooth"])
    def test_pixels_of_the_vision_cases(self, golden, golden_processor, name):
        pixels = process_images([load_image(golden / "images" / f"{name}.png")], golden_processor, PAD)
        expected = load_file(golden / f"vision_{name}.safetensors")["pixel_values"]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["img1", "img3"])
    def test_square(self, golden, golden_pixels, golden_facts, name):
        square = expand2square(load_image(golden / "images" / f"{name}.png"), golden_facts["pad_color_uint8"])
        assert np.array_equal(np.asarray(square), golden_pixels[f"{name}_square_uint8"])

    def test_tiles(self, golden, golden_processor, golden_pixels, golden_facts):
        pinpoints = golden_facts["anyres_grid_pinpoints"]
        tiles = process_anyres_image(load_image(golden / "images" / "img1.png"), golden_processor, pinpoints)
        assert list(tiles.shape) == golden_facts["anyres_img1_tiles"]
        torch.testing.assert_close(tiles[:2], golden_pixels["img1_anyres_first_and_second_tile"], rtol=0, atol=1e-6)


class TestProcessing:
    def test_padding_takes_the_mean_color(self, processor):
        pixels = process_images([Image.new("RGB", (28, 14), (255, 255, 255))], processor, PAD)
        assert pixels.shape == (1, 3, 28, 28)
        assert pixels.dtype == torch.float32
        assert pixels[0, :, 0].abs().max() < 0.02  # the mean colour, in whole numbers, normalises to about 0
        white = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
        torch.testing.assert_close(pixels[0, :, 14, 14], white, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("config", [CROP, SimpleNamespace(image_aspect_ratio="square"), SimpleNamespace(), None])
    def test_cropping_takes_the_middle(self, processor, config):
        image = Image.new("RGB", (84, 28), RED)
        image.paste(GREEN, (28, 0, 56, 28))
        middle = process_images([Image.new("RGB", (28, 28), GREEN)], processor, CROP)
        torch.testing.assert_close(process_images([image], processor, config), middle)

    def test_batch_equals_the_pictures_one_by_one(self, processor):
        images = [Image.effect_noise((40, 30), 50), Image.effect_noise((20, 60), 50), Image.effect_noise((28, 28), 50)]
        for config in (PAD, CROP):
            alone = [process_images([image], processor, config) for image in images]
            assert torch.equal(process_images(images, processor, config), torch.cat(alone))

    @pytest.mark.parametrize("config", [PAD, CROP])
    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
    def test_every_mode_is_read_as_rgb(self, processor, config, mode):
        image = Image.effect_noise((31, 20), 80).convert("RGB").convert(mode)
        expected = process_images([image.convert("RGB")], processor, config)
        assert torch.equal(process_images([image], processor, config), expected)

    @pytest.mark.parametrize("config", [PAD, CROP])
    @pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 50), (2, 500)])
    def test_thin_pictures(self, processor, config, size):
        pixels = process_images([Image.new("RGB", size, RED)], processor, config)
        assert pixels.shape == (1, 3, 28, 28)
        assert pixels.isfinite().all()

    def test_paths_do_as_well(self, processor, tmp_path):
        image = Image.effect_noise((31, 20), 80)
        image.save(tmp_path / "noise.png")
        assert torch.equal(
            process_images([tmp_path / "noise.png"], processor, PAD), process_images([image], processor, PAD)
        )

    def test_no_pictures(self, processor):
        with pytest.raises(ValueError, match="images: got none"):
            process_images([], processor, PAD)

    def test_unknown_aspect_ratio(self, processor):
        with pytest.raises(ValueError, match=r"image_aspect_ratio: got 'stretch'.*pad"):
            process_images([Image.new("RGB", (4, 4))], processor, SimpleNamespace(image_aspect_ratio="stretch"))

    def test_processor_never_depends_on_torchvision(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = load_image_processor(tmp_path)
        assert isinstance(loaded, CLIPImageProcessorPil)
        assert (loaded.crop_size["height"], loaded.size["shortest_edge"]) == (28, 28)


class TestSquare:
    @pytest.mark.parametrize(("size", "corner"), [((5, 2), (0, 1)), ((2, 5), (1, 0))])
    def test_picture_is_in_the_middle(self, size, corner):
        square = expand2square(Image.new("RGB", size, RED), GREEN)
        assert square.size == (5, 5)
        inside = Image.new("RGB", (5, 5), GREEN)
        inside.paste(RED, (*corner, corner[0] + size[0], corner[1] + size[1]))
        assert square.tobytes() == inside.tobytes()

    def test_square_is_left_alone(self):
        image = Image.effect_noise((7, 7), 50).convert("RGB")
        assert expand2square(image, GREEN).tobytes() == image.tobytes()

    def test_gray_picture_gets_a_colored_border(self):
        assert expand2square(Image.new("L", (3, 1), 9), RED).getpixel((0, 0)) == RED


class TestTiles:
    @pytest.mark.parametrize(
        ("size", "canvas"),
        [((480, 360), (672, 672)), ((100, 300), (336, 672)), ((900, 100), (1008, 336)), ((336, 336), (336, 672))],
    )
    def test_best_canvas(self, size, canvas):
        assert select_best_resolution(size, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]) == canvas

    def test_canvas_keeps_the_shape(self):
        canvas = resize_and_pad_image(Image.new("RGB", (10, 5), RED), (40, 40))
        assert canvas.size == (40, 40)
        assert canvas.getpixel((0, 20)) == RED
        assert canvas.getpixel((0, 9)) == canvas.getpixel((0, 30)) == (0, 0, 0)

    def test_tiles_run_row_by_row(self):
        image = Image.new("RGB", (4, 4), RED)
        image.paste(GREEN, (2, 0, 4, 2))
        assert [tile.getpixel((0, 0)) for tile in divide_to_patches(image, 2)] == [RED, GREEN, RED, RED]

    def test_grid(self):
        assert get_anyres_image_grid_shape((100, 300), "[[28, 56], [56, 28]]", 28) == (1, 2)

    def test_pictures_with_the_same_and_with_different_grids(self, processor):
        config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])
        wide, square = Image.new("RGB", (60, 20)), Image.new("RGB", (60, 60))
        assert process_images([wide, wide], processor, config).shape == (2, 3, 3, 28, 28)
        tiled = process_images([wide, square], processor, config)
        assert [tuple(tiles.shape) for tiles in tiled] == [(3, 3, 28, 28), (5, 3, 28, 28)]

    @pytest.mark.parametrize("pinpoints", ["no list", []])
    def test_unusable_pinpoints(self, processor, pinpoints):
        with pytest.raises(ValueError, match="image_grid_pinpoints"):
            process_anyres_image(Image.new("RGB", (4, 4)), processor, pinpoints)


class TestLoading:
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
    def test_files(self, tmp_path, mode):
        image = Image.effect_noise((6, 4), 50).convert("RGB").convert(mode)
        image.save(tmp_path / "image.png")
        for source in (tmp_path / "image.png", str(tmp_path / "image.png"), image):
            loaded = load_image(source)
            assert (loaded.mode, loaded.size) == ("RGB", (6, 4))
            assert loaded.tobytes() == image.convert("RGB").tobytes()

    @pytest.mark.parametrize("content", [None, b"", b"plain text", "folder", "truncated"])
    def test_unreadable_files(self, tmp_path, monkeypatch, content):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # some packages switch it on for everybody
        path = tmp_path / "image.png"
        if content == "folder":
            path.mkdir()
        elif content == "truncated":
            buffer = BytesIO()
            Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
            path.write_bytes(buffer.getvalue()[:200])
        elif content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"image\.png'.*expected a readable image file") as error:
            load_image(path)
        assert "\n" not in str(error.value)

    def test_unreachable_address(self):
        with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/image\.png.*cannot be fetched"):
            load_image("http://127.0.0.1:9/image.png")

    def test_not_a_picture_at_all(self):
        with pytest.raises(ValueError, match="got int"):
            load_image(7)

    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
    def test_base64(self, prefix):
        buffer = BytesIO()
        Image.new("RGB", (3, 2), RED).save(buffer, format="PNG")
        text = prefix + base64.b64encode(buffer.getvalue()).decode()
        assert load_image_from_base64(text).size == load_image_from_base64(text.encode()).size == (3, 2)

    @pytest.mark.parametrize("text", ["", "%%%", "aGVsbG8="])
    def test_base64_of_something_else(self, text):
        with pytest.raises(ValueError, match="base64"):
            load_image_from_base64(text)
