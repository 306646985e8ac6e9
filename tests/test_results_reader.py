"""Damaged results folders: what is no complete record is named in one line and left out, or computed again."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from fabricated import results_folder, write_cell
from PIL import Image

from eval.report import html as report
from eval.report import plots, significance, table
from eval.report.results import load
from eval.report.viewer import viewers
from eval.run import command as run
from eval.run.records import BadRecord, file_name, read_answers, read_lines, read_record
from eval.sweep import jobs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return results_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def good(tmp_path) -> Path:
    """A finished cell beside which others are damaged."""
    write_cell(tmp_path, "mini_gqa")
    return write_cell(tmp_path, "mini_gqa", "mustdrop", 18, [1.0] * 20 + [0.0] * 4)


def changed(**fields) -> str:
    """A record with other fields of its row."""

    def change(content: dict) -> None:
        content["row"] |= fields

    return change


DAMAGE = {
    "empty": b"",
    "truncated": lambda text: text[: len(text) // 2],
    "of another kind": b'{"a": 1}',
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"row": "\xff\xfe"}',
    "a row that is none": b'{"row": [1], "identity": {}, "provenance": {}}',
    "deep": b"[" * 5000,
    "NaN": changed(score=float("nan")),
    "infinite": changed(score_ci95=[0, float("inf")]),
    "text for a number": changed(score="61"),
    "true for a number": changed(n=True),
    "no questions": changed(n=0),
    "one bound": changed(score_ci95=[1.0]),
    "a path for a task": changed(task="../x"),
    "the folder above": changed(task=".."),
    "a path for a method": changed(method="a/b"),
    "an absolute path": changed(benchmark="/etc"),
    "a list for a name": changed(method=["mustdrop"]),
    "budget as text": changed(retain="9"),
    "types that are none": changed(accuracy_by_type={"a": 1}),
    "no budget": changed(retain=None),
}


def damage(file: Path, kind: str) -> None:
    change = DAMAGE[kind]
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif kind == "truncated":
        file.write_text(change(file.read_text()))
    else:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_records_are_left_out_with_one_line(good, tmp_path, kind):
    bad = write_cell(tmp_path, "mini_gqa", "fastv", 9)
    damage(bad, kind)
    results, notes = load([tmp_path])
    assert sorted(results.label) == ["mustdrop_18", "vanilla"]
    (note,) = notes
    assert str(bad) in note and "\n" not in note and note.endswith("it is left out") and len(note) < 600


def test_every_reader_goes_on_without_them(good, tmp_path, capsys):
    damage(write_cell(tmp_path, "mini_gqa", "fastv", 9), "truncated")
    layout = tmp_path / "t.yaml"
    layout.write_text("title: all\n")
    out = tmp_path / "out"
    for main, arguments in (
        (table.main, [str(layout), "--results", str(tmp_path), "--format", "all", "--out", str(out)]),
        (plots.main, [str(tmp_path), "--out", str(out)]),
        (report.main, [str(tmp_path), "--out", str(out / "r.html")]),
        (significance.main, [str(tmp_path)]),
    ):
        assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "fastv_9-000000000000.json" in printed.out + printed.err
    assert "fastv_9-000000000000.json" in (out / "r.html").read_text()


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe", "dangling"])
def test_things_that_are_no_files_do_not_matter(good, tmp_path, kind):
    place = good.with_name("fastv_9-111111111111.json")
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place if kind == "loop" else tmp_path / "nowhere")
    (tmp_path / "again").symlink_to(tmp_path)  # and a folder that holds itself
    results, notes = load([tmp_path])
    assert len(results) == 2 and len(notes) == 1 and place.name in notes[0] + kind


def test_a_folder_of_nothing_but_damage_is_one_line(tmp_path):
    damage(write_cell(tmp_path, "mini_gqa"), "truncated")
    with pytest.raises(ValueError, match=r"vanilla-0{12}\.json' is no cell's result"):
        load([tmp_path])


LINES = {
    "an empty mapping": b"{}",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "a number": b"7",
    "a score that is none": b'{"task": "mini_gqa", "doc_id": 1, "question_id": "q1", "score": "yes"}',
    "NaN": b'{"task": "mini_gqa", "doc_id": 1, "question_id": "q1", "score": NaN}',
    "deep": b"[" * 5000,
    "empty": b"",
}


@pytest.mark.parametrize("kind", LINES)
def test_damaged_lines_leave_their_result_out_of_comparisons(good, tmp_path, kind, capsys):
    samples = write_cell(tmp_path, "mini_gqa", "fastv", 18).with_suffix(".jsonl")
    content = samples.read_bytes().splitlines()
    content[3] = LINES[kind]
    samples.write_bytes(b"\n".join(content))
    with pytest.raises(BadRecord, match=r"fastv_18.*line 4"):
        list(read_lines(samples))
    assert significance.main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "fastv" not in printed.out and printed.err.count("\n") == 1 and "line 4" in printed.err
    assert "line 4" in report.report(tmp_path)


def test_lines_that_are_missing_are_noticed(good, tmp_path, capsys):
    good.with_suffix(".jsonl").write_text("\n".join(good.with_suffix(".jsonl").read_text().splitlines()[:7]))
    assert significance.main([str(tmp_path)]) == 0
    assert "holds 7 lines of 24; it is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", ""])
def test_names_from_results_never_become_paths(good, tmp_path, name):
    write_cell(tmp_path, "mini_pope", "fastv", 9, benchmark="pope")
    for field in ("task", "method", "benchmark"):
        bad = write_cell(tmp_path, "mini_pope", benchmark="pope")
        content = json.loads(bad.read_text())
        content["row"][field] = name
        bad.write_text(json.dumps(content))
        with pytest.raises(BadRecord, match=f"row.{field}"):
            read_record(bad)
    assert Path(file_name(name or "x")).name == file_name(name or "x") or name == ".."


def test_a_models_name_stays_inside_the_file_name(tmp_path):
    for model in ("../a", "b c"):
        write_cell(tmp_path, "mini_gqa", model=model, key="1" * 12 if model == "b c" else "0" * 12)
    names = list(plots.figures(load([tmp_path])[0]))
    assert names and all("/" not in name and " " not in name for name in names)


def test_pictures_from_elsewhere_and_damaged_ones_are_not_shown(whole, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    Image.new("RGB", (84, 84)).save(tmp_path / "secret.jpg")
    pictures = folder / "pictures" / "mini_gqa"
    (pictures / "0.jpg").unlink()
    (pictures / "0.jpg").symlink_to(tmp_path / "secret.jpg")
    (pictures / "1.jpg").write_bytes(b"no image")
    (pictures / "2.jpg").unlink()
    (pictures / "2.jpg").mkdir()
    (viewer,) = (one for one in viewers(load([folder])[0]) if one["task"] == "mini_gqa")
    assert [sample["question"] for sample in viewer["samples"]] == ["What <b>is</b> number 3?"]


@pytest.mark.parametrize(
    "change",
    [
        {"kept": {"vision": {"1": "zz"}}}, {"kept": {"vision": {"1": "00"}}}, {"kept": [1]}, {"kept": {"vision": 3}},
        {"images": [{"patches": 10**9, "tokens": 1}]}, {"images": [{}]}, {"images": "x"}, {"mean_tokens": "9"},
        {"question": None},
    ],
)  # fmt: skip
def test_lines_that_cannot_be_drawn_are_not(whole, tmp_path, change):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    for samples in folder.rglob("*.jsonl"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        samples.write_text("".join(json.dumps({**line, **change}) + "\n" for line in lines))
    assert viewers(load([folder])[0]) == []


def test_tables_say_what_was_not_asked(tmp_path):
    write_cell(tmp_path, "mini_gqa", skipped=2, beyond_context=0)
    write_cell(tmp_path, "mini_gqa", "fastv", 9, skipped=0, beyond_context=3)
    assert sorted(load([tmp_path])[1]) == [
        "mini_gqa, fastv_9: 3 of 24 questions longer than the model's context",
        "mini_gqa, vanilla: 2 of 24 questions skipped, which count as wrong",
    ]


# Going on


ANSWER = {
    "task": "t", "split": "test", "doc_id": 1, "answer": "yes", "mean_tokens": 1.0, "mean_tokens_official": 1.0,
    "cache_bytes": 5, "times_ms": {"prefill": 1.0}, "text_tokens": 3, "vision_tokens": [1.0], "images": [{}],
}  # fmt: skip


def test_whole_answers_are_kept_and_others_are_asked_for_again(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps(ANSWER).encode(), b"{}", b"\xff", b"null", json.dumps({**ANSWER, "answer": 3}).encode(),
        json.dumps({**ANSWER, "mean_tokens": float("nan")}).encode(), json.dumps({**ANSWER, "doc_id": 2}).encode(),
        json.dumps({**ANSWER, "doc_id": 3}).encode()[:40],
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    assert [line["doc_id"] for line in read_answers(file)] == [1, 2]
    assert read_answers(tmp_path) == read_answers(tmp_path / "nowhere") == []


@pytest.fixture
def cells(checkpoint, tmp_path, monkeypatch):
    """Two finished cells of a run whose evaluation is made up; the results folder and what was evaluated."""
    from test_sweep import Workers

    from eval.run import runner

    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    stand_in = Workers()
    monkeypatch.setattr(
        runner, "evaluate", lambda cells, out, command, **more: stand_in.evaluate(cells, out, command=command)
    )
    arguments = ["--model", str(checkpoint), "--task", "mini_gqa", "--method", "fastv", "--retain", "18"]
    arguments += ["--limit", "4", "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 0
    return arguments, stand_in, sorted((tmp_path / "out" / "cells" / "mini_gqa").glob("*.json"))


@pytest.mark.parametrize("kind", ["empty", "truncated", "null", "NaN", "another cell's", "another identity"])
def test_what_is_no_complete_result_is_computed_again(cells, kind, capsys):
    arguments, stand_in, (fastv, vanilla) = cells
    if kind == "another cell's":
        fastv.write_bytes(vanilla.read_bytes())
    elif kind == "another identity":
        content = json.loads(fastv.read_text())
        content["identity"]["limit"] = 5
        fastv.write_text(json.dumps(content))
    else:
        damage(fastv, kind)
    before = len(stand_in.evaluated)
    capsys.readouterr()
    assert run.main(arguments) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if fastv.name in line]
    assert len(told) == 1 and told[0].startswith("note: results: ") and told[0].endswith("it is computed again")
    assert stand_in.evaluated[before:] == ["mini_gqa fastv_18"] and read_record(fastv)["row"]["method"] == "fastv"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_folder_in_a_results_place_is_told_before_anything_runs(cells, suffix, capsys):
    arguments, stand_in, (fastv, _) = cells
    fastv.unlink()
    fastv.with_suffix(suffix).mkdir()
    before = len(stand_in.evaluated)
    assert run.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: OUT: ") and error.count("\n") == 1 and "is a folder" in error
    assert len(stand_in.evaluated) == before


def test_run_and_sweep_share_a_lock(cells, tmp_path, monkeypatch, capsys):
    from contextlib import ExitStack

    from eval.run.lock import lock

    arguments, *_ = cells
    monkeypatch.setattr("eval.run.lock.ORPHANS", 0.0)
    with ExitStack() as stack:
        lock(tmp_path / "out", stack)
        capsys.readouterr()
        assert run.main(arguments) == 2
        assert capsys.readouterr().err.startswith("error: OUT: another sweep or run is at work")
    assert run.main(arguments) == 0


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_pickles_in_a_results_folder_are_not_loaded(tmp_path, monkeypatch):
    folder = tmp_path / "jobs" / "x"
    folder.mkdir(parents=True)
    (folder / "1_submission.sh").touch()
    for number in ("7", "8_0"):
        (folder / f"{number}_submitted.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    (folder / "8_0_cells.json").write_text('{"keys": ["abc", 3]}')
    monkeypatch.setattr(jobs.slurm, "slurm_queue", lambda name: {"7": "RUNNING", "8_0": "PENDING", "../x": "RUNNING"})
    assert [(job.id, job.task.keys) for job in jobs.running_jobs(tmp_path)] == [
        ("7", []),
        ("8_0", ["abc"]),
        ("../x", []),
    ]
    assert not (tmp_path / "trace").exists()
