"""Ask one question to the baseline and to a method, side by side.

    mustdrop ask photo.jpg "What does it hold?" --model liuhaotian/llava-v1.5-7b --method mustdrop_plus --retain 64
    mustdrop ask --scene 7

Prints answers, tokens, FLOPs, cache and times of both, and draws what each stage kept and merged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mustdrop.command import Parser, command, needed_number, path, share_of, text, whole_number

SHOWS_COLOURS = ("truecolor", "24bit")
SEEDS = 10**9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from eval import checkpoints

    new = Parser("ask", description=__doc__)
    new.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE ... QUESTION",
        help="files or addresses of images or videos, then a question",
    )
    new.add_argument("--scene", metavar="SEED", help="draw a scene of the embedded model's world instead of an IMAGE")
    new.add_argument(
        "--model", type=text, default=checkpoints.EMBEDDED, help="folder or hub id of a checkpoint (%(default)s)"
    )
    checkpoints.add_options(new)
    new.add_argument("--method", type=text, default="mustdrop_plus", help="a method's name or YAML file (%(default)s)")
    new.add_argument("--retain", help="mean vision tokens per layer, or a share such as 0.11 (64; a file has its own)")
    new.add_argument("--max-new-tokens", default=64, help="longest answer (%(default)s)")
    new.add_argument("--repeats", default=3, help="passes of which the median time is taken (%(default)s)")
    new.add_argument("--device", type=text, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    new.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16")
    new.add_argument("--conv-template", default="vicuna_v1", help="conversation template (%(default)s)")
    new.add_argument("--image", type=path, default=Path("ask.png"), help="where the drawing goes (%(default)s)")
    new.add_argument("--json", type=path, metavar="FILE", help="also write everything as JSON")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    args = parser().parse_args(argv)
    visuals, question, target = read_inputs(args.inputs, args.scene)
    new_tokens, repeats = needed_number("max_new_tokens", args.max_new_tokens), needed_number("repeats", args.repeats)
    for file in (args.image, args.json):
        _check_writable(file)
    from eval import checkpoints
    from eval.ask.compare import BASELINE, compare, table_rows
    from eval.run.inference import LoadedModel
    from mustdrop import Reducer

    label, reducer = read_reducer(args.model, args.method, args.retain)
    checkpoints.check_arguments(args)
    options = {name: getattr(args, name) for name in ("device", "dtype", "conv_template", *checkpoints.LOADING)}
    loaded = LoadedModel.load(args.model, **options)
    reducers = {BASELINE: Reducer(), label: reducer}
    outcomes = compare(loaded, question, visuals, reducers, new_tokens=new_tokens, repeats=repeats)
    _report(question, target, table_rows(outcomes), [one.label for one in outcomes])
    _draw(loaded, visuals, outcomes, question, args.image)
    if args.json:
        facts = {"model": args.model, "question": question, "outcomes": [one.to_dict() for one in outcomes]}
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


def read_inputs(inputs: Sequence[str], scene: str | None) -> tuple[list, str, str | None]:
    """Images and videos, the question, and its right answer where a drawn scene brings both.

    Raises
    ------
    ValueError
        If there is no question, or an image cannot be read.
    """
    from eval.run.visuals import open_visual

    if scene is not None:
        seed = whole_number("scene", scene, least=0, most=SEEDS)
        if seed is None or len(inputs) > 1:
            raise ValueError(
                f"scene: got {scene!r} and {len(inputs)} arguments, expected a seed and at most a question"
            )
        return asked_scene(seed, *inputs)
    if len(inputs) < 2:
        given = f"only {inputs[0]!r}" if inputs else "nothing"
        raise ValueError(f'question: got {given}, expected IMAGE "QUESTION", or --scene SEED')
    *files, question = inputs
    if not question.strip() or os.path.isfile(question):
        raise ValueError(f"question: got {question!r} in the last place, expected a question")
    return [open_visual(file) for file in files], question, None


def asked_scene(seed: int, question: str | None = None) -> tuple[list, str, str | None]:
    """A drawn scene as an image, and a question about it with its answer, unless one is given."""
    from eval.mini.data import ask_scene
    from eval.mini.scenes import generate_scene, render

    scene = generate_scene(seed)
    if question is not None:
        return [render(scene)], question, None
    (own,) = ask_scene(scene, 1)
    return [render(scene)], own.text, own.answer


def read_reducer(model: str, method: str, retain: str | None) -> tuple[str, object]:
    """A reducer and its label, from a method's name or file and a budget.

    Raises
    ------
    ValueError
        If the method is unknown, or has no settings for the budget.
    """
    from eval.methods import method_at, read_method
    from mustdrop import load_reducer

    if Path(method).suffix in (".yaml", ".yml"):
        if retain is not None:
            raise ValueError(f"retain: got {retain} beside {method}, expected one of them: a file has its own budget")
        return Path(method).stem, load_reducer(read_method(method))
    budget = 64 if retain is None else share_of(retain) or needed_number("retain", retain)
    settings, _ = method_at(model, method, budget)
    return f"{method} {budget}", load_reducer(settings)


def _check_writable(file: Path | None) -> None:
    """Raise ValueError if a result could not be written, before anything is loaded."""
    if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
        raise ValueError(f"{str(file)!r}: expected a file in a folder that is there")


def _report(question: str, target: str | None, rows: list[list[str]], labels: list[str]) -> None:
    from tabulate import tabulate

    sys.stdout.write(f"question: {question}\n" + (f"right answer: {target}\n" if target else ""))
    sys.stdout.write(tabulate(rows, ["", *labels], disable_numparse=True) + "\n")


def _draw(loaded, visuals: Sequence, outcomes: Sequence, question: str, file: Path) -> None:
    """The drawing as a file, and in a terminal that shows colours."""
    from eval.ask.overlay import sheet, terminal

    baseline, *others = outcomes
    (method,) = others
    heading = f"{method.label}: {question!r} {method.answer!r} (baseline {baseline.answer!r})"
    drawn = sheet(loaded, visuals, method.trace, baseline.trace, heading)
    if drawn is None:
        sys.stdout.write("no drawing: this model does not tell where its vision tokens stand\n")
        return
    drawn.save(file)
    sys.stdout.write(f"drawn: {file}\n")
    if sys.stdout.isatty() and os.environ.get("COLORTERM") in SHOWS_COLOURS:
        sys.stdout.write(terminal(drawn, shutil.get_terminal_size().columns) + "\n")


if __name__ == "__main__":
    sys.exit(main())
