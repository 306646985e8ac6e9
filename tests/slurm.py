"""A SLURM cluster of one node for tests: everything lives in one folder and ends with the context."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel")
SYSTEM = "/usr/sbin:/sbin"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,defer_batch=no
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, empty if there can."""
    absent = [name for name in PROGRAMS if _which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "SLURM's daemons want to be started by root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and slurmd.

    Parameters
    ----------
    folder : pathlib.Path
        For configuration, state and logs. Its path must be short: it holds a socket.

    Yields
    ------
    dict
        The environment in which SLURM's commands find the cluster. There is no accounting, so no ``sacct``.
    """
    folder.chmod(0o755)  # munged wants its socket within everybody's reach
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    controller_port, node_port = _free_ports(2)
    configuration.write_text(
        CONFIGURATION.format(folder=folder, host=host, controller_port=controller_port, node_port=node_port)
    )
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:{SYSTEM}"}
    sock = folder / "munge.socket"
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    with ExitStack() as stack:
        _start(stack, folder, environment, "munged", "--foreground", f"--socket={sock}", *files)
        _wait(sock.exists, "munged opens its socket", folder)
        _start(stack, folder, environment, "slurmctld", "-D", "-c")
        _start(stack, folder, environment, "slurmd", "-D", "-c", "-N", host)
        _wait(lambda: _run(environment, "sinfo", "-h", "-o", "%T").strip() == "idle", "the node is idle", folder)
        try:
            yield environment
        finally:
            _run(environment, "scancel", "--user=root")
            _wait(lambda: not _run(environment, "squeue", "-h").strip(), "all jobs have ended", folder)


def _start(stack: ExitStack, folder: Path, environment: dict[str, str], program: str, *arguments: str) -> None:
    """A daemon in the foreground, ended with the stack."""
    log = stack.enter_context((folder / f"{program}.out").open("w"))
    process = subprocess.Popen([_which(program), *arguments], env=environment, stdout=log, stderr=log)

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)


def _wait(holds, what: str, folder: Path, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            logs = "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.out")))
            raise TimeoutError(f"waited {seconds} s until {what}\n{logs}")
        time.sleep(0.1)


def _run(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:{SYSTEM}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
