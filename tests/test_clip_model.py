"""The embedded model of clips: trained a little, exported without its tower, loaded, and refused where parts lack."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.mini import clip_training
from eval.mini.clip_evaluate import ClipModel
from eval.mini.clip_questions import clip_questions
from eval.mini.clip_scenes import CLIP_GRID, MOMENTS, draw_clip
from eval.mini.clip_training import choose_patches, clip_features, training_clips, tune_clips
from eval.mini.data import prompt_parts
from eval.mini.endtoend import MiniLlava
from eval.mini.export import export_clips
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints" / "llava-mini"
pytestmark = pytest.mark.skipif(not (MINI / "config.json").is_file(), reason="needs checkpoints/llava-mini")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint after one small step of each kind, and what is exported from it beside its tower's folder."""
    work = tmp_path_factory.mktemp("clips")
    (work / "llava-mini").symlink_to(MINI)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_training, "BATCH", {0: (1, 0), 1: (1, 6)})
        state = tune_clips(work / "llava-mini", work / "clips.pt", "0:1,1:1", n_clips=2, lr=1e-3)
    return state, export_clips(state, work / "model", work / "llava-mini")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the exported folder, its tower still in reach."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in trained[1].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change_config(folder, mm_vision_tower=str(MINI))
    return folder


def change_config(folder, **changes) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | changes))


def test_only_what_differs_is_stored_and_the_rest_comes_from_the_image_model(trained):
    state, folder = trained
    stored = load_file(folder / "model.safetensors")
    towers = [name for name in stored if "vision_tower" in name]
    assert towers == ["model.vision_tower.vision_tower.embeddings.position_embedding.weight"]
    assert json.loads((folder / "config.json").read_text())["mm_vision_tower"] == "../llava-mini"
    model = load_pretrained_model(folder, torch_dtype="float32")[1]
    theirs = load_file(MINI / "model.safetensors")
    for name, value in model.get_vision_tower().vision_tower.state_dict().items():
        own = next(
            theirs[key]
            for key in theirs
            if key.endswith(f"vision_tower.{name}") or key.endswith(f"vision_model.{name}")
        )
        if "position" not in name:
            assert torch.equal(value, own.float())
            continue
        middle = own[1:].view(24, 24, -1)[4:20, 4:20].flatten(0, 1)
        assert torch.equal(value, torch.cat((own[:1], middle)).float())


@torch.no_grad()
def test_loaded_model_sees_and_says_what_the_trained_one_does(trained):
    state, folder = trained
    tokenizer, model, processor, context = load_pretrained_model(folder, torch_dtype="float32")
    mini = MiniLlava.from_state_dict(torch.load(state, weights_only=True))
    clip, asked = next(clip_questions("test", 1, 4))
    pixels = process_images([Image.fromarray(frame) for frame in draw_clip(clip)], processor, model.config)
    features = model.get_vision_tower()(pixels).flatten(0, 1)
    torch.testing.assert_close(features, clip_features(mini.tower, [clip])[0].float(), atol=0.15, rtol=0.05)
    before, after = prompt_parts(asked[0].text)
    ids = tokenizer_image_token(f"{before}<image>{after}", tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    embeds = model.splice(ids, images=[pixels]).embeds
    assert embeds.shape[1] == ids.shape[1] - 1 + MOMENTS * CLIP_GRID**2 <= context
    theirs = mini.model.set_attn_implementation("eager") or mini.model(inputs_embeds=embeds).logits[0, -1]
    torch.testing.assert_close(model(input_ids=ids, images=[pixels]).logits[0, -1], theirs, atol=0.05, rtol=0.02)


@torch.no_grad()
def test_evaluation_in_one_pass_is_greedy_decoding(trained):
    model = ClipModel.load(trained[1])
    clip, asked = next(clip_questions("test", 1, 2))
    frames, tokenizer = draw_clip(clip), model.packer.tokenizer
    pixels = process_images([Image.fromarray(frame) for frame in frames], model.image_processor, model.whole.config)
    said = []
    for question in asked:
        before, after = prompt_parts(question.text)
        ids = tokenizer_image_token(f"{before}<image>{after}", tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        answer = model.whole.generate(ids, images=[pixels], max_new_tokens=3, do_sample=False)
        said.append(tokenizer.decode(answer[0, -3:] if answer.shape[1] > 3 else answer[0], skip_special_tokens=True))
    assert model.right(frames, asked) == [one.strip() == item.answer for one, item in zip(said, asked, strict=True)]


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.mm_projector.2.bias", "lm_head.weight"])
def test_a_missing_weight_that_is_not_the_towers_is_refused(copy, name):
    weights = load_file(copy / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != name}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 weights are missing .*{name}"):
        load_pretrained_model(copy)


def test_the_position_table_of_another_size_is_not_taken_from_the_tower(copy):
    weights = load_file(copy / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "vision_tower" not in key}, copy / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"position_embedding.weight has the shape \[577, 192\], config.json says \[257"
    ):
        load_pretrained_model(copy)


def test_without_the_image_model_the_checkpoint_is_refused(copy):
    change_config(copy, mm_vision_tower="../nowhere")
    with pytest.raises(ValueError, match="weights are missing .*vision_tower"):
        load_pretrained_model(copy)


def test_training_goes_on_where_it_stopped_and_learns_from_answers_alone(trained, tmp_path):
    state = torch.load(trained[0], weights_only=True)
    assert state["step"] == 2
    before = trained[0].stat().st_mtime_ns
    tune_clips(MINI, trained[0], "0:1,1:1", n_clips=2)
    assert trained[0].stat().st_mtime_ns == before
    tower = MiniLlava.from_hugging_face(MINI).tower.state_dict()
    assert all(torch.equal(value, state["tower"][name]) for name, value in tower.items())
    with pytest.raises(ValueError, match="holds features of 2 clips, expected 3"):
        tune_clips(MINI, trained[0], "0:1,1:2", n_clips=3)


def test_export_beside_another_tower_is_refused(trained, tmp_path):
    state = torch.load(trained[0], weights_only=True)
    state["tower"]["embeddings.class_embedding"] += 1
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="has another vision tower than .*other.pt"):
        export_clips(tmp_path / "other.pt", tmp_path / "x", MINI)


def test_patches_are_chosen_blindly_and_evenly():
    for per_block in (1, 2, 4):
        chosen = choose_patches(np.random.default_rng(0), per_block)
        blocks = torch.stack((chosen // CLIP_GRID // 2, chosen % CLIP_GRID // 2), -1)
        assert (torch.unique(blocks, dim=0, return_counts=True)[1] == per_block).all()
        assert len(chosen) == 64 * per_block and (chosen.diff() > 0).all()
    assert len({clip.seed for seed in (0, 1) for clip in training_clips(seed, 3)}) == 6
