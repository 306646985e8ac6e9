"""One command, one name: everything is ``mustdrop NAME``, in messages, documents, scripts and settings."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval import cli

ROOT = Path(__file__).resolve().parents[1]
PEOPLE_READ = [
    path
    for pattern in ("*.md", "docs/**/*.md", "checkpoints/*/*.md", "configs/**/*", "scripts/*", ".ci/*", "*.py")
    + tuple(f"{package}/**/*.{end}" for package in ("eval", "llava", "mustdrop") for end in ("py", "yaml", "j2"))
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix != ".npy"
]


def test_nothing_says_another_name():
    assert len(PEOPLE_READ) > 200
    old = re.compile(r"-m (?:eval|mustdrop)\.")
    said = [str(path.relative_to(ROOT)) for path in PEOPLE_READ if old.search(path.read_text(encoding="utf-8"))]
    assert not said, f"{said}: 'python -m eval.NAME' is called 'mustdrop NAME'"


def test_commands_that_are_named_exist():
    """Words after ``mustdrop`` in code (backticks, blocks, calls of the scripts) are commands that there are."""
    called = re.compile(r"(?:^ {4,}|^exec |`|python -m )mustdrop(?:_command)? ([a-z][a-z-]+)\b", re.MULTILINE)
    for path in PEOPLE_READ:
        for name in called.findall(path.read_text(encoding="utf-8")):
            assert name in cli.COMMANDS, f"{path.relative_to(ROOT)}: mustdrop {name}"


def test_help_lists_every_command(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_, purpose) in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(purpose)}$", printed, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_help_says_its_name(name, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith(f"usage: mustdrop {name} ")


def test_wrong_command_gets_the_right_one(capsys):
    assert cli.main(["swep", "x.yaml"]) == 2
    printed = capsys.readouterr().err
    assert "command: got 'swep' (did you mean sweep?), expected one of ask, chat, demo, run, sweep" in printed
    assert printed.count("\n") == 1


def test_module_starts_it_too():
    command = [sys.executable, "-m", "mustdrop_command", "cost", "--retain", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: argument --retain: 'x'"), done.stderr


def test_old_names_still_start():
    """What people's own scripts may call with ``python -m``."""
    for old in ("run", "sweep", "calibrate", "report", "table", "plots", "significance", "bench_speed"):
        path = ROOT / "eval" / f"{old}.py" if (ROOT / "eval" / f"{old}.py").is_file() else ROOT / "eval" / old
        module = importlib.import_module(f"eval.{old}" + ("" if path.suffix else ".__main__"))
        name = {"bench_speed": "bench"}.get(old, old)
        assert module.main is importlib.import_module(cli.COMMANDS[name][0]).main
        assert "sys.exit(main())" in Path(module.__file__).read_text(encoding="utf-8")
