"""Tiny random models of transformers' own multimodal classes, one per family, and inputs for them."""

from __future__ import annotations

from functools import cache

import torch
import transformers as hf

IMAGE, VIDEO = 150, 151  # ids of placeholders
SIDE = 6  # patches along the side of a view
PIXELS = 14 * SIDE
LAYERS = 6
TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": PIXELS,
}
GRIDS = [[PIXELS, 2 * PIXELS], [2 * PIXELS, PIXELS], [2 * PIXELS, 2 * PIXELS], [3 * PIXELS, PIXELS]]
SIZES = [[150, 160], [70, 160]]  # (height, width): four tiles, and two

TEXTS = {
    "llama": lambda: hf.LlamaConfig(**TEXT),
    "mistral": lambda: hf.MistralConfig(**TEXT, sliding_window=None),
    "sliding": lambda: hf.MistralConfig(**TEXT, sliding_window=40),
    "phi3": lambda: hf.Phi3Config(**TEXT, sliding_window=None),
    "gemma": lambda: hf.GemmaConfig(**TEXT, head_dim=16),
    "qwen2": lambda: hf.Qwen2Config(**TEXT),
    "qwen3": lambda: hf.Qwen3Config(**TEXT, head_dim=16),
}


def _parts(text: str) -> dict:
    return {"vision_config": hf.CLIPVisionConfig(**VISION), "text_config": TEXTS[text]()}


def _llava(text: str, **more):
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=TEXTS[text](), image_token_index=IMAGE, **more
    )
    return hf.LlavaForConditionalGeneration(config)


def _next(text: str, **more):
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=TEXTS[text](),
        image_token_index=IMAGE,
        image_grid_pinpoints=GRIDS,
        **more,
    )
    return hf.LlavaNextForConditionalGeneration(config)


def _onevision(text: str, **more):
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=TEXTS[text](),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=GRIDS,
        **more,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _video(text: str, **more):
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=TEXTS[text](),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **more,
    )
    return hf.VideoLlavaForConditionalGeneration(config)


QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 152, "vision_end_token_id": 153}
QWEN_VISION = {"depth": 4, "num_heads": 4, "patch_size": 14}
GATED = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
QWEN_GRIDS = [[1, 12, 16], [1, 20, 12]]  # frames, rows and columns of patches, four to a vision token
CLIPS = [[3, 12, 12], [2, 8, 12]]


def _mrope(*section: int, **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}
    return {**TEXT, "rope_parameters": rope}


def _qwen2(text: str, **more):
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config=_mrope(2, 3, 3), vision_config=vision, **QWEN_IDS, **more)
    return hf.Qwen2VLForConditionalGeneration(config)


def _qwen25(text: str, full: list[int] | None = None, **more):
    vision = {**QWEN_VISION, **GATED, "window_size": 112, "fullatt_block_indexes": full or [1, 3]}
    config = hf.Qwen2_5_VLConfig(text_config=_mrope(2, 3, 3), vision_config=vision, **QWEN_IDS, **more)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3(text: str, **more):
    vision = {**QWEN_VISION, **GATED, "deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64}
    text_config = {**_mrope(3, 3, 2, mrope_interleaved=True), "head_dim": 16}
    config = hf.Qwen3VLConfig(text_config=text_config, vision_config=vision, **QWEN_IDS, **more)
    return hf.Qwen3VLForConditionalGeneration(config)


TILE = 12  # patches along the side of a tile of InternVL, four to a vision token
TILES = [4, 3]  # of two images, a thumbnail being the last


def _internvl(text: str, **more):
    size = {"patch_size": (14, 14), "image_size": (14 * TILE, 14 * TILE), "layer_scale_init_value": 1.0}
    big = {"norm_type": "rms_norm", "use_qk_norm": True}  # the towers of 6B parameters
    small = {"norm_type": "layer_norm", "attention_bias": True}
    vision = {**VISION, **size, **(big if text in ("llama", "phi3") else small)}
    config = hf.InternVLConfig(
        text_config=TEXTS[text]().to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=(TILE // 2) ** 2,
        tie_word_embeddings=False,
        **more,
    )
    return hf.InternVLForConditionalGeneration(config)


FAMILIES = {
    "llava": _llava,
    "next": _next,
    "onevision": _onevision,
    "video": _video,
    "qwen2": _qwen2,
    "qwen2.5": _qwen25,
    "qwen3": _qwen3,
    "internvl": _internvl,
}


def family_of(family: str) -> str:
    """A family with what stands in its prompts instead of images: "qwen2 clips"."""
    return family.split()[0]


@cache
@torch.inference_mode(False)  # a test that runs in inference mode may be the first to ask
def stock(family: str, text: str = "llama", **more):
    """A random model in evaluation mode whose attention is far from uniform, so that choices have a margin."""
    torch.manual_seed(0)
    more = {name: list(value) if isinstance(value, tuple) else value for name, value in more.items()}
    model = FAMILIES[family_of(family)](text, **more).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                sharp = any(part in name for part in ("q_proj", "k_proj", "qkv"))
                weight.normal_(std=0.18 if sharp else 0.06)
    return model


def pixels(*shape: int, seed: int = 0, side: int = PIXELS) -> torch.Tensor:
    """Noise that is faint in two thirds of every view, so that some windows merge."""
    size = (*shape, 3, side, side)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    noise[..., : side * 2 // 3] *= 0.02
    noise[..., : side * 2 // 3] += 0.5
    return noise


def patches(grids: list[list[int]], seed: int = 0) -> torch.Tensor:
    """Pixels of the patches of images or videos for the Qwens, faint in two thirds of each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for frames, rows, columns in grids:
        noise = torch.randn(frames * rows * columns, 3 * 2 * 14 * 14, generator=generator)
        noise[: len(noise) * 2 // 3] *= 0.02
        noise[: len(noise) * 2 // 3] += 0.5
        found.append(noise)
    return torch.cat(found)


def ids_of(prompts: list[tuple[int, list[tuple[int, int]], int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left: text before, placeholders (id, how many) with a token after each, text after."""
    generator = torch.Generator().manual_seed(seed)

    def text(count: int) -> list[int]:
        return torch.randint(3, 140, (count,), generator=generator).tolist()

    rows = [
        torch.tensor(text(before) + [i for token, count in runs for i in [token] * count + [5]] + text(after))
        for before, runs, after in prompts
    ]
    return {
        name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side="left")
        for name, values in (("input_ids", rows), ("attention_mask", [torch.ones_like(row) for row in rows]))
    }


def tokens_of(model, size: list[int] | None = None) -> int:
    """Placeholders of an image, from the stock model's own features."""
    given = {"pixel_values": pixels(1)}
    if size is not None:
        given = {"pixel_values": pixels(1, 5), "image_sizes": torch.tensor([size])}
    with torch.no_grad():
        return len(model.get_image_features(**given).pooler_output[0])


def inputs(family: str, model, images: int = 2) -> dict[str, torch.Tensor]:
    """A batch of prompts with an image (or video) each, of different sizes where the family has such."""
    texts = [(3, 6), (5, 9), (2, 4)][:images]
    if family.startswith("qwen"):
        return qwen_inputs(texts, ((CLIPS if "clips" in family else QWEN_GRIDS) * 2)[:images], family)
    if family == "internvl":
        tiles = (TILES * 2)[:images]
        counts, given = (
            [count * (TILE // 2) ** 2 for count in tiles],
            {"pixel_values": pixels(sum(tiles), side=14 * TILE)},
        )
    elif family == "llava":
        counts, given = [tokens_of(model)] * images, {"pixel_values": pixels(images)}
    elif family == "video":
        counts = [4 * (SIDE**2 + 1)] * images
        given = {"pixel_values_videos": pixels(images, 4)}
    else:
        sizes = (SIZES * 2)[:images]
        counts = [tokens_of(model, size) for size in sizes]
        given = {"pixel_values": pixels(images, 5), "image_sizes": torch.tensor(sizes)}
    token = VIDEO if family == "video" else IMAGE
    prompts = [(before, [(token, count)], after) for (before, after), count in zip(texts, counts, strict=True)]
    return {**ids_of(prompts), **given}


def qwen_inputs(texts: list[tuple[int, int]], grids: list[list[int]], family: str) -> dict[str, torch.Tensor]:
    """A batch of prompts with an image (or video) each for the Qwens."""
    token, videos = (VIDEO, "videos") if "clips" in family else (IMAGE, "")
    runs = [_runs(token, grid, family) for grid in grids]
    ids = ids_of([(before, run, after) for (before, after), run in zip(texts, runs, strict=True)])
    return {
        **typed(family, ids),
        f"pixel_values{'_' * bool(videos)}{videos}": patches(grids),
        f"{'video' if videos else 'image'}_grid_thw": torch.tensor(grids),
    }


def _runs(token: int, grid: list[int], family: str) -> list[tuple[int, int]]:
    """Placeholders of an image; the third Qwen says between the frames of a video what time it is."""
    frames, rows, columns = grid
    each = rows * columns // 4
    return [(token, each)] * frames if family == "qwen3 clips" else [(token, frames * each)]


def typed(family: str, ids: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ids with what the Qwens want to be told: where images stand, and where videos."""
    if not family.startswith("qwen"):
        return ids
    found = ids["input_ids"]
    return {**ids, "mm_token_type_ids": (found == IMAGE).int() + 2 * (found == VIDEO).int()}


def positions(model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rotary positions as the stock model gives them to prompts without padding."""
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(given["input_ids"].shape[1])[None]
    wanted = "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"
    return model.model.get_rope_index(**{name: given[name] for name in wanted if name in given})[0]


def alone(given: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One prompt of a batch with an image each, without padding."""
    mask = given["attention_mask"][row].bool()
    single = {name: value[row : row + 1] for name, value in given.items()}
    for name, value in given.items():
        if name.endswith("_grid_thw"):
            pixels = "pixel_values" if name.startswith("image") else "pixel_values_videos"
            single[pixels] = given[pixels].split(value.prod(-1).tolist())[row]
    if given.get("pixel_values", mask).shape[-1] == 14 * TILE:
        tiles = ((given["input_ids"] == IMAGE).sum(-1) // (TILE // 2) ** 2).tolist()
        single["pixel_values"] = given["pixel_values"].split(tiles)[row]
    text = [name for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in given]
    return {**single, **{name: single[name][:, mask] for name in text}}


def generate(model, given: dict[str, torch.Tensor], new_tokens: int = 4, **how):
    """Greedy ids and the logits of every step `[rows, steps, vocabulary]`."""
    how = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, **how}
    output = model.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
    return output.sequences, torch.stack(output.logits, dim=1)
