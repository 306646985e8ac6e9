"""One timed pass: a prompt through a model and some new tokens, with a mark on the clock between the parts.

Three kinds can be timed in turn: this project's LLaVA under a reducer, plain Hugging Face LLaVA, and the replay floor:
the bare layers on the token counts of another pass, with nothing selected, dropped, spliced or recorded.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from eval.bench.model import Inputs
from llava.model.language_model.cache import CACHE_NAME
from llava.model.language_model.early import run_early
from llava.model.language_model.projections import whole_layer
from llava.model.language_model.stream import Stream
from llava.model.masks import attention_mask
from mustdrop import Reducer
from mustdrop.trace import Trace

PARTS = ("vision_ms", "projector_ms", "prefill_ms", "selector_ms", "ttft_ms", "decode_ms")
_ENDS = {
    "vision_ms": ("start", "projector"),
    "projector_ms": ("projector", "projected"),
    "prefill_ms": ("spliced", "first"),
    "ttft_ms": ("start", "first"),
    "decode_ms": ("decoding", "end"),
}


class Clock:
    """Named moments on a device: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.moments: dict[str, object] = {}
        if self.cuda:
            torch.cuda.synchronize(device)

    def mark(self, name: str) -> None:
        """Note that this moment has come."""
        if not self.cuda:
            self.moments[name] = time.perf_counter()
            return
        self.moments[name] = event = torch.cuda.Event(enable_timing=True)
        event.record()

    def between(self, first: str, then: str) -> float:
        """Milliseconds from one moment to another; waits for a GPU."""
        if not self.cuda:
            return 1000 * (self.moments[then] - self.moments[first])
        torch.cuda.synchronize()
        return self.moments[first].elapsed_time(self.moments[then])

    def parts(self) -> dict[str, float]:
        """Milliseconds of all `PARTS` whose ends were marked."""
        known = {part: ends for part, ends in _ENDS.items() if ends[1] in self.moments}
        return {part: self.between(*ends) for part, ends in known.items()}

    @contextmanager
    def around(self, module: nn.Module, first: str, then: str):
        """Mark when a module starts and ends."""
        handles = [
            module.register_forward_pre_hook(lambda *_: self.mark(first)),
            module.register_forward_hook(lambda *_: self.mark(then)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Pass:
    """What one pass took: milliseconds per part (`PARTS`, those that there are) and bytes.

    `cache_bytes` is counted from the cache's tensors when prefill ends; `peak_bytes` as `peak_memory` says. `traces`
    and `lengths` are those of this project's LLaVA.
    """

    times: dict[str, float]
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    traces: list[Trace] | None = None
    lengths: Lengths | None = None


@dataclass
class Lengths:
    """Positions, padding included, entering each vision block and each decoder layer, and the projector.

    `finished` are those that go through the second half of each decoder layer.
    """

    tower: list[int]
    projector: int
    decoder: list[int]
    finished: list[int]


def run_ours(model, reducer: Reducer, inputs: Inputs, new_tokens: int, timing: bool) -> Pass:
    """A pass of this project's LLaVA.

    With `timing`, `selector_ms` is measured too; on a GPU that synchronises, so the other times of such a pass are not
    to be used.
    """
    clock = Clock(model.device)
    lengths, features = Lengths([], 0, [], []), []
    projector, tower = model.get_model().mm_projector, model.get_vision_tower().vision_tower
    blocks = tower.encoder.layers[: model.get_vision_tower().blocks_run]
    with ExitStack() as stack:
        peak, run = (stack.enter_context(one) for one in (peak_memory(model.device), reducer.on(model, timing)))
        stack.enter_context(torch.inference_mode())
        for block in blocks:
            stack.enter_context(noting(block.self_attn, lengths.tower))
        stack.enter_context(noting(projector, features))
        clock.mark("start")
        with clock.around(projector, "projector", "projected"):
            prompt = model.splice(inputs.ids, images=inputs.pixels, padding_side="left")
        clock.mark("spliced")
        output = model(inputs_embeds=prompt.embeds, prompt=prompt, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        clock.mark("first")
        cache = output[CACHE_NAME]
        cached = cache_bytes(cache)
        lengths.projector, state = features[0], prompt.state
        lengths.decoder = [record.image.shape[1] for record in state.tokens_in]
        lengths.finished = [done if isinstance(done, int) else done.image.shape[1] for done in state.finished]
        decode(model, token, cache, new_tokens - 1, clock)
    times = clock.parts()
    if timing:
        times["selector_ms"] = sum(trace.times_ms.get("selector", 0.0) for trace in run.traces)
    return Pass(times, cached, peak.bytes, run.traces, lengths)


@torch.inference_mode()
def selector_macs(model, reducer: Reducer, inputs: Inputs) -> int:
    """Multiply-adds of a reducer's own choosing, counted on the first of equally long prompts alone."""
    with reducer.on(model, count=True) as run:
        prompt = model.splice(inputs.ids[:1], images=inputs.pixels[:1], padding_side="left")
        model(inputs_embeds=prompt.embeds, prompt=prompt, use_cache=True, logits_to_keep=1)
    return run.traces[0].selector_macs


def run_hugging_face(model, ids: Tensor, inputs: Inputs, new_tokens: int) -> Pass:
    """A pass of plain `LlavaForConditionalGeneration`; `ids` as `Inputs.expanded` gives them."""
    clock = Clock(model.device)
    inner = model.model
    with peak_memory(model.device) as peak, torch.inference_mode():
        clock.mark("start")
        with (
            clock.around(inner.multi_modal_projector, "projector", "projected"),
            clock.around(inner.language_model, "spliced", "layers"),
        ):
            output = model(input_ids=ids, pixel_values=inputs.pixels, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        clock.mark("first")
        cache = output[CACHE_NAME]
        cached = cache_bytes(cache)
        decode(model, token, cache, new_tokens - 1, clock)
    return Pass(clock.parts(), cached, peak.bytes)


def decode(model, token: Tensor, cache: DynamicCache, steps: int, clock: Clock) -> None:
    """So many greedy steps from a token `[batch, 1]`, between the marks "decoding" and "end"."""
    clock.mark("decoding")
    for _ in range(steps):
        logits = model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits
        token = logits[:, -1:].argmax(-1)
    clock.mark("end")


def floor_pass(model, inputs: Inputs, lengths: Lengths) -> Callable[[], Pass]:
    """What takes the replay floor's times: bare vision blocks, projector and decoder layers on given token counts.

    Of a decoder layer whose output was not read as a whole, the second half is run on as many rows as it was then.
    Inputs of every length, rotary tables and masks are made beforehand; a layer is given the output of the one before
    it where their lengths agree. The vocabulary is computed for the last token, as in any prefill.
    """
    decoder, tower = model.get_model(), model.get_vision_tower().vision_tower
    batch, device, dtype = len(inputs.ids), model.device, model.dtype

    def states(length: int, width: int) -> Tensor:
        return torch.randn(batch, length, width, device=device, dtype=dtype)

    vision = {length: states(length, tower.config.hidden_size) for length in dict.fromkeys(lengths.tower)}
    features = states(lengths.projector, model.config.mm_hidden_size)
    prompts = {length: states(length, model.config.hidden_size) for length in dict.fromkeys(lengths.decoder)}
    contexts = {}
    with torch.inference_mode():
        for length, hidden in prompts.items():
            position = torch.arange(length, device=device).expand(batch, -1)
            mask = attention_mask(decoder.config, hidden, valid=None, keys=length, causal=True)
            contexts[length] = mask, decoder.rotary_emb(hidden, position)

    def run() -> Pass:
        clock = Clock(device)
        with torch.inference_mode():
            clock.mark("start")
            hidden = tower.pre_layrnorm(tower.embeddings(inputs.pixels))
            for block, length in zip(tower.encoder.layers, lengths.tower, strict=False):
                hidden = block(hidden if hidden.shape[1] == length else vision[length], attention_mask=None)
            clock.mark("projector")
            decoder.mm_projector(features)
            clock.mark("projected")
            clock.mark("spliced")
            hidden, cache = prompts[lengths.decoder[0]], DynamicCache(config=decoder.config)
            for layer, length, done in zip(decoder.layers, lengths.decoder, lengths.finished, strict=True):
                hidden = hidden if hidden.shape[1] == length else prompts[length]
                if done < length:
                    hidden = run_early(layer, Stream(hidden, None, *contexts[length]), cache, done)
                else:
                    hidden, _ = whole_layer(layer, hidden, *contexts[length], cache)
            model.lm_head(decoder.norm(hidden)[:, -1:]).argmax(-1)
            clock.mark("first")
        return Pass(clock.parts())

    return run


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values in a cache, from the tensors themselves."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@dataclass
class Peak:
    """Most bytes at once; None where it cannot be measured."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device):
    """Measure the most memory in use inside the `with` block.

    On a GPU what torch's allocator had handed out. On a CPU under Linux the process's resident high-water mark, which
    the kernel lets a process reset: it counts weights, libraries and what the allocator has not given back. Elsewhere
    it is not measured, for there a high-water mark is that of the process's whole life.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    resettable = _reset_high_water_mark()
    yield peak
    if resettable:
        status = Path("/proc/self/status").read_text()
        peak.bytes = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def _reset_high_water_mark() -> bool:
    if sys.platform != "linux":
        return False
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def noting(module: nn.Module, lengths: list[int]):
    """Append how many positions a module is given, each time it runs inside the `with` block."""

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
