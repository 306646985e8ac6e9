"""Measuring what token reduction costs and saves, through lmms-eval.

``run`` evaluates a checkpoint and a method through lmms-eval's plugin, ``tasks`` holds the benchmarks, ``sweep`` runs
many evaluations, ``report`` makes tables, plots and pages of their results, ``bench`` times, ``calibrate`` finds
settings, ``mini`` is the synthetic world and how the embedded models are trained in it. ``cli`` is the command
``mustdrop``.
"""

from eval.home import ours_first

ours_first()


def manifest():
    """What lmms-eval's entry point ``lmms_eval.models`` calls to learn about our model.

    Returns
    -------
    lmms_eval.models.registry_v2.ModelManifest
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_mustdrop", simple_class_path="eval.run.lmms.LlavaMustDrop")
