"""Files that people write: what plain YAML means, and that nothing in it can be misunderstood or hurt."""

import pytest

from mustdrop import load_reducer
from mustdrop.read import MOST_YAML, parse_yaml, read_json, read_yaml


def test_plain_scalars_mean_what_they_look_like():
    text = "{a: 1, b: -2, c: 0.5, d: 1e-3, e: .5, f: true, g: null, h: ~, i: text, j: '1', k: , l: [1, {m: n}]}"
    a_to_l = [1, -2, 0.5, 0.001, 0.5, True, None, None, "text", "1", None, [1, {"m": "n"}]]
    assert list(parse_yaml(text).values()) == a_to_l
    assert [type(value) for value in parse_yaml("[1, 1.0, 0]")] == [int, float, int]
    assert parse_yaml("\ufeff# a comment\n---\na: |\n  b\n") == {"a": "b\n"} and parse_yaml("") is None


@pytest.mark.parametrize("text", ["1:30", "0o17", "010", "0x1F", "1_000", "yes", "on", "NO", "2001-01-01", "<<", "٣"])
def test_what_other_readers_turn_into_something_else_is_text(text):
    assert parse_yaml(f"[{text}]") == [text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"the key 'a' comes twice \(line 3, column 1\)"),
        ("a: {b: 1, b: 1}", "the key 'b' comes twice"),
        ("a: &x [*x]", "an alias"),
        ("a: &x 1\nb: *x", "an alias"),
        ("[" * 3000, "nested deeper than 20 levels"),
        ("{a: " * 3000, "nested deeper than 20 levels"),
        ("- " * 3000 + "a", "nested deeper than 20 levels"),
        ("a: !!python/object/apply:os.system [true]", "a tag"),
        ("a: !!float 1", "a tag"),
        ("true: a", "a key that is no text"),
        ("? [a]\n: b", "a key that is no text"),
        ("a: .nan", ".nan is no number"),
        ("a: -.inf", "-.inf is no number"),
        ("a: 1e999", "too large"),
        ("a: " + "9" * 5000, "too large"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a:\n\t- b", "cannot start any token"),
        ("a: \x00", "#x0000"),
        ("a: [", "line 1"),
    ],
)
def test_what_could_hurt_is_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "file.yaml: ")
    assert str(error.value).startswith("file.yaml: not valid YAML: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: \xff", "not UTF-8 at byte 3"), (b"#" * (MOST_YAML + 1), "larger than"), (None, "expected a file")],
)
def test_files_that_are_no_text_are_named(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    for read in (read_yaml, load_reducer):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "Infinity is no number"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "digits"),
        ("[1,]", "line 1"),
    ],
)
def test_json_is_read_as_strictly(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: not valid JSON: ") and "\n" not in str(error.value)
