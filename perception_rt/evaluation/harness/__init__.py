"""Packages as models of other evaluation harnesses: lmms-eval, CLIP_benchmark and mteb.

Each harness has a module that is imported when the harness asks for the model. The harnesses need
torch and pin other libraries, so each has an environment of its own.
"""

from typing import Any


def lmms_eval_model() -> Any:
    """Place of the model class; the entry point `lmms_eval.models` calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="perception_rt",
        simple_class_path=f"{__name__}.lmms_eval.PerceptionRt",
    )
