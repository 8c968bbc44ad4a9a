"""Data: splits share nothing, batches depend on (source, batch size, seed) alone, one pass sees every example once."""

import subprocess
import sys

import numpy as np
import pytest

from attnlab import data
from attnlab.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        path = tmp_path / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {number}: " + "abcdefgh" * number)
    (tmp_path / ".hidden").write_text("not read")
    return tmp_path


def documents(text):
    return {bytes(part) for part in bytes(text).split(b"\0") if part}


def test_a_folder_is_split_by_file(folder):
    corpus = data.text_files(str(folder))
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert train
    assert validation
    assert not train & validation
    assert train | validation == {path.read_bytes() for path in folder.rglob("*.txt")}


def test_the_split_of_a_file_depends_on_its_path_alone(folder):
    before = documents(data.text_files(str(folder)).validation)
    (folder / "new.txt").write_text("one more")
    data.text_files.cache_clear()
    assert before <= documents(data.text_files(str(folder)).validation) | {b"one more"}


def test_one_file_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(200)))
    corpus = data.text_files(str(tmp_path / "a.txt"))
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.validation]), np.arange(200))
    assert len(corpus.validation) == 20


def test_embedded_text_is_megabytes_of_python_and_the_same_in_another_process():
    corpus = data.embedded_text()
    assert len(corpus.train) > 3e6
    assert len(corpus.validation) > 1e5
    assert b"import " in bytes(corpus.validation)
    assert not documents(corpus.train[:200_000]) & documents(corpus.validation)
    program = "from attnlab import data; print(data.embedded_text().describe())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(corpus.describe())


def first(batches, count):
    return [batch for _, batch in zip(range(count), batches)]


def test_training_batches_are_decided_by_the_seed(folder):
    corpus = data.text_files(str(folder))

    def batches(seed):
        return first(data.text_batches(corpus, "train", sequence_length=16, batch_size=4, seed=seed), 5)

    one, same, other = batches(1), batches(1), batches(2)
    for a, b in zip(one, same):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert any(np.any(a["tokens"] != b["tokens"]) for a, b in zip(one, other))
    assert one[0]["tokens"].shape == (4, 17)
    assert one[0]["tokens"].dtype == np.int32


def test_every_epoch_has_an_order_of_its_own():
    images = data.digits()
    batches = iter(data.image_batches(images, "train", batch_size=len(images.train_labels), seed=0))
    one, two = next(batches)["label"], next(batches)["label"]
    np.testing.assert_array_equal(np.sort(one), np.sort(two))
    assert np.any(one != two)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_validation_predicts_every_byte_once_and_in_order(folder, batch_size):
    corpus = data.text_files(str(folder))
    targets = [
        batch["tokens"][weight > 0][:, 1:].ravel()
        for batch in data.text_batches(corpus, "validation", sequence_length=16, batch_size=batch_size, seed=0)
        for weight in [batch["weight"]]
    ]
    got = np.concatenate(targets)
    np.testing.assert_array_equal(got, corpus.validation[1 : len(got) + 1])
    assert len(corpus.validation) - len(got) <= 16


def test_digits_are_split_without_loss():
    images = data.digits()
    assert len(images.train_labels) + len(images.validation_labels) == 1797
    assert 300 < len(images.validation_labels) < 420
    assert images.train_images.shape[1:] == (8, 8, 1)
    assert images.train_images.min() == 0
    assert images.train_images.max() == 1
    assert set(images.validation_labels) == set(range(10))


def test_bad_paths_and_lengths_are_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        data.text_files(str(tmp_path / "missing"))
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match=r"short.txt leaves 0 bytes for train"):
        data.text_files(str(tmp_path / "short.txt"))
    (tmp_path / "some.txt").write_text("x" * 100)
    corpus = data.text_files(str(tmp_path / "some.txt"))
    with pytest.raises(UserError, match=r"sequence_length: got 64; the validation text of some\.txt has only 10 bytes"):
        data.text_batches(corpus, "validation", sequence_length=64, batch_size=1, seed=0)
