"""lmms-eval's own tasks: whether their data can be had, asked before a model is loaded, and the data themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import yaml


@cache
def manager():
    """lmms-eval's index of all its tasks, a ``TaskManager``; making it takes seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(verbosity="WARNING")


def check(task: str) -> None:
    """See that the hub or its cache on this machine has a task's data set, without waiting for a hub that is away.

    Where the hub cannot be reached, this process looks at its cache alone from then on.

    Raises
    ------
    ValueError
        If neither has it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    path, name = _data_set(task)
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().dataset_info(path, timeout=20)
            return
        except GatedRepoError:
            raise ValueError(f"task: the data of {task}, {path!r}, ask for your consent on the hub") from None
        except RepositoryNotFoundError:
            raise ValueError(f"task: the Hugging Face hub has no data set {path!r}, which {task} needs") from None
        except Exception:  # whatever the HTTP library of the day raises: the cache may have it all the same
            _go_offline()
    _check_cache(task, path, name)


def load(task: str) -> None:
    """Load a task's data, downloading what is missing, so that nothing is left to go wrong once a model is loaded.

    Raises
    ------
    ValueError
        If that fails.
    """
    from lmms_eval.tasks import get_task_dict

    check(task)
    with in_one_line(task):
        try:
            loaded = get_task_dict([task], manager())[task]
            with suppress(LookupError):  # where the data set itself has the images, they are there already
                loaded.doc_to_visual(loaded.eval_docs_no_media[0])  # others fetch theirs only now
        except (OSError, ValueError, LookupError) as error:
            raise _not_loaded(task, error) from None


@contextmanager
def in_one_line(task: str) -> Iterator[None]:
    """Where lmms-eval gives up after having tried again and again, say why: ValueError."""
    from tenacity import RetryError

    try:
        yield
    except RetryError as error:
        raise _not_loaded(task, error.last_attempt.exception()) from None


def _data_set(task: str) -> tuple[str, str | None]:
    """The data set's name on the hub and the configuration that the task uses, without importing lmms-eval."""
    folder = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0]) / "tasks"
    config = _config(next(folder.rglob(f"{task}.yaml")))
    return config["dataset_path"], config.get("dataset_name")


def _config(file: Path) -> dict:
    """A task's settings with those of the file it includes."""
    own = yaml.load(file.read_text(encoding="utf-8"), _Settings)  # noqa: S506 - a safe loader, see there
    return {**(_config(file.parent / own["include"]) if "include" in own else {}), **own}


class _Settings(yaml.SafeLoader):
    """YAML with lmms-eval's ``!function NAME`` left as text."""


_Settings.add_constructor("!function", lambda loader, node: node.value)


def _check_cache(task: str, path: str, name: str | None) -> None:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(path, name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"task: {task} needs the data set {path!r}, which is not in the local cache, and the Hugging Face hub "
            f"cannot be reached ({reason})"
        ) from None


def _go_offline() -> None:
    """Spare every later request its retries."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _not_loaded(task: str, error: BaseException) -> ValueError:
    return ValueError(f"task: the data of {task} cannot be loaded: {' '.join(str(error).split())[:300]}")
