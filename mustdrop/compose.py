"""Reducers made of reducers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING

from torch import Tensor

from mustdrop.hooks import CacheStep, DecoderStep, Keep, LayerPlan, Reducer, Tokens, VisionStep, VisionTokens
from mustdrop.reach import Tower, check_counts, check_steps, square
from mustdrop.stages.decode import are_in

if TYPE_CHECKING:
    from mustdrop.macs import Workload
    from mustdrop.shape import ModelShape


class Compose(Reducer):
    """Several reducers at work in one pass, in the given order.

    In the vision encoder each sees what the one before it left. In the decoder all of them see the same layer, and a
    token goes on only if all of them keep it. Each has a scratch of its own.

    Parameters
    ----------
    parts : sequence of Reducer
        The reducers.
    positions, decode_positions : str
        As for any reducer; valid for the whole.
    """

    def __init__(self, parts: Sequence[Reducer], positions: str = "original", decode_positions: str = "continue"):
        self.parts = tuple(parts)
        self.positions = positions
        self.decode_positions = decode_positions

    def flat(self) -> list[Reducer]:
        """The parts, and in place of compositions their parts."""
        return [one for part in self.parts for one in (part.flat() if isinstance(part, Compose) else [part])]

    def check(self, layers: int, blocks: int) -> None:
        for part in self.parts:
            part.check(layers, blocks)

    def check_heads(self, heads: int) -> None:
        for part in self.parts:
            part.check_heads(heads)

    def check_tower(self, tower: Tower) -> None:
        for part in self.flat():
            tower = replace(tower, grid=part.shrinks(tower.grid))
        for part in self.parts:
            part.check_tower(tower)
        check_steps(self.flat(), tower)

    def check_tokens(self, layers: int, tokens: int) -> None:
        check_counts(self.flat(), layers, square(tokens), tokens)

    def check_placeholders(self) -> None:
        for part in self.parts:
            part.check_placeholders()

    def selector_macs(self, shape: ModelShape, work: Workload) -> int:
        return sum(part.selector_macs(shape, work) for part in self.parts)

    @property
    def reads_output_attention(self) -> bool:
        return any(part.reads_output_attention for _, part in self._at("after_prefill"))

    def overrides(self, hook: str) -> bool:
        return any(part.overrides(hook) for part in self.parts)

    def on_pixels(self, images: Tensor, patch_size: int) -> Tensor | None:
        for _, part in self._at("on_pixels"):
            changed = part.on_pixels(images, patch_size)
            images = images if changed is None else changed
        return images

    def after_vision_block(self, step: VisionStep) -> VisionTokens | None:
        tokens = step.tokens
        for number, part in self._at("after_vision_block"):
            own = replace(step, tokens=tokens, scratch=step.scratch.setdefault(number, {}))
            tokens = part.after_vision_block(own) or tokens
        return tokens

    def inside_vision_block(self, step: VisionStep) -> VisionTokens | None:
        tokens = step.tokens
        for number, part in self._at("inside_vision_block"):
            own = replace(step, tokens=tokens, scratch=step.scratch.setdefault(number, {}))
            tokens = part.inside_vision_block(own) or tokens
        return tokens

    def on_vision_features(self, tokens: VisionTokens, scratch: dict) -> VisionTokens | None:
        for number, part in self._at("on_vision_features"):
            tokens = part.on_vision_features(tokens, scratch.setdefault(number, {})) or tokens
        return tokens

    def on_projected_features(self, tokens: VisionTokens, scratch: dict) -> VisionTokens | None:
        for number, part in self._at("on_projected_features"):
            tokens = part.on_projected_features(tokens, scratch.setdefault(number, {})) or tokens
        return tokens

    def on_instruction(
        self, tokens: VisionTokens, instruction: Tensor, real: Tensor, scratch: dict
    ) -> VisionTokens | None:
        for number, part in self._at("on_instruction"):
            tokens = part.on_instruction(tokens, instruction, real, scratch.setdefault(number, {})) or tokens
        return tokens

    def before_decoder_layer(self, step: DecoderStep) -> LayerPlan | None:
        plans = [plan for plan in self._ask("before_decoder_layer", step) if plan is not None]
        return reduce(LayerPlan.__and__, plans) if plans else None

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        answers = [answer for answer in self._ask("after_decoder_layer", step) if answer is not None]
        if len(answers) < 2:
            return answers[0] if answers else None
        if any(answer.merge_into is not None for answer in answers):
            raise ValueError("parts: after a decoder layer in which one reducer merges tokens no other may drop any")
        return Keep.where(reduce(Tensor.logical_and, [answer.choose(step.tokens)[0] for answer in answers]))

    def after_prefill(self, step: CacheStep) -> list[Tensor | Tokens | None] | None:
        answers = [answer for answer in self._ask("after_prefill", step) if answer is not None]
        if not answers:
            return None
        return [_all(of_layer, tokens) for *of_layer, tokens in zip(*answers, step.cached, strict=True)]

    def after_decode_layer(self, step: DecoderStep) -> Tensor | None:
        return _all(self._ask("after_decode_layer", step), step.tokens)

    def _at(self, hook: str) -> list[tuple[int, Reducer]]:
        return [(number, part) for number, part in enumerate(self.parts) if part.overrides(hook)]

    def _ask(self, hook: str, step: DecoderStep | CacheStep) -> list:
        parts = self._at(hook)
        return [
            getattr(part, hook)(replace(step, scratch=step.scratch.setdefault(number, {}))) for number, part in parts
        ]


def _all(keeps: Sequence[Tensor | Tokens | None], tokens: Tokens) -> Tensor | Tokens | None:
    """What every answer about a cache keeps; an answer that stands alone is passed on as it is."""
    given = [keep for keep in keeps if keep is not None]
    if len(given) < 2:
        return given[0] if given else None
    masks = (are_in(keep, tokens) if isinstance(keep, Tokens) else keep for keep in given)
    return reduce(Tensor.logical_and, masks)
