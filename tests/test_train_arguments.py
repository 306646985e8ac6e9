"""LLaVA's own command lines are understood; what cannot be done is refused in one line before anything is loaded."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from training import flags
from transformers.utils import is_flash_attn_2_available

from llava.train import train as trainer_module
from llava.train.arguments import TrainingArguments
from llava.train.command import Parser, one_line

ROOT = Path(__file__).parents[1]
# What LLaVA's scripts of the same names pass, but for paths and --report_to wandb, which is not installed here.
COMMON = """
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy "no"
    --save_strategy "steps" --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4
    --lazy_preprocess True --bf16 True --report_to none
"""
TUNING = "--image_aspect_ratio pad --group_by_modality_length True --save_steps 50000 --gradient_accumulation_steps 1"
LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"
SCRIPTS = {
    "pretrain.sh": "--version plain --tune_mm_mlp_adapter True --save_steps 24000 --learning_rate 1e-3",
    "finetune.sh": f"--version v1 --learning_rate 2e-5 {TUNING}",
    "finetune_lora.sh": f"--version v1 --learning_rate 2e-4 {LORA} {TUNING}",
    "finetune_qlora.sh": f"--version v1 --lora_enable True --bits 4 --learning_rate 2e-5 {TUNING}",
}
BASE = {"model_name_or_path": "base", "mini_scenes": 2}


def read(tmp_path, words=(), **settings):
    return Parser().read([*flags(**BASE | {"output_dir": tmp_path} | settings), *words])


def refused(capsys, tmp_path, words=(), **settings) -> str:
    """The one line with which a command ends, and that it ends with status 2."""
    try:
        status = trainer_module.main([*flags(**BASE | {"output_dir": tmp_path} | settings), *words])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_of_llavas_scripts(script, tmp_path):
    model, data, training = read(tmp_path, shlex.split(COMMON + SCRIPTS[script]))
    for part in (model, data):
        part.check()
    training.check(model)
    assert training.eval_strategy == "no" and training.get_warmup_steps(1000) == 30
    assert training.model_max_length == 2048 and training.gradient_checkpointing
    assert model.tune_mm_mlp_adapter == (script == "pretrain.sh") and not model.mm_use_im_start_end
    assert training.lora_enable == ("lora" in script)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpa": 8}, "--lora_alpa: no such argument, did you mean --lora_alpha"),
        ({"lora-drop": 8}, "--lora-drop: no such argument, did you mean --lora_"),
        ({"xyzzy": 8}, "--xyzzy: no such argument; see --help"),
        ({"lora_r": "many"}, "error: lora_r: invalid int value: 'many'"),
        ({"bf16": "perhaps"}, "error: bf16: "),
        ({"lr_scheduler_type": "cosin"}, "error: lr_scheduler_type: invalid choice: 'cosin'"),
        ({"report_to": "wandb"}, "report_to: got 'wandb', which is not installed"),
        ({"deepspeed": "./scripts/zero2.json"}, "deepspeed: there is no file './scripts/zero2.json'"),
        ({"deepspeed": "README.md"}, "deepspeed: README.md is no valid JSON"),
        ({"evaluation_strategy": "steps"}, "eval_strategy: got 'steps', expected 'no'"),
        ({"do_eval": True}, "do_eval: got True, expected False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, expected 0.0"),
        ({"output_dir": "README.md"}, "output_dir: got 'README.md'"),
        ({"output_dir": "README.md/below"}, "output_dir: got 'README.md/below'"),
        ({"resume_from_checkpoint": "none"}, "resume_from_checkpoint: none is no complete checkpoint (no such folder)"),
        ({"warmup_ratio": 3}, "warmup_ratio: got 3.0"),
        ({"cache_dir": "there"}, "cache_dir: got 'there'"),
        ({"mpt_attn_impl": "triton"}, "mpt_attn_impl: got 'triton'"),
        ({"attn_implementation": "flash"}, "attn_implementation: got 'flash'"),
        ({"bits": 5}, "bits: got 5"),
        ({"bits": 4}, "bits: got 4 without lora_enable"),
        ({"quant_type": "int4"}, "quant_type: got 'int4'"),
        ({"lora_r": 0}, "lora_r: got 0"),
        ({"lora_alpha": -1}, "lora_alpha: got -1"),
        ({"lora_dropout": 1}, "lora_dropout: got 1"),
        ({"lora_bias": "some"}, "lora_bias: got 'some'"),
        ({"lora_weight_path": "x"}, "lora_weight_path: got 'x' without lora_enable"),
        ({"lora_weight_path": "x", "lora_enable": True}, "lora_weight_path: there is no folder 'x'"),
        ({"lora_enable": True, "tune_mm_mlp_adapter": True}, "lora_enable and tune_mm_mlp_adapter"),
        ({"learning_rate": "nan"}, "learning_rate: got nan"),
        ({"mm_projector_lr": "-1"}, "mm_projector_lr: got -1"),
        ({"weight_decay": "inf"}, "weight_decay: got inf"),
        ({"model_max_length": 0}, "model_max_length: got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs: got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type: got 'resampler'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: got 'cls'"),
        ({"mm_use_im_start_end": True, "tune_mm_mlp_adapter": True}, "mm_use_im_start_end: got True"),
        ({"pretrain_mm_mlp_adapter": "none.bin"}, "pretrain_mm_mlp_adapter: there is no file 'none.bin'"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints: expected"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[1]"}, r"image_grid_pinpoints: got '[1]'"),
        ({"mini_scenes": -2}, "data_path: give either"),
        ({"mini_scenes": 0, "data_path": "none.json"}, "data_path: there is no file 'none.json'"),
        ({"mini_scenes": 0, "data_path": "README.md"}, "data_path: README.md is no valid JSON"),
        ({"mini_scenes": 0, "data_path": "README.md", "image_folder": "none"}, "image_folder: there is no folder"),
        ({"model_name_or_path": "/none"}, "model_name_or_path: got '/none'"),
    ],
)
def test_one_line_before_anything_is_loaded(settings, message, tmp_path, capsys):
    assert message in refused(capsys, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_one_process_takes_one_gpu(tmp_path, monkeypatch):
    model, _, training = read(tmp_path)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process got 2 GPUs"):
        training.check(model)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_entry_point_of_llavas_scripts():
    """By its path, as LLaVA's scripts call it; it wants flash-attn, unless another attention is named."""
    command = [sys.executable, "llava/train/train_mem.py", *flags(**BASE, output_dir="out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: attn_implementation: got 'flash_attention_2', expected sdpa")


def test_words_that_belong_to_no_option(tmp_path, capsys):
    assert "arguments: got 'stray'" in refused(capsys, tmp_path, ["--bf16", "True", "stray"])


def test_abbreviations_are_not_guessed(tmp_path, capsys):
    assert "did you mean --lora_enable" in refused(capsys, tmp_path, lora_enabl=True)


def test_partial_folders_are_no_base(tmp_path, capsys):
    (tmp_path / "mm_projector.bin").touch()
    assert "holds only a projector" in refused(capsys, tmp_path / "out", model_name_or_path=tmp_path)


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_stitched_tiles_are_refused_before_anything_is_loaded(merge, tmp_path, capsys):
    facts = {"model_type": "llava", "mm_vision_tower": "nowhere", "mm_patch_merge_type": merge}
    (tmp_path / "config.json").write_text(json.dumps(facts))  # no weights: loading would say so
    line = refused(capsys, tmp_path / "out", model_name_or_path=tmp_path)
    assert "mm_patch_merge_type" in line and repr(merge) in line


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ('{"zero_optimization": {"stage": 3}}', "stage3_gather_16bit_weights_on_model_save"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}', "mm_projector_lr"),
        ("[]", "holds a list"),
    ],
)
def test_deepspeed_files_that_would_lose_something(file, message, tmp_path, capsys):
    pytest.importorskip("deepspeed")
    (tmp_path / "deepspeed.json").write_text(file)
    assert message in refused(capsys, tmp_path / "out", deepspeed=tmp_path / "deepspeed.json", mm_projector_lr=1e-5)


def test_errors_of_data_workers_say_what_the_worker_said():
    worker = ValueError("Caught ValueError in DataLoader worker 0.\nOriginal Traceback\n  x\nValueError: record 3")
    assert one_line(worker) == "record 3"
    assert one_line(ValueError("two\nlines")) == "two lines"


def test_warmup_steps_win_over_the_ratio(tmp_path):
    assert TrainingArguments(str(tmp_path), use_cpu=True, warmup_ratio=0.1, warmup_steps=5).warmup_steps == 5
