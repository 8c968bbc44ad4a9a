"""Data through grain: sources by index, the same batches in the same order for every model."""

from attnlab.data.batches import weight_of
from attnlab.data.images import (
    LabelledImages,
    cifar10,
    digits,
    idx_images,
    image_batches,
    imagenet_npz,
    photo_crops,
)
from attnlab.data.sequences import (
    IGNORED,
    Copy,
    Induction,
    LinearRegressions,
    MultiQueryRecall,
    Needle,
    Permutations,
    SelectiveCopy,
    SequenceSource,
    sequence_batches,
)
from attnlab.data.shards import token_shards, write_token_shards
from attnlab.data.text import Corpus, characters, embedded_text, random_tokens, text_batches, text_files, words
