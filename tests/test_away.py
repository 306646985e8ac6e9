"""What is away or slow: data sets without a network, and SLURM controllers that take their time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.run import command as run
from eval.run import runner
from eval.run.inference import LoadedModel
from eval.sweep import command as sweep
from eval.sweep import control, jobs, slurm
from eval.sweep.launch import Launch
from eval.tasks import BENCHMARKS, is_local, stock


@pytest.fixture
def other_model(checkpoint, tmp_path) -> Path:
    """The small model under a name that gets lmms-eval's own tasks."""
    shutil.copytree(checkpoint, tmp_path / "some-llava")
    return tmp_path / "some-llava"


@pytest.fixture
def nothing_cached(monkeypatch, tmp_path) -> None:
    """An empty cache and no network."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(LoadedModel, "load", None)
    monkeypatch.setattr(runner, "evaluate", None)
    for name in ("MODEL", "MODEL_BASE", "LIMIT", "OUT"):
        monkeypatch.delenv(name, raising=False)


def test_data_that_are_away_are_one_line_before_anything_is_loaded(nothing_cached, other_model, tmp_path, capsys):
    arguments = ["--model", str(other_model), "--task", "textvqa", "--method", "fastv", "--retain", "18"]
    assert run.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    file = tmp_path / "s.yaml"
    file.write_text(f"models: [{other_model}]\ntasks: [textvqa]\nmethods: [fastv]\nretain: [18]\n")
    assert sweep.main([str(file), "--out", str(tmp_path / "out2")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("error: task: textvqa_val needs the data set 'lmms-lab-encoder/textvqa'")
        assert "cannot be reached" in error


def test_a_hub_that_is_away_is_asked_once(monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def away(*arguments, **options):
        asked.append(1)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", away)
    for task in ("textvqa_val", "mme"):
        with pytest.raises(ValueError, match=f"task: {task} needs the data set"):
            stock.check(task)
    assert asked == [1]


def test_every_stock_task_names_its_data_set():
    for task in (one.stock for one in BENCHMARKS.values() if not is_local(one.stock)):
        path, name = stock._data_set(task)
        assert path.count("/") == 1 and (name is None or isinstance(name, str))


def test_data_come_before_the_model(monkeypatch, tmp_path):
    order = []

    def fail(task):
        order.append("data")
        raise ValueError("task: away")

    monkeypatch.setattr(runner, "_task_manager", fail)
    monkeypatch.setattr(runner._Loaded, "get", lambda *_: order.append("model"))
    cell = SimpleNamespace(task="t", finished=lambda out: False, check_place=lambda out: None)
    with pytest.raises(ValueError, match="away"):
        next(runner.evaluate([cell], tmp_path, command=[]))
    assert order == ["data"]


def test_failed_retries_become_one_line(monkeypatch):
    import lmms_eval.tasks
    from tenacity import Future, RetryError

    last = Future(5)
    last.set_exception(OSError("no space\nleft"))

    def fail(*_):
        raise RetryError(last)

    monkeypatch.setattr(stock, "check", lambda task: None)
    monkeypatch.setattr(stock, "manager", lambda: None)
    monkeypatch.setattr(lmms_eval.tasks, "get_task_dict", fail)
    with pytest.raises(ValueError, match="^task: the data of mme cannot be loaded: no space left$"):
        stock.load("mme")


# SLURM


SBATCH = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
count = len(list(folder.glob("sbatch.*"))) + 1
(folder / f"sbatch.{{count}}").touch()
fail = {fail!r}
if count <= fail:
    if {accepts!r}:
        (folder / f"queue.{{100 + count}}").write_text("PENDING")
    print("sbatch: error: Batch job submission failed: {reason}", file=sys.stderr)
    sys.exit(1)
(folder / f"queue.{{100 + count}}").write_text("PENDING")
print(f"Submitted batch job {{100 + count}}")
"""
SQUEUE = """#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
silent = folder / "silent"
if silent.exists() and int(silent.read_text()) > 0:
    silent.write_text(str(int(silent.read_text()) - 1))
    sys.exit("slurm_load_jobs error: Socket timed out on send/recv operation")
for job in sorted(folder.glob("queue.*")):
    print(job.suffix[1:], job.read_text())
"""
SCANCEL = """#!{python}
import pathlib, sys
(pathlib.Path({folder!r}) / f"queue.{{sys.argv[1]}}").unlink()
"""


@pytest.fixture
def controller(tmp_path, monkeypatch):
    """Programs that stand in for SLURM's; the first calls of sbatch fail, with or without the job being taken."""
    import sys

    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for module in (slurm, control):
        monkeypatch.setattr(module, "PAUSE", 0.0)

    def place(fail: int = 0, accepts: bool = True, reason: str = "Socket timed out on send/recv operation") -> Path:
        facts = {"python": sys.executable, "folder": str(folder), "fail": fail, "accepts": accepts, "reason": reason}
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("srun", "#!/bin/sh\n")):
            (folder / name).write_text(text.format(**facts) if name != "srun" else text)
            (folder / name).chmod(0o755)
        return folder

    return place


def submit(out: Path, cells: int = 2) -> control.Control:
    """Give SLURM one job."""
    board = SimpleNamespace(out=out, entries={}, say=lambda text: None, set=lambda *_: None)
    line = control.Control(board, Launch(where="slurm", time=1, gpus=0), [], out / "lock")
    line.waiting.append(([SimpleNamespace(key=f"key{number}") for number in range(cells)], 1))
    line.submit_all()
    return line


def in_queue(folder: Path) -> list[str]:
    return sorted(job.suffix[1:] for job in folder.glob("queue.*"))


@pytest.mark.parametrize("accepts", [True, False])
def test_a_slow_controller_is_asked_again_and_no_orphan_is_left(controller, tmp_path, accepts):
    folder = controller(fail=2, accepts=accepts)
    (job,) = submit(tmp_path).jobs
    assert job.id == "103" and in_queue(folder) == ["103"]
    (taken_up,) = jobs.running_jobs(tmp_path)
    assert (taken_up.id, taken_up.task.keys, taken_up.log) == ("103", ["key0", "key1"], job.log)


def test_a_refusal_is_one_line_at_once(controller, tmp_path):
    folder = controller(fail=9, accepts=False, reason="invalid partition specified: gpu")
    with pytest.raises(ValueError, match="^launch: SLURM refuses the jobs: .*invalid partition") as error:
        submit(tmp_path)
    assert "\n" not in str(error.value) and len(list(folder.glob("sbatch.*"))) == 1


def test_a_controller_that_never_answers_ends_it_at_last(controller, tmp_path, monkeypatch):
    monkeypatch.setattr(control, "TRIES", 2)
    folder = controller(fail=9)
    with pytest.raises(ValueError, match="^launch: SLURM refuses the jobs: .*timed out"):
        submit(tmp_path)
    assert len(list(folder.glob("sbatch.*"))) == 3
    control.cancel_orphans(tmp_path)
    assert in_queue(folder) == []


def test_a_queue_without_an_answer_is_not_an_empty_one(controller, tmp_path):
    folder = controller()
    (job,) = submit(tmp_path).jobs
    (folder / "silent").write_text("3")
    assert [one.id for one in jobs.running_jobs(tmp_path)] == [job.id]
    (folder / "silent").write_text("1000")
    with pytest.raises(ValueError, match="SLURM does not answer"):
        jobs.running_jobs(tmp_path, tries=2)
    assert jobs.running_jobs(tmp_path / "elsewhere") == [], "no job of this folder was ever there"


def test_cancelling_is_tried_again(controller, capsys):
    folder = controller()
    (folder / "queue.7").touch()
    assert slurm.scancel("7") and in_queue(folder) == []
    assert not slurm.scancel("7")


def test_lists_of_cells_that_are_none_are_empty(tmp_path):
    for content in (b"", b"[]", b'{"keys": 3}', b"\xff", json.dumps({"keys": [1]}).encode()):
        (tmp_path / "1_cells.json").write_bytes(content)
        assert jobs._listed(tmp_path / "1_cells.json") == []
