"""What happened to every vision token of a prompt."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from mustdrop.hooks import Call
    from mustdrop.tokens import Tokens


class Trace:
    """The record of one prompt: how many vision tokens each layer saw, and which patches they stand for.

    Nothing is copied to the host before it is read. Patches are numbered through the prompt's images in order: patch p
    of the second image is `images[0]["patches"] + p`. A merged token stands for several patches.

    Attributes
    ----------
    images : list of dict
        Per image: `patches` it was cut into and `tokens` that entered the language model.
    tokens : list of list of int
        For every vision token that entered the language model, the patches it stands for.
    key_tokens : list of int
        Which of these may not be dropped.
    text_tokens : int
        Text tokens of the prompt.
    vision_tokens, vision_tokens_after : list of int
        Vision tokens entering, and leaving, each decoder layer.
    kept : dict
        `kept[stage][layer]` -> sorted patches still stood for: stage "vision" after an encoder block that changed the
        tokens, "prefill" after a decoder layer that dropped some, "decode" in the cache of every decoder layer.
    cache_lengths : list of int
        Positions each layer's cache holds for this prompt when prefill ends; empty without a cache.
    cache_bytes : int
        Bytes of these keys and values.
    """

    def __init__(self, call: Call, row: int, prompt: int):
        self._call, self._row, self._prompt = call, row, prompt
        self._seconds, self._shares = call.seconds, _shares(call, prompt)

    @cached_property
    def _facts(self) -> dict:
        """Everything on the host, read once; the tensors are let go."""
        call, row = self._call, self._row
        images = call.images[self._prompt]
        entered = call.entered[0]
        in_vision = {block: owner[call.tiles[self._prompt]].reshape(-1) for block, owner in call.vision.items()}
        in_cache = {id(tokens): self._patches(tokens) for tokens in {id(t): t for t in call.cached}.values()}
        kept: dict[str, dict[int, list[int]]] = {"vision": {}, "prefill": {}, "decode": {}}
        if images:
            kept["vision"] = {block: (owner >= 0).nonzero()[:, 0].tolist() for block, owner in in_vision.items()}
            kept["prefill"] = {layer: self._patches(call.left[layer]) for layer in call.decided}
            kept["decode"] = {layer: in_cache[id(tokens)] for layer, tokens in enumerate(call.cached)}
        key = entered.protected[row] & entered.vision[row]
        cache_lengths = [int(tokens.counts[row]) for tokens in call.cached]
        facts = {
            "images": [{"patches": len(owner), "tokens": tokens} for tokens, owner in images],
            "tokens": [patches for image in _token_patches(images) for patches in image],
            "key_tokens": entered.index[row][key].tolist(),
            "text_tokens": int(entered.counts[row] - entered.vision[row].sum()),
            "vision_tokens": _vision_counts(call.entered, row),
            "vision_tokens_after": _vision_counts(call.left, row),
            "kept": kept,
            "cache_lengths": cache_lengths,
            "cache_bytes": sum(n * size for n, size in zip(cache_lengths, call.kv_bytes, strict=True)),
        }
        self._call = None
        return facts

    def _patches(self, tokens: Tokens) -> list[int]:
        """Patches that the vision tokens of a record stand for, sorted."""
        of_token = [patches for image in _token_patches(self._call.images[self._prompt]) for patches in image]
        alive = tokens.index[self._row][tokens.vision[self._row]].tolist()
        return sorted(patch for token in alive for patch in of_token[token])

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in (facts := self._facts):
            raise AttributeError(name)
        return facts[name]

    @property
    def mean_tokens(self) -> float:
        """Vision tokens per decoder layer, every layer counted with the tokens it computed on."""
        return sum(self.vision_tokens) / len(self.vision_tokens)

    @property
    def mean_tokens_official(self) -> float:
        """The authors' meter: a layer after which tokens are dropped counts as if it had not computed them."""
        return sum(self.vision_tokens_after) / len(self.vision_tokens_after)

    @property
    def times_ms(self) -> dict[str, float]:
        """Milliseconds per part (vision, prefill, selector, decode), a batch's time shared evenly by its prompts.

        "vision" is what the prompt's own pictures took, even if other prompts of the batch shared their encoding. What
        the method itself needs, "selector", is also part of "vision" and "prefill". Empty unless the reducer was
        switched on with `timing=True`.
        """
        return {part: 1000 * seconds * self._shares[part == "vision"] for part, seconds in self._seconds.items()}

    def to_dict(self) -> dict:
        """Everything above as plain lists and numbers, ready for JSON."""
        means = {"mean_tokens": self.mean_tokens, "mean_tokens_official": self.mean_tokens_official}
        return {**self._facts, **means, "times_ms": self.times_ms}

    def __repr__(self) -> str:
        return f"Trace(vision_tokens={self.vision_tokens}, mean_tokens={self.mean_tokens:.1f})"


def _shares(call: Call, prompt: int) -> tuple[float, float]:
    """A prompt's part of a batch's time, and of the time that its pictures took."""
    encoded = len({tile for tiles in call.tiles for tile in tiles})
    return 1 / len(call.images), len(call.tiles[prompt]) / max(encoded, 1)


def _token_patches(images: list[tuple[int, Tensor]]) -> list[list[list[int]]]:
    """Per image and token, the patches it stands for; patches are numbered through all images."""
    result, offset = [], 0
    for count, owner in images:
        of_token: list[list[int]] = [[] for _ in range(count)]
        for patch, token in enumerate(owner.tolist()):
            if token >= 0:
                of_token[token].append(patch + offset)
        result.append(of_token)
        offset += len(owner)
    return result


def _vision_counts(layers: list[Tokens], row: int) -> list[int]:
    """Vision tokens of one prompt per layer; layers that share a record are counted once, in one transfer."""
    records = {id(tokens): tokens for tokens in layers}
    counts: Tensor = torch.stack([tokens.vision[row].sum().cpu() for tokens in records.values()])
    by_record = dict(zip(records, counts.tolist(), strict=True))
    return [by_record[id(tokens)] for tokens in layers]
