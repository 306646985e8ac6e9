"""The synthetic scenes: deterministic, split by seed, labelled as drawn, and asked about without ambiguity."""

import re

import numpy as np
import pytest

from eval.mini import questions, scenes

SEEDS = range(12)


def parse(text: str) -> dict[str, str]:
    """Attributes named in a noun phrase."""
    found = {}
    for word in text.split():
        for name, values in questions.VALUES.items():
            for value in values:
                if word == value or (name == "shape" and word == questions.plural(value)):
                    found[name] = value
    return found


def named(scene: scenes.Scene, text: str) -> scenes.Entity:
    """The one object a noun phrase means."""
    found = questions.matches(scene.objects, parse(text))
    assert len(found) == 1, f"{text!r} means {len(found)} objects"
    return found[0]


def solve(scene: scenes.Scene, text: str) -> str:
    """Answer a question from its words and the scene's description alone."""
    if match := re.fullmatch(r"What does the (\w+) sign say\?", text):
        (sign,) = (sign for sign in scene.signs if sign.color == match[1])
        return sign.word
    if match := re.fullmatch(r"How many (.+) are there\?", text):
        return str(len(questions.matches(scene.objects, parse(match[1]))))
    if match := re.fullmatch(r"Is there an? (.+)\?", text):
        return "yes" if questions.matches(scene.objects, parse(match[1])) else "no"
    if match := re.fullmatch(r"What (size|pattern|color|shape) is the (.+)\?", text):
        return getattr(named(scene, match[2]), match[1])
    match = re.fullmatch(
        r"Is the (.+?) (left or right of|above or below|left of|right of|above|below) the (.+)\?", text
    )
    first, link, second = named(scene, match[1]), match[2], named(scene, match[3])
    across, down = first.col - second.col, first.row - second.row
    where = {"left": across < 0, "right": across > 0, "above": down < 0, "below": down > 0}
    sides = [side for side in where if side in link.split()]
    if len(sides) == 1:
        return "yes" if where[sides[0]] else "no"
    (answer,) = (side for side in sides if where[side])
    return answer


def test_same_seed_same_scene():
    for seed in SEEDS:
        first, second = scenes.generate_scene(seed), scenes.generate_scene(seed)
        assert first == second
        assert first.entities == second.entities
        assert np.array_equal(scenes.render(first), scenes.render(second))
    assert scenes.generate_scene(0).entities != scenes.generate_scene(1).entities


def test_splits_are_disjoint():
    ranges = sorted(scenes.SPLITS.values())
    assert all(before[1] <= after[0] for before, after in zip(ranges, ranges[1:], strict=False))
    for name, (start, stop) in scenes.SPLITS.items():
        assert scenes.split_of(start) == scenes.split_of(stop - 1) == name
        assert scenes.split_of(scenes.scene_seed(name, 12345)) == name
    with pytest.raises(ValueError, match="in no split"):
        scenes.split_of(max(stop for _, stop in ranges))
    with pytest.raises(ValueError, match="unknown"):
        scenes.scene_seed("exam", 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_full_scene_contents(seed):
    scene = scenes.generate_scene(seed)
    assert 8 <= len(scene.objects) <= 14
    assert 2 <= len(scene.signs) <= 4
    assert len({sign.color for sign in scene.signs}) == len(scene.signs)
    taken = np.zeros((scene.grid, scene.grid), int)
    for entity in scene.entities:
        row0, col0, row1, col1 = entity.box
        assert min(entity.height, entity.width) >= 3
        assert 0 <= row0 < row1 <= scene.grid and 0 <= col0 < col1 <= scene.grid
        taken[row0:row1, col0:col1] += 1
    assert taken.max() == 1


@pytest.mark.parametrize("grid", [8, 12, 24])
def test_labels_agree_with_scene_and_picture(grid):
    for seed in SEEDS:
        scene = scenes.generate_scene(seed, grid)
        image, labels = scenes.render_with_labels(scene)
        assert image.shape == (grid * scenes.PATCH, grid * scenes.PATCH, 3)
        assert np.array_equal(image, np.asarray(scenes.render(scene)))
        again = scenes.patch_labels(scene)
        assert all(np.array_equal(labels[name], again[name]) for name in scenes.LABEL_GROUPS)
        assert all(labels[name].max() < classes for name, classes in scenes.LABEL_GROUPS.items())
        assert labels["center"].sum() == len(scene.objects) + len(scene.signs)
        for item in scene.objects:
            at = item.row, item.col
            assert scenes.SHAPES[labels["shape"][at] - 1] == item.shape
            assert scenes.COLOR_NAMES[labels["color"][at] - 1] == item.color
        for sign in scene.signs:
            row, first = labels["letter"][sign.row], sign.box[1] + 1
            assert "".join(scenes.ALPHABET[row[first + 2 * slot] - 1] for slot in range(len(sign.word))) == sign.word
        inside = np.zeros((grid, grid), bool)
        for entity in scene.entities:
            row0, col0, row1, col1 = entity.box
            inside[row0:row1, col0:col1] = True
        assert not labels["kind"][~inside].any()


def test_plain_patches_are_smooth():
    scene = scenes.generate_scene(3)
    image, labels = scenes.render_with_labels(scene)
    inside = np.zeros((24, 24), bool)
    for entity in scene.entities:
        row0, col0, row1, col1 = entity.box
        inside[row0:row1, col0:col1] = True
    patches = image.reshape(24, 14, 24, 14, 3).transpose(0, 2, 1, 3, 4).reshape(24, 24, -1, 3).astype(float)
    assert patches[~inside].std(1).max() < 6


@pytest.mark.parametrize("grid", [8, 12, 24])
def test_answers_follow_from_the_scene(grid):
    for seed in range(60):
        scene = scenes.generate_scene(seed, grid)
        for question in questions.ask(np.random.default_rng(seed), scene, 24):
            assert solve(scene, question.text) == question.answer, question


def test_answers_are_balanced():
    told: dict[str, list[str]] = {}
    for seed in range(150):
        scene = scenes.generate_scene(seed)
        for question in questions.ask(np.random.default_rng(seed), scene, 20):
            told.setdefault(question.type, []).append(question.answer)
    assert set(told) == set(questions.TYPES)
    assert 0.44 < np.mean([answer == "yes" for answer in told["existence"]]) < 0.56
    assert max(np.bincount([int(answer) for answer in told["counting"]])) < 0.35 * len(told["counting"])
    for side, other in (("left", "right"), ("above", "below"), ("yes", "no")):
        first, second = told["relation"].count(side), told["relation"].count(other)
        assert 0.4 < first / (first + second) < 0.6


def test_choices_offer_the_truth_once():
    places: dict[int, list[str]] = {}
    told = set()
    for image, choice, scene in questions.choice_questions("test", 150, per_scene=8):
        assert 2 <= len(choice.options) == len(set(choice.options)) <= 4
        right = choice.options[questions.LETTERS.index(choice.answer)]
        assert solve(scenes.generate_scene(scene), choice.question) == right
        assert image.size == (336, 336)
        places.setdefault(len(choice.options), []).append(choice.answer)
        told.add(choice.type)
    assert told == set(questions.TYPES)
    for count, answers in places.items():
        for letter in questions.LETTERS[:count]:
            assert answers.count(letter) / len(answers) == pytest.approx(1 / count, abs=0.1)


def test_choice_options_are_plausible():
    for _, choice, scene in questions.choice_questions("test", 20, per_scene=10):
        options = set(choice.options)
        if choice.type == "existence":
            assert options == {"yes", "no"}
        elif choice.type == "relation":
            assert options in ({"yes", "no"}, {"left", "right"}, {"above", "below"}, set(questions.DIRECTIONS))
        elif choice.type == "counting":
            assert options <= set("01234")
        elif choice.type == "attribute":
            assert any(options <= set(values) for values in questions.VALUES.values())
        else:
            words = {sign.word for sign in scenes.generate_scene(scene).signs}
            assert len(options & words) == min(len(options), len(words))


def test_choices_repeat_and_read_as_lines():
    first, second = (
        [item[1:] for item in questions.choice_questions("test", 3, per_scene=4, seed=2)] for _ in range(2)
    )
    assert first == second and len(first) == 12
    assert {scenes.split_of(scene) for _, scene in first} == {"test"}
    text = questions.choice_text("What color is the ring?", ("red", "blue", "green"))
    assert text == "What color is the ring?\nA. red\nB. blue\nC. green"
    with pytest.raises(ValueError, match="n_scenes: 10001"):
        next(questions.choice_questions("test", 10_001))


def test_scene_questions_repeat_and_stay_in_their_split():
    first = list(questions.scene_questions("test", 3, per_scene=4))
    second = list(questions.scene_questions("test", 3, per_scene=4))
    assert [item[1:] for item in first] == [item[1:] for item in second]
    assert len(first) == 12
    assert {scenes.split_of(item[4]) for item in first} == {"test"}
    other = {item[4] for item in questions.scene_questions("test", 3, per_scene=4, seed=1)}
    assert other.isdisjoint(item[4] for item in first)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="grid: 25"):
        scenes.generate_scene(0, 25)
    with pytest.raises(ValueError, match="mix"):
        questions.ask(np.random.default_rng(0), scenes.generate_scene(0), 3, {"colour": 1.0})
