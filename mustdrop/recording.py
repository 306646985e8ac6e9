"""What a forward pass remembers while it runs, and where the traces of its prompts are collected."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from mustdrop.checks import fits_type, require
from mustdrop.reach import Fitting
from mustdrop.tokens import Tokens
from mustdrop.trace import Record, Trace


@dataclass
class TraceRecorder:
    """Collects one `Trace` per prompt while a reducer is on, of which the newest `keep` stay (None: all)."""

    timing: bool = False
    keep: int | None = None
    traces: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        fits = self.keep is None or (fits_type(self.keep, int) and self.keep >= 0)
        require(fits, "keep", self.keep, "a number of traces, or none for all")

    def add(self, traces: Iterable[Trace]) -> None:
        """Note traces, and forget the oldest ones that are too many."""
        self.traces.extend(traces)
        if self.keep is not None:
            del self.traces[: max(0, len(self.traces) - self.keep)]


class ForwardState(Record):
    """Everything one forward pass (and the decoding that follows it) needs to remember.

    Beside what traces are made from, each reducer's scratch and whom the traces go to.
    """

    def __init__(self, reducer: Fitting, recorder: TraceRecorder | None = None):
        super().__init__(before_mlp=reducer.overrides("inside_vision_block"))
        self.reducer = reducer
        self.recorder = recorder
        self.scratch: dict = {}

    def overrides(self, hook: str) -> bool:
        """Whether the reducer has something to do at a hook: an idle hook costs nothing."""
        return self.reducer.overrides(hook)

    def timed(self, part: str, device: torch.device):
        """Context that adds its duration to `seconds[part]` when the run asks for timing."""
        return self._clock(part, device) if self.recorder is not None and self.recorder.timing else nullcontext()

    @contextmanager
    def _clock(self, part: str, device: torch.device) -> Iterator[None]:
        synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        self.seconds[part] += time.perf_counter() - start

    def finish_prefill(self, cached: list[Tokens], kv_bytes: list[int]) -> None:
        """Note what the cache holds and hand the prompts' traces to the run."""
        self.cached, self.kv_bytes = list(cached), kv_bytes
        if self.recorder is not None:
            prompts = len(self.images)
            every = len(self.tokens_in[0].image) // prompts  # a prompt's beams lie side by side
            self.recorder.add(Trace(self, row=prompt * every, prompt=prompt) for prompt in range(prompts))
