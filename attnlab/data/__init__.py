"""Data through grain: sources by index, the same batches in the same order for every model."""

from attnlab.data.batches import weight_of
from attnlab.data.images import LabelledImages, digits, image_batches
from attnlab.data.sequences import (
    IGNORED,
    Copy,
    Induction,
    MultiQueryRecall,
    Needle,
    Permutations,
    SelectiveCopy,
    SequenceSource,
    sequence_batches,
)
from attnlab.data.text import Corpus, embedded_text, text_batches, text_files

__all__ = [
    "IGNORED",
    "Copy",
    "Corpus",
    "Induction",
    "LabelledImages",
    "MultiQueryRecall",
    "Needle",
    "Permutations",
    "SelectiveCopy",
    "SequenceSource",
    "digits",
    "embedded_text",
    "image_batches",
    "sequence_batches",
    "text_batches",
    "text_files",
    "weight_of",
]
