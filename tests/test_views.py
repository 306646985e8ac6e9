"""An image of several views (tiles, frames) is one image: for filters, budgets and traces, alone and in a batch."""

import pytest
import torch
from tiny import SIDE, batch, ours, pictures, prompt, run

from mustdrop import available_methods, load_reducer
from mustdrop.hooks import APART, VisionTokens

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
        assert trace.to_dict() | {"plans": 0} == alone.to_dict() | {"plans": 0}


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
