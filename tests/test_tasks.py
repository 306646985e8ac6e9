"""The benchmarks: synthetic tasks made here, scored by lmms-eval, and the registry of what can be run."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
from lmms_eval.api.model import lmms
from test_scenes import parse, solve

from eval import tasks
from eval.mini import questions, scenes
from eval.tasks import BENCHMARKS, GROUP, SUITE, TASKS, headline, question_scores, statistic
from eval.tasks.mini_mmbench import NONE

ROOT = Path(__file__).resolve().parents[1]
SMALL = 6
YES_NO = ("mini_mme", "mini_pope")


def module(task: str):
    return importlib.import_module(f"eval.tasks.{task}")


@pytest.fixture(scope="module")
def documents() -> dict[str, list[dict]]:
    """Every task's documents, without the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", lambda scene: None)
        return {task: list(module(task).documents()) for task in SUITE}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Tasks of a few scenes, in a cache of their own."""
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path))
    for task in SUITE:
        monkeypatch.setattr(module(task), "SCENES", SMALL)
    return tmp_path


# The data


@pytest.mark.parametrize("task", SUITE)
def test_a_thousand_questions_on_shared_unseen_pictures(documents, task):
    rows = documents[task]
    shown = {row["scene"] for row in rows}
    assert len(rows) >= 1000 and 2.5 <= len(rows) / len(shown) <= 5
    assert {scenes.split_of(scene) for scene in shown} == {"test"}
    others = {row["scene"] for other in SUITE if other != task for row in documents[other]}
    assert not shown & others
    names = Counter(row["question_id"] for row in rows)
    assert set(names.values()) == {TASKS[task].group}


@pytest.mark.parametrize("task", SUITE)
def test_answers_follow_from_the_scene(documents, task):
    for row in documents[task][::5]:
        answer = row[row["answer"]] if task == "mini_mmbench" else row["answer"]
        assert solve(scenes.generate_scene(row["scene"]), row["question"]) == (
            answer.lower() if task in YES_NO else answer
        )


@pytest.mark.parametrize("task", YES_NO)
def test_every_category_says_yes_and_no_equally_often(documents, task):
    counts = Counter((row["category"], row["answer"].lower()) for row in documents[task])
    assert len(counts) == 6 and len(set(counts.values())) == 1
    first = Counter(row["answer"].lower() for row in documents[task][:12])
    assert first["yes"] == first["no"]


def popularity(objects: list[scenes.Entity], attributes: dict[str, str]) -> int:
    return prod(len(questions.matches(objects, {name: value})) for name, value in attributes.items())


def test_objects_that_are_not_there(documents):
    """Random ones, ones that the scene's attributes suggest, and ones that differ from an object in one attribute."""
    for row in documents["mini_pope"][:150]:
        if row["answer"] == "yes":
            continue
        objects = scenes.generate_scene(row["scene"]).objects
        asked = parse(row["question"].rstrip("?"))
        if row["category"] == "adversarial":
            almost = [{k: v for k, v in asked.items() if k != name} for name in asked]
            assert any(questions.matches(objects, attributes) for attributes in almost)
        if row["category"] == "popular":
            values = product(*(questions.VALUES[name] for name in asked))
            absent = [
                other
                for other in (dict(zip(asked, chosen, strict=True)) for chosen in values)
                if not questions.matches(objects, other)
            ]
            assert 0 < popularity(objects, asked) == max(popularity(objects, other) for other in absent)


def test_pairs_are_neighbours_and_change_only_what_they_ask_for(documents):
    rows = documents["mini_mme"]
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        assert yes["question_id"] == no["question_id"] and (yes["answer"], no["answer"]) == ("Yes", "No")
        first, second = yes["question"].split(), no["question"].split()
        if yes["category"] != "existence":
            changed = [words for words in zip(first, second, strict=True) if set(words) != {"a", "an"}]
            (words,) = [pair for pair in changed if pair[0] != pair[1]]
            kinds = scenes.COLOR_NAMES if yes["category"] == "color" else questions.DIRECTIONS
            assert set(words) <= set(kinds)


def test_options_are_worded_as_in_training_and_shuffled(documents):
    rows = documents["mini_mmbench"]
    letters = {2: Counter(), 3: Counter(), 4: Counter()}
    for row in rows:
        options = [row[letter] for letter in questions.LETTERS if row[letter] != NONE]
        assert row["prompt"] == questions.choice_text(row["question"], options)
        assert len(set(options)) == len(options) and row[row["answer"]] in options
        letters[len(options)][row["answer"]] += 1
    for count, seen in letters.items():
        assert len(seen) == count and min(seen.values()) > 0.7 * seen.total() / count
    assert set(Counter(row["category"] for row in rows)) == set(questions.TYPES)


def test_no_word_is_lost_in_scoring(documents):
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    clean = EvalAIAnswerProcessor()
    words = {row["answer"] for row in documents["mini_textvqa"]}
    assert len({clean(word) for word in words}) == len(words) and all(clean(word) for word in words)
    assert not any(clean(word) for word in module("mini_textvqa").ARTICLES)


def test_the_same_data_wherever_they_are_made(cache, monkeypatch):
    folder = tasks.prepare(GROUP)
    made = {path.name: path for path in cache.rglob("*.parquet")}
    assert set(made) == {f"{task}.parquet" for task in SUITE}
    assert {path.name for path in folder.iterdir()} == {f"{task}.yaml" for task in (*SUITE, GROUP)}
    written = {path: path.stat().st_mtime_ns for path in made.values()}
    assert tasks.prepare(GROUP) == folder and tasks.prepare("mini_pope").is_dir()
    assert all(path.stat().st_mtime_ns == time for path, time in written.items()), "made twice"
    monkeypatch.setenv("MUSTDROP_CACHE", str(cache / "elsewhere"))
    again = tasks.prepare("mini_mme") / "mini_mme.parquet"
    assert again != made[again.name] and again.read_bytes() == made[again.name].read_bytes()


def test_fingerprint_covers_what_the_data_come_from(tmp_path, monkeypatch):
    before = {task: tasks.fingerprint(task) for task in (*SUITE, GROUP)}
    assert len(set(before.values())) == len(before)
    for name in ("scenes.py", "questions.py"):
        (tmp_path / name).write_bytes((tasks.GENERATOR / name).read_bytes())
    monkeypatch.setattr(tasks, "GENERATOR", tmp_path)
    assert {task: tasks.fingerprint(task) for task in before} == before
    (tmp_path / "questions.py").write_text("changed")
    assert not set(before.values()) & {tasks.fingerprint(task) for task in before}


# Scoring, through lmms-eval


class Answerer(lmms):
    """Knows the documents; says what a function of the document and its number makes of the right answer."""

    is_simple = True

    def __init__(self, say) -> None:
        super().__init__()
        self.say = say

    def generate_until(self, requests) -> list[str]:
        answers = []
        for _, _, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            document = self.task_dict[task][split][doc_id]
            assert doc_to_visual(document)[0].mode == "RGB"
            answers.append(self.say(document, doc_id))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


def half_right(document: dict, doc_id: int) -> str:
    if document["answer"].lower() in ("yes", "no"):
        return "yes"
    return document["answer"] if doc_id % 2 == 0 else "nothing"


def noisy(document: dict, doc_id: int) -> str:
    """Right, wrong or of no use; some letters with their option, as free models answer."""
    answer = document["answer"]
    other = {"yes": "no", "no": "yes", "A": "B. " + document.get("B", "")}.get(answer.lower(), "A")
    return [answer, answer.lower(), other, "well"][np.random.default_rng(doc_id).integers(4)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> dict[str, dict]:
    """lmms-eval's results on the group of all tasks, six scenes each, for three ways of answering."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        empty = tmp_path_factory.mktemp("empty")
        patch.chdir(empty)
        patch.setenv("MUSTDROP_CACHE", str(tmp_path_factory.mktemp("cache")))
        for task in SUITE:
            patch.setattr(module(task), "SCENES", SMALL)
        manager = TaskManager("WARNING", include_path=str(tasks.prepare(GROUP)), include_defaults=False)
        found = {
            name: simple_evaluate(model=Answerer(say), tasks=[GROUP], task_manager=manager, bootstrap_iters=0)
            for name, say in {
                "right": lambda document, _: document["answer"],
                "half": half_right,
                "noisy": noisy,
            }.items()
        }
        assert not list(empty.iterdir()), "scoring left files behind"
    assert os.getcwd() == before
    return found


def test_the_model_sees_the_bare_question(evaluated):
    for task in SUITE:
        for sample in evaluated["right"]["samples"][task]:
            document, (context, settings, *_) = sample["doc"], sample["arguments"]
            assert context == document.get("prompt", document["question"])
            assert settings["max_new_tokens"] == 8 and not settings["do_sample"]


@pytest.mark.parametrize("task", SUITE)
def test_right_answers_get_all_points(evaluated, task):
    full = 600 if task == "mini_mme" else 100
    results = evaluated["right"]
    assert headline(task, results["results"][task]) == pytest.approx(full)
    assert set(question_scores(task, results["samples"][task])) == {1.0}


@pytest.mark.parametrize("task", SUITE)
def test_half_right_answers(evaluated, task):
    """Always yes has a recall of 1 and a precision of one half, and one right answer of each pair."""
    score = headline(task, evaluated["half"]["results"][task])
    scores = question_scores(task, evaluated["half"]["samples"][task])
    if task == "mini_mme":
        assert score == pytest.approx(150)
    elif task == "mini_pope":
        assert score == pytest.approx(200 / 3)
    else:
        assert score == pytest.approx(100 * np.mean(scores))
    assert np.mean(scores) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("answers", ["right", "half", "noisy"])
@pytest.mark.parametrize("task", SUITE)
def test_the_statistic_of_all_questions_is_the_headline(evaluated, task, answers):
    samples = evaluated[answers]["samples"][task]
    score, units = statistic(task, samples)
    assert units == len(samples) // TASKS[task].group
    assert score(np.arange(units)) == pytest.approx(headline(task, evaluated[answers]["results"][task]))


def recorded(task: str, entries: list) -> list[dict]:
    """lmms-eval's sample log, as far as it is read."""
    return [{TASKS[task].metrics[0]: entry} for entry in entries]


def test_resampled_f1_is_that_of_the_drawn_questions():
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_process_results

    rng = np.random.default_rng(0)
    said = rng.choice(["yes", "no", "Yes, there is"], 60)
    truth = rng.choice(["yes", "no"], 60)
    samples = [
        pope_process_results({"question_id": i, "answer": str(answer)}, [str(word)])
        for i, (answer, word) in enumerate(zip(truth, said, strict=True))
    ]
    score, units = statistic("pope", samples)
    for drawn in (np.arange(units), rng.integers(units, size=units), np.flatnonzero(said == "no")):
        expected = pope_aggregate_f1_score([samples[i]["pope_f1_score"] for i in drawn])
        assert score(drawn) == pytest.approx(100 * expected)


def test_resampled_points_are_those_of_the_drawn_pairs():
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results

    rng = np.random.default_rng(0)
    categories = ["existence", "OCR", "code_reasoning"]
    samples = [
        mme_process_results(
            {"question_id": f"{pair}.png", "answer": answer, "category": categories[pair % 3]},
            [str(rng.choice(["Yes", "No"]))],
        )
        for pair in range(30)
        for answer in ("Yes", "No")
    ]

    def expected(pairs) -> float:
        perception, cognition = [], []
        for number, pair in enumerate(pairs):
            for sample in samples[2 * pair : 2 * pair + 2]:
                ((metric, entry),) = sample.items()
                named = {**entry, "question_id": number}
                (perception if metric == "mme_perception_score" else cognition).append(named)
        return mme_aggregate_results(perception) + mme_aggregate_results(cognition)

    score, units = statistic("mme", samples)
    assert units == 30 and len(question_scores("mme", samples)) == 60
    for drawn in (np.arange(units), rng.integers(units, size=units)):
        assert score(drawn) == pytest.approx(expected(drawn))
    all_ocr = np.arange(1, 30, 3)
    assert score(all_ocr) == score(np.arange(units)), "a category was counted as lost because it was not drawn"
    both = {"mme_perception_score,none": 1000.0, "mme_cognition_score,none": 300.0}
    assert headline("mme", both) == 1300 and headline("mme", dict([both.popitem()])) == 300


def test_rotated_options_count_once(capsys):
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    options = {"A": "red", "B": "blue", "C": "nan", "D": "nan"}
    said = ["A", "B", "B. blue", "red", "The answer is (B)", "B", "no idea"]
    truth = ["A", "B", "B", "A", "B", "A", "B"]
    index = [1, 2, 3, 1_000_001, 1_000_002, 1_000_003, 4]
    common = {"question": "?", "hint": "nan", "category": "x", "L2-category": "y", "E": "nan", **options}
    entries = [
        {**common, "index": i, "prediction": word, "answer": right}
        for i, word, right in zip(index, said, truth, strict=True)
    ]
    samples = recorded("mmbench_en_dev_static", entries)
    assert question_scores("mmbench_en_dev_static", samples) == [1, 1, 1, 1, 1, 0, 0]
    score, units = statistic("mmbench_en_dev_static", samples)
    overall, *_ = MMBench_Evaluator().eval_result(entries, eval_method="static")
    assert units == 4 and score(np.arange(4)) == pytest.approx(100 * overall) == 50
    assert score(np.array([0, 0, 1])) == 100


def test_other_formats_of_samples():
    letters = [
        {"seed_image": {}, "seed_all": {"pred": word, "answer": "A", "question_id": 0}} for word in ("A", "b", "a")
    ]
    assert question_scores("seedbench", letters) == [1, 0, 1]
    assert statistic("seedbench", letters)[0](np.array([0, 1])) == 50
    assert question_scores("vqav2_val", recorded("vqav2_val", [0.6])) == [0.6]
    judged = recorded("mmvet", [{"score": 0.5, "question_id": "v1"}, {"score": 0.0, "question_id": "v2"}])
    assert question_scores("mmvet", judged) == [0.5, 0] and statistic("mmvet", judged)[0](np.arange(2)) == 25
    assert headline("mmvet", {"gpt_eval_score,none": 25.0}) == 25
    with pytest.raises(KeyError, match="pope_f1_score"):
        headline("pope", {"alias": "pope"})


# The registry


@pytest.fixture(scope="module")
def stock_yamls() -> dict[str, Path]:
    """Where the installed lmms-eval keeps the tasks of its YAML files."""
    folders = {"gqa", "mmbench", "mme", "pope", "scienceqa", "vqav2", "textvqa", "vizwiz_vqa", "seedbench", "mmvet"}
    found = {}
    for path in (path for folder in folders for path in (tasks._stock_tasks() / folder).glob("*.yaml")):
        if name := re.search(r"""^task: *["']?([\w-]+)["']? *$""", path.read_text(encoding="utf-8"), re.M):
            found[name[1]] = path
    return found


IMAGES = [name for name, benchmark in BENCHMARKS.items() if not TASKS[benchmark.stock].videos]
"""Benchmarks whose tasks are lmms-eval's own; those of videos are read from the authors' files."""


@pytest.mark.parametrize("name", IMAGES)
def test_lmms_eval_has_the_task_and_its_metrics(stock_yamls, name):
    from lmms_eval.utils import load_yaml_config

    stock = BENCHMARKS[name].stock
    config = load_yaml_config(str(stock_yamls[stock]), mode="simple")
    assert set(TASKS[stock].metrics) <= {metric["metric"] for metric in config["metric_list"]}
    assert TASKS[stock].gated == BENCHMARKS[name].gated == bool((config.get("dataset_kwargs") or {}).get("token"))
    assert not TASKS[stock].synthetic and not tasks.is_local(stock)
    assert TASKS[BENCHMARKS[name].mini].synthetic and tasks.is_local(BENCHMARKS[name].mini)


def test_synthetic_tasks_say_so():
    for task in SUITE:
        text = (tasks.ROOT / task / f"{task}.yaml").read_text(encoding="utf-8")
        assert "synthetic: true" in text and f"# {task}: a synthetic benchmark" in text and "It is not" in text
        assert "synthetic" in module(task).__doc__
        benchmark = BENCHMARKS[tasks.mirrored(task)]
        assert benchmark.mini == task and tasks.mirrored(benchmark.stock) == tasks.mirrored(task)
        assert TASKS[task].metrics[0] == TASKS[benchmark.stock].metrics[0]
        assert TASKS[task].scale == TASKS[benchmark.stock].scale
    with pytest.raises(ValueError, match="task: got 'gqqa'"):
        tasks.mirrored("gqqa")


def test_a_script_per_benchmark():
    scripts = {path.stem.removeprefix("eval_"): path for path in (ROOT / "scripts").glob("eval_*.sh")}
    del scripts["next"], scripts["video"]  # a family of models on several benchmarks each
    assert set(scripts) == set(IMAGES)
    for name, path in scripts.items():
        text = path.read_text(encoding="utf-8")
        assert f'\nexec python -m mustdrop_command run --task {name} "$@"\n' in text and os.access(path, os.X_OK)
        assert name == "gqa" or f"lmms-eval's {BENCHMARKS[name].stock}." in text
        assert f"synthetic {BENCHMARKS[name].mini}" in text
