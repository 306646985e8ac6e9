"""Short videos of moving squares, and benchmark folders in the authors' form, written by PyAV."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np


def frames(count: int = 12, side: int = 96, seed: int = 0, width: int | None = None) -> np.ndarray:
    """A square of one colour moves to the right before noise; frame n has grey level 16 n in its first pixels."""
    rng = np.random.default_rng(seed)
    drawn = np.repeat(rng.integers(0, 60, (1, side, width or side, 3), np.uint8), count, axis=0)
    color = rng.integers(100, 255, 3, np.uint8)
    for number, frame in enumerate(drawn):
        start = number * (side - 24) // count
        frame[side // 3 : side // 3 + 24, start : start + 24] = color
        frame[:8, :8] = min(255, 16 * number)
    return drawn


def write(path: Path, drawn: np.ndarray, codec: str = "ffv1", rate: int = 8) -> Path:
    """A lossless file, or with `mpeg4` a lossy one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = drawn.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        container.start_encoding()
        for picture in drawn:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


QUESTIONS = ("what is moving", "which way does it go", "how many are there")
ANSWERS = ("square", "right", "one")


def write_benchmark(folder: Path, count: int = 4, videos: str = "videos", per_video: int = 2, seed: int = 0) -> Path:
    """`count` questions in the authors' form; the answers lie in another order than the questions."""
    questions, answers = [], []
    for number in range(count):
        clip = f"clip{number // per_video}"
        if number % per_video == 0:
            write(folder / videos / f"{clip}.avi", frames(seed=seed + number))
        kind = number % len(QUESTIONS)
        questions.append({"video_name": clip, "question": QUESTIONS[kind], "question_id": f"{clip}_{number}"})
        answers.append({"answer": ANSWERS[kind], "type": kind, "question_id": f"{clip}_{number}"})
    (folder / "test_q.json").write_text(json.dumps(questions))
    (folder / "test_a.json").write_text(json.dumps(answers[::-1]))
    return folder
