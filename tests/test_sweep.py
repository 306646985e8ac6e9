"""Sweeps: what a file means, what is refused, and what becomes of cells that finish, fail or are interrupted."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from eval import checkpoints
from eval.run import runner
from eval.run.cell import Cell, write_json
from eval.run.lock import lock
from eval.sweep import command as cli
from eval.sweep import control, jobs, launch, plan
from eval.sweep.jobs import run_cells
from eval.sweep.launch import Launch
from eval.sweep.status import Answers, Board
from eval.tasks import SUITE, mini_gqa, prepare
from mustdrop import available_methods, load_reducer
from mustdrop.methods.frames import FrameMethod

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = [0.0, 1.0]
ROW = {
    "synthetic": True, "metric": "exact_match", "score": 50.0, "score_ci95": INTERVAL, "accuracy": 0.5,
    "ci95": INTERVAL, "n": 4, "accuracy_by_type": {}, "mean_tokens": 36.0, "mean_tokens_official": 36.0,
    "flops_reduction": 0.0, "flops_reductions": {}, "cache_bytes": 1.0, "vision_ms": 1.0, "prefill_ms": 1.0,
    "selector_ms": 0.0, "decode_ms": 1.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path) -> None:
    for name in ("MODEL", "MODEL_BASE", "LIMIT", "OUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path, checkpoint):
    """Writes a sweep of the small model; keyword arguments replace or, as None, remove keys."""

    def write(**changes) -> Path:
        content = {
            "models": [str(checkpoint)],
            "tasks": ["mini_gqa", "mini_pope"],
            "methods": ["fastv"],
            "retain": [18, 9],
            "limit": 4,
            "launch": {"parallel": 2},
            **changes,
        }
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return write


class Workers:
    """Stands in for submitit and for the evaluation: jobs run at once, in this process.

    ``wrong`` maps a label to how often its cell fails; ``dies`` holds labels at which the whole job ends, once.
    """

    def __init__(self, wrong=None, dies=()):
        self.wrong, self.dies = dict(wrong or {}), set(dies)
        self.evaluated: list[str] = []
        self.jobs: list[list[str]] = []

    def evaluate(self, cells, out, *, command, **_):
        for cell in cells:
            if cell.finished(out):
                yield cell, cell.read(out)
                continue
            name = f"{cell.task} {cell.label}"
            if cell.label in self.dies:
                self.dies.remove(cell.label)
                raise SystemExit(1)
            self.evaluated.append(name)
            if self.wrong.get(cell.label, 0) > 0:
                self.wrong[cell.label] -= 1
                raise RuntimeError("out of\nmemory")
            row = {**ROW, "model": cell.model_name, "task": cell.task, "benchmark": cell.benchmark}
            row |= {"method": cell.method, "retain": cell.retain, "seed": cell.seed, "limit": cell.limit}
            facts = {"device": "none", "dtype": "float32", "date": "2000-01-01", "git_commit": None}
            content = {"row": row, "identity": cell.identity(), "provenance": facts, "seconds": 0.0}
            write_json(cell.file(out), content)
            yield cell, row

    def submit(self, tasks, launch, folder, attempt, slot=0):
        submitted = []
        for task in tasks:
            self.jobs.append([cell.label for cell in task.cells])
            log = folder / f"{len(self.jobs)}_0_log.out"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("first\nlast words\n")
            with suppress(SystemExit):
                jobs.run_cells(dict(zip(task.keys, task.cells, strict=True)), task.out, task.command, jobs.Notes(log))
            handle = SimpleNamespace(job_id=str(len(self.jobs)), paths=SimpleNamespace(stdout=log), done=lambda: True)
            submitted.append(jobs.Job(handle, task, launch.where, attempt, slot))
        return submitted


@pytest.fixture
def workers(monkeypatch):
    """Puts `Workers` in place."""

    def place(**behaviour) -> Workers:
        new = Workers(**behaviour)
        monkeypatch.setattr(runner, "evaluate", new.evaluate)
        monkeypatch.setattr(control, "submit", new.submit)
        monkeypatch.setattr(control, "LOCAL_PAUSE", 0.0)
        monkeypatch.setattr(cli, "_make_data", lambda tasks: None)
        return new

    return place


def states(out: Path) -> dict[tuple[str, str], str]:
    return {
        (cell["task"], cell["label"]): cell["state"] for cell in json.loads((out / "sweep.json").read_text())["cells"]
    }


# What a file means


def test_cells_are_the_product_with_the_untouched_model_once(write):
    cells = plan.read(write(seeds=[0, 1], batch_size=2, overrides={"dtype": "float32"})).cells
    assert [cell.label for cell in cells[:6]] == [
        "vanilla", "fastv_18", "fastv_9", "vanilla-seed1", "fastv_18-seed1", "fastv_9-seed1",
    ]  # fmt: skip
    assert [cell.task for cell in cells] == ["mini_gqa"] * 6 + ["mini_pope"] * 6
    assert {(cell.batch_size, cell.limit, cell.dtype) for cell in cells} == {(2, 4, "float32")}
    assert cells[1].settings == {"method": "fastv", "retain": 18}
    assert len({cell.key for cell in cells}) == 12


def test_methods_are_names_files_and_fields(write, tmp_path):
    file = tmp_path / "mine_12.yaml"
    file.write_text("method: mustdrop\nglobal_threshold: 0.05\n")
    methods = [
        "vanilla",
        str(file),
        {"method": "fastv", "layer": 2},
        {"method": "fastv", "name": "fast-half", "drop_ratio": 0.5, "retain": None},
        {"method": "mustdrop", "name": "strict", "global_threshold": 0.1},
    ]
    cells = plan.read(write(tasks=["mini_gqa"], methods=methods)).cells
    assert [cell.label for cell in cells] == ["vanilla", "mine_12", "fastv_18", "fastv_9", "fast-half", "strict"]
    assert cells[2].settings == {"method": "fastv", "layer": 2, "retain": 18}
    assert cells[1].settings == {"method": "mustdrop", "global_threshold": 0.05}


def test_embedded_model_gets_the_tasks_that_mirror_benchmarks(write):
    cells = plan.read(write(tasks=["gqa", "mini_gqa", "mini"], methods=[], limit=None)).cells
    assert sorted(cell.task for cell in cells) == sorted(SUITE)


@pytest.mark.parametrize("name", ["table1", "table1_mini"])
def test_shipped_sweeps_are_valid(name, monkeypatch):
    monkeypatch.setattr(checkpoints, "_check_hub", lambda *_: None)
    read = plan.read(ROOT / "configs" / "sweeps" / f"{name}.yaml")
    assert {cell.retain for cell in read.cells} == {None, 192, 128, 64}
    assert {"vanilla", "mustdrop"} <= {cell.method for cell in read.cells}


def test_shipped_sweep_of_videos_is_valid_and_names_what_is_out_of_reach():
    read = plan.read(ROOT / "configs" / "sweeps" / "video_mini.yaml")
    found = {(cell.method, cell.retain) for cell in read.cells}
    both = {(name, n) for name in ("mustdrop_plus", "fastv", "visionzip", "divprune", "vidcom2") for n in (194, 136)}
    assert found == both | {("vanilla", None), ("mustdrop", 194), ("evs", 256)}
    assert {cell.task for cell in read.cells} == {"mini_video"}
    assert [(left.method, left.retain) for left in read.left_out] == [("mustdrop", 136)]


def test_comparison_has_every_method_and_names_what_is_out_of_reach():
    read = plan.read(ROOT / "configs" / "sweeps" / "compare.yaml")
    named = {cell.method for cell in read.cells}
    reducers = {name: load_reducer({"method": name}) for name in available_methods()}
    for_images = {name for name, reducer in reducers.items() if not isinstance(reducer, FrameMethod)}
    dropping = {name for name in for_images if hasattr(reducers[name], "retain")}
    assert dropping <= named, "a method is missing in configs/sweeps/compare.yaml"
    assert {cell.retain for cell in read.cells} >= {None, 192, 128, 64, 32}
    assert {cell.task for cell in read.cells} == set(SUITE)
    assert {(cell.method, cell.retain) for cell in read.cells if "yopo" in cell.method} == {
        ("mustdrop_yopo", 128), ("mustdrop_yopo", 64), ("yopo", None), ("yopo_heads", None),
    }  # fmt: skip
    lacking = {(one.method, one.retain) for one in read.left_out}
    assert ("sparsevlm", 32) in lacking and not lacking & {(cell.method, cell.retain) for cell in read.cells}
    reasons = "\n".join(read.settings["left_out"])
    assert "at least 40 for SparseVLM" in reasons
    assert "configs/methods/llava-mini/mustdrop_yopo.yaml has 128, 64" in reasons


def test_budgets_may_be_shares(write):
    own = {"method": "uniform", "retain": [0.5, 9]}
    cells = plan.read(write(tasks=["mini_gqa"], methods=["fastv", own], retain=[0.25, 18])).cells
    assert [cell.label for cell in cells] == ["vanilla", "fastv_0.25", "fastv_18", "uniform_0.5", "uniform_9"]
    assert cells[1].settings == {"method": "fastv", "retain": 0.25} and cells[1].file(Path()).suffix == ".json"
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"retain: got {wrong}, expected a whole number"):
            plan.read(write(retain=[wrong]))


def test_a_list_of_budgets_and_names_for_compositions(write):
    exact = {"name": "exact", "method": "mustdrop", "retain": [18, 12]}
    both = {"name": "both", "method": "compose", "parts": [{"method": "uniform", "retain": 9}, {"method": "yopo"}]}
    cells = plan.read(write(tasks=["mini_gqa"], methods=[exact, both])).cells
    assert [cell.label for cell in cells] == ["vanilla", "exact_18", "exact_12", "both"]
    assert cells[2].settings == {"method": "mustdrop", "retain": 12}


def test_arrays_inside_compositions_belong_to_the_identity(write, tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text("method: compose\nparts: [{method: uniform, retain: 9}, {method: yopo, heads: heads.npy}]\n")
    keys = []
    for active in (True, False):
        np.save(tmp_path / "heads.npy", np.full((8, 2), active))
        keys.append(plan.read(write(methods=[str(file)])).cells[1].key)
    assert keys[0] != keys[1]


# What is refused


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"retains": [64]}, ["unknown key 'retains'", "did you mean retain?"]),
        ({"launch": {"partitions": "gpu"}}, ["launch: unknown key 'partitions'", "did you mean partition?"]),
        ({"overrides": {"dtyp": "float32"}}, ["overrides: unknown key 'dtyp'", "did you mean dtype?"]),
        ({"overrides": {"dtype": "float8"}}, ["overrides: dtype: got 'float8'", "bfloat16"]),
        ({"overrides": {"device": "cuda:1"}}, ["overrides: device: got 'cuda:1'", "launch"]),
        ({"overrides": ["dtype"]}, ["overrides: got ['dtype']", "mapping"]),
        ({"models": ["nowhere/at/all"]}, ["models: there is no folder 'nowhere/at/all'"]),
        ({"models": [3]}, ["models: got [3]", "names"]),
        ({"tasks": ["mini_pop"]}, ["tasks: got 'mini_pop'", "did you mean mini_pope?"]),
        ({"tasks": None}, ["tasks: got None", "names"]),
        ({"tasks": ["mini_mme"], "limit": 3}, ["limit: got 3", "mini_mme"]),
        ({"methods": ["mustdop"]}, ["methods:", "'mustdop'", "did you mean mustdrop?"]),
        ({"methods": ["configs/methods/none.yaml"]}, ["methods: configs/methods/none.yaml", "no such file"]),
        ({"methods": [{"method": "fastv", "layr": 2}]}, ["methods: layr", "did you mean layer?"]),
        ({"methods": [{"method": "compose", "parts": [{"method": "yopo"}]}]}, ["methods: name: got None", "a name of"]),
        ({"unreachable": "ignore"}, ["unreachable: got 'ignore'", "skip or stop"]),
        ({"methods": [{"method": "fastv", "name": "a/b"}]}, ["methods: name: got 'a/b'", "letters"]),
        ({"methods": [["fastv"]]}, ["methods: got ['fastv']", "name"]),
        (
            {"methods": [{"method": "mustdrop"}, {"method": "mustdrop", "window": 2}]},
            ["methods:", "two different ones are called 'mustdrop'", "name: ..."],
        ),
        ({"methods": ["mustdrop"], "retain": [17]}, ["retain: no settings of mustdrop for 17 tokens", "calibrate"]),
        (
            {"methods": [{"method": "fastv", "layer": 4}]},
            ["retain: fastv on llava-mini-random: retain is 9", "at least"],
        ),
        ({"retain": [600]}, ["retain: 600", "only 36 vision tokens"]),
        ({"retain": ["many"]}, ["retain: got 'many'", "whole number of 1 or more"]),
        ({"seeds": [-1]}, ["seeds: got -1", "whole number of 0 or more"]),
        ({"batch_size": 0}, ["batch_size: got 0", "whole number of 1 or more"]),
        ({"limit": 1.5}, ["limit: got 1.5", "whole number of 1 or more"]),
        ({"launch": ["slurm"]}, ["launch: got ['slurm']", "mapping"]),
        ({"launch": {"where": "cloud"}}, ["launch: where: got 'cloud'", "local or slurm"]),
        ({"launch": {"gpus": "all"}}, ["launch: gpus: got 'all'", "whole number of 0 or more"]),
        ({"launch": {"time": 0}}, ["launch: time: got 0", "whole number of minutes of 1 or more"]),
        ({"launch": {"memory": "64G"}}, ["launch: memory: got '64G'", "number of GB"]),
        ({"launch": {"setup": "module load cuda"}}, ["launch: setup: got 'module load cuda'", "list"]),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(write, workers, tmp_path, capsys, changes, words):
    file, used = write(**changes), workers()
    assert cli.main([str(file), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {file}: ") and message.count("\n") == 1
    assert all(word in message for word in words), message
    assert not used.jobs and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("a: [", "not valid YAML"), ("- a", "holds list")])
def test_files_that_are_no_sweep(tmp_path, capsys, content, words):
    file = tmp_path / "sweep.yaml"
    if content is not None:
        file.write_text(content)
    assert cli.main([str(file)]) == 2
    assert words in capsys.readouterr().err


def test_slurm_is_refused_where_there_is_none(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main([str(write()), "--where", "slurm"]) == 2
    assert "has no sbatch" in capsys.readouterr().err
    assert cli.main([str(write()), "--detach"]) == 2
    assert "--detach" in capsys.readouterr().err


# Sharing out


def test_jobs_get_smaller_and_hold_every_cell_once(write):
    cells = plan.read(write(tasks=["mini"], seeds=[0, 1])).cells
    shared = jobs.chunks(cells, Launch(parallel=2))
    assert [cell for own in shared for cell in own] == list(cells)
    sizes = [len(own) for own in shared]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 and sizes[-1] <= 2
    assert [len(own) for own in jobs.chunks(cells[:2], Launch(parallel=2))] == [1, 1]
    assert [len(own) for own in jobs.chunks(cells, Launch(parallel=1))] == [len(cells)]
    assert [len(own) for own in jobs.chunks(cells[:5], Launch(parallel=2, cells_per_job=2))] == [2, 2, 1]
    by_method = jobs.chunks(cells, Launch(where="slurm"))
    assert [{cell.method for cell in own} for own in by_method] == [{"vanilla"}, {"fastv"}]


def test_defaults_fit_this_machine(monkeypatch):
    monkeypatch.setattr(launch, "cpu_cores", lambda: 8)
    monkeypatch.setattr(launch, "visible_gpus", lambda: [])

    def taken(given: Launch, **asked) -> tuple:
        found = given.resolved(**{"embedded": False, **asked})
        return found.gpus, found.parallel, found.threads

    assert taken(Launch(), embedded=True) == (0, 8, 1)
    assert taken(Launch(parallel=1), embedded=True) == (0, 1, 1)
    assert taken(Launch()) == (0, 1, 8)
    assert taken(Launch(parallel=4)) == (0, 4, 2)
    assert taken(Launch(where="slurm", cpus=4, gpus=1)) == (1, None, 4)
    monkeypatch.setattr(launch, "visible_gpus", lambda: ["0", "2", "5"])
    assert taken(Launch()) == (1, 3, 2)
    assert taken(Launch(gpus=2)) == (2, 1, 8)
    assert taken(Launch(), device="cpu") == (0, 1, 8)
    assert [jobs.gpus_of(slot, 1, ["0", "2", "5"]) for slot in range(4)] == [["0"], ["2"], ["5"], ["0"]]
    assert jobs.gpus_of(0, 2, ["0", "2", "5"]) == ["0", "2"]


# Running


def test_dry_run_lists_cells_and_leaves_nothing(write, workers, tmp_path, capsys):
    used, out = workers(), tmp_path / "out"
    assert cli.main([str(write()), "--out", str(out), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("waiting") == 7 and "6 cells, 6 waiting" in text and "fastv" in text
    assert not used.jobs and not out.exists()


def test_limit_and_folder_from_the_environment(write, workers, tmp_path, monkeypatch):
    workers()
    monkeypatch.setenv("LIMIT", "2")
    monkeypatch.setenv("OUT", str(tmp_path / "there"))
    assert cli.main([str(write())]) == 0
    assert {json.loads(file.read_text())["row"]["limit"] for file in (tmp_path / "there/cells").rglob("*.json")} == {2}


def test_finished_cells_are_not_computed_again(write, workers, tmp_path, capsys):
    used, arguments = workers(), [str(write()), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert len(used.evaluated) == 6 and set(states(tmp_path / "out").values()) == {"finished"}
    assert "mini_pope, llava-mini-random" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert len(used.evaluated) == 6
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert "6 cells, 0 waiting; 0 jobs" in capsys.readouterr().out
    assert cli.main([str(write(retain=[18, 12])), *arguments[1:]]) == 0
    assert used.evaluated[6:] == ["mini_gqa fastv_12", "mini_pope fastv_12"]
    assert cli.main([*arguments, "--force"]) == 0
    assert len(used.evaluated) == 14


def test_a_failed_cell_is_tried_once_more_and_stops_no_other(write, workers, tmp_path, capsys):
    used = workers(wrong={"fastv_18": 1})
    arguments = [str(write(tasks=["mini_gqa"])), "--out", str(tmp_path / "out"), "--parallel", "1"]
    assert cli.main(arguments) == 0
    assert used.jobs == [["vanilla", "fastv_18", "fastv_9"], ["fastv_18"]]
    assert used.evaluated == [f"mini_gqa {label}" for label in ("vanilla", "fastv_18", "fastv_9", "fastv_18")]
    assert set(states(tmp_path / "out").values()) == {"finished"}
    assert "once more: RuntimeError: out of memory" in capsys.readouterr().err


def test_what_fails_twice_is_reported_with_its_log(write, workers, tmp_path, capsys):
    used, out = workers(wrong={"fastv_18": 2}), tmp_path / "out"
    arguments = [str(write(tasks=["mini_gqa"])), "--out", str(out), "--parallel", "1"]
    assert cli.main(arguments) == 1
    report = capsys.readouterr()
    log = next(line for line in report.err.splitlines() if line.startswith("failed: ")).partition("log: ")[2]
    assert Path(log).is_file() and "mini_gqa fastv_18: RuntimeError: out of memory" in report.err
    assert states(out) == {
        ("mini_gqa", "vanilla"): "finished", ("mini_gqa", "fastv_18"): "failed", ("mini_gqa", "fastv_9"): "finished",
    }  # fmt: skip
    assert (
        "fastv" in (out / "summary.md").read_text() and len(json.loads((out / "summary.json").read_text())["rows"]) == 2
    )
    assert cli.main(arguments) == 0
    assert used.jobs[-1] == ["fastv_18"]


def test_methods_added_at_a_later_commit_join_the_results_of_the_earlier(write, workers, tmp_path, monkeypatch, capsys):
    used, out = workers(), str(tmp_path / "out")
    assert cli.main([str(write(tasks=["mini_gqa"])), "--out", out]) == 0
    monkeypatch.setattr("eval.run.cell._code_fingerprint", lambda: "another commit")
    later = str(write(tasks=["mini_gqa"], methods=["fastv", "uniform"]))
    before = len(used.evaluated)
    assert cli.main([later, "--out", out, "--dry-run", "--any-commit"]) == 0
    assert "5 cells, 2 waiting" in capsys.readouterr().out
    assert cli.main([later, "--out", out, "--any-commit"]) == 0
    assert used.evaluated[before:] == ["mini_gqa uniform_18", "mini_gqa uniform_9"]
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]) == 5
    # Other questions are no matter of the code's version, and without the option everything is new.
    assert cli.main([later, "--out", out, "--any-commit", "--limit", "6", "--dry-run"]) == 0
    assert cli.main([later, "--out", out, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "5 cells, 5 waiting" in printed and "5 cells, 3 waiting" in printed
    assert cli.main([later, "--out", out, "--any-commit", "--force"]) == 2
    assert "--any-commit: not with --force" in capsys.readouterr().err


def test_what_is_out_of_reach_is_skipped_if_the_file_says_so(write, workers, tmp_path, capsys):
    used = workers()
    file = write(tasks=["mini_gqa"], methods=[{"method": "fastv", "layer": 4}], unreachable="skip")
    assert cli.main([str(file), "--out", str(tmp_path / "out"), "--parallel", "1"]) == 0
    assert used.jobs == [["vanilla", "fastv_18"]]
    assert "left out: fastv on llava-mini-random: retain is 9" in capsys.readouterr().err


def test_cells_of_a_job_that_died_go_on_in_others(write, workers, tmp_path, capsys):
    used = workers(dies=["fastv_18"])
    assert cli.main([str(write(tasks=["mini_gqa"])), "--out", str(tmp_path / "out"), "--parallel", "1"]) == 0
    assert used.jobs == [["vanilla", "fastv_18", "fastv_9"], ["fastv_18"], ["fastv_9"]]
    assert "last words" in capsys.readouterr().err


def test_interrupted_sweep_cancels_its_jobs_and_goes_on_later(write, workers, tmp_path, monkeypatch, capsys):
    used, arguments = workers(), [str(write()), "--out", str(tmp_path / "out")]
    look, looks = control.Control.look, []

    def interrupt(self):
        looks.append(1)
        if len(looks) == 1:
            raise KeyboardInterrupt
        look(self)

    monkeypatch.setattr(control.Control, "look", interrupt)
    assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    before = list(used.evaluated)
    assert cli.main(arguments) == 0
    assert not set(before) & set(used.evaluated[len(before) :]) and len(used.evaluated) == 6


def test_sweep_ends_when_the_code_changes_under_it(write, workers, tmp_path, monkeypatch, capsys):
    used = workers()
    first = Cell.key.fget

    def run_changed(cells, *rest):
        with monkeypatch.context() as changed:
            changed.setattr(Cell, "key", property(lambda cell: first(cell)[::-1]))
            run_cells(cells, *rest)

    monkeypatch.setattr(jobs, "run_cells", run_changed)
    assert cli.main([str(write()), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {jobs.CHANGED}"
    assert not used.evaluated and set(states(tmp_path / "out").values()) == {"waiting"}


def test_only_one_sweep_works_on_a_folder(write, workers, tmp_path, monkeypatch, capsys):
    used = workers()
    monkeypatch.setattr("eval.run.lock.ORPHANS", 0.0)
    with ExitStack() as stack:
        lock(tmp_path / "out", stack)
        assert cli.main([str(write()), "--out", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: OUT: another sweep or run is at work") and "process" in message
    assert not used.jobs
    assert cli.main([str(write()), "--out", str(tmp_path / "out")]) == 0


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.lock").symlink_to(tmp_path / "mine")
    with ExitStack() as stack, pytest.raises(OSError, match="sweep.lock"):
        lock(tmp_path / "out", stack)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def without(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("eval.run.lock.fcntl.flock", without)
    with ExitStack() as stack:
        lock(tmp_path, stack)
    assert "has no locks: start nothing else there" in capsys.readouterr().err


def test_a_job_ends_with_its_sweep(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(jobs.os, "_exit", lambda status: ended.set())
    with ExitStack() as stack:
        path = lock(tmp_path, stack)
        threading.Thread(target=jobs._end_with, args=(path,), daemon=True).start()
        assert not ended.wait(0.2)
    assert ended.wait(10)


def test_answers_are_counted_as_they_come(tmp_path):
    answers = Answers(tmp_path / "a.jsonl")
    assert answers.update() == 0
    answers.file.write_text("1\n2\n")
    assert answers.update() == 2
    with answers.file.open("a") as file:
        file.write("3\n")
    assert answers.update() == 3
    answers.file.write_text("1\n")
    assert answers.update() == 1


def test_progress_counts_parts_of_cells(write, tmp_path):
    board = Board(plan.read(write(tasks=["mini_gqa"])).cells, tmp_path, {}, {})
    first, second, _ = board.entries.values()
    board.set(first, "finished")
    board.set(second, "running")
    second.answers.file.parent.mkdir(parents=True, exist_ok=True)
    second.answers.file.write_text("1\n")
    board.start = time.monotonic() - 10
    assert board.progress() == 1.25
    assert board.summary() == "1 finished, 1 waiting, 1 running; 0:00:10, about 0:00:14 left"


def test_two_cells_through_submitit(write, tmp_path, monkeypatch, capsys):
    """Everything for real: submitit's processes, lmms-eval, a small model."""
    monkeypatch.setattr(mini_gqa, "SCENES", 1)
    monkeypatch.setattr(cli, "_make_data", lambda tasks: [prepare(task) for task in tasks])
    out = tmp_path / "out"
    file = write(tasks=["mini_gqa"], retain=[18], limit=2, launch={"parallel": 1})
    assert cli.main([str(file), "--out", str(out)]) == 0
    assert "18.0" in capsys.readouterr().out
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert [cell["state"] for cell in cells] == ["finished", "finished"]
    assert all(Path(cell["log"]).is_file() and Path(cell["file"]).is_file() for cell in cells)
    result = json.loads(Path(cells[0]["file"]).read_text())
    assert result["provenance"]["command"].startswith("mustdrop sweep") and result["row"]["n"] == 2
