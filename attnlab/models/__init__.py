"""Models that take any mixer."""

from attnlab.models.image import ImageClassifier
from attnlab.models.lm import LanguageModel, generate
from attnlab.models.regressor import SequenceRegressor

__all__ = ["ImageClassifier", "LanguageModel", "SequenceRegressor", "generate"]
