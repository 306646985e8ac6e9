"""The tensor functions against slow, plain restatements of their definitions."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mustdrop import ops
from mustdrop.hooks import Attention, Keep, Tokens, VisionTokens, compact, gather
from mustdrop.stages.vision import merge_windows


def test_compact_keeps_order_and_pads():
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    values = torch.arange(10).view(2, 5)
    indices, valid = compact(keep)
    assert gather(values, indices)[0].tolist() == [0, 2, 3]
    assert gather(values, indices)[1, -1].item() == 6
    assert valid.tolist() == [[True] * 3, [False, False, True]]
    indices, valid = compact(keep, pad="right")
    assert gather(values, indices)[1, 0].item() == 6
    assert valid.tolist() == [[True] * 3, [True, False, False]]


def test_compact_with_an_order_and_a_known_length():
    keep = torch.tensor([[True, False, True, True]])
    indices, valid = compact(keep, pad="right", order=torch.tensor([[3, 0, 2, 1]]), length=3)
    assert indices.tolist() == [[3, 2, 0]]
    assert valid is None


def test_compact_of_nothing_and_of_everything():
    assert compact(torch.zeros(2, 4, dtype=torch.bool))[0].shape == (2, 0)
    indices, valid = compact(torch.ones(2, 4, dtype=torch.bool))
    assert indices.tolist() == [[0, 1, 2, 3]] * 2 and valid is None


@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((7, 8), 3), ((4, 6), 2)])
def test_window_similarity_is_the_mean_over_ordered_pairs(grid, window):
    patches = torch.randn(2, grid[0] * grid[1], 5)
    got = ops.window_similarity(patches, grid, window)
    expected = []
    for top in range(0, grid[0] // window * window, window):
        for left in range(0, grid[1] // window * window, window):
            members = [(top + a) * grid[1] + left + b for a in range(window) for b in range(window)]
            pairs = [
                F.cosine_similarity(patches[:, i], patches[:, j], dim=-1) for i in members for j in members if i != j
            ]
            expected.append(torch.stack(pairs).mean(0))
    torch.testing.assert_close(got, torch.stack(expected, 1))


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((7, 8), 3), ((4, 6), 2)])
def test_merge_windows_means_places_and_owners(grid, window, by_score):
    patches = torch.randn(1, 1 + grid[0] * grid[1], 5)
    tokens = VisionTokens.from_patches(patches, grid)
    score = ops.window_similarity(tokens.patches, grid, window)
    merge = torch.zeros_like(score, dtype=torch.bool)
    merge[0, [0, 2]] = True
    after = merge_windows(tokens, merge, window, score=score if by_score else None).apply(tokens)

    per_row = grid[1] // window
    owners: dict[int, list[int]] = {}
    for patch, column in enumerate(after.patch_to_token[0].tolist()):
        owners.setdefault(column, []).append(patch)
    assert len(owners) == after.patch_index.shape[1] == grid[0] * grid[1] - 2 * (window**2 - 1)
    for column, members in owners.items():
        torch.testing.assert_close(after.patches[0, column], tokens.patches[0, members].mean(0))
        assert after.patch_index[0, column].item() in members
    merged = sorted(members for members in owners.values() if len(members) > 1)
    for number, members in zip([0, 2], merged, strict=True):
        top, left = number // per_row * window, number % per_row * window
        assert members == [(top + a) * grid[1] + left + b for a in range(window) for b in range(window)]
    anchors = after.patch_index[0].tolist()
    if by_score:
        best = [0, 2] if score[0, 0] >= score[0, 2] else [2, 0]
        assert [owners[0], owners[1]] == [merged[0 if number == 0 else 1] for number in best]
        assert anchors[2:] == sorted(anchors[2:])
    else:
        assert anchors == sorted(anchors)
    assert torch.equal(after.hidden[:, 0], patches[:, 0])


def test_merging_different_numbers_of_windows_in_a_batch():
    tokens = VisionTokens.from_patches(torch.randn(2, 37, 4), (6, 6))
    merge = torch.tensor([[True, True, False, False], [False, False, False, False]])
    after = merge_windows(tokens, merge, 3).apply(tokens)
    assert after.counts.tolist() == [20, 36]
    torch.testing.assert_close(after.hidden[1], tokens.hidden[1])
    first = VisionTokens.from_patches(tokens.hidden[:1], (6, 6))
    alone = merge_windows(first, merge[:1], 3).apply(first)
    torch.testing.assert_close(after.hidden[:1, :21], alone.hidden)


def test_selecting_twice_keeps_track_of_patches():
    tokens = VisionTokens.from_patches(torch.randn(1, 37, 4), (6, 6))
    merged = merge_windows(tokens, torch.tensor([[True, False, False, True]]), 3).apply(tokens)
    keep = torch.zeros(1, merged.patch_index.shape[1], dtype=torch.bool)
    column = merged.patch_to_token[0, 35].item()
    keep[0, [2, column]] = True
    after = Keep.where(keep).apply(merged)
    assert after.patch_to_token[0, 35].item() == 1
    assert sorted((after.patch_to_token[0] == 1).nonzero()[:, 0].tolist()) == [21, 22, 23, 27, 28, 29, 33, 34, 35]
    assert (after.patch_to_token[0] == 0).sum() == 1
    assert (after.patch_to_token[0] == -1).sum() == 26


def test_key_tokens_are_the_best_of_each_image_and_their_number_rounds_up_as_python_does():
    score = torch.randn(3, 400)
    lengths = [400, 350, 25]
    valid = torch.arange(400) < torch.tensor(lengths)[:, None]
    tokens = VisionTokens.from_patches(torch.randn(3, 400, 2), (20, 20), 0)
    tokens = replace(tokens, valid=valid, lengths=tuple(lengths))
    keys = [math.ceil(length * 0.08) for length in lengths]
    after = Keep.protect(score, keys).apply(tokens)
    assert after.keys == tuple(keys) and after.protected.sum(-1).tolist() == keys
    assert score[0][after.protected[0]].min() > score[0][~after.protected[0]].max()


def test_dual_attention_keep_is_the_definition():
    attention = torch.rand(2, 3, 10) / 10
    image = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 1, -1], [-1, 0, 0, 0, 0, 0, 0, -1, -1, -1]])
    keep = ops.dual_attention_keep(attention, image, 2, 0.3, 0.08)
    for row in range(2):
        for column in range(10):
            number = image[row, column].item()
            expected = True
            if number >= 0:
                own = (image[row] == number).nonzero()[:, 0]
                share = attention[row, :, column].sum() < 0.3 * attention[row][:, own].sum()
                expected = not (share and attention[row, :, column].max() < 0.08)
            assert keep[row, column].item() == expected
    assert not keep.all() and keep[image >= 0].any()


def test_attention_on_demand_is_rows_of_full_attention():
    queries, keys = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    scores = queries @ keys.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None] & valid[:, None]
    full = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    rows = torch.tensor([[6, 3], [5, 4]])
    attention = Attention(lambda r: gather(queries.transpose(1, 2), r).transpose(1, 2), lambda: keys, 0.3, valid, 0)
    expected = torch.stack([full[b][:, rows[b]] for b in range(2)])
    torch.testing.assert_close(attention.probabilities(rows), expected)
    torch.testing.assert_close(attention.mean_over_heads(rows), expected.mean(1))


def test_question_rows_of_a_padded_batch():
    flags = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    zero = torch.zeros(2, 6, dtype=torch.long)
    rows, real = Tokens(zero, zero, zero, zero, flags, flags, None, 1, 3).instruction_rows()
    assert rows[0].tolist() == [3, 4, 5] and real[0].all()
    assert rows[1, -1].item() == 5 and real[1].tolist() == [False, False, True]


@pytest.mark.parametrize(("layer", "depth", "expected"), [(2, 32, 2), (2 / 32, 40, 2), (14 / 32, 16, 7), (-1, 8, 7)])
def test_layer_index(layer, depth, expected):
    assert ops.layer_index(layer, depth) == expected


def kept(features: torch.Tensor, count: int, **given: torch.Tensor) -> torch.Tensor:
    return ops.top_count(-ops.redundancy(features, **given), count)


def test_least_redundant_keeps_one_of_each_kind():
    kinds, copies = torch.randn(5, 16), [3, 1, 4, 2, 2]
    kind = torch.arange(5).repeat_interleave(torch.tensor(copies))[torch.randperm(12)]
    features = kinds[kind][None] * torch.rand(1, 12, 1).add(0.5)  # length does not matter
    assert sorted(kind[kept(features, 5)[0]].tolist()) == [0, 1, 2, 3, 4]


def test_least_redundant_keeps_given_tokens_first_and_padding_last():
    features = torch.randn(1, 6, 8)
    features = torch.cat([features, features], dim=1)
    first = torch.zeros(1, 12, dtype=torch.bool)
    first[0, [2, 8, 9]] = True  # 8 repeats 2
    keep = kept(features, 7, first=first)[0]
    assert keep[[2, 8, 9]].all() and sorted((keep.nonzero()[:, 0] % 6).tolist()) == [0, 1, 2, 2, 3, 4, 5]
    alone = kept(features[:, :6], 4)
    padded = torch.cat([features[:, :6], torch.zeros(1, 3, 8)], dim=1)
    valid = torch.arange(9)[None] < 6
    assert torch.equal(kept(padded, 4, valid=valid)[:, :6], alone)
    assert kept(padded, 8, valid=valid)[:, :6].all()
