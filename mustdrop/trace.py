"""What happened to every vision token of a prompt."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mustdrop.neighbours import SplitRows

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
        Per image: `patches` it was cut into, `tokens` that entered the language model, and `blocks`, a pair for every
        vision block that changed the tokens: its number and how many tokens left it.
    before_mlp : bool
        Whether vision blocks changed the tokens between attention and MLP instead of after both.
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
    plans : dict
        `plans[layer]` -> what the decoder layer computed for vision tokens, where that is not everything: the fields of
        `LayerPlan`, and `pairs`, the pairs of a vision row and a key that one head computed.
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
        owners = [_owner(images)]
        for layer, tokens in enumerate(call.entered):
            into = call.merged.get(layer)
            owners.append(owners[-1] if into is None else _joined(owners[-1], tokens.index[row], into[row]))
        alive = {id(call.left[layer]): (owners[layer + 1], call.left[layer]) for layer in call.decided}
        for layer, tokens in enumerate(call.cached):
            alive.setdefault(id(tokens), (owners[layer], tokens))
        patches = {key: _patches(owner, tokens, row) for key, (owner, tokens) in alive.items()}
        kept: dict[str, dict[int, list[int]]] = {"vision": {}, "prefill": {}, "decode": {}}
        if images:
            tiles = call.tiles[self._prompt]
            kept["vision"] = {b: (o[tiles].reshape(-1) >= 0).nonzero()[:, 0].tolist() for b, o in call.vision.items()}
            kept["prefill"] = {layer: patches[id(call.left[layer])] for layer in call.decided}
            kept["decode"] = {layer: patches[id(tokens)] for layer, tokens in enumerate(call.cached)}
        key = entered.protected[row] & entered.vision[row]
        cache_lengths = [int(tokens.counts[row]) for tokens in call.cached]
        facts = {
            "images": [
                {"patches": len(owner), "tokens": tokens, "blocks": _blocks(call.vision, tile)}
                for tile, (tokens, owner) in zip(call.tiles[self._prompt], images, strict=True)
            ],
            "before_mlp": call.does("inside_vision_block"),
            "key_tokens": entered.index[row][key].tolist(),
            "text_tokens": int(entered.counts[row] - entered.vision[row].sum()),
            "vision_tokens": _vision_counts(call.entered, row),
            "vision_tokens_after": _vision_counts(call.left, row),
            "kept": kept,
            "cache_lengths": cache_lengths,
            "cache_bytes": sum(n * size for n, size in zip(cache_lengths, call.kv_bytes, strict=True)),
            "plans": _plans(call, row) if images else {},
        }
        self._owner, self._call = owners[0], None
        return facts

    @cached_property
    def tokens(self) -> list[list[int]]:
        """For every vision token that entered the language model, the patches it stands for."""
        of_token: list[list[int]] = [[] for _ in range(sum(image["tokens"] for image in self.images))]
        for patch, token in enumerate(self._owner.tolist()):
            if token >= 0:
                of_token[token].append(patch)
        return of_token

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
        return {**self._facts, "tokens": self.tokens, **means, "times_ms": self.times_ms}

    def __repr__(self) -> str:
        return f"Trace(vision_tokens={self.vision_tokens}, mean_tokens={self.mean_tokens:.1f})"


def _plans(call: Call, row: int) -> dict[int, dict]:
    """The layers of a prompt that were computed by a plan, counted as if it had been alone."""
    pairs: dict[tuple, int] = {}
    plans = {}
    for layer, plan in enumerate(call.plans):
        if plan is not None:
            tokens = call.entered[layer]
            alike = id(tokens), plan.window
            if alike not in pairs:
                rows = SplitRows.of(_alone(tokens, row), plan.window)
                pairs[alike] = rows.pairs() if rows is not None else 0
            plans[layer] = {**asdict(plan), "pairs": pairs[alike]}
    return plans


def _alone(tokens: Tokens, row: int) -> Tokens:
    """The record of one prompt without padding."""
    own = tokens.map(lambda value: value[..., row : row + 1, :])
    return own.select(torch.ones_like(own.image, dtype=torch.bool))[1]


def _shares(call: Call, prompt: int) -> tuple[float, float]:
    """A prompt's part of a batch's time, and of the time that its pictures took."""
    encoded = len({tile for tiles in call.tiles for tile in tiles})
    return 1 / len(call.images), len(call.tiles[prompt]) / max(encoded, 1)


def _owner(images: list[tuple[int, Tensor]]) -> Tensor:
    """For every patch of a prompt, which of its vision tokens stands for it: int64 `[patches]`, -1 for none."""
    first, owners = 0, []
    for count, owner in images:
        owner = owner.cpu()
        owners.append(torch.where(owner < 0, owner, owner + first))
        first += count
    return torch.cat(owners) if owners else torch.empty(0, dtype=torch.long)


def _joined(owner: Tensor, index: Tensor, into: Tensor) -> Tensor:
    """`_owner` after a decoder layer in which tokens were merged into those at the columns `into` `[length]`."""
    index, into = index.cpu(), into.cpu()
    stands = torch.arange(int(index.max()) + 1)
    stands[index[index >= 0]] = index[into][index >= 0]
    return torch.where((owner >= 0) & (owner < len(stands)), stands[owner.clamp(max=len(stands) - 1)], owner)


def _blocks(changed: dict[int, Tensor], tile: int) -> list[list[int]]:
    """Vision blocks that changed a tile's tokens, and how many left them, from the owner maps after them."""
    return [[block, len(owner[tile][owner[tile] >= 0].unique())] for block, owner in changed.items()]


def _patches(owner: Tensor, tokens: Tokens, row: int) -> list[int]:
    """Patches that the vision tokens of a record stand for, sorted."""
    alive = tokens.index[row][tokens.vision[row]].cpu()
    return ((owner >= 0) & torch.isin(owner, alive)).nonzero()[:, 0].tolist()


def _vision_counts(layers: list[Tokens], row: int) -> list[int]:
    """Vision tokens of one prompt per layer; layers that share a record are counted once, in one transfer."""
    records = {id(tokens): tokens for tokens in layers}
    counts: Tensor = torch.stack([tokens.vision[row].sum().cpu() for tokens in records.values()])
    by_record = dict(zip(records, counts.tolist(), strict=True))
    return [by_record[id(tokens)] for tokens in layers]
