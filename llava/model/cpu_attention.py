"""Attention for bfloat16 on CPUs, under the name `cpu_matmul`: two matrix products and a softmax, block by block.

Torch's fused kernel is slow there. Blocks are so small that their scores stay in the processor's cache, and above the
diagonal of a causal attention none are computed. Scores are rounded to bfloat16, as in eager attention: the result is
as exact as eager attention's, about four times less than the fused kernel's. Hence an option, not the default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "cpu_matmul"
DTYPE = torch.bfloat16  # in float32 the fused kernel is never slower
SCORES = 1 << 20  # of a block, for every thread: two megabytes, about what a core's caches hold
ROWS = 256  # of a causal block: fewer compute less above the diagonal, more make better products
NARROWEST, FEWEST = 64, 64  # head width and rows below which the fused kernel is as fast


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`, which also does what is not worth it or not possible here.

    Parameters
    ----------
    query : `[batch, heads, rows, head_dim]`
    key, value : `[batch, kv_heads, keys, head_dim]`
    attn_mask : bool (True: attend) or float, to be expanded to `[batch, heads, rows, keys]`, optional
    is_causal, scale, enable_gqa
        As there; a causal attention has as many rows as keys.

    Returns
    -------
    `[batch, heads, rows, head_dim]`, by rows in memory.
    """
    if not _worth(query, key):
        given = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **given)
    batch, heads, rows, width = query.shape
    scaled = query * (width**-0.5 if scale is None else scale)
    output = query.new_empty(batch, rows, heads, width).transpose(1, 2)
    shared, keys = heads // key.shape[1], key.shape[2]
    height = min(rows, ROWS) if is_causal else rows
    step = max(1, SCORES * torch.get_num_threads() // (height * keys * shared))
    for prompt in range(batch):
        for head in range(0, key.shape[1], step):
            for start in range(0, rows, height):
                end = min(rows, start + height)
                seen = end if is_causal else keys
                part = prompt, slice(head * shared, (head + step) * shared), slice(start, end)
                mask = None if attn_mask is None else _part_of(attn_mask, *part)
                own_key, own_value = (states[prompt, head : head + step, :seen] for states in (key, value))
                output[part] = _block(scaled[part], own_key, own_value, mask, start if is_causal else None)
    return output


def _part_of(mask: Tensor, prompt: int, heads: slice, rows: slice) -> Tensor:
    """Mask of a block, to be expanded to `[heads, rows, keys]`; axes of length 1 stand for all."""
    mask = mask[(None,) * (4 - mask.dim())]
    picks = zip(mask.shape, (slice(prompt, prompt + 1), heads, rows), strict=False)
    return mask[tuple(slice(None) if size == 1 else pick for size, pick in picks)][0]


def _block(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, diagonal: int | None) -> Tensor:
    """Attention `[heads, rows, head_dim]` of some rows, scaled, to keys and values `[kv_heads, keys, head_dim]`.

    `diagonal` is the key that the first row may look at last, the second one further, and so on.
    """
    heads, rows, width = query.shape
    scores = (query.reshape(len(key), -1, width) @ key.transpose(1, 2)).view(heads, rows, -1)
    if diagonal is not None:
        above = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., diagonal:].masked_fill_(above, float("-inf"))
    elif mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)  # a padded row sees nothing and must not be nan
    elif mask is not None:
        scores += mask
    return (scores.softmax(-1).view(len(key), -1, scores.shape[-1]) @ value).view(heads, rows, width)


def _worth(query: Tensor, key: Tensor) -> bool:
    """Whether blocks are faster than the fused kernel, and possible: no gradients, no compiler."""
    bare = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    kind = query.dtype == key.dtype == DTYPE and query.device.type == "cpu"
    return bare and kind and query.shape[-1] >= NARROWEST and query.shape[2] >= FEWEST


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`attention` as transformers calls attention functions; returns `[batch, rows, heads, head_dim]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None
    square = query.shape[2] == key.shape[2]
    if dropout or (causal and not square) or not _worth(query, key):
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)
    return attention(query, key, value, attention_mask, causal, scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
