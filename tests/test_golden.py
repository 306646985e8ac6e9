"""`compat: official` against the outputs of the authors' own code (skipped where these are not at hand).

Every case that the folder's manifest lists is tried; see test_golden_next for tiles.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_folder
from safetensors.torch import load_file

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig
from mustdrop import MustDrop, load_reducer
from mustdrop.hooks import ForwardState, ImageFacts, PromptFacts, Reducer, Tokens
from mustdrop.methods import DART

FILTER_LAYERS = (2, 6, 10, 14)


def listed(*kind: str) -> dict:
    """What the manifest says of the cases of a kind, by their names; nothing where there is no manifest."""
    file = golden_folder() / "manifest.json"
    facts = json.loads(file.read_text()) if file.is_file() and (golden_folder() / "model_llava").is_dir() else {}
    for name in kind:
        facts = facts.get(name, {})
    return {name: own for name, own in facts.items() if isinstance(own, dict) and "file" in own}


@pytest.fixture(scope="module")
def model(golden):
    return load_pretrained_model(str(golden / "model_llava"), None, "llava", torch_dtype=torch.float32)[1]


@pytest.fixture(scope="module")
def manifest(golden):
    return json.loads((golden / "manifest.json").read_text())


@pytest.mark.parametrize("case", listed("llava"))
@torch.no_grad()
def test_plain_llava(golden, model, case):
    expected = load_file(golden / f"llava_{case}.safetensors")
    preprocessed = load_file(golden / "preprocess.safetensors")
    pixels = preprocessed["img1_pad"]
    if case == "multi_image_list":
        pixels = [preprocessed["img1_pad"][0], preprocessed["img3_pad"][0]]
    ids = expected["input_ids"]
    prepared = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, pixels)
    torch.testing.assert_close(prepared[4], expected["inputs_embeds"], atol=1e-4, rtol=0)
    assert torch.equal(prepared[5], expected["prepared_labels"])
    output = model.generate(
        ids, images=pixels, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected["generate_output"][:, 1:].tolist()
    torch.testing.assert_close(torch.stack(output.logits), expected["logits_steps"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("picture", listed("vision"))
@torch.no_grad()
def test_vision_stage(golden, model, picture):
    expected = load_file(golden / f"vision_{picture}.safetensors")
    state = ForwardState(MustDrop(compat="official"))
    tokens = model.encode_images(expected["pixel_values"], state)
    sources = [row[row >= 0].tolist() for row in expected["post_merge_source"]]
    owned = [(tokens.patch_to_token[0] == column).nonzero()[:, 0].tolist() for column in range(len(sources))]
    assert owned == sources
    torch.testing.assert_close(tokens.hidden[0], expected["projected"], atol=1e-4, rtol=0)
    assert set(tokens.protected[0].nonzero()[:, 0].tolist()) == set(expected["key_set"].tolist())
    features = model.get_vision_tower().encode(expected["pixel_values"], ForwardState(MustDrop(compat="official")))
    torch.testing.assert_close(features.hidden[0], expected["selected_hidden"][1:], atol=1e-4, rtol=0)
    plain = model.get_vision_tower().encode(expected["pixel_values"], ForwardState(Reducer()))
    assert plain.hidden.shape[1] == 576


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", listed("mustdrop", "cases"))
def test_whole_runs(golden, model, manifest, monkeypatch, case, implementation):
    facts = manifest["mustdrop"]["cases"][case]
    expected, vision = load_file(golden / facts["file"]), load_file(golden / facts["vision_file"])
    for config in (model.config, model.get_vision_tower().config):
        monkeypatch.setattr(config, "_attn_implementation_internal", implementation)
    reducer = MustDrop(facts["global_thr"], facts["individual_thr"], compat="official")
    calls = []
    original = model.model.finish_prefill
    monkeypatch.setattr(model.model, "finish_prefill", lambda *a: (calls.append(a[-1]), original(*a)))
    with reducer.on(model) as run:
        output = model.generate(
            expected["input_ids"][None],
            images=vision["pixel_values"],
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    trace, cache, (state,) = run.traces[-1], output.past_key_values, calls
    sources = vision["post_merge_source"]

    assert output.sequences[0].tolist() == expected["greedy_ids"].tolist()
    torch.testing.assert_close(output.logits[0][0], expected["logits_first"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(output.logits), expected["logits_steps"], atol=1e-4, rtol=0)
    assert trace.vision_tokens_after == expected["num_token_per_layer"].tolist()
    assert trace.mean_tokens_official == pytest.approx(expected["equal_token_number"].item())
    assert trace.mean_tokens >= trace.mean_tokens_official
    assert trace.cache_lengths == expected["kv_len_after_prefill"].tolist()
    for number, layer in enumerate(FILTER_LAYERS):
        patches = sources[expected[f"prune{number}.vis_indices_postmerge"]]
        assert trace.kept["prefill"][layer] == sorted(patches[patches >= 0].tolist())
        assert state.tokens_out[layer].position[0].tolist() == expected[f"prune{number}.position_ids_after"].tolist()
    for name, key in expected.items():
        if name.startswith("kv.") and name.endswith(".key"):
            layer = int(name.split(".")[1])
            entry = cache.layers[layer]
            torch.testing.assert_close(entry.keys[0, :, : key.shape[1]], key, atol=1e-4, rtol=0)
            value = expected[f"kv.{layer}.value"]
            torch.testing.assert_close(entry.values[0, :, : key.shape[1]], value, atol=1e-4, rtol=0)
    lengths = expected["decode_kv_seq_len"]
    assert [cache.length(layer) for layer in range(32)] == lengths[-1].tolist()
    following = torch.stack([cache.positions(layer, 1)[0, 0] for layer in range(32)])
    assert following.tolist() == (expected["decode_position_ids"][-1] + 1).tolist()


def run_rival(model, golden, settings, expected, image="img1"):
    """A rival on a golden prompt: its logits and ids are those of its authors; returns the trace."""
    ids = expected.get("input_ids", load_file(golden / "llava_img1A.safetensors")["input_ids"]).view(1, -1)
    with load_reducer({**settings, "compat": "official"}).on(model) as record:
        output = model.generate(
            ids,
            images=load_file(golden / f"vision_{image}.safetensors")["pixel_values"],
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    greedy = expected["greedy_ids"] if "greedy_ids" in expected else expected["generate_output"][1:]
    assert output.sequences[0].tolist() == greedy.tolist()
    torch.testing.assert_close(torch.cat(output.logits), expected["logits_steps"], atol=1e-4, rtol=0)
    return record.traces[0]


@pytest.mark.parametrize("facts", listed("fastv_kv").values(), ids=listed("fastv_kv"))
def test_fastv(golden, model, facts):
    expected, layer = load_file(golden / facts["file"]), facts["K"]
    settings = {"method": "fastv", "layer": layer, "drop_ratio": facts["R"]}
    trace = run_rival(model, golden, settings, expected)
    assert trace.kept["prefill"] == {layer - 1: expected["kept_indices_sorted"].tolist()}
    assert trace.cache_lengths == expected["kv_len_after_prefill"].tolist()


@pytest.mark.parametrize("facts", listed("pdrop").values(), ids=listed("pdrop"))
def test_pyramiddrop(golden, model, facts):
    expected, layers = load_file(golden / facts["file"]), facts["layer_list"]
    settings = {"method": "pyramiddrop", "layers": layers, "ratios": facts["image_token_ratio_list"][1:]}
    trace = run_rival(model, golden, settings, expected, facts["image"])
    for stage, layer in enumerate(layers):
        assert trace.kept["prefill"][layer - 1] == expected[f"stage{stage}.kept_indices_original"].tolist()
    assert [count + trace.text_tokens for count in trace.vision_tokens] == expected["prefill_len_per_layer"].tolist()


@pytest.mark.parametrize("facts", listed("visionzip").values(), ids=listed("visionzip"))
def test_visionzip(golden, model, facts):
    expected = load_file(golden / facts["file"])
    settings = {"method": "visionzip", "dominant": facts["dominant_arg"], "contextual": facts["contextual"]}
    trace = run_rival(model, golden, settings, expected, facts["image"])
    stays = (expected["topk_indices"] - 1).sort().values
    rest = torch.tensor([patch for patch in range(576) if patch not in set(stays.tolist())])
    targets = rest[expected["target_indices"]]
    joining = rest[~torch.isin(rest, targets)]
    groups = [[target, *joining[expected["assignment"] == number]] for number, target in enumerate(targets.tolist())]
    assert trace.tokens == [[], *([patch] for patch in stays.tolist()), *(sorted(map(int, group)) for group in groups)]
    state = ForwardState(load_reducer({**settings, "compat": "official"}))
    pixels = load_file(golden / f"vision_{facts['image']}.safetensors")["pixel_values"]
    tokens = model.get_vision_tower().encode(pixels, state).hidden
    torch.testing.assert_close(tokens[0], expected["tokens_out"], atol=1e-4, rtol=0)


def sparsevlm(version: str) -> dict:
    return {name: facts for name, facts in listed("sparsevlm").items() if facts["USE_VERSION"] == version}


@pytest.mark.parametrize("facts", sparsevlm("1_0").values(), ids=sparsevlm("1_0"))
def test_sparsevlm_with_recycling(golden, model, monkeypatch, facts):
    expected, retain = load_file(golden / facts["file"]), facts["RETAIN_TOKN"]
    calls = []
    original = model.model.finish_prefill
    monkeypatch.setattr(model.model, "finish_prefill", lambda *a: (calls.append(a[-1]), original(*a)))
    trace = run_rival(model, golden, {"method": "sparsevlm", "version": 1, "retain": retain}, expected, facts["image"])
    assert [count + trace.text_tokens for count in trace.vision_tokens] == expected["prefill_len_per_layer"].tolist()
    for stage, layer in enumerate((2, 6, 15)):
        before, after = calls[0].tokens_in[layer], calls[0].tokens_out[layer]
        assert after.position[0].tolist() == expected[f"stage{stage}.position_ids_after"].tolist()
        selected = before.vision_index[0][before.vision[0]][expected[f"stage{stage}.selected_mask_current"].bool()]
        assert after.vision_index[0][after.vision[0]][: len(selected)].tolist() == selected.tolist()
        assert int(after.vision.sum()) == len(selected) + len(expected[f"stage{stage}.merged_tokens"])


@pytest.fixture(scope="module")
def sixteen_heads(golden):
    """The golden model with its widths cut into 16 heads: the second version of SparseVLM chooses 14 of them."""
    config = LlavaConfig.from_pretrained(golden / "model_llava")
    config.num_attention_heads = config.num_key_value_heads = 16
    config.head_dim = config.hidden_size // 16
    return LlavaLlamaForCausalLM.from_pretrained(golden / "model_llava", config=config, dtype=torch.float32)


@pytest.mark.parametrize("facts", sparsevlm("2_0").values(), ids=sparsevlm("2_0"))
def test_sparsevlm_without_recycling(golden, sixteen_heads, facts):
    expected = load_file(golden / facts["file"])
    settings = {"method": "sparsevlm", "version": 2, "retain": facts["RETAIN_TOKN"]}
    trace = run_rival(sixteen_heads, golden, settings, expected, facts["image"])
    left = torch.arange(576)
    for stage, layer in enumerate((2, 6, 15)):
        left = left[expected[f"stage{stage}.selected_mask_current"].bool()]
        assert trace.kept["prefill"][layer] == left.tolist()
    assert [count + trace.text_tokens for count in trace.vision_tokens] == expected["prefill_len_per_layer"].tolist()


@pytest.mark.parametrize("budget", [32, 64, 128, 192])
def test_dart(golden, budget):
    """The authors' choice on every stored picture: states after the norm, one layer's keys, the question last."""
    checked = 0
    for file in sorted((golden / "newer").glob("picture_?.safetensors")):
        stored = load_file(file)
        if (kept := stored.get(f"out.dart.{budget}.kept")) is None:
            continue
        column = torch.arange(len(stored["in.hidden"]))[None]
        image = torch.where((column >= 35) & (column < 611), 0, -1)
        facts = (PromptFacts(59, 24, (ImageFacts(576, 576, 576),)),)
        none = torch.zeros_like(column, dtype=torch.bool)
        tokens = Tokens(
            column, column, image, column, none, column >= 611, images=1, instruction_tokens=24, prompts=facts
        )
        method = DART(tokens=budget, compat="official")
        units = F.normalize(stored["in.hidden"], dim=-1)[None]
        norms = stored["in.keys"].abs().sum((0, 2))[None]
        chosen = method.least_duplicated(units, norms, tokens, [[method.schedule(32, 576)[1]]])
        assert (chosen[0].nonzero()[:, 0] - 35).tolist() == kept.tolist()
        checked += 1
    if not checked:
        pytest.skip("no such case")
