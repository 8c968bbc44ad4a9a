"""Training: tasks, and a loop that goes on where it stopped."""

from attnlab.train.loop import Experiment, OptimizerOptions, Result, train
from attnlab.train.tasks import (
    AxialImageTask,
    ImageClassificationTask,
    LanguageTask,
    RasterImageTask,
    SequenceTask,
    Task,
)

__all__ = [
    "AxialImageTask",
    "Experiment",
    "ImageClassificationTask",
    "LanguageTask",
    "OptimizerOptions",
    "RasterImageTask",
    "Result",
    "SequenceTask",
    "Task",
    "train",
]
