"""Results' keys and fingerprints: contents decide, never names, paths or the working directory."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from fabricated import write_cell

from eval import provenance
from eval.methods import read_method
from eval.provenance import model_fingerprint
from eval.report.results import load
from eval.run.cell import Cell, _model_fingerprint


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    _model_fingerprint.cache_clear()


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "a" / "llava-one"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return folder


def test_names_and_places_of_a_model_do_not_matter(model, tmp_path, monkeypatch):
    first = model_fingerprint(str(model))
    copy = tmp_path / "b" / "another name"
    shutil.copytree(model, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert model_fingerprint(str(copy)) == first
    monkeypatch.chdir(tmp_path)
    assert model_fingerprint("a/llava-one") == model_fingerprint("a/../a/llava-one/") == first
    (tmp_path / "link").symlink_to(model)
    assert model_fingerprint("link") == first
    model.rename(tmp_path / "moved")
    assert model_fingerprint("moved") == first


def test_keys_follow_the_contents(model, tmp_path):
    copy = tmp_path / "renamed"
    shutil.copytree(model, copy)
    cell = Cell(str(model), "gqa", "mini_gqa")
    assert replace(cell, model=str(copy)).key == cell.key
    assert not any("renamed" in text or "llava-one" in text for text in map(str, cell.identity().values()))


@pytest.mark.parametrize("large", [False, True])
def test_other_weights_of_the_same_size_are_another_model(model, monkeypatch, large):
    if large:
        monkeypatch.setattr(provenance, "LARGE", 100)
    first = model_fingerprint(str(model))
    stamp = (model / "model.safetensors").stat()
    content = bytearray(1000)
    content[777] = 1
    (model / "model.safetensors").write_bytes(content)
    os.utime(model / "model.safetensors", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert model_fingerprint(str(model)) != first


def test_large_files_are_read_once(model, monkeypatch):
    monkeypatch.setattr(provenance, "LARGE", 100)
    read, sha256 = [], provenance._sha256
    monkeypatch.setattr(provenance, "_sha256", lambda path: read.append(path.name) or sha256(path))
    first = model_fingerprint(str(model))
    assert "model.safetensors" in read
    read.clear()
    assert model_fingerprint(str(model)) == first and "model.safetensors" not in read
    for kept in (provenance.cache_folder() / "hashes").iterdir():
        kept.write_bytes(b"\xffdamaged")
    assert model_fingerprint(str(model)) == first
    (provenance.cache_folder() / "hashes").rename(provenance.cache_folder() / "was")
    (provenance.cache_folder() / "hashes").write_text("a file in its place")
    assert model_fingerprint(str(model)) == first


def test_what_training_leaves_beside_a_model_does_not_matter(model):
    first = model_fingerprint(str(model))
    for name in (
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-5/model.safetensors",
        ".git/x.json",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/somewhere/else"}, indent=4))
    assert model_fingerprint(str(model)) == first
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 9}))
    assert model_fingerprint(str(model)) != first


@pytest.mark.parametrize(
    ("file", "field"), [("config.json", "mm_vision_tower"), ("adapter_config.json", "base_model_name_or_path")]
)
def test_towers_and_bases_elsewhere_count_by_their_contents(model, tmp_path, file, field):
    prints = []
    for name, weights in (("one", b"1"), ("two", b"1"), ("three", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (model / file).write_text(json.dumps({field: str(tmp_path / name)}))
        prints.append(model_fingerprint(str(model)))
    assert prints[0] == prints[1] != prints[2]
    (model / file).write_text(json.dumps({field: str(model)}))  # points to itself
    assert model_fingerprint(str(model)) not in prints
    (model / file).write_text("[1")
    assert model_fingerprint(str(model))


def test_methods_count_by_their_contents(model, tmp_path, monkeypatch):
    keys = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "heads.npy", np.full((2, 2), True))
        (tmp_path / folder / f"{folder}.yaml").write_text("method: yopo\nheads: heads.npy\n")
        parts = {"method": "compose", "parts": [{"method": "fastv"}, str(tmp_path / folder / f"{folder}.yaml")]}
        (tmp_path / folder / "both.yaml").write_text(yaml.safe_dump(parts))
        settings = [read_method(str(tmp_path / folder / name)) for name in (f"{folder}.yaml", "both.yaml")]
        keys.append([Cell(str(model), "gqa", "mini_gqa", settings=one).key for one in settings])
    assert keys[0] == keys[1]
    (tmp_path / "y" / "y.yaml").write_text("method: yopo\nheads: heads.npy\nblocks: 3\n")
    assert Cell(str(model), "gqa", "mini_gqa", settings=settings[1]).key != keys[0][1]


def test_hub_models_count_by_their_commit(monkeypatch, tmp_path):
    import huggingface_hub

    commit = "c" * 40
    cached = tmp_path / "models--a--b" / "snapshots" / commit / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, name: str(cached))
    before = model_fingerprint("a/b")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda model, name: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    info = type("Info", (), {"sha": commit})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    assert model_fingerprint("a/b") == before, "it has changed by being downloaded"
    info.sha = "d" * 40
    assert model_fingerprint("a/b") != before


def test_two_checkpoints_of_one_name_are_never_compared(tmp_path):
    for method, model_files in (("vanilla", "one"), ("fastv", "two")):
        file = write_cell(tmp_path, "mini_gqa", method, 18)
        content = json.loads(file.read_text())
        content["identity"]["model_files"] = model_files
        file.write_text(json.dumps(content))
    results, notes = load([tmp_path])
    assert dict(zip(results.method, results.share, strict=True)) == {"vanilla": 100, "fastv": None}
    assert notes == ["llava-mini: 2 checkpoints with different contents go by this name; none is compared with another"]
