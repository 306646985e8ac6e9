"""What vision tokens cost, from shapes alone: operations per part, cache bytes, and every way papers count them.

Counts are multiply-adds (MACs); FLOPs are twice that. A published percentage means nothing before its convention is
named: `reduction` answers in all of `CONVENTIONS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tabulate import tabulate

from mustdrop.command import Parser, command, path, share_of, text
from mustdrop.config import load_reducer
from mustdrop.families import known, read_shape
from mustdrop.hooks import LayerPlan
from mustdrop.macs import (
    Workload,
    cache_bytes,
    check,
    costs,
    decode_step_macs,
    floor_tokens,
    formula_macs,
    mean_tokens,
    mean_tokens_official,
)
from mustdrop.methods import YOPO
from mustdrop.shape import DTYPE_BYTES, ImageShape, ModelShape


@dataclass(frozen=True)
class Convention:
    """One way to count what a prompt costs, and what MustDrop's paper saves if it counted so."""

    explanation: str
    count: Callable[[ModelShape, Workload], float]
    unit: str = "FLOPs"
    claim: float = 0.885

    def reduction(self, shape: ModelShape, work: Workload) -> float:
        """Share that is saved against the same prompt with all its vision tokens."""
        return 1 - self.count(shape, work) / self.count(shape, work.unreduced(shape))

    def claim_holds(self, shape: ModelShape, work: Workload) -> bool:
        """Whether the reduction reaches the claim, at the claim's three digits."""
        return round(self.reduction(shape, work), 3) >= self.claim

    def tokens_for_claim(self, shape: ModelShape, work: Workload) -> int | None:
        """The most vision tokens in every layer with which the claim holds; None if not even zero would do."""

        def fails(tokens: int) -> bool:
            return not self.claim_holds(shape, work.unreduced(shape, tokens))

        numbers = range(sum(image.tokens for image in work.images) + 1)
        return None if fails(0) else bisect_left(numbers, True, key=fails) - 1


def _part_flops(shape: ModelShape, work: Workload, *parts: str) -> int:
    macs = costs(shape, work.in_whole_layers)
    if "selector" in parts and work.selector_macs is None:
        raise ValueError("selector: what choosing cost is not known of a trace without count, see Reducer.on")
    return 2 * sum(macs[part] for part in parts)


def _formula(shape: ModelShape, work: Workload, text_tokens: int = 0, **variant: int) -> float:
    return formula_macs(shape, work.vision_tokens, text_tokens, plans=work.plans, **variant)


CONVENTIONS: dict[str, Convention] = {
    "vision-only": Convention(
        "decoder layers on vision tokens alone, 4nd^2 + 2n^2 d + 3ndm multiply-adds each, doubled to FLOPs (YOPO)",
        lambda shape, work: 2 * _formula(shape, work),
    ),
    "vision-only-macs": Convention("vision-only, not doubled", lambda shape, work: _formula(shape, work), unit="MACs"),
    "vision-only-2ndm": Convention(
        "vision-only, the MLP counted as two products (2ndm) although SwiGLU has three",
        lambda shape, work: 2 * _formula(shape, work, mlp_products=2),
    ),
    "vision-only-causal": Convention(
        "vision-only, attention counted over the n(n+1)/2 causal pairs instead of n^2",
        lambda shape, work: 2 * _formula(shape, work, causal=True),
    ),
    "vision-only-tower": Convention(
        "vision-only plus vision tower and projector",
        lambda shape, work: 2 * _formula(shape, work) + _part_flops(shape, work, "vision_tower", "projector"),
    ),
    "with-text": Convention(
        "the formula of vision-only on vision and text tokens together",
        lambda shape, work: 2 * _formula(shape, work, work.text_tokens),
    ),
    "with-text-causal": Convention(
        "with-text, attention counted over the causal pairs",
        lambda shape, work: 2 * _formula(shape, work, work.text_tokens, causal=True),
    ),
    "with-text-tower": Convention(
        "all up to the first new token: tower, projector, selector, whole layers (grouped queries), vocabulary",
        lambda shape, work: _part_flops(shape, work, "vision_tower", "projector", "selector", "prefill"),
    ),
    "mean-tokens": Convention(
        "vision tokens per layer, every layer counted with what it computes on",
        lambda shape, work: mean_tokens(work.vision_tokens),
        unit="tokens",
    ),
    "mean-tokens-official": Convention(
        "mean-tokens by the authors' meter: a filter's own layer counts as already pruned",
        lambda shape, work: mean_tokens(work.vision_tokens_after),
        unit="tokens",
    ),
    "final-cache": Convention(
        "vision tokens in the last layer's cache: the compression ratio of 92.2 % is 45 of 576",
        lambda shape, work: work.cache_lengths[-1] - work.text_tokens,
        unit="tokens",
        claim=0.922,
    ),
}


def compare(shape: ModelShape, work: Workload) -> dict[str, dict]:
    """A prompt against the same prompt with all its vision tokens, under each convention.

    Returns
    -------
    dict
        Per convention: `explanation`, `unit`, `full`, `reduced`, `reduction`, the published `claim`, `claim_holds`,
        and `tokens_for_claim` as `Convention.tokens_for_claim` says.
    """
    return {
        name: {
            "explanation": convention.explanation,
            "unit": convention.unit,
            "full": convention.count(shape, work.unreduced(shape)),
            "reduced": convention.count(shape, work),
            "reduction": convention.reduction(shape, work),
            "claim": convention.claim,
            "claim_holds": convention.claim_holds(shape, work),
            "tokens_for_claim": convention.tokens_for_claim(shape, work),
        }
        for name, convention in CONVENTIONS.items()
    }


def reduction(shape: ModelShape, retain: int | float | Sequence[int], text_tokens: int = 60) -> dict[str, dict]:
    """`compare` for a number or fraction of vision tokens in every layer, or a number per layer."""
    return compare(shape, Workload.of(shape, retain, text_tokens=text_tokens))


def report(shape: ModelShape, work: Workload, batch: int = 1) -> dict:
    """Everything above, ready for JSON. Parts and cache are those of a batch of equal prompts, the rest is of one."""
    full = work.unreduced(shape)
    least = floor_tokens(sum(work.image_tokens), shape.layers)
    return {
        "model": shape.name,
        "shape": asdict(shape),
        "batch": batch,
        "tokens": {
            **asdict(work),
            "full": full.vision_tokens[0],
            "mean": mean_tokens(work.vision_tokens),
            "mean_official": mean_tokens(work.vision_tokens_after),
            "mustdrop_floor": {"mean": mean_tokens(least), "mean_official": mean_tokens_official(least)},
        },
        "attention": "all pairs of positions (n^2); the causal conventions count those that the mask leaves",
        "parts": {part: _both(batch * macs) for part, macs in costs(shape, work).items()},
        "parts_full": {part: _both(batch * macs) for part, macs in costs(shape, full).items()},
        "decode_step": _both(batch * decode_step_macs(shape, work.cache_lengths)),
        "cache_bytes": batch * cache_bytes(shape, work.cache_lengths),
        "cache_bytes_full": batch * cache_bytes(shape, full.cache_lengths),
        "cache_bytes_per_token": shape.cache_bytes_per_token,
        "conventions": compare(shape, work),
    }


def _both(macs: int) -> dict[str, int]:
    return {"macs": macs, "flops": 2 * macs}


def as_table(facts: dict) -> str:
    """A `report` as text."""
    tokens = facts["tokens"]
    title = (
        f"{facts['model']}: {tokens['full']} vision tokens, reduced to {tokens['mean']:.1f} per layer "
        f"({tokens['mean_official']:.1f} by the authors' meter); {tokens['text_tokens']} text, "
        f"{tokens['new_tokens']} new, batch {facts['batch']}"
    )
    scale, letter = _scale(sum(cost["flops"] for cost in facts["parts_full"].values()))
    rows = [
        (part, f"{letter}FLOPs", cost["flops"] / scale, facts["parts"][part]["flops"] / scale)
        for part, cost in facts["parts_full"].items()
    ]
    rows.append(("cache", "MB", facts["cache_bytes_full"] / 1e6, facts["cache_bytes"] / 1e6))
    rows = [(*row, f"{1 - row[-1] / row[-2]:.1%}" if row[-2] else "") for row in rows]
    headers = ["part, whole batch", "unit", "full", "reduced", "saved"]
    align = ("left", "left", *["right"] * 5)
    first = tabulate(rows, headers, floatfmt=".3f", colalign=align[:5])
    rows = []
    for name, row in facts["conventions"].items():
        scale, letter = _scale(row["full"])
        verdict = f"{row['claim']:.1%} {'holds' if row['claim_holds'] else 'fails'}"
        counts = [f"{row[key] / scale:.3f}" for key in ("full", "reduced")]
        rows.append((name, letter + row["unit"], *counts, f"{row['reduction']:.1%}", verdict, row["tokens_for_claim"]))
    headers = ["convention, one prompt", "unit", "full", "reduced", "saved", "claim", "needs at most"]
    second = tabulate(rows, headers, colalign=align, disable_numparse=True, missingval="none")
    notes = [f"{name}: {row['explanation']}" for name, row in facts["conventions"].items()]
    notes.append("prefill above: without what nobody reads of a layer; conventions count whole layers, as papers do")
    notes.append("needs at most: so many vision tokens in every layer reach the claim; none: not even zero would")
    return "\n".join([title, "", first, "", second, "", *notes])


def _scale(value: float) -> tuple[float, str]:
    return next(((scale, letter) for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= scale), (1, ""))


def _retain(text: str) -> int | float:
    share = share_of(text)
    return _whole(text) if share is None else share


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError
    return int(text)


def _per_layer(text: str) -> list[int]:
    return [_whole(number) for number in text.split(",")]


def _schedule(text: str) -> dict[int, int]:
    pairs = [(_whole(layer), _whole(tokens)) for layer, tokens in (entry.split(":") for entry in text.split(","))]
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(sorted(pairs))


def _size(text: str) -> tuple[int, int]:
    width, height = map(_whole, text.split("x"))
    if not width or not height:
        raise ValueError
    return width, height


def _argument(parse: Callable, wanted: str) -> Callable:
    """`parse` for argparse, with a message that says what is wanted."""

    def parsed(text: str):
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}") from None

    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "cost",
        description=f"{__doc__}\nWithout --retain, --schedule or --tokens-per-layer nothing is dropped in the decoder.",
        epilog="""examples:
  What do 64 vision tokens in every layer save, and under which way of counting is it 88.5 %?
    mustdrop cost --model llava-1.5-7b --retain 64
  MustDrop: 350 tokens after merging, filters after layers 2, 6, 10 and 14, cache cut to the survivors
    mustdrop cost --merged 350 --schedule 2:80,6:60,10:50,14:45 --output-aware-cache --new-tokens 32
  YOPO at half the layers, half the heads and half the MLP: 25 % in the convention vision-only
    mustdrop cost --yopo configs/methods/yopo_25.yaml
  A checkpoint of your own, for a script
    mustdrop cost --model path/to/config.json --images 2 --retain 0.11 --json -
  LLaVA-NeXT by the papers' protocol (2880 tokens), and a wide image as the model itself cuts it
    mustdrop cost --model llava-next-7b-2880 --retain 320
    mustdrop cost --model llava-next-7b --image-size 800x300 --retain 320
  Video-LLaVA: 8 frames of 256 tokens, reduced to 194
    mustdrop cost --model video-llava-7b --frames 8 --retain 194
  Qwen2.5-VL on a photograph of 1288 x 952 pixels, a quarter of its tokens kept
    mustdrop cost --model qwen2.5-vl-7b --image-size 1288x952 --retain 0.25
  InternVL2 on twelve tiles and their thumbnail
    mustdrop cost --model internvl2-8b --images 13 --retain 0.25""",
    )
    add = parser.add_argument
    meaning = f"{', '.join(known())}, a config.json or its folder (%(default)s)"
    add("--model", type=text, default="llava-1.5-7b", help=meaning)
    drop = parser.add_mutually_exclusive_group()
    drop.add_argument(
        "--retain",
        type=_argument(_retain, "a number of tokens, or a fraction such as 0.11"),
        metavar="N",
        help="vision tokens in every layer, or a fraction of all",
    )
    meaning = "vision tokens left after these layers, counted from 0"
    drop.add_argument(
        "--schedule",
        type=_argument(_schedule, "LAYER:TOKENS,LAYER:TOKENS,..., each layer once"),
        metavar="LAYER:TOKENS,...",
        help=meaning,
    )
    meaning = "vision tokens entering each layer"
    drop.add_argument(
        "--tokens-per-layer",
        type=_argument(_per_layer, "N,N,..., a number for every layer"),
        metavar="N,N,...",
        help=meaning,
    )
    add("--yopo", type=path, metavar="FILE", help="method file of yopo: less computation for every vision token")
    whole = _argument(_whole, "a whole number")
    add("--merged", type=whole, metavar="N", help="tokens per image or frame left by merging after vision block 0")
    meaning = "after prefill, layers from the first filter on cache the final vision tokens only (MustDrop's stage 3)"
    add("--output-aware-cache", action="store_true", help=meaning)
    add("--images", type=whole, default=1, metavar="N", help="images per prompt (%(default)s)")
    views = parser.add_mutually_exclusive_group()
    meaning = (
        "of images that are cut into tiles (default: one that fills the largest canvas; newlines are text), or as "
    )
    meaning += "the processor hands them over to models that take any size (default: 672x672)"
    size = _argument(_size, "WIDTHxHEIGHT in pixels")
    views.add_argument("--image-size", type=size, metavar="WIDTHxHEIGHT", help=meaning)
    views.add_argument("--frames", type=whole, metavar="N", help="each image is a video of so many frames")
    add("--text-tokens", type=whole, default=60, metavar="N", help="text tokens per prompt (%(default)s)")
    add("--new-tokens", type=whole, default=1, metavar="N", help="tokens generated (%(default)s)")
    add("--batch", type=whole, default=1, metavar="N", help="equal prompts; multiplies parts and cache (%(default)s)")
    add("--dtype", default="float16", choices=DTYPE_BYTES, help="of the cache (%(default)s)")
    meaning = "also write everything as JSON; - for JSON on standard output and no table"
    add("--json", type=path, metavar="FILE", help=meaning)
    return parser


def _workload(shape: ModelShape, args: argparse.Namespace) -> Workload:
    """The prompt that the command line describes."""
    for name, count in (("images", args.images), ("frames", 1 if args.frames is None else args.frames)):
        check(name, [count], least=1)
        check(name, [count], most=1000)
    check("batch", [args.batch], least=1)
    if args.output_aware_cache and args.schedule is None and args.retain is None and args.tokens_per_layer is None:
        raise ValueError("output_aware_cache: cuts the cache to what filters leave; give --schedule")
    video = args.frames and ImageShape(args.frames, args.frames * shape.view_tokens)
    size = args.image_size if shape.tiles is not None else None
    whole = [video or shape.image(size)] * args.images
    left = None if args.merged is None else args.merged * (args.frames or 1)
    images = [whole[0].tokens if left is None else left] * args.images
    tokens = args.retain if args.tokens_per_layer is None else args.tokens_per_layer
    if args.schedule:
        check("schedule", list(args.schedule), most=shape.layers - 2)
        tokens = [sum(images)] * shape.layers
        for layer, left in args.schedule.items():
            check("schedule", [left], most=tokens[layer])
            tokens[layer + 1 :] = [left] * (shape.layers - layer - 1)
    work = Workload.of(
        shape,
        tokens,
        text_tokens=args.text_tokens + (shape.feature_cls * whole[0].views + whole[0].newlines) * args.images,
        image_tokens=images,
        images=whole,
        filter_layers=args.schedule and list(args.schedule),
        new_tokens=args.new_tokens,
        plans=_plans(shape, args.yopo) if args.yopo else None,
    )
    if not args.output_aware_cache or not work.filter_layers:
        return work
    first = work.filter_layers[0]
    final = work.text_tokens + next((tokens for tokens in reversed(work.vision_tokens) if tokens), 0)
    cut = [length if layer < first else min(length, final) for layer, length in enumerate(work.cache_lengths)]
    return replace(work, cache_lengths=tuple(cut))


def _plans(shape: ModelShape, file: Path) -> dict[int, LayerPlan]:
    """What YOPO with the settings of a method file computes in which layer."""
    reducer = load_reducer(file)
    if not isinstance(reducer, YOPO):
        raise ValueError(f"yopo: {file} is a file of another method, it must have method: yopo")
    reducer.check_sizes(shape.layers, shape.vision_layers, patches=shape.vision_tokens, heads=shape.heads)
    plans = {layer: reducer.plan(layer, shape.layers) for layer in range(shape.layers)}
    return {layer: plan for layer, plan in plans.items() if plan is not None}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    is_path = args.model not in known() and os.path.exists(args.model)
    shape = read_shape(args.model, args.dtype, args.image_size, is_path)
    facts = {"command": list(argv), **report(shape, _workload(shape, args), args.batch)}
    written = json.dumps(facts, indent=2) + "\n"
    if args.json and str(args.json) != "-":
        args.json.write_text(written, encoding="utf-8")
    sys.stdout.write(written if str(args.json) == "-" else as_table(facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
