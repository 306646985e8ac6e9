"""Writes synthetic clips as video files with questions, in the files that the published video benchmarks have.

    mustdrop mini-clips --folder runs/clips --split test --count 100

A split is a folder with ``videos/*.mp4``, ``test_q.json`` and ``test_a.json``, as those of MSVD-QA and its siblings.
The videos are lossless, 29 frames of 224 px; eight evenly spaced frames are the clip's eight moments.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.mini import scenes
from eval.mini.clip_questions import clip_questions
from eval.mini.clip_scenes import draw_clip
from mustdrop.command import Parser, command

log = logging.getLogger(__name__)

#: Frames of a file from one moment to the next.
STRIDE = 4
FRAMES_PER_SECOND = 8
#: H.264 on RGB with nothing quantised: frames come back as they were, and backgrounds that stay cost little.
_CODEC, _PIXELS, _OPTIONS = "libx264rgb", "rgb24", {"qp": "0", "preset": "veryfast"}


def write_video(path: Path, frames: np.ndarray, rate: int = FRAMES_PER_SECOND) -> Path:
    """Write ``uint8 [frames, height, width, 3]`` without loss; the file appears complete or not at all.

    Raises
    ------
    ValueError
        If PyAV is not installed, or was built without the encoder.
    """
    try:
        import av
    except ImportError:
        raise ValueError("writing videos needs PyAV; pip install av") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with av.open(str(temporary), "w") as file:
            stream = file.add_stream(_CODEC, rate=Fraction(rate), options=_OPTIONS)
            stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frames.shape[1:3], _PIXELS, 1
            for image in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            file.mux(stream.encode())
        os.replace(temporary, path)
    except av.codec.codec.UnknownCodecError:
        raise ValueError(f"this PyAV has no encoder {_CODEC}, its wheels on PyPI have; pip install av") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_benchmark(
    folder: str | os.PathLike, split: str = "test", count: int = 100, seed: int = 0, per_clip: int = 5
) -> Path:
    """Write clips of a split and questions about them.

    Parameters
    ----------
    folder : path
        Gets ``videos/NAME.mp4``, ``test_q.json`` (``video_name``, ``question_id``, ``question``) and ``test_a.json``
        (``question_id``, ``answer``, ``type``), whatever the split is called.
    split : {"train", "validation", "test"}
        Splits share no clip; the one that the embedded model learned from is ``train``.
    count : int
        Clips, at most 10,000.
    seed : int
        Chooses clips within the split; each has its own.
    per_clip : int
        Most questions about a clip.

    Returns
    -------
    Path
        The folder. The same arguments write the same files.

    Raises
    ------
    ValueError
        If an argument is out of range, or videos cannot be written here.
    """
    folder = Path(folder)
    _check(split, count, seed, per_clip)
    questions, answers = [], []
    for clip, asked in tqdm(clip_questions(split, count, per_clip, seed), desc="clips", total=count, mininterval=5):
        name = f"clip{clip.seed}"
        write_video(folder / "videos" / f"{name}.mp4", draw_clip(clip, STRIDE))
        for number, question in enumerate(asked):
            own = f"{clip.seed}_{number}"
            questions.append({"video_name": name, "question_id": own, "question": question.text})
            answers.append({"question_id": own, "answer": question.answer, "type": question.type})
    for name, entries in (("test_q.json", questions), ("test_a.json", answers)):
        (folder / name).write_text(json.dumps(entries, indent=1) + "\n")
    return folder


def _check(split: str, count: int, seed: int, per_clip: int) -> None:
    if split not in scenes.SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(scenes.SPLITS)}")
    for name, value, fewest, most in (
        ("count", count, 1, 10_000),
        ("seed", seed, 0, 999),
        ("per_clip", per_clip, 1, 50),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or not fewest <= value <= most:
            raise ValueError(f"{name}: got {value!r}, expected a whole number from {fewest} to {most}")


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write a split; returns the exit status."""
    parser = Parser("mini-clips", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=tuple(scenes.SPLITS))
    parser.add_argument("--count", type=int, default=100, help="clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_clip", type=int, default=5, help="questions about a clip, at most")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log.info("wrote %s", write_benchmark(**vars(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
