"""What `generate` and `forward` are given, looked over before anything is computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from llava.model.language_model.cache import VisionCache

_REFUSED = {
    "inputs_embeds": "generate() takes ids (inputs=...) and images, it makes the embeddings itself",
    "position_ids": "generate() numbers the positions itself, from the ids and images",
    "labels": "generate() has no loss, call the model itself",
    "assistant_model": "assisted generation needs a cache that can be cut back, which a reduced one cannot",
    "prompt_lookup_num_tokens": "the ids of a prompt with images hold nothing to look up",
    "guidance_scale": "classifier-free guidance runs a second prompt, which needs images of its own",
    "negative_prompt_ids": "classifier-free guidance runs a second prompt, which needs images of its own",
    "custom_generate": "a generation loop of somebody else's does not know this cache",
    "cache_config": "the cache is this model's own (VisionCache)",
    "prefill_chunk_size": "a prompt is prefilled in one pass, a reducer has to see all of it",
}
_CACHES = (None, "dynamic")


def check_generation(input_ids: Tensor | None, kwargs: dict[str, Any], default: GenerationConfig) -> None:
    """Raise ValueError, in one line that names the argument, for what `generate` cannot do with images and reducers."""
    if input_ids is None or input_ids.dim() != 2:
        found = "nothing" if input_ids is None else f"shape {list(input_ids.shape)}"
        raise ValueError(f"inputs: got {found}, expected prompt ids [batch, length]")
    config = kwargs.get("generation_config") or default
    for name, reason in _REFUSED.items():
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"{name}: {reason}")
    implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if implementation not in _CACHES:
        raise ValueError(
            f"cache_implementation: got {implementation!r}, expected nothing or 'dynamic': layers cache different "
            "numbers of tokens, which needs this model's own cache"
        )


def one_cache(past_key_values: Any, cache: Any) -> VisionCache | None:
    """The cache that was passed under one of its two names.

    Raises
    ------
    ValueError
        If two were passed, or one that cannot hold a different number of positions for every layer.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values: also given as cache, which is the same thing under transformers' newer name")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, VisionCache):
        raise ValueError(
            f"past_key_values: got a {type(cache).__name__}, expected none or a VisionCache "
            "(llava.model.language_model.cache): layers may cache different numbers of tokens"
        )
    return cache


def new_tokens(kwargs: dict[str, Any], default: GenerationConfig, prompt: int) -> int | None:
    """How many tokens `generate` may add to a prompt of `prompt` positions; None where nothing says so.

    Raises
    ------
    ValueError
        If `max_length` leaves no room after the prompt.
    """
    config = kwargs.get("generation_config") or default
    limit, total = (
        kwargs.get(name) if kwargs.get(name) is not None else getattr(config, name, None)
        for name in ("max_new_tokens", "max_length")
    )
    if limit is not None or total is None:
        return limit
    if total <= prompt:
        raise ValueError(
            f"max_length: got {total}, but the prompt alone has {prompt} positions, those of its images included; "
            f"use max_new_tokens, or a max_length above {prompt}"
        )
    return total - prompt
