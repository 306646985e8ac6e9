"""Several DeepSpeed runs in one process, one after the other, as `python deepspeed_runs.py RUNS.json`: a list of
argument lists for the trainer.

The shared-memory kernels of DeepSpeed on CPUs take minutes to compile and one process does not need them.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from llava.train.train import main


def one_process() -> dict[str, str]:
    """The environment that a launcher would set for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**place, "MASTER_PORT": str(port)}


if __name__ == "__main__":
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(one_process())
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        if status := main(arguments):
            sys.exit(status)
        AcceleratorState._reset_state(reset_partial_state=True)
