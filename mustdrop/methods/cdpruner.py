"""CDPruner (arXiv 2506.10967): vision tokens that differ from each other, those first that the question is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.retaining import Retaining
from mustdrop.ops import for_rows, stretched

RIDGE = 1e-3  # once features span no further direction, relevance decides, not rounding


@dataclass
class CDPruner(Retaining):
    """CDPruner.

    After the projector, each image keeps the most probable subset of a determinantal point process whose kernel is the
    cosine similarity of the features, every token scaled by its relevance to the question. A token's relevance is its
    mean cosine similarity with the embeddings of the text after the prompt's first image, stretched from 0 to 1 over
    the image: the language model's own space, because LLaVA brings no text encoder (with CLIP's, the authors take it
    from there). Without such text all tokens are equally relevant.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches. All it has, or more:
        nothing is done.

    Raises
    ------
    ValueError
        If `retain` is neither a positive number nor a share.
    """

    counts_at: ClassVar[str] = "on_instruction"

    retain: int | float = 64

    def on_instruction(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        units = F.normalize(tokens.patches.float(), dim=-1)
        relevance = stretched(mean_similarity(units, step.instruction, step.real), tokens.valid)
        chosen = most_probable(relevance[..., None] * units, relevance, counts, tokens.valid)
        return Keep.top(chosen.float(), counts)


def mean_similarity(units: Tensor, instruction: Tensor, real: Tensor) -> Tensor:
    """Mean cosine similarity of unit vectors `[rows, tokens, width]` with the real entries of a text `[rows, tokens]`.

    `instruction` `[rows, length, width]`, `real` bool `[rows, length]`; zero where nothing is real.
    """
    text = F.normalize(instruction.float(), dim=-1) * real[..., None]
    return (units @ text.transpose(1, 2)).sum(-1) / real.sum(-1, keepdim=True).clamp(min=1)


def most_probable(
    features: Tensor, relevance: Tensor, count: int | Sequence[int], valid: Tensor | None = None
) -> Tensor:
    """Greedy search for the most probable subset of a determinantal point process (CDPruner, section 3.3).

    Every step takes the token that multiplies the determinant of the chosen tokens' kernel most, by extending its
    Cholesky factor by one row (arXiv 1709.05135). Images go through the steps together; the host waits for none.

    Parameters
    ----------
    features : `[rows, tokens, width]`
        Their products are the kernel.
    relevance : `[rows, tokens]`
        Its square, times `RIDGE`, is added to the kernel's diagonal.
    count : int or sequence of int
        Tokens to choose of every row, or of each.
    valid : bool `[rows, tokens]`, optional
        False for padding, which is never better than a token.

    Returns
    -------
    bool `[rows, tokens]`
    """
    kernel = features @ features.transpose(1, 2)
    kernel.diagonal(dim1=1, dim2=2).add_(RIDGE * relevance.square())
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    if valid is not None:
        gain = gain.masked_fill(~valid, float("-inf"))
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    most, wanted = for_rows(count, features.device)
    factor = kernel.new_zeros(len(kernel), most, kernel.shape[1])
    for step in range(most):
        pick = gain.masked_fill(chosen, float("-inf")).argmax(-1)[:, None]
        column = pick[:, None].expand(-1, kernel.shape[1], 1)
        explained = factor[:, :step].transpose(1, 2) @ factor[:, :step].gather(2, column[:, :step])
        left = (kernel.gather(2, column) - explained)[..., 0]
        factor[:, step] = left / gain.gather(1, pick).clamp(min=1e-20).sqrt()
        gain = gain - factor[:, step].square()
        chosen = chosen.scatter(1, pick, step < wanted)
    return chosen
