"""One answer of a reducer that chooses: who stays, what is known afterwards, and what is no answer."""

import pytest
import torch
from tiny import ours, pictures, prompt

from mustdrop import Reducer
from mustdrop.hooks import DecoderStep, ImageFacts, Keep, PromptFacts, Tokens, VisionTokens

IMAGE = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0, 0, -1]])
KEY = torch.zeros_like(IMAGE, dtype=torch.bool)
KEY[0, 3] = True
SCORE = torch.tensor([[9.0, 3, 2, 1, 5, 5, 9, 9], [9, 1, 6, 2, 5, 3, 4, 9]])


def tokens(known: bool = True) -> Tokens:
    column = torch.arange(8).repeat(2, 1)
    facts = (
        PromptFacts(3, 2, (ImageFacts(9, 3, 3, 1), ImageFacts(9, 2, 2))),
        PromptFacts(2, 1, (ImageFacts(9, 6, 6),)),
    )
    question = IMAGE.flip(1).cummax(1).values.flip(1) < 0
    return Tokens(
        column, column, IMAGE, column, KEY, question, images=2, instruction_tokens=2, prompts=facts if known else None
    )


def stays(keep: Keep, known: bool = True) -> tuple[list, list]:
    mask, prompts = keep.choose(tokens(known))
    return [row.nonzero()[:, 0].tolist() for row in mask], [[image.tokens for image in one.images] for one in prompts]


def test_the_best_of_every_image_go_on_with_text_and_key_tokens():
    assert stays(Keep.top(SCORE, 2)) == ([[0, 1, 3, 4, 5, 6, 7], [0, 2, 4, 7]], [[2, 2], [2]])
    assert stays(Keep.top(SCORE, 1)) == ([[0, 3, 4, 6, 7], [0, 2, 7]], [[1, 1], [1]])
    assert stays(Keep.top(SCORE, 0)) == ([[0, 3, 6, 7], [0, 7]], [[1, 0], [0]])
    assert stays(Keep.top(SCORE, [[3, 0], [9]])) == ([[0, 1, 2, 3, 6, 7], list(range(8))], [[3, 0], [6]])


def test_a_mask_is_counted():
    mask = torch.zeros_like(KEY)
    mask[0, 1] = mask[1, 5] = True
    assert stays(Keep.where(mask)) == ([[0, 1, 3, 6, 7], [0, 5, 7]], [[2, 0], [1]])


@pytest.mark.parametrize("keep", [Keep.top(SCORE, 2), Keep.where(SCORE > 4)], ids=["top", "where"])
def test_what_the_host_does_not_know_is_read(keep):
    answer, known = stays(keep, known=False), stays(keep)
    assert answer == ([row[:] for row in known[0]], [[*known[1][0]], [*known[1][1], 0]])
    assert keep.choose(tokens())[1][0].length == len(known[0][0])


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (Keep(), "give a mask, or a score and counts"),
        (Keep(score=SCORE), "give a mask, or a score and counts"),
        (Keep(score=SCORE, counts=1, mask=KEY), "give a mask, or a score and counts"),
        (Keep(counts=1, mask=KEY), "give a mask, or a score and counts"),
        (Keep.top(SCORE, -1), "counts are -1, they must be 0 or more"),
        (Keep.top(SCORE[:, :5], 1), r"score has shape \[2, 5\], the tokens have \[2, 8\]"),
        (Keep.where(KEY[:1]), r"mask has shape \[1, 8\]"),
        (Keep.where(SCORE), "mask is torch.float32, it must be bool"),
        (Keep.where(KEY, merge_into=IMAGE[:, :2]), r"merge_into has shape \[2, 2\]"),
        (Keep.top(SCORE, 1, order=IMAGE[0]), r"order has shape \[8\]"),
        (Keep.top(SCORE, 1, weights=SCORE), "weights are given without merge_into"),
        (Keep.protect(SCORE, 1), "protect, note and with_prefix are for the vision encoder"),
        (Keep.top(SCORE, [[1, 1]]), r"counts are \[\[1, 1\]\], there are 2 prompts"),
        (Keep.top(SCORE, [[1, 1], [1, 1]]), r"counts are \[1, 1\], there are 1 images in a prompt"),
    ],
)
def test_what_is_no_answer_is_an_error(keep, says):
    with pytest.raises(ValueError, match=rf"^Keep: [^\n]*{says}"):
        keep.choose(tokens())


def test_a_later_record_means_nothing_in_the_vision_encoder():
    encoded = VisionTokens.from_patches(torch.randn(2, 5, 3), (2, 2))
    with pytest.raises(ValueError, match=r"^Keep: Keep\.like names a later record of prompts"):
        Keep.like(tokens()).apply(encoded)


def test_weighted_sums_are_the_same_before_and_inside_the_decoder():
    merge_into = torch.tensor([[0, 0, 2, 2], [3, 1, 2, 3]])
    weights, states = torch.rand(2, 4), torch.randn(2, 4, 3)
    keep = Keep.merge(merge_into, [2, 3], weights)
    before = keep.apply(VisionTokens.from_patches(states, (2, 2), prefix=0))
    inside = keep.new_states(states, keep.score.bool())
    torch.testing.assert_close(before.hidden[0, :2], inside[0, [0, 2]])
    torch.testing.assert_close(before.hidden[1], inside[1, 1:])


def test_new_states_alone_drop_nothing():
    states = torch.randn(2, 8, 3)
    mask, prompts = Keep(states=states).choose(tokens())
    assert mask.all() and prompts == tokens().facts() and Keep(states=states).new_states(0 * states, mask) is states


@pytest.mark.parametrize("more", [{"states": torch.zeros(2, 8, 1)}, {"order": IMAGE}, {"merge_into": IMAGE}], ids=str)
def test_a_cache_is_only_chosen_from_and_several_answers_only_choose(more):
    with pytest.raises(ValueError, match="^Keep: of a cache entries can be chosen"):
        Keep.where(KEY, **more).cut(tokens())
    with pytest.raises(ValueError, match="^parts: [^\n]*no other may"):
        Keep.all_of([Keep.where(KEY), Keep.where(KEY, **more)], tokens())


def test_counts_before_the_decoder_are_for_each_image():
    encoded = VisionTokens.from_patches(torch.randn(2, 5, 3), (2, 2))
    score = torch.rand(2, 4)
    assert Keep.top(score, [1, 3]).apply(encoded).known_lengths == (1, 3)
    with pytest.raises(ValueError, match=r"^Keep: counts are \[1, 2, 3\], there are 2 images$"):
        Keep.top(score, [1, 2, 3]).apply(encoded)


@pytest.mark.parametrize("known", [True, False], ids=["top", "where"])
def test_key_tokens_stay_in_the_vision_encoder_and_before_the_decoder(known):
    protected = torch.tensor([[False, False, False, True], [True, False, False, False]])
    encoded = VisionTokens.from_patches(torch.randn(2, 5, 3), (2, 2)).with_protected(protected, (1, 1))
    score = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    after = (Keep.top(score, 2) if known else Keep.where(score > 3)).apply(encoded)
    assert after.patch_index.tolist() == [[0, 3], [0, 3]] and after.keys == (1, 1)
    assert after.protected.tolist() == [[False, True], [True, False]]


def test_a_token_that_goes_on_is_not_merged_away():
    states, merge_into = torch.randn(1, 4, 3), torch.tensor([[1, 1, 1, 3]])
    keep = Keep.where(torch.tensor([[True, True, False, True]]), merge_into=merge_into, weights=torch.ones(1, 4))
    inside = keep.new_states(states, keep.mask)
    expected = torch.stack([states[0, 0], states[0, 1] + states[0, 2], states[0, 3]])
    torch.testing.assert_close(inside[0, [0, 1, 3]], expected)
    torch.testing.assert_close(keep.apply(VisionTokens.from_patches(states, (2, 2), 0)).hidden[0], expected)


class Doubled(Reducer):
    """New states after one layer, and nothing dropped."""

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        return Keep(states=2 * step.hidden) if step.layer == 3 else None


@torch.no_grad()
def test_new_states_after_a_layer_go_on_without_a_drop():
    given = {"input_ids": prompt(3, 4), "images": pictures(1)}
    with Doubled().on(ours()):
        logits = ours()(**given).logits
    hook = ours().model.layers[3].register_forward_hook(lambda module, args, output: 2 * output)
    try:
        torch.testing.assert_close(logits, ours()(**given).logits)
    finally:
        hook.remove()


def test_what_is_noted_of_tokens_goes_with_them():
    """The note is the patch a token sits on, numbered through the views of its image once these are joined."""
    hidden = torch.randn(3, 1 + 6, 4)
    tokens = VisionTokens.from_patches(hidden, (2, 3))
    tokens = Keep.note(patch=tokens.patch_index.float()).apply(tokens)
    tokens = Keep.top(torch.rand(3, 6), [2, 3, 5]).apply(tokens)
    real = tokens.valid_with_prefix[:, 1:]
    assert torch.equal(tokens.notes["patch"][real].long(), tokens.patch_index[real])
    joined = tokens.joined([2, 1])
    assert torch.equal(joined.notes["patch"][joined.valid].long(), joined.patch_index[joined.valid] % 6)
    swapped = joined.rows([1, 0, 1])
    assert torch.equal(swapped.notes["patch"][swapped.valid].long(), swapped.patch_index[swapped.valid] % 6)
    more = Keep.note(other=torch.zeros(2, joined.patch_index.shape[1])).apply(joined)
    assert set(more.notes) == {"patch", "other"}
    with_cls = tokens.with_prefix_as_tokens()
    assert torch.equal(with_cls.notes["patch"][:, 1:], tokens.notes["patch"])
