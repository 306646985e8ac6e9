"""YOPO computes less and gets what masking would get: a slow reference that computes and masks all is the judge."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint import save_checkpoint
from PIL import Image
from tiny import LAYERS, SIDE, batch, hugging_face, ours, pictures, prompt, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eval.calibrate import heads as calibrate_heads
from eval.methods import CONFIGS
from mustdrop import MustDrop, Reducer, cost, load_reducer, macs
from mustdrop.compose import Compose
from mustdrop.hooks import LayerPlan
from mustdrop.macs import Workload
from mustdrop.methods import YOPO, Uniform
from mustdrop.methods.yopo import HeadAttention, head_mask
from mustdrop.neighbours import Window
from mustdrop.shape import ModelShape
from mustdrop.stages import LocalSpatialMerge

HEADS = 4
MASK = np.random.default_rng(0).random((LAYERS, HEADS)) < 0.5
MASK[:2], MASK[2], MASK[3] = True, [False, False, True, True], False
FIELDS = {
    "window": {"window": 3},
    "heads": {"heads": MASK.tolist()},
    "half of the heads": {"heads": 0.5},
    "no heads": {"heads": 0.0},
    "mlp": {"mlp_share": 0.5},
    "layers": {"layer_cut": 5},
    "all": {"window": 5, "heads": MASK.tolist(), "mlp_share": 0.25, "layer_cut": 6},
    "keys": {"heads": MASK.tolist(), "head_scope": "keys"},
    "keys, no heads": {"heads": 0.0, "head_scope": "keys"},
    "keys, window": {"window": 3, "heads": MASK.tolist(), "head_scope": "keys"},
    "keys, all": {"heads": MASK.tolist(), "head_scope": "keys", "mlp_share": 0.25, "layer_cut": 6},
}
strategies = pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
PROMPTS = [prompt(3, 6, seed=1), prompt(6, 2, images=2, seed=2), prompt(4, 3, images=0, seed=3)]
IMAGES = [pictures(1, seed=1), pictures(2, seed=2), None]


@dataclass
class Reference:
    """The definition with masks, one prompt at a time: all is computed, then what does not count is taken out."""

    model: torch.nn.Module
    yopo: YOPO
    keep: dict = field(default_factory=dict)  # per layer: which of the prompt's vision tokens go on (by index)

    def logits(self, ids, images, reducer, new_ids):
        """Logits `[new, vocabulary]` of a prompt and the first of its generated tokens, all in one pass."""
        with reducer.on(self.model), torch.no_grad():
            start = self.model.splice(ids, images=images)
        tokens = start.tokens
        more = self.model.get_input_embeddings()(new_ids[:, :-1])
        hidden, new = torch.cat([start.embeds, more], 1), more.shape[1]
        record = {
            name: F.pad(getattr(tokens, name)[0], (0, new), value=-1)
            for name in ("image", "vision_index", "row", "column")
        }
        for name in ("row", "column"):  # CLS and text lie off the grid, out of every window
            record[name] = record[name].masked_fill(record[name] < 0, -SIDE)
        position = torch.arange(new) + tokens.position.max() + 1
        rotary = self.model.model.rotary_emb(hidden, torch.cat([tokens.position, position[None]], 1))
        there = torch.ones(hidden.shape[1], dtype=torch.bool)
        for number, layer in enumerate(self.model.model.layers):
            if self.yopo.layer_cut is not None and number >= self.yopo.layer_cut:
                there &= record["image"] < 0
            hidden = self.layer(number, layer, hidden, rotary, record, there)
            if number in self.keep:
                there &= torch.isin(record["vision_index"], self.keep[number]) | (record["image"] < 0)
        hidden = self.model.model.norm(hidden)[:, -new - 1 :]
        return self.model.lm_head(hidden)[0]

    def layer(self, number, layer, hidden, rotary, record, there):
        attention, vision, width = layer.self_attn, record["image"] >= 0, layer.self_attn.head_dim
        mask = self.yopo.heads if isinstance(self.yopo.heads, float) else torch.tensor(self.yopo.heads[number])
        if isinstance(mask, float):
            mask = torch.arange(HEADS) < mask * HEADS
        states = layer.input_layernorm(hidden)
        query, key, value = (
            linear(states).unflatten(-1, (-1, width)).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        key, value = (states.repeat_interleave(HEADS // states.shape[1], 1) for states in (key, value))
        order = torch.arange(len(vision))
        sees = order <= order[:, None]
        if self.yopo.window is not None:
            down, right = (
                (record[name] - record[name][:, None]).abs() <= (self.yopo.window - 1) / 2 for name in ("row", "column")
            )
            near = down & right & (record["image"] == record["image"][:, None])
            sees = torch.where(vision & vision[:, None], near, sees)
        sees &= there | (order == order[:, None])
        scores = (query @ key.transpose(-1, -2) / math.sqrt(width)).masked_fill(~sees, -math.inf)
        shares = scores.softmax(-1)
        shares[:, ~mask] = shares[:, ~mask].masked_fill(vision, 0)
        output = (shares @ value).transpose(1, 2)
        if self.yopo.head_scope == "all":
            output = output.masked_fill(vision[:, None, None] & ~mask[:, None], 0)
        hidden = hidden + attention.o_proj(output.flatten(2))
        states, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        inner = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
        inner[:, vision, int(self.yopo.mlp_share * inner.shape[-1]) :] = 0
        return hidden + mlp.down_proj(inner)


def check_against_masks(model, yopo, ids, images, others=(), atol=1e-5):
    """Prefill and decoding of YOPO, with other reducers, against the masked definition."""
    reducer = Compose([*others, yopo]) if others else yopo
    new_ids, logits, (trace,) = run(model, reducer, inputs=ids, images=images)
    dropped = {layer: torch.tensor(survivors(trace, layer)) for layer in trace.kept["prefill"]}
    expected = Reference(model, yopo, dropped).logits(ids, images, reducer, new_ids)
    torch.testing.assert_close(logits[0], expected.float(), atol=atol, rtol=0)
    return trace


def survivors(trace, layer):
    """Vision tokens, by index, that a layer let go on."""
    kept = set(trace.kept["prefill"][layer])
    return [index for index, patches in enumerate(trace.tokens) if kept.issuperset(patches)]


@strategies
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_equals_the_masked_definition(fields, kv_heads):
    for ids, images in zip(PROMPTS[:2], IMAGES[:2], strict=True):
        trace = check_against_masks(ours(kv_heads=kv_heads), YOPO(**fields), ids, images)
        assert trace.vision_tokens[0] == len(images) * SIDE**2
        assert trace.vision_tokens[-1] == (0 if "layer_cut" in fields else trace.vision_tokens[0])


@strategies
def test_equals_the_masked_definition_after_merging_and_dropping(fields):
    drop = MustDrop(0.01, 0.03, stages=["vision", "prefill"])
    for ids, images in zip(PROMPTS[:2], IMAGES[:2], strict=True):
        trace = check_against_masks(ours(), YOPO(**fields), ids, images, [drop])
        assert trace.images[0]["tokens"] < SIDE**2 and trace.vision_tokens[4] < trace.vision_tokens[0]


@pytest.mark.parametrize("others", [[Uniform(30)], [LocalSpatialMerge()]], ids=["uniform", "merged"])
def test_neighbours_are_those_left_on_the_original_grid(others):
    check_against_masks(ours(), YOPO(window=3), PROMPTS[1], IMAGES[1], others)


def test_cls_is_off_the_grid():
    check_against_masks(ours(strategy="full"), YOPO(window=3), PROMPTS[0], IMAGES[0])


@pytest.mark.parametrize("name", ["all", "keys, all"])
def test_half_precision_equals_the_masked_definition(name):
    model = ours(dtype=torch.bfloat16)
    yopo = YOPO(**FIELDS[name])
    check_against_masks(model, yopo, PROMPTS[0], IMAGES[0].bfloat16(), atol=0.05)


@pytest.mark.parametrize("name", ["all", "keys, all"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side, name):
    model, inputs = ours(), batch(PROMPTS, side)
    with YOPO(**FIELDS[name]).on(model) as record, torch.no_grad():
        mask, images = inputs["attention_mask"], torch.cat(IMAGES[:2])
        together = model(inputs["inputs"], attention_mask=mask, images=images, use_cache=False).logits
        alone = [
            model(ids, images=picture, use_cache=False).logits[0, -1]
            for ids, picture in zip(PROMPTS, IMAGES, strict=True)
        ]
    assert [trace.vision_tokens[5:7] for trace in record.traces] == 2 * [[144, 0], [288, 0], [0, 0]]
    assert [trace.plans for trace in record.traces[:3]] == [trace.plans for trace in record.traces[3:]]
    torch.testing.assert_close(together[:, -1], torch.stack(alone), atol=1e-5, rtol=0)  # left padding after the cut


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_blocks_of_any_size_hold_the_same_neighbours(block):
    model = ours()
    with Compose([LocalSpatialMerge()]).on(model), torch.no_grad():
        tokens = model.splice(PROMPTS[1], images=IMAGES[1]).tokens
    text = int((~tokens.vision).sum())
    window = Window.of(tokens, ~tokens.vision, text, 5, block)
    sees = torch.zeros(tokens.vision.shape[1], tokens.vision.shape[1], dtype=torch.bool)
    for rows, keys, seen in zip(
        window.queries.unflatten(1, window.sees.shape[1:3])[0],
        window.keys.unflatten(1, (window.sees.shape[1], -1))[0],
        window.sees[0],
        strict=True,
    ):
        for row, mine in zip(rows.tolist(), seen, strict=True):
            if tokens.vision[0, row] and not sees[row].any():  # what follows the last token is padding
                sees[row, keys[mine]] = True
    image, down, right = tokens.image[0], tokens.row[0], tokens.column[0]
    near = (down - down[:, None]).abs().maximum((right - right[:, None]).abs()) <= 2
    vision, order = image >= 0, torch.arange(len(image))
    expected = torch.where(vision, near & (image == image[:, None]), order < order[:, None])
    assert torch.equal(sees[vision], expected[vision])


@pytest.mark.parametrize("scope", ["all", "keys"])
def test_values_of_inactive_heads_are_not_cached(scope):
    model = ours(kv_heads=4)
    with YOPO(heads=MASK.tolist(), head_scope=scope).on(model):
        cache = model.generate(
            PROMPTS[0], images=IMAGES[0], max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
    for layer, (entry, record) in enumerate(zip(cache.layers, cache.records, strict=True)):
        assert (entry.values[0][:, record.vision[0]] != 0).any(-1).any(-1).tolist() == MASK[layer].tolist()


def test_a_layer_cut_leaves_the_caches_before_it_alone():
    ids, images = PROMPTS[0], IMAGES[0]
    both = Compose([MustDrop(0, 0, similarity_threshold=1.1), YOPO(layer_cut=5)])
    trace = run(ours(), both, inputs=ids, images=images)[2][0]
    text = trace.text_tokens
    assert trace.cache_lengths == [SIDE**2 + text] * 5 + [text] * 3
    assert trace.kept["prefill"][5] == [] and trace.vision_tokens_after == trace.vision_tokens
    assert trace.mean_tokens == trace.mean_tokens_official == SIDE**2 * 5 / 8


@pytest.mark.parametrize("name", ["all", "keys", "keys, all"])
def test_gradients_flow_through_plans(name):
    model = ours()
    ids = PROMPTS[1]
    with YOPO(**FIELDS[name]).on(model):
        loss = model(input_ids=ids, labels=torch.where(ids < 3, -100, ids), images=IMAGES[1]).loss
    grads = torch.autograd.grad(loss, [layer.self_attn.q_proj.weight for layer in model.model.layers])
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_parts_of_other_linear_layers_are_refused():
    class Quantised(torch.nn.Linear):
        pass

    model = ours(seed=5)
    plain = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Quantised(*plain.weight.shape[::-1], bias=False)
    try:
        with YOPO(mlp_share=0.5).on(model), pytest.raises(ValueError, match="plan: a Quantised .* must be plain"):
            model.generate(PROMPTS[0], images=IMAGES[0], max_new_tokens=1)
    finally:
        model.model.layers[0].mlp.up_proj = plain


# Cost


@strategies
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("others", [[], [Uniform(50)]], ids=["alone", "dropped"])
def test_predicted_multiply_adds_are_what_torch_counts(fields, kv_heads, others):
    model = ours(kv_heads=kv_heads)
    shape = ModelShape.from_config(hugging_face(kv_heads=kv_heads).config.to_dict())
    ids = prompt(3, 6, images=2, seed=4)
    with Compose([*others, YOPO(**fields)]).on(model) as record:
        spliced = model.splice(ids, images=IMAGES[1], padding_side="left")
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(inputs_embeds=spliced.embeds, prompt=spliced, use_cache=True, logits_to_keep=1)
    (trace,) = record.traces
    facts = json.loads(json.dumps(trace.to_dict()))
    work = Workload.of(
        shape,
        facts["vision_tokens"],
        text_tokens=facts["text_tokens"],
        image_tokens=[image["tokens"] for image in facts["images"]],
        plans=facts["plans"],
    )
    assert 2 * macs.costs(shape, work)["prefill"] == counter.get_total_flops()
    assert work.filter_layers == () and list(work.vision_tokens_after) == facts["vision_tokens_after"]
    if not others:
        estimated = Workload.of(
            shape,
            text_tokens=work.text_tokens,
            image_tokens=work.image_tokens,
            plans={layer: plan for layer in range(LAYERS) if (plan := YOPO(**fields).plan(layer, LAYERS))},
        )
        assert estimated.vision_tokens == work.vision_tokens
        assert macs.costs(shape, estimated)["prefill"] == pytest.approx(macs.costs(shape, work)["prefill"], rel=0.02)


@pytest.mark.parametrize(
    ("model", "fields", "teraflops"),
    [
        ("llava-1.5-7b", {"layer_cut": 0.5, "heads": 0.5, "mlp_share": 0.5}, 1.91),
        ("llava-1.5-13b", {"layer_cut": 0.5, "heads": 0.5, "mlp_share": 0.5}, 3.72),
        ("llava-1.5-7b", {"layer_cut": 16}, 3.82),
        ("llava-1.5-7b", {"window": 5}, 7.47),
    ],
)
def test_published_quarter_of_the_flops(model, fields, teraflops):
    shape = ModelShape.named(model)
    yopo = YOPO(**fields)
    plans = {layer: plan for layer in range(shape.layers) if (plan := yopo.plan(layer, shape.layers))}
    row = cost.compare(shape, Workload.of(shape, plans=plans))["vision-only"]
    assert row["reduced"] / 1e12 == pytest.approx(teraflops, abs=0.0051)


def test_cost_of_a_method_file(capsys):
    cost.main(["--yopo", str(CONFIGS / "yopo_25.yaml"), "--json", "-"])
    facts = json.loads(capsys.readouterr().out)
    assert round(facts["conventions"]["vision-only"]["reduction"], 4) == 0.75
    assert facts["tokens"]["vision_tokens"] == [576] * 16 + [0] * 16
    assert cost.main(["--yopo", str(CONFIGS / "llava-mini" / "mustdrop_64.yaml")]) == 2
    assert "must have method: yopo" in capsys.readouterr().err


# Settings


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("yopo_*.yaml")), ids=lambda path: path.stem)
def test_method_files_load(file):
    reducer = load_reducer(file)
    reducer.check(40 if "13b" in file.stem else 32, 24)
    assert reducer.mlp_share == 0.5


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_masks_from_files(tmp_path, dtype):
    np.save(tmp_path / "heads.npy", MASK.astype(dtype))
    (tmp_path / "method.yaml").write_text("method: yopo\nheads: heads.npy\n")
    for source in (tmp_path / "method.yaml", {"method": "yopo", "heads": str(tmp_path / "heads.npy")}):
        plan = load_reducer(source).plan(4, LAYERS)
        assert plan.active_heads(HEADS) == MASK[4].nonzero()[0].tolist()
    assert load_reducer({"method": "yopo", "heads": MASK.tolist()}).plan(0, LAYERS) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"window": 4}, "window is 4: it must be an odd number"),
        ({"window": -1}, "window is -1"),
        ({"heads": 1.5}, "heads is 1.5: it must be a share"),
        ({"heads": "missing.npy"}, "heads: 'missing.npy' cannot be read"),
        ({"heads": [[True, False], [True]]}, "heads: .* cannot be read"),
        ({"heads": [[1, 2]]}, "heads: .* must hold a mask"),
        ({"head_scope": "rows"}, "head_scope is 'rows': it must be one of all, keys"),
        ({"head_scope": True}, "head_scope is True: it must be of type"),
        ({"mlp_share": 0.0}, "mlp_share is 0.0"),
        ({"layer_cut": 0}, "layer_cut is 0"),
        ({"layer_cut": "half"}, "layer_cut is 'half': it must be of type"),
    ],
)
def test_bad_settings_get_one_line(fields, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_reducer({"method": "yopo", **fields})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_cut": 9}, "layer_cut is 9: it must be a layer from 1 to 8"),
        ({"heads": [[True] * 4] * 7}, "heads: the mask has 7 layers, it must have the model's 8"),
        ({"heads": [[True] * 3 + [False]] * 8}, None),
        ({"heads": [[True, False]] * 8}, "heads: the mask has 2 heads per layer, it must have the model's 4"),
    ],
)
def test_settings_that_do_not_fit_the_model(fields, words):
    def attempt():
        run(ours(), YOPO(**fields), 1, inputs=PROMPTS[0], images=IMAGES[0])

    if words is None:
        return attempt()
    with pytest.raises(ValueError, match=words):
        attempt()


def test_methods_compose_from_settings():
    reducer = load_reducer(
        {
            "method": "compose",
            "parts": [str(CONFIGS / "mustdrop.yaml"), {"method": "yopo", "window": 5}],
            "retain": 64,
        }
    )
    assert [type(part) for part in reducer.parts] == [MustDrop, YOPO] and reducer.positions == "original"
    official = {"method": "mustdrop", "compat": "official"}
    reducer = load_reducer({"method": "compose", "parts": [{"method": "yopo"}, official]})
    assert (reducer.positions, reducer.decode_positions) == ("renumber", "cache_length")
    for settings, words in (
        ({}, "parts is None: compose has one field"),
        ({"parts": []}, r"parts is \[\]"),
        ({"parts": [official], "window": 3}, "window is 3"),
        ({"parts": [{"method": "yopo", "window": 2}]}, "parts: window is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            load_reducer({"method": "compose", **settings})


def test_plans_compose_to_what_both_compute():
    first = LayerPlan(window=7, heads=(True, True, False, True), mlp_share=0.5)
    assert first & LayerPlan(heads=0.5) == LayerPlan(7, (True, True, False, False), 0.5)
    assert LayerPlan(heads=0.5) & LayerPlan(window=5, heads=0.75, skip=True) == LayerPlan(5, 0.5, 1.0, True)
    keys = LayerPlan(heads=0.5, head_scope="keys")
    assert keys & LayerPlan(window=5) == LayerPlan(window=5) & keys == LayerPlan(5, 0.5, head_scope="keys")
    with pytest.raises(ValueError, match="head_scope: parts with inactive heads must agree"):
        keys & LayerPlan(heads=0.5)
    assert YOPO(heads=[[True] * HEADS] * LAYERS, head_scope="keys").plan(0, LAYERS) is None


# Calibration


def test_heads_are_measured_on_every_prompt_as_eager_attention_says():
    heads, model = HeadAttention(), ours(attn_implementation="eager")
    plain = run(model, Reducer(), **batch(PROMPTS), images=torch.cat(IMAGES[:2]))
    measured = run(model, heads, **batch(PROMPTS), images=torch.cat(IMAGES[:2]))
    assert torch.equal(plain[1], measured[1])
    assert len(heads.ratios) == 2 and heads.ratios[0].shape == (LAYERS, HEADS)  # the third has no picture
    spliced = model.splice(PROMPTS[0], images=IMAGES[0])
    with torch.no_grad():
        shares = model(inputs_embeds=spliced.embeds, prompt=spliced, use_cache=False, output_attentions=True).attentions
    vision = spliced.tokens.vision[0]
    expected = [share[0][..., vision].sum((1, 2)) / share[0][..., ~vision].sum((1, 2)) for share in shares]
    np.testing.assert_allclose(heads.ratios[0], torch.stack(expected).numpy(), rtol=1e-4)


def test_more_full_layers_than_there_are_is_one_line():
    with pytest.raises(ValueError, match="full_layers is 5: it must be at most the model's 4 layers"):
        head_mask(np.ones((1, 4, 3)), threshold=0.1, full_layers=5)


def test_a_head_needs_more_than_its_share_of_samples():
    ratios = np.zeros((100, 4, 3), "float32")
    ratios[:41, 2, 0] = ratios[:40, 2, 1] = ratios[:, 3] = 0.2
    mask, threshold = head_mask(ratios, threshold=0.1)
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, False, False], [True] * 3] and threshold == 0.1
    assert head_mask(ratios, threshold=0.2)[0][2:].sum() == 0
    spread = np.random.default_rng(1).random((7, LAYERS, HEADS))
    for share in (0.25, 0.5, 0.75, 1.0):
        mask, threshold = head_mask(spread, share=share)
        assert mask.mean() == share and mask[:2].all()
        assert np.array_equal(head_mask(spread, threshold=threshold)[0], mask)


def test_the_command_writes_a_mask_that_loads(tmp_path, monkeypatch, capsys, tokenizer_folder):
    monkeypatch.chdir(tmp_path)
    model = save_checkpoint(tmp_path / "tiny", tokenizer_folder)
    Image.new("RGB", (30, 20), "red").save("a.png")
    Path("data.json").write_text(json.dumps([{"image": "a.png", "question": "What is it?"}]))
    arguments = ["--model", str(model), "--data", "data.json", "--out", "new/heads.npy", "--device", "cpu"]
    assert calibrate_heads.main([*arguments, "--share", "0.5"]) == 0
    assert "1.0 of 2 heads per layer" in capsys.readouterr().out
    facts = json.loads(Path("new/heads.json").read_text())
    assert facts["samples"] == 1 and facts["source"] == "data.json" and facts["mean_active"] == 1.0
    yopo = load_reducer({"method": "yopo", "heads": "new/heads.npy"})
    plans = [yopo.plan(layer, 8) or LayerPlan() for layer in range(8)]
    assert [len(plan.active_heads(2)) for plan in plans] == facts["active_per_layer"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "share: got nothing"),
        (["--recipe", "qwen2"], "recipe is 'qwen2': it must be one of qwen2-vl-7b, internvl2-4b,"),
        (["--recipe", "qwen2-vl-7b", "--rows", "all"], "rows: got all, but the recipe's threshold is for generated"),
        (["--share", "0.5", "--rows", "last"], "rows is 'last': it must be one of all, generated"),
        (["--share", "2"], "share: got '2', expected a number from 0 to 1"),
        (["--threshold", "x"], "threshold: got 'x', expected a number from 0"),
        (["--share", "0.5", "--full-layers", "x"], "full_layers: got 'x'"),
        (["--share", "0.5", "--out", "heads.txt"], "out: got 'heads.txt', expected the name of a .npy file"),
        (["--share", "0.5", "--samples", "0"], "samples: got '0'"),
    ],
)
def test_bad_arguments_get_one_line(capsys, arguments, words):
    assert calibrate_heads.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
