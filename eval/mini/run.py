"""Command line of the mini stages: ``mustdrop mini-train STAGE --work FOLDER``, alone or under torchrun.

Every stage goes on where its checkpoint in the work folder stands, and does nothing if it is complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from eval.mini.clip_training import tune_clips
from eval.mini.endtoend import align_projector, tune
from eval.mini.export import export, export_clips
from eval.mini.language import pretrain_language
from eval.mini.optim import training_device
from eval.mini.vision import pretrain_vision
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)

LLAVA_MINI = Path("checkpoints/llava-mini")
STAGES = ("vision", "language", "align", "tune", "choices", "export", "clips", "export_clips")


def run_stage(options: argparse.Namespace) -> Path:
    """Run one stage; returns what it wrote."""
    files = {stage: options.work / f"{stage}.pt" for stage in STAGES}
    steps = {} if options.lr is None else {"lr": options.lr}
    if options.stage == "vision":
        return pretrain_vision(files["vision"], options.phases, seed=options.seed, **steps)
    if options.stage == "language":
        return pretrain_language(
            files["language"], options.phases, questions_per_step=options.questions, seed=options.seed, **steps
        )
    if options.stage == "align":
        if files["align"].exists():
            return files["align"]
        return align_projector(
            files["vision"], files["language"], files["align"], steps=int(options.phases), seed=options.seed, **steps
        )
    if options.stage in ("tune", "choices"):
        with_options = options.stage == "choices"
        return tune(
            options.init or files["tune" if with_options else "align"],
            files[options.stage],
            options.phases,
            questions_per_step=options.questions,
            choices=options.choices if with_options else 0.0,
            seed=options.seed + with_options,
            **steps,
        )
    if options.stage == "clips":
        return tune_clips(options.init or LLAVA_MINI, files["clips"], options.phases, seed=options.seed, **steps)
    if options.stage == "export_clips":
        return export_clips(files["clips"], options.output, options.init or LLAVA_MINI)
    return export(files["choices"], options.output)


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line; start torch.distributed if launched by torchrun; returns the exit status."""
    parser = Parser("mini-train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' checkpoints")
    parser.add_argument("--output", type=Path, help="export, export_clips: folder of the finished checkpoint")
    parser.add_argument(
        "--phases",
        default="",
        help="GRID:STEPS,...; align: the number of steps; clips: PATCHES:STEPS,... (see clip_training.BATCH)",
    )
    parser.add_argument("--questions", type=int, default=96, help="questions per step and process")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument(
        "--init",
        type=Path,
        help="tune, choices: checkpoint or exported folder to begin with; clips: exported folder (llava-mini)",
    )
    parser.add_argument("--choices", type=float, default=0.4, help="choices: share of questions with options")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    exports = options.stage in ("export", "export_clips")
    if exports and options.output is None:
        parser.error(f"{options.stage} needs --output")
    if not exports and not options.phases:
        parser.error(f"{options.stage} needs --phases")
    if options.init is not None and not options.init.exists():
        parser.error(f"init: {options.init} does not exist, expected a stage's checkpoint or an exported folder")
    if not 0 <= options.choices <= 1:
        parser.error(f"choices: got {options.choices}, expected a share from 0 to 1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if "RANK" in os.environ:
        device = training_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    log.info("%s: wrote %s", options.stage, run_stage(options))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
