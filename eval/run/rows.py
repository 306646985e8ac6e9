"""From answers and traces to the numbers of one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

import numpy as np

from eval.statistics import bootstrap_interval, share_interval
from mustdrop.cost import CONVENTIONS
from mustdrop.macs import Workload
from mustdrop.shape import ModelShape

FLOPS_CONVENTION = "with-text-tower"
"""The convention of ``flops_reduction``: everything one prompt computes up to its first new token."""

REPORTED_CONVENTIONS = ("with-text-tower", "with-text", "vision-only")
TIMES = ("vision", "prefill", "selector", "decode")


def shape_of(config: dict, name: str, dtype: str) -> ModelShape | None:
    """The model's sizes for ``mustdrop.cost``, None where they cannot be read."""
    try:
        return ModelShape.from_config(config, name=name, dtype=dtype)
    except ValueError:
        return None


def flops(record: Mapping, shape: ModelShape) -> dict[str, dict[str, int]]:
    """Multiply-adds of one prompt: ``{convention: {"full": untouched, "used": with the reducer}}``.

    Parameters
    ----------
    record : mapping
        A trace as ``mustdrop.Trace.to_dict`` gives it. Without its ``selector_macs`` the convention that counts what
        choosing costs is left out.
    shape : ModelShape
        Of the model. A prompt without images gives an empty dictionary.
    """
    if not record["images"]:
        return {}
    work = Workload.of_trace(shape, record)
    full = work.unreduced(shape)
    return {
        name: {"full": round(CONVENTIONS[name].count(shape, full)), "used": round(CONVENTIONS[name].count(shape, work))}
        for name in REPORTED_CONVENTIONS
        if name != FLOPS_CONVENTION or work.selector_macs is not None
    }


def flops_reductions(records: Sequence[Mapping]) -> dict[str, float]:
    """Share of the FLOPs that is saved over all prompts with images, per convention that is known of all of them."""
    counted = [record["flops"] for record in records if record.get("flops")]
    if not counted:
        return {}
    return {
        name: 1 - sum(one[name]["used"] for one in counted) / sum(one[name]["full"] for one in counted)
        for name in REPORTED_CONVENTIONS
        if all(name in one for one in counted)
    }


def measured(records: Sequence[Mapping]) -> dict:
    """What prompts took, on average: tokens, FLOPs, cache, and times (medians over prompts, None if not measured).

    What choosing costs, ``selector_macs``, was counted on one prompt, ``selector_prompt``; None where nobody counted.
    """
    reductions = flops_reductions(records)
    counted = next((record for record in records if record.get("selector_prompt")), {})
    return {
        "mean_tokens": fmean(record["mean_tokens"] for record in records),
        "mean_tokens_official": fmean(record["mean_tokens_official"] for record in records),
        "flops_reduction": reductions.get(FLOPS_CONVENTION),
        "flops_reductions": reductions,
        "selector_macs": counted.get("selector_macs"),
        "selector_prompt": counted.get("selector_prompt"),
        "cache_bytes": fmean(record["cache_bytes"] for record in records),
        **{f"{part}_ms": _median_ms(records, part) for part in TIMES},
    }


def tokens_per_view(records: Sequence[Mapping]) -> list[float] | None:
    """Vision tokens of the first video in each of its frames, the mean over decoder layers and prompts.

    None where videos differ in their number of frames, or there is none.
    """
    shown = [record["images"][0]["tokens_per_view"] for record in records if record["images"]]
    if not shown or len({len(views) for views in shown}) > 1:
        return None
    return [fmean(views) for views in zip(*shown, strict=True)]


def answered(scores: Sequence[float], kinds: Sequence[str]) -> dict:
    """Accuracy over questions with its interval, in all and per type.

    Parameters
    ----------
    scores : sequence of float
        0 to 1 per question; Wilson's interval if every one is 0 or 1, else the bootstrap's.
    kinds : sequence of str
        Type of every question.
    """
    values, groups = np.asarray(scores, float), {}
    for score, kind in zip(scores, kinds, strict=True):
        groups.setdefault(kind, []).append(score)
    binary = np.isin(values, (0, 1)).all()
    interval = (
        share_interval(int(values.sum()), len(values))
        if binary
        else bootstrap_interval(lambda drawn: values[drawn].mean(), len(values))
    )
    return {
        "accuracy": float(values.mean()),
        "ci95": list(interval),
        "n": len(values),
        "accuracy_by_type": {
            kind: {"accuracy": fmean(groups[kind]), "n": len(groups[kind])} for kind in sorted(groups)
        },
    }


def _median_ms(records: Sequence[dict], part: str) -> float | None:
    times = [record["times_ms"][part] for record in records if part in record["times_ms"]]
    return median(times) if times else None
