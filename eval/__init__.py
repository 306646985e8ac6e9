"""Measuring what token reduction costs and saves, through lmms-eval.

``eval.run.inference`` answers questions with a loaded model, ``eval.run.lmms`` shows that to lmms-eval as the model
``llava_mustdrop``, ``eval.tasks`` holds the benchmarks, ``eval.run`` evaluates methods and writes the table, and
``eval.calibrate`` finds thresholds for a wanted number of tokens.
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
