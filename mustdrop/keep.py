"""The answer of a reducer that chooses: which tokens go on, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.tokens import ImageFacts, PromptFacts, Tokens
from mustdrop.vision_tokens import VisionTokens

Counts = int | Sequence[int] | Sequence[Sequence[int]]


@dataclass
class Keep:
    """Which vision tokens go on; the same answer at every hook that chooses. Text goes on in any case.

    Made by `Keep.top`, `Keep.where`, `Keep.merge`, `Keep.like` or `Keep.protect`. Whether the host knows how many go on
    is the engine's business: after `top` it does, after `where` it reads the numbers once. Protected tokens stay in any
    case. `rows` below are images in the vision encoder and before the decoder, prompts inside it; `tokens` are the
    vision tokens of an image there, all positions of a prompt here.

    Attributes
    ----------
    score : `[rows, tokens]` or None
        How good each token is; of equally good ones the first is better.
    counts : int, sequence of int, or sequence of sequence of int, or None
        The tokens that go on of every image, of each image, or of each image of each prompt. An image that has fewer
        keeps all.
    mask : bool `[rows, tokens]` or None
        Instead of the two: True for tokens that go on.
    later : Tokens or None
        Instead: a later record of the same prompts; what it holds goes on.
    protects : bool
        All tokens go on, and those chosen become key tokens: nothing may drop them from now on.
    states : `[rows, tokens, width]` or None
        States that take the place of the present ones.
    merge_into : int64 `[rows, tokens]` or None
        Column of the token that takes over the patches of a token that goes. It is not read for tokens that go on.
    weights : `[rows, tokens]` or None
        What a token counts for in the sum that becomes the state of the token it is merged into, that one's own weight
        included. None: states are left as they are.
    order : int `[rows, tokens]` or None
        Sort key of the tokens that go on; by default they keep their order.
    with_prefix : bool
        The encoder's leading tokens (CLS) go on, too, as tokens that stand for no patch.
    notes : mapping of str to `[rows, tokens]`, or None
        Numbers that later hooks find with the tokens (`VisionTokens.notes`), whatever is dropped until then.
    """

    score: Tensor | None = None
    counts: Counts | None = None
    mask: Tensor | None = None
    later: Tokens | None = None
    protects: bool = False
    states: Tensor | None = None
    merge_into: Tensor | None = None
    weights: Tensor | None = None
    order: Tensor | None = None
    with_prefix: bool = False
    notes: Mapping[str, Tensor] | None = None

    @classmethod
    def top(cls, score: Tensor, counts: Counts, **more: Tensor | bool | None) -> Keep:
        """The best tokens of every image by a score `[rows, tokens]`; of equally good ones the first."""
        return cls(score=score, counts=counts, **more)

    @classmethod
    def where(cls, mask: Tensor, **more: Tensor | bool | None) -> Keep:
        """The tokens of a mask, bool `[rows, tokens]`."""
        return cls(mask=mask, **more)

    @classmethod
    def merge(
        cls,
        merge_into: Tensor,
        counts: Counts | None = None,
        weights: Tensor | None = None,
        **more: Tensor | bool | None,
    ) -> Keep:
        """The tokens that are merged into no other; each becomes a weighted sum, by default the mean.

        `merge_into` int64 `[rows, tokens]` is a token's own column if it stays; `counts` says how many do, where the
        host knows it.
        """
        stays = merge_into == torch.arange(merge_into.shape[1], device=merge_into.device)
        if weights is None:
            size = torch.zeros_like(merge_into).scatter_add(1, merge_into, torch.ones_like(merge_into))
            weights = 1 / size.gather(1, merge_into)
        more |= {"merge_into": merge_into, "weights": weights}
        return cls.where(stays, **more) if counts is None else cls.top(stays.float(), counts, **more)

    @classmethod
    def like(cls, later: Tokens) -> Keep:
        """The tokens that a later record of the same prompts holds."""
        return cls(later=later)

    @classmethod
    def protect(cls, score: Tensor, counts: Counts) -> Keep:
        """All tokens; the best of every image by a score `[rows, tokens]` become key tokens."""
        return cls(score=score, counts=counts, protects=True)

    @classmethod
    def note(cls, **notes: Tensor) -> Keep:
        """All tokens; what is noted of each `[rows, tokens]` goes with them to later hooks."""
        return cls(notes=notes)

    @classmethod
    def all_of(cls, answers: Sequence[Keep], tokens: Tokens) -> Keep | None:
        """What all answers about the same tokens keep; one that stands alone is passed on as it is.

        Raises
        ------
        ValueError
            If one of several does more than choose.
        """
        if len(answers) < 2:
            return answers[0] if answers else None
        if any(answer.merge_into is not None for answer in answers):
            raise ValueError("parts: after a decoder layer in which one reducer merges tokens no other may drop any")
        if any(answer.changes for answer in answers):
            raise ValueError("parts: where one reducer gives new states or another order no other may choose tokens")
        return cls.where(reduce(Tensor.logical_and, [answer.choose(tokens)[0] for answer in answers]))

    @property
    def changes(self) -> bool:
        """Whether the answer does more than choose: it merges, orders, protects, or gives new states."""
        given = self.states is not None or self.merge_into is not None or self.order is not None
        return given or self.protects or self.with_prefix or self.notes is not None

    def apply(self, tokens: VisionTokens) -> VisionTokens:
        """The tokens of a vision encoder that go on, one row per image.

        Raises
        ------
        ValueError
            If the answer does not fit the tokens.
        """
        self._check(tokens.patch_index.shape)
        if self.later is not None:
            raise ValueError("Keep: Keep.like names a later record of prompts, there is none in the vision encoder")
        if self.notes is not None:
            tokens = replace(tokens, notes={**(tokens.notes or {}), **self.notes})
        if self.states is not None:
            tokens = tokens.with_patches(self.states)
        if self.score is None and self.mask is None:
            return tokens
        known, keys = tokens.known_lengths, tokens.keys or (0,) * len(tokens.patch_index)
        if self.mask is not None:
            stays = self.mask if tokens.protected is None else self.mask | tokens.protected
            stays = stays if tokens.valid is None else stays & tokens.valid
            lengths = stays.sum(-1).tolist()
        else:
            wanted = _for_each(self.counts, len(known), "images")
            lengths = [min(length, max(count, key)) for count, length, key in zip(wanted, known, keys, strict=True)]
            stays = ops.top_count(self._ranked(tokens), ops.for_rows(lengths, self.score.device)[1])
        if self.protects:
            return tokens.with_protected(stays, lengths)
        tokens = tokens.select(stays, lengths, self.merge_into, self.weights, self.order)
        return tokens.with_prefix_as_tokens() if self.with_prefix else tokens

    def choose(self, tokens: Tokens) -> tuple[Tensor, tuple[PromptFacts, ...]]:
        """Which positions of prompts go on, bool `[batch, length]`, and what is then known of every prompt.

        Raises
        ------
        ValueError
            If the answer does not fit the tokens.
        """
        self._check(tokens.image.shape)
        if self.protects or self.with_prefix or self.notes is not None:
            raise ValueError(
                "Keep: protect, note and with_prefix are for the vision encoder, inside the decoder it is too late"
            )
        prompts = tokens.facts()
        if self.score is None and self.mask is None and self.later is None:
            return torch.ones_like(tokens.vision), prompts
        if self.score is not None:
            wanted = _for_each(self.counts, len(prompts), "prompts")
            counts = [_within(own, prompt) for own, prompt in zip(wanted, prompts, strict=True)]
            score = self.score.masked_fill(tokens.protected, float("inf"))
            stays = ops.top_per_image(score, tokens.image, padded(counts, tokens.images, score.device))
            stays = stays | ~tokens.vision
        else:
            stays = are_in(self.later, tokens) if self.mask is None else self.mask | tokens.protected
            stays = stays | ~tokens.vision
            counts = ops.tokens_per_image(tokens.image.masked_fill(~stays, -1), tokens.images).tolist()
        return stays, tuple(prompt.with_tokens(own) for prompt, own in zip(prompts, counts, strict=True))

    def new_states(self, states: Tensor, stays: Tensor) -> Tensor:
        """The states that take the place of the present ones of prompts `[batch, length, width]`.

        `stays` bool `[batch, length]` are the positions that go on.
        """
        states = states if self.states is None else self.states
        if self.weights is None:
            return states
        column = torch.arange(stays.shape[1], device=stays.device)
        merge_into = torch.where(stays, column, self.merge_into)[..., None].expand_as(states)
        # Summed in float32: a token may stand for many.
        sums = torch.zeros_like(states, dtype=torch.float32)
        return sums.scatter_add(1, merge_into, states.float() * self.weights[..., None].float()).to(states.dtype)

    def cut(self, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """Which cached entries stay, int64 `[batch, kept]`, and their record; text stays."""
        if self.changes:
            raise ValueError(
                "Keep: of a cache entries can be chosen, they cannot be merged, ordered or given new states"
            )
        self._check(tokens.image.shape)
        if self.later is not None:
            return columns_of(self.later, tokens)
        if self.score is not None:
            return tokens.select(self.choose(tokens)[0])
        return tokens.select(self.mask | tokens.protected | ~tokens.vision)

    def _ranked(self, tokens: VisionTokens) -> Tensor:
        """The score with key tokens in front of all others, and padding behind."""
        score = self.score
        if tokens.protected is not None:
            score = score.float().masked_fill(tokens.protected, float("inf"))
        return score if tokens.valid is None else score.float().masked_fill(~tokens.valid, float("-inf"))

    def _check(self, shape: torch.Size) -> None:
        """Raise ValueError unless the answer is one, and for tokens of this shape."""
        given = [self.mask is not None, self.score is not None, self.later is not None]
        stays = not any(given) and (self.states is not None or self.notes is not None) and self.merge_into is None
        if not stays and (sum(given) != 1 or (self.score is None) != (self.counts is None)):
            raise ValueError("Keep: give a mask, or a score and counts: Keep.where(mask) or Keep.top(score, counts)")
        names = "score", "mask", "merge_into", "weights", "order"
        for name, value in [*((name, getattr(self, name)) for name in names), *(self.notes or {}).items()]:
            if value is not None and value.shape != shape:
                raise ValueError(f"Keep: {name} has shape {list(value.shape)}, the tokens have {list(shape)}")
        if self.states is not None and self.states.shape[:2] != shape:
            raise ValueError(f"Keep: states have shape {list(self.states.shape)}, the tokens have {list(shape)}")
        if self.weights is not None and self.merge_into is None:
            raise ValueError("Keep: weights are given without merge_into, which says what they are summed into")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"Keep: mask is {self.mask.dtype}, it must be bool; scores belong in Keep.top")
        if any(count < 0 for count in _flat(self.counts)):
            raise ValueError(f"Keep: counts are {self.counts}, they must be 0 or more")


def _for_each(counts: int | Sequence, number: int, of: str) -> Sequence:
    """The counts of so many images or prompts."""
    counts = [counts] * number if isinstance(counts, int) else counts
    if len(counts) != number:
        raise ValueError(f"Keep: counts are {counts}, there are {number} {of}")
    return counts


def _within(counts: int | Sequence[int], prompt: PromptFacts) -> list[int]:
    """Tokens that go on of each image of a prompt: no more than there are, no fewer than its key tokens."""
    pairs = zip(_for_each(counts, len(prompt.images), "images in a prompt"), prompt.images, strict=True)
    return [min(image.tokens, max(count, image.keys)) for count, image in pairs]


def _flat(counts: Counts | None) -> list[int]:
    if counts is None or isinstance(counts, int):
        return [] if counts is None else [counts]
    return [number for count in counts for number in _flat(count)]


def each_image(tokens: Tokens, count: Callable[[ImageFacts], int]) -> list[list[int]]:
    """A number for each image of each prompt, from what the host knows of it."""
    return [[count(image) for image in prompt.images] for prompt in tokens.facts()]


def padded(counts: Sequence[Sequence[int]], images: int, device: torch.device) -> Tensor:
    """Numbers for each image of each prompt as int64 `[batch, images]`, zero where a prompt has fewer images."""
    return torch.tensor([[*own, *[0] * (images - len(own))] for own in counts], device=device)


def are_in(later: Tokens, tokens: Tokens) -> Tensor:
    """Which positions of a record reached a later one of the same prompts, bool `[batch, length]`."""
    later = later.to(tokens.image.device)
    columns = later.original_column if later.valid is None else later.original_column.masked_fill(~later.valid, -1)
    return (tokens.original_column[..., None] == columns[:, None]).any(-1)


def columns_of(later: Tokens, tokens: Tokens) -> tuple[Tensor, Tokens]:
    """Where the tokens of a later record stand in an earlier one of the same prompts, int64 `[batch, kept]`.

    And the record of these columns; nothing is read from the device.
    """
    later = later.to(tokens.image.device)
    columns = (tokens.original_column[:, None] == later.original_column[..., None]).byte().argmax(-1)
    position = tokens.position.gather(-1, columns.expand(*tokens.position.shape[:-1], -1))
    return columns, replace(later, position=position)
