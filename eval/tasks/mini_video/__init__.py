"""``mini_video``: synthetic clips of what moves, appears and blinks, in the form of the zero-shot video benchmarks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SPLIT = "test"
CLIPS = 200
SEED = 0


def write(folder: Path) -> None:
    """Write the benchmark's folder unless it is there; it appears whole or not at all."""
    if folder.is_dir():
        return
    from eval.mini.clips import write_benchmark

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    write_benchmark(temporary, SPLIT, CLIPS, SEED)
    try:
        temporary.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(temporary)
