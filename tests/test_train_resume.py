"""A run goes on from its newest complete checkpoint, and only if it is the same run."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from training import arguments, write_records

from llava.train import train as trainer_module
from llava.train.arguments import DataArguments, ModelArguments
from llava.train.resume import missing_weights, newest_checkpoint, what_is_missing
from llava.train.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return DataArguments(data_path=str(write_records(folder)), image_folder=str(folder))


@pytest.fixture(scope="module")
def model(checkpoint):
    return ModelArguments(str(checkpoint), freeze_backbone=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model, data):
    """A finished run of two steps with a checkpoint of each."""
    return train(model, data, arguments(tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(finished, tmp_path / "out")


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def step_of(run) -> int:
    return json.loads((run / "trainer_state.json").read_text())["global_step"]


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("trainer_state.json", "remove", "no trainer_state.json"),
        ("trainer_state.json", "cut", "trainer_state.json is damaged"),
        ("model.safetensors", "remove", "no weights"),
        ("model.safetensors", "cut", "model.safetensors is damaged"),
        ("optimizer.pt", "remove", "no optimizer.pt"),
        ("optimizer.pt", "cut", "optimizer.pt is damaged"),
        ("scheduler.pt", "remove", "no scheduler.pt"),
        ("rng_state.pth", "cut", "rng_state.pth is damaged"),
        ("config.json", "cut", "config.json is damaged"),
    ],
)
def test_damaged_checkpoints_are_left_out(name, damage, fault, run, caplog):
    """Whatever a killed process has not written, or not to its end."""
    assert newest_checkpoint(run) == run / "checkpoint-2"
    file = run / "checkpoint-2" / name
    file.unlink() if damage == "remove" else cut(file)
    assert what_is_missing(run / "checkpoint-2") == fault
    assert newest_checkpoint(run) == run / "checkpoint-1"
    assert f"checkpoint-2 is not complete ({fault})" in caplog.text


def test_newest_goes_by_number(run):
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-10")
    (run / "checkpoint-tmp").mkdir()
    assert what_is_missing(run / "checkpoint-10") == "trainer_state.json is of step 2"
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    assert newest_checkpoint(run) == run / "checkpoint-10"


def test_shards_and_deepspeed_states(run):
    folder = run / "checkpoint-2"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert missing_weights(folder) == "no model-2.safetensors"
    index.write_text("{}")
    assert missing_weights(folder) == "model.safetensors.index.json is damaged"
    index.unlink()
    (folder / "optimizer.pt").unlink()
    (folder / "latest").write_text("global_step2")
    assert what_is_missing(folder) == "no states of DeepSpeed in 'global_step2'"
    (folder / "global_step2").mkdir()
    shutil.copy(folder / "scheduler.pt", folder / "global_step2" / "states.pt")
    assert what_is_missing(folder) is None
    cut(folder / "global_step2" / "states.pt")
    assert what_is_missing(folder) == "states.pt is damaged"


def test_killed_while_saving_goes_on_from_the_one_before(run, model, data, caplog):
    caplog.set_level(logging.INFO)
    (run / "llava_run.json").write_text(json.dumps({"run": json.loads((run / "llava_run.json").read_text())["run"]}))
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    cut(run / "checkpoint-2" / "model.safetensors")
    train(model, data, arguments(run, max_steps=3))
    assert "checkpoint-2 is not complete" in caplog.text and f"goes on from {run / 'checkpoint-1'}" in caplog.text
    assert step_of(run) == 3 and newest_checkpoint(run) == run / "checkpoint-3"


def test_no_good_checkpoint_begins_at_the_start(run, model, data, caplog):
    caplog.set_level(logging.INFO)
    (run / "llava_run.json").unlink()
    for folder in run.glob("checkpoint-*"):
        (folder / "trainer_state.json").write_text("{")
    train(model, data, arguments(run, max_steps=1))
    assert "training begins" in caplog.text and step_of(run) == 1


def test_finished_run_says_so_without_a_model(run, model, data, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(trainer_module, "load_model", None)
    assert train(model, data, arguments(run)) == run
    assert "nothing is left to train" in caplog.text
    (run / "model.safetensors").unlink()
    with pytest.raises(TypeError):  # the result is gone, so the run is not finished
        train(model, data, arguments(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "plain"}, "version: got 'plain', but .* holds a run that began with 'v1'"),
        ({"tune_mm_mlp_adapter": True}, "tune_mm_mlp_adapter: got True"),
        ({"model_max_length": 100}, "model_max_length: got 100"),
        ({"lora_enable": True}, "lora_enable: got True"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio: got 'square'"),
        ({"data": "other"}, "contents of data_path: got"),
    ],
)
def test_another_run_is_refused(change, message, run, model, data, tmp_path):
    files = DataArguments(data.data_path, data.image_folder, change.pop("image_aspect_ratio", "pad"))
    if change.pop("data", None):
        file = tmp_path / "data.json"
        file.write_text(Path(data.data_path).read_text().replace('"value": "red"', '"value": "pink"'))
        files = DataArguments(str(file), data.image_folder)
    own = {name: change.pop(name) for name in list(change) if hasattr(model, name)}
    with pytest.raises(ValueError, match=message):
        train(ModelArguments(**vars(model) | own), files, arguments(run, **change))


def test_data_may_move(run, model, data, tmp_path):
    copy = shutil.copytree(data.image_folder, tmp_path / "moved")
    moved = DataArguments(str(copy / "data.json"), str(copy))
    assert train(model, moved, arguments(run)) == run


def test_a_named_checkpoint_is_taken(run, model, data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    named = str(run / "checkpoint-1")
    train(model, data, arguments(tmp_path / "new", resume_from_checkpoint=named))
    assert f"goes on from {named}" in caplog.text
    (run / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint: .* is no complete checkpoint .no optimizer.pt."):
        train(model, data, arguments(tmp_path / "other", resume_from_checkpoint=named))


def test_another_pace_is_said(run, model, data, caplog):
    train(model, data, arguments(run, learning_rate=1e-2, max_steps=3))
    assert "learning_rate: got 0.01, but" in caplog.text and step_of(run) == 3
