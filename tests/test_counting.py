"""What a method's own choosing costs: counted where the hooks run, in one forward pass of one prompt."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny import ours, pictures, prompt
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eval.run import rows
from mustdrop import MustDrop, Reducer, macs
from mustdrop.compose import Compose
from mustdrop.cost import CONVENTIONS
from mustdrop.counting import counted_products
from mustdrop.macs import Workload
from mustdrop.methods import YOPO, FastV
from mustdrop.recording import HOOKS
from mustdrop.shape import ModelShape
from mustdrop.stages import OutputAwareCache

MUSTDROP = MustDrop(global_threshold=0.01, individual_threshold=0.03)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return ModelShape.from_config(ours().config.to_dict(), "tiny")


def traces(reducer, *prompts, count=True, images=1, **settings):
    """The traces of prompts that are asked one after the other in one block."""
    with reducer.on(ours(), count=count) as run:
        for ids in prompts:
            ours().generate(ids, images=pictures(images, seed=1), max_new_tokens=1, **settings)
    return run.traces


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("before", [0, 5])
def test_closed_form_of_mustdrop_is_what_is_counted(shape, before, images):
    """Two terms apart: it takes all text for rows that ask, and knows no padding of images to the longest one."""
    trace = traces(MUSTDROP, prompt(before, 7, images=images, seed=1), images=images)[0]
    layers = MUSTDROP.parts[2].layers_of(shape.layers)  # a trace cannot tell of a filter that found nothing to drop
    work = replace(Workload.of_trace(shape, trace.to_dict()), filter_layers=layers)
    lengths = [work.vision_tokens[layer] + work.text_tokens for layer in work.filter_layers]
    not_asking = sum(macs.filter_macs(shape, before + 1, length) for length in lengths)
    own = sum(macs.key_probe_macs(shape, count) for count in work.image_tokens)
    padding = images * macs.key_probe_macs(shape, max(work.image_tokens)) - own
    assert macs.mustdrop_selector_macs(shape, work) == trace.selector_macs + not_asking - padding
    assert trace.selector_macs > 0 and (padding > 0) == (images > 1)


def test_only_the_first_pass_is_counted():
    first, second = traces(FastV(2, 0.5), prompt(3, 4, seed=1), prompt(3, 4, seed=1))
    assert first.selector_macs > 0 and second.selector_macs is None
    assert first.to_dict()["selector_macs"] == first.selector_macs
    assert traces(FastV(2, 0.5), prompt(3, 4, seed=1), count=False)[0].selector_macs is None


def test_who_chooses_nothing_costs_nothing_counted_or_not():
    for count in (True, False):
        assert traces(Reducer(), prompt(3, 4, seed=1), count=count)[0].selector_macs == 0
    assert traces(YOPO(layer_cut=6), prompt(3, 4, seed=1))[0].selector_macs == 0


def test_every_hook_is_known_where_idle_reducers_are_told():
    of_reducer = {name for name in vars(Reducer) if name.startswith(("on_", "after_", "before_", "inside_"))}
    assert of_reducer == set(HOOKS)


def test_parts_of_a_composition_add_up():
    ids = prompt(3, 4, seed=1)
    alone = [traces(part, ids)[0].selector_macs for part in (FastV(2, 0.5), OutputAwareCache(output_threshold=0.0))]
    together = traces(Compose([FastV(2, 0.5), OutputAwareCache(output_threshold=0.0)]), ids)[0].selector_macs
    assert alone[0] < together < sum(alone)  # the caches that the second one looks at have become shorter


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_counting_changes_neither_answers_nor_a_counter_around_it(grad, attention):
    model, ids = ours(attention), prompt(3, 6, seed=1)
    totals, answers, counted = [], [], []
    for count in (True, False):
        own = MUSTDROP.on(model, count=count)
        with grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, own as run:
            answers.append(model.generate(ids, images=pictures(1), max_new_tokens=2, do_sample=False))
        totals.append(counter.get_total_flops())
        counted.append(run.traces[0].selector_macs)
    assert totals[0] == totals[1] > 2 * counted[0] > 0 and counted[1] is None
    assert torch.equal(*answers)


def test_a_pass_with_gradients_can_be_counted():
    with MUSTDROP.on(ours(), count=True) as run:
        ids = prompt(3, 6, seed=1)
        ours()(input_ids=ids, images=pictures(1), labels=ids.clamp(min=0)).loss.backward()
    ours().zero_grad()
    assert run.traces[0].selector_macs > 0


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {}])
def test_several_rows_are_refused_in_one_line(settings):
    ids = prompt(3, 4, seed=1)
    ids = ids if settings else ids.repeat(2, 1)
    with pytest.raises(ValueError, match=r"^count is '2 prompts or beams': it must be one prompt alone$"):
        traces(FastV(2, 0.5), ids, images=len(ids), **settings)


def test_unknown_cost_is_never_taken_for_none(shape):
    record = traces(FastV(2, 0.5), prompt(3, 4, seed=1), count=False)[0].to_dict()
    for older in (record, {name: value for name, value in record.items() if name != "selector_macs"}):
        work = Workload.of_trace(shape, older)
        assert work.selector_macs is None and macs.costs(shape, work)["selector"] is None
        with pytest.raises(ValueError, match="^selector: what choosing cost is not known"):
            CONVENTIONS[rows.FLOPS_CONVENTION].count(shape, work)
        assert set(rows.flops(older, shape)) == set(rows.REPORTED_CONVENTIONS) - {rows.FLOPS_CONVENTION}
    known = rows.flops({**record, "selector_macs": 1000}, shape)
    none = rows.flops({**record, "selector_macs": 0}, shape)
    assert known[rows.FLOPS_CONVENTION]["used"] - none[rows.FLOPS_CONVENTION]["used"] == 2000


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_products_with_packed_weights_count(bits):
    library = pytest.importorskip("bitsandbytes")
    plain = torch.nn.Linear(64, 32, bias=False)
    packed = (
        library.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32)
        if bits == 4
        else library.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    )
    packed.load_state_dict(plain.state_dict())
    packed = packed.to("cpu")
    for rows_ in (1, 5):
        with counted_products() as counted:
            packed(torch.randn(1, rows_, 64))
        assert counted.macs == rows_ * 64 * 32
    assert "bitsandbytes" in sys.modules
