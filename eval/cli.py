"""The command ``mustdrop``: everything that can be run, under one name.

mustdrop calibrate --help
"""

from __future__ import annotations

import importlib
import sys

from mustdrop.checks import hint, shown
from mustdrop.command import command

COMMANDS = {
    "ask": ("eval.ask.command", "one question to the baseline and a method: answers, costs, and what was kept, drawn"),
    "chat": ("llava.serve.cli", "chat about images in the terminal, with fewer vision tokens if wanted"),
    "demo": ("eval.ask.demo", "a page to try methods on, with gradio"),
    "run": ("eval.run.command", "evaluate a method at several budgets on some benchmarks"),
    "sweep": ("eval.sweep.command", "evaluate models x tasks x methods x budgets from a YAML file, here or on SLURM"),
    "calibrate": ("eval.calibrate.thresholds", "find the settings that keep a wanted number of tokens"),
    "calibrate-heads": ("eval.calibrate.heads", "find the attention heads that YOPO keeps active for vision tokens"),
    "judge": ("eval.run.judge", "have a language model score answers to video questions"),
    "table": ("eval.report.table", "results beside published figures, as terminal, Markdown, LaTeX or CSV table"),
    "plots": ("eval.report.plots", "accuracy against tokens, FLOPs and time, as PNG and SVG"),
    "significance": ("eval.report.significance", "paired comparison of methods on the same questions"),
    "report": ("eval.report.html", "one HTML file with tables, plots, settings and images of what was kept"),
    "docs": ("eval.report.docs", "render the tables of README.md and docs/ from docs/data"),
    "bench": ("eval.bench.speed", "time, memory and their floors, for any model's shape"),
    "bench-padding": ("eval.bench.padding", "what a batch pads where each image keeps another number of tokens"),
    "cost": ("mustdrop.cost", "FLOPs and cache of a model at given token counts"),
    "tasks": ("eval.tasks.__main__", "make a synthetic benchmark for lmms-eval"),
    "mini-train": ("eval.mini.run", "train the embedded model, stage by stage"),
    "mini-tiles": ("eval.mini.tiles", "train the embedded model on images in tiles"),
    "mini-evaluate": ("eval.mini.evaluate", "accuracy of an embedded model on held-out scenes"),
    "mini-tiles-evaluate": ("eval.mini.tiles_evaluate", "the same for images in tiles"),
    "mini-clips": ("eval.mini.clips", "write synthetic clips with questions"),
    "mini-clips-evaluate": ("eval.mini.clip_evaluate", "accuracy of an embedded model on held-out clips"),
}
"""Name -> the module whose `main(argv)` runs it, and what it does."""

USAGE = "usage: mustdrop COMMAND [--help] ...\n\ncommands:\n" + "".join(
    f"  {name:<21}{purpose}\n" for name, (_, purpose) in COMMANDS.items()
)


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``mustdrop COMMAND ...``; returns the command's exit status, 2 for an unknown command."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"command: got {shown(name)}{hint(name, COMMANDS)}, expected one of {', '.join(COMMANDS)}")
    return importlib.import_module(COMMANDS[name][0]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
