"""What methods share that choose by the attention which a vision encoder pays its patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mustdrop.attention import cls_attention
from mustdrop.checks import one_of
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower


@dataclass
class InTower(Retaining):
    """Base of methods that choose on the output of the last block that is run, by its attention.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches.
    compat : {"default", "official"}
        "official": positions are consecutive.
    per : {"image", "view"}
        "view": so many of every tile or frame.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    retain: int | float = 64
    compat: str = field(default="default", kw_only=True)
    per: str = field(default="image", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("compat", self.compat, ("default", "official"))
        self.positions = "renumber" if self.compat == "official" else "original"

    def touches(self, tower: Tower) -> Touch:
        here = frozenset({tower.last})
        return Touch(changes=here, reads=here)


class AfterTower(Retaining):
    """Base of methods that choose after the projector, by what CLS paid each patch in the last block that is run."""

    def touches(self, tower: Tower) -> Touch:
        return Touch(reads=frozenset({tower.last}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        return Keep.note(cls_attention=cls_attention(step.attention, step.tokens)) if step.last else None
