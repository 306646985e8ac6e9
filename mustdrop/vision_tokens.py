"""The tokens of a vision encoder, and what each of them stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mustdrop.retain import apportioned
from mustdrop.tokens import compact, gather


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
    together : tuple of int or None
        In the vision encoder: how many neighbouring rows are the views of one image each; None where every row is one.
    views : tuple of int or None
        Views (tiles, frames) of each image; None where it is one.
    tiles : tuple of (int, int) or None, or None
        Rows and columns of the tiles that follow each image's overview, None where its views are no such.
    shown : tuple of int or None
        Patches of each image, where these are not its views times the grid.
    grids : tuple of (rows, columns) or None
        Patch grid of each image's views, where images have grids of their own.
    extras : `[images, views, prefix, width]` or None
        After the vision encoder, the prefix of every view: neither scored nor counted, it goes on in any case.
    notes : dict of str to `[images, tokens]`, or None
        What hooks have noted of the tokens for later ones, see `Keep.note`; of merged tokens that of the one they join.
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
    together: tuple[int, ...] | None = None
    views: tuple[int, ...] | None = None
    tiles: tuple[tuple[int, int] | None, ...] | None = None
    shown: tuple[int, ...] | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    extras: Tensor | None = None
    notes: dict[str, Tensor] | None = None

    @classmethod
    def from_patches(
        cls, hidden: Tensor, grid: tuple[int, int], prefix: int = 1, together: Sequence[int] | None = None
    ) -> VisionTokens:
        """Records of an untouched encoder output: token i stands for patch i."""
        raster = torch.arange(grid[0] * grid[1], device=hidden.device).expand(hidden.shape[0], -1)
        together = tuple(together) if together and max(together) > 1 else None
        return cls(hidden, raster, raster, grid, prefix, together=together)

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
        alone = dataclasses.replace(self.without_prefix(), views=tuple(views), together=None)
        most, device = max(views), self.device
        if most == 1:
            return dataclasses.replace(alone, extras=None if prefix is None else prefix[:, None])
        first = [*accumulate(views, initial=0)][:-1]
        rows = [range(start, start + count) for start, count in zip(first, views, strict=True)]
        index = torch.tensor([[*own, *[own[-1]] * (most - len(own))] for own in rows]).to(device)
        real = torch.tensor([[view < len(own) for view in range(most)] for own in rows]).to(device)
        (_, tokens), patches = self.patch_index.shape, self.patch_to_token.shape[1]
        view = torch.arange(most, device=device)[:, None]
        stands = self.patch_to_token[index]
        lengths, keys = self.known_lengths, self.keys
        wide = dataclasses.replace(
            alone,
            hidden=alone.hidden[index].flatten(1, 2),
            patch_index=(self.patch_index[index] + view * patches).flatten(1),
            patch_to_token=torch.where((stands >= 0) & real[..., None], stands + view * tokens, -1).flatten(1),
            valid=None,
            lengths=None,
            protected=None if self.protected is None else self.protected[index].flatten(1),
            keys=None if keys is None else tuple(sum(keys[row] for row in own) for own in rows),
            extras=None if prefix is None else prefix[index],
            notes=self._noted(lambda values: values[index].flatten(1)),
        )
        if self.valid is None and min(views) == most:
            return wide
        stays = real[..., None].expand(-1, -1, tokens)
        stays = (stays if self.valid is None else stays & self.valid[index]).flatten(1)
        return wide.select(stays, [sum(lengths[row] for row in own) for own in rows])

    @classmethod
    def stacked(cls, parts: Sequence[VisionTokens], order: Sequence[int]) -> VisionTokens:
        """The images of several records, one token per patch each, in one; `order` numbers them through."""

        def padded(values: list[Tensor], fill: int = 0) -> Tensor:
            rows = pad_sequence([row for value in values for row in value], batch_first=True, padding_value=fill)
            return rows[torch.tensor(order, device=rows.device)]

        lengths = [one.known_lengths[0] for one in parts for _ in one.hidden]
        stands = padded([one.patch_to_token for one in parts], -1)
        return cls(
            hidden=padded([one.hidden for one in parts]),
            patch_index=stands.clamp(min=0),
            patch_to_token=stands,
            grid=parts[0].grid,
            prefix=0,
            valid=stands >= 0,
            lengths=tuple(lengths[number] for number in order),
            views=tuple([one.known_views[0] for one in parts for _ in one.hidden][number] for number in order),
            grids=tuple([one.grid for one in parts for _ in one.hidden][number] for number in order),
            extras=None if parts[0].extras is None else padded([one.extras for one in parts]),
        )

    @property
    def known_grids(self) -> tuple[tuple[int, int], ...]:
        """The patch grid of each image's views, for the host."""
        return self.grids or (self.grid,) * len(self.patch_index)

    @property
    def known_patches(self) -> tuple[int, ...]:
        """Patches of each image, all its views together, for the host."""
        pairs = zip(self.known_views, self.known_grids, strict=True)
        return self.shown or tuple(views * rows * columns for views, (rows, columns) in pairs)

    def divided(self, count: Callable[[int, int], int], per: str = "image") -> list[int]:
        """A number for every row, no more than its tokens; nothing is read from the device.

        `count` gives that of an image by its patches and its tokens, its views' together, which share it by their
        tokens; with `per` "view" every row is an image of its own.
        """
        lengths, patches = self.known_lengths, self.known_patches
        return [
            number
            for own in self._images(per)
            for number in apportioned(count(sum(patches[own]), sum(lengths[own])), lengths[own])
        ]

    def patches_together(self, per: str = "image") -> list[int]:
        """The patches of every row's image, all its views together, or with `per` "view" those of the row."""
        patches = self.known_patches
        return [sum(patches[own]) for own in self._images(per) for _ in patches[own]]

    def _images(self, per: str) -> list[slice]:
        """The rows of each image, or each row."""
        sizes = self.together if self.together and per == "image" else (1,) * len(self.patch_index)
        ends = [0, *accumulate(sizes)]
        return list(map(slice, ends, ends[1:]))

    def rows(self, numbers: Sequence[int]) -> VisionTokens:
        """The tokens of these images; an image may come several times."""
        index = torch.tensor(numbers, device=self.hidden.device)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        known = {
            name: None if fields[name] is None else tuple(fields[name][number] for number in numbers)
            for name in ("lengths", "keys", "views", "tiles", "shown", "grids")
        }
        known["notes"] = self._noted(lambda values: values[index])
        return dataclasses.replace(
            self, **{name: value[index] for name, value in fields.items() if isinstance(value, Tensor)}, **known
        )

    def _noted(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor] | None:
        return None if self.notes is None else {name: change(values) for name, values in self.notes.items()}

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
            notes=self._noted(lambda values: values.gather(1, indices)),
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
            notes=self._noted(lambda values: F.pad(values, (shift, 0))),
        )
