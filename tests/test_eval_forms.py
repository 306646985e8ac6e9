"""Evaluation reaches every form of checkpoint, says what the loader refuses before all else, and mixes no two up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import forms
import pytest
from safetensors.torch import load_file, save_file

from eval import checkpoints, tasks
from eval.calibrate import heads as calibrate_heads
from eval.calibrate import thresholds as calibrate
from eval.methods import VANILLA
from eval.report.results import load
from eval.run import command as run
from eval.run import runner
from eval.run.cell import Cell
from eval.run.inference import LoadedModel
from eval.run.lmms import LlavaMustDrop
from eval.sweep import command as sweep
from eval.sweep import methods, plan
from eval.tasks import mini_gqa

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ASKED = ["--task", "mini_gqa", "--method", "fastv", "--retain", "64", "--limit", "4"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    for name in ("MODEL", "MODEL_BASE", "LIMIT", "RETAIN", "OUT", "BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mini_gqa, "SCENES", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The embedded model as `merged`, as `adapter` (LLaVA's LoRA) on `vicuna`, and as `plain` (PEFT's) on `llava`."""
    folder = tmp_path_factory.mktemp("forms")
    forms.full(folder / "merged")
    name_base(forms.lora(folder / "adapter", folder / "vicuna"), None)
    forms.hugging_face(folder / "llava", "newest", words=forms.without_lora(forms.weights()["text"]))
    forms.add_adapter(folder / "plain", "../llava", forms.lora_weights()[0])
    return folder


def name_base(adapter: Path, base: str | None) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))


def evaluate(out: Path, *arguments: str | Path) -> tuple[list[str], list[dict], list[dict]]:
    """The answers of all rows in order, the rows and their identities."""
    assert run.main([*ASKED, "--out", str(out), *map(str, arguments)]) == 0
    rows = json.loads((out / "summary.json").read_text())["rows"]
    files = sorted((out / "cells" / "mini_gqa").glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    records = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    return [line["answer"] for line in lines], rows, [record["identity"] for record in records]


def test_adapters_on_their_base_answer_as_the_merged_model(folder, tmp_path):
    merged, merged_rows, merged_identities = evaluate(tmp_path / "1", "--model", folder / "merged")
    lora = evaluate(tmp_path / "2", "--model", folder / "adapter", "--model-base", folder / "vicuna")
    plain = evaluate(tmp_path / "3", "--model", folder / "plain")
    assert len(merged) == 8 and lora[0] == plain[0] == merged
    for _, rows, identities in (lora, plain):
        assert [row["score"] for row in rows] == [row["score"] for row in merged_rows]
        assert identities[0]["model_files"] != merged_identities[0]["model_files"]
    assert [row.get("model_base") for row in (lora[1][0], plain[1][0])] == ["vicuna", None]
    assert "bits" not in merged_rows[0]


@needs_bitsandbytes
def test_four_bits_are_another_model_and_say_so(folder, tmp_path, capsys):
    answers, rows, identities = evaluate(tmp_path / "out", "--model", folder / "plain", "--load-4bit")
    assert len(answers) == 8 and {row["bits"] for row in rows} == {4}
    assert {row["model"] for row in rows} == {"plain-4bit"} and identities[0]["load_4bit"]
    printed = capsys.readouterr().out
    assert printed.count("Language model quantised by bitsandbytes: vanilla 576 (4 bit), fastv 64 (4 bit).") == 1
    _, notes = load([tmp_path / "out"])
    assert notes == ["plain-4bit: language model in 4 bit, quantised by bitsandbytes"]


@needs_bitsandbytes
def test_bits_that_a_checkpoint_was_stored_in_are_seen(folder, tmp_path):
    loaded = LoadedModel.load(str(folder / "merged"), device="cpu", load_8bit=True)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert checkpoints.check_checkpoint(str(tmp_path / "saved"))["load_8bit"] is False
    assert LoadedModel.load(str(tmp_path / "saved"), device="cpu").bits == loaded.bits == 8
    with pytest.raises(ValueError, match="^load_8bit, load_4bit: .* is quantised already"):
        checkpoints.check_checkpoint(str(tmp_path / "saved"), load_4bit=True)


def test_keys_tell_bases_and_bits_apart_by_contents(folder, tmp_path):
    alone = Cell(str(folder / "adapter"), "gqa", "mini_gqa")
    on_base = replace(alone, model_base=str(folder / "vicuna"))
    shutil.copytree(folder / "vicuna", tmp_path / "renamed")
    moved = replace(alone, model_base=str(tmp_path / "renamed"))
    assert moved.key == on_base.key
    assert not any(str(folder) in str(value) for value in on_base.identity().values())
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    forms.write_config(tmp_path / "other", **config, changed=True)
    cells = [alone, on_base, replace(alone, model_base=str(tmp_path / "other"))]
    cells += [replace(cell, **{bits: True}) for cell in cells for bits in ("load_4bit", "load_8bit")]
    assert len({cell.key for cell in cells}) == 9
    assert not {"load_4bit", "load_8bit", "model_base"} & alone.identity().keys(), "earlier results keep their identity"


# Refusals


def missing(folder: Path) -> str:
    forms.full(folder / "x", suffix="safetensors")
    file = folder / "x" / "model-00001-of-00002.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.startswith("model.layers.3."))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    return f"MODEL: .*/x: .*{name}"


def without_base(folder: Path) -> str:
    name_base(forms.lora(folder / "x", folder / "vicuna"), None)
    return "model_base: .*/x holds only LoRA weights, name the language model it belongs to"


def unknown_field(folder: Path) -> str:
    forms.full(folder / "x", mm_patch_merge_type="spatial_maxpool2x2")
    return "MODEL: .*mm_patch_merge_type is 'spatial_maxpool2x2'"


def pointer(folder: Path) -> str:
    forms.full(folder / "x", suffix="safetensors")
    (folder / "x" / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "MODEL: .*git-lfs pointer"


def large_tokenizer(folder: Path) -> str:
    forms.full(folder / "x", suffix="safetensors")
    tokenizer = json.loads((folder / "x" / "tokenizer.json").read_text())
    token = {**tokenizer["added_tokens"][-1], "id": 99999, "content": "<more>"}
    tokenizer["added_tokens"].append(token)
    (folder / "x" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return "MODEL: tokenizer: has tokens up to"


def no_checkpoint(folder: Path) -> str:
    forms.write_config(folder / "x" / "checkpoint-100")
    return "MODEL: .*/x: holds only training checkpoints .checkpoint-100.; name one of them"


@pytest.fixture
def nothing_done(monkeypatch) -> None:
    """No data, no lmms-eval, no model."""
    for place, name in ((tasks, "prepare"), (tasks, "training_questions"), (LoadedModel, "load"), (run, "check_data")):
        monkeypatch.setattr(place, name, None)
    for place, name in ((runner, "evaluate"), (runner, "_task_manager"), (sweep, "_make_data"), (sweep, "check_data")):
        monkeypatch.setattr(place, name, None)


@pytest.mark.parametrize("broken", [missing, without_base, unknown_field, pointer, large_tokenizer, no_checkpoint])
def test_what_the_loader_refuses_is_one_line_before_all_else(broken, nothing_done, tmp_path, capsys):
    expected = f"^error: {broken(tmp_path)}.*\n$"
    model, out = ["--model", str(tmp_path / "x")], ["--out", str(tmp_path / "out")]
    file = tmp_path / "s.yaml"
    file.write_text(f"models: {tmp_path / 'x'}\ntasks: mini_gqa\nmethods: fastv\nretain: 64\n")
    assert run.main([*ASKED, *model, *out]) == 2
    error = capsys.readouterr().err
    assert matches(expected, error)
    assert calibrate.main([*model, *out]) == 2 and capsys.readouterr().err == error
    assert calibrate_heads.main([*model, "--share", "0.5", "--out", str(tmp_path / "out.npy")]) == 2
    assert capsys.readouterr().err == error
    assert sweep.main([str(file), *out]) == 2
    assert matches(f"^error: {file}: models: .*\n$", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def matches(pattern: str, text: str) -> bool:
    assert re.search(pattern, text), text
    return text.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model-base", "nowhere"], "MODEL_BASE: there is no folder 'nowhere'"),
        (["--model-base", "some/base"], "MODEL_BASE: 'some/base' is neither a folder nor in the local cache"),
        (["--model-base", "BASE"], "model_base is '.*': .* holds complete weights and needs no base"),
        (["--load-4bit", "--load-8bit"], "argument --load-8bit: not allowed with argument --load-4bit"),
    ],
)
def test_loading_options_that_do_not_fit(more, message, folder, nothing_done, tmp_path, capsys):
    more = [str(folder / "vicuna") if word == "BASE" else word for word in more]
    assert run.main([*ASKED, "--model", str(folder / "merged"), "--out", str(tmp_path / "out"), *more]) == 2
    assert matches(f"^error: {message}", capsys.readouterr().err)


def test_the_base_may_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("MODEL_BASE", str(folder / "vicuna"))
    args = run.parser().parse_args(["--model", str(folder / "adapter")])
    assert checkpoints.check_arguments(args) == str(folder / "adapter")
    assert checkpoints.loading(args) == {
        "model_base": str(folder / "vicuna"),
        "load_4bit": False,
        "load_8bit": False,
    }


@pytest.mark.parametrize("value", ["yes", "", 2, None])
def test_flags_of_the_plugin(value, nothing_done):
    assert checkpoints.flag("load_4bit", "True") and checkpoints.flag("load_4bit", True)
    assert not checkpoints.flag("load_8bit", "false")
    with pytest.raises(ValueError, match="load_4bit: got .*, expected True or False"):
        LlavaMustDrop("x", load_4bit=value)


# Sweeps


def write(folder: Path, models: str) -> Path:
    file = folder / "s.yaml"
    file.write_text(f"models: {models}\ntasks: [mini_gqa]\nmethods: [fastv]\nretain: [64]\n")
    return file


@needs_bitsandbytes
def test_models_of_a_sweep_may_be_mappings(folder, tmp_path):
    entry = f"{{model: {folder / 'adapter'}, model_base: {folder / 'vicuna'}, load_4bit: true}}"
    found = plan.read(write(tmp_path, f"[{folder / 'merged'}, {entry}]"))
    assert [(cell.model_name, cell.method) for cell in found.cells] == [
        ("merged", VANILLA), ("merged", "fastv"), ("adapter-4bit", VANILLA), ("adapter-4bit", "fastv"),
    ]  # fmt: skip
    assert found.cells[2].model_base == str(folder / "vicuna") and found.cells[2].load_4bit


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{model: x, base: y}", "models: unknown key 'base'.*; it has model, model_base, load_4bit, load_8bit"),
        ("{model: x, load_4bit: yes please}", "models: load_4bit: got 'yes please', expected true or false"),
        ("{model: 3}", "models: model: got 3, expected a folder"),
        ("{model_base: x}", "models: got .*, expected a list of names"),
        ("[[x]]", "models: got .*, expected a list of names"),
        ("{model: x, load_4bit: true, load_8bit: true}", "load_4bit, load_8bit: got both, expected one of them"),
        ("{model: checkpoints/llava-mini, model_base: nowhere}", "models: model_base: there is no folder 'nowhere'"),
    ],
)
def test_models_of_a_sweep_that_are_none(models, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan.read(write(tmp_path, models))


def test_loading_options_of_a_sweep_need_a_model(folder, tmp_path, capsys):
    assert sweep.main([str(write(tmp_path, "x")), "--model-base", str(folder / "vicuna"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith("error: model_base: got ")
    argv = [str(write(tmp_path, "x")), "--model", str(folder / "adapter"), "--out", str(tmp_path / "out"), "--dry-run"]
    assert sweep.main([*argv, "--model-base", str(folder / "vicuna")]) == 0
    assert "adapter" in capsys.readouterr().out


# What is not looked at


def test_the_embedded_model_costs_no_import():
    code = "import sys; from eval.checkpoints import *; check_checkpoint(EMBEDDED); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=forms.MINI.parents[1])
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("online", [True, False])
def test_bases_and_towers_on_the_hub_are_left_to_the_loader(online, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoints, "_check_hub", lambda model, name: asked.append((model, name)))
    forms.add_adapter(tmp_path / "x", "some/llava", forms.lora_weights()[0])
    assert checkpoints.check_checkpoint(str(tmp_path / "x"), online=online)["model_base"] is None
    assert asked == ([("some/llava", "MODEL_BASE")] if online else [])
    forms.full(tmp_path / "y", tower="openai/clip-vit-large-patch14")
    if not online:
        assert checkpoints.check_checkpoint(str(tmp_path / "y"), online=online)
    else:
        with pytest.raises(ValueError, match="MODEL: .*mm_vision_tower is 'openai/clip-vit-large-patch14'"):
            checkpoints.check_checkpoint(str(tmp_path / "y"))


def test_sizes_of_an_adapter_are_its_bases(folder, tmp_path):
    assert methods.shape_of(str(folder / "plain")).layers == 16
    method = methods.Method("fastv", 600, {"method": "fastv", "retain": 600})
    with pytest.raises(ValueError, match="plain has only 576 vision tokens"):
        methods.out_of_reach(method, str(folder / "plain"))
