"""Classes of images: training moves them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import data
from attnlab.train import ImageClassificationTask


def test_training_moves_each_image_by_what_the_key_draws_and_lets_zeros_in():
    pixels, labels = np.zeros((1, 5, 5, 1), np.uint8), np.zeros(1, np.int32)
    task = ImageClassificationTask(data.LabelledImages("dot", 2, pixels, labels, pixels, labels), shift=1)
    dots = jnp.zeros((200, 5, 5, 1)).at[:100, 2, 2].set(1.0).at[100:, 0, 3].set(1.0)
    batch = {"image": dots, "label": jnp.zeros(200, jnp.int32)}

    def seen(key):
        images = []
        task.loss(lambda given, *, key: images.append(given) or jnp.zeros((200, 2)), batch, key=key)
        return np.asarray(images[0])

    moved = seen(jax.random.key(0))
    assert {tuple(position) for position in np.argwhere(moved[:100])[:, 1:3].tolist()} == set(
        itertools.product((1, 2, 3), repeat=2)
    )
    np.testing.assert_array_equal(moved[:100].sum((1, 2, 3)), 1)
    assert set(moved[100:].sum((1, 2, 3)).tolist()) == {0, 1}  # some leave by the upper edge, and none comes in below
    assert np.argwhere(moved[100:])[:, 1].max() == 1
    np.testing.assert_array_equal(seen(jax.random.key(0)), moved)
    assert np.any(seen(jax.random.key(1)) != moved)
    np.testing.assert_array_equal(seen(None), dots)
    with pytest.raises(ValueError, match="shift: got 5; need 0 to 4 for images of 5 pixels"):
        ImageClassificationTask(task.images, shift=5)
