"""Tiny LLaVA-NeXT models in LLaVA's own format, on the weights of transformers' class, and images for them."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import stock
import torch
from safetensors.torch import save_file

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM

SIDE, PIXELS = stock.SIDE, stock.PIXELS
GRIDS = [[width, height] for height, width in stock.GRIDS]
SIZES = {"square": (160, 150), "wide": (160, 70), "tall": (70, 160), "cut": (100, 97), "strip": (250, 60)}
"""Width and height in pixels; the borders of most are cut off."""
KINDS = {"llama": ("llava", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
KINDS["sliding"] = KINDS["mistral"]
NAMES = {
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1": "model.mm_projector.0",
    "model.multi_modal_projector.linear_2": "model.mm_projector.2",
}


def views(size: tuple[int, int]) -> int:
    """Views of an image of a size (width, height)."""
    from llava.anyres import get_anyres_image_grid_shape

    columns, rows = get_anyres_image_grid_shape(size, GRIDS, PIXELS)
    return 1 + columns * rows


def save(folder: Path, text: str = "llama", **changes) -> Path:
    """Write the weights of `stock.stock("next", text)` as an original checkpoint with its tower inside."""
    model = stock.stock("next", text)
    state = {}
    for name, value in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours, 1) if name.startswith(theirs) else name
        state[name] = value.clone()
    if changes.get("mm_patch_merge_type", "spatial_unpad") != "spatial_unpad":
        del state["model.image_newline"]
    kind, architecture = KINDS[text]
    facts = {
        **model.config.text_config.to_dict(),
        "model_type": kind,
        "architectures": [architecture],
        "mm_vision_config": model.config.vision_config.to_dict(),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": GRIDS,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(state, folder / "model.safetensors")
    return folder


@cache
@torch.inference_mode(False)  # a test that runs in inference mode may be the first to ask
def native(text: str = "llama", **changes) -> LlavaLlamaForCausalLM:
    """Our class on the weights of `stock.stock("next", text)`."""
    with tempfile.TemporaryDirectory() as folder:
        return LlavaLlamaForCausalLM.from_pretrained(save(Path(folder), text, **changes), dtype=torch.float32).eval()


def stacks(sizes: list[tuple[int, int]], seed: int = 0) -> list[torch.Tensor]:
    """Pixels of images of some sizes, `[views, 3, PIXELS, PIXELS]` each."""
    return [stock.pixels(views(size), seed=seed + number) for number, size in enumerate(sizes)]


def prompts(texts: list[tuple[int, int, int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids, padded on the left: text before, images with a text token after each, text after."""
    return stock.ids_of([(before, [(IMAGE_TOKEN_INDEX, 1)] * images, after) for before, images, after in texts], seed)


def for_stock(model, given: dict[str, torch.Tensor], sizes: list[tuple[int, int]], pixels: list[torch.Tensor]):
    """The same prompts for transformers' class: placeholders, heights before widths, views padded to one number."""
    heights = [[height, width] for width, height in sizes]
    counts = iter([stock.tokens_of(model, size) for size in heights])
    rows = [
        [i for one in row[mask.bool()].tolist() for i in ([stock.IMAGE] * next(counts) if one < 0 else [one])]
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side="left")
        for name, values in (
            ("input_ids", [torch.tensor(row) for row in rows]),
            ("attention_mask", [torch.ones(len(row), dtype=torch.long) for row in rows]),
        )
    }
    if not pixels:
        return padded
    most = max(map(len, pixels))
    stacked = torch.stack([torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]) for own in pixels])
    return {**padded, "pixel_values": stacked, "image_sizes": torch.tensor(heights)}
