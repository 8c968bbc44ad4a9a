"""Training: tasks, and a loop that continues where it stopped."""

from attnlab.train.loop import Experiment, Result, restore_values, train
from attnlab.train.mesh import Mesh
from attnlab.train.step import OptimizerOptions
from attnlab.train.tasks.base import Task
from attnlab.train.tasks.block_diffusion import BlockDiffusionTask
from attnlab.train.tasks.images import ImageClassificationTask
from attnlab.train.tasks.language import LanguageTask
from attnlab.train.tasks.pixels import AxialImageTask, NextBlockImageTask, RasterImageTask
from attnlab.train.tasks.sequences import RegressionTask, SequenceTask
