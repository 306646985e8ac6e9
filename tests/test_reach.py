"""Whether settings fit a model is known before anything runs: each method alone, and methods beside each other."""

from itertools import product

import numpy as np
import pytest
from tiny import SIDE, ours, pictures, prompt, run

from mustdrop import MustDrop, Reducer, load_reducer
from mustdrop.compose import Compose
from mustdrop.config import fields_of
from mustdrop.registry import METHODS

PATCHES = SIDE * SIDE
BUDGETS = (1, 2, 16, 64, PATCHES - 1, PATCHES, PATCHES + 1, 10**9)
TWO_STAGES = ("vscan", "trevs", "tops")
WITH_RETAIN = [name for name, method in METHODS.items() if "retain" in fields_of(method)]
YOPO = {"method": "yopo", "window": 5, "mlp_share": 0.5}


def outcome(settings: dict, images: int = 1) -> str | list[float]:
    """Why settings are refused before anything runs, else the mean tokens per image of what has run."""
    try:
        reducer = load_reducer(settings)
        with reducer.on(ours()):
            pass
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    inputs = {"inputs": prompt(3, 6, images=images), "images": pictures(images)}
    return [trace.mean_tokens_official / images for trace in run(ours(), reducer, new_tokens=2, **inputs)[2]]


@pytest.mark.parametrize("method", [name for name in WITH_RETAIN if name not in TWO_STAGES])
@pytest.mark.parametrize("with_yopo", [False, True])
def test_a_budget_is_met_or_refused(method, with_yopo):
    grid = 2 if method == "smallimage" else 0.51
    for retain in BUDGETS:
        alone = {"method": method, "retain": retain}
        found = outcome({"method": "compose", "parts": [alone, YOPO]} if with_yopo else alone)
        if isinstance(found, str):
            assert f"retain is {retain}: it must be" in found
        else:
            assert found == pytest.approx([min(retain, PATCHES)], abs=grid)


@pytest.mark.parametrize("method", TWO_STAGES)
@pytest.mark.parametrize("retain", [*BUDGETS, 100])
def test_a_mean_of_what_enters_the_layers_is_met(method, retain):
    """These count a layer with what it computes; where all tokens enter, with what leaves it as the others do."""
    trace = run(ours(), load_reducer({"method": method, "retain": retain}), inputs=prompt(3, 6), images=pictures(1))[2][
        0
    ]
    off = [abs(mean - min(retain, PATCHES)) for mean in (trace.mean_tokens, trace.mean_tokens_official)]
    assert min(off) <= 1.3


@pytest.mark.parametrize("method", WITH_RETAIN)
def test_two_methods_keep_no_more_than_either_or_are_refused(method):
    """And none fails while it runs; a share of fewer tokens is rounded, hence two tokens more."""
    for other, retain in product(WITH_RETAIN, (16, 64, PATCHES - 1)):
        parts = [{"method": method, "retain": retain}, {"method": other, "retain": 40}]
        found = outcome({"method": "compose", "parts": parts})
        if isinstance(found, str):
            assert "retain is" in found or "parts: " in found
        else:
            assert found[0] <= min(retain, 40) + 2.01


@pytest.mark.parametrize("extra", [{}, {"retain": 40}, {"budget": [60, 40, 20, 20], "merge_to": 104}])
def test_key_tokens_are_chosen_after_merging_or_not_at_all(extra):
    """Of four ViT blocks three are run; the last one is read but not run."""
    for merge, key in product(range(4), range(-4, 4)):
        settings = {"method": "mustdrop", "merge_block": merge, "key_block": key, "similarity_threshold": 0.3, **extra}
        found = outcome(settings, images=2)
        assert isinstance(found, str) == (merge >= min(key % 4, 2)), (merge, key, found)
        if isinstance(found, str):
            assert found.startswith(f"merge_block is {merge}: it must be ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mustdrop", "filter_layers": [6, 2], "retain": 64}, "filter_layers is [6, 2]: it must be rising"),
        ({"method": "mustdrop", "filter_layers": [2, 2]}, "filter_layers is [2, 2]: it must be rising"),
        ({"method": "mustdrop", "filter_layers": [-5]}, "filter_layers is -5: it must be a layer from 0 to 7"),
        ({"method": "mustdrop", "filter_layers": [0.5, 4]}, "filter_layers is [0.5, 4]: it must be rising"),
        ({"method": "mustdrop", "filter_layers": [0.5, 1.0]}, "filter_layers is 1.0: it must be a layer from 0 to 7"),
        ({"method": "mustdrop", "cache_from": -1}, "cache_from is -1: it must be a layer from 0 to 7"),
        ({"method": "pyramiddrop", "layers": [2, 2, 4]}, "layers is [2, 2, 4]: it must be rising"),
        ({"method": "pyramiddrop", "layers": []}, "layers is []: it must be at least one"),
        ({"method": "sparsevlm", "layers": [3, 2, 1]}, "layers is [3, 2, 1]: it must be rising"),
        ({"method": "sparsevlm", "layers": [-1, 2, 3]}, "layers is -1: it must be a layer from 0 to 7"),
        ({"method": "sparsevlm", "keeps": [9, 99, 5]}, "keeps is [9, 99, 5]: it must be numbers that do not rise"),
        ({"method": "sparsevlm", "rank_bias": 3.0}, "rank_bias is 3.0: it must be left out without rank_scale"),
        ({"method": "fastv", "layer": -1}, "layer is -1: it must be a layer from 1 to 7"),
        ({"method": "tome", "retain": 16}, "retain is 16: it must be at least 18"),
        ({"method": "visionzip", "dominant": 145}, "dominant is 145: it must be at most the 144 tokens"),
        ({"method": "mustdrop", "window": 13}, "window is 13: it must be at most 12, the side of the patch grid"),
        ({"method": "mustdrop", "stages": []}, "stages is []: it must be some stages, each once"),
        ({"method": "yopo", "window": 25}, "window is 25: it must be at most 23"),
        ({"method": "yopo", "heads": np.ones((8, 3)).astype(bool).tolist()}, "heads: the mask has 3 heads per layer"),
        ({"method": "random", "seed": -1}, "seed is -1: it must be 0 or more"),
    ],
)
def test_settings_that_do_not_fit_are_said_before_anything_runs(settings, message):
    assert message in outcome(settings)


def test_the_published_layers_fit_decoders_that_are_too_short_for_them():
    model = ours(layers=4)
    trace = run(model, MustDrop(retain=60), inputs=prompt(3, 6), images=pictures(1))[2][0]
    assert trace.mean_tokens_official == pytest.approx(60, abs=0.51)
    with pytest.raises(ValueError, match="filter_layers"), MustDrop(budget=[60, 40, 20, 10]).on(model):
        pass


def test_who_drops_in_the_decoder_counts_what_enters_it():
    fastv, divprune = {"method": "fastv", "retain": 30}, {"method": "divprune", "retain": 60}
    for parts in ([fastv, divprune], [divprune, fastv]):
        assert outcome({"method": "compose", "parts": parts}) == pytest.approx([30], abs=0.51)


def test_a_block_that_lives_long_may_forget_traces():
    model, inputs = ours(), {"inputs": prompt(3, 6), "images": pictures(1), "max_new_tokens": 1}
    for keep, left in ((None, 5), (2, 2), (0, 0)):
        with Reducer().on(model, keep=keep) as record:
            traces = []
            for _ in range(5):
                model.generate(**inputs)
                traces += record.traces[-1:]
        assert len(record.traces) == left and record.traces == (traces[-left:] if left else [])
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="keep is "), Compose([Reducer()]).on(model, keep=wrong):
            pass
    assert type(model.reducer) is Reducer
