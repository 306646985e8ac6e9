"""The evaluation: synthetic task, lmms-eval plugin, runner, summary, calibration."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from eval import statistics, tasks
from eval.methods import method_at, read_method
from eval.mini import questions, scenes
from eval.provenance import replace_file
from eval.report import summary
from eval.report.results import frame_of
from eval.run import command as run
from eval.run import rows, samples, settings
from eval.run.cell import Cell
from eval.run.inference import LoadedModel, ahead
from eval.run.lmms import LlavaMustDrop
from eval.tasks import mini_gqa
from mustdrop.cost import ModelShape

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small_task(tmp_path, monkeypatch) -> None:
    """mini_gqa with six scenes, in a cache of its own."""
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mini_gqa, "SCENES", 6)


@pytest.fixture
def configs(tmp_path) -> Path:
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "mustdrop_9.yaml").write_text("method: mustdrop\nglobal_threshold: 0.05\nindividual_threshold: 0.5\n")
    return folder


# The synthetic task


def test_benchmark_is_large_balanced_and_held_out(monkeypatch):
    monkeypatch.setattr(scenes, "render", lambda scene: None)
    documents = list(mini_gqa.documents())
    kinds = [document["type"] for document in documents]
    held_out = {document["scene"] for document in documents}
    assert len(documents) >= 1000 and len(held_out) >= 300
    assert len({document["question_id"] for document in documents}) == len(documents)
    assert all(kinds.count(kind) >= 150 for kind in questions.TYPES)
    assert {scenes.split_of(scene) for scene in held_out} == {"test"}
    trained = {scene for *_, scene in questions.scene_questions("train", 500, per_scene=1)}
    assert {scenes.split_of(scene) for scene in trained} == {"train"} and not trained & held_out


def test_benchmark_is_the_same_wherever_it_is_made(small_task, tmp_path, monkeypatch):
    first = tasks.prepare("mini_gqa") / "mini_gqa.parquet"
    content, written = first.read_bytes(), first.stat().st_mtime_ns
    assert tasks.prepare("mini_gqa") / "mini_gqa.parquet" == first
    assert first.stat().st_mtime_ns == written, "it was made twice"
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "elsewhere"))
    second = tasks.prepare("mini_gqa") / "mini_gqa.parquet"
    assert second != first and second.read_bytes() == content


# Summary


def record(tokens: float, milliseconds: float = 1.0, layers: int = 32) -> dict:
    return {
        "images": [{"patches": 576, "tokens": 576, "blocks": []}],
        "before_mlp": False,
        "plans": {},
        "text_tokens": 0,
        "vision_tokens": [tokens] * layers,
        "cache_lengths": [tokens] * layers,
        "cache_bytes": 1000 * tokens,
        "selector_macs": 7 * tokens,
        "selector_prompt": {"images": 1, "text_tokens": 0, "vision_tokens": tokens},
        "mean_tokens": float(tokens),
        "mean_tokens_official": float(tokens),
        "times_ms": {"prefill": milliseconds},
    }


def row(method: str, scores: list[float], records: list[dict]) -> dict:
    shape = ModelShape.named("llava-1.5-7b")
    records = [{**record, "flops": rows.flops(record, shape)} for record in records]
    names = {
        "model": "m",
        "task": "t",
        "method": method,
        "retain": 64,
        "seed": 0,
        "limit": None,
        "metric": "exact_match",
    }
    answers = rows.answered(scores, ["a", "a", "b", "b"])
    return {**names, "metric": "exact_match", "score": 100 * answers["accuracy"], **answers, **rows.measured(records)}


def test_row_and_shares():
    plain = row("vanilla", [1, 1, 1, 0], [record(576, t) for t in (1, 2, 3, 400)])
    cut = row("mustdrop", [1, 1, 0, 0], [record(64)] * 4)
    assert (plain["n"], plain["accuracy"], plain["prefill_ms"], plain["mean_tokens"]) == (4, 0.75, 2.5, 576)
    assert plain["flops_reduction"] == pytest.approx(0, abs=1e-6)
    assert cut["flops_reductions"]["vision-only"] == pytest.approx(0.891, abs=5e-4)
    assert cut["flops_reduction"] < cut["flops_reductions"]["vision-only"]
    assert cut["selector_macs"] == 7 * 64 and cut["selector_prompt"]["vision_tokens"] == 64
    assert cut["accuracy_by_type"] == {"a": {"accuracy": 1, "n": 2}, "b": {"accuracy": 0, "n": 2}}
    low, high = cut["ci95"]
    assert 0 < low < 0.5 < high < 1
    results = [({"row": one, "identity": {}, "provenance": {}}, Path("a.json")) for one in (plain, cut)]
    frame = frame_of(results)
    assert list(frame.share) == [100, pytest.approx(200 / 3)] and frame_of(results[1:]).share[0] is None
    text = summary.render(*summary.table(frame), "github")
    assert "64.0" in text and "50.0 (15.0-85.0)" in text and "66.7 %" in text


def test_wilson_interval_against_its_formula():
    correct, n, z = 37, 60, 1.959964
    share, width = correct / n, z * math.sqrt(correct * (n - correct) / n**3 + z * z / (4 * n * n))
    middle = share + z * z / (2 * n)
    expected = [(middle + sign * width) / (1 + z * z / n) for sign in (-1, 1)]
    assert statistics.share_interval(correct, n) == pytest.approx(expected, abs=1e-6)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = torch.arange(400).remainder(4).double().numpy()
    low, high = statistics.bootstrap_interval(lambda drawn: values[drawn].mean(), len(values))
    width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((1.5 - width, 1.5 + width), abs=0.02)
    assert statistics.bootstrap_interval(lambda drawn: 7.0, 1) == (7, 7)


def test_kept_patches_survive_packing():
    kept = {"vision": {0: [0, 7, 8]}, "prefill": {1: [8], 3: [8], 5: []}, "decode": {}}
    packed = samples.pack_stages(kept, 9)
    assert packed == {"vision": {"0": "8180"}, "prefill": {"1": "0080", "5": "0000"}, "decode": {}}
    assert samples.patches("8180", 9).nonzero()[0].tolist() == [0, 7, 8]


# Methods


def test_settings_from_names_files_and_fields(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("method: mustdrop\nkey_rate: 0.1\n")
    assert read_method() == {"method": "vanilla"}
    assert read_method("mustdrop", {"filter_layers": "'[1, 2]'"}) == {"method": "mustdrop", "filter_layers": [1, 2]}
    assert read_method(str(file), {"key_rate": 0.2}) == {"method": "mustdrop", "key_rate": 0.2}
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        read_method("nowhere.yaml")


def test_a_models_own_thresholds_come_first(configs):
    published = configs / "mustdrop_9.yaml"
    assert method_at("some/model", "mustdrop", 9, configs)[1] == published
    own = configs / "model" / "mustdrop_9.yaml"
    own.parent.mkdir()
    own.write_text(published.read_text())
    settings, file = method_at("some/model", "mustdrop", 9, configs)
    assert file == own and settings["global_threshold"] == 0.05
    assert method_at("some/model", "fastv", 10, configs) == ({"method": "fastv", "retain": 10}, None)
    with pytest.raises(ValueError, match="mustdrop calibrate --model some/model --method mustdrop --retain 10"):
        method_at("some/model", "mustdrop", 10, configs)
    whole = own.with_name("mustdrop.yaml")
    whole.write_text("method: mustdrop\nat:\n  9: {global_threshold: 0.07}\n  8: {global_threshold: 0.08}\n")
    assert method_at("some/model", "mustdrop", 9, configs) == ({"method": "mustdrop", "global_threshold": 0.07}, whole)
    assert read_method(str(whole), {"retain": "8", "window": "2"}) == method_at("model", "mustdrop", 8, configs)[0] | {
        "window": 2
    }
    whole.unlink()
    own.write_text("method: mustdrop\nkey_rte: 1\n")
    with pytest.raises(ValueError, match=r"mustdrop_9\.yaml: .*key_rte"):
        method_at("some/model", "mustdrop", 9, configs)


# The plugin


def test_registered_with_lmms_eval():
    from lmms_eval.models import get_model

    assert get_model("llava_mustdrop") is LlavaMustDrop


def test_bad_setting_is_named_before_anything_is_loaded():
    with pytest.raises(ValueError, match="key_rte"):
        LlavaMustDrop(pretrained="nowhere/nothing", method="mustdrop", key_rte=0.1)
    with pytest.raises(ValueError, match="batch_size"):
        LlavaMustDrop(pretrained="nowhere/nothing", batch_size="many")


DOCUMENTS = [
    {"images": [Image.new("RGB", (90, 60), color)] * count, "text": text}
    for color, count, text in [
        ("red", 1, "What is this?"),
        ("blue", 2, "How many?"),
        ("green", 0, "Who are you today?"),
    ]
]


def requests(kind: str, *middle, context: str | None = None) -> list[Instance]:
    """One request per document; ``middle`` stands between the context and the document."""
    return [
        Instance(
            request_type=kind,
            arguments=(context or document["text"], *middle, index, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": index, "repeats": 1},
        )
        for index, document in enumerate(DOCUMENTS)
    ]


def plugin(loaded, **settings) -> LlavaMustDrop:
    model = LlavaMustDrop(loaded=loaded, **settings)
    model.task_dict["task"] = {"test": DOCUMENTS}
    return model


def visuals(document: dict) -> list:
    return document["images"]


@pytest.mark.parametrize("method", ["vanilla", "mustdrop"])
def test_batches_answer_like_single_questions(loaded, method, tmp_path):
    asked = requests("generate_until", {"max_new_tokens": 4, "temperature": 0, "until": ["\n\n"]}, visuals)
    single = plugin(loaded, method=method)
    batched = plugin(loaded, method=method, batch_size=3, samples=str(tmp_path / "s.jsonl"))
    assert single.generate_until(asked) == batched.generate_until(asked)
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert sorted(line["doc_id"] for line in lines) == [0, 1, 2] and all("kept" in line for line in lines)
    counts = {line["doc_id"]: line["vision_tokens"][0] for line in lines}
    assert counts == {r["doc_id"]: r["vision_tokens"][0] for r in single.records} and counts[2] == 0


def test_next_batch_is_prepared_meanwhile():
    begun, second = [], Event()

    def prepare(item: int) -> int:
        begun.append(item)
        if item == 1:
            second.set()
        if item == 3:
            raise ValueError("picture 3 cannot be read")
        return 10 * item

    results, got = ahead(prepare, range(5)), []
    with pytest.raises(ValueError, match="picture 3"):
        for result in results:
            got.append(result)
            assert second.wait(10)  # while the caller still holds the first
    assert got == [0, 10, 20] and begun[:4] == [0, 1, 2, 3]


def test_spread_over_devices_answers_alike(loaded, checkpoint):
    spread = LoadedModel.load(str(checkpoint), device_map="auto")
    asked = requests("generate_until", {"max_new_tokens": 4}, visuals)
    settings = {"method": "mustdrop", "batch_size": 3}
    assert plugin(spread, **settings).generate_until(asked) == plugin(loaded, **settings).generate_until(asked)


def test_loglikelihood_is_the_models_own_loss(loaded):
    continuation = "a red stop sign"
    asked = requests("loglikelihood", continuation, visuals)
    results = plugin(loaded, batch_size=3).loglikelihood(asked)
    for document, (loss, _) in zip(DOCUMENTS, results, strict=True):
        prompts = [loaded.prompt(document["text"], len(document["images"]), answer) for answer in (None, continuation)]
        start = len(loaded.encode(prompts[0]))
        inputs = loaded.inputs(prompts[1:], [document["images"]])
        labels = inputs["input_ids"].clone()
        labels[:, :start] = -100
        with torch.inference_mode():
            expected = loaded.model(input_ids=inputs["input_ids"], labels=labels, images=inputs["images"]).loss
        assert loss == pytest.approx(float(expected), abs=1e-4)


def test_greedy_answer_is_recognised_by_loglikelihood(loaded):
    model = plugin(loaded, method="mustdrop", global_threshold=0.05)
    prompt = loaded.prompt(DOCUMENTS[0]["text"], 1)
    with model.reducer.on(loaded.model):
        ids = loaded.model.generate(
            **loaded.inputs([prompt], [DOCUMENTS[0]["images"]]), max_new_tokens=5, do_sample=False
        )
    (_, greedy), (_, other) = model._score([prompt] * 2, [DOCUMENTS[0]["images"]] * 2, [ids[0].tolist(), [5, 6, 7]])
    assert greedy and not other


def test_rounds_go_on_until_the_task_says_so(loaded):
    seen = []

    def doc_to_text(document, previous_output, round_idx, previous_round_info):
        seen.append((document["text"], round_idx, previous_round_info))
        stop = round_idx == (2 if document is DOCUMENTS[1] else 1)
        return document["images"], "and now?", stop, previous_output, f"after {round_idx}"

    asked = requests("generate_until_multi_round", {"max_new_tokens": 2}, visuals, doc_to_text)
    outputs = plugin(loaded, batch_size=2).generate_until_multi_round(asked)
    assert [len(answers) for answers in outputs] == [1, 2, 1]
    assert ("How many?", 2, "after 1") in seen


# The runner, end to end through lmms-eval


def arguments(checkpoint, configs, out, *more) -> list[str]:
    return [
        "--model",
        str(checkpoint),
        "--configs",
        str(configs),
        "--retain",
        "9",
        "--out",
        str(out),
        "--limit",
        "4",
        *more,
    ]


def test_run_writes_a_summary_and_resumes(checkpoint, configs, small_task, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    assert run.main(arguments(checkpoint, configs, out)) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "summary.json").read_text())
    vanilla, cut = content["rows"]
    needed = {"method", "retain", "accuracy", "ci95", "n", "share_of_vanilla", "mean_tokens", "mean_tokens_official"}
    needed |= {"flops_reduction", "cache_bytes", "prefill_ms"}
    assert all(needed <= set(row) for row in content["rows"])
    assert (vanilla["method"], vanilla["retain"], vanilla["n"]) == ("vanilla", 36, 4)
    assert (cut["method"], cut["retain"]) == ("mustdrop", 9) and cut["mean_tokens"] < vanilla["mean_tokens"]
    assert 0 < cut["flops_reduction"] < 1 and cut["cache_bytes"] < vanilla["cache_bytes"]
    provenance = content["provenance"]
    needed = {"command", "config", "git_commit", "versions", "device", "dtype", "seed", "samples", "date"}
    assert needed <= set(provenance)
    assert "mustdrop" in printed and "mustdrop" in (out / "summary.md").read_text()

    # A finished row is not computed again: nothing is loaded.
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "load", None)
        assert run.main(arguments(checkpoint, configs, out)) == 0
    assert json.loads((out / "summary.json").read_text())["rows"] == content["rows"]

    # An interrupted row goes on after its last whole line.
    (file,) = (out / "cells" / "mini_gqa").glob("mustdrop_9-*.json")
    answers = file.with_suffix(".jsonl")
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join([*lines[:3], lines[3][:40]]))
    file.unlink()
    asked, prepare = [], LoadedModel.prepare

    def counted(self, prompts, images):
        asked.extend(prompts)
        return prepare(self, prompts, images)

    monkeypatch.setattr(LoadedModel, "prepare", counted)
    assert run.main(arguments(checkpoint, configs, out)) == 0
    assert len(asked) == 1 and len(answers.read_text().splitlines()) == 4
    assert json.loads((out / "summary.json").read_text())["rows"][1]["accuracy"] == cut["accuracy"]

    # The lines say how each question was answered, and which patches were kept.
    line = json.loads(answers.read_text().splitlines()[0])
    assert {"question_id", "type", "target", "score", "flops", "kept", "times_ms"} <= set(line)
    assert line["flops"]["with-text"]["used"] < line["flops"]["with-text"]["full"]
    assert line["selector_macs"] == cut["selector_macs"] > 0 == vanilla["selector_macs"]
    assert line["selector_prompt"] == cut["selector_prompt"] and cut["selector_prompt"]["images"] == 1
    assert cut["selector_prompt"]["vision_tokens"] <= 36 and cut["selector_prompt"]["text_tokens"] > 1
    assert "counted by torch on one prompt" in (out / "summary.md").read_text()
    assert samples.patches(line["kept"]["vision"]["0"], 36).any()
    assert {path.name for path in (out / "pictures" / "mini_gqa").iterdir()} == {f"{i}.jpg" for i in range(4)}

    # Other settings are another row.
    assert run.main(arguments(checkpoint, configs, out, "--batch-size", "1")) == 0
    assert len(list((out / "cells" / "mini_gqa").glob("mustdrop_9-*.json"))) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--model", "checkpoints/nowhere"], "MODEL: there is no folder 'checkpoints/nowhere'"),
        (["--model", "no/such-model-at-all"], "MODEL: 'no/such-model-at-all'"),
        (["--task", "gqqa"], "task: got 'gqqa'"),
        (["--retain", "sixty"], "RETAIN: got 'sixty'"),
        (["--limit", "0"], "LIMIT: got '0'"),
        (["--task", "gqa", "mme", "--limit", "3"], "LIMIT: got 3, but mini_mme scores questions by 2"),
        (["--batch-size", "-1"], "BATCH_SIZE: got '-1'"),
        (["--out", "FILE/results"], "is a file, expected a folder"),
    ],
)
def test_wrong_argument_is_one_line(checkpoint, configs, tmp_path, wrong, message):
    file = tmp_path / "file"
    file.touch()
    wrong = [argument.replace("FILE", str(file)) for argument in wrong]
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "eval.run",
            *arguments(checkpoint, configs, tmp_path / "out"),
            *wrong,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr[-500:]
    assert "| torch\n" not in done.stderr and "lmms_eval" not in done.stderr, "something heavy was imported"
    assert not (tmp_path / "out").exists()


def test_budget_without_settings_is_one_line(checkpoint, configs, tmp_path, capsys):
    assert run.main(arguments(checkpoint, configs, tmp_path / "out", "--retain", "33")) == 2
    assert "RETAIN: no settings of mustdrop for 33 tokens" in capsys.readouterr().err
    (tmp_path / "fastv_2.yaml").write_text("method: fastv\nlayer: 0.99\nretain: 2\n")
    assert run.main(arguments(checkpoint, tmp_path, tmp_path / "out", "--method", "fastv", "--retain", "2")) == 2
    assert re.search(r"^error: RETAIN: fastv on .*: retain is 2: it must be at least \d+", capsys.readouterr().err)


def test_tasks_of_the_embedded_model_are_synthetic_and_run_once():
    assert settings.benchmarks(["mini"]) == list(tasks.SUITE)
    names = settings.benchmarks(["gqa", "vqav2", "pope", "mini_pope"])
    assert settings.check_tasks(names, "x/llava-mini", None) == [("gqa", "mini_gqa"), ("pope", "mini_pope")]


def test_identity_is_what_can_change_a_result(checkpoint, tmp_path):
    cell = Cell(str(checkpoint), "gqa", "mini_gqa", settings={"method": "mustdrop"})
    same = Cell(str(checkpoint), "vqav2", "mini_gqa", "another name", 64, {"method": "mustdrop"})
    assert cell.key == same.key
    changes = {"task": "mini_pope", "settings": {"method": "vanilla"}, "limit": 4, "dtype": "bfloat16", "seed": 1}
    assert len({dataclasses.replace(cell, **{name: value}).key for name, value in changes.items()} | {cell.key}) == 6
    heads = tmp_path / "heads.npy"
    keys = set()
    for content in (b"one", b"two"):
        heads.write_bytes(content)
        keys.add(dataclasses.replace(cell, settings={"method": "yopo", "heads": str(heads)}).key)
    assert len(keys) == 2


def test_several_processes_share_the_questions(checkpoint, configs, small_task, tmp_path):
    """`accelerate launch` on two CPU processes gives the rows of one process."""
    tasks.prepare("mini_gqa")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    for name, start in {"one": [sys.executable], "two": launch}.items():
        command = [*start, "-m", "eval.run", *arguments(checkpoint, configs, tmp_path / name, "--limit", "5")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in ("one", "two"))
    timeless = [[{k: v for k, v in row.items() if not k.endswith("_ms")} for row in rows] for rows in (one, two)]
    assert timeless[0] == timeless[1] and two[1]["n"] == 5
    (lines,) = (tmp_path / "two" / "cells" / "mini_gqa").glob("mustdrop_9-*.jsonl")
    assert len(lines.read_text().splitlines()) == 5


def test_borrowed_thresholds_are_told_and_calibrated_ones_are_not(configs, capsys):
    (configs / "mustdrop.yaml").write_text("method: mustdrop\nat:\n  9: {global_threshold: 0.07}\n")
    names = {"model": "some/model", "benchmark": "gqa", "task": "mini_gqa", "method": "mustdrop"}
    cell = Cell(**names, retain=9, settings={"method": "mustdrop"})
    run.note_borrowed([cell], configs)
    assert "note: 9 tokens: settings published for LLaVA-1.5-7B" in capsys.readouterr().err
    (configs / "model").mkdir()
    (configs / "model" / "mustdrop.yaml").write_text("method: mustdrop\nat:\n  9: {global_threshold: 0.05}\n")
    run.note_borrowed([cell], configs)
    assert not capsys.readouterr().err


def full_disk(path: Path, content: bytes) -> None:
    path.touch()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match=r"result\.json'$"):
        replace_file(tmp_path / "result.json", b"{}")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*other\.json'"):
        replace_file(tmp_path / "other.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
