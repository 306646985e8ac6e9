"""Synthetic clips: deterministic, split by seed, asked about without ambiguity, written and read back as drawn."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from eval.mini import questions, scenes
from eval.mini.clip_grounding import first_head
from eval.mini.clip_questions import TYPES, WORDS, ask, clip_questions
from eval.mini.clip_scenes import CLIP_GRID, MOMENTS, MOVES, Actor, Clip, draw_clip, generate_clip, owners, trails
from eval.mini.clips import STRIDE, write_benchmark, write_video
from eval.mini.data import build_tokenizer, prompt_parts

SEEDS = range(40)


def parse(text: str) -> dict[str, str]:
    """Attributes named in a noun phrase."""
    found = {}
    for word in text.split():
        for name, values in questions.VALUES.items():
            found.update((name, value) for value in values if word in (value, questions.plural(value)))
    return found


def actors(clip: Clip, text: str) -> list[Actor]:
    return [actor for actor in clip.actors if parse(text).items() <= actor.entity.attributes().items()]


def named(clip: Clip, text: str) -> Actor:
    """The one object a noun phrase means."""
    (found,) = actors(clip, text)
    return found


def there(clip: Clip) -> list[dict]:
    """For each moment the places of the objects that are there, found from the labels of the patches alone."""
    return [{a.entity: a.place(moment) for a in clip.actors if moment not in a.gone} for moment in range(MOMENTS)]


def appearing(clip: Clip) -> dict:
    """The first moment of each object that is not there at first, and then stays."""
    shown = there(clip)
    return {
        a.entity: min(t for t in range(MOMENTS) if a.entity in shown[t])
        for a in clip.actors
        if a.entity not in shown[0]
    }


def moved(clip: Clip, actor: Actor) -> str:
    (row, col), (last_row, last_col) = (there(clip)[moment][actor.entity] for moment in (0, -1))
    return next(
        (name for name, (down, right) in MOVES.items() if (last_row - row) * down + (last_col - col) * right > 0), ""
    )


def solve(clip: Clip, text: str) -> str:
    """Answer a question from its words and what is where at which moment."""
    if match := re.fullmatch(r"What direction does the (.+) move\?", text):
        return moved(clip, named(clip, match[1]))
    if match := re.fullmatch(r"Does the (.+) move\?", text):
        actor = named(clip, match[1])
        return "yes" if actor.entity in there(clip)[0] and moved(clip, actor) else "no"
    if match := re.fullmatch(r"Does the (.+) appear before or after the (.+)\?", text):
        first, second = (appearing(clip)[named(clip, name).entity] for name in match.groups())
        assert first != second
        return "before" if first < second else "after"
    if match := re.fullmatch(r"What (color|shape) appears (first|last)\?", text):
        come = appearing(clip)
        moment = (min if match[2] == "first" else max)(come.values())
        (one,) = (entity for entity, when in come.items() if when == moment)
        return getattr(one, match[1])
    if match := re.fullmatch(r"How many (.+) (move|appear)\?", text):
        come = appearing(clip)
        doing = [
            a
            for a in clip.actors
            if (a.entity in come if match[2] == "appear" else a.entity not in come and moved(clip, a))
        ]
        return str(len([a for a in doing if a in actors(clip, match[1])]))
    if match := re.fullmatch(r"How many times does the (.+) blink\?", text):
        seen = "".join("x" if named(clip, match[1]).entity in moment else "." for moment in there(clip))
        return str(len(re.findall(r"x\.+(?=x)", seen)))
    match = re.fullmatch(r"What (size|pattern|color|shape) is the (.+)\?", text)
    return getattr(named(clip, match[2]).entity, match[1])


def test_same_seed_same_clip_and_another_seed_another():
    for seed in SEEDS:
        clip = generate_clip(seed)
        assert clip == generate_clip(seed) and clip.actors == generate_clip(seed).actors and clip.actors
    frames = draw_clip(generate_clip(3))
    assert frames.shape == (MOMENTS, 224, 224, 3) and np.array_equal(frames, draw_clip(generate_clip(3)))
    assert not np.array_equal(frames, draw_clip(generate_clip(4)))


def test_answers_follow_from_what_is_where_when():
    seen = {name: set() for name in TYPES}
    for seed in range(120):
        clip = generate_clip(seed)
        for question in ask(np.random.default_rng(seed), clip, 12):
            assert question.answer == solve(clip, question.text), (seed, question)
            seen[question.type].add(question.answer)
    assert seen["motion"] == {*MOVES, "yes", "no"} and {"before", "after"} < seen["order"]
    assert seen["counting"] >= {"0", "1", "2", "3"} and seen["blinking"] == {"0", "1", "2", "3"}


def test_what_appears_is_asked_without_a_name_only_where_nothing_blinks():
    blinking = [clip for clip in map(generate_clip, range(60)) if clip.doing("blinking")]
    assert len(blinking) > 10
    for clip in blinking:
        texts = [question.text for question in ask(np.random.default_rng(clip.seed), clip, 30)]
        assert not [text for text in texts if re.search(r"How many .* appear\?|appears (first|last)", text)]


def test_one_frame_does_not_tell_what_several_do():
    """The same last frame, whatever the moving objects did before."""
    for clip in map(generate_clip, SEEDS):
        last = draw_clip(clip)[-1]
        still = [
            Actor(scenes.Entity(**{**vars(a.entity), "row": a.place(7)[0], "col": a.place(7)[1]}), "still")
            for a in clip.actors
        ]
        assert np.array_equal(draw_clip(Clip(clip.scene, tuple(still)))[0], last)


def test_nothing_touches_or_leaves_the_clip():
    for clip in map(generate_clip, SEEDS):
        for moment in range(MOMENTS):
            taken = np.zeros((CLIP_GRID + 2, CLIP_GRID + 2), int)
            for actor in clip.actors:
                (row, col), reach = actor.place(moment), actor.entity.height // 2
                taken[row - reach + 1 : row + reach + 2, col - reach + 1 : col + reach + 2] += 1
            assert taken.max() == 1 and not taken[[0, -1]].any() and not taken[:, [0, -1]].any()


def test_trails_tell_the_way_the_time_and_the_gaps():
    clip = next(clip for clip in map(generate_clip, SEEDS) if clip.doing("blinking") and clip.doing("moving"))
    told = trails(clip).reshape(MOMENTS, CLIP_GRID, CLIP_GRID, 5) * MOMENTS
    for actor in clip.actors:
        last = told[-1][actor.place(MOMENTS - 1)]
        down, right = MOVES.get(actor.direction, (0, 0))
        way = [actor.distance * down, actor.distance * right]
        assert last.tolist() == [*way, MOMENTS - 1, actor.first_seen, actor.blinks]
        assert all(np.isnan(told[moment][actor.place(moment)]).all() for moment in actor.gone)


def test_owners_are_where_trails_are_and_each_has_its_own_number():
    clip = next(clip for clip in map(generate_clip, SEEDS) if clip.doing("blinking") and clip.doing("moving"))
    whose = owners(clip)
    assert np.array_equal(whose >= 0, ~np.isnan(trails(clip)[..., 0]))
    for number, actor in enumerate(clip.actors):
        for moment in set(range(MOMENTS)) - actor.gone:
            row, col = actor.place(moment)
            assert whose[moment, row * CLIP_GRID + col] == number


def test_the_first_head_is_the_one_that_the_layer_computes_with():
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
    model = LlamaModel(config).eval()
    model.set_attn_implementation("eager")
    hidden, position = torch.randn(2, 6, 32), torch.tensor([[0, 1, 5, 6, 9, 30]] * 2)
    inputs = {"inputs_embeds": hidden, "position_ids": position, "attention_mask": torch.ones(2, 6)}
    whole = model(**inputs, output_attentions=True, use_cache=False).attentions[0]
    share = first_head(model.layers[0], hidden, model.rotary_emb(hidden, position))
    torch.testing.assert_close(share.exp(), whole[:, 0])


def test_splits_share_no_clip_and_seeds_no_clip_of_a_split():
    seeds = [{c.seed for c, _ in clip_questions(split, 5, 1, seed)} for split in scenes.SPLITS for seed in (0, 1)]
    assert len(set().union(*seeds)) == 5 * len(seeds)
    assert all(scenes.split_of(seed) == "test" for seed in seeds[-1])


def test_new_words_are_words_and_leave_other_ids_as_they_were():
    plain, wide = build_tokenizer(), build_tokenizer(WORDS)
    assert {key: wide.get_vocab()[key] for key in plain.get_vocab()} == plain.get_vocab()
    for _, asked in clip_questions("train", 30, 12):
        for question in asked:
            ids = wide(prompt_parts(question.text)[1], add_special_tokens=False).input_ids
            assert wide.unk_token_id not in ids and max(map(len, wide.convert_ids_to_tokens(ids))) > 2
            assert len(wide(question.answer, add_special_tokens=False).input_ids) == 1


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    pytest.importorskip("av")
    return write_benchmark(tmp_path_factory.mktemp("clips"), "test", 3, per_clip=4)


def read(path) -> np.ndarray:
    import av

    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_videos_come_back_as_they_were_drawn(benchmark):
    for clip, _ in clip_questions("test", 3):
        frames = read(benchmark / "videos" / f"clip{clip.seed}.mp4")
        assert np.array_equal(frames, draw_clip(clip, STRIDE))
        evenly = np.linspace(0, len(frames) - 1, MOMENTS).astype(int)
        assert np.array_equal(frames[evenly], draw_clip(clip))


def test_benchmark_is_in_the_files_of_the_published_ones(benchmark):
    asked, answers = (json.loads((benchmark / f"test_{letter}.json").read_text()) for letter in "qa")
    assert [entry["question_id"] for entry in asked] == [entry["question_id"] for entry in answers]
    assert len({entry["question_id"] for entry in asked}) == len(asked) >= 9
    for entry, answer in zip(asked, answers, strict=True):
        clip = generate_clip(int(entry["video_name"].removeprefix("clip")))
        assert solve(clip, entry["question"]) == answer["answer"] and answer["type"] in TYPES
        assert (benchmark / "videos" / f"{entry['video_name']}.mp4").is_file()
    again = write_benchmark(benchmark.parent / f"{benchmark.name}-again", "test", 3, per_clip=4)
    for name in ("test_q.json", "test_a.json", f"videos/{asked[0]['video_name']}.mp4"):
        assert (again / name).read_bytes() == (benchmark / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"split": "val"}, "split: got 'val', expected one of train, validation, test"),
        ({"count": 0}, "count: got 0, expected a whole number from 1 to 10000"),
        ({"count": 10_001}, "count: got 10001"),
        ({"seed": -1}, "seed: got -1"),
        ({"per_clip": 2.5}, "per_clip: got 2.5"),
    ],
)
def test_benchmark_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        write_benchmark(tmp_path / "x", **change)
    assert not (tmp_path / "x").exists()


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(ValueError):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8), np.uint8))
    assert not list(tmp_path.iterdir())
