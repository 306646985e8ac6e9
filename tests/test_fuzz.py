"""Bad input to every command: one line on standard error, status 2, no traceback, no hang, no model loaded.

Cases are drawn with a fixed seed. FUZZ_CASES=5000 FUZZ_SEED=1 asks for more or others.
"""

from __future__ import annotations

import json
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from fabricated import results_folder

from eval import cli

CASES, SEED, SECONDS = int(os.environ.get("FUZZ_CASES", 60)), int(os.environ.get("FUZZ_SEED", 0)), 20

NO_NUMBER = [
    "abc",
    "",
    " ",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "1_000",
    "\u0663",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1;5",
    "[1]",
]
NO_COUNT = [*NO_NUMBER, "0", "-1", "1.5", "64.5", "1e2", "-0", "true", "None", "\udcff"]
NO_SHARE = [*NO_NUMBER, "-0.5", "1.5", "1e400", "-1e-9", "0.5.5"]
NO_NAME = ["", " ", "../x", "a/b", "\x00", "no-such", "x" * 300, "\n", "\udcff", "mustdrop,fastv", "['mustdrop']", "-"]
NO_FOLDER = ["", " ", "\x00", "FILE", "FILE/below", "x" * 300, "LOOP", "LOOP/below", "a/" + "y" * 256]
NO_FILE = ["", " ", "\x00", "FOLDER", "NONE", "x" * 300, "LOOP", "NONE/below", "FILE/below", "BINARY", "/dev/zero"]
NO_CHOICE = ["", " ", "auto ", "no-such", "1", "\x00", "float32,float16", "None"]


def options() -> list[tuple[list[str], str, list[str]]]:
    """Commands that are right but for one option, and what is wrong for it."""
    run = ["run", "--task", "mini_gqa", "--retain", "64", "--limit", "6", "--out", "FOLDER/out"]
    sweep = ["sweep", "SWEEP", "--dry-run", "--out", "FOLDER/out"]
    calibrate = ["calibrate", "--retain", "64", "--samples", "8", "--out", "FOLDER/out"]
    heads = ["calibrate-heads", "--share", "0.5", "--samples", "8", "--out", "FOLDER/out/heads.npy"]
    bench = ["bench", "--retain", "64", "--repeats", "1"]
    table, results = ["table", "TABLE", "--results", "RESULTS"], ["RESULTS"]
    measuring = {"--batch-size": NO_COUNT, "--device": ["", "tpu", "cuda:99", "meta", "cpu:x"], "--dtype": NO_CHOICE}
    measuring |= {"--conv-template": NO_CHOICE, "--data": NO_FILE, "--task": NO_NAME, "--samples": NO_COUNT}
    measuring |= {"--model": [*NO_NAME[:-1], "FOLDER", "FILE"], "--image-folder": ["", "\x00", "FOLDER"]}
    loading = {"--model": [*NO_NAME[:-1], "FOLDER", "FILE"], "--dtype": NO_CHOICE, "--device": ["", "tpu", "cuda:99"]}
    wrong = [
        (
            run,
            {
                **loading,
                "--task": NO_NAME,
                "--retain": [*NO_COUNT, "577", "1"],
                "--limit": NO_COUNT,
                "--seed": [*NO_NUMBER, "-1", "1.5", "4294967296"],
            },
        ),
        (run, {"--batch-size": NO_COUNT, "--out": NO_FOLDER, "--method": NO_NAME, "--device-map": NO_CHOICE}),
        (run, {"--attn-implementation": NO_CHOICE, "--conv-template": NO_CHOICE, "--configs": ["", "\x00"]}),
        (sweep, {"--limit": NO_COUNT, "--parallel": NO_COUNT, "--out": NO_FOLDER, "--where": NO_CHOICE}),
        (sweep, {"--model": [one for one in NO_NAME if one != "a/b"]}),
        (calibrate, {**measuring, "--retain": [*NO_COUNT, "577"], "--tolerance": [*NO_SHARE, "0"], "--out": NO_FOLDER}),
        (
            calibrate,
            {
                "--set": [
                    "window=[",
                    "=1",
                    "window",
                    "nowindow=1",
                    "window=-1",
                    "retain=5",
                    "method=fastv",
                    "window=1_0",
                ]
            },
        ),
        (
            calibrate,
            {"--set": ["stages=[a]", "window=.nan", "window=&a [*a]", "window=" + "[" * 3000, "global_threshold=1"]},
        ),
        (calibrate, {"--method": [*NO_NAME, "vanilla", "yopo", "compose"]}),
        (heads, {**measuring, "--share": NO_SHARE, "--majority": NO_SHARE, "--full-layers": [*NO_NUMBER, "-1", "17"]}),
        (heads, {"--out": [*NO_FOLDER, "heads.txt", "x" * 300 + ".npy", "FILE/heads.npy"]}),
        (["calibrate-heads"], {"--threshold": [*NO_NUMBER, "-1"], "--samples": ["8"]}),
        (
            bench,
            {
                "--retain": [*NO_COUNT, "577", "1"],
                "--text": [*NO_COUNT, "1"],
                "--new-tokens": NO_COUNT,
                "--json": [one for one in NO_FILE if one not in ("NONE", "BINARY", "/dev/zero")],
            },
        ),
        (bench, {"--layers": NO_COUNT, "--threads": NO_COUNT, "--repeats": NO_COUNT, "--warmup": NO_COUNT}),
        (
            bench,
            {
                "--shape": [*NO_NAME, "FOLDER", "FILE"],
                "--checkpoint": NO_NAME[:-1],
                "--methods": [*NO_NAME, "FOLDER/m.yaml"],
            },
        ),
        (bench, {"--dtype": NO_CHOICE, "--device": ["", "tpu", "cuda:99"], "--attn-implementation": NO_CHOICE}),
        (bench, {"--batch-size": NO_COUNT}),
        (["cost"], {"--model": [*NO_NAME, "FOLDER", "FILE"], "--retain": [*NO_SHARE, "577"], "--images": NO_COUNT}),
        (["cost"], {"--schedule": [*NO_NUMBER, "2:9,2:8", "2:9,6:10", "40:1", "-1:5", "2:-5"], "--dtype": NO_CHOICE}),
        (["cost"], {"--tokens-per-layer": [*NO_NUMBER, "1,2", ",".join(["577"] * 32)], "--yopo": [*NO_FILE, "METHOD"]}),
        (
            ["cost"],
            {"--merged": [*NO_NUMBER, "577"], "--text-tokens": NO_NUMBER, "--batch": NO_COUNT, "--json": NO_FOLDER[:2]},
        ),
        (table, {"--format": NO_CHOICE, "--out": NO_FOLDER, "--results": [*NO_FOLDER, "FOLDER", "NONE"]}),
        (["significance", *results], {"--a": NO_NAME, "--b": NO_NAME, "--against": NO_NAME, "--task": NO_NAME}),
        (["significance", *results], {"--format": NO_CHOICE}),
        (["plots", *results], {"--out": NO_FOLDER}),
        (["report", *results], {"--out": ["", "FOLDER", "x" * 300, "FILE/below"]}),
    ]
    return [(base, option, values) for base, by_option in wrong for option, values in by_option.items()]


SCALARS = [
    "null", "true", "yes", "-1", "0", "1.5", ".nan", ".inf", "-.inf", "1e999", "1:30", "0o17", "1_000", "9" * 40, "''",
    "abc", "[]", "{}", "[[]]", "[1, [2]]", "{a: 1}", "&a [*a]", "*a", "!!python/name:os.system", "!x y", "\t- a", "' '",
    "[" * 3000, "{a: " * 100, "[" + "1," * 999 + "1]", "2001-01-01", "!!binary aGk=", "\ud7ff", "x" * 5000, "|", "- a",
    "{1: 2}", "\x00",
]  # fmt: skip
TEXTS = [
    "",
    "\n",
    "[]",
    "- a",
    "a",
    "1",
    "a: 1\n---\nb: 2",
    "? [a]\n: b",
    "\x00",
    "a: b: c",
    "%YAML 9.9\n---\n{}",
    "<<: {a: 1}",
]
KEYS = {
    "sweep": [
        "models",
        "tasks",
        "methods",
        "retain",
        "of",
        "seeds",
        "batch_size",
        "limit",
        "overrides",
        "launch",
        "unreachable",
    ],
    "table": ["title", "model", "columns", "budgets", "methods", "show", "costs", "notes"],
    "method": ["method", "window", "filter_layers", "retain", "key_rate", "stages", "compat", "budget", "parts", "at"],
}
RIGHT = {
    "sweep": {"models": "checkpoints/llava-mini", "tasks": "[mini_gqa]", "methods": "[mustdrop]", "retain": "[64]"},
    "table": {"title": "T", "model": "llava-mini", "columns": "[mini_gqa]", "budgets": "[64]", "methods": "[mustdrop]"},
    "method": {"method": "mustdrop", "window": "3", "filter_layers": "[2, 6]"},
}
MAY_BE = {  # what of SCALARS some keys may really say
    "sweep": {
        "methods": {"[]", "null"},
        "retain": {"[]", "null"},
        "seeds": {"0", "null", "[" + "1," * 999 + "1]"},
        "models": {"null"},
    }
    | {key: {"null"} for key in ("batch_size", "limit", "unreachable")}
    | {key: {"null", "{}"} for key in ("overrides", "launch")},
    "table": {
        key: {"abc", "yes", "1:30", "0o17", "1_000", "2001-01-01", "\ud7ff", "x" * 5000} for key in ("title", "model")
    },
    "method": {key: {"null"} for key in ("filter_layers", "retain", "key_rate", "budget")}
    | {"key_rate": {"0", "null"}},
}


def file_text(kind: str, draw: random.Random) -> str | bytes:
    """A file of a kind in which one thing is wrong."""
    way = draw.randrange(8)
    right = "".join(f"{key}: {value}\n" for key, value in RIGHT[kind].items())
    if way == 0:
        return draw.choice(TEXTS)
    if way == 1:
        return draw.choice(
            [b"\xff\xfe", b"\xef\xbb\xbf\xff", os.urandom(0) + b"a: \x80", b"\x00" * 9, b"# " + b"x" * 200_000]
        )
    if way == 2:
        return right + draw.choice(list(RIGHT[kind])) + ": again\n"
    if way == 3:
        return right + f"{draw.choice(['nonsense', '1', 'null', '[a]', 'Method', 'é'])}: 1\n"
    key = draw.choice(KEYS[kind])
    value = draw.choice([one for one in SCALARS if one not in MAY_BE[kind].get(key, ())])
    return "".join(f"{name}: {text}\n" for name, text in {**RIGHT[kind], key: value}.items())


DATA = [
    *("", "[", "{}", "[]", "[1, 2]", "null", '"text"', "NaN", "[NaN]", "1" * 5000, "[" * 10**5, '[{"a": 1, "a": 2}]'),
    *(
        json.dumps([{"question": "q", **entry}])
        for entry in (
            *(
                {"image": image}
                for image in (1, None, [], "", "none.png", "FOLDER", "BINARY", "LOOP", "\0", "\ud800", "x" * 300)
            ),
            *({"image": "BINARY", "question": question} for question in (1, None, "", [])),
            {},
        )
    ),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "folder").mkdir()
    (folder / "file").write_text("text")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "loop").symlink_to(folder / "loop")
    for kind in KEYS:
        (folder / f"{kind}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in RIGHT[kind].items()))
    names = {name.upper(): str(folder / name) for name in ("folder", "file", "binary", "loop", "none")}
    names |= {kind.upper(): str(folder / f"{kind}.yaml") for kind in KEYS}
    return {**names, "RESULTS": str(results_folder(folder / "results"))}


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch, tmp_path):
    """No model is loaded and nothing is evaluated; the working folder is empty but for a way to the checkpoint."""
    from eval import tasks
    from eval.bench import model as bench_model
    from eval.run import command as run
    from eval.run import inference

    def reached(*_, **__):
        raise AssertionError("accepted: the model was about to be loaded")

    monkeypatch.setattr(inference.LoadedModel, "load", reached)
    monkeypatch.setattr(bench_model, "random_model", reached)
    monkeypatch.setattr(run, "_evaluate", reached)
    monkeypatch.setattr(tasks, "training_questions", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "MODEL_BASE", "LIMIT", "RETAIN", "OUT", "BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def in_time(seconds: int):
    """Raise TimeoutError in what takes longer."""

    def late(*_):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(argv: list[str], capsys) -> str | None:
    """What is wrong with how a command refuses its arguments; None if it does as it should."""
    try:
        with in_time(SECONDS):
            status = cli.main(argv)
    except BaseException as error:  # noqa: B902 - a traceback is what this looks for
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status != 2 or len(errors) != 1 or lines[-1] != errors[0] or len(errors[0]) < 15:
        return f"status {status}, {lines[-3:]}"
    return None


def placed(text: str, places: dict[str, str]) -> str:
    """The text with words in capitals replaced."""
    for word, path in places.items():
        text = text.replace(word, path)
    return text


def check(cases: list[list[str]], places: dict[str, str], capsys) -> None:
    """Try every command line; all that are not refused as they should be are shown together."""
    wrong = []
    for argv in cases:
        argv = [placed(word, places) for word in argv]
        if complaint := refused(argv, capsys):
            wrong.append(f"{[word[:80] for word in argv]}: {complaint}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(cases)}", *wrong])


@pytest.mark.parametrize("command", sorted({base[0] for base, *_ in options()}))
def test_every_option_refuses_what_makes_no_sense(command, places, capsys):
    draw = random.Random(f"{SEED} {command}")
    every = [[*base, option, value] for base, option, values in options() for value in values if base[0] == command]
    check(draw.sample(every, min(CASES, len(every))), places, capsys)


@pytest.mark.parametrize("kind", KEYS)
def test_files_in_which_one_thing_is_wrong(kind, places, tmp_path, capsys):
    draw, cases = random.Random(f"{SEED} {kind}"), []
    commands = {
        "sweep": lambda file: ["sweep", file, "--dry-run"],
        "table": lambda file: ["table", file, "--results", "RESULTS"],
        "method": lambda file: draw.choice([["cost", "--yopo", file], ["bench", "--methods", file]]),
    }
    for number in range(CASES):
        file, text = tmp_path / f"{number}.yaml", file_text(kind, draw)
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        cases.append(commands[kind](str(file)))
    check(cases, places, capsys)


@pytest.mark.parametrize("name", ["MODEL", "MODEL_BASE", "LIMIT", "RETAIN", "OUT", "BATCH_SIZE"])
def test_the_environment_is_looked_at_as_options_are(name, places, tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    wrong = {"MODEL": ["none", str(tmp_path), "a/b/c"], "OUT": [str(file), "x" * 300]}
    for value in wrong.get(name, ["abc", "0", "-1", "1.5", "nan", "9" * 30]):
        monkeypatch.setenv(name, value)
        check([["run", "--task", "mini_gqa"]], places, capsys)
        if name not in ("RETAIN", "BATCH_SIZE"):
            check([["sweep", "SWEEP", "--dry-run"]], places, capsys)


def test_sample_files(places, tmp_path, capsys):
    cases = []
    for number, text in enumerate(DATA):
        file = tmp_path / f"{number}.json"
        file.write_text(placed(text, places))
        cases.append(["calibrate", "--data", str(file), "--out", "FOLDER/out"])
    check(cases, places, capsys)


def test_unknown_commands_and_options(places, capsys):
    commands = [[name] for name in ("", " ", "runn", "--run", "\udcff", "\n", "x" * 9999)]
    check([*commands, *([name, "--no-such-option"] for name in cli.COMMANDS)], places, capsys)


def test_what_the_machine_refuses_is_one_line(places, capsys, monkeypatch):
    """A full disk, a file that may not be read."""

    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    check([["table", "TABLE", "--results", "RESULTS", "--out", "FOLDER"], ["plots", "RESULTS"]], places, capsys)
    check([["report", "RESULTS", "--out", "FOLDER/report.html"], ["cost", "--json", "FOLDER/x.json"]], places, capsys)
