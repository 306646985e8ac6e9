"""A question to a model under several reducers: answers, tokens, FLOPs, cache and time of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from eval.run.asking import AskedModel
from eval.run.generation import for_transformers
from eval.run.rows import FLOPS_CONVENTION, flops, shape_of
from eval.run.visuals import Visual
from mustdrop import Reducer, Trace

BASELINE = "baseline"


@dataclass(frozen=True)
class Outcome:
    """What a model under one reducer said, and what that took.

    Attributes
    ----------
    label : str
        The reducer's name.
    answer : str
        The generated text.
    trace : mustdrop.Trace
        What happened to the vision tokens.
    flops : int or None
        FLOPs up to the first new token, what choosing costs included; None where the model's sizes are not known.
    first_token_ms, answer_ms : float
        Milliseconds to the first new token (median of several passes) and to the whole answer, prompt preparation left
        out.
    """

    label: str
    answer: str
    trace: Trace
    flops: int | None
    first_token_ms: float
    answer_ms: float

    @property
    def entering(self) -> int:
        """Vision tokens that enter the language model."""
        return self.trace.vision_tokens[0]

    def to_dict(self) -> dict:
        """Everything as plain values, ready for JSON."""
        facts = {name: getattr(self, name) for name in ("label", "answer", "flops", "first_token_ms", "answer_ms")}
        return {**facts, "trace": self.trace.to_dict()}


@dataclass
class _Measured:
    """A reducer while it is measured."""

    reducer: Reducer
    selector_macs: int | None
    first_ms: list[float] = field(default_factory=list)


def compare(
    loaded: AskedModel,
    question: str,
    visuals: Sequence[Visual],
    reducers: Mapping[str, Reducer],
    *,
    new_tokens: int = 64,
    repeats: int = 3,
) -> list[Outcome]:
    """Ask one question about some images or videos under each reducer, by name.

    Parameters
    ----------
    loaded : AskedModel
        The model.
    question : str
        The user's turn.
    visuals : sequence of PIL.Image.Image or Video
        What it shows.
    reducers : mapping of str to Reducer
        By label; they take turns while times are measured.
    new_tokens : int
        Longest answer.
    repeats : int
        Passes of which the median time to the first token is taken; one more warms up.

    Raises
    ------
    ValueError
        If the question cannot be asked, or a reducer's settings do not fit the model.
    """
    prompt = loaded.prompt_about(question, visuals)
    prepared = loaded.prepare([prompt], [visuals])
    shape = shape_of(loaded.model.config.to_dict(), "model", str(loaded.dtype).removeprefix("torch."))
    measured = {}
    for label, reducer in reducers.items():  # counting is the pass that warms up
        counted = loaded.selector_cost(reducer, prompt, visuals) if visuals else {"selector_macs": None}
        measured[label] = _Measured(reducer, counted["selector_macs"])
    for _ in range(repeats):
        for one in measured.values():
            one.first_ms.append(_generate(loaded, one.reducer, prepared, 1)[2])
    outcomes = []
    for label, one in measured.items():
        answer, trace, spent = _generate(loaded, one.reducer, prepared, new_tokens)
        facts = {**trace.to_dict(), "selector_macs": one.selector_macs}
        used = flops(facts, shape).get(FLOPS_CONVENTION) if shape is not None else None
        macs = None if used is None else 2 * used["used"]
        outcomes.append(Outcome(label, answer, trace, macs, median(one.first_ms), spent))
    return outcomes


def _generate(loaded: AskedModel, reducer: Reducer, prepared: dict, new_tokens: int) -> tuple[str, Trace, float]:
    """Answer, trace and milliseconds of one greedy generation."""
    settings = for_transformers({"max_new_tokens": new_tokens})
    with reducer.on(loaded.model) as run:
        start = time.perf_counter()
        (answer,) = loaded.answer_prepared(prepared, **settings)  # decoding its ids waits for the device
        spent = 1000 * (time.perf_counter() - start)
    return answer, run.traces[0], spent


def table_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Rows of a table: the name of a fact, and its value of each outcome, in brackets against the first."""
    facts = {
        "answer": [one.answer for one in outcomes],
        "vision tokens entering the decoder": _saved([one.entering for one in outcomes], "{:.0f}"),
        "vision tokens per layer, mean": _saved([one.trace.mean_tokens for one in outcomes], "{:.1f}"),
        "GFLOPs to the first token": _saved([one.flops for one in outcomes], "{:.3f}", 1e9),
        "cache after prefill, MB": _saved([one.trace.cache_bytes for one in outcomes], "{:.3f}", 1e6),
        "first token, ms": _saved([one.first_token_ms for one in outcomes], "{:.1f}"),
        "whole answer, ms": _saved([one.answer_ms for one in outcomes], "{:.1f}"),
    }
    return [[name, *values] for name, values in facts.items()]


def _saved(values: Sequence[float | None], form: str, unit: float = 1) -> list[str]:
    """Values in a unit, and how much less each is than the first."""
    first, texts = values[0], []
    for number, value in enumerate(values):
        text = "not known" if value is None else form.format(value / unit)
        texts.append(f"{text} ({value / first - 1:+.0%})" if number and value is not None and first else text)
    return texts
