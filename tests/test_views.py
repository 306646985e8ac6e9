"""An image of several views (tiles, frames) is one image: for filters, budgets and traces, alone and in a batch."""

import math

import pytest
import torch
from tiny import SIDE, batch, ours, pictures, prompt, run

from mustdrop import available_methods, load_reducer
from mustdrop.config import fields_of
from mustdrop.hooks import APART, VisionTokens
from mustdrop.registry import METHODS as METHODS_OF
from mustdrop.retain import apportioned

PATCHES = SIDE**2
SETTINGS = {
    "mustdrop": {"global_threshold": 0.05, "individual_threshold": 0.05},
    "mustdrop by numbers": {"method": "mustdrop", "retain": 60},
    "yopo": {"window": 5, "heads": 0.5},
    "prumerge": {"retain": None},
    "evs": {"retain": 0.6},
    "vidcom2": {"retain": 0.6},
}
METHODS = [*available_methods(), "mustdrop by numbers"]

# Of smaller images not every number can be had; the others drop at shares of the depth, here of few layers.
COARSE = ("smallimage", "vscan", "trevs", "tops")


def reducer(name: str):
    settings = {"method": name} | SETTINGS.get(name, {} if name in ("vanilla", "yopo") else {"retain": 60})
    if name in ("dart", "fastv", "pyramiddrop", "sparsevlm"):
        settings["retain"] = 120
    return load_reducer({key: value for key, value in settings.items() if value is not None})


@pytest.mark.parametrize("name", METHODS)
def test_images_of_different_numbers_of_views_in_a_batch_are_what_they_are_alone(name):
    ids, views = [prompt(3, 6, seed=1), prompt(5, 4, images=2, seed=2), prompt(4, 4, seed=3)], (3, 1, 2, 2)
    stacks = list(pictures(sum(views)).split(views))
    own = [stacks[:1], stacks[1:3], stacks[3:]]
    model = ours()
    traces = run(model, reducer(name), **batch(ids), images=stacks)[2]
    for trace, one, images in zip(traces, ids, own, strict=True):
        alone = run(model, reducer(name), inputs=one, images=images)[2][0]
        assert [image["views"] for image in trace.images] == [len(stack) for stack in images]
        how = {"plans": 0, "mlp_lengths": 0}  # what is computed, and what packed rows compute whole, is the batch's
        assert trace.to_dict() | how == alone.to_dict() | how


@torch.no_grad()
def test_the_baseline_sees_views_one_after_another():
    ids, pixels = prompt(3, 4), pictures(3)
    together = ours().splice(ids, images=[pixels])
    apart = ours().splice(prompt(3, 4, images=3), images=list(pixels))
    vision = together.tokens.vision[0]
    assert torch.equal(together.embeds[0, vision], apart.embeds[0, apart.tokens.vision[0]])
    assert together.tokens.image[0, vision].unique().tolist() == [0]
    assert together.tokens.view[0, vision].tolist() == sorted([0, 1, 2] * PATCHES)
    assert together.tokens.prompts[0].images[0].patches == 3 * PATCHES


@torch.no_grad()
def test_every_view_comes_behind_its_own_cls_which_is_neither_scored_nor_counted():
    model, pixels = ours(strategy="full"), pictures(2)
    together, apart = model.splice(prompt(3, 4), images=[pixels]), model.splice(prompt(3, 4, images=2), images=pixels)
    whole = PATCHES + 1
    first, second = slice(4, 4 + whole), slice(4 + whole, 4 + 2 * whole)
    after_text = slice(second.start + 1, second.stop + 1)  # two images have a text token between them
    for mine, theirs, later in ((first, first, 0), (second, after_text, 1)):
        assert torch.equal(together.embeds[0, mine], apart.embeds[0, theirs])
        assert torch.equal(together.tokens.position[0, mine] + later, apart.tokens.position[0, theirs])
    assert (together.tokens.image[0, 4 : second.stop] < 0).nonzero()[:, 0].tolist() == [0, whole]
    trace = run(model, reducer("divprune"), inputs=prompt(3, 4), images=[pixels])[2][0]
    assert trace.vision_tokens[0] == 60 and trace.text_tokens == prompt(3, 4).shape[1] - 1 + 2


def test_a_budget_is_for_the_image_with_all_its_views():
    trace = run(ours(), reducer("divprune"), inputs=prompt(3, 4), images=[pictures(3)])[2][0]
    assert trace.images[0]["tokens"] == 60 and trace.vision_tokens[0] == 60
    assert sum(map(len, trace.tokens)) == 60 and max(trace.kept["decode"][0]) >= 2 * PATCHES


COUNTING = [name for name, method in METHODS_OF.items() if "retain" in fields_of(method) and name != "evs"]
IN_TOWER = [name for name in COUNTING if "per" in fields_of(METHODS_OF[name])]
SHARE, COUNT = 0.2777, 120  # of three views


@pytest.mark.parametrize("name", [name for name in IN_TOWER if name != "mustdrop_plus"])
def test_what_is_chosen_in_the_tower_counts_per_image_or_per_view(name):
    given = {"inputs": prompt(3, 4, images=2), "images": [pictures(3), pictures(1, seed=1)]}
    near = 6 if name == "smallimage" else 0.51
    numbers = {}
    for per in ("image", "view"):
        settings = {"method": name, "retain": 61, "per": per}
        trace = run(ours(), load_reducer(settings), **given)[2][0]
        numbers[per] = [image["tokens"] for image in trace.images]
    if name == "mustdrop":
        # In the decoder an image has 61 in any case; 8 % of the merged tokens are key tokens.
        assert numbers["image"][1] == numbers["view"][1] == 96 and numbers["image"][0] == 432 - 8 * round(0.35 * 54)
        return
    assert numbers["image"] == pytest.approx([61, 61], abs=near)
    assert numbers["view"] == pytest.approx([183, 61], abs=3 * near)


def test_numbers_are_divided_over_views_by_the_largest_remainder():
    assert apportioned(61, [144, 144, 144]) == [21, 20, 20]
    assert apportioned(10, [144, 40, 16]) == [7, 2, 1] and apportioned(500, [144, 40]) == [144, 40]
    assert apportioned(1, [5, 5]) == [1, 0] and apportioned(0, [5, 5]) == [0, 0]


@pytest.mark.parametrize("name", [name for name in IN_TOWER if name != "tome"])
def test_views_may_be_left_with_no_token_at_all(name):
    retain = 40 if name.startswith("mustdrop") else 2
    settings = {"method": name, "retain": retain} | ({"filter_layers": [0, 1, 2, 3]} if retain == 40 else {})
    trace = run(ours(), load_reducer(settings), inputs=prompt(3, 4), images=[pictures(3)])[2][0]
    assert trace.mean_tokens_official == pytest.approx(retain, abs=1.01 if name == "smallimage" else 0.51)


def test_a_budget_that_leaves_a_view_less_than_halving_can_is_refused():
    with pytest.raises(ValueError, match="^retain is 30: it must be enough for 18 tokens of every view"):
        run(ours(), load_reducer({"method": "tome", "retain": 30}), inputs=prompt(3, 4), images=[pictures(3)])


def test_key_tokens_are_a_share_of_the_image_or_of_every_view():
    keys = {}
    for settings in ({}, {"per": "view"}, {"compat": "official", "filter_layers": [1, 2]}):
        reducer = load_reducer({"method": "mustdrop", "similarity_threshold": 1.1, **settings})
        trace = run(ours(), reducer, inputs=prompt(3, 4), images=[pictures(3)])[2][0]
        keys[reducer.per] = len(trace.key_tokens)
    assert keys == {"image": math.ceil(0.08 * 432), "view": 3 * math.ceil(0.08 * 144)}


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("views", [1, 3])
def test_a_share_keeps_what_its_count_keeps(name, views):
    count = round(SHARE * views * PATCHES)
    found = []
    for retain in (SHARE, count):
        reducer = load_reducer({"method": name, "retain": retain})
        found.append(run(ours(), reducer, inputs=prompt(3, 4), images=[pictures(views)])[2][0].to_dict())
    if name == "vidcom2":  # rounds down, as what it was published with
        count = int(SHARE * views * PATCHES)
        reducer = load_reducer({"method": name, "retain": count})
        found[1] = run(ours(), reducer, inputs=prompt(3, 4), images=[pictures(views)])[2][0].to_dict()
    assert found[0] == found[1]
    assert found[0]["mean_tokens_official"] == (
        pytest.approx(count, rel=0.25) if name in COARSE else pytest.approx(count, abs=1.01)
    )


@pytest.mark.parametrize("name", [*COUNTING, "evs"])
@pytest.mark.parametrize("retain", [0, -3, 0.0, -0.5, 1.5, 64.0])
def test_neither_a_count_nor_a_share_is_one_clear_line(name, retain):
    with pytest.raises(ValueError, match=f"^retain is {retain}: it must be [12] or more tokens, or a share above 0"):
        load_reducer({"method": name, "retain": retain})


@pytest.mark.parametrize("name", IN_TOWER)
def test_what_numbers_are_per_is_checked(name):
    with pytest.raises(ValueError, match="^per is 'tile': it must be one of image, view"):
        load_reducer({"method": name, "per": "tile"})


def test_a_share_out_of_reach_is_said_in_shares():
    reducer = load_reducer({"method": "fastv", "retain": 0.01, "layer": 2})
    with pytest.raises(ValueError, match="^retain is 0.01: it must be at least 0.132, 19 of 144 tokens for FastV"):
        reducer.check_tokens(8, 144)
    reducer = load_reducer({"method": "mustdrop", "retain": 0.03})
    with pytest.raises(ValueError, match="^retain is 0.03: it must be at least 0.056, 8 of 144 tokens: key tokens"):
        reducer.check_tokens(8, 144)


def test_a_share_is_of_the_patches_whatever_others_leave_of_them():
    parts = [{"method": "divprune", "retain": 72}, {"method": "fastv", "retain": 0.25}]
    reducer = load_reducer({"method": "compose", "parts": parts})
    trace = run(ours(), reducer, inputs=prompt(3, 4), images=pictures(1))[2][0]
    assert trace.mean_tokens_official == pytest.approx(36, abs=0.51)


def test_a_window_does_not_reach_into_the_next_view():
    tokens = ours().splice(prompt(2, 2), images=[pictures(2)]).tokens
    rows = tokens.row[0, tokens.vision[0]]
    assert (rows[PATCHES:] - rows[:PATCHES] == APART).all()


def test_joining_keeps_patches_keys_and_lengths():
    states = torch.randn(3, 5, 2)
    tokens = VisionTokens.from_patches(states, (2, 2)).with_protected(torch.eye(4).bool()[:3], (1, 1, 1))
    tokens = tokens.select(torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool(), (3, 2, 4))
    joined = tokens.joined([2, 1])
    assert joined.known_lengths == (5, 4) and joined.known_views == (2, 1) and joined.keys == (2, 1)
    assert joined.patch_index[0].tolist() == [0, 2, 3, 4, 5]
    assert joined.patch_to_token.tolist() == [[0, -1, 1, 2, 3, 4, -1, -1], [0, 1, 2, 3, -1, -1, -1, -1]]
    assert torch.equal(joined.hidden[0], torch.cat([states[0, [1, 3, 4]], states[1, [1, 2]]]))
    assert torch.equal(joined.extras[0, :, 0], states[:2, 0])
    assert joined.protected[0].tolist() == [True, False, False, False, True]
