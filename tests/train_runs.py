"""Training runs of one or several processes, as ``python train_runs.py RUNS.json``, one after the other.

The file holds a list of ``{"processes": count, "arguments": [...]}``. Modules are imported once, then every process is
forked. DeepSpeed's shared-memory kernels for CPUs are left out: they take minutes to compile, and gloo does without.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch

from llava.train.train import main


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_one(rank: int, processes: int, port: str, arguments: list[str]) -> None:
    """One process, in the environment that a launcher would set."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.exit(main(arguments))


def run_all(file: Path) -> int:
    """Status of the first process that fails, 0 if none does."""
    torch.set_num_threads(1)
    runs = json.loads(file.read_text())
    if any("--deepspeed" in run["arguments"] for run in runs):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    fork = multiprocessing.get_context("fork")
    for run in runs:
        count, port = run["processes"], free_port()
        jobs = [fork.Process(target=run_one, args=(rank, count, port, run["arguments"])) for rank in range(count)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        if status := next((job.exitcode for job in jobs if job.exitcode), 0):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
