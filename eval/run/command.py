"""Evaluate the untouched model and a method at several budgets, through lmms-eval.

    mustdrop run --task gqa --model checkpoints/llava-mini --retain 192 128 64

The model is loaded once. Every finished row is kept under the results folder and not computed again as long as nothing
that can change it has changed; a row that was interrupted goes on where it stopped. At the end, summary.json and
summary.md hold the table that is also printed. Several GPUs: accelerate launch -m mustdrop_command run ...
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from eval import checkpoints
from eval.methods import CONFIGS, file_at
from eval.report import summary
from eval.run import settings
from eval.run.cell import Cell
from eval.run.lock import lock
from mustdrop.command import Parser, command, path, text


def parser() -> argparse.ArgumentParser:
    """The command line; defaults come from the environment variables that the scripts document."""
    environment = os.environ.get
    new = Parser(
        "run",
        description=__doc__,
        epilog="Names in capitals may be set in the environment: MODEL, MODEL_BASE, LIMIT, RETAIN, OUT, BATCH_SIZE.",
    )
    new.add_argument(
        "--task",
        nargs="+",
        default=["gqa"],
        help="gqa, pope, mme, ... as the paper's tables name them (the embedded model gets the synthetic task that "
        "mirrors each), a synthetic task such as mini_pope, or mini for all of these (default: gqa)",
    )
    new.add_argument(
        "--model",
        metavar="MODEL",
        type=text,
        default=environment("MODEL") or checkpoints.EMBEDDED,
        help="folder or hub id of a LLaVA checkpoint, such as liuhaotian/llava-v1.5-7b (default: %(default)s)",
    )
    checkpoints.add_options(new)
    new.add_argument(
        "--retain",
        metavar="RETAIN",
        nargs="+",
        default=environment("RETAIN") or "192 128 64",
        help="average numbers of vision tokens to keep, from configs/methods/[MODEL/]METHOD.yaml, which mustdrop "
        "calibrate fills, else as the method itself derives its settings (default: 192 128 64)",
    )
    new.add_argument("--method", default="mustdrop", help="method to compare with the untouched model (%(default)s)")
    new.add_argument(
        "--configs", type=path, default=CONFIGS, help="folder of the methods' YAML files (configs/methods)"
    )
    new.add_argument(
        "--limit",
        metavar="LIMIT",
        type=text,
        default=environment("LIMIT") or None,
        help="only the first LIMIT questions",
    )
    new.add_argument(
        "--out",
        metavar="OUT",
        type=text,
        default=environment("OUT") or None,
        help="results folder (default: results/TASK-MODEL[-limitN])",
    )
    new.add_argument(
        "--batch-size",
        metavar="BATCH_SIZE",
        type=text,
        default=environment("BATCH_SIZE") or None,
        help=f"questions per batch (default: {settings.DEFAULT_BATCH_SIZE}; 1 gives the latency of a single question)",
    )
    new.add_argument("--device", type=text, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    new.add_argument("--device-map", help="auto spreads a large model over several GPUs")
    new.add_argument(
        "--dtype", default="auto", help="auto (float16 on a GPU, float32 on a CPU), float32, float16, bfloat16"
    )
    new.add_argument("--attn-implementation", default="sdpa", help="sdpa, eager or flash_attention_2 (%(default)s)")
    new.add_argument("--conv-template", default="vicuna_v1", help="conversation template (%(default)s)")
    new.add_argument("--seed", default=0, help="of everything random (%(default)s)")
    new.add_argument(
        "--skip-unfit",
        action="store_true",
        help="skip and count questions that cannot be asked, such as one whose image cannot be read; their answers are "
        "empty and count as wrong (default: the first one ends the run)",
    )
    new.add_argument("--force", action="store_true", help="compute finished rows again")
    new.add_argument("--verbose", action="store_true", help="show what lmms-eval logs")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    cells = [replace(cell, skip_unfit=args.skip_unfit) for cell in settings.cells(args)]
    out = settings.check_out(Path(args.out) if args.out else default_out(cells))
    check_reach(cells)
    left = [cell for cell in cells if args.force or not cell.finished(out)]
    for cell in left:
        cell.check_place(out)
    check_data(cell.task for cell in left)
    with ExitStack() as stack:
        if _rank() == 0:
            lock(out, stack)
        _tell(cells, left, out, args)
        try:
            _evaluate(cells if left else [], out, argv, args.force, args.verbose)
        except KeyboardInterrupt:
            _say("\ninterrupted; the same command goes on from here")
            return 130
        if _rank() == 0:
            print(summary.write(out, [(cell, cell.file(out)) for cell in cells]))
    return 0


def _tell(cells: Sequence[Cell], left: Sequence[Cell], out: Path, args: argparse.Namespace) -> None:
    """What is about to be done, and what of it is there."""
    note_borrowed(cells, args.configs)
    _say(f"{cells[0].model}: {len(cells)} rows, results in {out}")
    for cell in cells:
        if cell not in left:
            _say(f"{cell.task} {cell.label}: finished earlier")
        elif not args.force and (defect := cell.defect(out)):
            _say(f"note: {defect}; it is computed again")


def default_out(cells: Sequence[Cell]) -> Path:
    """``results/TASK-MODEL``, with the limit where there is one."""
    tasks = "-".join(dict.fromkeys(cell.task for cell in cells))
    limit = cells[0].limit
    return Path("results") / (f"{tasks}-{cells[0].model_name}" + (f"-limit{limit}" if limit else ""))


def check_reach(cells: Sequence[Cell]) -> None:
    """Raise ValueError if a method cannot keep the wanted number of tokens on its model, before that is loaded."""
    from eval.sweep.methods import Method, out_of_reach
    from eval.tasks import TASKS

    for cell in {(cell.label, TASKS[cell.task].views): cell for cell in cells if cell.settings}.values():
        method = Method(cell.method, cell.retain, cell.settings)
        if reason := out_of_reach(method, cell.model, cell.model_base, TASKS[cell.task].views):
            raise ValueError(f"RETAIN: {reason}")


def check_data(tasks: Iterable[str]) -> None:
    """Raise ValueError if a task's data cannot be had, before a model is loaded."""
    from eval.tasks import is_local

    for task in dict.fromkeys(tasks):
        if not is_local(task):
            from eval.tasks import stock

            stock.check(task)


def note_borrowed(cells: Sequence[Cell], configs: Path) -> None:
    """Say so if thresholds were not found for this model: they may keep another number of tokens."""
    borrowed = {
        str(cell.retain): None
        for cell in cells
        if cell.retain is not None and "retain" not in cell.settings
        if file_at(configs / Path(cell.model).name, cell.method, cell.retain) is None
    }
    if borrowed:
        base = f" --model-base {cells[0].model_base}" if cells[0].model_base else ""
        _say(
            f"note: {', '.join(borrowed)} tokens: settings published for LLaVA-1.5-7B; here they may keep more or "
            f"fewer. For your own: mustdrop calibrate --model {cells[0].model}{base}"
        )


def _evaluate(cells: Sequence[Cell], out: Path, argv: Sequence[str], force: bool, verbose: bool) -> None:
    """Compute what is not finished; the summary on disk follows along."""
    if not cells:
        return
    from eval.run.runner import evaluate

    done = []
    for cell, _ in evaluate(cells, out, command=["run", *argv], force=force, verbose=verbose):
        done.append((cell, cell.file(out)))
        summary.write(out, done)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
