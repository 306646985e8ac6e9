"""Records of what every vision token stands for, and the one compaction that carries them through drops and merges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def compact(
    keep: Tensor, *, pad: str = "left", order: Tensor | None = None, length: int | None = None
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
    length : int, optional
        Number of tokens that every sample keeps, when the caller knows it: spares the one synchronisation with the
        host that a data-dependent count needs.

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
    counts = [length] * len(keep) if length is not None else keep.sum(-1).tolist()
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
    """The tokens of a vision encoder, one row per image (or tile, or frame).

    Attributes
    ----------
    hidden : `[images, prefix + tokens, width]`
        Hidden states, `prefix` leading tokens being no patches (CLIP: one, CLS).
    anchor : int64 `[images, tokens]`
        Raster index of the patch a token sits on; gives a merged token its place and position.
    owner : int64 `[images, patches]`
        Column of the token that stands for each patch, -1 once nothing does.
    grid : (rows, columns)
        Patch grid.
    valid, protected : bool `[images, tokens]` or None
        False for padding (None: no padding); True for tokens that no later stage may drop (None: none).
    proportional : bool
        Whether attention counts a token as often as it has patches.
    """

    hidden: Tensor
    anchor: Tensor
    owner: Tensor
    grid: tuple[int, int]
    prefix: int = 1
    valid: Tensor | None = None
    protected: Tensor | None = None
    proportional: bool = False

    @classmethod
    def from_patches(cls, hidden: Tensor, grid: tuple[int, int], prefix: int = 1) -> VisionTokens:
        """Records of an untouched encoder output: token i stands for patch i."""
        raster = torch.arange(grid[0] * grid[1], device=hidden.device).expand(hidden.shape[0], -1)
        return cls(hidden, raster, raster, grid, prefix)

    @property
    def patches(self) -> Tensor:
        """Hidden states of the patch tokens, a view `[images, tokens, width]`."""
        return self.hidden[:, self.prefix :]

    @property
    def counts(self) -> Tensor:
        """Number of tokens of each image, int64 `[images]`."""
        if self.valid is not None:
            return self.valid.sum(-1)
        return torch.full((len(self.anchor),), self.anchor.shape[1], device=self.anchor.device)

    @property
    def size(self) -> Tensor:
        """Number of patches each token stands for, int64 `[images, tokens]`."""
        stands = self.owner >= 0
        return torch.zeros_like(self.anchor).scatter_add(1, self.owner.clamp(min=0), stands.long())

    @property
    def valid_with_prefix(self) -> Tensor | None:
        """`valid` for all of `hidden`, bool `[images, prefix + tokens]` or None."""
        return None if self.valid is None else F.pad(self.valid, (self.prefix, 0), value=True)

    def rows(self, numbers: Tensor) -> VisionTokens:
        """The tokens of these images, int64 `[rows]`; an image may come several times."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(
            self, **{name: value[numbers] for name, value in fields.items() if isinstance(value, Tensor)}
        )

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
        self, keep: Tensor, *, into: Tensor | None = None, order: Tensor | None = None, length: int | None = None
    ) -> VisionTokens:
        """Keep the tokens of a mask `[images, tokens]`, padded on the right.

        `into` `[images, tokens]` names, for a token that is merged away, the column of the token that now stands for
        its patches (its own column elsewhere). `order` and `length` as in `compact`.
        """
        if self.valid is not None:
            keep = keep & self.valid
        indices, valid = compact(keep, pad="right", order=order, length=length)
        new_column = torch.full_like(self.anchor, -1).scatter(
            1, indices, torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
        )
        new_column = new_column.masked_fill(~keep, -1)
        if into is not None:
            new_column = new_column.gather(1, into)
        owner = new_column.gather(1, self.owner.clamp(min=0)).masked_fill(self.owner < 0, -1)
        prefix = torch.arange(self.prefix, device=indices.device).expand(len(indices), -1)
        return dataclasses.replace(
            self,
            hidden=gather(self.hidden, torch.cat([prefix, indices + self.prefix], dim=1)),
            anchor=self.anchor.gather(1, indices),
            owner=owner,
            valid=valid,
            protected=None if self.protected is None else self.protected.gather(1, indices),
        )


@dataclass
class Tokens:
    """What is known about every position of a padded batch of prompts inside the language model.

    Attributes
    ----------
    position : int64 `[..., batch, length]`
        Rotary position (leading axes for models with several position axes).
    source : int64 `[batch, length]`
        Column the token had in the full prompt.
    image : int64 `[batch, length]`
        Which image of its prompt a vision token belongs to, -1 for text.
    index : int64 `[batch, length]`
        Which of its prompt's vision tokens (counted after the vision stage) it is, -1 for text.
    protected : bool `[batch, length]`
        Vision tokens that may not be dropped.
    question : bool `[batch, length]`
        Text tokens after the prompt's first image.
    valid : bool `[batch, length]` or None
        False for padding; None when there is none.
    images, questions : int
        Largest number of images, and of `question` tokens, in a prompt of the batch: known to the host, so that
        hooks can size their results without synchronising.
    row, column : int64 `[batch, length]` or None
        Place of a vision token on the patch grid of its image, that of its anchor patch; -1 for text and for tokens
        off the grid (CLS). None where nobody asks for it.
    """

    position: Tensor
    source: Tensor
    image: Tensor
    index: Tensor
    protected: Tensor
    question: Tensor
    valid: Tensor | None = None
    images: int = 0
    questions: int = 0
    row: Tensor | None = None
    column: Tensor | None = None

    @property
    def vision(self) -> Tensor:
        """True for vision tokens, bool `[batch, length]`."""
        return self.image >= 0

    @property
    def counts(self) -> Tensor:
        """Valid positions of each prompt, int64 `[batch]`."""
        if self.valid is not None:
            return self.valid.sum(-1)
        return torch.full((len(self.image),), self.image.shape[1], device=self.image.device)

    def question_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of the text after the first image: int64 `[batch, questions]` and which of them are real (bool)."""
        indices, valid = compact(self.question, length=self.questions)
        return indices, self.question.gather(1, indices) if valid is None else valid

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
        return self if times == 1 else self.map(lambda value: value.repeat_interleave(times, dim=-2))

    def select(self, keep: Tensor, *, order: Tensor | None = None, length: int | None = None) -> tuple[Tensor, Tokens]:
        """Compact to the kept, valid positions, padded on the left; returns the gather indices and the new record.

        `order` and `length` as in `compact`.
        """
        if self.valid is not None:
            keep = keep & self.valid
        indices, valid = compact(keep, order=order, length=length)
        record = self.map(lambda value: value.gather(-1, indices.expand(*value.shape[:-1], -1)))
        if valid is not None:
            record.image = record.image.masked_fill(~valid, -1)
            record.index = record.index.masked_fill(~valid, -1)
            record.question = record.question & valid
        record.valid = valid
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
