"""SparseVLM's tensor functions: who rates, and how some of the tokens that go are merged into a few new ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.hooks import Keep, Tokens, gather
from mustdrop.keep import each_image


def recycled(dropped: int) -> tuple[int, int]:
    """Of so many dropped tokens: how many are recycled, and into how many new ones (SparseVLM, section 3.4)."""
    joining = min(dropped, dropped * 3 // 10 + 1) if dropped else 0
    return joining, joining // 10 + 1 if dropped else 0


def recycle(
    hidden: Tensor,
    tokens: Tokens,
    score: Tensor,
    keep: Tensor,
    most: int,
    counts: list[list[int]] | None = None,
    last: bool = False,
    noise: Tensor | None = None,
) -> Keep:
    """Keep the best tokens of every image and merge the next best into clusters.

    Parameters
    ----------
    hidden : `[batch, length, width]`
    tokens : Tokens
    score : `[batch, length]`
    keep : int64 `[batch, images]`
        Tokens of each image that stay as they are.
    most : int
        No image drops more than this.
    counts : list of list of int, optional
        `keep` as the host knows it.
    last : bool
        Whether merged tokens follow the image's others, those of the largest score first, instead of taking the place
        of the token in their cluster's centre.
    noise : `[batch, images, recycled]`, optional
        Random numbers that break ties between densities as the authors do: by up to 1e-6, which also decides between
        near ties.
    """
    own = tokens.image[:, None] == torch.arange(keep.shape[1], device=keep.device)[:, None]
    ranked = score[:, None].masked_fill(~own, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    dropped = own.sum(-1) - keep
    joining = torch.minimum(dropped, dropped * 3 // 10 + 1)
    clusters = torch.where(dropped > 0, joining // 10 + 1, 0)
    size, spare = recycled(most), hidden.shape[1]

    place = torch.arange(size[0], device=keep.device)
    real = place < joining[..., None]
    columns = ranked.gather(2, (place + keep[..., None]).clamp(max=spare - 1))
    points = gather(hidden, columns.flatten(1)).unflatten(1, columns.shape[1:])
    centres, cluster = density_peaks(points, real, clusters, size[1], noise)
    member = (cluster[:, :, None] == torch.arange(size[1], device=keep.device)[:, None]) & real[:, :, None]
    states = (member.float() @ points.float()) / member.sum(-1, keepdim=True).clamp(min=1)

    exists = torch.arange(size[1], device=keep.device) < clusters[..., None]
    targets = torch.where(exists, columns.gather(2, centres), spare)
    everywhere = torch.arange(spare + 1, device=keep.device).expand(len(hidden), -1)
    merge_into = everywhere.scatter(
        1, torch.where(real, columns, spare).flatten(1), targets.gather(2, cluster).flatten(1)
    )
    merged = F.pad(hidden, (0, 0, 0, 1)).scatter(
        1,
        targets.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]),
        states.flatten(1, 2).to(hidden.dtype),
    )
    stays = F.pad(ops.top_per_image(score, tokens.image, keep), (0, 1)).scatter(1, targets.flatten(1), True)
    order = None
    if last:
        step = size[1] + 1
        end = (own * everywhere[:, None, :spare]).amax(-1)
        behind = end[..., None] * step + 1 + torch.arange(size[1], device=keep.device)
        order = (everywhere * step).scatter(1, targets.flatten(1), behind.flatten(1))[:, :spare]
    stays, more = stays[:, :spare], {"states": merged[:, :spare], "merge_into": merge_into[:, :spare], "order": order}
    if counts is None:
        return Keep.where(stays, **more)
    now = each_image(tokens, lambda image: image.tokens)
    after = [
        [number + recycled(before - number)[1] for before, number in zip(*pair, strict=True)]
        for pair in zip(now, counts, strict=True)
    ]
    return Keep.top(stays.float(), after, **more)


def density_peaks(
    points: Tensor, real: Tensor, clusters: Tensor, most: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster points: centres are dense and far from anything denser, all others join the nearest centre.

    Density is that of the `clusters` nearest points, itself among them.

    Parameters
    ----------
    points : `[..., points, width]`
    real : bool `[..., points]`
        False for padding.
    clusters : int64 `[...]`
        Wanted clusters, no more than `most` and than there are real points.
    noise : `[..., points]`, optional
        As in `recycle`.

    Returns
    -------
    centres : int64 `[..., most]`
        The centres, best first; those beyond the wanted number mean nothing.
    cluster : int64 `[..., points]`
        The cluster of every point; of padding it means nothing.
    """
    far = torch.finfo(torch.float32).max
    distance = torch.cdist(points.float(), points.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / points.shape[-1] ** 0.5
    pair = real[..., None] & real[..., None, :]
    nearest = distance.masked_fill(~pair, far).topk(most, dim=-1, largest=False).values
    counted = torch.arange(most, device=points.device) < clusters[..., None, None]
    density = (-(nearest.masked_fill(~counted, 0) ** 2).sum(-1) / clusters[..., None].clamp(min=1)).exp()
    if noise is not None:
        density = density + 1e-6 * noise
    density = density.masked_fill(~real, -1)
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    denser = (rank[..., None, :] < rank[..., None]) & pair
    farthest = distance.masked_fill(~pair, 0).flatten(-2).amax(-1)[..., None]
    peak = torch.minimum(distance.masked_fill(~denser, far).amin(-1), farthest) * density
    centres = peak.masked_fill(~real, -1).topk(most, dim=-1).indices
    wanted = torch.arange(most, device=points.device) < clusters[..., None]
    to_centre = distance.gather(-2, centres[..., None].expand(*centres.shape, distance.shape[-1]))
    cluster = to_centre.masked_fill(~wanted[..., None], far).argmin(-2)
    own = torch.arange(most, device=points.device).expand_as(centres)
    spare = distance.shape[-1]
    cluster = F.pad(cluster, (0, 1)).scatter(-1, torch.where(wanted, centres, spare), own)[..., :spare]
    return centres, cluster


def rotary_similarity(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> Tensor:
    """Score of an all-ones query with an all-ones key after rotation to their positions (SparseVLM+, section 4.2).

    It depends on their distance alone; the authors divide attention by it, although it crosses zero.

    Parameters
    ----------
    rows, columns : int64 `[batch, rows]`, `[batch, columns]`
        Positions.

    Returns
    -------
    float32 `[batch, rows, columns]`
    """
    speed = theta ** -(torch.arange(0, head_dim, 2, device=rows.device) / head_dim)
    at, to = rows[..., None] * speed, columns[..., None] * speed
    return 2 * (at.cos() @ to.cos().transpose(1, 2) + at.sin() @ to.sin().transpose(1, 2)) / head_dim**0.5


def raters(embeds: Tensor, vision: Tensor, rows: Tensor, real: Tensor, in_model_dtype: bool = False) -> Tensor:
    """Text tokens at least as similar to the vision tokens as text tokens are on average (SparseVLM, section 3.2).

    Parameters
    ----------
    embeds : `[batch, length, width]`
    vision : bool `[batch, length]`
    rows : int64 `[batch, instruction_tokens]`
        The text tokens, some of them padding (False in `real`).
    in_model_dtype : bool
        Whether to compute in the precision of `embeds` instead of float32.

    Returns
    -------
    bool `[batch, instruction_tokens]`
    """
    embeds = embeds if in_model_dtype else embeds.float()
    similarity = embeds @ gather(embeds, rows).transpose(1, 2)
    share = similarity.masked_fill(~real[:, None], torch.finfo(similarity.dtype).min).softmax(-1)
    share = (share * vision[..., None]).sum(1) / vision.sum(1, keepdim=True).clamp(min=1)
    average = (share * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return real & (share >= torch.minimum(average, share.masked_fill(~real, 0).amax(-1, keepdim=True)))
