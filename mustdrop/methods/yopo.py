"""YOPO: less computation for every vision token instead of fewer tokens (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mustdrop.checks import one_of, require, shown
from mustdrop.hooks import DecoderStep, LayerPlan, Reducer, Tokens
from mustdrop.reach import square

AUTHORS_THRESHOLDS = {"qwen2-vl-7b": 0.07, "internvl2-4b": 0.08, "internvl2-8b": 0.11, "internvl2-26b": 0.052}
"""Least ratio of a first generated row, by the names of `mustdrop cost`: the authors' code, one prompt each."""


@dataclass
class YOPO(Reducer):
    """Four ways to compute less for vision tokens, each alone or with the others; text tokens compute everything.

    Parameters
    ----------
    window : int, optional
        Neighbour-aware attention, in prefill: of the vision tokens, a vision token attends to those of its image at
        most `(window - 1) / 2` rows and columns away on the patch grid, also those after it. A merged token sits where
        its patch does; of dropped ones nothing is left to attend to. None: ordinary causal attention. Published: 5.
    heads : float, str or sequence of sequences of bool
        Active visual heads: a .npy file (or nested lists) `[layers, heads]`, true where a head is active; or a share,
        counted from the first head, for models trained with it. An inactive head ignores vision keys for everybody,
        after the softmax, here and in decoding. `mustdrop calibrate-heads` makes files.
    head_scope : str
        "all", the authors' form on LLaVA: an inactive head also gives vision rows nothing. "keys", their form on
        Qwen2-VL and InternVL2: vision rows still have what it sees of text.
    mlp_share : float
        Share of the MLP's neurons, counted from the first, that vision tokens go through. Published: 0.5.
    layer_cut : int or float, optional
        First layer without vision tokens; a float is a fraction of the depth. Published: 16 of 32, 20 of 40.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """

    window: int | None = None
    heads: float | str | Sequence[Sequence[bool | int]] = 1.0
    mlp_share: float = 1.0
    layer_cut: int | float | None = None
    head_scope: str = "all"

    def __post_init__(self) -> None:
        fits = self.window is None or (self.window > 0 and self.window % 2 == 1)
        require(fits, "window", self.window, "an odd number of patches, or none")
        require(0 < self.mlp_share <= 1, "mlp_share", self.mlp_share, "above 0 and at most 1")
        require(self.layer_cut is None or self.layer_cut > 0, "layer_cut", self.layer_cut, "above 0, or none")
        one_of("head_scope", self.head_scope, ("all", "keys"))
        if isinstance(self.heads, int | float):
            require(0 <= self.heads <= 1, "heads", self.heads, "a share from 0 to 1, or a .npy file [layers, heads]")
            self._mask = None
        else:
            self._mask = [tuple(layer) for layer in _read_mask(self.heads).tolist()]

    def check(self, layers: int, blocks: int) -> None:
        if self._mask is not None and len(self._mask) != layers:
            raise ValueError(f"heads: the mask has {len(self._mask)} layers, it must have the model's {layers}")
        if self.layer_cut is not None:
            fits = 0 < self._cut(layers) <= layers
            require(fits, "layer_cut", self.layer_cut, f"a layer from 1 to {layers} or a fraction of the depth")

    def check_heads(self, heads: int) -> None:
        found = heads if self._mask is None else len(self._mask[0])
        if found != heads:
            raise ValueError(f"heads: the mask has {found} heads per layer, it must have the model's {heads}")

    def check_tokens(self, layers: int, tokens: int) -> None:
        self.check_counts(layers, square(tokens), tokens)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        widest = max(5, 2 * max(grid) - 1)
        require((self.window or 1) <= widest, "window", self.window, f"at most {widest}, which sees the whole image")

    def _cut(self, layers: int) -> int:
        return round(self.layer_cut * layers) if isinstance(self.layer_cut, float) else self.layer_cut

    def before_decoder_layer(self, step: DecoderStep) -> LayerPlan | None:
        return self.plan(step.layer, step.layers)

    def plan(self, layer: int, layers: int) -> LayerPlan | None:
        """What decoder layer `layer` of `layers` computes for vision tokens, None for everything."""
        if self.layer_cut is not None and layer >= self._cut(layers):
            return LayerPlan(skip=True)
        heads = float(self.heads) if self._mask is None else self._mask[layer]
        heads = 1.0 if isinstance(heads, tuple) and all(heads) else heads
        scope = "all" if heads == 1.0 else self.head_scope
        plan = LayerPlan(self.window, heads, self.mlp_share, head_scope=scope)
        return None if plan == LayerPlan() else plan


def _read_mask(source: str | Sequence[Sequence[bool | int]]) -> np.ndarray:
    """A head mask, bool `[layers, heads]`."""
    try:
        mask = np.load(source, allow_pickle=False) if isinstance(source, str | Path) else np.asarray(source)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"heads: {shown(str(source))} cannot be read as .npy [layers, heads] ({reason})") from None
    numeric = isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf"
    if not numeric or mask.ndim != 2 or 0 in mask.shape or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"heads: {shown(str(source))} must hold a mask [layers, heads] of true and false, or 1 and 0")
    return mask.astype(bool)


class _HeadRatios(Reducer):
    """Changes nothing and notes how much every head attends to vision tokens: what head masks are made from.

    Attributes
    ----------
    ratios : list of float32 `[layers, heads]`
        For each prompt with an image, attention to vision tokens over attention to text.
    """

    def __init__(self) -> None:
        self.ratios: list[np.ndarray] = []

    def _note(self, step: DecoderStep, paid: torch.Tensor, real: torch.Tensor) -> None:
        """Take what some rows of a layer pay each token, `[batch, heads, tokens]`; after the last layer, all ratios."""
        vision = step.tokens.vision
        to_vision, to_text = ((paid * columns[:, None]).sum(-1) for columns in (vision, real & ~vision))
        layers = step.scratch.setdefault("ratios", [])
        layers.append((to_vision / to_text)[vision.any(-1)])
        if step.layer + 1 == step.layers:
            self.ratios.extend(torch.stack(layers, dim=1).cpu().numpy())


class HeadAttention(_HeadRatios):
    """The ratios of all rows of a prefill, both sums taken over them: the authors' recipe on LLaVA."""

    ROWS = 128  # rows whose attention is held at a time

    def after_decoder_layer(self, step: DecoderStep) -> None:
        real, length = _real(step.tokens), step.hidden.shape[1]
        total = 0
        for start in range(0, length, self.ROWS):
            rows = torch.arange(start, min(start + self.ROWS, length), device=real.device).expand(len(real), -1)
            total = total + (step.attention.probabilities(rows) * real.gather(1, rows)[:, None, :, None]).sum(2)
        self._note(step, total, real)


class GeneratedHeadAttention(_HeadRatios):
    """The ratios of one row, the first generated token's: the authors' recipe on Qwen2-VL and InternVL2.

    It is run when the second token is generated, so two are needed.
    """

    def after_decode_layer(self, step: DecoderStep) -> None:
        if len(step.scratch.get("ratios", [])) < step.layers:
            real = _real(step.tokens)
            row = torch.zeros(len(real), 1, dtype=torch.long, device=real.device)
            self._note(step, step.attention.probabilities(row)[:, :, 0], real)


def _real(tokens: Tokens) -> torch.Tensor:
    """Which tokens are no padding, bool `[batch, tokens]`."""
    return torch.ones_like(tokens.vision) if tokens.valid is None else tokens.valid


def head_mask(
    ratios: Sequence[np.ndarray],
    *,
    threshold: float | None = None,
    share: float | None = None,
    majority: float = 0.4,
    full_layers: int = 2,
) -> tuple[np.ndarray, float]:
    """Which heads are active visual heads.

    Parameters
    ----------
    ratios : sequence of `[layers, heads]`
        `HeadAttention.ratios` or `GeneratedHeadAttention.ratios` of calibration prompts.
    threshold : float, optional
        A head is active in a prompt if its ratio is above; the authors' for some models are `AUTHORS_THRESHOLDS`.
    share : float, optional
        Instead of a threshold: the share of all heads that shall be active.
    majority : float
        A head is active if it is in more than this share of prompts.
    full_layers : int
        First layers, in which all heads are active.

    Returns
    -------
    mask : bool `[layers, heads]`
    threshold : float
        The one given, or the one that gives the share: no threshold gives a share below that of the full layers.

    Raises
    ------
    ValueError
        If there are more full layers than layers.
    """
    stacked = np.stack(ratios)
    most_full = stacked.shape[1]
    require(full_layers <= most_full, "full_layers", full_layers, f"at most the model's {most_full} layers")
    most = max(len(stacked) - int(majority * len(stacked)) - 1, 0)
    decisive = np.sort(stacked, axis=0)[most]  # above the threshold in more than the majority iff this one is
    if threshold is None:
        wanted = round(share * decisive.size) - decisive[:full_layers].size
        ranked = np.sort(decisive[full_layers:], axis=None)[::-1]
        wanted = min(max(wanted, 0), len(ranked))
        threshold = -1.0 if wanted == len(ranked) else float(ranked[wanted])
    mask = decisive > threshold
    mask[:full_layers] = True
    return mask, threshold
