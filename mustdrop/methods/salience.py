"""What methods share that choose by the attention which a vision encoder pays its patches."""

from __future__ import annotations

from typing import ClassVar

from mustdrop.attention import cls_attention
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower


class InTower(Retaining):
    """Base of methods that choose on the output of the last block that is run, by its attention."""

    counts_at: ClassVar[str] = "after_vision_block"

    def touches(self, tower: Tower) -> Touch:
        here = frozenset({tower.last})
        return Touch(changes=here, reads=here)


class AfterTower(Retaining):
    """Base of methods that choose after the projector, by what CLS paid each patch in the last block that is run."""

    def touches(self, tower: Tower) -> Touch:
        return Touch(reads=frozenset({tower.last}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        return Keep.note(cls_attention=cls_attention(step.attention, step.tokens)) if step.last else None
