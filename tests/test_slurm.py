"""A sweep on a real SLURM cluster of one node; skipped where SLURM is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import slurm
import yaml
from checkpoint import save_checkpoint

from eval.run.records import read_answers as read_lines
from eval.tasks import mini_gqa, prepare

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())


@pytest.fixture
def cluster(monkeypatch):
    """The environment of a cluster; its folder is not pytest's, whose paths are too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm.cluster(Path(folder)) as environment:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, environment[name])
        monkeypatch.delenv("LIMIT", raising=False)
        monkeypatch.delenv("OUT", raising=False)
        yield


@pytest.fixture
def sweep(cluster, tmp_path, tokenizer_folder, monkeypatch) -> list[str]:
    """The command of a sweep of three cells in two jobs, one after the other."""
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mini_gqa, "SCENES", LIMIT // 3)
    prepare("mini_gqa")
    checkpoint = save_checkpoint(tmp_path / "llava-mini-random", tokenizer_folder)
    content = {
        "models": [str(checkpoint)],
        "tasks": ["mini_gqa"],
        "methods": ["fastv"],
        "retain": [18, 9],
        "limit": LIMIT,
        "batch_size": 1,
        "launch": {"where": "slurm", "partition": "debug", "cpus": 1, "time": 10, "parallel": 1, "cells_per_job": 2},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return [sys.executable, "-m", "eval.sweep", str(file), "--out", str(tmp_path / "out")]


def wait(what, seconds: float = 120):
    """The first true result of a function."""
    until = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)
    return result


def test_killed_jobs_and_sweeps_go_on_and_nothing_is_done_twice(sweep, tmp_path, request):
    out = tmp_path / "out"
    cells = out / "cells" / "mini_gqa"

    def start(log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            process = subprocess.Popen(sweep, cwd=ROOT, stdout=file, stderr=file)
        request.addfinalizer(process.kill)
        return process

    first = start(tmp_path / "first.log")
    finished = wait(lambda: next(cells.glob("vanilla-*.json"), None))
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    samples = wait(lambda: next(cells.glob("fastv_18-*.jsonl"), None))
    wait(lambda: len(read_lines(samples)) >= 5)
    jobs = {cell["label"]: cell["job"] for cell in states(out)}
    assert jobs["vanilla"] == jobs["fastv_18"] != jobs["fastv_9"]
    subprocess.run(["scontrol", "hold", jobs["fastv_9"]], check=True)

    # A running job is killed. Without a signal it would be SIGTERM, which submitit's jobs outlive by SLURM's KillWait.
    subprocess.run(["scancel", "--signal=USR1", jobs["fastv_18"]], check=True)
    wait(lambda: "fastv_18: waiting (failed, once more" in (tmp_path / "first.log").read_text())
    interrupted = read_lines(samples)
    assert 5 <= len(interrupted) < LIMIT and not list(cells.glob("fastv_18-*.json"))

    # The sweep is killed, too; the next one takes up the job that is left in the queue.
    first.kill()
    first.wait()
    second = start(tmp_path / "second.log")
    wait(lambda: "taken up from SLURM's queue" in (tmp_path / "second.log").read_text())
    subprocess.run(["scontrol", "release", jobs["fastv_9"]], check=True)
    assert second.wait(120) == 0, (tmp_path / "second.log").read_text()
    assert [cell["state"] for cell in states(out)] == ["finished"] * 3

    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    lines = {line["doc_id"]: line for line in read_lines(samples)}
    assert len(lines) == len(read_lines(samples)) == LIMIT
    for line in interrupted:  # measured times would differ if a question were answered again
        assert lines[line["doc_id"]]["times_ms"] == line["times_ms"]
    assert len(list((out / "jobs").glob("*/*_submitted.pkl"))) == 3, "two jobs and one that tried again"


def states(out: Path) -> list[dict]:
    return json.loads((out / "sweep.json").read_text())["cells"]
