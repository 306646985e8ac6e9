"""Find the settings that make a method keep a wanted average number of vision tokens, and add them to its YAML file.

    mustdrop calibrate --model checkpoints/llava-mini --retain 192 128 64

The wanted number is the mean per decoder layer by the authors' meter. A method's thresholds move together, in the ratio
of the published ones, so that one number is searched for, by bisection on a logarithmic scale; a method that derives
its settings from a number of tokens is checked, and corrected if the data make it keep another. Only prefill is run.
Samples come from training data: the synthetic tasks' training split for the embedded model, --data for any other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from eval.calibrate.files import MethodFile
from eval.checkpoints import EMBEDDED, add_options, check_arguments, is_embedded, loading
from eval.methods import CONFIGS, read_method
from eval.progress import progress, quiet
from eval.run.settings import LARGEST_BATCH, check_loading, check_out, retained_tokens
from mustdrop import load_reducer
from mustdrop.calibrate import (
    RANGE,
    OutOfReach,
    Point,
    calibrated_methods,
    kind_of_setting,
    search,
    settings_at,
)
from mustdrop.checks import shown
from mustdrop.command import Parser, command, decimal_number, needed_number, path, text
from mustdrop.read import read_json
from mustdrop.registry import METHODS

TURNED = ("method", "retain", "budget")
"""Fields that decide how many tokens stay, or whose they are: calibration itself sets them."""


def measure_tokens(loaded, settings: dict, samples: list[tuple], batch_size: int, label: str) -> tuple[float, float]:
    """Mean ``(mean_tokens, mean_tokens_official)`` of a method over ``(image, question)`` samples."""
    reducer = load_reducer(settings)
    counts = []
    for start in progress(range(0, len(samples), batch_size), label, unit="batch", leave=False):
        images, questions = zip(*samples[start : start + batch_size], strict=True)
        prompts = [loaded.prompt(question, 1) for question in questions]
        with reducer.on(loaded.model) as run:
            loaded.answer(prompts, [[image] for image in images], max_new_tokens=1, do_sample=False)
        counts += [(trace.mean_tokens, trace.mean_tokens_official) for trace in run.traces]
    return tuple(sum(column) / len(column) for column in zip(*counts, strict=True))


def read_samples(task: str | None, data: str | None, image_folder: str, count: int) -> list[tuple]:
    """``(PIL image, question)`` pairs: from a JSON list of ``{"image", "question"}``, or from a task's training split.

    The synthetic tasks' questions come in equal shares.
    """
    from llava.mm_utils import load_image

    if data is not None:
        entries, folder = _entries(data), Path(image_folder)
        return [(load_image(folder / entry["image"]), entry["question"]) for entry in islice(entries, count)]
    from eval.tasks import SUITE, training_questions

    tasks = SUITE if task == "mini" else (task,)
    shares = [count // len(tasks) + (number < count % len(tasks)) for number in range(len(tasks))]
    return [pair for name, share in zip(tasks, shares, strict=True) for pair in training_questions(name, share)]


def add_measuring_options(new: argparse.ArgumentParser) -> None:
    """Options of every command that runs a model on training questions: which questions, and how."""
    add_options(new)
    new.add_argument("--task", help="synthetic task whose training split is used, mini for all (default: mini)")
    new.add_argument("--data", type=text, help='JSON list of {"image": file, "question": text}; never the benchmark')
    new.add_argument("--image-folder", type=text, help="where the images of --data are (default: here)")
    new.add_argument("--batch-size", default=8, help="(%(default)s)")
    new.add_argument("--device", type=text, help="cpu, cuda, ... (default: cuda where there is one)")
    new.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16 (%(default)s)")
    new.add_argument("--conv-template", default="vicuna_v1", help="conversation template (%(default)s)")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser("calibrate", description=__doc__)
    new.add_argument("--model", type=text, default=EMBEDDED, help="folder or hub id of a checkpoint (%(default)s)")
    new.add_argument("--retain", nargs="+", default="192 128 64", help="wanted mean tokens per layer (192 128 64)")
    new.add_argument("--samples", default=200, help="number of calibration samples (%(default)s)")
    new.add_argument("--out", type=path, help="folder of the YAML files (default: configs/methods/MODEL)")
    new.add_argument("--method", default="mustdrop", help=f"one of {', '.join(calibrated_methods())} (%(default)s)")
    new.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        nargs="+",
        default=[],
        help="fix other fields of the method, for instance key_rate=0.04; they are written to the file too",
    )
    new.add_argument("--tolerance", default="0.02", help="relative error that is good enough (%(default)s)")
    add_measuring_options(new)
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 all found, 1 a target out of reach, 2 a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    targets = retained_tokens(args.retain, shares=False)
    samples, batch_size = needed_number("samples", args.samples), batch_of(args)
    args.tolerance = decimal_number("tolerance", args.tolerance, most=1, above=True)
    check_loading(args.device, dtype=args.dtype, conv_template=args.conv_template)
    base = _base(args)
    model = check_arguments(args)
    out = check_out(args.out or CONFIGS / Path(model).name)
    file = MethodFile.read(out / f"{args.method}.yaml", args.method, Path(model).name)
    check_reach(base, targets, model, args.model_base)
    check_data(args, model)
    return calibrate(args, argv, model, base, targets, samples, batch_size, file)


def calibrate(
    args, argv: list[str], model: str, base: dict, targets: list[int], samples: int, batch_size: int, file: MethodFile
) -> int:
    """Search for every target and write what is found; returns the exit status."""
    from eval.provenance import provenance
    from eval.run.inference import LoadedModel, UnfitQuestion

    quiet()
    task = None if args.data else args.task or "mini"
    pairs = read_samples(task, args.data, args.image_folder or ".", samples)
    loaded = LoadedModel.load(
        model, device=args.device, dtype=args.dtype, conv_template=args.conv_template, **loading(args)
    )
    facts = provenance(["calibrate", *argv])
    source = Path(args.data).name if args.data else f"the training split of {task} (synthetic)"
    dtype = str(loaded.dtype).removeprefix("torch.") + (f", {loaded.bits} bit" if loaded.bits else "")
    notes = [
        f"{len(pairs)} samples of {source}, {dtype}, {facts['date'][:10]}:",
        facts["command"],
    ]
    method, kind = base["method"], kind_of_setting(base["method"])
    known: dict[float, Point] = {}
    missed = 0
    for target in targets:
        if kind == "retain":
            known = {}  # a scale means another setting for every target

        def measure(scale: float, target: int = target) -> Point:
            settings = {**base, **settings_at(method, target, scale)}
            try:
                counts = measure_tokens(loaded, settings, pairs, batch_size, f"{method} for {target}, x {scale:.4g}")
            except UnfitQuestion:  # whose fault is not the method's
                raise
            except ValueError as error:  # the method itself knows that it cannot
                raise OutOfReach(str(error)) from None
            return Point(scale, *counts)

        try:
            point = search(measure, target, known, args.tolerance, RANGE[kind])
        except OutOfReach as error:
            print(f"{target}: out of reach. {error}", file=sys.stderr)
            missed += 1
            continue
        found = settings_at(method, target, point.scale)
        counts = f"{point.tokens_official:.1f}, or {point.tokens:.1f} if every layer counts with the tokens"
        fields = {name: value for name, value in {**base, **found}.items() if name != "method"}
        file.add(target, fields, [f"Reached: {counts} it computes on.", *notes])
        file.write()
        shown = ", ".join(f"{name} {value:g}" for name, value in found.items())
        print(f"{target}: {point.tokens_official:.1f} tokens by the authors' meter, {shown} -> {file.path}")
    return 1 if missed else 0


def _base(args) -> dict:
    """The method without its knobs, checked."""
    kind_of_setting(args.method)
    fields: dict[str, str] = {}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"set: got {shown(pair)}, expected FIELD=VALUE")
        if name in fields:
            raise ValueError(f"set: {name} is given twice")
        if name in TURNED or name in METHODS[args.method].thresholds:
            raise ValueError(f"set: got {shown(pair)}, but {name} is not to be fixed here")
        fields[name] = value
    try:
        base = read_method(args.method, fields)
        load_reducer(base)
    except ValueError as error:
        raise ValueError(f"set: {error}") from None
    return base


def check_reach(base: dict, targets: Sequence[int], model: str, model_base: str | None = None) -> None:
    """Raise ValueError if a target is more than all tokens, or the fields do not fit the model, as far as is known."""
    from eval.sweep.methods import Method, out_of_reach

    for target in targets:
        if reason := out_of_reach(Method(base["method"], target, base), model, model_base):
            raise ValueError(f"set: {reason}")


def batch_of(args) -> int:
    """The batch size that a command line asks for."""
    return needed_number("batch_size", args.batch_size, most=LARGEST_BATCH)


def check_data(args, model: str) -> None:
    """See that the samples can be read, and fit the model."""
    from eval.tasks import GROUP, LOCAL, TASKS

    known = [*(task for task in LOCAL if not TASKS[task].videos), GROUP]
    if args.task is not None and args.task not in known:
        raise ValueError(f"task: got {shown(args.task)}, expected one of {', '.join(known)}, or --data")
    if args.task is not None and args.data is not None:
        raise ValueError("task: got both --task and --data, expected one of them")
    if args.data is None:
        if args.image_folder is not None:
            raise ValueError("image_folder: is where the images of --data are; give --data")
        if not is_embedded(model):
            raise ValueError(
                "data: give --data, a JSON list of images and questions; the synthetic tasks are for llava-mini"
            )
        return
    entries, folder = _entries(args.data), args.image_folder or "."
    missing = [entry["image"] for entry in entries if not os.path.isfile(Path(folder) / entry["image"])]
    if missing:
        raise ValueError(f"data: there is no image {shown(missing[0])} in {shown(folder)}")


def _entries(data: str) -> list[dict]:
    """The samples that a JSON file lists, unless it is another kind of file."""
    try:
        entries = read_json(data)
    except ValueError as error:
        raise ValueError(f"data: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'data: {shown(data)} must hold a list of objects with "image" and "question"')
    for number, entry in enumerate(entries):
        needed = [entry.get(name) for name in ("image", "question")] if isinstance(entry, dict) else [None]
        if not all(isinstance(value, str) and value.strip() for value in needed):
            raise ValueError(f'data: entry {number} of {shown(data)} must be an object of texts "image" and "question"')
    return entries


if __name__ == "__main__":
    sys.exit(main())
