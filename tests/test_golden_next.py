"""LLaVA-NeXT tiles against the outputs of the authors' own code (skipped where these are not at hand).

Every case that the folder's manifest lists is tried, whatever its canvas.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, golden_folder
from safetensors.torch import load_file, save_file

from llava.mm_utils import load_image, process_images
from llava.model.builder import load_pretrained_model
from mustdrop import MustDrop, load_reducer
from mustdrop.hooks import ForwardState

FILTER_LAYERS = (2, 6, 10, 14)


def folder() -> Path:
    """Where the cases lie: a folder of the golden one, or that itself."""
    inside = golden_folder() / "next"
    return inside if (inside / "manifest.json").is_file() else golden_folder()


def cases(kind: str) -> list[str]:
    """Names of the cases of a kind; none where the folder holds other outputs."""
    file = folder() / "manifest.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    return list(facts.get(kind, {})) if "tiles" in str(facts.get("what")) else []


@pytest.fixture(scope="module")
def manifest():
    return json.loads((folder() / "manifest.json").read_text())


def vision_of(facts: dict) -> dict[str, torch.Tensor]:
    """The tiles of a case, and what the authors' tower made of them."""
    return load_file(folder() / facts.get("vision_file", f"vision_{facts.get('canvas')}.safetensors"))


def beside(pattern: str) -> Path:
    """A file or folder that cases need: theirs, or that of the public ones where further cases come without."""
    public = REPOSITORY.parent / "shared" / "golden"
    places = (folder(), *folder().parents, public / "next", public)
    return next(found for place in places for found in sorted(place.glob(pattern)))


def newline() -> torch.Tensor:
    """The embedding at the end of rows, which a vision file holds, as float16 `[width]`."""
    files = [*sorted(folder().glob("vision_*.safetensors")), beside("vision_2x2.safetensors")]
    held = (load_file(file).get("image_newline") for file in files)
    return next(one for one in held if one is not None).to(torch.float16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The golden weights with the newline, under the configuration of the cases."""
    weights = beside("model_llava").parent
    place = tmp_path_factory.mktemp("next")
    for name in ("model_llava", "model_clip"):
        shutil.copytree(weights / name, place / name, copy_function=shutil.copyfile)
    place.joinpath("model_llava").chmod(0o755)
    for file in (place / "model_llava").iterdir():
        file.chmod(0o644)
    shutil.copyfile(beside("config.json"), place / "model_llava" / "config.json")
    state = load_file(place / "model_llava" / "model.safetensors")
    save_file({**state, "model.image_newline": newline()}, place / "model_llava" / "model.safetensors")
    return load_pretrained_model(place / "model_llava", torch_dtype=torch.float32)[1]


@pytest.fixture(scope="module")
def processor(model):
    return model.get_vision_tower().image_processor


def pixels_of(vision: dict[str, torch.Tensor], processor) -> torch.Tensor:
    """What `process_images` returns for the tiles, `[tiles, 3, height, width]`."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (vision["tiles_uint8"].permute(0, 3, 1, 2).to(torch.float64).div(255).float() - mean) / std


def answered(model, ids: torch.Tensor, vision: dict[str, torch.Tensor], reducer=None):
    """Twelve greedy tokens for a prompt `[length]` about the tiles, and the trace."""
    reducer = load_reducer({"method": "vanilla"}) if reducer is None else reducer
    with reducer.on(model) as run:
        output = model.generate(
            ids.view(1, -1),
            images=[pixels_of(vision, model.get_vision_tower().image_processor)],
            image_sizes=[tuple(vision["image_size_wh"].tolist())],
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output, run.traces[-1]


def assert_answer(output, expected) -> None:
    greedy = expected["greedy_ids"] if "greedy_ids" in expected else expected["generate_output"].flatten()[1:]
    assert output.sequences[0].tolist() == greedy.tolist()
    torch.testing.assert_close(torch.cat(output.logits), expected["logits_steps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", cases("mustdrop"))
def test_mustdrop_merges_and_protects_tile_by_tile(model, processor, manifest, case):
    expected = vision_of(manifest["mustdrop"][case])
    pixels = pixels_of(expected, processor)
    tokens = model.encode_images(pixels, ForwardState(MustDrop(compat="official")))
    assert len(tokens.hidden) == len(expected["tiles_uint8"])
    for tile, sources in enumerate(expected["post_merge_source"]):
        owned = [(tokens.patch_to_token[tile] == column).nonzero()[:, 0].tolist() for column in range(len(sources))]
        assert owned == [row[row >= 0].tolist() for row in sources]
        assert set(tokens.protected[tile].nonzero()[:, 0].tolist()) == set(expected["key_set"][tile].tolist())
    torch.testing.assert_close(tokens.hidden, expected["projected"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", cases("mustdrop"))
def test_mustdrop(model, manifest, monkeypatch, case):
    facts = manifest["mustdrop"][case]
    expected, vision = load_file(folder() / facts["file"]), vision_of(facts)
    calls = []
    original = model.model.finish_prefill
    monkeypatch.setattr(model.model, "finish_prefill", lambda *a: (calls.append(a[-1]), original(*a)))
    reducer = MustDrop(facts["global_thr"], facts["individual_thr"], compat="official")
    output, trace = answered(model, expected["input_ids"], vision, reducer)
    cache, tiles = output.past_key_values, len(vision["tiles_uint8"])
    assert_answer(output, expected)
    assert trace.vision_tokens_after == expected["num_token_per_layer"].tolist()
    # Their number is divided by the number of tiles; ours is that of the image with all of them.
    assert trace.mean_tokens_official == pytest.approx(expected["equal_token_number"].item() * tiles)
    assert trace.cache_lengths == expected["kv_len_after_prefill"].tolist()
    assert [image["views"] for image in trace.images] == [tiles]
    sources = vision["post_merge_source"].clone()
    patches = trace.images[0]["patches"] // tiles
    sources += (torch.arange(tiles)[:, None, None] * patches) * (sources >= 0)
    sources = sources.flatten(0, 1)
    for number, layer in enumerate(FILTER_LAYERS):
        left = sources[expected[f"prune{number}.vis_indices_postmerge"]]
        assert trace.kept["prefill"][layer] == sorted(left[left >= 0].tolist())
        positions = calls[0].tokens_out[layer].position[0].tolist()
        assert positions == expected[f"prune{number}.position_ids_after"].flatten().tolist()
    for name, key in expected.items():
        if name.startswith("kv.") and name.endswith(".key"):
            entry, value = cache.layers[int(name.split(".")[1])], expected[name.replace(".key", ".value")]
            torch.testing.assert_close(entry.keys[0, :, : key.shape[1]], key, atol=1e-4, rtol=0)
            torch.testing.assert_close(entry.values[0, :, : key.shape[1]], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", cases("visionzip"))
def test_visionzip(model, manifest, case):
    facts = manifest["visionzip"][case]
    expected, vision = load_file(folder() / facts["file"]), vision_of(facts)
    numbers = {"dominant": facts["dominant_arg"], "contextual": facts["contextual"]}
    reducer = load_reducer({"method": "visionzip", "compat": "official", **numbers})
    output, trace = answered(model, expected["input_ids"], vision, reducer)
    assert_answer(output, expected)
    patches = trace.images[0]["patches"] // len(vision["tiles_uint8"])
    for owned, tile, patch in zip(trace.tokens, expected["packed_tile"], expected["packed_patch"], strict=True):
        if patch >= 0:
            assert owned == [int(tile * patches + patch)]
        elif patch == -1:
            assert owned == []
        else:
            assert len(owned) > 0 and {one // patches for one in owned} == {int(tile)}


@pytest.mark.parametrize("case", cases("llava"))
def test_plain_llava(model, manifest, case):
    facts = manifest["llava"][case]
    expected, vision = load_file(folder() / facts["file"]), vision_of(facts)
    output, trace = answered(model, expected["input_ids"], vision)
    assert_answer(output, expected)
    shown = expected["packed_source"]
    assert trace.vision_tokens[0] == int((shown >= 0).sum())
    assert trace.text_tokens == expected["input_ids"].numel() - 1 + int((shown < 0).sum())


def pictures() -> list[dict]:
    """What the manifest says of the pictures that are there, of one canvas or of several."""
    if not cases("llava"):
        return []
    facts = json.loads((folder() / "manifest.json").read_text())["vision"]
    every = [facts] if "file" in facts else [own for own in facts.values() if isinstance(own, dict)]
    return [own for own in every if (folder() / str(own.get("picture"))).is_file()]


@pytest.mark.parametrize("facts", pictures(), ids=lambda facts: facts["file"])
def test_tiles_of_the_picture(model, processor, facts):
    vision = load_file(folder() / facts["file"])
    picture = load_image(folder() / facts["picture"])
    assert picture.size == tuple(vision["image_size_wh"].tolist())
    pixels = process_images([picture], processor, model.config)
    torch.testing.assert_close(pixels[0], pixels_of(vision, processor), atol=1e-6, rtol=0)
