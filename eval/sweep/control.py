"""A sweep at work: hand out jobs, see what became of their cells, try failed ones once more."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from eval.run.cell import Cell
from eval.run.lock import ORPHANS
from eval.sweep.jobs import (
    CHANGED,
    FOLDER,
    CellsJob,
    Job,
    cancel_orphans,
    chunks,
    job_name,
    running_jobs,
    submit,
    without_interrupts,
)
from eval.sweep.launch import Launch
from eval.sweep.slurm import PAUSE, TRIES, Busy, slurm_queue
from eval.sweep.status import Board, Entry

ATTEMPTS = 2
SETTLE = 10.0
"""Seconds after a SLURM job's end within which its results may still appear on a network file system."""

LOCAL_PAUSE = 0.5
SLURM_PAUSES = (1.0, 15.0)
"""Seconds between looks, least and most; SLURM is asked the less often the longer nothing has happened."""


class Control:
    """Sees all waiting cells of a board through.

    Parameters
    ----------
    board : Board
        The cells.
    launch : Launch
        Resolved.
    command : sequence of str
        The command line, for the record.
    lock_file : pathlib.Path
        What ``eval.run.lock.lock`` returned; jobs on this machine end when the process that holds it does.
    """

    def __init__(self, board: Board, launch: Launch, command: Sequence[str], lock_file: Path):
        self.board, self.launch, self.command, self.lock_file = board, launch, list(command), lock_file.absolute()
        self.out = board.out.absolute()
        self.folder = self.out / FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        self.jobs: list[Job] = []
        self.waiting: deque[tuple[list[Cell], int]] = deque()
        self._ended: dict[str, float] = {}
        self._changed = time.monotonic()
        self._unheard = 0

    def take_up(self) -> None:
        """Take up the jobs that SLURM still has from an earlier sweep, and share out what is in none of them."""
        cancel_orphans(self.out)
        for job in running_jobs(self.out):
            if any(entry.state != "finished" for entry in self._entries(job)):
                self.jobs.append(job)
                self._given(job)
        cells = [entry.cell for entry in self.board.entries.values() if entry.state == "waiting"]
        self.waiting.extend((own, 1) for own in chunks(cells, self.launch))

    def submit(self) -> None:
        """Submit what can be submitted now: everything on SLURM, here as many jobs as there are free places.

        Where SLURM's controller is too slow to answer, the jobs stay in line for the next time.
        """
        if self._unheard:
            try:
                cancel_orphans(self.out, tries=1)
            except ValueError:
                return self._not_heard("launch: SLURM does not answer")
        while self.waiting:
            slots = set(range(self.launch.parallel or 0)) - {job.slot for job in self.jobs if job.where == "local"}
            if self.launch.where == "local" and not slots:
                return
            attempt = self.waiting[0][1]
            batch = [self.waiting.popleft()[0]]
            while self.launch.where == "slurm" and self.waiting and self.waiting[0][1] == attempt:
                batch.append(self.waiting.popleft()[0])
            try:
                with without_interrupts():
                    jobs = submit(
                        [self._task(cells) for cells in batch], self.launch, self.folder, attempt, min(slots, default=0)
                    )
                    self.jobs += jobs
            except Busy as error:
                self.waiting.extendleft((cells, attempt) for cells in reversed(batch))
                return self._not_heard(str(error))
            self._unheard = 0
            for job in jobs:
                self._given(job)
        return None

    def submit_all(self) -> None:
        """Submit everything, however long it takes SLURM to answer."""
        self.submit()
        while self.waiting:
            time.sleep(PAUSE)
            self.submit()

    def _not_heard(self, reason: str) -> None:
        """Try again later, but not for ever."""
        self._unheard += 1
        if self._unheard > TRIES:
            raise ValueError(reason)
        if self._unheard == 1:
            self.board.say(f"{reason}; trying again")

    def run(self) -> None:
        """Until every cell is finished or has failed for good; ValueError if SLURM refuses jobs or the code changes."""
        while self.waiting or self.jobs:
            self.submit()
            self.look()
            time.sleep(self._pause())

    def look(self) -> None:
        """Bring jobs and cells up to date."""
        queue = slurm_queue(job_name(self.out)) if any(job.where == "slurm" for job in self.jobs) else None
        for job in list(self.jobs):
            job.look(queue)
            self._update(job)

    def cancel(self) -> None:
        """End all jobs, those of SLURM included."""
        for job in self.jobs:
            job.cancel()
        until = time.monotonic() + ORPHANS
        while any(job.where == "local" and not job.handle.done() for job in self.jobs) and time.monotonic() < until:
            time.sleep(0.1)
        for job in self.jobs:
            for entry in self._entries(job):
                if entry.state != "finished":
                    self.board.set(entry, "waiting")

    def _task(self, cells: list[Cell]) -> CellsJob:
        lock_file = self.lock_file if self.launch.where == "local" else None
        keys = [cell.key for cell in cells]
        return CellsJob(cells, keys, self.out, self.command, self.launch.threads, lock=lock_file)

    def _entries(self, job: Job) -> list[Entry]:
        """The cells of a job that are this sweep's."""
        return [self.board.entries[key] for key in job.task.keys if key in self.board.entries]

    def _given(self, job: Job) -> None:
        for entry in self._entries(job):
            entry.job, entry.log = job.id, job.log
            if entry.state != "finished":
                self._set(entry, "queued")

    def _update(self, job: Job) -> None:
        notes = job.notes()
        unsettled = []
        for entry in self._entries(job):
            if entry.state == "finished" or entry.job != job.id:  # or it has been given to another job since
                continue
            if entry.finished():
                self._set(entry, "finished")
            elif notes["failed"].get(entry.key) == CHANGED:
                self.cancel()
                raise ValueError(CHANGED)
            elif entry.key in notes["failed"]:
                self._failed(entry, job, notes["failed"][entry.key])
            else:
                unsettled.append(entry)
                if job.state != "ended":
                    running = job.state == "running" and notes["running"] == entry.key
                    self._set(entry, "running" if running else "queued")
        if unsettled:
            if job.state != "ended":
                return
            ended = self._ended.setdefault(job.id, time.monotonic())
            if job.where == "slurm" and time.monotonic() < ended + SETTLE:
                return
        self.jobs.remove(job)  # at once when all is settled: closing down takes a process a while
        for entry in unsettled:
            self._failed(entry, job, job.last_words())

    def _failed(self, entry: Entry, job: Job, reason: str) -> None:
        """Try once more in a job of its own, so that whatever is wrong with the cell takes no other with it."""
        entry.job = None
        if job.attempt < ATTEMPTS:
            self.waiting.append(([entry.cell], job.attempt + 1))
            self._set(entry, "waiting", f"failed, once more: {reason}")
        else:
            self._set(entry, "failed", reason)

    def _set(self, entry: Entry, state: str, reason: str = "") -> None:
        if entry.state != state:
            self._changed = time.monotonic()
        self.board.set(entry, state, reason)

    def _pause(self) -> float:
        if any(job.where == "local" for job in self.jobs):
            return LOCAL_PAUSE
        if self._unheard:
            return PAUSE
        shortest, longest = SLURM_PAUSES
        return min(longest, max(shortest, (time.monotonic() - self._changed) / 10))
