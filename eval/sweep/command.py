"""Run a sweep: every method at every budget on every task, in jobs on this machine or on a SLURM cluster.

    mustdrop sweep configs/sweeps/table1_mini.yaml

Finished cells are skipped, interrupted ones go on where they stopped, failed ones are tried once more: give the same
command again after whatever went wrong. Ctrl-C cancels the jobs, SLURM's too; a sweep that is killed, or whose terminal
is closed, leaves SLURM's jobs running, and the same command takes them up again. Exit status: 0 all cells are finished,
1 some failed, 2 a wrong argument or file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

from tabulate import tabulate

from eval import checkpoints, provenance
from eval.progress import progress
from eval.report import summary
from eval.run.command import check_data
from eval.run.lock import lock
from eval.run.settings import check_out
from eval.sweep.jobs import chunks, running_jobs
from eval.sweep.launch import PLACES, Launch, cpu_cores
from eval.sweep.plan import Plan, read
from eval.sweep.status import Board
from eval.tasks import is_local
from mustdrop.command import Parser, command, path, text, whole_number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser(
        "sweep",
        description=__doc__,
        epilog="MODEL, MODEL_BASE, LIMIT and OUT may also be set in the environment.",
    )
    new.add_argument("file", type=path, help="the sweep, such as configs/sweeps/table1_mini.yaml")
    new.add_argument("--dry-run", action="store_true", help="list the cells and run nothing")
    new.add_argument("--where", choices=PLACES, help="this machine or a SLURM cluster (default: as the file says)")
    new.add_argument(
        "--out",
        metavar="OUT",
        type=text,
        default=os.environ.get("OUT") or None,
        help="default: results/ and the file's name",
    )
    new.add_argument(
        "--limit",
        metavar="LIMIT",
        type=text,
        default=os.environ.get("LIMIT") or None,
        help="only the first LIMIT questions of every task",
    )
    new.add_argument(
        "--model",
        metavar="MODEL",
        type=text,
        default=os.environ.get("MODEL") or None,
        help="a checkpoint instead of the file's models",
    )
    checkpoints.add_options(new)
    new.add_argument("--parallel", metavar="N", type=text, help="jobs at once (default: as the file says)")
    new.add_argument("--detach", action="store_true", help="leave once SLURM has the jobs; come back without it")
    new.add_argument(
        "--any-commit",
        action="store_true",
        help="leave finished results as they are that differ from what is wanted in the code's version alone",
    )
    new.add_argument(
        "--skip-unfit", action="store_true", help="skip and count questions that cannot be asked; see mustdrop run"
    )
    new.add_argument("--force", action="store_true", help="throw finished results away and compute them again")
    return new


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.any_commit and args.force:
        raise ValueError("--any-commit: not with --force, which computes everything again")
    plan = read(args.file, args.limit, args.where, not args.dry_run, _model(args), args.skip_unfit)
    out = check_out(Path(args.out or Path("results") / plan.name))
    launch = _launch(plan, args)
    if args.dry_run:
        print(_listing(plan, out, launch, args.any_commit))
        return 0
    launch.check_here()
    with ExitStack() as stack:
        return _sweep(plan, out, launch, argv, args, stack)


def _model(args: argparse.Namespace) -> dict | None:
    """The checkpoint that the command line names, as an entry of ``models``."""
    options = {name: value for name, value in checkpoints.loading(args).items() if value}
    if args.model is None and options:
        name, value = next(iter(options.items()))
        raise ValueError(f"{name}: got {value!r} without --model; in the file: models: [{{model: ..., {name}: ...}}]")
    return None if args.model is None else {"model": args.model, **options}


def _launch(plan: Plan, args: argparse.Namespace) -> Launch:
    launch = plan.launch
    if parallel := whole_number("--parallel", args.parallel):
        launch = replace(launch, parallel=parallel)
    if args.detach and launch.where != "slurm":
        raise ValueError("--detach: jobs on this machine end with the sweep; it is for --where slurm")
    embedded = all(checkpoints.is_embedded(cell.model) for cell in plan.cells)
    return launch.resolved(embedded, plan.settings.get("overrides", {}).get("device"))


def _sweep(
    plan: Plan, out: Path, launch: Launch, argv: Sequence[str], args: argparse.Namespace, stack: ExitStack
) -> int:
    from eval.sweep.control import Control

    lock_file = lock(out, stack)
    command = ["sweep", *argv]
    if args.force:
        _throw_away(plan, out)
    board = Board(
        plan.cells, out, {**plan.settings, "launch": asdict(launch)}, provenance.provenance(command), args.any_commit
    )
    board.save()
    control = Control(board, launch, command, lock_file)
    try:
        control.take_up()
        waiting = {entry.cell.task for entry in board.entries.values() if entry.state == "waiting"}
        check_data(sorted(waiting))
        _make_data([task for task in sorted(waiting) if is_local(task)])
        taken_up = f", {len(control.jobs)} taken up from SLURM's queue" if control.jobs else ""
        with board:
            board.say(
                f"{plan.name}: {len(plan.cells)} cells, {board.earlier} finished earlier, "
                f"{len(control.waiting)} jobs to start{taken_up}; results in {out}"
            )
            for left_out in plan.left_out:
                board.say(str(left_out))
            board.tell_defects()
            if args.detach:
                control.submit_all()
                board.say("SLURM has the jobs; the same command without --detach shows what has become of them")
                return 0
            control.run()
    except KeyboardInterrupt:
        control.cancel()
        print("\ninterrupted, jobs cancelled; the same command goes on from here", file=sys.stderr)
        return 130
    return _report(board, plan.name)


def _make_data(tasks: Sequence[str]) -> None:
    """Generate what is missing of synthetic tasks, side by side, so that no two jobs do it."""

    def make(task: str) -> None:
        made = subprocess.run([sys.executable, "-m", "eval.tasks", task], capture_output=True, text=True)
        if made.returncode:
            raise ValueError(f"tasks: {task} could not be made: {(made.stderr.strip() or '-').splitlines()[-1]}")

    with ThreadPoolExecutor(cpu_cores()) as pool:
        list(progress(pool.map(make, tasks), "questions", total=len(tasks), unit="task", leave=False, disable=None))


def _throw_away(plan: Plan, out: Path) -> None:
    """Remove what there is of the plan's cells."""
    keys = {cell.key for cell in plan.cells}
    for job in running_jobs(out):
        if keys & set(job.task.keys):
            raise ValueError(f"--force: SLURM job {job.id} is still at work on these cells; scancel {job.id} first")
    for cell in plan.cells:
        for file in cell.file(out).parent.glob(f"{cell.file(out).stem}.*"):
            file.unlink()


def _report(board: Board, name: str) -> int:
    """Tables, what failed, and what to do next; returns the exit status."""
    entries = board.entries.values()
    done = [(entry.cell, entry.file) for entry in entries if entry.state == "finished"]
    failed = [entry for entry in entries if entry.state == "failed"]
    if done:
        print(summary.write(board.out, done))
    board.say(board.summary())
    for entry in failed:
        print(f"failed: {entry.name}: {entry.reason}; log: {entry.log}", file=sys.stderr)
    if failed:
        print("the same command tries the failed cells again", file=sys.stderr)
    if done:
        print(f"next: mustdrop report {board.out}, mustdrop plots {board.out}", file=sys.stderr)
        table = Path("configs") / "tables" / f"{name}.yaml"
        if table.is_file():
            print(f"      mustdrop table {table} --results {board.out}", file=sys.stderr)
    return 1 if failed else 0


def _listing(plan: Plan, out: Path, launch: Launch, any_commit: bool) -> str:
    """The cells as a table, what is left out, and how many jobs there would be."""
    in_queue: dict[str, str] = {}
    with suppress(ValueError):  # where SLURM does not answer, nobody can say what it is at
        in_queue = {key: job.id for job in running_jobs(out, tries=1) for key in job.task.keys}
    states = [
        "finished"
        if cell.finished(out) or (any_commit and cell.made_by_other_code(out))
        else f"SLURM job {in_queue[cell.key]}"
        if cell.key in in_queue
        else "waiting"
        for cell in plan.cells
    ]
    lines = [
        [cell.model_name, cell.task, cell.method, cell.retain, cell.seed, cell.key, state]
        for cell, state in zip(plan.cells, states, strict=True)
    ]
    waiting = [cell for cell, state in zip(plan.cells, states, strict=True) if state == "waiting"]
    jobs = len(chunks(waiting, launch))
    at_once = f", {launch.parallel} at once" if launch.parallel else ""
    table = tabulate(lines, ["model", "task", "method", "retain", "seed", "key", "state"], missingval="-")
    left_out = "".join(f"{one}\n" for one in plan.left_out)
    return (
        f"{table}\n\n{left_out}{len(plan.cells)} cells, {len(waiting)} waiting; {jobs} jobs ({launch.where}{at_once}); "
        f"results in {out}"
    )


if __name__ == "__main__":
    sys.exit(main())
