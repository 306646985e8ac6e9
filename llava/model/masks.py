"""Masks: attention masks in the form each implementation wants, and labels without those of dropped tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
)

from llava.constants import IGNORE_INDEX
from llava.model import cpu_attention
from mustdrop.hooks import Tokens

WITH_4D_MASKS = ("sdpa", "eager", "flex_attention", cpu_attention.NAME)
"""Attention implementations whose masks can say which key each row sees."""


def attention_mask(
    config,
    hidden: Tensor,
    *,
    valid: Tensor | None,
    keys: int,
    causal: bool,
    near: tuple[Tensor, int] | None = None,
):
    """Mask for queries that are the last `hidden.shape[1]` of `keys` positions.

    Parameters
    ----------
    config : PreTrainedConfig
        Its attention implementation decides the form of the mask.
    hidden : `[batch, queries, width]`
        Gives batch, number of queries, dtype and device.
    valid : bool `[batch, keys]` or None
        False for padded keys; None when there is no padding.
    keys : int
        Number of keys.
    causal : bool
        Whether a query sees only keys up to its own position.
    near : (int64 `[batch, keys]`, int), optional
        Place of every key, and how many places back a query sees, its own included.

    Returns
    -------
    None (the implementation needs no mask), a 4-D tensor, a 2-D tensor (flash attention) or a BlockMask (flex).
    """
    implementation = config._attn_implementation
    queries = hidden.shape[1]
    sees = causal_mask_function if causal else bidirectional_mask_function
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=hidden.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        kv_offset=0,
        mask_function=sees if near is None else and_masks(sees, _within(*near)),
        attention_mask=valid,
        allow_is_causal_skip=causal and valid is None and near is None,  # else it would read `valid` on the host
        allow_is_bidirectional_skip=not causal and valid is None,
        dtype=hidden.dtype,
        device=hidden.device,
        config=config,
    )


def _within(place: Tensor, window: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return place[batch, key] > place[batch, query] - window

    return sees


def expand_mask(config, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean 4-D mask (True: attend) in the form the attention implementation wants; float masks pass unchanged."""
    if mask.dtype != torch.bool or config._attn_implementation in ("sdpa", cpu_attention.NAME):
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def labels_of(tokens: Tokens, labels: Tensor) -> Tensor:
    """Labels of the tokens that are left, from those of the whole prompt `[batch, length]`."""
    if tokens.original_column.shape == labels.shape and tokens.valid is None:
        return labels
    left = labels.gather(1, tokens.original_column)
    return left if tokens.valid is None else left.masked_fill(~tokens.valid, IGNORE_INDEX)
