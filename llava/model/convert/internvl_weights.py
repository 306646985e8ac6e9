"""The weights of an InternVL chat checkpoint under the names of transformers' InternVL, fused matrices taken apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from llava.model.checkpoint.files import shape_of

TOWER, TEXT = "model.vision_tower.", "model.language_model."

# Theirs -> transformers'; the first pattern that matches a name's beginning or a part of it decides each step.
_NAMES = {
    r"^vision_model\.embeddings\.class_embedding$": TOWER + "embeddings.cls_token",
    r"^vision_model\.embeddings\.patch_embedding\.": TOWER + "embeddings.patch_embeddings.projection.",
    r"^vision_model\.embeddings\.position_embedding$": TOWER + "embeddings.position_embeddings",
    r"^vision_model\.encoder\.layers\.": TOWER + "encoder.layer.",
    r"^mlp1\.0\.": "model.multi_modal_projector.layer_norm.",
    r"^mlp1\.1\.": "model.multi_modal_projector.linear_1.",
    r"^mlp1\.3\.": "model.multi_modal_projector.linear_2.",
    r"^language_model\.(lm_head|output)\.": "lm_head.",
    r"^language_model\.model\.": TEXT,
}
_BLOCK = {
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.": ".attention.",
    r"\.ls([12])$": r".lambda_\1",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
}
_LAYER = {
    r"\.tok_embeddings\.": ".embed_tokens.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention\.wqkv\.": ".self_attn.wqkv.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
}
_FUSED = re.compile(r"^(.*\.)(attention\.qkv|self_attn\.wqkv)\.(weight|bias)$")
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|\w+_cached)$")


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor, read when they are indexed, as the slices of safetensors are.

    Attributes
    ----------
    stored : slice
        The fused matrix or bias.
    cut : callable
        Takes a part `[rows, ...]` out of the whole.
    rows : int
        How many.
    """

    stored: Any
    cut: Callable[[Tensor], Tensor]
    rows: int

    def get_shape(self) -> list[int]:
        """Shape of the part."""
        return [self.rows, *shape_of(self.stored)[1:]]

    def get_dtype(self) -> str:
        """The stored type, by safetensors' name."""
        return self.stored.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        return self.cut(self.stored[...])[index]


def translated(weights: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Weights of a whole checkpoint under transformers' names.

    Parameters
    ----------
    weights : mapping
        Tensors, or slices that read theirs when they are indexed, by the checkpoint's names. Nothing is read.
    config : InternVLConfig
        Of the same model.

    Raises
    ------
    ValueError
        If two weights would get one name, or a fused matrix cannot be taken apart.
    """
    result: dict[str, Any] = {}
    for name, value in weights.items():
        if _HARMLESS.search(name) or (config.tie_word_embeddings and name.startswith("language_model.lm_head.")):
            continue
        for new, part in _parts(new_name(name), value, config):
            if new in result:
                raise ValueError(f"weights: {name} would be {new}, which is there already")
            result[new] = part
    return result


def new_name(name: str) -> str:
    """What transformers calls a weight; fused ones and unknown ones keep their last part."""
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    for prefix, patterns in ((TOWER, _BLOCK), (TEXT, _LAYER)):
        for pattern, replacement in patterns.items() if name.startswith(prefix) else ():
            name = re.sub(pattern, replacement, name)
    return name


def _parts(name: str, value: Any, config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    fused = _FUSED.match(name)
    if fused is None:
        yield name, value
        return
    before, kind, last = fused.groups()
    width = shape_of(value)[0]
    cuts = _thirds(width) if kind == "attention.qkv" else _groups(width, config.text_config)
    if cuts is None:
        raise ValueError(f"weights: {name} has {width} rows, which are not those of config.json's heads")
    for letter, (cut, rows) in zip("qkv", cuts, strict=True):
        part = cut(value) if isinstance(value, Tensor) else Rows(value, cut, rows)
        yield f"{before}{kind.split('.')[0]}.{letter}_proj.{last}", part


def _thirds(width: int) -> list[tuple[Callable, int]] | None:
    """InternViT: all queries, all keys, all values."""
    rows = width // 3
    return None if width % 3 else [(_slice(part * rows, rows), rows) for part in range(3)]


def _slice(start: int, rows: int) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole[start : start + rows]


def _groups(width: int, text: PreTrainedConfig) -> list[tuple[Callable, int]] | None:
    """InternLM2: for every key head its group of query heads, its keys and its values, head by head."""
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    group, size = heads // kv, text.hidden_size // heads
    if width != (heads + 2 * kv) * size:
        return None
    places = (slice(0, group), slice(group, group + 1), slice(group + 1, group + 2))
    return [(_of_groups(kv, size, place), rows * size) for place, rows in zip(places, (heads, kv, kv), strict=True)]


def _of_groups(kv: int, size: int, place: slice) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole.unflatten(0, (kv, -1, size))[:, place].flatten(0, 2)
