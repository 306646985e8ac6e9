"""Zero-shot video benchmarks from the authors' files to rows, predictions and tables."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import clips
import pytest
import stock
import stock_folders

from eval import tasks
from eval.calibrate import thresholds as calibrate
from eval.report.html import task_tables
from eval.report.results import load
from eval.run import command as run
from eval.run import predictions
from eval.tasks import BENCHMARKS, SUITE, TASKS, mini_video, video_qa
from eval.tasks.video_qa import scoring
from mustdrop.read import read_yaml

ASKED = ["--method", "divprune", "--retain", "40"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    for name in ("MODEL", "LIMIT", "RETAIN", "OUT", "BATCH_SIZE", video_qa.ROOT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "NEW_TOKENS", {True: 3, False: 3})


@pytest.fixture
def root(tmp_path, monkeypatch):
    """All four benchmarks in the authors' folders."""
    monkeypatch.setenv(video_qa.ROOT, str(tmp_path / "data"))
    for source in video_qa.SOURCES.values():
        clips.write_benchmark(tmp_path / "data" / source.folder, videos=source.videos)
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch):
    """A synthetic benchmark of four questions."""
    monkeypatch.setattr(mini_video, "write", lambda folder: folder.exists() or clips.write_benchmark(folder))


@pytest.fixture(scope="module")
def video_llava(tmp_path_factory, tokenizer_folder):
    return stock_folders.save(
        tmp_path_factory.mktemp("stock") / "Video-LLaVA-tiny-hf", "video", "llama", tokenizer_folder
    )


# Files


def test_answers_go_by_id_and_videos_by_name(root):
    for task, source in video_qa.SOURCES.items():
        video_qa.check(task)
        read = video_qa.read(video_qa.folder_of(task), source.videos)
        expected = [clips.ANSWERS[number % 3] for number in range(4)]
        assert [document["answer"] for document in read] == expected and all(one["found"] for one in read)
        assert {document["video"].rsplit("/", 1)[0] for document in read} == {str(root / source.folder / source.videos)}


@pytest.mark.parametrize("place", video_qa.PLACES)
@pytest.mark.parametrize(("name", "file"), [("a", "a.mp4"), ("a.avi", "a.avi"), ("b", "v_b.mkv")])
def test_videos_are_found_where_authors_keep_them(place, name, file, tmp_path):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / file).touch()
    (tmp_path / "test_q.json").write_text(json.dumps([{"video_name": name, "question": "q", "question_id": 3}]))
    (tmp_path / "test_a.json").write_text(json.dumps([{"answer": 2, "question_id": "3"}]))
    (document,) = video_qa.read(tmp_path)
    assert document["video"] == str(tmp_path / place / file) and document["found"]
    assert (document["question_id"], document["answer"]) == ("3", "2")


def no_root(root, patch):
    patch.delenv(video_qa.ROOT)
    return "VIDEO_QA: not set; msvd_qa needs the folder that holds TGIF_Zero_Shot_QA, MSVD"


def no_folder(root, patch):
    shutil.rmtree(root / "MSVD_Zero_Shot_QA")
    return "VIDEO_QA: there is no folder '.*MSVD_Zero_Shot_QA'"


def no_answers(root, patch):
    (root / "MSVD_Zero_Shot_QA" / "test_a.json").unlink()
    return "VIDEO_QA: there is no file '.*test_a.json'"


def no_answer(root, patch):
    file = root / "MSVD_Zero_Shot_QA" / "test_a.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    return "test_a.json: has no answer to question 'clip0_0'"


def no_video(root, patch):
    (root / "MSVD_Zero_Shot_QA" / "videos" / "clip1.avi").unlink()
    return "VIDEO_QA: there is no video 'clip1' of question 'clip1_2' below '.*MSVD_Zero_Shot_QA'"


def no_videos(root, patch):
    shutil.rmtree(root / "MSVD_Zero_Shot_QA" / "videos")
    return "VIDEO_QA: there is no folder '.*videos' of videos"


def a_name_twice(root, patch):
    file = root / "MSVD_Zero_Shot_QA" / "test_q.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps([*entries, entries[0]]))
    return "test_q.json: question_id 'clip0_0' is there twice"


def no_list(root, patch):
    (root / "MSVD_Zero_Shot_QA" / "test_q.json").write_text("{}")
    return "test_q.json: it must hold a list of mappings with video_name, question, question_id"


def no_question(root, patch):
    (root / "MSVD_Zero_Shot_QA" / "test_q.json").write_text('[{"video_name": "a", "question_id": 1}]')
    return "test_q.json: entry 0 lacks question"


def no_json(root, patch):
    (root / "MSVD_Zero_Shot_QA" / "test_q.json").write_text("[{")
    return "test_q.json: "


def outside(root, patch):
    file = root / "MSVD_Zero_Shot_QA" / "test_q.json"
    (root / "elsewhere.avi").touch()
    file.write_text(json.dumps([{"video_name": "../../elsewhere", "question": "q", "question_id": "clip0_0"}]))
    return "VIDEO_QA: there is no video '../../elsewhere'"


KINDS = [no_root, no_folder, no_answers, no_answer, no_video, no_videos, a_name_twice, no_list, no_question, no_json]


@pytest.mark.parametrize("kind", [*KINDS, outside], ids=lambda kind: kind.__name__)
def test_what_is_missing_is_one_line_before_any_model_is_loaded(kind, root, monkeypatch, checkpoint, capsys):
    from eval.run.inference import LoadedModel

    monkeypatch.setattr(LoadedModel, "load", lambda *_, **__: pytest.fail("loaded"))
    match = kind(root, monkeypatch)
    other = shutil.copytree(checkpoint, root.parent / "a-model")
    assert run.main(["--task", "msvd", "--model", str(other), *ASKED]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(match, said), said


def test_videos_that_are_missing_are_counted_or_skipped(root, video_llava, tmp_path, capsys):
    """What is no longer on the internet: said with its number, left out on demand, and counted as wrong."""
    words = ["--task", "msvd", "--model", str(video_llava), *ASKED, "--out", str(tmp_path / "out")]
    (root / "MSVD_Zero_Shot_QA" / "videos" / "clip1.avi").unlink()
    assert run.main(words) == 2 and "2 of 4 questions lack theirs, --skip-unfit" in capsys.readouterr().err
    assert run.main([*words, "--skip-unfit"]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["n"], row["skipped"]) for row in rows] == [(4, 2)] * 2
    (root / "MSVD_Zero_Shot_QA" / "videos" / "clip0.avi").unlink()
    assert run.main([*words, "--skip-unfit"]) == 2 and "4 of 4 questions lack theirs" in capsys.readouterr().err


def test_a_video_beyond_the_limit_may_be_missing(root):
    (root / "TGIF_Zero_Shot_QA" / "mp4" / "clip1.avi").unlink()
    video_qa.check("tgif_qa", limit=2)
    with pytest.raises(ValueError, match="clip1"):
        video_qa.check("tgif_qa", limit=3)


def test_fingerprint_follows_questions_answers_and_videos(root):
    folder = root / "MSRVTT_Zero_Shot_QA"
    found = {tasks.fingerprint("msrvtt_qa"), tasks.fingerprint("mini_video")}
    for name in ("test_a.json", "test_q.json"):
        (folder / name).write_text((folder / name).read_text().replace("one", "1").replace("moving", "going"))
        found.add(tasks.fingerprint("msrvtt_qa"))
    clips.write(folder / "videos" / "all" / "clip0.avi", clips.frames(20))
    found.add(tasks.fingerprint("msrvtt_qa"))
    assert len(found) == 5


# Scores


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "contained"),
    [
        ("Dog.", "dog", 1, 1),
        ("the dog", "dog", 1, 1),
        ("two", "2", 1, 1),
        ("A man is riding a horse.", "horse", 0, 1),
        ("I do not know", "no", 0, 0),
        ("no", "know", 0, 0),
        ("a dog and a cat", "dog cat", 0, 0),
        ("play the guitar", "guitar playing", 0, 0),
        ("in a swimming pool, swimming", "swimming pool", 0, 1),
        ("", "dog", 0, 0),
        ("don't", "dont", 0, 0),
        ("a", "a", 1, 1),
    ],
)
def test_exact_match_and_containment(said, wanted, exact, contained):
    found = scoring.process_results({"answer": wanted}, [said])
    assert found == {"exact_match": exact, "containment": contained}


# From file to table


def rows_of(out) -> list[dict]:
    return json.loads((out / "summary.json").read_text())["rows"]


def test_a_stock_video_llava_answers_the_authors_files(root, video_llava, tmp_path, capsys):
    words = ["--task", "msvd", "activitynet", "--model", str(video_llava), "--limit", "3", *ASKED]
    assert run.main([*words, "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["task"], row["method"]) for row in rows] == [
        (task, method) for task in ("msvd_qa", "activitynet_qa") for method in ("vanilla", "divprune")
    ]
    for row in rows:
        assert row["n"] == 3 and not row["synthetic"] and row["metric"] == "containment"
        assert row["score"] == pytest.approx(100 * row["matches"]["containment"])
        kept = 8 * stock.SIDE**2 if row["method"] == "vanilla" else 40
        assert row["mean_tokens"] == kept == pytest.approx(sum(row["tokens_per_view"]))
        assert len(row["tokens_per_view"]) == 8
        assert row["flops_reduction"] > 0.1 if row["method"] == "divprune" else row["flops_reduction"] == 0
    printed = capsys.readouterr().out
    assert "exact match %" in printed and "containment %" in printed and "frame 8" in printed
    files = sorted((tmp_path / "out" / "predictions").rglob("*.jsonl"))
    assert len(files) == 4
    read = predictions.read(files[0])
    assert [one["id"] for one in read] == ["clip0_0", "clip0_1", "clip1_2"]
    assert [one["answer"] for one in read] == list(clips.ANSWERS) and set(read[0]) == set(predictions.FIELDS)
    results, _ = load([tmp_path / "out"])
    assert any("frame 8" in table["headers"] for one in task_tables(results) for table in one["tables"])
    capsys.readouterr()
    assert run.main([*words, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.count("finished earlier") == 4


def test_the_embedded_model_gets_the_synthetic_task_once(small, checkpoint, tmp_path):
    words = ["--task", "tgif", "msvd", "msrvtt", "activitynet", "--model", str(checkpoint)]
    assert run.main([*words, *ASKED, "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["task"], row["synthetic"], row["metric"]) for row in rows] == [("mini_video", True, "exact_match")] * 2
    assert rows[1]["mean_tokens"] == 40 and rows[1]["score"] == pytest.approx(100 * rows[1]["matches"]["exact_match"])


def test_image_tasks_know_nothing_of_videos(small, checkpoint, tmp_path):
    assert "mini_video" not in SUITE and TASKS["mini_video"].synthetic
    assert not any(TASKS[task].videos for task in SUITE)


def test_calibration_refuses_videos(checkpoint, capsys):
    assert calibrate.main(["--model", str(checkpoint), "--task", "mini_video", "--retain", "20"]) == 2
    assert "task: got 'mini_video', expected one of mini_gqa" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, one in BENCHMARKS.items() if TASKS[one.stock].videos])
def test_a_video_benchmark_is_read_from_files_and_runs_by_one_script(name):
    stock_task, mini = BENCHMARKS[name].stock, BENCHMARKS[name].mini
    assert mini == "mini_video" and stock_task in video_qa.SOURCES and tasks.is_local(stock_task)
    assert not TASKS[stock_task].synthetic and not TASKS[stock_task].gated and TASKS[mini].synthetic
    root = Path(__file__).resolve().parents[1] / "configs" / "sweeps"
    assert name in read_yaml(root / "video.yaml")["tasks"] and mini in read_yaml(root / "video_mini.yaml")["tasks"]


def test_out_of_reach_counts_all_frames(small, checkpoint, capsys):
    words = ["--task", "mini_video", "--model", str(checkpoint)]
    for method, retain, said in (
        ("divprune", 8 * 36 + 1, "has only 288 vision tokens"),
        ("evs", 35, "at least 36, a frame"),
    ):
        assert run.main([*words, "--method", method, "--retain", str(retain)]) == 2
        assert said in capsys.readouterr().err
