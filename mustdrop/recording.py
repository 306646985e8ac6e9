"""What a forward pass remembers while it runs, and where the traces of its prompts are collected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mustdrop.checks import fits_type, require
from mustdrop.counting import counted_products
from mustdrop.reach import Fitting
from mustdrop.tokens import Tokens
from mustdrop.trace import PassRecord, Trace
from mustdrop.vision_tokens import VisionTokens

HOOKS = (
    "on_pixels", "after_vision_block", "inside_vision_block", "on_vision_features", "on_projected_features",
    "on_instruction", "before_decoder_layer", "after_decoder_layer", "after_prefill", "after_decode_layer",
)  # fmt: skip


@dataclass
class TraceRecorder:
    """Collects one `Trace` per prompt while a reducer is on, of which the newest `keep` stay (None: all).

    While `count` is set, forward passes count what the reducer computes; the first that finishes takes it back.
    """

    timing: bool = False
    keep: int | None = None
    count: bool = False
    traces: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        fits = self.keep is None or (fits_type(self.keep, int) and self.keep >= 0)
        require(fits, "keep", self.keep, "a number of traces, or none for all")

    def add(self, traces: Iterable[Trace]) -> None:
        """Note traces, and forget the oldest ones that are too many."""
        self.traces.extend(traces)
        if self.keep is not None:
            del self.traces[: max(0, len(self.traces) - self.keep)]


class ForwardState(PassRecord):
    """Everything one forward pass (and the decoding that follows it) needs to remember.

    Beside what traces are made from, each reducer's scratch and whom the traces go to.
    """

    def __init__(self, reducer: Fitting, recorder: TraceRecorder | None = None):
        self.counts = recorder is not None and recorder.count
        idle = not any(map(reducer.overrides, HOOKS))
        super().__init__(
            before_mlp=reducer.overrides("inside_vision_block"), selector_macs=0 if self.counts or idle else None
        )
        self.reducer = reducer
        self.recorder = recorder
        self.scratch: dict[int, dict] = {}  # per reducer, what it remembers
        self._asked: dict[str, list[tuple[Fitting, dict]]] = {}

    def overrides(self, hook: str) -> bool:
        """Whether the reducer has something to do at a hook: an idle hook costs nothing."""
        return bool(self._asked_at(hook))

    def any(self, attribute: str, hooks: Sequence[str] = HOOKS) -> bool:
        """Whether an attribute is true of one of the reducers that are asked at some hooks, by default at any."""
        return any(getattr(part, attribute) for hook in hooks for part, _ in self._asked_at(hook))

    def asks_after(self, layers: int) -> set[int]:
        """Decoder layers, of so many, after which a reducer may have something to say."""
        return set().union(*(part.asks_after(layers) for part, _ in self._asked_at("after_decoder_layer")))

    def by_attention(self) -> bool:
        """Whether those who are asked after decoder layers read nothing but the layer's own attention."""
        return all(part.by_attention for part, _ in self._asked_at("after_decoder_layer"))

    def ask(self, hook: str, step: Any) -> list:
        """What the reducers that are asked at a hook answer to the same step, those left out that have no answer."""
        answers, asked = [], self._asked_at(hook)
        for part, own in asked:
            step = replace(step, scratch=own) if len(asked) > 1 else step
            step.scratch = own
            answers.append(getattr(part, hook)(step))
        return [answer for answer in answers if answer is not None]

    def pixels(self, images: Tensor, patch_size: int, views: Sequence[int] | None = None) -> Tensor:
        """The preprocessed images `[rows, 3, height, width]` that the vision encoder is given.

        `views` are how many neighbouring rows are the tiles or frames of one image each; by default one.
        """
        with self.timed("selector", images.device) if self.overrides("on_pixels") else nullcontext():
            for part, _ in self._asked_at("on_pixels"):
                changed = part.pixels_of_views(images, patch_size, views or (1,) * len(images))
                images = images if changed is None else changed
        return images

    def choose(self, hook: str, step: Any) -> VisionTokens:
        """The vision tokens that go on after a hook; each reducer that is asked sees what the one before it left."""
        tokens, asked = step.tokens, self._asked_at(hook)
        if not asked:
            return tokens
        with self.timed("selector", tokens.device):
            for part, own in asked:
                keep = getattr(part, hook)(replace(step, tokens=tokens, scratch=own))
                tokens = tokens if keep is None else keep.apply(tokens)
        return tokens

    def _asked_at(self, hook: str) -> list[tuple[Fitting, dict]]:
        """The reducers that are asked at a hook, and what each remembers."""
        if hook not in self._asked:
            parts = self.reducer.asked_at(hook)
            self._asked[hook] = [(part, self.scratch.setdefault(id(part), {})) for part in parts]
        return self._asked[hook]

    def timed(self, part: str, device: torch.device):
        """Context that adds its duration to `seconds[part]` when the run asks for timing.

        What is computed in the part "selector" is the reducer's own, and counted if the run asks for that.
        """
        timing = self.recorder is not None and self.recorder.timing
        clock = self._clock(part, device) if timing else nullcontext()
        return self._counted(clock) if self.counts and part == "selector" else clock

    @contextmanager
    def _counted(self, clock: AbstractContextManager) -> Iterator[None]:
        with counted_products() as counted, clock:
            yield
        self.selector_macs += counted.macs

    @contextmanager
    def _clock(self, part: str, device: torch.device) -> Iterator[None]:
        synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        self.seconds[part] += time.perf_counter() - start

    def finish_prefill(self, cached: list[Tokens], kv_bytes: list[int]) -> None:
        """Note what the cache holds and hand the prompts' traces to the run.

        Raises
        ------
        ValueError
            If the reducer's work was to be counted, and the batch is more than one row: whose it is cannot be told.
        """
        if self.counts:
            rows = len(self.tokens_in[0].image)
            require(rows == 1, "count", f"{rows} prompts or beams", "one prompt alone")
            self.counts = self.recorder.count = False
        self.cached, self.kv_bytes = list(cached), kv_bytes
        if self.recorder is not None:
            prompts = len(self.images)
            every = len(self.tokens_in[0].image) // prompts  # a prompt's beams lie side by side
            self.recorder.add(Trace(self, row=prompt * every, prompt=prompt) for prompt in range(prompts))
