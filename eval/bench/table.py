"""What the speed benchmark reports: a row of figures for each of its cases, and the table of them."""

from __future__ import annotations

from statistics import fmean, median, quantiles

from tabulate import tabulate

from eval.bench.cases import EAGER, VANILLA, BenchCase

_COMPARED = {"vision_ms": "in the tower", "prefill_ms": "in prefill", "ttft_ms": "to the first token"}


def row_of(one: BenchCase, every: list[BenchCase], shape, new_tokens: int, weight_bytes: int) -> dict:
    """A row of the report; `weight_bytes` are those of the weights that every new token reads."""
    from eval.bench.passes import PARTS
    from eval.run.rows import flops
    from mustdrop.macs import cache_bytes

    vanilla = next(row for row in every if row.label == VANILLA and row.batch_size == one.batch_size)
    times = {part: [done.times[part] for done in one.passes if part in done.times] for part in PARTS}
    traces = (one.passes[0].traces or vanilla.passes[0].traces)[: one.batch_size]
    records = [{**trace.to_dict(), "selector_macs": one.selector_macs} for trace in traces]
    counted = [flops(record, shape) for record in records]

    def implied(convention: str) -> float:
        return sum(c[convention]["full"] for c in counted) / sum(c[convention]["used"] for c in counted)

    def speedup(part: str) -> float | None:
        return _ratio([done.times for done in vanilla.passes], [done.times for done in one.passes], part)

    def floor_share(part: str) -> float | None:
        return _ratio([floor.times for floor in one.floors], [done.times for done in one.passes], part)

    eager = next((row for row in every if row.method == EAGER and row.settings == one.settings), None)
    flop_speedup, ttft_flop_speedup = implied("with-text"), implied("with-text-tower")
    decode = median(times["decode_ms"])
    generated = one.batch_size * (new_tokens - 1)
    floor_times = {part: [floor.times[part] for floor in one.floors] for part in ("prefill_ms", "vision_ms", "ttft_ms")}
    return {
        "method": one.method,
        "retain": one.retain,
        "batch_size": one.batch_size,
        "compiled": one.compiled,
        "label": one.label,
        "settings": one.settings,
        "mean_tokens": fmean(record["mean_tokens"] for record in records),
        "mean_tokens_official": fmean(record["mean_tokens_official"] for record in records),
        "vision_tokens": records[0]["vision_tokens"],
        "selector_macs": one.selector_macs,
        **{part: _median(times[part]) for part in PARTS},
        "decode_tokens_per_s": 1000 * generated / decode if generated else None,
        "peak_bytes": max((done.peak_bytes for done in one.passes if done.peak_bytes is not None), default=None),
        "cache_bytes": one.passes[0].cache_bytes,
        "decode_step_bytes": weight_bytes + one.passes[0].cache_bytes,
        "predicted_cache_bytes": sum(cache_bytes(shape, record["cache_lengths"]) for record in records),
        "flop_speedup": flop_speedup,
        "measured_speedup": speedup("prefill_ms"),
        "share_of_flop_speedup": speedup("prefill_ms") / flop_speedup,
        "replay_floor_ms": _median(floor_times["prefill_ms"]),
        "share_of_replay_floor": floor_share("prefill_ms"),
        "vision_floor_ms": _median(floor_times["vision_ms"]),
        "share_of_vision_floor": floor_share("vision_ms"),
        "ttft_floor_ms": _median(floor_times["ttft_ms"]),
        "share_of_ttft_floor": floor_share("ttft_ms"),
        "ttft_flop_speedup": ttft_flop_speedup,
        "ttft_speedup": speedup("ttft_ms"),
        "decode_speedup": speedup("decode_ms") if generated else None,
        "speedup_over_eager": eager
        and {
            part: _ratio([done.times for done in eager.passes], [done.times for done in one.passes], part)
            for part in PARTS
        },
        "spread": {part: _spread(values) for part, values in times.items()},
        "rounds": {**times, "replay_floor_ms": floor_times["prefill_ms"]},
    }


def table(report: dict) -> str:
    """A report as text."""
    facts, lines = report["settings"], []
    for row in report["rows"]:
        lines.append(
            (
                row["label"],
                row["batch_size"],
                f"{row['mean_tokens']:.1f}",
                _ms(row["vision_ms"]),
                _ms(row["projector_ms"]),
                _with_spread(row, "prefill_ms"),
                _ms(row["selector_ms"]),
                _with_spread(row, "ttft_ms"),
                _number(row["decode_tokens_per_s"], ".1f"),
                _number(row["peak_bytes"], ".0f", 1e-6),
                _number(row["cache_bytes"], ".2f", 1e-6),
                _number(row["decode_step_bytes"], ".1f", 1e-6),
                _number(row["ttft_speedup"], ".2f"),
                _number(row["flop_speedup"], ".2f"),
                _number(row["measured_speedup"], ".2f"),
                _number(row["share_of_flop_speedup"], ".0%"),
                _ms(row["replay_floor_ms"]),
                _number(row["share_of_replay_floor"], ".2f"),
            )
        )
    headers = [
        "method", "batch", "tokens\nper layer", "vision\nms", "proj.\nms", "prefill\nms", "selector\nms",
        "first token\nms", "tokens/s", "peak\nMB", "cache\nMB", "step\nMB", "first token\nspeed-up", "FLOP\nspeed-up",
        "prefill\nspeed-up", "share of\nFLOPs'", "replay\nfloor ms", "share of\nfloor",
    ]  # fmt: skip
    wrong = [row for row in report["rows"] if row["cache_bytes"] != row["predicted_cache_bytes"]]
    title = (
        f"{facts['model']}, {facts['shape']['layers']} layers, {facts['weights']} weights, {facts['dtype']}, "
        f"{facts['attn_implementation']}, {facts['text_tokens']} text tokens, {facts['new_tokens']} new\n"
        f"{report['provenance']['device']}; medians of {facts['repeats']} rounds, ± distance of the quartiles"
    )
    notes = [
        "tokens per layer: every layer counted with what it computes on; FLOP speed-up: of the prefill, text included",
        "step: what one step of decoding reads at least, weights and cache, for one token of every prompt",
        "share of floor: replay floor / prefill; 1 would mean that selecting and dropping cost nothing",
        f"peak: {facts['peak_bytes']}; cache: after prefill, "
        + (
            "as predicted to the byte" if not wrong else f"NOT as predicted in {len(wrong)} rows: padding is cached too"
        ),
    ]
    for row in report["rows"]:
        if (over := row["speedup_over_eager"]) and row["method"] != EAGER:
            named = ", ".join(f"{over[part]:.3f} {name}" for part, name in _COMPARED.items())
            notes.append(f"{EAGER} / {row['label']} on the same numbers of tokens: {named}")
    align = ["left", *["right"] * (len(headers) - 1)]
    return "\n".join([title, "", tabulate(lines, headers, colalign=align, disable_numparse=True), "", *notes])


def _ratio(over: list[dict], under: list[dict], part: str) -> float | None:
    """Median over the rounds of one time divided by another; None where one was not measured."""
    pairs = zip(over, under, strict=False)
    ratios = [one[part] / other[part] for one, other in pairs if one.get(part) and other.get(part)]
    return median(ratios) if ratios else None


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _spread(values: list[float]) -> float | None:
    """Distance between the quartiles; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, _, high = quantiles(values, n=4, method="inclusive")
    return high - low


def _with_spread(row: dict, part: str) -> str:
    spread = row["spread"][part]
    return _ms(row[part]) + ("" if spread is None else f" ±{_ms(spread)}")


def _ms(value: float | None) -> str:
    return _number(value, ".1f" if value is None or value < 1000 else ".0f")


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)
