"""What all tests share: no network, one thread, the same random numbers, and where the golden outputs lie."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import sentencepiece
import torch
from checkpoint import save_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def golden_folder() -> Path:
    """Folder of the golden outputs: ``$MUSTDROP_GOLDEN``, else ``../shared/golden``; it need not be there."""
    return Path(os.environ.get("MUSTDROP_GOLDEN") or REPOSITORY.parent / "shared" / "golden")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The same; tests are skipped without it."""
    folder = golden_folder()
    if not (folder / "manifest.json").is_file() or not (folder / "model_llava").is_dir():
        pytest.skip(f"no golden outputs in {folder}; set MUSTDROP_GOLDEN")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that holds nothing but a small sentencepiece ``tokenizer.model``."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sentences = ["the dog and the cat look at the picture", "USER: describe the sign ASSISTANT: a red stop sign."]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 8),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A small random model whose name makes it the embedded one."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "llava-mini-random", tokenizer_folder)


@pytest.fixture(scope="session")
def loaded(checkpoint: Path):
    """The same, loaded: an ``eval.run.inference.LoadedModel``."""
    from eval.run.inference import LoadedModel

    return LoadedModel.load(str(checkpoint), device="cpu")
