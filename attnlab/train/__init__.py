"""Training: tasks, and a loop that goes on where it stopped."""

from attnlab.train.loop import Experiment, Result, restore_values, train
from attnlab.train.step import OptimizerOptions
from attnlab.train.tasks import (
    AxialImageTask,
    ImageClassificationTask,
    LanguageTask,
    RasterImageTask,
    RegressionTask,
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
    "RegressionTask",
    "Result",
    "SequenceTask",
    "Task",
    "restore_values",
    "train",
]
