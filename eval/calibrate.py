"""Find thresholds that make a method keep a wanted average number of vision tokens, and write them as YAML.

    python -m eval.calibrate --model checkpoints/llava-mini --retain 192 128 64 --out configs/methods/llava-mini

The wanted number is the mean per decoder layer by the authors' meter. A method's thresholds move together, in the ratio
of the published ones, so that one number is searched for, by bisection on a logarithmic scale. Only prefill is run.
Samples come from training data: the synthetic training scenes for the embedded model, --data for any other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from eval.methods import CONFIGS, read_method
from eval.progress import progress, quiet
from eval.settings import EMBEDDED, check_model, check_out, is_embedded, retained_tokens, whole_number

KNOBS = {"mustdrop": {"global_threshold": 0.011, "individual_threshold": 0.01}}
"""Per method: the fields that are scaled together, at their published values for 64 tokens."""

LOWEST, HIGHEST = 1e-6, 1e2
"""Scales at which nothing and everything that may be dropped is dropped: attention shares lie between 0 and 1."""

STEPS = 16


@dataclass(frozen=True)
class Point:
    """Token counts, means over the samples, at one scale of the knobs."""

    scale: float
    tokens: float
    tokens_official: float


class OutOfReach(ValueError):
    """No setting of the knobs gives the wanted number."""


def search(measure: Callable[[float], Point], target: float, known: dict[float, Point], tolerance: float) -> Point:
    """The scale whose ``tokens_official`` comes closest to a target, to within ``tolerance`` of it.

    Parameters
    ----------
    measure : callable
        Scale -> ``Point``; the count falls as the scale rises, apart from small wiggles.
    target : float
        Wanted ``tokens_official``.
    known : dict
        Points measured already, by scale; gets the new ones.
    tolerance : float
        Relative.

    Raises
    ------
    OutOfReach
        If the target lies below the count that is left when everything droppable is dropped, above the count when
        nothing is, or in a jump between two counts.
    """

    def at(scale: float) -> Point:
        if scale not in known:
            known[scale] = measure(scale)
        return known[scale]

    def error(point: Point) -> float:
        return abs(point.tokens_official - target) / target

    low, high = at(LOWEST), at(HIGHEST)
    best = min(known.values(), key=error)
    if error(best) <= tolerance:
        return best
    if target < high.tokens_official:
        raise OutOfReach(
            f"{target:g} tokens is below the floor of {high.tokens_official:.1f}: layers before the first filter see "
            "every token and key tokens are never dropped; a smaller key_rate or an earlier filter lowers it"
        )
    if target > low.tokens_official:
        raise OutOfReach(
            f"{target:g} tokens is above the {low.tokens_official:.1f} that merging leaves before any threshold drops "
            "one; a larger similarity_threshold raises it"
        )
    for point in known.values():  # the tightest bracket that earlier searches leave
        if point.tokens_official >= target and point.scale > low.scale:
            low = point
    for point in known.values():
        if point.tokens_official < target and low.scale < point.scale < high.scale:
            high = point
    for _ in range(STEPS):
        middle = at(math.sqrt(low.scale * high.scale))
        if error(middle) < error(best):
            best = middle
        if error(best) <= tolerance / 2:
            break
        low, high = (middle, high) if middle.tokens_official >= target else (low, middle)
    if error(best) > tolerance:
        raise OutOfReach(f"{target:g} tokens lies in a jump; the closest is {best.tokens_official:.1f}")
    return best


def thresholds(method: str, scale: float) -> dict[str, float]:
    """The knobs of a method at a scale, rounded to four digits as they are written."""
    return {name: float(f"{value * scale:.4g}") for name, value in KNOBS[method].items()}


def measure_tokens(loaded, settings: dict, samples: list[tuple], batch_size: int, label: str) -> tuple[float, float]:
    """Mean ``(mean_tokens, mean_tokens_official)`` of a method over ``(image, question)`` samples."""
    from mustdrop import load_reducer

    reducer = load_reducer(settings)
    counts = []
    for start in progress(range(0, len(samples), batch_size), label, unit="batch", leave=False):
        images, questions = zip(*samples[start : start + batch_size], strict=True)
        prompts = [loaded.prompt(question, 1) for question in questions]
        with reducer.on(loaded.model) as run:
            loaded.answer(prompts, [[image] for image in images], max_new_tokens=1, do_sample=False)
        counts += [(trace.mean_tokens, trace.mean_tokens_official) for trace in run.traces]
    return tuple(sum(column) / len(column) for column in zip(*counts, strict=True))


def read_samples(data: str | None, image_folder: str, count: int) -> list[tuple]:
    """``(PIL image, question)`` pairs: from a JSON list of ``{"image", "question"}``, or from the training scenes."""
    from llava.mm_utils import load_image

    if data is None:
        from llava.train.mini.questions import scene_questions

        return [(image, question) for image, question, *_ in scene_questions("train", count, per_scene=1)]
    entries = json.loads(Path(data).read_text(encoding="utf-8"))
    return [(load_image(Path(image_folder) / entry["image"]), entry["question"]) for entry in islice(entries, count)]


def as_yaml(settings: dict, target: int, point: Point, notes: list[str]) -> str:
    """The commented YAML file of a calibrated method."""
    import yaml

    lines = [
        f"{settings['method']} keeping about {target} vision tokens per decoder layer, by the authors' meter.",
        f"Reached on the samples: {point.tokens_official:.1f} by the authors' meter, {point.tokens:.1f} if every layer",
        "counts with the tokens it computes on.",
        *notes,
    ]
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(settings, sort_keys=False)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = argparse.ArgumentParser(
        prog="python -m eval.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    new.add_argument("--model", default=EMBEDDED, help="folder or hub id of a LLaVA checkpoint (%(default)s)")
    new.add_argument("--retain", nargs="+", default="192 128 64", help="wanted mean tokens per layer (192 128 64)")
    new.add_argument("--samples", default=64, help="number of calibration samples (%(default)s)")
    new.add_argument("--out", help="folder of the YAML files (default: configs/methods/MODEL)")
    new.add_argument("--method", default="mustdrop", help=f"one of {', '.join(KNOBS)}")
    new.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        nargs="+",
        default=[],
        help="fix other fields of the method, for instance key_rate=0.04; they are written to the file too",
    )
    new.add_argument("--data", help='JSON list of {"image": file, "question": text}; never the benchmark itself')
    new.add_argument("--image-folder", default=".", help="where the images of --data are (%(default)s)")
    new.add_argument("--tolerance", type=float, default=0.02, help="relative error that is good enough (%(default)s)")
    new.add_argument("--batch-size", default=8, help="(%(default)s)")
    new.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    new.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (%(default)s)")
    new.add_argument("--conv-template", default="vicuna_v1", help="conversation template (%(default)s)")
    return new


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 all found, 1 a target out of reach, 2 a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        targets = retained_tokens(args.retain)
        samples = whole_number("samples", args.samples)
        batch_size = whole_number("batch_size", args.batch_size)
        model = check_model(args.model)
        out = check_out(Path(args.out) if args.out else CONFIGS / Path(model).name)
        base = _base(args)
        _check_data(args, model)
        return calibrate(args, argv, model, base, targets, samples, batch_size, out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def calibrate(
    args, argv: list[str], model: str, base: dict, targets: list[int], samples: int, batch_size: int, out: Path
):
    """Search for every target and write the files; returns the exit status."""
    from eval.inference import LoadedModel
    from eval.provenance import provenance

    quiet()
    pairs = read_samples(args.data, args.image_folder, samples)
    loaded = LoadedModel.load(model, device=args.device, dtype=args.dtype, conv_template=args.conv_template)
    facts = provenance(argv, "eval.calibrate")
    source = Path(args.data).name if args.data else "synthetic training scenes"
    dtype = str(loaded.dtype).removeprefix("torch.")
    notes = [
        f"Samples: {len(pairs)} of {source}. Model: {Path(model).name}, {dtype}. Date: {facts['date'][:10]}.",
        f"Made by: {facts['command']}",
    ]

    def measure(scale: float) -> Point:
        settings = {**base, **thresholds(args.method, scale)}
        return Point(scale, *measure_tokens(loaded, settings, pairs, batch_size, f"thresholds x {scale:.4g}"))

    known: dict[float, Point] = {}
    missed = 0
    for target in targets:
        try:
            point = search(measure, target, known, args.tolerance)
        except OutOfReach as error:
            print(f"{target}: out of reach. {error}", file=sys.stderr)
            missed += 1
            continue
        settings = {**base, **thresholds(args.method, point.scale)}
        file = out / f"{args.method}_{target}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(as_yaml(settings, target, point, notes), encoding="utf-8")
        found = ", ".join(f"{name} {value:g}" for name, value in thresholds(args.method, point.scale).items())
        print(f"{target}: {point.tokens_official:.1f} tokens by the authors' meter, {found} -> {file}")
    return 1 if missed else 0


def _base(args) -> dict:
    """The method without its knobs, checked."""
    if args.method not in KNOBS:
        raise ValueError(f"method: got {args.method!r}, expected one of {', '.join(KNOBS)}")
    wrong = [pair for pair in args.set if "=" not in pair]
    if wrong:
        raise ValueError(f"set: got {wrong[0]!r}, expected FIELD=VALUE")
    base = read_method(args.method, dict(pair.split("=", 1) for pair in args.set))
    from mustdrop import load_reducer

    load_reducer(base)
    return base


def _check_data(args, model: str) -> None:
    """See that the samples can be read, and fit the model."""
    if args.data is None:
        if not is_embedded(model):
            raise ValueError(
                "data: give --data, a JSON list of images and questions; the synthetic scenes are for llava-mini"
            )
        return
    try:
        entries = json.loads(Path(args.data).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"data: {args.data!r} cannot be read as JSON ({error})") from None
    if (
        not isinstance(entries, list)
        or not entries
        or not all({"image", "question"} <= set(entry) for entry in entries)
    ):
        raise ValueError(f'data: {args.data!r} must hold a list of objects with "image" and "question"')
    missing = [entry["image"] for entry in entries if not (Path(args.image_folder) / entry["image"]).is_file()]
    if missing:
        raise ValueError(f"data: there is no image {missing[0]!r} in {args.image_folder!r}")


if __name__ == "__main__":
    sys.exit(main())
