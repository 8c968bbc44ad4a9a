"""Models that take any mixer."""

from attnlab.models.image import ImageClassifier
from attnlab.models.lm import LanguageModel, generate

__all__ = ["ImageClassifier", "LanguageModel", "generate"]
