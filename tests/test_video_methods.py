"""EVS and VidCom2: what stays of a video's frames, against plain loops."""

import pytest
import torch
import torch.nn.functional as F

from mustdrop import load_reducer
from mustdrop.hooks import VisionStep, VisionTokens

FRAMES, PLACES, WIDTH = 5, 9, 16


def video(frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    """Features `[frames, places, width]`: still but for a spot that moves, with a cut before the fourth frame."""
    generator = torch.Generator().manual_seed(seed)
    still, after = torch.randn(2, PLACES, WIDTH, generator=generator)
    shown = torch.stack([still if frame < 3 else after for frame in range(frames)])
    for frame in range(frames):
        shown[frame, frame % PLACES] = torch.randn(WIDTH, generator=generator)
    return shown + 0.01 * torch.randn(shown.shape, generator=generator)


def tokens_of(*videos: torch.Tensor) -> VisionTokens:
    """The projected tokens of videos of different length, padded on the right."""
    lengths = [len(one) * PLACES for one in videos]
    rows = [one.flatten(0, 1) for one in videos]
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    slot = torch.arange(max(lengths)).expand(len(rows), -1)
    valid = slot < torch.tensor(lengths)[:, None]
    return VisionTokens(
        hidden=hidden,
        patch_index=slot,
        patch_to_token=slot.masked_fill(~valid, -1),
        grid=(3, 3),
        prefix=0,
        valid=None if valid.all() else valid,
        lengths=tuple(lengths),
        views=tuple(map(len, videos)),
    )


def kept(settings: dict, tokens: VisionTokens) -> list[list[int]]:
    """Numbers of the tokens that stay, by video."""
    answer = load_reducer(settings).on_projected_features(VisionStep(tokens))
    left = tokens if answer is None else answer.apply(tokens)
    return [sorted(row[:n].tolist()) for row, n in zip(left.patch_index, left.known_lengths, strict=True)]


def evs(shown: torch.Tensor, count: int) -> list[int]:
    scores = dict.fromkeys(range(PLACES), 255.0)
    for frame in range(1, len(shown)):
        for place in range(PLACES):
            similarity = F.cosine_similarity(shown[frame, place], shown[frame - 1, place], dim=0)
            scores[frame * PLACES + place] = 1 - similarity.item()
    return sorted(sorted(scores, key=lambda token: -scores[token])[: max(PLACES, count)])


def vidcom2(shown: torch.Tensor, count: int) -> list[int]:
    channels = shown.flatten(0, 1).var(0).topk(WIDTH // 2, largest=False).indices
    units = F.normalize(shown[..., channels], dim=-1)

    def similar(unit, centre):
        distance = (unit - centre).square().sum().item()
        return sum(torch.exp(torch.tensor(-distance / 2 / 2.0**power)).item() for power in range(-3, 2))

    whole = units.mean((0, 1))
    to_video = [[similar(unit, whole) for unit in frame] for frame in units]
    fused = [
        [to_video[f][p] + similar(unit, frame.mean(0)) for p, unit in enumerate(frame)] for f, frame in enumerate(units)
    ]
    unlike = torch.tensor([-sum(row) / PLACES for row in to_video])
    share = (unlike / 0.01).softmax(0)
    taken, waiting = [], []
    for frame, row in enumerate(fused):
        quota = round(count / len(shown) * (1 + share[frame].item() - 1 / len(shown)))
        order = sorted(range(PLACES), key=row.__getitem__)
        quota = min(PLACES, max(1, quota))
        taken += [(row[place], frame * PLACES + place) for place in order[:quota]]
        waiting += [(row[place], frame * PLACES + place) for place in order[quota:]]
    return sorted(token for _, token in (sorted(taken) + sorted(waiting))[:count])


@pytest.mark.parametrize(("method", "expected"), [("evs", evs), ("vidcom2", vidcom2)])
@pytest.mark.parametrize("count", [9, 14, 20, 31])
def test_what_stays_equals_a_plain_loop(method, expected, count):
    videos = video(), video(3, seed=1)
    both = kept({"method": method, "retain": count}, tokens_of(*videos))
    assert both == [expected(shown, min(count, len(shown) * PLACES)) for shown in videos]
    assert [len(own) for own in both] == [count, min(count, 27)]


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_a_share_is_of_each_video(method):
    tokens = tokens_of(video(), video(1), video(2))
    image = 9 if method == "evs" else 4  # EVS keeps the first frame
    assert [len(own) for own in kept({"method": method, "retain": 0.5}, tokens)] == [22, image, 9]
    assert [len(own) for own in kept({"method": method, "retain": 1.0}, tokens)] == [45, 9, 18]


def test_evs_keeps_the_first_frame_and_what_moves():
    own = kept({"method": "evs", "retain": 9 + 9 + 4}, tokens_of(video()))[0]
    assert own[:9] == list(range(9)) and own[9:11] == [9, 10] or set(range(27, 36)) <= set(own)


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize("retain", [0, -3, 0.0, 1.5])
def test_settings_out_of_range_are_refused(method, retain):
    with pytest.raises(ValueError, match="retain is .*: it must be 1 or more tokens, or a share"):
        load_reducer({"method": method, "retain": retain})


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
def test_videos_beside_images_of_another_size_are_as_alone(method):
    image = torch.randn(1, 20, WIDTH)
    alone = kept({"method": method, "retain": 0.5}, tokens_of(video()))[0]
    hidden = torch.nn.utils.rnn.pad_sequence([video().flatten(0, 1), image[0]], batch_first=True)
    slot = torch.arange(FRAMES * PLACES).expand(2, -1)
    valid = slot < torch.tensor([[FRAMES * PLACES], [20]])
    both = VisionTokens(
        hidden, slot, slot.masked_fill(~valid, -1), (1, 45), 0, valid, None, (45, 20), views=(FRAMES, 1), shown=(45, 20)
    )
    found = kept({"method": method, "retain": 0.5}, both)
    assert found[0] == alone and len(found[1]) == (20 if method == "evs" else 10)
