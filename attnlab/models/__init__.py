"""Models that take any mixer, and the Axial Transformer."""

from attnlab.models.axial import AxialTransformer, sample
from attnlab.models.block_generation import fill_blocks, next_blocks
from attnlab.models.generation import generate, stream
from attnlab.models.image import ImageClassifier
from attnlab.models.lm import LanguageModel
from attnlab.models.regressor import SequenceRegressor
