"""One sweep or run at a time in a results folder."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from eval.provenance import naming_file

LOCK = "sweep.lock"
ORPHANS = 5.0
"""Seconds that the jobs of a killed sweep are given to notice."""


def lock(out: Path, stack: ExitStack) -> Path:
    """Keep other sweeps and runs out of a folder until the stack is closed or the process ends, however it ends.

    Returns
    -------
    pathlib.Path
        The lock file.

    Raises
    ------
    ValueError
        If another sweep or run has the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    file = stack.enter_context(open(path, "a+", encoding="utf-8", opener=_no_link))  # noqa: SIM115, the stack closes it
    until = time.monotonic() + ORPHANS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                owner = path.read_text(encoding="utf-8", errors="replace").strip()[:100]
                raise ValueError(
                    f"OUT: another sweep or run is at work in {str(out)!r} ({owner}); wait, or choose another OUT"
                ) from None
            time.sleep(0.2)
        except OSError:  # unguarded is better than not at all
            print(f"note: the file system of {str(out)!r} has no locks: start nothing else there", file=sys.stderr)
            break
    with naming_file(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return path


def _no_link(path: str, flags: int) -> int:
    """Open a file, but not through a link, which may lead out of the results folder: the file is emptied."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
