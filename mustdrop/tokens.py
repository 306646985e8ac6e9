"""What is known of every position of a prompt, and the one compaction that carries it through drops and merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

APART = 1024
"""Rows between grids of one image that are no neighbours: two tiles or frames, or the overview and what is below it."""


def compact(
    keep: Tensor, *, pad: str = "left", order: Tensor | None = None, length: int | Sequence[int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Turn a keep mask into gather indices: the one compaction behind every drop and merge.

    Parameters
    ----------
    keep : bool `[batch, tokens]`
        True where a token stays.
    pad : {"left", "right"}
        Side on which samples that keep fewer tokens are padded.
    order : int `[batch, tokens]`, optional
        Sort key of the kept tokens; by default they keep their order.
    length : int or sequence of int, optional
        Number of tokens that every sample keeps, or each of them, when the caller knows it: spares the one
        synchronisation with the host that a data-dependent count needs.

    Returns
    -------
    indices : int64 `[batch, kept]`
        Columns to gather, `kept` being the largest count in the batch.
    valid : bool `[batch, kept]` or None
        False where an index is padding; None when there is no padding.
    """
    tokens, last = keep.shape[-1], ~keep if pad == "right" else keep
    if order is not None:
        last = order + last * (order.max() - order.min() + 1)
    ranked = last.argsort(dim=-1, stable=True)
    if length is None:
        length = keep.sum(-1).tolist()
    counts = [length] * len(keep) if isinstance(length, int) else list(length)
    kept = max(counts)
    indices = ranked[:, :kept] if pad == "right" else ranked[:, tokens - kept :]
    if min(counts) == kept:
        return indices, None
    return indices, keep.gather(1, indices)


def gather(values: Tensor, indices: Tensor) -> Tensor:
    """Pick `indices` `[batch, kept]` from `values` `[batch, tokens, ...]`; rows are copied whole."""
    if len(indices) == 1:
        return values.index_select(1, indices[0])
    return values[torch.arange(len(indices), device=indices.device)[:, None], indices]


@dataclass(frozen=True)
class ImageFacts:
    """What the host knows of an image of a prompt.

    `patches` it has, `tokens_in` that entered the decoder, `tokens` there are now, and `keys`, those of them that may
    not be dropped.
    """

    patches: int
    tokens_in: int
    tokens: int
    keys: int = 0


@dataclass(frozen=True)
class PromptFacts:
    """What the host knows of a prompt: its `text`, `instruction_tokens` of it after the first image, and its images."""

    text: int
    instruction_tokens: int
    images: tuple[ImageFacts, ...]

    @property
    def length(self) -> int:
        """Positions there are now."""
        return self.text + sum(image.tokens for image in self.images)

    def with_tokens(self, counts: Sequence[int]) -> PromptFacts:
        """The prompt once every image has so many tokens left; what follows the last image of the prompt is ignored."""
        images = (dataclasses.replace(image, tokens=n) for image, n in zip(self.images, counts, strict=False))
        return dataclasses.replace(self, images=tuple(images))


@dataclass
class Tokens:
    """What is known about every position of a padded batch of prompts inside the language model.

    Attributes
    ----------
    position : int64 `[..., batch, length]`
        Rotary position (leading axes for models with several position axes).
    original_column : int64 `[batch, length]`
        Column the token had in the full prompt.
    image : int64 `[batch, length]`
        Which image of its prompt a vision token belongs to, with all its tiles or frames; -1 for text and for what
        comes with an image without showing a patch (CLS).
    vision_index : int64 `[batch, length]`
        Which of its prompt's vision tokens (counted after the vision stage) it is, -1 for text.
    protected : bool `[batch, length]`
        Vision tokens that may not be dropped.
    instruction : bool `[batch, length]`
        Text tokens after the prompt's first image.
    valid : bool `[batch, length]` or None
        False for padding; None when there is none.
    images, instruction_tokens : int
        Largest number of images, and of `instruction` tokens, in a prompt of the batch: known to the host, so that
        hooks can size their results without synchronising.
    row, column : int64 `[batch, length]` or None
        Place of a vision token on the patch grid of its image, that of its own patch; -1 for text. Rows of views that
        are no neighbours lie `APART`. None where nobody asks for it.
    prompts : tuple of PromptFacts or None
        What the host knows of every prompt, so that nothing has to be read from the device; None where that is lost.
    """

    position: Tensor
    original_column: Tensor
    image: Tensor
    vision_index: Tensor
    protected: Tensor
    instruction: Tensor
    valid: Tensor | None = None
    images: int = 0
    instruction_tokens: int = 0
    row: Tensor | None = None
    column: Tensor | None = None
    prompts: tuple[PromptFacts, ...] | None = None

    @property
    def device(self) -> torch.device:
        """Where the record is."""
        return self.image.device

    @property
    def vision(self) -> Tensor:
        """True for vision tokens, bool `[batch, length]`."""
        return self.image >= 0

    @property
    def view(self) -> Tensor:
        """Which grid of its image (tile, frame) a vision token is on, int64 `[batch, length]`, -1 off all of them."""
        return self.row // APART

    @property
    def counts(self) -> Tensor:
        """Valid positions of each prompt, int64 `[batch]`."""
        if self.valid is not None:
            return self.valid.sum(-1)
        return torch.full((len(self.image),), self.image.shape[1], device=self.image.device)

    def instruction_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of the text after the first image: int64 `[batch, instruction_tokens]`, and which are real (bool)."""
        indices, valid = compact(self.instruction, length=self.instruction_tokens)
        return indices, self.instruction.gather(1, indices) if valid is None else valid

    def last_row(self) -> Tensor:
        """Row of every prompt's last token, int64 `[batch, 1]`."""
        length = self.image.shape[1]
        if self.valid is None:
            return torch.full_like(self.image[:, :1], length - 1)
        return (self.valid * torch.arange(length, device=self.valid.device)).argmax(-1, keepdim=True)

    def last_position(self) -> Tensor:
        """Rotary position of every prompt's last token, int64 `[..., batch]`."""
        if self.valid is None:
            return self.position[..., -1]
        return self.position.gather(-1, self.last_row().expand(*self.position.shape[:-1], 1))[..., 0]

    def repeated(self, batch: int) -> Tokens:
        """The record for `batch` rows, every prompt standing in for equally many neighbouring rows (beams)."""
        times = batch // len(self.image)
        if times == 1:
            return self
        prompts = None if self.prompts is None else tuple(prompt for prompt in self.prompts for _ in range(times))
        return dataclasses.replace(self.map(lambda value: value.repeat_interleave(times, dim=-2)), prompts=prompts)

    def facts(self) -> tuple[PromptFacts, ...]:
        """`prompts`, read from the device if the host does not know them."""
        if self.prompts is not None:
            return self.prompts
        own = self.image[:, None] == torch.arange(self.images, device=self.image.device)[:, None]
        tokens, keys = own.sum(-1).tolist(), (own & self.protected[:, None]).sum(-1).tolist()
        text, instruction_tokens = (self.counts - self.vision.sum(-1)).tolist(), self.instruction.sum(-1).tolist()
        images = [
            tuple(ImageFacts(n, n, n, k) for n, k in zip(*prompt, strict=True))
            for prompt in zip(tokens, keys, strict=True)
        ]
        return tuple(map(PromptFacts, text, instruction_tokens, images))

    def select(
        self, keep: Tensor, *, order: Tensor | None = None, prompts: tuple[PromptFacts, ...] | None = None
    ) -> tuple[Tensor, Tokens]:
        """Compact to the kept, valid positions, padded on the left; returns the gather indices and the new record.

        `order` as in `compact`; `prompts` says what is then known of every prompt, its length among other things.
        """
        if self.valid is not None:
            keep = keep & self.valid
        length = None if prompts is None else [prompt.length for prompt in prompts]
        indices, valid = compact(keep, order=order, length=length)
        record = self.map(
            lambda value: value.gather(-1, indices if value.dim() == 2 else indices.expand(*value.shape[:-1], -1))
        )
        if valid is not None:
            record.image = record.image.masked_fill(~valid, -1)
            record.vision_index = record.vision_index.masked_fill(~valid, -1)
            record.instruction = record.instruction & valid
        record.valid, record.prompts = valid, prompts
        return indices, record

    def to(self, device: torch.device) -> Tokens:
        """The record on a device; itself if it is there already (a model may be spread over several)."""
        return self if self.image.device == device else self.map(lambda value: value.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """The same record with `function` applied to every tensor in it."""
        changed = {
            f.name: function(v) for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    def renumbered(self) -> Tokens:
        """The same tokens at positions 0..n-1."""
        valid = torch.ones_like(self.image) if self.valid is None else self.valid
        position = (valid.cumsum(-1) - 1).clamp(min=0)
        return dataclasses.replace(self, position=position.expand_as(self.position))
