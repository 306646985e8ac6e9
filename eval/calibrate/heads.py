"""Find the attention heads that look at the picture, for YOPO's inactive visual heads, and save them as a mask.

    mustdrop calibrate-heads --model checkpoints/llava-mini --share 0.5
    mustdrop calibrate-heads --model Qwen/Qwen2-VL-7B-Instruct --recipe qwen2-vl-7b --data questions.json

A head is active in a sample if its attention to vision tokens, over that to text, summed over all rows, is above a
threshold, and stays active if it is in more than 40 % of the samples; in layers 0 and 1 all do. With --rows generated
only the row of the first generated token counts; --recipe does so on one sample, with the threshold of YOPO's authors
for a model that they did this with. Writes a .npy file of true and false [layers, heads], for the field heads of yopo,
and beside it a .json file that says how it was made. Samples come from training data: the synthetic tasks' training
split for the embedded model, --data for any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from eval.calibrate.thresholds import add_measuring_options, batch_of, check_data, read_samples
from eval.checkpoints import EMBEDDED, check_arguments, loading
from eval.methods import CONFIGS
from eval.progress import progress, quiet
from eval.run.settings import check_file, check_loading
from eval.sweep.methods import shape_of
from mustdrop.checks import one_of, shown
from mustdrop.command import Parser, command, decimal_number, needed_number, path, text
from mustdrop.methods.yopo import AUTHORS_THRESHOLDS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser("calibrate-heads", description=__doc__)
    new.add_argument("--model", type=text, default=EMBEDDED, help="folder or hub id of a checkpoint (%(default)s)")
    wanted = new.add_mutually_exclusive_group()
    wanted.add_argument("--share", help="share of all heads that stays active; the threshold follows")
    wanted.add_argument("--threshold", help="least ratio of attention to vision and to text; the share follows")
    wanted.add_argument("--recipe", help=f"the authors', of {', '.join(AUTHORS_THRESHOLDS)}: one generated row")
    new.add_argument("--rows", help="all of the prompt, or that of the first generated token (default: all)")
    new.add_argument("--majority", default="0.4", help="share of samples in which a head must be active (%(default)s)")
    new.add_argument("--full-layers", default="2", help="first layers that keep all heads (%(default)s)")
    new.add_argument("--samples", help="number of calibration samples (default: 100; with --recipe 1)")
    new.add_argument("--out", type=path, help="the .npy file (default: configs/methods/MODEL/yopo_heads.npy)")
    add_measuring_options(new)
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a wrong argument."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.recipe is not None:
        one_of("recipe", args.recipe, AUTHORS_THRESHOLDS)
        args.threshold = AUTHORS_THRESHOLDS[args.recipe]
    if args.rows is None:
        args.rows = "all" if args.recipe is None else "generated"
    one_of("rows", args.rows, ("all", "generated"))
    if args.recipe is not None and args.rows != "generated":
        raise ValueError(f"rows: got {args.rows}, but the recipe's threshold is for generated")
    rule = {
        "share": None if args.share is None else decimal_number("share", args.share, most=1),
        "threshold": None if args.threshold is None else decimal_number("threshold", args.threshold),
        "majority": decimal_number("majority", args.majority, most=1),
        "full_layers": needed_number("full_layers", args.full_layers, least=0),
    }
    if rule["share"] is None and rule["threshold"] is None:
        raise ValueError("share: got nothing, expected --share, the heads that stay active, --threshold, or --recipe")
    usual = 100 if args.recipe is None else 1
    samples, batch_size = needed_number("samples", usual if args.samples is None else args.samples), batch_of(args)
    check_loading(args.device, dtype=args.dtype, conv_template=args.conv_template)
    model = check_arguments(args)
    shape = shape_of(model, args.model_base)
    if shape is not None and rule["full_layers"] > shape.layers:
        raise ValueError(f"full_layers: got {rule['full_layers']}, but the model has {shape.layers} layers")
    out = args.out or CONFIGS / Path(model).name / "yopo_heads.npy"
    if out.suffix != ".npy":
        raise ValueError(f"out: got {shown(str(out))}, expected the name of a .npy file")
    for file in (out, out.with_suffix(".json")):
        check_file("out", file)
    check_data(args, model)
    return calibrate(args, argv, model, rule, samples, batch_size, out)


def calibrate(args, argv: list[str], model: str, rule: dict, samples: int, batch_size: int, out: Path) -> int:
    """Measure the heads on the samples and write the two files."""
    import numpy as np

    from eval.provenance import provenance, replace_file
    from eval.run.inference import LoadedModel
    from mustdrop.methods.yopo import GeneratedHeadAttention, HeadAttention, head_mask

    quiet()
    task = None if args.data else args.task or "mini"
    pairs = read_samples(task, args.data, args.image_folder or ".", samples)
    loaded = LoadedModel.load(
        model, device=args.device, dtype=args.dtype, conv_template=args.conv_template, **loading(args)
    )
    heads, new_tokens = (HeadAttention(), 1) if args.rows == "all" else (GeneratedHeadAttention(), 2)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    for start in progress(range(0, len(pairs), batch_size), "heads", unit="batch", leave=False):
        images, questions = zip(*pairs[start : start + batch_size], strict=True)
        prompts = [loaded.prompt(question, 1) for question in questions]
        with heads.on(loaded.model):
            loaded.answer(prompts, [[image] for image in images], do_sample=False, **length)
    mask, threshold = head_mask(heads.ratios, **rule)
    facts = {
        "model": Path(model).name,
        "model_base": args.model_base and Path(args.model_base).name,
        "bits": loaded.bits,
        "samples": len(pairs),
        "source": Path(args.data).name if args.data else f"the training split of {task} (synthetic)",
        "rows": args.rows,
        "recipe": args.recipe,
        **rule,
        "threshold": threshold,
        "active_per_layer": mask.sum(1).tolist(),
        "mean_active": float(mask.sum(1).mean()),
        "provenance": provenance(["calibrate-heads", *argv]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, mask)
    replace_file(out.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
    of = f"{facts['mean_active']:.1f} of {mask.shape[1]} heads per layer, threshold {threshold:.4g}"
    print(f"{of}, {len(pairs)} samples -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
