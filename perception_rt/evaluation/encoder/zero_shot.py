"""Task: classify images or videos by the names of their classes."""

from perception_rt.evaluation.data import webdataset
from perception_rt.evaluation.data.class_names import read_classes, read_templates
from perception_rt.evaluation.data.labelled import read_labelled
from perception_rt.evaluation.encoder.classification import classification_result
from perception_rt.evaluation.encoder.embeddings import embed_items
from perception_rt.evaluation.outcomes import TaskResult
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.embedder import Embedder


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task.

    A class's vector is the mean over the templates, and an item belongs to the class with the
    highest cosine. Without templates, those of the data are used, or the class names alone.

    Args:
        engine: a loaded encoder with a text tower.
        data: as for `read_labelled`.
        options: `classes`, `templates` and `num_frames`.
        on_progress: called after each batch.

    Raises:
        InputError: the data, the classes or the templates are unusable.
    """
    classes = None if options.classes is None else read_classes(options.classes)
    source = options.templates or webdataset.template_file(data)
    templates = ["{}"] if source is None else read_templates(source)
    labelled = read_labelled(data, classes)
    weights = engine.embed_labels(
        labelled.classes,
        templates,
        on_progress=lambda done, total: on_progress("sentences", done, total),
    )
    vectors = embed_items(engine, labelled.items, options.num_frames, on_progress)
    settings = {"templates": templates}
    return classification_result(labelled, vectors @ weights.T, vectors, settings)
