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
    "run": ("eval.run", "evaluate a method at several budgets on some benchmarks"),
    "sweep": ("eval.sweep.__main__", "evaluate models x tasks x methods x budgets from a YAML file, here or on SLURM"),
    "calibrate": ("eval.calibrate", "find the settings that keep a wanted number of tokens"),
    "calibrate-heads": ("eval.calibrate_heads", "find the attention heads that YOPO keeps active for vision tokens"),
    "judge": ("eval.judge", "have a language model score answers to video questions"),
    "table": ("eval.table", "results beside published figures, as terminal, Markdown, LaTeX or CSV table"),
    "plots": ("eval.plots", "accuracy against tokens, FLOPs and time, as PNG and SVG"),
    "significance": ("eval.significance", "paired comparison of methods on the same questions"),
    "report": ("eval.report", "one HTML file with tables, plots, settings and pictures of what was kept"),
    "bench": ("eval.bench_speed", "time, memory and their floors, for any model's shape"),
    "cost": ("mustdrop.cost", "FLOPs and cache of a model at given token counts"),
}


@command
def main(argv: list[str] | None = None) -> int:
    """Run ``mustdrop COMMAND ...``; returns the command's exit status, 2 for an unknown command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: mustdrop COMMAND [--help] ...\n\ncommands:")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:<16}{purpose}")
        return 0
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ValueError(f"command: got {shown(argv[0])}{hint(argv[0], COMMANDS)}, expected one of {known}")
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
