"""Zero-shot video questions in the form in which Video-LLaVA's and Video-ChatGPT's authors publish them.

A folder per benchmark under ``$VIDEO_QA``: ``test_q.json`` with ``video_name``, ``question`` and ``question_id``,
``test_a.json`` with ``answer`` and ``question_id``, and the videos in a folder beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mustdrop.checks import shown
from mustdrop.read import read_json

ROOT = "VIDEO_QA"
"""The environment variable that says where the benchmarks' folders are."""

QUESTIONS, ANSWERS = "test_q.json", "test_a.json"
PLACES = ("videos/all", "videos", "mp4", "all_test")
"""Where authors keep the videos of one benchmark or another."""

SUFFIXES = ("", ".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
PREFIXES = ("", "v_")
"""What a file may have around the name by which questions call it; ActivityNet's have a prefix."""

LARGEST = 1 << 28
"""Bytes of the largest file of questions."""


@dataclass(frozen=True)
class Source:
    """Where a benchmark is under the root, and its videos in there."""

    folder: str
    videos: str


SOURCES = {
    "tgif_qa": Source("TGIF_Zero_Shot_QA", "mp4"),
    "msvd_qa": Source("MSVD_Zero_Shot_QA", "videos"),
    "msrvtt_qa": Source("MSRVTT_Zero_Shot_QA", "videos/all"),
    "activitynet_qa": Source("Activitynet_Zero_Shot_QA", "all_test"),
}


def is_of_files(task: str) -> bool:
    """Whether a task's data are the authors' files."""
    return task in SOURCES


def folder_of(task: str) -> Path:
    """A benchmark's folder under ``$VIDEO_QA``.

    Raises
    ------
    ValueError
        If the variable is not set, or it has no such folder.
    """
    root = os.environ.get(ROOT)
    wanted = ", ".join(source.folder for source in SOURCES.values())
    if not root:
        raise ValueError(f"{ROOT}: not set; {task} needs the folder that holds {wanted}, see docs/video.md")
    folder = Path(root).expanduser().absolute() / SOURCES[task].folder
    if not folder.is_dir():
        raise ValueError(f"{ROOT}: there is no folder {str(folder)!r}, which {task} needs, see docs/video.md")
    return folder


def check(task: str, limit: int | None = None, skips: bool = False) -> None:
    """See that a benchmark's files are there, the videos of its first `limit` questions among them.

    With `skips`, questions without a video are left to the evaluation, which counts them, as long as others have one.

    Raises
    ------
    ValueError
        With one line that names the file.
    """
    folder = folder_of(task)
    documents = read(folder, SOURCES[task].videos)[:limit]
    missing = [document for document in documents if not document["found"]]
    if missing and (not skips or len(missing) == len(documents)):
        first, many = missing[0], f"{len(missing)} of {len(documents)} questions lack theirs"
        raise ValueError(
            f"{ROOT}: there is no video {first['video_name']!r} of question {first['question_id']!r} below "
            f"{str(folder)!r}; {many}" + ("" if skips else ", --skip-unfit leaves them out and counts them as wrong")
        )


def read(folder: Path, videos: str = "videos") -> list[dict]:
    """A benchmark's questions with their answers, in the order of the questions.

    Parameters
    ----------
    folder : pathlib.Path
        Holds `QUESTIONS`, `ANSWERS` and the videos.
    videos : str
        The likeliest folder of the videos; all of `PLACES` are looked through.

    Returns
    -------
    list of dict
        ``question_id``, ``video_name``, ``video`` (the file), ``found`` (whether it is there), ``question``,
        ``answer`` and ``type``, all text but `found`. Answers belong to questions by their id, whatever their order.

    Raises
    ------
    ValueError
        With one line, if a file is missing or holds something else.
    """
    answers = _by_id(folder / ANSWERS, ("answer", "question_id"))
    place, files = _videos(folder, videos)
    documents = []
    for key, question in _by_id(folder / QUESTIONS, ("video_name", "question", "question_id")).items():
        if key not in answers:
            raise ValueError(f"{folder / ANSWERS}: has no answer to question {shown(key)}")
        name = str(question["video_name"])
        file = next((files[one] for one in _names(name) if one in files), None)
        documents.append(
            {
                "question_id": key,
                "video_name": name,
                "video": str(file or place / name),
                "found": file is not None,
                "question": str(question["question"]),
                "answer": str(answers[key]["answer"]),
                "type": str(answers[key].get("type", "all")),
            }
        )
    return documents


def video_sizes(documents: Sequence[Mapping]) -> list[tuple[str, int]]:
    """Every video that is there, with its size in bytes: what tells one set of videos from another."""
    names = {document["video_name"]: document["video"] for document in documents if document["found"]}
    return [(name, os.path.getsize(file)) for name, file in sorted(names.items())]


def _names(name: str) -> Iterator[str]:
    """The file names that a video may have."""
    return (prefix + name + suffix for prefix in PREFIXES for suffix in SUFFIXES)


def _videos(folder: Path, preferred: str) -> tuple[Path, dict[str, Path]]:
    """The folder of the videos, and the files by their names; of two with one name that in the likelier folder."""
    places = [folder / place for place in dict.fromkeys((preferred, *PLACES)) if (folder / place).is_dir()]
    if not places:
        raise ValueError(f"{ROOT}: there is no folder {str(folder / preferred)!r} of videos")
    files = (file for place in reversed(places) for file in place.iterdir() if file.is_file())
    return places[0], {file.name: file for file in files}


def _by_id(file: Path, fields: Sequence[str]) -> dict[str, dict]:
    """The entries of a file of questions or answers, by their ids."""
    if not file.is_file():
        raise ValueError(f"{ROOT}: there is no file {str(file)!r}")
    entries = read_json(file, LARGEST)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: it must hold a list of mappings with {', '.join(fields)}")
    found: dict[str, dict] = {}
    for number, entry in enumerate(entries):
        lacking = fields if not isinstance(entry, dict) else [name for name in fields if not _is_text(entry.get(name))]
        if lacking:
            raise ValueError(f"{file}: entry {number} lacks {', '.join(lacking)}, or it is neither text nor a number")
        if found.setdefault(str(entry["question_id"]), entry) is not entry:
            raise ValueError(f"{file}: question_id {shown(entry['question_id'])} is there twice")
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
