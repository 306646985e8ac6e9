"""How long a pruned LLaVA takes, part by part, beside the untouched one and beside what it could take at best.

Every round runs, in turn: plain Hugging Face LLaVA (same weights), this project's with nothing reduced, every method at
every number of tokens, and after each of these its replay floor: the bare layers on the very same numbers of tokens,
with nothing selected or dropped. Medians over the rounds, with the distance between the quartiles as spread; ratios are
medians of the rounds' own ratios, so that a machine that slows down for a while slows both sides.

With random weights (--shape) a method's thresholds would keep any number of tokens. Numbers are therefore forced:
every method works to --retain exactly (MustDrop in its budget mode), and its selector does all its work.

`mustdrop-eager` among the methods is MustDrop as the authors' code computes it (attention weights of all layers, see
eval/bench/eager.py) at the numbers their thresholds leave, and `mustdrop` at the same numbers beside it.

examples:
  a laptop, seconds                mustdrop bench --shape mini --repeats 3
  the width of 7B on a small CPU   mustdrop bench --shape llava-1.5-7b --layers 8 --dtype bfloat16
  a GPU                            mustdrop bench --shape llava-1.5-7b --batch-size 1 8 32 --json speed.json
  several methods                  mustdrop bench --methods mustdrop fastv visionzip --retain 192 64
  the authors' way, one prompt     mustdrop bench --methods mustdrop-eager
  a checkpoint, thresholds         mustdrop bench --checkpoint FOLDER --methods my_method.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

from eval.bench.cases import EAGER, HUGGING_FACE, VANILLA, BenchCase, bench_cases, check_reach
from eval.bench.table import row_of, table
from eval.checkpoints import check_checkpoint
from eval.run.settings import LARGEST_BATCH, MANY, check_file, check_loading, retained_tokens
from mustdrop import Reducer, available_methods, load_reducer
from mustdrop.checks import shown
from mustdrop.command import Parser, command, needed_number, path
from mustdrop.command import text as text_

MOST = {"text": 1 << 15, "new_tokens": 1 << 15, "repeats": 10_000, "warmup": 10_000, "layers": 1000, "threads": 1024}
"""Options that are whole numbers from 1 to so many."""

ATTENTION = ("sdpa", "eager", "cpu_matmul", "flex_attention", "flash_attention_2")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser("bench", description=__doc__)
    add = new.add_argument
    model = new.add_mutually_exclusive_group()
    text = "llava-1.5-7b, llava-1.5-13b, mini, a config.json or its folder; weights are random (default: mini)"
    model.add_argument("--shape", type=text_, help=text)
    model.add_argument("--checkpoint", type=text_, help="folder or hub id of a checkpoint, instead of random weights")
    add("--layers", help="decoder layers, to fit a small machine while keeping the width (default: the shape's)")
    text = (
        f"of {', '.join(name for name in available_methods() if name != VANILLA)}, {EAGER}, or YAML files (%(default)s)"
    )
    add("--methods", nargs="+", default=["mustdrop"], metavar="METHOD", help=text)
    add("--retain", nargs="+", default="64", metavar="N", help="mean vision tokens per layer (192 128 64; default: 64)")
    add("--batch-size", nargs="+", default="1", metavar="N", help="one or several (%(default)s)")
    add("--text", default=60, metavar="N", help="text tokens of a prompt, the first 7 of 12 before the picture (60)")
    add("--new-tokens", default=16, metavar="N", help="tokens generated; 1 leaves decoding out (%(default)s)")
    add("--dtype", default="auto", help="auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16")
    add("--attn-implementation", default="sdpa", help=f"{', '.join(ATTENTION)} (%(default)s)")
    add("--compile", action="store_true", help="every row a second time with a compiled decoder (torch.compile)")
    text = "whether this project's rows leave out what nobody reads of a layer (they do)"
    add("--drop-early", action=argparse.BooleanOptionalAction, default=True, help=text)
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
    rows_wanted = bench_cases(args.methods, retained_tokens(args.retain), batch_sizes, args.compile)
    if args.json is not None:
        if not args.json.parent.is_dir():
            raise ValueError(f"json: the folder of {shown(str(args.json))} does not exist")
        check_file("json", args.json)
    report = measure(args, numbers, rows_wanted, argv)
    if args.json is not None:
        from eval.provenance import replace_file

        replace_file(args.json, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))
    return 0


def measure(args: argparse.Namespace, numbers: dict, rows_wanted: list[BenchCase], argv: list[str]) -> dict:
    """Build the model, run all rounds and return the report: rows, settings, provenance."""
    import torch

    from eval.bench import passes as bench_passes
    from eval.bench.model import Inputs, hugging_face_twin, random_model, read_shape
    from eval.progress import progress
    from eval.provenance import device_name, provenance
    from eval.run.inference import LoadedModel, resolve_device, resolve_dtype
    from llava.model import compile_model, drop_early
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
        check_reach(rows_wanted, shape)
    else:
        shape = read_shape("mini" if args.shape is None else args.shape, numbers["layers"], dtype_name)
        check_reach(rows_wanted, shape)
        model = random_model(shape, dtype, args.attn_implementation, device)
    drop_early(model, args.drop_early)
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

    def step_of(one: BenchCase) -> Callable[[bool], None]:
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
        "drop_early": args.drop_early,
        "text_tokens": numbers["text"],
        "new_tokens": numbers["new_tokens"],
        "repeats": numbers["repeats"],
        "warmup": numbers["warmup"],
        "device": device,
        "peak_bytes": "torch's allocator" if device.startswith("cuda") else "resident high-water mark of the process",
    }
    read = [*model.get_model().layers.parameters(), *model.get_model().norm.parameters(), model.lm_head.weight]
    weight_bytes = sum(weight.nbytes for weight in read)
    rows = [row_of(one, rows_wanted, shape, numbers["new_tokens"], weight_bytes) for one in rows_wanted]
    command = provenance(["bench", *argv], device=device_name(device), cpu_load=_load())
    return {"rows": rows, "settings": facts, "provenance": command}


def _step(one: BenchCase, model, twin, shape, inputs, new_tokens: int) -> Callable[[bool], None]:
    """What one round does for a row."""
    from eval.bench import eager as bench_eager
    from eval.bench import passes as bench_passes

    if one.settings is None:
        ids = inputs.expanded(shape)

        def hugging_face(keep: bool) -> None:
            done = bench_passes.run_hugging_face(twin, ids, inputs, new_tokens)
            one.passes += [done] if keep else []

        return hugging_face
    reducer: Reducer = load_reducer(one.settings)
    if one.method == EAGER:
        traces = bench_passes.run_ours(model, reducer, inputs, 1, timing=False).traces

        def eager(keep: bool) -> None:
            done = bench_eager.run_eager(model, reducer, inputs, new_tokens)
            one.passes += [replace(done, traces=traces)] if keep else []

        return eager
    on_gpu = model.device.type == "cuda"
    floors = {}

    def ours(keep: bool) -> None:
        done = bench_passes.run_ours(model, reducer, inputs, new_tokens, timing=not on_gpu)
        if on_gpu:
            apart = bench_passes.run_ours(model, reducer, inputs, 1, timing=True)
            done.times["selector_ms"] = apart.times["selector_ms"]
        lengths = repr(done.lengths)
        if lengths not in floors:
            floors[lengths] = bench_passes.floor_pass(model, inputs, done.lengths)
            floors[lengths]()
        floor = floors[lengths]()
        if keep:
            one.passes.append(done)
            one.floors.append(floor)

    return ours


def _words(value: str | list[str]) -> list[str]:
    return (value if isinstance(value, str) else " ".join(map(str, value))).replace(",", " ").split()


def _check_attention(name: str) -> None:
    from transformers.utils import is_flash_attn_2_available

    known = [each for each in ATTENTION if each != "flash_attention_2" or is_flash_attn_2_available()]
    if name not in known:
        raise ValueError(f"attn_implementation: got {shown(name)}, expected one of {', '.join(known)} here")


def _load() -> list[float] | None:
    """Load averages of the machine, by which to judge whether it was quiet; None where there are none."""
    import os

    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    sys.exit(main())
