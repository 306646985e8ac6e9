"""Cells as jobs of submitit: how many to a job, what a job does, and what the cluster says about it."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from eval.provenance import digest
from eval.run.cell import Cell, write_json
from eval.run.records import BadRecord, read_json
from eval.sweep import slurm
from eval.sweep.launch import Launch, visible_gpus

FOLDER = "jobs"
LIST = "_cells.json"
"""What the list of a SLURM job's cells is called, after its id."""

CHANGED = "the code, the model, the task or a package has changed since the sweep began; start it again"


def chunks(cells: Sequence[Cell], launch: Launch) -> list[list[Cell]]:
    """Share cells out into jobs; the cells of a job have one model.

    Here, jobs become smaller towards the end: a long one costs the fewest starts, short ones let all workers finish at
    about the same time.
    """
    by_model = [list(own) for _, own in groupby(cells, key=lambda cell: cell.model)]
    if launch.cells_per_job is None and launch.where == "slurm":
        groups: dict[tuple, list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.model, cell.method), []).append(cell)
        return list(groups.values())
    found, left = [], len(cells)
    for own in by_model:
        while own:
            size = launch.cells_per_job or _share(left, launch.parallel)
            found.append(own[:size])
            own, left = own[size:], left - len(own[:size])
    return found


def _share(left: int, workers: int) -> int:
    """Cells of the next job: all of them for one worker, else half of what would be this worker's part, but not one."""
    if workers == 1:
        return left
    return max(math.ceil(left / (2 * workers)), min(2, math.ceil(left / workers)))


@dataclass
class CellsJob:
    """What a job runs: its cells one after the other, whatever becomes of each.

    Attributes
    ----------
    cells, keys : list
        What to do, and the keys under which the sweep will look for the results.
    out : pathlib.Path
        Results folder, absolute.
    command : list of str
        The sweep's command line, for the record.
    threads : int or None
        Of torch.
    environment : dict
        Variables to set before torch starts.
    lock : pathlib.Path or None
        Lock file of the sweep this job ends with; None if it may outlive it.
    """

    cells: list[Cell]
    keys: list[str]
    out: Path
    command: list[str]
    threads: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    lock: Path | None = None

    def __call__(self) -> None:
        """Run; called by submitit in the job's process."""
        import submitit

        os.environ.update(self.environment)
        if self.lock is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            threading.Thread(target=_end_with, args=(self.lock,), daemon=True).start()
        if self.threads:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
            import torch

            torch.set_num_threads(self.threads)
        notes = Notes(submitit.JobEnvironment().paths.stdout)
        run_cells(dict(zip(self.keys, self.cells, strict=True)), self.out, self.command, notes)

    def checkpoint(self):
        """Called by submitit when the job's time is over: go on later."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Notes:
    """What a job says about itself while it runs, in a file beside its log: the cell it is at, and why cells failed."""

    def __init__(self, log: Path):
        self.file, self.running, self.failed = log.with_suffix(".json"), None, {}

    def write(self) -> None:
        write_json(self.file, {"running": self.running, "failed": self.failed})

    @staticmethod
    def read(log: Path) -> dict:
        """The latest notes, empty if there are none yet."""
        try:
            notes = read_json(log.with_suffix(".json"))
        except BadRecord:
            notes = {}
        failed = notes.get("failed") if isinstance(notes.get("failed"), dict) else {}
        return {"running": notes.get("running"), "failed": {key: str(reason) for key, reason in failed.items()}}


def run_cells(cells: dict[str, Cell], out: Path, command: Sequence[str], notes: Notes) -> None:
    """Evaluate cells, given by the keys they are expected to have; one that fails does not stop the others.

    If what a key stands for has changed, none is evaluated: nobody would look for the results.
    """
    from submitit.core.utils import UncompletedJobError

    from eval.run.runner import evaluate

    if any(cell.key != key for key, cell in cells.items()):
        notes.failed = dict.fromkeys(cells, CHANGED)
        notes.write()
        return
    waiting = list(cells)
    while waiting:
        notes.running = waiting[0]
        notes.write()
        try:
            for _ in evaluate([cells[key] for key in waiting], out, command=command):
                waiting.pop(0)
                notes.running = waiting[0] if waiting else None
                notes.write()
        except UncompletedJobError:  # submitit interrupts a job that has been out of time too often
            raise
        except Exception as error:
            failed = waiting.pop(0)
            notes.failed[failed] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            logging.getLogger(__name__).exception("%s %s failed", cells[failed].task, cells[failed].label)
    notes.running = None
    notes.write()


def _end_with(lock: Path) -> None:
    """End this process when the sweep that holds the lock does; until the end it keeps the next sweep from starting."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            return
        os._exit(1)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end; processes started inside never get it: the sweep decides what becomes of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def job_name(out: Path) -> str:
    """What all SLURM jobs of a results folder are called, by which a later sweep finds them again."""
    return f"mustdrop-{digest(str(out.resolve()))}"


class Job:
    """A job that has been submitted.

    Attributes
    ----------
    task : CellsJob or Listed
        What it runs, by its ``keys``.
    where : {"local", "slurm"}
    attempt : int
        1, or 2 where its cells had failed before; 0 if it does not count.
    id : str
        Process id or SLURM's id.
    state : {"queued", "running", "ended"}
        As last seen.
    """

    def __init__(self, handle, task: CellsJob | Listed, where: str, attempt: int = 1, slot: int = 0):
        self.handle, self.task, self.where, self.attempt, self.slot = handle, task, where, attempt, slot
        self.id = handle.job_id
        self.state = "queued" if where == "slurm" else "running"

    @property
    def log(self) -> Path:
        """All the job wrote to its terminal."""
        return self.handle.paths.stdout

    def notes(self) -> dict:
        """See `Notes`."""
        return Notes.read(self.log)

    def look(self, queue: dict[str, str] | None) -> None:
        """Bring ``state`` up to date.

        SLURM's accounting is not asked, because not every cluster has one: a job that has left the queue has ended.

        Parameters
        ----------
        queue : dict or None
            What `slurm_queue` found.
        """
        if self.where == "local":
            self.state = "ended" if self.handle.done() else "running"
        elif queue is not None:
            state = queue.get(self.id)
            self.state = "ended" if state is None else "queued" if state == "PENDING" else "running"

    def cancel(self) -> None:
        """Ask it to end."""
        if self.where == "slurm":
            if not slurm.scancel(self.id):
                print(f"SLURM job {self.id} could not be cancelled; scancel {self.id}", file=sys.stderr)
        elif not self.handle.done():
            os.kill(int(self.id), signal.SIGTERM)

    def last_words(self) -> str:
        """The last line of its log, for a job that could not say why it ended."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "the job ended before it wrote a log"
        return next((line.strip() for line in reversed(lines) if line.strip()), "the job ended with an empty log")


def running_jobs(out: Path, tries: int | None = None) -> list[Job]:
    """Jobs of an earlier sweep into the same folder that SLURM has not finished.

    Only the queue and our own lists of cells are asked: what else lies in the folder is not trusted.
    """
    if not any((out / FOLDER).glob("*/*submission*.sh")):
        return []  # no job of this folder was ever given to SLURM
    from submitit import SlurmJob

    found = []
    for number, state in slurm.queue_at_last(job_name(out), tries).items():
        file = next((out / FOLDER).glob(f"*/{number}{LIST}"), None) if slurm.JOB_ID.fullmatch(number) else None
        attempt = 0 if state == "COMPLETING" else 1  # that one was cancelled: it does not count
        handle = SlurmJob(out / FOLDER if file is None else file.parent, number)
        found.append(Job(handle, Listed(_listed(file)), "slurm", attempt))
    return found


@dataclass
class Listed:
    """What is known of a job of an earlier sweep: the keys of its cells; none if the sweep ended before it said so."""

    keys: list[str]


def _listed(file: Path | None) -> list[str]:
    try:
        keys = read_json(file).get("keys") if file else []
    except BadRecord:
        keys = []
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


def gpus_of(slot: int, each: int, gpus: Sequence[str]) -> list[str]:
    """GPUs of the job in a place; more jobs than there are GPUs for share them."""
    return [gpus[(slot * each + number) % len(gpus)] for number in range(each)]


def submit(tasks: Sequence[CellsJob], launch: Launch, folder: Path, attempt: int, slot: int = 0) -> list[Job]:
    """Hand jobs to submitit; several for SLURM become one array.

    Parameters
    ----------
    tasks : sequence of CellsJob
        One per job.
    launch : Launch
        Resolved.
    folder : pathlib.Path
        Where submitit keeps what it needs, and the logs.
    attempt : int
        See `Job`.
    slot : int
        Which of the ``parallel`` places here a local job takes.

    Raises
    ------
    ValueError
        If SLURM does not take them.
    """
    import submitit

    executor = submitit.AutoExecutor(folder, cluster=launch.where)
    executor.update_parameters(timeout_min=launch.time, stderr_to_stdout=True)
    if launch.where == "slurm":
        executor.update_parameters(
            name=job_name(tasks[0].out),
            cpus_per_task=launch.cpus,
            gpus_per_node=launch.gpus or None,
            mem_gb=launch.memory,
            slurm_partition=launch.partition,
            slurm_array_parallelism=launch.parallel,
            slurm_setup=launch.setup or None,
            slurm_additional_parameters=dict(launch.sbatch) or None,
        )
    else:
        for task in tasks:
            task.environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(slot, launch.gpus, visible_gpus()))
    handles = _to_slurm(executor, tasks) if launch.where == "slurm" else executor.submit_array(tasks)
    return [Job(handle, task, launch.where, attempt, slot) for handle, task in zip(handles, tasks, strict=True)]


def _to_slurm(executor, tasks: Sequence[CellsJob]) -> list:
    """Give jobs to SLURM and write down which cells each has, for whoever takes them up.

    Raises
    ------
    eval.sweep.slurm.Busy
        If the controller was too slow to say whether it has them. Those it has are in no list: see `cancel_orphans`.
    ValueError
        If it does not take them.
    """
    from submitit.core.utils import FailedJobError

    try:
        handles = executor.submit_array(tasks)
    except FailedJobError as error:
        reason = " ".join(str(error).split())
        kind = slurm.Busy if any(sign in reason.lower() for sign in slurm.BUSY) else ValueError
        raise kind(f"launch: SLURM refuses the jobs: {reason}") from None
    for handle, task in zip(handles, tasks, strict=True):
        write_json(handle.paths.folder / f"{handle.job_id}{LIST}", {"keys": task.keys})
    return handles


def cancel_orphans(out: Path, tries: int | None = None) -> None:
    """Cancel jobs of which nobody has written down the cells: they were given to SLURM, and nobody heard of it.

    Such a job would wait for its cells in vain. ValueError if SLURM does not answer.
    """
    for job in running_jobs(out, tries):
        if not job.task.keys:
            job.cancel()
