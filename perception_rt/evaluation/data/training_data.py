"""Labelled examples to learn from, and the items to evaluate on."""

import os

from perception_rt.errors import InputError
from perception_rt.evaluation.data.class_names import read_classes
from perception_rt.evaluation.data.labelled import Labelled, read_labelled
from perception_rt.evaluation.tasks import TaskOptions


def read_training(data: str, options: TaskOptions) -> tuple[Labelled, Labelled]:
    """Reads the training items and the items of `data`, with the classes of the training items.

    Args:
        data: as for `read_labelled`. Of tars, the split "train" is for training.
        options: `train_data` and `classes`.

    Raises:
        InputError: the data are unusable, a file is in both, or a class has no training item.
    """
    if options.train_data is None:
        raise InputError("give --train-data: examples with labels, as DATA")
    classes = None if options.classes is None else read_classes(options.classes)
    train = read_labelled(options.train_data, classes, split="train")
    absent = sorted(set(range(len(train.classes))) - set(train.labels.tolist()))
    if absent:
        name = train.labelled_classes[absent[0]]
        raise InputError(f"class {name!r:.60} has no item in the training data")
    test = read_labelled(data, train.classes)
    trained = {(os.path.realpath(item.file), item.offset) for item in train.items}
    for item in test.items:
        if (os.path.realpath(item.file), item.offset) in trained:
            raise InputError(f"{item.source!r:.200} is also in the training data")
    if test.items[0].kind != train.items[0].kind:
        raise InputError("the training data and the data are of different kinds")
    return train, test
