"""vLLM with reduced images: our own answers, one-line refusals, and a server that nothing brings down.

Skipped without vLLM. It asks for other versions than these tests run with, so it is run in its own environment:
`VLLM_ENV`, else the one that scripts/serve.sh makes.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[1]
VENV = Path(os.environ.get("VLLM_ENV") or ROOT / ".venv-vllm")
PYTHON = VENV / "bin" / "python"
DIVPRUNE = {"method": "divprune", "retain": 64}
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENV": str(VENV),
}
APART = 3  # answers of 120 that may be right here and wrong there

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM in {VENV}; see docs/serving.md")


def answers(engine: str, *settings: dict | None) -> list[dict]:
    python = PYTHON if engine == "vllm" else sys.executable
    told = [json.dumps(one) for one in settings]
    command = [python, ROOT / "scripts" / "serve_answers.py", "--engine", engine, "--settings", *told]
    environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]


def test_answers_are_our_own_and_prompts_are_shorter():
    settings = [
        DIVPRUNE,
        {"method": "mustdrop_plus", "retain": 64, "diverse": 64},
        {**DIVPRUNE, "positions": "renumber"},
    ]
    ours, theirs = answers("ours", *settings), answers("vllm", *settings, None)
    for mine, served in zip(ours, theirs, strict=False):
        assert abs(mine["right"] - served["right"]) <= APART
        assert mine["prompt_tokens"] == served["prompt_tokens"]
        same = sum(one == other for one, other in zip(mine["answers"], served["answers"], strict=True))
        assert same >= len(mine["answers"]) - APART
    assert theirs[0]["prompt_tokens"] == theirs[-1]["prompt_tokens"] - 576 + 64


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"method": "divprun"}, "did you mean divprune"),
        ({"method": "fastv"}, "works inside the decoder"),
        ({"method": "cdpruner"}, "chooses by the question"),
        ({"method": "mustdrop", "stages": ["vision"]}, "depends on the image"),
    ],
)
def test_the_engine_does_not_start_with_settings_it_cannot_keep(settings, line):
    code = (
        "import json, sys; from vllm.engine.arg_utils import EngineArgs\n"
        "try: EngineArgs(sys.argv[1], hf_overrides={'mustdrop': json.loads(sys.argv[2])}).create_engine_config()\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    command = [str(PYTHON), "-c", code, str(ROOT / "checkpoints" / "llava-mini"), json.dumps(settings)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (said,) = [row for row in done.stderr.splitlines() if "Value error" in row]
    assert line in said


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "scripts"))
    from bench_serve import server

    os.environ["VLLM_ENV"] = str(VENV)
    model = str(ROOT / "checkpoints" / "llava-mini")
    with server(json.dumps(DIVPRUNE), model, 8124, tmp_path_factory.mktemp("server") / "log") as where:
        yield where


def test_nothing_brings_the_server_down(address):
    from bench_serve import ask, requests

    bodies = requests(64, "llava-mini", 5_000_000)
    alone = ask(address, bodies[0])
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda body: ask(address, body), bodies))
    assert together[0]["prompt"] == alone["prompt"]
    assert all(64 < one["prompt"] < 200 for one in together)
    refused(address, {**bodies[1], "messages": with_image("data:image/png;base64,bm8gcGljdHVyZQ==")})
    refused(address, {**bodies[1], "model": "another"})
    refused(address, {**bodies[1], "max_tokens": -1})
    hang_up(address, {**bodies[2], "max_tokens": 400, "ignore_eos": True, "stream": True})
    own = {**bodies[3], "mm_processor_kwargs": {"mustdrop": {"method": "vanilla"}}}
    try:
        assert ask(address, own)["prompt"] < 200  # a client's settings reach nobody, not even itself
    except HTTPError as error:
        assert error.code == 400
    assert ask(address, bodies[0])["prompt"] == alone["prompt"]
    assert urlopen(f"{address}/health", timeout=60).status == 200


def with_image(url: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What color is the star?"}]
    return [{"role": "user", "content": content}]


def refused(address: str, body: dict) -> None:
    from bench_serve import ask

    with pytest.raises(HTTPError) as error:
        ask(address, body)
    assert 400 <= error.value.code < 500


def hang_up(address: str, body: dict) -> None:
    """Begin to read an answer, and go away."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(20)
    connection.close()
