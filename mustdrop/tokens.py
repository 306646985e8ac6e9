"""Records of what every vision token stands for, and the one compaction that carries them through drops and merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
    tokens = keep.shape[-1]
    if order is None:
        order = torch.arange(tokens, device=keep.device).expand_as(keep)
    dropped_last = order + (~keep if pad == "right" else keep) * (order.max() - order.min() + 1)
    ranked = dropped_last.argsort(dim=-1, stable=True)
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
        return values[0].index_select(0, indices[0])[None]
    return values[torch.arange(len(indices), device=indices.device)[:, None], indices]


@dataclass
class VisionTokens:
    """The tokens of a vision encoder: in it one row per view (an image, a tile, a frame), after it one per image.

    Patches of an image of several views are numbered through these.

    Attributes
    ----------
    hidden : `[images, prefix + tokens, width]`
        Hidden states, `prefix` leading tokens being no patches (CLIP: one, CLS).
    patch_index : int64 `[images, tokens]`
        Raster index of the patch a token sits on; gives a merged token its place and position.
    patch_to_token : int64 `[images, patches]`
        Column of the token that stands for each patch, -1 once nothing does.
    grid : (rows, columns)
        Patch grid of a view.
    valid, protected : bool `[images, tokens]` or None
        False for padding (None: no padding); True for tokens that no later stage may drop (None: none).
    lengths, keys : tuple of int or None
        What the host knows: tokens of each image, None where that is all there are; and how many of them are protected,
        None where none are.
    views : tuple of int or None
        Views (tiles, frames) of each image; None where it is one.
    shown : tuple of int or None
        Patches of each image, where these are not its views times the grid.
    extras : `[images, views, prefix, width]` or None
        After the vision encoder, the prefix of every view: neither scored nor counted, it goes on in any case.
    """

    hidden: Tensor
    patch_index: Tensor
    patch_to_token: Tensor
    grid: tuple[int, int]
    prefix: int = 1
    valid: Tensor | None = None
    protected: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    views: tuple[int, ...] | None = None
    shown: tuple[int, ...] | None = None
    extras: Tensor | None = None

    @classmethod
    def from_patches(cls, hidden: Tensor, grid: tuple[int, int], prefix: int = 1) -> VisionTokens:
        """Records of an untouched encoder output: token i stands for patch i."""
        raster = torch.arange(grid[0] * grid[1], device=hidden.device).expand(hidden.shape[0], -1)
        return cls(hidden, raster, raster, grid, prefix)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.hidden.device

    @property
    def patches(self) -> Tensor:
        """Hidden states of the patch tokens, a view `[images, tokens, width]`."""
        return self.hidden[:, self.prefix :]

    @property
    def counts(self) -> Tensor:
        """Number of tokens of each image, int64 `[images]`."""
        if self.valid is not None:
            return self.valid.sum(-1)
        return torch.full((len(self.patch_index),), self.patch_index.shape[1], device=self.patch_index.device)

    @property
    def known_lengths(self) -> tuple[int, ...]:
        """The same, for the host."""
        return self.lengths or (self.patch_index.shape[1],) * len(self.patch_index)

    @property
    def size(self) -> Tensor:
        """Number of patches each token stands for, int64 `[images, tokens]`."""
        stands = self.patch_to_token >= 0
        return torch.zeros_like(self.patch_index).scatter_add(1, self.patch_to_token.clamp(min=0), stands.long())

    @property
    def valid_with_prefix(self) -> Tensor | None:
        """`valid` for all of `hidden`, bool `[images, prefix + tokens]` or None."""
        return None if self.valid is None else F.pad(self.valid, (self.prefix, 0), value=True)

    @property
    def known_views(self) -> tuple[int, ...]:
        """Views of each image, for the host."""
        return self.views or (1,) * len(self.patch_index)

    def joined(self, views: Sequence[int]) -> VisionTokens:
        """One row per image, made of so many neighbouring rows each, padded on the right; the prefix becomes extras.

        Nothing is read from the device.
        """
        prefix = self.hidden[:, : self.prefix] if self.prefix else None
        alone = dataclasses.replace(self.without_prefix(), views=tuple(views))
        most, device = max(views), self.device
        if most == 1:
            return dataclasses.replace(alone, extras=None if prefix is None else prefix[:, None])
        starts = [sum(views[:number]) for number in range(len(views))]
        index = torch.tensor(
            [[start + min(v, n - 1) for v in range(most)] for start, n in zip(starts, views, strict=True)]
        )
        real = torch.tensor([[v < n for v in range(most)] for n in views])
        index, real = index.to(device), real.to(device)
        (_, tokens), patches = self.patch_index.shape, self.patch_to_token.shape[1]
        view = torch.arange(most, device=device)[:, None]
        stays = real[..., None].expand(-1, -1, tokens)
        stays = (stays if self.valid is None else stays & self.valid[index]).flatten(1)
        stands = self.patch_to_token[index]
        stands = torch.where((stands >= 0) & real[..., None], stands + view * tokens, -1).flatten(1)
        lengths = [sum(self.known_lengths[start : start + n]) for start, n in zip(starts, views, strict=True)]
        starting = list(zip(starts, views, strict=True))
        keys = None if self.keys is None else tuple(sum(self.keys[start : start + n]) for start, n in starting)
        wide = dataclasses.replace(
            alone,
            hidden=alone.hidden[index].flatten(1, 2),
            patch_index=(self.patch_index[index] + view * patches).flatten(1),
            patch_to_token=stands,
            valid=None,
            protected=None if self.protected is None else self.protected[index].flatten(1),
            keys=keys,
            extras=None if prefix is None else prefix[index],
        )
        return wide.select(stays, lengths)

    @property
    def known_patches(self) -> tuple[int, ...]:
        """Patches of each image, all its views together, for the host."""
        return self.shown or tuple(views * self.grid[0] * self.grid[1] for views in self.known_views)

    def rows(self, numbers: Sequence[int]) -> VisionTokens:
        """The tokens of these images; an image may come several times."""
        index = torch.tensor(numbers, device=self.hidden.device)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        known = {
            name: None if fields[name] is None else tuple(fields[name][number] for number in numbers)
            for name in ("lengths", "keys", "views", "shown")
        }
        return dataclasses.replace(
            self, **{name: value[index] for name, value in fields.items() if isinstance(value, Tensor)}, **known
        )

    def with_protected(self, protected: Tensor, keys: Sequence[int]) -> VisionTokens:
        """The same tokens, some of them protected, bool `[images, tokens]`: so many of each image."""
        return dataclasses.replace(self, protected=protected, keys=tuple(keys))

    def with_hidden(self, hidden: Tensor) -> VisionTokens:
        """The same tokens with other hidden states `[images, prefix + tokens, width]`."""
        return dataclasses.replace(self, hidden=hidden)

    def with_patches(self, patches: Tensor) -> VisionTokens:
        """The same tokens with other hidden states `[images, tokens, width]`; the prefix is kept."""
        return self.with_hidden(torch.cat([self.hidden[:, : self.prefix], patches], dim=1))

    def without_prefix(self) -> VisionTokens:
        """The patch tokens alone, as a view."""
        return dataclasses.replace(self, hidden=self.patches, prefix=0)

    def select(
        self,
        stays: Tensor,
        lengths: Sequence[int],
        merge_into: Tensor | None = None,
        weights: Tensor | None = None,
        order: Tensor | None = None,
    ) -> VisionTokens:
        """The tokens of a mask `[images, tokens]`, so many of each image, padded on the right; see `Keep` for the rest.

        Protected tokens have to be among them.
        """
        indices, valid = compact(stays, pad="right", order=order, length=lengths)
        column = torch.arange(stays.shape[1], device=stays.device)
        new_column = torch.full_like(self.patch_index, -1).scatter(
            1, indices, torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
        )
        new_column = new_column.masked_fill(~stays, -1)
        if merge_into is not None:
            merge_into = torch.where(stays, column, merge_into)
            new_column = new_column.gather(1, merge_into)
        if weights is None:
            prefix = torch.arange(self.prefix, device=indices.device).expand(len(indices), -1)
            hidden = gather(self.hidden, torch.cat([prefix, indices + self.prefix], dim=1))
        else:
            # All sums at once: a row of `share` holds the weights of the tokens that become one.
            share = (merge_into[:, None] == indices[..., None]) * weights[:, None].float()
            merged = (share @ self.patches.float()).to(self.hidden.dtype)
            hidden = torch.cat([self.hidden[:, : self.prefix], merged], dim=1)
        return dataclasses.replace(
            self,
            hidden=hidden,
            patch_index=self.patch_index.gather(1, indices),
            patch_to_token=new_column.gather(1, self.patch_to_token.clamp(min=0)).masked_fill(
                self.patch_to_token < 0, -1
            ),
            valid=valid,
            protected=None if self.protected is None else self.protected.gather(1, indices),
            lengths=tuple(lengths),
        )

    def with_prefix_as_tokens(self) -> VisionTokens:
        """The same tokens, the prefix being tokens in front of them that stand for no patch."""
        shift = self.prefix
        return dataclasses.replace(
            self,
            patch_index=F.pad(self.patch_index, (shift, 0)),
            patch_to_token=self.patch_to_token + shift * (self.patch_to_token >= 0),
            valid=self.valid_with_prefix,
            protected=None if self.protected is None else F.pad(self.protected, (shift, 0)),
            lengths=tuple(length + shift for length in self.known_lengths),
            prefix=0,
        )


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
        row = self.last_row()
        return self.position.gather(-1, row.expand(*self.position.shape[:-1], 1))[..., 0]

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
        record = self.map(lambda value: value.gather(-1, indices.expand(*value.shape[:-1], -1)))
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
