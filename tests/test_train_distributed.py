"""DeepSpeed ZeRO-2 and ZeRO-3 with the configurations of this repository, and several processes (gloo, on the CPU)."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import flags, llava_base, turns, write_records

from llava.model.builder import load_pretrained_model
from llava.train.resume import newest_checkpoint

ROOT = Path(__file__).parents[1]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason="needs deepspeed")
COMMON = {
    "max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "use_cpu": True,
    "disable_tqdm": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "model_max_length": 256,
}  # fmt: skip
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-2, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoint):
    return llava_base(tmp_path_factory.mktemp("base") / "llava", checkpoint)


def readme_command() -> list[str]:
    """Arguments of the README's training command."""
    words = (ROOT / "README.md").read_text(encoding="utf-8").split("-m llava.train.train", 1)[1].split("```")[0]
    return shlex.split(words.replace("\\\n", " "))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, base):
    """Output folders of all runs, made in one subprocess."""
    folder = tmp_path_factory.mktemp("runs")
    stages = {name: ROOT / "configs" / "deepspeed" / f"{name}.json" for name in ("zero2", "zero3")}
    adam = json.loads(stages["zero3"].read_text())
    adam["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    (folder / "adam.json").write_text(json.dumps(adam))
    cut_up = json.loads(stages["zero3"].read_text())
    cut_up["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights, too
    (folder / "cut_up.json").write_text(json.dumps(cut_up))
    records = [{"image": "red.png", "conversations": turns("<image>\nWhich color?", "red")}]
    write_records(folder)
    mixed = write_records(folder, records + [{"conversations": turns("What is red?", "a color")}] * 3)
    text = {"mini_scenes": 0, "data_path": mixed, "image_folder": folder, "per_device_train_batch_size": 1}
    runs = {"pair": (2, text | {"max_steps": 4, "save_steps": 4})}
    if DEEPSPEED:
        runs |= {
            "zero2": (1, {"deepspeed": stages["zero2"], "bf16": True}),
            "zero3": (1, {"deepspeed": stages["zero3"], "bf16": True}),
            "zero3-lora": (1, LORA | {"deepspeed": stages["zero3"], "bf16": True}),
            "zero3-lora-again": (1, LORA | {"deepspeed": stages["zero3"], "bf16": True, "max_steps": 3}),
            "zero3-projector": (1, {"deepspeed": stages["zero3"], "tune_mm_mlp_adapter": True}),
            "zero3-adam": (1, LORA | {"deepspeed": folder / "adam.json", "mm_projector_lr": 1e-9, "max_steps": 1}),
            "zero3-pair": (2, text | {"deepspeed": folder / "cut_up.json", "max_steps": 4, "save_steps": 4}),
        }
    places = {name: folder / name.removesuffix("-again") for name in runs}
    own = {"model_name_or_path": base}  # later words win over those of the README
    listed = [
        {"processes": count, "arguments": readme_command() + flags(**own | COMMON | settings, output_dir=places[name])}
        for name, (count, settings) in runs.items()
    ]
    (folder / "runs.json").write_text(json.dumps(listed))
    command = [sys.executable, "tests/train_runs.py", str(folder / "runs.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return places


def changed(before, after) -> set[str]:
    """Names of weights that differ by more than the rounding to bfloat16."""
    own, other = before.state_dict(), after.state_dict()
    assert own.keys() == other.keys()
    return {name for name in own if (own[name] - other[name].float()).abs().max() > 0.01 * own[name].abs().max()}


@needs_deepspeed
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_full_tuning_loads_back(outputs, base, stage):
    _, before, *_ = load_pretrained_model(str(base))
    _, after, _, context = load_pretrained_model(str(outputs[stage]))
    names = changed(before, after)
    assert context == 256 and any("mm_projector" in name for name in names) and any("lm_head" in name for name in names)
    assert {name for name in names if ".layers." in name} and not any("vision_tower" in name for name in names)
    assert newest_checkpoint(outputs[stage]) == outputs[stage] / "checkpoint-2"


@needs_deepspeed
def test_lora_under_zero3_loads_back_and_goes_on(outputs, base):
    _, before, *_ = load_pretrained_model(str(base))
    _, after, *_ = load_pretrained_model(str(outputs["zero3-lora"]), model_base=str(base))
    names = changed(before, after)
    assert any("mm_projector" in name for name in names) and any(".layers.0.self_attn" in name for name in names)
    assert not any("vision_tower" in name or "norm" in name or "lm_head" in name for name in names)
    assert json.loads((outputs["zero3-lora"] / "trainer_state.json").read_text())["global_step"] == 3
    early, late = (
        load_file(outputs["zero3-lora"] / folder / "adapter_model.safetensors") for folder in ("checkpoint-2", ".")
    )
    assert all(early[name].shape == late[name].shape for name in early)
    assert any(not torch.equal(early[name], late[name]) for name in early)


@needs_deepspeed
def test_projector_is_gathered(outputs):
    state = torch.load(outputs["zero3-projector"] / "mm_projector.bin", weights_only=True)
    assert {name: value.shape for name, value in state.items()} == {
        "model.mm_projector.0.weight": (32, 32), "model.mm_projector.0.bias": (32,),
        "model.mm_projector.2.weight": (32, 32), "model.mm_projector.2.bias": (32,),
    }  # fmt: skip


@needs_deepspeed
def test_projectors_rate_reaches_deepspeeds_own_optimizer(outputs, base):
    _, before, *_ = load_pretrained_model(str(base))
    after = torch.load(outputs["zero3-adam"] / "non_lora_trainables.bin", weights_only=True)
    own = before.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(value, own[name.removeprefix("base_model.model.")], atol=1e-6, rtol=0)
    adapters = load_file(outputs["zero3-adam"] / "adapter_model.safetensors")
    assert any(value.abs().max() > 1e-3 for name, value in adapters.items() if "lora_B" in name)


@pytest.mark.parametrize("run", ["pair", pytest.param("zero3-pair", marks=needs_deepspeed)])
def test_processes_of_which_some_have_no_image(outputs, run):
    """A step in which one process has text only neither hangs nor fails."""
    assert json.loads((outputs[run] / "trainer_state.json").read_text())["global_step"] == 4
    assert load_file(outputs[run] / "model.safetensors")["lm_head.weight"].isfinite().all()
