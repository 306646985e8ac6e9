"""The methods of 2025 and 2026 against plain loops over single tokens, and the numbers they were published with."""

import pytest
import torch

from mustdrop import load_reducer, ops
from mustdrop.greedy import cosines, in_turn
from mustdrop.methods.hiprune import with_neighbours
from mustdrop.methods.holov import chunk_of, ranks_and_quotas
from mustdrop.methods.mmr import most_relevant
from mustdrop.methods.scope import most_covering
from mustdrop.methods.tops import by_three
from mustdrop.methods.trevs import deviation, strongest_by_variable_heads, with_farthest
from mustdrop.methods.vispruner import least_repeated
from mustdrop.methods.vscan import best_with, by_rank, nearest_of, window_of

TOKENS, COUNT = 20, 7
FEATURES = torch.randn(2, TOKENS, 6, generator=torch.Generator().manual_seed(1))
SALIENCY = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(2))
VALID = torch.arange(TOKENS) < torch.tensor([[TOKENS], [13]])


def picks(turn, count=COUNT):
    return turn.argsort(descending=True)[:count].tolist()


def greedily(length, gain, count=COUNT):
    """The picks of a loop over single tokens; `gain` is of a token, in view of those chosen."""
    chosen = []
    for _ in range(count):
        chosen.append(max((i for i in range(length) if i not in chosen), key=lambda i: gain(i, chosen)))
    return chosen


@pytest.mark.parametrize("row, length", [(0, TOKENS), (1, 13)])
def test_greedy_choices_are_those_of_a_plain_loop(row, length):
    near, value = cosines(FEATURES)[row], SALIENCY[row]

    def covered(chosen):
        return near[chosen][:, :length].amax(0).clamp(min=0) if chosen else torch.zeros(length)

    def coverage(i, chosen):
        return (near[i, :length] - covered(chosen)).clamp(min=0).sum()

    def largest(i, chosen):
        return near[i, chosen].max() if chosen else torch.tensor(-1.0)

    def relevance_and_difference(i, chosen):
        return 0.5 * value[i] - 0.5 * largest(i, chosen)

    def of_three(i, chosen):
        if not chosen:
            return value[i]
        left = [j for j in range(length) if j not in chosen]
        parts = (lambda j: value[j], lambda j: 1 - largest(j, chosen), lambda j: coverage(j, chosen))
        means = [torch.stack([part(j) for j in left]).mean() for part in parts]
        weights = (1.0, 0.5, 0.25)
        return sum(weight * part(i) / mean for weight, part, mean in zip(weights, parts, means, strict=True))

    scope = most_covering(FEATURES, SALIENCY, COUNT, VALID)[row]
    assert picks(scope) == greedily(length, lambda i, chosen: value[i] * coverage(i, chosen))
    assert picks(most_relevant(FEATURES, SALIENCY, COUNT, 0.5, VALID)[row]) == greedily(
        length, relevance_and_difference
    )
    assert picks(by_three(SALIENCY, FEATURES, COUNT, 0.5, 0.25, VALID)[row]) == greedily(length, of_three)


def test_more_are_wanted_than_there_are():
    turn = in_turn(5, lambda: torch.tensor([[3.0, 1.0, 2.0]]), lambda pick: None, torch.tensor([[True, True, False]]))
    assert picks(turn[0], 2) == [0, 1] and turn[0].tolist() == [5, 4, 0]


def test_neighbours_end_at_the_edge_or_wrap_as_the_authors_do():
    score = torch.zeros(1, 12).index_fill(1, torch.tensor([4]), 1.0)  # the first patch of the second row of 3 x 4
    patch = torch.arange(12)[None]
    inside, wrapping = (with_neighbours(score, [1], patch, (3, 4), wraps=wraps)[0] for wraps in (False, True))
    assert inside.nonzero()[:, 0].tolist() == [0, 4, 5, 8] and wrapping.nonzero()[:, 0].tolist() == [0, 3, 4, 5, 8]
    assert not with_neighbours(score, [0], patch, (3, 4)).any()


def test_chunks_share_all_places():
    for lengths in ((TOKENS, 13), (5, 3)):
        attention = SALIENCY[:, : max(lengths)]
        valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        chunk = chunk_of(lengths, 4, attention)
        for row, length in enumerate(lengths):
            sizes = torch.bincount(chunk[row, :length], minlength=4)
            assert sizes.sum() == length and sizes.max() - sizes.min() <= 1 and (chunk[row, :length].diff() >= 0).all()
        rank, quota = ranks_and_quotas(attention, chunk, 4, [3, 2], valid)
        of_chunks = [{int(c): int(q) for c, q in zip(chunk[row], quota[row], strict=True)} for row in (0, 1)]
        assert [sum(own.values()) for own in of_chunks] == [3, 2]


def test_vispruner_keeps_the_attended_and_no_twin():
    features = torch.cat([FEATURES[:1, :10], FEATURES[:1, :10]], dim=1)  # the second half repeats the first
    kept = least_repeated(features, SALIENCY[:1], TOKENS, 10, 4)[0].tolist()
    assert len(set(kept)) == 10 and kept[:4] == SALIENCY[0].argsort(descending=True)[:4].tolist()
    assert least_repeated(FEATURES[:1, :5], SALIENCY[:1, :5], 5, 1, 0).shape == (1, 1)  # odd, and one alone


def test_windows_give_equally_many_and_the_rest_joins_the_nearest():
    grid, score = (8, 8), torch.rand(1, 64, generator=torch.Generator().manual_seed(3))
    window = window_of(torch.arange(64)[None], grid)
    first = ops.top_count(by_rank(score, window), 16 + 3)
    counts = torch.bincount(window[0][first[0]], minlength=16)
    assert counts.min() == 1 and counts.max() == 2
    best = [score[0].masked_fill(window[0] != number, -1).argmax().item() for number in range(16)]
    assert first[0, best].all()
    stays = best_with(SALIENCY, ops.top_count(SALIENCY, 2), [4, 3], VALID)
    assert stays.sum(-1).tolist() == [4, 3] and not stays[~VALID].any()
    into = nearest_of(FEATURES, stays, VALID)[0]
    near = cosines(FEATURES)[0].masked_fill(~stays[0], -2)
    assert all(into[i] == (i if stays[0, i] else near[i].argmax()) for i in range(TOKENS))


def test_trevs_parts_leave_padding_out():
    assert torch.equal(deviation(SALIENCY, VALID)[1, :13], deviation(SALIENCY[1:, :13])[0])
    score = with_farthest(FEATURES, SALIENCY, [8, 4], VALID)
    assert (score[1, 13:] <= 0).all() and score[0].isinf().sum() == 6 and score[1].isinf().sum() == 3
    attention = torch.zeros(1, 2, 1, 4)
    attention[0, 0, 0] = torch.tensor([0.0, 0.5, 0.1, 0.9])  # varies in the first image, the other head in the second
    attention[0, 1, 0] = torch.tensor([0.3, 0.3, 0.0, 1.0])
    image, real = torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 1, dtype=torch.bool)
    chosen = strongest_by_variable_heads(attention, real, image, 2)
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 0.5, 0.0, 1.0]]))


@pytest.mark.parametrize(
    "settings, entering, after",
    [
        ({"method": "vscan", "retain": 64}, 96, {15: 32}),
        ({"method": "vscan", "retain": 43}, 64, {15: 21}),
        ({"method": "trevs", "retain": 64}, 128, {7: 42}),
        ({"method": "trevs", "retain": 32}, 64, {7: 21}),
        ({"method": "trevs", "retain": 128}, 256, {7: 85}),
        ({"method": "tops"}, 128, {11: 64, 23: 16}),
        ({"method": "tops", "retain": 76}, 128, {11: 64, 23: 16}),
        ({"method": "tops", "retain": 64}, 107, {11: 53, 23: 13}),
    ],
)
def test_published_numbers(settings, entering, after):
    first, second = load_reducer(settings).parts
    assert first.kept(576, 576) == entering and second.schedule(32, entering, 576) == after
