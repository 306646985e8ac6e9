"""The matrix that every method joins by adding a row: what has to hold whatever a reducer does."""

import pytest
import torch
from tiny import LAYERS, SIDE, batch, ours, pictures, prompt, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava.constants import IMAGE_TOKEN_INDEX
from mustdrop import MustDrop, MustDropPlus, Reducer, available_methods, macs
from mustdrop.compose import Compose
from mustdrop.macs import Workload
from mustdrop.methods import (
    DART,
    MMR,
    SCOPE,
    TOPS,
    YOPO,
    AveragePool,
    CDPruner,
    DivPrune,
    FastV,
    HiPrune,
    HoloV,
    PruMerge,
    PyramidDrop,
    Random,
    SmallImage,
    SparseVLM,
    ToMe,
    TReVS,
    Uniform,
    VidCom2,
    VisionZip,
    VisPruner,
    VScan,
)
from mustdrop.shape import ModelShape
from mustdrop.stages import DualAttentionFilter, KeyTokens, LocalSpatialMerge, OutputAwareCache

PATCHES = SIDE * SIDE
THRESHOLDS = {"global_threshold": 0.01, "individual_threshold": 0.03}

# name: (a reducer that really reduces the tiny model, the same one told to keep everything)
METHODS = {
    "vanilla": (Reducer(), Reducer()),
    "mustdrop": (MustDrop(**THRESHOLDS), MustDrop(0, 0, similarity_threshold=1.1)),
    "mustdrop, official": (
        MustDrop(**THRESHOLDS, merge_count="per_image", compat="official", filter_layers=[1, 3]),
        MustDrop(0, 0, similarity_threshold=1.1, compat="official", filter_layers=[1, 3]),
    ),
    "mustdrop_plus": (MustDropPlus(retain=30), MustDropPlus(retain=PATCHES)),
    "mustdrop, by numbers": (MustDrop(retain=60), MustDrop(retain=PATCHES)),
    "mustdrop, output threshold": (MustDrop(**THRESHOLDS, output_threshold=0.004), MustDrop(0, 0, 3, 1.1)),
    "merge alone": (LocalSpatialMerge(), LocalSpatialMerge(similarity_threshold=1.1)),
    "keys alone": (KeyTokens(), KeyTokens(rate=0)),
    "filter alone": (DualAttentionFilter(**THRESHOLDS), DualAttentionFilter(0, 0)),
    "cache alone": (OutputAwareCache(output_threshold=0.004), OutputAwareCache()),
    "fastv": (FastV(layer=2, drop_ratio=0.7), FastV(drop_ratio=0.0)),
    "fastv, official": (FastV(retain=50, compat="official"), FastV(retain=PATCHES)),
    "pyramiddrop": (PyramidDrop(retain=40), PyramidDrop(ratios=[1.0, 1.0, 1.0])),
    "pyramiddrop, official": (
        PyramidDrop([2, 4, 6], [0.5, 0.25, 0.125], compat="official"),
        PyramidDrop(ratios=[1.0, 1.0, 1.0], compat="official"),
    ),
    "sparsevlm": (SparseVLM(retain=60), SparseVLM(keeps=[1.0, 1.0, 1.0])),
    "sparsevlm, by rank": (SparseVLM(rank_scale=9.0), SparseVLM(rank_scale=144.0)),
    "sparsevlm, official": (SparseVLM(retain=64, compat="official"), SparseVLM(retain=PATCHES, compat="official")),
    "sparsevlm, version 2": (SparseVLM(2, 60), SparseVLM(2, keeps=[1.0, 1.0, 1.0])),
    "sparsevlm, version 2, official": (SparseVLM(2, 64, compat="official"), SparseVLM(2, PATCHES, compat="official")),
    "visionzip": (VisionZip(20, 6), VisionZip(retain=PATCHES)),
    "visionzip, official": (VisionZip(retain=30, compat="official"), VisionZip(PATCHES, 1, compat="official")),
    "prumerge": (PruMerge(retain=30), PruMerge(retain=PATCHES)),
    "prumerge, plus": (PruMerge(plus=True), PruMerge(plus=True, retain=PATCHES)),
    "tome": (ToMe(40), ToMe(PATCHES)),
    "dart": (DART(tokens=30), DART(tokens=PATCHES)),
    "dart, official": (DART(retain=40, compat="official"), DART(retain=PATCHES, compat="official")),
    "divprune": (DivPrune(30), DivPrune(PATCHES)),
    "cdpruner": (CDPruner(30), CDPruner(PATCHES)),
    "scope": (SCOPE(30), SCOPE(PATCHES)),
    "mmr": (MMR(30), MMR(PATCHES)),
    "hiprune": (HiPrune(30, 0.5, 1), HiPrune(PATCHES)),
    "hiprune, official": (HiPrune(30, 0.5, 1, compat="official"), HiPrune(PATCHES, compat="official")),
    "holov": (HoloV(30, 5), HoloV(PATCHES)),
    "vispruner": (VisPruner(30), VisPruner(PATCHES)),
    "vscan": (VScan(30, 1), VScan(PATCHES)),
    "vscan, official": (VScan(30, 1, compat="official"), VScan(PATCHES, compat="official")),
    "trevs": (TReVS(20), TReVS(PATCHES)),
    "tops": (TOPS(20), TOPS(PATCHES)),
    "vidcom2": (VidCom2(30), VidCom2(PATCHES)),
    "random": (Random(30), Random(PATCHES)),
    "uniform": (Uniform(30), Uniform(PATCHES)),
    "avgpool": (AveragePool(30), AveragePool(PATCHES)),
    "smallimage": (SmallImage(30), SmallImage(PATCHES)),
    "yopo": (YOPO(window=5, heads=0.75, mlp_share=0.5, layer_cut=6), YOPO()),
    "mustdrop and yopo": (
        Compose([MustDrop(**THRESHOLDS), YOPO(window=5, heads=0.75, mlp_share=0.5, layer_cut=6)]),
        Compose([MustDrop(0, 0, similarity_threshold=1.1), YOPO()]),
    ),
}
reducing = pytest.mark.parametrize("reducer", [pair[0] for pair in METHODS.values()], ids=METHODS)
keeping = pytest.mark.parametrize("reducer", [pair[1] for pair in METHODS.values()], ids=METHODS)

PROMPTS = [prompt(3, 6, seed=1), prompt(6, 2, images=2, seed=2), prompt(4, 3, images=0, seed=3)]
IMAGES = [pictures(1, seed=1), pictures(2, seed=2), None]


def one_by_one(model, reducer, **settings):
    return [
        run(model, reducer, inputs=ids, images=images, **settings) for ids, images in zip(PROMPTS, IMAGES, strict=True)
    ]


def test_every_registered_method_has_a_row():
    assert set(available_methods()) <= {*METHODS, "evs"}  # that one drops nothing of an image: test_video_methods


@keeping
def test_keeping_everything_equals_plain_llava(reducer):
    plain = one_by_one(ours(), Reducer())
    kept = one_by_one(ours(), reducer)
    for (ids, logits, traces), (same_ids, same_logits, same_traces) in zip(plain, kept, strict=True):
        assert torch.equal(ids, same_ids)
        torch.testing.assert_close(logits, same_logits, atol=1e-5, rtol=0)
        assert traces[0].vision_tokens == same_traces[0].vision_tokens
        assert traces[0].cache_bytes == same_traces[0].cache_bytes


MERGING = ("mustdrop", "merge", "smallimage", "avgpool", "tome")  # these need, or leave no, whole grid of patches
AFTER_MERGING = [name for name in METHODS if not name.startswith(MERGING)]


@pytest.mark.parametrize("name", [*AFTER_MERGING, "filter by numbers", "mustdrop by numbers"])
def test_images_with_different_numbers_of_tokens_do_not_see_each_other(name):
    """In a batch as in a prompt: counts go by an image's own tokens, here those that merging by threshold leaves."""
    own = {
        "filter by numbers": DualAttentionFilter(budget=[0.5, 0.4, 0.2, 0.1]),
        "mustdrop by numbers": MustDropPlus(retain=30, stages=["prefill", "decode"]),
    }
    reducer = Compose([LocalSpatialMerge(), own.get(name) or METHODS[name][0]])
    apart = one_by_one(ours(), reducer)
    ids, logits, traces = run(ours(), reducer, **batch(PROMPTS), images=torch.cat(IMAGES[:2]))
    merged = {image["blocks"][0][1] for trace in traces for image in trace.images}
    assert len(merged) == 3
    for row, (alone_ids, alone_logits, (alone,)) in enumerate(apart):
        assert traces[row].vision_tokens == alone.vision_tokens and traces[row].kept == alone.kept
        torch.testing.assert_close(logits[row], alone_logits[0], atol=1e-4, rtol=0)
        assert torch.equal(ids[row], alone_ids[0])


@reducing
def test_batch_equals_one_by_one(reducer):
    apart = one_by_one(ours(), reducer)
    images = torch.cat([image for image in IMAGES if image is not None])
    ids, logits, traces = run(ours(), reducer, **batch(PROMPTS), images=images)
    assert len(traces) == len(PROMPTS)
    for row, (alone_ids, alone_logits, (alone,)) in enumerate(apart):
        trace = traces[row]
        assert trace.vision_tokens == alone.vision_tokens
        assert trace.kept == alone.kept and trace.tokens == alone.tokens and trace.key_tokens == alone.key_tokens
        assert trace.cache_lengths == alone.cache_lengths and trace.text_tokens == alone.text_tokens
        assert torch.equal(ids[row], alone_ids[0])
        torch.testing.assert_close(logits[row], alone_logits[0], atol=1e-4, rtol=0)


@reducing
def test_removed_on_exit_also_after_an_exception(reducer):
    model = ours()
    plain = run(model, Reducer(), inputs=PROMPTS[0], images=IMAGES[0])
    with pytest.raises(RuntimeError, match="on purpose"), reducer.on(model):
        raise RuntimeError("on purpose")
    assert type(model.reducer) is Reducer and model.run is None
    run(model, reducer, inputs=PROMPTS[0], images=IMAGES[0])
    again = run(model, Reducer(), inputs=PROMPTS[0], images=IMAGES[0])
    assert torch.equal(plain[1], again[1])


@reducing
def test_a_call_leaves_no_trace_in_the_next(reducer):
    first = run(ours(), reducer, inputs=PROMPTS[0], images=IMAGES[0])
    run(ours(), reducer, inputs=PROMPTS[1], images=IMAGES[1])
    second = run(ours(), reducer, inputs=PROMPTS[0], images=IMAGES[0])
    assert torch.equal(first[1], second[1]) and first[2][0].to_dict().items() >= {"times_ms": {}}.items()


@reducing
def test_text_only_prompts_are_untouched(reducer):
    plain = run(ours(), Reducer(), inputs=PROMPTS[2])
    reduced = run(ours(), reducer, inputs=PROMPTS[2])
    assert torch.equal(plain[1], reduced[1])
    assert reduced[2][0].vision_tokens == [0] * LAYERS


@reducing
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(reducer, dtype):
    _, logits, (trace,) = run(ours(dtype=dtype), reducer, inputs=PROMPTS[0], images=IMAGES[0])
    exact = run(ours(), reducer, inputs=PROMPTS[0], images=IMAGES[0])[2][0]
    assert logits.isfinite().all()
    assert trace.mean_tokens == pytest.approx(exact.mean_tokens, rel=0.15)
    assert trace.cache_bytes / sum(trace.cache_lengths) == exact.cache_bytes / sum(exact.cache_lengths) / 2


@reducing
def test_eager_attention_keeps_the_same_tokens(reducer):
    inputs = {**batch(PROMPTS), "images": torch.cat(IMAGES[:2])}
    _, logits, traces = run(ours(), reducer, **inputs)
    _, eager_logits, eager_traces = run(ours(attn_implementation="eager"), reducer, **inputs)
    assert [trace.kept for trace in traces] == [trace.kept for trace in eager_traces]
    torch.testing.assert_close(logits, eager_logits, atol=1e-4, rtol=0)


@reducing
def test_the_cache_holds_what_the_trace_says(reducer):
    model = ours()
    with reducer.on(model) as record:
        cache = model.generate(
            PROMPTS[0], images=IMAGES[0], max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        ).past_key_values
    (trace,) = record.traces
    assert [layer.keys.shape[-2] for layer in cache.layers] == trace.cache_lengths
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == trace.cache_bytes


@reducing
@torch.no_grad()
def test_decoder_layers_compute_on_the_tokens_the_trace_counts(reducer):
    """Multiply-adds of the decoder, as torch counts them, follow from the trace."""
    model = ours()
    with reducer.on(model) as record:
        prompt_ = model.splice(PROMPTS[0], images=IMAGES[0], padding_side="left")
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=prompt_.embeds, prompt=prompt_, use_cache=True, logits_to_keep=1)
    (trace,) = record.traces
    if trace.plans:
        pytest.skip("plans are counted in test_yopo.py")
    counts = counter.get_flop_counts()
    width, kv_width, mlp = 64, 32, 96
    for layer, (vision, finished) in enumerate(zip(trace.vision_tokens, trace.mlp_lengths, strict=True)):
        length = vision + trace.text_tokens
        name = next(key for key in counts if key.endswith(f"layers.{layer}"))
        linear = sum(n for op, n in counts[name].items() if "mm" in str(op) and "bmm" not in str(op))
        first_half, second_half = width * width + 2 * width * kv_width, width * width + 3 * width * mlp
        asked = linear - 2 * (length * first_half + finished * second_half)
        assert 0 <= asked <= 2 * width * (width * 6 + kv_width * length) * reducer.overrides("after_decoder_layer")


@reducing
@torch.no_grad()
def test_the_cost_model_predicts_everything_up_to_the_first_token(reducer):
    """Tower, projector, the method and prefill, as torch counts them."""
    model, ids = ours(), torch.tensor([[1, IMAGE_TOKEN_INDEX, *range(5, 11)]])
    shape = ModelShape.from_config(model.config.to_dict(), "tiny")
    counting = reducer.on(model, count=True)
    with counting as record, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(ids, images=pictures(1, seed=1), max_new_tokens=1)
    parts = macs.costs(shape, Workload.of_trace(shape, record.traces[0].to_dict()))
    assert counter.get_total_flops() == 2 * sum(parts.values())


@reducing
def test_beams_prefill_once_per_prompt_and_trace_once(reducer):
    settings = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    inputs = {**batch(PROMPTS), "images": torch.cat(IMAGES[:2])}
    with reducer.on(ours()) as record:
        together = ours().generate(**inputs, **settings)
    assert [t.kept for t in record.traces] == [t.kept for t in run(ours(), reducer, **inputs)[2]]
    with reducer.on(ours()):
        alone = ours().generate(PROMPTS[0], images=IMAGES[0], **settings)
    assert together[0].tolist() == alone[0].tolist()


@reducing
def test_labels_follow_the_tokens_that_are_left(reducer):
    model = ours()
    inputs = batch(PROMPTS[:2], "right")
    labels = torch.where(inputs["inputs"] < 3, -100, inputs["inputs"])
    with reducer.on(model), torch.no_grad():
        output = model(
            input_ids=inputs["inputs"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            images=torch.cat(IMAGES[:2]),
        )
        alone = [
            model(input_ids=ids, labels=torch.where(ids < 3, -100, ids), images=images)
            for ids, images in zip(PROMPTS[:2], IMAGES[:2], strict=True)
        ]
    targets = [(ids >= 3).sum() for ids in PROMPTS[:2]]
    expected = sum(out.loss * n for out, n in zip(alone, targets, strict=True)) / sum(targets)
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=1e-4)
