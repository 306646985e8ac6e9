"""How long a pruned LLaVA takes, part by part, beside the untouched one and beside what it could take at best.

Every round runs, in turn: plain Hugging Face LLaVA (same weights), this project's with nothing reduced, every method at
every number of tokens, and after each of these its replay floor: the bare layers on the very same numbers of tokens,
with nothing selected or dropped. Medians over the rounds, with the distance between the quartiles as spread; ratios are
medians of the rounds' own ratios, so that a machine that slows down for a while slows both sides.

With random weights (--shape) a method's thresholds would keep any number of tokens. Numbers are therefore forced:
every method works to --retain exactly (MustDrop in its budget mode), and its selector does all its work.

examples:
  a laptop, seconds                python -m eval.bench_speed --shape mini --repeats 3
  the width of 7B on a small CPU   python -m eval.bench_speed --shape llava-1.5-7b --layers 8 --dtype bfloat16
  a GPU                            python -m eval.bench_speed --shape llava-1.5-7b --batch-size 1 8 32 --json speed.json
  several methods                  python -m eval.bench_speed --methods mustdrop fastv visionzip --retain 192 64
  a checkpoint, thresholds         python -m eval.bench_speed --checkpoint FOLDER --methods my_method.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles

from tabulate import tabulate

from eval.checkpoints import check_checkpoint
from eval.methods import check_shape, read_method
from eval.settings import LARGEST_BATCH, MANY, check_file, check_loading, retained_tokens
from mustdrop import Reducer, available_methods, load_reducer
from mustdrop.checks import shown
from mustdrop.command import Parser, command, needed_number, path
from mustdrop.command import text as text_

VANILLA, HUGGING_FACE = "vanilla", "huggingface"
MOST = {"text": 1 << 15, "new_tokens": 1 << 15, "repeats": 10_000, "warmup": 10_000, "layers": 1000, "threads": 1024}
"""Options that are whole numbers from 1 to so many."""

ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2")


@dataclass
class Contestant:
    """What one row is about.

    `settings` are a reducer's, None for Hugging Face's LLaVA; `compiled` says whether the decoder goes through
    torch.compile; `passes` and `floors` hold what every round measured, `selector_macs` what choosing costs a prompt,
    counted apart.
    """

    method: str
    retain: int | None
    batch_size: int
    settings: dict | None
    compiled: bool = False
    passes: list = field(default_factory=list)
    floors: list = field(default_factory=list)
    selector_macs: int = 0

    @property
    def label(self) -> str:
        retain = "" if self.retain is None else f" {self.retain}"
        return self.method + retain + (" compiled" if self.compiled else "")


def contestants(
    methods: list[str], retains: list[int], batch_sizes: list[int], compiled: bool = False
) -> list[Contestant]:
    """The rows that are asked for, Hugging Face's and the untouched model first for every batch size.

    A YAML file is taken as it is; a method's name gets every number of tokens, unless it has no such setting. With
    `compiled`, all but Hugging Face's come twice: as they are, and compiled.

    Raises
    ------
    ValueError
        If a method or a setting of it is wrong.
    """
    plans: list[tuple[str, int | None, dict | None]] = [
        (HUGGING_FACE, None, None),
        (VANILLA, None, {"method": VANILLA}),
    ]
    for method in dict.fromkeys(methods):
        settings = read_method(method)
        reducer = load_reducer(settings)
        if Path(method).suffix in (".yaml", ".yml"):
            plans.append((Path(method).stem, settings.get("retain"), settings))
        elif not hasattr(reducer, "retain"):
            plans += [(method, None, settings)] if method != VANILLA else []
        else:
            plans += [(method, retain, {**settings, "retain": retain}) for retain in retains]
    return [
        Contestant(name, retain, batch, settings, twice)
        for batch in dict.fromkeys(batch_sizes)
        for name, retain, settings in plans
        for twice in ((False, True) if compiled and settings is not None else (False,))
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser(
        prog="python -m eval.bench_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = new.add_argument
    model = new.add_mutually_exclusive_group()
    text = "llava-1.5-7b, llava-1.5-13b, mini, a config.json or its folder; weights are random (default: mini)"
    model.add_argument("--shape", type=text_, help=text)
    model.add_argument("--checkpoint", type=text_, help="folder or hub id of a checkpoint, instead of random weights")
    add("--layers", help="decoder layers, to fit a small machine while keeping the width (default: the shape's)")
    text = f"of {', '.join(name for name in available_methods() if name != VANILLA)}, or YAML files (%(default)s)"
    add("--methods", nargs="+", default=["mustdrop"], metavar="METHOD", help=text)
    add("--retain", nargs="+", default="64", metavar="N", help="mean vision tokens per layer (192 128 64; default: 64)")
    add("--batch-size", nargs="+", default="1", metavar="N", help="one or several (%(default)s)")
    add("--text", default=60, metavar="N", help="text tokens of a prompt, the first 7 of 12 before the picture (60)")
    add("--new-tokens", default=16, metavar="N", help="tokens generated; 1 leaves decoding out (%(default)s)")
    add("--dtype", default="auto", help="auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16")
    add("--attn-implementation", default="sdpa", help=f"{', '.join(ATTENTION)} (%(default)s)")
    add("--compile", action="store_true", help="every row a second time with a compiled decoder (torch.compile)")
    add("--device", type=text_, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--threads", metavar="N", help="CPU threads (default: torch's own choice)")
    add("--repeats", default=5, metavar="N", help="measured rounds (%(default)s)")
    add("--warmup", default=1, metavar="N", help="rounds before them (%(default)s)")
    add("--json", type=path, metavar="FILE", help="also write rows, settings and provenance there")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    numbers = {
        name: None if getattr(args, name) is None else needed_number(name, getattr(args, name), most=most)
        for name, most in MOST.items()
    }
    if numbers["text"] < 2:
        raise ValueError("text: got 1, expected at least 2: a token before the picture and one after it")
    check_loading(args.device, dtype=args.dtype)
    batch_sizes = [needed_number("batch_size", word, most=LARGEST_BATCH) for word in _words(args.batch_size)]
    if not 0 < len(batch_sizes) <= MANY:
        raise ValueError(f"batch_size: got {len(batch_sizes)} numbers, expected 1 to {MANY}")
    rows_wanted = contestants(args.methods, retained_tokens(args.retain), batch_sizes, args.compile)
    if args.json is not None:
        if not args.json.parent.is_dir():
            raise ValueError(f"json: the folder of {shown(str(args.json))} does not exist")
        check_file("json", args.json)
    report = measure(args, numbers, rows_wanted, argv)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    return 0


def measure(args: argparse.Namespace, numbers: dict, rows_wanted: list[Contestant], argv: list[str]) -> dict:
    """Build the model, run all rounds and return the report: rows, settings, provenance."""
    import torch

    from eval import bench_passes
    from eval.bench_model import Inputs, hugging_face_twin, random_model, read_shape
    from eval.inference import LoadedModel, resolve_device, resolve_dtype
    from eval.progress import progress
    from eval.provenance import device_name, provenance
    from llava.model import compile_model
    from mustdrop.shape import ModelShape

    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    _check_attention(args.attn_implementation)
    if numbers["threads"]:
        torch.set_num_threads(numbers["threads"])
    if args.checkpoint:
        if numbers["layers"]:
            raise ValueError(f"layers: got {numbers['layers']}, but a checkpoint's depth is its own; give --shape")
        model_name = check_checkpoint(args.checkpoint)["model"]
        loaded = LoadedModel.load(
            model_name, device=device, dtype=dtype_name, attn_implementation=args.attn_implementation
        )
        model, shape = loaded.model, ModelShape.from_config(loaded.model.config.to_dict(), model_name, dtype_name)
        _check_reach(rows_wanted, shape)
    else:
        shape = read_shape("mini" if args.shape is None else args.shape, numbers["layers"], dtype_name)
        _check_reach(rows_wanted, shape)
        model = random_model(shape, dtype, args.attn_implementation, device)
    twin = hugging_face_twin(model, shape)
    if twin is None:
        rows_wanted = [one for one in rows_wanted if one.method != HUGGING_FACE]
    inputs = {
        batch: Inputs.random(shape, batch, numbers["text"], dtype, device)
        for batch in dict.fromkeys(one.batch_size for one in rows_wanted)
    }
    for one in rows_wanted:
        if one.settings is not None:
            own = load_reducer(one.settings), inputs[one.batch_size]
            one.selector_macs = bench_passes.selector_macs(model, *own)
    with torch.no_grad():
        compiled = compile_model(model).get_model().compiled if args.compile else None

    def step_of(one: Contestant) -> Callable[[bool], None]:
        run = _step(one, model, twin, shape, inputs[one.batch_size], numbers["new_tokens"])

        def step(keep: bool) -> None:
            model.get_model().compiled = compiled if one.compiled else None
            run(keep)

        return step

    steps = [step_of(one) for one in rows_wanted]
    rounds = numbers["warmup"] + numbers["repeats"]
    with progress(total=rounds * len(steps), description="bench", unit="pass", leave=False) as bar:
        for number in range(rounds):
            shift = number % len(steps)  # nobody always follows the same neighbour's caches
            for step in steps[shift:] + steps[:shift]:
                step(number >= numbers["warmup"])
                bar.update()
    facts = {
        "model": shape.name,
        "weights": "checkpoint" if args.checkpoint else "random",
        "shape": asdict(shape),
        "dtype": dtype_name,
        "attn_implementation": args.attn_implementation,
        "text_tokens": numbers["text"],
        "new_tokens": numbers["new_tokens"],
        "repeats": numbers["repeats"],
        "warmup": numbers["warmup"],
        "device": device,
        "peak_bytes": "torch's allocator" if device.startswith("cuda") else "resident high-water mark of the process",
    }
    read = [*model.get_model().layers.parameters(), *model.get_model().norm.parameters(), model.lm_head.weight]
    weight_bytes = sum(weight.nbytes for weight in read)
    rows = [_row(one, rows_wanted, shape, numbers["new_tokens"], weight_bytes) for one in rows_wanted]
    command = provenance(["eval.bench_speed", *argv], device=device_name(device), cpu_load=_load())
    return {"rows": rows, "settings": facts, "provenance": command}


def _step(one: Contestant, model, twin, shape, inputs, new_tokens: int) -> Callable[[bool], None]:
    """What one round does for a row."""
    from eval import bench_passes

    if one.settings is None:
        ids = inputs.expanded(shape)

        def hugging_face(keep: bool) -> None:
            done = bench_passes.run_hugging_face(twin, ids, inputs, new_tokens)
            one.passes += [done] if keep else []

        return hugging_face
    reducer: Reducer = load_reducer(one.settings)
    on_gpu = model.device.type == "cuda"
    floors = {}

    def ours(keep: bool) -> None:
        done = bench_passes.run_ours(model, reducer, inputs, new_tokens, timing=not on_gpu)
        if on_gpu:
            apart = bench_passes.run_ours(model, reducer, inputs, 1, timing=True)
            done.times["selector_ms"] = apart.times["selector_ms"]
        lengths = (tuple(done.lengths.tower), done.lengths.projector, tuple(done.lengths.decoder))
        if lengths not in floors:
            floors[lengths] = bench_passes.floor_pass(model, inputs, done.lengths)
            floors[lengths]()
        floor = floors[lengths]()
        if keep:
            one.passes.append(done)
            one.floors.append(floor)

    return ours


def _row(one: Contestant, every: list[Contestant], shape, new_tokens: int, weight_bytes: int) -> dict:
    """A row of the report; `weight_bytes` are those of the weights that every new token reads."""
    from eval.bench_passes import PARTS
    from eval.rows import flops
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


def _words(value: str | list[str]) -> list[str]:
    return (value if isinstance(value, str) else " ".join(map(str, value))).replace(",", " ").split()


def _check_attention(name: str) -> None:
    from transformers.utils import is_flash_attn_2_available

    known = [each for each in ATTENTION if each != "flash_attention_2" or is_flash_attn_2_available()]
    if name not in known:
        raise ValueError(f"attn_implementation: got {shown(name)}, expected one of {', '.join(known)} here")


def _check_reach(rows: list[Contestant], shape) -> None:
    """Ask every reducer whether it can do what is wanted on a model of this shape."""
    for settings in (one.settings for one in rows if one.settings is not None):
        retain = settings.get("retain")
        most = shape.vision_tokens
        if isinstance(retain, int) and retain > most:
            raise ValueError(f"RETAIN: got {retain}, but {shape.name} has only {most} vision tokens per picture")
        try:
            check_shape(load_reducer(settings), shape)
        except ValueError as error:
            raise ValueError(f"{settings['method']} on {shape.name}: {error}") from None


def _load() -> list[float] | None:
    """Load averages of the machine, by which to judge whether it was quiet; None where there are none."""
    import os

    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    sys.exit(main())
