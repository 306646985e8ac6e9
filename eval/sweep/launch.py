"""Where a sweep's jobs run and what each is given: the ``launch`` part of its file."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from mustdrop.checks import hint, shown
from mustdrop.command import LARGEST

PLACES = ("local", "slurm")
WEEK = 7 * 24 * 60


@dataclass(frozen=True)
class Launch:
    """Resources of a sweep.

    Attributes
    ----------
    where : {"local", "slurm"}
        On this machine or on a cluster, through submitit in both cases.
    partition : str, optional
        SLURM's.
    gpus : int, optional
        GPUs per job. By default one where this machine has any, none on SLURM.
    cpus : int, optional
        Cores per job, on SLURM.
    memory : int or float, optional
        GB per job, on SLURM; 0 for all that a node has.
    time : int, optional
        Minutes per job. A SLURM job that runs out of time goes back to the queue up to three times and goes on where it
        stopped. By default 240 on SLURM, and a week here.
    parallel : int, optional
        Jobs at once. By default, here, one per core (the embedded model), one per share of the GPUs, or one; as many as
        SLURM lets run.
    cells_per_job : int, optional
        By default, here, as few jobs as keep all cores or GPUs busy to the end; on SLURM one per model and method.
    threads : int, optional
        Threads per job. By default, here, one for the embedded model, else cores divided by ``parallel``; on SLURM
        ``cpus``.
    setup : list of str
        Shell lines before a SLURM job begins.
    sbatch : dict
        More options of sbatch, such as ``{account: ours}``.
    """

    where: str = "local"
    partition: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory: float | None = None
    time: int | None = None
    parallel: int | None = None
    cells_per_job: int | None = None
    threads: int | None = None
    setup: list[str] = field(default_factory=list)
    sbatch: dict = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping, where: str | None = None) -> Launch:
        """Settings from a YAML mapping; ValueError with one line that says which is wrong and what would be right."""
        names = [one.name for one in fields(cls)]
        for key, value in given.items():
            if key not in names:
                raise ValueError(f"unknown key {shown(key)}{hint(key, names)}; it has {', '.join(names)}")
            right = _wrong(key, value)
            if right:
                raise ValueError(f"{key}: got {shown(value)}, expected {right}")
        return cls(**{**given, **({"where": where} if where else {})})

    def check_here(self) -> None:
        """Raise ValueError if jobs cannot be launched from this machine."""
        if importlib.util.find_spec("submitit") is None or importlib.util.find_spec("rich") is None:
            raise ValueError("submitit and rich are needed to launch jobs; install them with: pip install '.[cluster]'")
        if self.where == "slurm" and not all(map(shutil.which, ("sbatch", "squeue", "srun"))):
            raise ValueError("where: got 'slurm', but this machine has no sbatch, squeue and srun; --where local")
        if self.where == "local" and (self.gpus or 0) > len(visible_gpus()):
            raise ValueError(f"gpus: got {self.gpus}, but this machine has {len(visible_gpus())}")

    def resolved(self, embedded: bool, device: str | None = None) -> Launch:
        """The same with this machine's defaults filled in, where it is here that jobs run.

        Parameters
        ----------
        embedded : bool
            Whether all models are the embedded one: it is so small that one thread per process is fastest.
        device : str, optional
            What the cells ask for.
        """
        if self.where == "slurm":
            return replace(self, gpus=self.gpus or 0, time=self.time or 240, threads=self.threads or self.cpus)
        cores, found = cpu_cores(), len(visible_gpus()) if device in (None, "cuda") else 0
        gpus = min(found, 1) if self.gpus is None else self.gpus
        parallel = self.parallel or (max(1, found // gpus) if gpus else cores if embedded else 1)
        threads = self.threads or (1 if embedded else max(1, cores // parallel))
        return replace(self, gpus=gpus, parallel=parallel, threads=threads, time=self.time or WEEK)


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """GPUs this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def _wrong(key: str, value: object) -> str | None:
    """What would be right for a key whose value is not; None for what is left out, and for what fits."""
    if key == "where":
        return None if value in PLACES else "local or slurm"
    if key == "setup":
        fits = isinstance(value, list) and all(isinstance(line, str) for line in value)
        return None if fits else "a list of shell lines"
    if key == "sbatch":
        plain = isinstance(value, Mapping) and all(type(one) in (str, int, bool) for one in value.values())
        return None if plain else "a mapping of sbatch's options such as {account: ours}"
    if value is None:
        return None
    if key == "partition":
        return None if isinstance(value, str) and value.strip() else "a partition's name"
    number = isinstance(value, (int, float) if key == "memory" else int) and not isinstance(value, bool)
    least = 0 if key in ("gpus", "memory") else 1
    unit = {"memory": "number of GB", "time": "whole number of minutes"}.get(key, "whole number")
    return None if number and least <= value <= LARGEST else f"a {unit} of {least} or more, {LARGEST} at most"
