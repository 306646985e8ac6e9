"""What happened to every vision token of a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mustdrop.compute_plan import LayerPlan
from mustdrop.neighbours import SplitRows
from mustdrop.tokens import APART, Tokens


@dataclass(eq=False, repr=False)
class PassRecord:
    """What is noted of one forward pass over a batch of prompts, and all that their traces are made from.

    Attributes
    ----------
    before_mlp : bool
        Whether vision blocks change the tokens between attention and MLP.
    vision : dict of int to Tensor
        After each vision block that changed the tokens, the `patch_to_token` map of every row.
    images : list of list of (int, Tensor)
        Per prompt and image: tokens that entered the language model, and their `patch_to_token` map.
    views : list of list of list of int
        Per prompt and image: the rows of its views (tiles, frames) in what the vision encoder computed.
    encoded : dict of int to Tensor
        `vision` as the vision encoder numbers patches, where a prompt shows them otherwise; empty where it does not.
    view_patches : sequence of int
        Patches of each view that was encoded, by row.
    text : list of int
        Text tokens of each prompt before anything was dropped, and those that come with images; empty if not known.
    pruned_layers : list of int
        Decoder layers after which the reducer chose.
    plans : list of LayerPlan or None
        What each decoder layer computed for vision tokens.
    merge_maps : dict of int to Tensor
        `Keep.merge_into` after each decoder layer that merged tokens.
    tokens_in, tokens_out : list of Tokens
        Entering and leaving each decoder layer.
    finished : list of Tokens or int
        What went through each decoder layer's output projection and MLP, or how many of its last positions.
    cached : list of Tokens
        What each layer has cached when prefill ends.
    kv_bytes : list of int
        Bytes of one cached position, per layer.
    seconds : dict of str to float
        Time per part, where it is measured.
    selector_macs : int or None
        Multiply-adds of the reducer's own work up to the first new token, None where they are not counted.
    """

    before_mlp: bool = False
    vision: dict[int, Tensor] = field(default_factory=dict)
    images: list[list[tuple[int, Tensor]]] = field(default_factory=list)
    views: list[list[list[int]]] = field(default_factory=list)
    encoded: dict[int, Tensor] = field(default_factory=dict)
    view_patches: Sequence[int] = ()
    text: list[int] = field(default_factory=list)
    pruned_layers: list[int] = field(default_factory=list)
    plans: list[LayerPlan | None] = field(default_factory=list)
    merge_maps: dict[int, Tensor] = field(default_factory=dict)
    tokens_in: list[Tokens] = field(default_factory=list)
    tokens_out: list[Tokens] = field(default_factory=list)
    finished: list[Tokens | int] = field(default_factory=list)
    cached: list[Tokens] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    selector_macs: int | None = None


class Trace:
    """The record of one prompt: how many vision tokens each layer saw, and which patches they stand for.

    Nothing is copied to the host before it is read. Patches are numbered through the prompt's images in order: patch p
    of the second image is `images[0]["patches"] + p`. A merged token stands for several patches.

    Attributes
    ----------
    images : list of dict
        Per image: `patches` it was cut into, in how many `views` (tiles, frames), `tokens` that entered the language
        model, `tokens_per_view`, the mean over the decoder layers for each view (stitched tiles count as the second),
        and `blocks`, a pair for every vision block that changed the tokens: its number and how many left it.
    before_mlp : bool
        Whether vision blocks changed the tokens between attention and MLP instead of after both.
    key_tokens : list of int
        Which of these may not be dropped.
    text_tokens : int
        Text tokens of the prompt, and those that come with an image without showing a patch (CLS, newlines of rows of
        which a patch is left).
    full_text_tokens : int
        The same before anything was dropped.
    tower : list of list of list of int
        For every view of every image pairs as in `blocks`, of the vision encoder's own patches, borders that the prompt
        does not show included; the first pair is block -1 and the patches that entered.
    vision_tokens, vision_tokens_after : list of int
        Vision tokens entering, and leaving, each decoder layer.
    kept : dict
        `kept[stage][layer]` -> sorted patches still stood for: stage "vision" after an encoder block that changed the
        tokens, "prefill" after a decoder layer that dropped some, "decode" in the cache of every decoder layer.
    cache_lengths : list of int
        Positions each layer's cache holds for this prompt when prefill ends; empty without a cache.
    mlp_lengths : list of int
        Positions that went through each decoder layer's output projection and MLP: those that nobody reads are left
        out (`llava.model.drop_early`).
    cache_bytes : int
        Bytes of these keys and values.
    plans : dict
        `plans[layer]` -> what the decoder layer computed for vision tokens, where that is not everything: the fields of
        `LayerPlan`, and `pairs`, the pairs of a vision row and a key that one head computed.
    selector_macs : int or None
        Multiply-adds of the method's own matrix products up to the first new token; None where nobody counted, see
        `Reducer.on`.
    """

    def __init__(self, record: PassRecord, row: int, prompt: int):
        self._record, self._row, self._prompt = record, row, prompt
        self._seconds, self._shares = record.seconds, _shares(record, prompt)

    @cached_property
    def _facts(self) -> dict:
        """Everything on the host, read once; the tensors are let go."""
        record, row = self._record, self._row
        images = record.images[self._prompt]
        tokens_in = record.tokens_in[0]
        owners = [_patch_to_token(images)]
        for layer, tokens in enumerate(record.tokens_in):
            merge_into = record.merge_maps.get(layer)
            owners.append(
                owners[-1] if merge_into is None else _joined(owners[-1], tokens.vision_index[row], merge_into[row])
            )
        pruned = {layer: record.tokens_out[layer] for layer in record.pruned_layers}
        alive = {id(tokens): (owners[layer + 1], tokens) for layer, tokens in pruned.items()}
        for layer, tokens in enumerate(record.cached):
            alive.setdefault(id(tokens), (owners[layer], tokens))
        patches = {key: _patches(patch_to_token, tokens, row) for key, (patch_to_token, tokens) in alive.items()}
        kept: dict[str, dict[int, list[int]]] = {"vision": {}, "prefill": {}, "decode": {}}
        if images:
            shown = list(zip(record.views[self._prompt], (len(own) for _, own in images), strict=True))
            kept["vision"] = {block: _standing(own, shown) for block, own in record.vision.items()}
            kept["prefill"] = {layer: patches[id(tokens)] for layer, tokens in pruned.items()}
            kept["decode"] = {layer: patches[id(tokens)] for layer, tokens in enumerate(record.cached)}
        key_tokens = tokens_in.protected[row] & tokens_in.vision[row]
        cache_lengths = [int(tokens.counts[row]) for tokens in record.cached]
        facts = {
            "images": [
                {
                    "patches": len(patch_to_token),
                    "views": len(views),
                    "tokens": tokens,
                    "tokens_per_view": _per_view(record.tokens_in, row, number, len(views)),
                    "blocks": _blocks(record.vision, views),
                }
                for number, (views, (tokens, patch_to_token)) in enumerate(
                    zip(record.views[self._prompt], images, strict=True)
                )
            ],
            "before_mlp": record.before_mlp,
            "key_tokens": tokens_in.vision_index[row][key_tokens].tolist(),
            "text_tokens": (text := int(tokens_in.counts[row] - tokens_in.vision[row].sum())),
            "full_text_tokens": record.text[self._prompt] if record.text else text,
            "tower": [view for views in record.views[self._prompt] for view in _tower(record, views)] if images else [],
            "vision_tokens": _vision_counts(record.tokens_in, row),
            "vision_tokens_after": _vision_counts(record.tokens_out, row),
            "kept": kept,
            "cache_lengths": cache_lengths,
            "mlp_lengths": _mlp_lengths(record, row),
            "cache_bytes": sum(n * size for n, size in zip(cache_lengths, record.kv_bytes, strict=True)),
            "plans": _plans(record, row) if images else {},
            "selector_macs": record.selector_macs,
        }
        self._patch_to_token, self._record = owners[0], None
        self._grid_places = _grid_places(tokens_in, row)
        return facts

    @cached_property
    def tokens(self) -> list[list[int]]:
        """For every vision token that entered the language model, the patches it stands for."""
        of_token: list[list[int]] = [[] for _ in range(sum(image["tokens"] for image in self.images))]
        for patch, token in enumerate(self._patch_to_token.tolist()):
            if token >= 0:
                of_token[token].append(patch)
        return of_token

    @property
    def places(self) -> list[tuple[int, int, int]] | None:
        """View, row and column in it of every vision token that entered the language model; None if not known."""
        return self._grid_places if self._facts else None

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

        "vision" is what the prompt's own images took, even if other prompts of the batch shared their encoding. What
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


def _mlp_lengths(record: PassRecord, row: int) -> list[int]:
    """Positions of a prompt that went through the second half of each decoder layer."""
    counts = {id(tokens): int(tokens.counts[row]) for tokens in (*record.tokens_in, *record.tokens_out)}
    return [
        min(done, counts[id(entering)]) if isinstance(done, int) else counts[id(done)]
        for entering, done in zip(record.tokens_in, record.finished, strict=True)
    ]


def _plans(record: PassRecord, row: int) -> dict[int, dict]:
    """The layers of a prompt that were computed by a plan, counted as if it had been alone."""
    pairs: dict[tuple, int] = {}
    plans = {}
    for layer, plan in enumerate(record.plans):
        if plan is not None:
            tokens = record.tokens_in[layer]
            key = id(tokens), plan.window
            if key not in pairs:
                rows = SplitRows.of(_alone(tokens, row), plan.window)
                pairs[key] = rows.pairs() if rows is not None else 0
            plans[layer] = {**asdict(plan), "pairs": pairs[key]}
    return plans


def _alone(tokens: Tokens, row: int) -> Tokens:
    """The record of one prompt without padding."""
    own = tokens.map(lambda value: value[..., row : row + 1, :])
    return own.select(torch.ones_like(own.image, dtype=torch.bool))[1]


def _shares(record: PassRecord, prompt: int) -> tuple[float, float]:
    """A prompt's part of a batch's time, and of the time that its images took."""
    encoded = len({view for images in record.views for views in images for view in views})
    return 1 / len(record.images), sum(map(len, record.views[prompt])) / max(encoded, 1)


def _patch_to_token(images: list[tuple[int, Tensor]]) -> Tensor:
    """For every patch of a prompt, which of its vision tokens stands for it: int64 `[patches]`, -1 for none."""
    first, owners = 0, []
    for count, patch_to_token in images:
        patch_to_token = patch_to_token.cpu()
        owners.append(torch.where(patch_to_token < 0, patch_to_token, patch_to_token + first))
        first += count
    return torch.cat(owners) if owners else torch.empty(0, dtype=torch.long)


def _joined(patch_to_token: Tensor, index: Tensor, merge_into: Tensor) -> Tensor:
    """`_patch_to_token` after a decoder layer that merged tokens into those at the columns `merge_into` `[length]`."""
    index, merge_into = index.cpu(), merge_into.cpu()
    stands = torch.arange(int(index.max()) + 1)
    stands[index[index >= 0]] = index[merge_into][index >= 0]
    return torch.where(
        (patch_to_token >= 0) & (patch_to_token < len(stands)),
        stands[patch_to_token.clamp(max=len(stands) - 1)],
        patch_to_token,
    )


def _standing(patch_to_token: Tensor, shown: list[tuple[list[int], int]]) -> list[int]:
    """Patches that a token stands for after a vision block; `shown` are the rows and the patches of each image."""
    stands = torch.cat([patch_to_token[views].reshape(-1)[:patches] for views, patches in shown])
    return (stands >= 0).nonzero()[:, 0].tolist()


def _blocks(changed: dict[int, Tensor], views: list[int]) -> list[list[int]]:
    """Vision blocks that changed an image's tokens, and how many left them, from their patch_to_token maps."""
    return [
        [block, sum(len(own[own >= 0].unique()) for own in patch_to_token[views])]
        for block, patch_to_token in changed.items()
    ]


def _tower(record: PassRecord, views: list[int]) -> list[list[list[int]]]:
    """For each of these rows of the vision encoder: blocks that changed the tokens, and how many left them."""
    changed = record.encoded or record.vision
    return [[[-1, record.view_patches[view]], *_blocks(changed, [view])] for view in views]


def _per_view(layers: list[Tokens], row: int, image: int, views: int) -> list[float]:
    """Vision tokens of an image in each of its views, the mean over decoder layers; empty where no places are known."""
    records = {id(tokens): tokens for tokens in layers}
    if any(tokens.row is None for tokens in records.values()):
        return []
    counts = {
        key: tokens.view[row][tokens.image[row] == image].clamp(max=views - 1).bincount(minlength=views).cpu()
        for key, tokens in records.items()
    }
    return (sum(counts[id(tokens)] for tokens in layers) / len(layers)).tolist()


def _grid_places(tokens: Tokens, row: int) -> list[tuple[int, int, int]] | None:
    """Where the vision tokens of a prompt stand: view, row, column."""
    if tokens.row is None:
        return None
    own, view = tokens.vision[row], tokens.view[row]
    places = torch.stack([view, tokens.row[row] - view * APART, tokens.column[row]], dim=-1)
    return [tuple(place) for place in places[own].tolist()]


def _patches(patch_to_token: Tensor, tokens: Tokens, row: int) -> list[int]:
    """Patches that the vision tokens of a record stand for, sorted."""
    alive = tokens.vision_index[row][tokens.vision[row]].cpu()
    return ((patch_to_token >= 0) & torch.isin(patch_to_token, alive)).nonzero()[:, 0].tolist()


def _vision_counts(layers: list[Tokens], row: int) -> list[int]:
    """Vision tokens of one prompt per layer; layers that share a record are counted once, in one transfer."""
    records = {id(tokens): tokens for tokens in layers}
    counts: Tensor = torch.stack([tokens.vision[row].sum().cpu() for tokens in records.values()])
    by_record = dict(zip(records, counts.tolist(), strict=True))
    return [by_record[id(tokens)] for tokens in layers]
