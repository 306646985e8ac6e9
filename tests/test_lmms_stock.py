"""The interface's acceptance test: lmms-eval's own ``llava`` model class drives our ``llava`` package unchanged."""

from __future__ import annotations

from pathlib import Path

from eval import tasks
from eval.run.inference import LoadedModel
from eval.run.lmms import LlavaMustDrop
from eval.tasks import mini_gqa

EMBEDDED = Path(__file__).resolve().parents[1] / "checkpoints" / "llava-mini"
QUESTIONS = 4


def test_stock_llava_gives_our_plugins_answers(checkpoint, tmp_path, monkeypatch):
    import lmms_eval.models.simple.llava as stock
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path))
    monkeypatch.setattr(mini_gqa, "SCENES", 4)
    manager = TaskManager("WARNING", include_path=str(tasks.prepare("mini_gqa")), include_defaults=False)
    theirs = stock.Llava(pretrained=str(checkpoint), device="cpu", device_map="auto", batch_size=2)
    ours = LlavaMustDrop(loaded=LoadedModel.load(str(checkpoint), device="cpu"), batch_size=2)

    def answers(model) -> list[str]:
        results = simple_evaluate(
            model=model, tasks=["mini_gqa"], task_manager=manager, limit=QUESTIONS, bootstrap_iters=0
        )
        assert results["n-samples"]["mini_gqa"]["effective"] == QUESTIONS
        return [sample["filtered_resps"][0].strip() for sample in results["samples"]["mini_gqa"]]

    assert answers(theirs) == answers(ours)
