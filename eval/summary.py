"""From answers and traces to the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from scipy.stats import binomtest
from tabulate import tabulate

from mustdrop.cost import CONVENTIONS
from mustdrop.macs import Workload
from mustdrop.shape import ModelShape

FLOPS_CONVENTION = "with-text-tower"
"""The convention of ``flops_reduction``: everything one prompt computes up to its first new token."""

REPORTED_CONVENTIONS = ("with-text-tower", "with-text", "vision-only")


def confidence_interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share; it treats questions as independent, though several may share a picture."""
    interval = binomtest(correct, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def flops_reductions(records: Sequence[dict], shape: ModelShape | None) -> dict[str, float]:
    """Share of the FLOPs that is saved over all prompts with pictures, per convention.

    Parameters
    ----------
    records : sequence of dict
        Traces as ``mustdrop.Trace.to_dict`` gives them.
    shape : ModelShape or None
        None where the model's configuration is unknown to ``mustdrop.cost``; then nothing is reported.
    """
    if shape is None:
        return {}
    full, reduced = dict.fromkeys(REPORTED_CONVENTIONS, 0.0), dict.fromkeys(REPORTED_CONVENTIONS, 0.0)
    for record in records:
        if not record["images"]:
            continue
        entering = [image["tokens"] - shape.feature_cls for image in record["images"]]
        work = Workload.of(
            shape,
            record["vision_tokens"],
            text_tokens=record["text_tokens"],
            image_tokens=entering,
            cache_lengths=record["cache_lengths"],
        )
        untouched = Workload.of(shape, text_tokens=work.text_tokens, image_tokens=[shape.patches] * len(entering))
        for name in REPORTED_CONVENTIONS:
            full[name] += CONVENTIONS[name].count(shape, untouched)
            reduced[name] += CONVENTIONS[name].count(shape, work)
    return {name: 1 - reduced[name] / full[name] for name in REPORTED_CONVENTIONS if full[name]}


def shape_of(config: dict, name: str, dtype: str) -> ModelShape | None:
    """The model's sizes for ``mustdrop.cost``, None where they cannot be read."""
    try:
        return ModelShape.from_config(config, name=name, dtype=dtype)
    except ValueError:
        return None


def row(
    method: str, retain: int | None, scores: Sequence[float], kinds: Sequence[str], records: Sequence[dict], shape
) -> dict:
    """One row of the table, without the share of vanilla.

    Parameters
    ----------
    method, retain
        What was evaluated; None for the untouched model, whose measured count is put there.
    scores : sequence of float
        0 or 1 per question.
    kinds : sequence of str
        Type of every question.
    records : sequence of dict
        ``LlavaMustDrop.records``: traces and answers, in any order.
    shape : ModelShape or None
        See ``flops_reductions``.
    """
    n, correct = len(scores), round(sum(scores))
    tokens = fmean(record["mean_tokens"] for record in records)
    reductions = flops_reductions(records, shape)
    return {
        "method": method,
        "retain": round(tokens) if retain is None else retain,
        "accuracy": fmean(scores),
        "ci95": list(confidence_interval(correct, n)),
        "n": n,
        "mean_tokens": tokens,
        "mean_tokens_official": fmean(record["mean_tokens_official"] for record in records),
        "flops_reduction": reductions.get(FLOPS_CONVENTION),
        "flops_reductions": reductions,
        "cache_bytes": fmean(record["cache_bytes"] for record in records),
        **{f"{part}_ms": _median_ms(records, part) for part in ("vision", "prefill", "selector", "decode")},
        "accuracy_by_type": by_type(scores, kinds),
    }


def by_type(scores: Sequence[float], kinds: Sequence[str]) -> dict[str, dict]:
    """``{type: {"accuracy": share, "n": questions}}``, sorted by name."""
    groups: dict[str, list[float]] = {}
    for score, kind in zip(scores, kinds, strict=True):
        groups.setdefault(kind, []).append(score)
    return {kind: {"accuracy": fmean(groups[kind]), "n": len(groups[kind])} for kind in sorted(groups)}


def with_shares(rows: Sequence[dict]) -> list[dict]:
    """The rows with ``share_of_vanilla``, the accuracy divided by the untouched model's; None without such a row."""
    vanilla = next((row["accuracy"] for row in rows if row["method"] == "vanilla"), None)
    return [{**row, "share_of_vanilla": row["accuracy"] / vanilla if vanilla else None} for row in rows]


def table(rows: Sequence[dict], style: str) -> str:
    """The rows as text: ``simple`` for a terminal, ``github`` for Markdown."""
    headers = [
        "method", "retain", "accuracy % (95 % CI)", "of vanilla", "tokens", "official", "FLOPs saved", "vision only",
        "cache MB", "vision ms", "prefill ms",
    ]  # fmt: skip
    lines = [
        [
            row["method"],
            row["retain"],
            f"{100 * row['accuracy']:.1f} ({100 * row['ci95'][0]:.1f}-{100 * row['ci95'][1]:.1f})",
            _percent(row["share_of_vanilla"]),
            f"{row['mean_tokens']:.1f}",
            f"{row['mean_tokens_official']:.1f}",
            _percent(row["flops_reduction"]),
            _percent(row["flops_reductions"].get("vision-only")),
            f"{row['cache_bytes'] / 1e6:.2f}",
            _number(row["vision_ms"]),
            _number(row["prefill_ms"]),
        ]
        for row in rows
    ]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True, stralign="right")


def table_by_type(rows: Sequence[dict], style: str) -> str:
    """Accuracy per question type, where there is more than one."""
    kinds = sorted({kind for row in rows for kind in row["accuracy_by_type"]})
    if len(kinds) < 2:
        return ""
    lines = [
        [row["method"], row["retain"], *(_type_cell(row["accuracy_by_type"].get(kind)) for kind in kinds)]
        for row in rows
    ]
    return tabulate(lines, ["method", "retain", *kinds], tablefmt=style, disable_numparse=True, stralign="right")


def _type_cell(cell: dict | None) -> str:
    return f"{100 * cell['accuracy']:.1f} (n={cell['n']})" if cell else "-"


def _median_ms(records: Sequence[dict], part: str) -> float | None:
    times = [record["times_ms"][part] for record in records if part in record["times_ms"]]
    return median(times) if times else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
