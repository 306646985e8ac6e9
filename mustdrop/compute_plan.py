"""What a decoder layer computes for vision tokens, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

LEAST_ROWS = 4
"""Rows of the last layer that are computed in any case: a CPU has other code, and other last bits, for fewer."""


@dataclass(frozen=True)
class LayerPlan:
    """What a decoder layer computes for vision tokens (YOPO, arXiv 2410.06169); what it leaves out is not computed.

    Text tokens compute everything. See `mustdrop.methods.yopo` for what each strategy means.

    Attributes
    ----------
    window : int or None
        Side of the square of patches around a vision token whose tokens it attends to, odd; None for causal attention.
    heads : float in [0, 1] or tuple of bool
        Attention heads that are active for vision tokens: a share, counted from the first, or one bool per head.
    head_scope : str
        What the other heads do without: "all" vision tokens, as keys and as rows, or vision "keys" alone.
    mlp_share : float in (0, 1]
        Share of the MLP's neurons, counted from the first, that vision tokens go through.
    skip : bool
        The layer, and every later one, does without vision tokens.
    """

    window: int | None = None
    heads: float | tuple[bool, ...] = 1.0
    mlp_share: float = 1.0
    skip: bool = False
    head_scope: str = "all"

    def active_heads(self, heads: int) -> list[int]:
        """Which of a layer's heads are active; ValueError if the plan is made for another number of them."""
        if not isinstance(self.heads, tuple):
            return list(range(round(self.heads * heads)))
        if len(self.heads) != heads:
            raise ValueError(f"heads: the mask has {len(self.heads)} heads per layer, it must have the model's {heads}")
        return [head for head, active in enumerate(self.heads) if active]

    def neurons(self, mlp: int) -> int:
        """Neurons of an MLP of `mlp` that vision tokens go through."""
        return round(self.mlp_share * mlp)

    @classmethod
    def all_of(cls, plans: Sequence[LayerPlan]) -> LayerPlan | None:
        """The plan that computes only what all do; None if there is none."""
        return reduce(cls.__and__, plans) if plans else None

    def __and__(self, other: LayerPlan) -> LayerPlan:
        """The plan that computes only what both do; ValueError if inactive heads mean one thing here, another there."""
        scopes = {plan.head_scope for plan in (self, other) if plan.heads != 1.0}
        if len(scopes) > 1:
            raise ValueError("head_scope: parts with inactive heads must agree, one says all and another keys")
        masks = [plan.heads for plan in (self, other) if isinstance(plan.heads, tuple)]
        heads: float | tuple[bool, ...] = min(self.heads, other.heads) if not masks else masks[0]
        if masks:
            both = set(self.active_heads(len(masks[0]))) & set(other.active_heads(len(masks[0])))
            heads = tuple(head in both for head in range(len(masks[0])))
        windows = [plan.window for plan in (self, other) if plan.window is not None]
        share, skip = min(self.mlp_share, other.mlp_share), self.skip or other.skip
        return LayerPlan(min(windows, default=None), heads, share, skip, min(scopes, default="all"))
