"""Tasks: where batches come from, and what a model's answer to one is worth. One module per modality."""

from attnlab.train.tasks.base import Batch, Illustrated, Task
from attnlab.train.tasks.images import ImageClassificationTask
from attnlab.train.tasks.language import LanguageTask
from attnlab.train.tasks.pixels import AxialImageTask, RasterImageTask
from attnlab.train.tasks.sequences import RegressionTask, SequenceTask

__all__ = [
    "AxialImageTask",
    "Batch",
    "Illustrated",
    "ImageClassificationTask",
    "LanguageTask",
    "RasterImageTask",
    "RegressionTask",
    "SequenceTask",
    "Task",
]
