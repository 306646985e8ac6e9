"""What the README tells people to do works: its Python, its commands with tiny limits, its links."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from eval import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])

needs_model = pytest.mark.skipif(
    not (ROOT / "checkpoints" / "llava-mini" / "config.json").is_file()
    or not (ROOT / "configs" / "methods" / "llava-mini" / "mustdrop.yaml").is_file(),
    reason="the embedded model or its thresholds are not checked out",
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str = README + EVALUATION) -> list[list[str]]:
    """Every command of a text's bash blocks, without comments, variables in front included."""
    text = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    binaries = Path(sys.executable).parent
    settings = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.read_text().startswith("#!/usr/bin/env bash")


@needs_model
def test_python_runs_on_the_embedded_model():
    (code,) = blocks("python")
    code = code.replace('"llava-hf/llava-1.5-7b-hf"', '"checkpoints/llava-mini"')
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) == 16 and 60 < sum(counts) / 16 < 72


def test_the_first_page_is_short():
    assert len([word for word in README.split() if any(map(str.isalnum, word))]) <= 900


@needs_model
def test_main_job_runs(tmp_path):
    assert ["bash", "scripts/eval_gqa.sh"] in commands()
    done = shell("bash scripts/eval_gqa.sh", LIMIT="4", RETAIN="64", OUT=str(tmp_path / "out"), BATCH_SIZE="2")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["method"], row["n"]) for row in rows] == [("vanilla", 4), ("mustdrop", 4)]
    assert "mustdrop" in done.stdout


@needs_model
def test_sweep_and_everything_made_from_it_run(tmp_path):
    """The README's commands on a sweep of one task and one budget; what they read and write is put into place here."""
    sweep, out = tmp_path / "table1_mini.yaml", tmp_path / "results"
    sweep.write_text("tasks: [mini_gqa]\nmethods: [mustdrop]\nretain: [64]\n")
    places = {"configs/sweeps/table1_mini.yaml": str(sweep), "results/table1_mini": str(out)}
    section = [command for command in commands(EVALUATION) if set(places) & set(command)]
    assert [command[0:2] for command in section] == [
        ["bash", "scripts/sweep.sh"],
        ["mustdrop", "table"],
        ["mustdrop", "plots"],
        ["mustdrop", "significance"],
        ["mustdrop", "report"],
    ]
    for command in [section[0], section[0][:-1], *section[1:]]:
        words = [places.get(word, word) for word in command]
        if words[0] == "mustdrop":
            words = [sys.executable, "-m", "mustdrop_command", *words[1:]]
        done = shell(shlex.join(words), LIMIT="4", OUT=str(out))
        assert done.returncode == 0, (words, done.stderr[-2000:])
    made = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".png", ".svg", ".html"} <= made


def test_test_command_runs():
    assert ["bash", "scripts/test.sh"] in commands()
    done = shell("bash scripts/test.sh --collect-only -q tests/test_readme.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command)[:50])
def test_commands_name_what_exists(command):
    """Files, modules and options of every command exist, also of those that need a large model."""
    words = [word for word in command if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "mustdrop":
        words[:2] = ["python", "-m", cli.COMMANDS[words[1]][0]]
    assert words[:2] == ["python", "-m"]
    if not (ROOT / words[2].split(".")[0]).is_dir():  # somebody else's: that it is there is enough
        assert importlib.util.find_spec(words[2])
        return
    program = shlex.join(takewhile(lambda word: not word.startswith("-"), words[2:]))
    usage = shell(f"python -m {program} --help").stdout
    assert all(word in usage for word in words if word.startswith("--"))


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        there = page if not path else page.parent / path
        assert path.startswith("https://") or there.exists(), target
        if heading and not path.startswith("https://"):
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}, target


def test_the_layout_names_what_there_is():
    for folder in re.findall(r"^(\w+)/ ", README, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
