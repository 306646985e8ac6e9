"""What SLURM is asked and told, with patience for a controller that is slow."""

from __future__ import annotations

import re
import subprocess
import time

JOB_ID = re.compile(r"\d+(_\d+)?")
TRIES, PAUSE = 20, 15.0
"""How often a controller that does not answer is asked, and seconds in between."""

BUSY = ("timed out", "unable to contact", "communication", "connection", "zero bytes", "temporarily")
"""What sbatch says where the controller is too slow, and not the job wrong."""


class Busy(ValueError):
    """SLURM's controller was too slow to say what it has done."""


def slurm_queue(name: str) -> dict[str, str] | None:
    """States of the SLURM jobs of a name that have not ended, by id; None if SLURM does not answer."""
    command = ["squeue", "--array", "--noheader", "--format", "%i %T", "--name", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = (line.split() for line in done.stdout.splitlines())
    return {words[0]: words[1] for words in found if len(words) == 2} if done.returncode == 0 else None


def queue_at_last(name: str, tries: int | None = None) -> dict[str, str]:
    """What `slurm_queue` finds as soon as SLURM answers; a controller may be busy for minutes.

    Raises
    ------
    ValueError
        If it does not in many tries (`TRIES`).
    """
    for number in range(tries or TRIES):
        if number:
            time.sleep(PAUSE)
        if (queue := slurm_queue(name)) is not None:
            return queue
    raise ValueError("launch: SLURM does not answer squeue; its jobs go on, so give the same command again later")


def scancel(number: str) -> bool:
    """Ask SLURM to end a job; whether it heard."""
    for attempt in range(3):
        if attempt:
            time.sleep(PAUSE)
        try:
            if subprocess.run(["scancel", number], capture_output=True, timeout=60).returncode == 0:
                return True
        except (OSError, subprocess.TimeoutExpired):
            continue
    return False
