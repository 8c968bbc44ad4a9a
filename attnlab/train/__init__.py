"""Training: tasks, and a loop that goes on where it stopped."""

from attnlab.train.loop import Experiment, OptimizerOptions, Result, restore_values, train
from attnlab.train.tasks import ImageClassificationTask, LanguageTask, RegressionTask, SequenceTask, Task

__all__ = [
    "Experiment",
    "ImageClassificationTask",
    "LanguageTask",
    "OptimizerOptions",
    "RegressionTask",
    "Result",
    "SequenceTask",
    "Task",
    "restore_values",
    "train",
]
