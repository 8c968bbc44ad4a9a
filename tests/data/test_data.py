"""Data: splits share nothing, batches depend on (source, batch size, seed) alone, one pass sees every example once."""

import dataclasses
import functools
import gzip
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


@pytest.mark.long
def test_embedded_text_is_megabytes_of_python_and_the_same_in_another_process():
    corpus = data.embedded_text()
    assert len(corpus.train) > 3e6
    assert len(corpus.validation) > 1e5
    assert b"import " in bytes(corpus.validation)
    assert not documents(corpus.train[:200_000]) & documents(corpus.validation)
    program = "from attnlab import data; print(data.embedded_text().describe())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(corpus.describe())


def test_random_tokens_are_those_of_the_seed_and_stand_for_nothing():
    corpus = data.random_tokens(50, 1000, seed=1)
    assert (len(corpus.train), len(corpus.validation), corpus.vocabulary) == (900, 100, 50)
    assert set(corpus.train.tolist()) == set(range(50))
    np.testing.assert_array_equal(data.random_tokens(50, 1000, seed=1).train, corpus.train)
    assert not np.array_equal(data.random_tokens(50, 1000).train, corpus.train)
    assert corpus.decode(np.array([3, 49])) == "3 49"


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


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("rows", [(0, 1, 2), (3, 4, 5), (1,), (0, 4)])
def test_rows_are_those_of_the_whole_batches_also_after_a_restart(split, rows):
    """For text, images and drawn sequences, whose sources are shuffled, or not, and filled up."""
    corpus = data.Corpus("letters", np.arange(200, dtype=np.uint8), np.arange(70, dtype=np.uint8))
    images, source = data.digits(), data.Copy()
    options = {"batch_size": 6, "seed": 3}
    for batches in (
        functools.partial(data.text_batches, corpus, split, sequence_length=4, **options),
        functools.partial(data.image_batches, images, split, **options),
        functools.partial(data.sequence_batches, source, split, validation_examples=40, **options),
    ):
        whole, part = first(batches(), 5), iter(batches(rows=rows))
        head, state = first(part, 2), part.get_state()
        part = iter(batches(rows=rows))
        part.set_state(state)
        for one, other in zip([*head, *first(part, 3)], whole, strict=False):
            for name, values in other.items():
                np.testing.assert_array_equal(one[name], values[list(rows)])
        position = iter(batches())
        first(position, 2)
        assert position.get_state() == state, "the same for any rows"


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
    assert images.train_images.dtype == np.uint8
    assert images.levels == 17
    assert (images.train_images.min(), images.train_images.max()) == (0, 16)
    assert set(images.validation_labels) == set(range(10))


def test_batches_hold_floats_for_classes_and_integers_for_pixels():
    images = data.digits()
    for split, wanted in (("validation", images.validation_images), ("train", None)):
        floats = next(iter(data.image_batches(images, split, batch_size=5, seed=3)))
        pixels = next(iter(data.image_batches(images, split, batch_size=5, seed=3, with_labels=False)))
        assert (floats["image"].dtype, pixels["pixels"].dtype) == (np.float32, np.int32)
        np.testing.assert_array_equal(floats["image"] * 16, pixels["pixels"])
        if wanted is not None:
            np.testing.assert_array_equal(pixels["pixels"], wanted[:5])
    assert pixels.keys() == {"pixels"}


def test_crops_of_photographs_validate_on_a_part_that_training_does_not_see():
    from sklearn import datasets

    photographs = datasets.load_sample_images().images
    crops = data.photo_crops(size=64)
    cut = 512  # of 640 columns
    for number, photograph in enumerate(photographs):
        train = crops.train_images[crops.train_labels == number]
        validation = crops.validation_images[crops.validation_labels == number]
        assert train.dtype == np.uint8
        starts = [(y, x) for y in range(0, 427 - 63, 16) for x in range(0, cut - 63, 16)]
        assert len(train) == 2 * len(starts)  # and mirrored
        for index in (0, 17, len(starts) - 1):
            y, x = starts[index]
            np.testing.assert_array_equal(train[index], photograph[y : y + 64, x : x + 64])
            np.testing.assert_array_equal(train[len(starts) + index], train[index][:, ::-1])
        assert len(validation) == 6 * 2
        np.testing.assert_array_equal(validation[3], photograph[64:128, cut + 64 : cut + 128])
    with pytest.raises(ValueError, match="size: got 129; need 4 to 128"):
        data.photo_crops(size=129)


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


def test_bytes_that_are_no_text_are_marked():
    corpus = data.Corpus("bytes", np.zeros(2, np.uint8), np.zeros(2, np.uint8))
    assert corpus.decode(np.array([104, 195, 175, 195, 300], np.int32)) == "hï\ufffd\ufffd"
    assert corpus.decode(np.frombuffer("naïve".encode(), np.uint8)[:3]) == "na\ufffd"  # half a letter


def test_characters_are_numbered_in_order_and_cut_at_nine_tenths(tmp_path):
    text = "naïve zebra\n" * 7
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = data.characters(str(tmp_path / "text.txt"))
    alphabet = sorted(set(text))
    assert (corpus.unit, corpus.vocabulary) == ("character", len(alphabet))
    assert "".join(alphabet[i] for i in np.concatenate([corpus.train, corpus.validation])) == text
    assert len(corpus.train) == int(0.9 * len(text))
    assert corpus.decode(corpus.train) + corpus.decode(corpus.validation) == text
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        data.characters(str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="no file"):
        data.characters(str(tmp_path / "missing.txt"))


def test_words_are_those_of_the_training_file(tmp_path):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"the cat <unk> sat\n\nthe end\n"))
    (tmp_path / "valid.txt").write_text("the dog sat\n")
    (tmp_path / "test.txt").write_text("end\n" * 3)
    corpus = data.words(str(tmp_path))
    vocabulary = sorted({"the", "cat", "<unk>", "sat", "end", "<eos>"})
    assert corpus.vocabulary == 6
    spoken = [vocabulary[i] for i in corpus.train]
    assert spoken == ["the", "cat", "<unk>", "sat", "<eos>", "<eos>", "the", "end", "<eos>"]
    assert [vocabulary[i] for i in corpus.validation] == ["the", "<unk>", "sat", "<eos>"]
    assert corpus.decode(corpus.validation) == "the <unk> sat \n"
    assert corpus.decode(np.array([5, 6])) == "the \ufffd"  # a model may have more tokens than the text
    assert len(data.words(str(tmp_path), held_out="test").validation) == 6
    (tmp_path / "train.old").write_text("x")
    with pytest.raises(UserError, match=r"need one file train\* .*found train.old, train.txt.gz"):
        data.words(str(tmp_path), held_out="valid ")


CORPORA = {
    "byte": data.Corpus("b", *[np.zeros(2, np.uint8)] * 2),
    "character": data.Corpus("c", *[np.zeros(2, np.int32)] * 2, "character", 4, (" ", "a", "b", "ï")),
    "word": data.Corpus("w", *[np.zeros(2, np.int32)] * 2, "word", 4, ("<eos>", "<unk>", "a", "b")),
}


@pytest.mark.parametrize(
    ("unit", "text", "decoded"),
    [
        ("byte", "naïve \U0001f600\0", None),
        ("byte", "\udcff", "\ufffd"),  # as Python has a byte of a command line that is no UTF-8
        ("character", "ab ïa", None),
        ("word", "a b\nzebra\n\na", "a b \n <unk> \n \n a"),
    ],
)
def test_texts_are_encoded_and_decoded_whole_or_token_by_token(unit, text, decoded):
    corpus = CORPORA[unit]
    tokens = corpus.encode(text)
    assert tokens.dtype == np.int32
    assert corpus.decode(tokens) == (text if decoded is None else decoded)
    for cut in range(1, len(tokens) + 1):
        decode = corpus.decoder()
        pieces = [decode(token, number == cut) for number, token in enumerate(tokens[:cut].tolist(), 1)]
        assert "".join(pieces) == corpus.decode(tokens[:cut])
        assert unit != "byte" or "\ufffd" not in "".join(pieces[:-1])  # no character is cut


@pytest.mark.parametrize(("unit", "text"), [("character", "abc"), ("word", "a zebra")])
def test_a_text_of_other_symbols_is_named(unit, text):
    corpus = dataclasses.replace(CORPORA[unit], symbols=CORPORA[unit].symbols[2:])
    with pytest.raises(UserError, match=rf"^text: got '(a|zebra|c)', a {unit} that {unit[0]} does not have$"):
        corpus.encode(text)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_idx_files_are_read_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5), ("t10k", 3)):
        images, labels = rng.integers(256, size=(count, 4, 6), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        arrays[part] = images, labels
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    read = data.idx_images(str(tmp_path))
    assert read.classes == 5
    assert np.array_equal(read.train_images[..., 0], arrays["train"][0])
    assert np.array_equal(read.validation_labels, arrays["t10k"][1])
    batch = next(iter(data.image_batches(read, "validation", batch_size=3, seed=0)))
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"][..., 0] * 255, arrays["t10k"][0], atol=1e-4)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(arrays["t10k"][1])[:-1])
    data.idx_images.cache_clear()
    with pytest.raises(UserError, match="download it again"):
        data.idx_images(str(tmp_path))


def test_cifar_and_imagenet_files_are_read_channels_last(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    rows = images.transpose(0, 3, 1, 2).reshape(4, -1)
    labels = np.array([3, 1, 9, 0], np.uint8)
    for name, some in (("data_batch_1", [0, 1]), ("data_batch_2", [2]), ("test_batch", [3])):
        (tmp_path / f"{name}.bin").write_bytes(np.concatenate([labels[some, None], rows[some]], axis=1).tobytes())
    read = data.cifar10(str(tmp_path))
    assert np.array_equal(read.train_images, images[:3])
    assert np.array_equal(read.validation_images, images[3:])
    assert list(read.train_labels) == [3, 1, 9]
    np.savez(tmp_path / "train_data_batch_1.npz", data=rows[:3], labels=[1, 1000, 7], mean=rows.mean(0))
    np.savez(tmp_path / "val_data.npz", data=rows[3:], labels=[2])
    read = data.imagenet_npz(str(tmp_path))
    assert np.array_equal(read.train_images, images[:3])
    assert list(read.train_labels) == [0, 999, 6]
    for function in (data.cifar10, data.imagenet_npz, data.idx_images):
        with pytest.raises(UserError, match="no folder"):
            function(str(tmp_path / "missing"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_training_goes_over_all_examples_in_any_batch_size(batch_size):
    corpus = data.Corpus("letters", np.arange(7, dtype=np.uint8), np.arange(7, dtype=np.uint8))
    batches = data.text_batches(corpus, "train", sequence_length=1, batch_size=batch_size, seed=0)
    seen = np.concatenate([batch["tokens"] for batch in first(batches, 6)])
    np.testing.assert_array_equal(np.unique(seen[:6], axis=0), np.stack([np.arange(6), np.arange(1, 7)], axis=1))
    assert all(batch["tokens"].shape == (batch_size, 2) for batch in first(batches, 6))


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("one\n", 1),
        ("one\ntwo", 1),
        ("one\r\ntwo\r\n", 2),
        ("\n\n one \n", 3),
        ("one\u2028two\x0cthree\x85four\x1cfive\x1dsix\x1eseven\x0beight\n", 1),
    ],
)
def test_a_line_of_words_ends_at_a_newline_alone(tmp_path, text, ends):
    (tmp_path / "train.txt").write_bytes(text.encode() * 3)
    (tmp_path / "valid.txt").write_bytes(text.encode() + b"a\nb\n")
    words = data.words(str(tmp_path))
    assert [words.symbols[token] for token in words.train].count("<eos>") == 3 * ends
    assert [words.symbols[token] for token in words.validation].count("<eos>") == ends + 2


@pytest.mark.parametrize(  # their bytes hold the time, and would differ as names among the processes of a run
    "content",
    [b"no gzip", gzip.compress(b"cut off")[:15], gzip.compress(b"\xff\xfe")],
    ids=["no gzip", "cut off", "no text"],
)
def test_a_broken_file_of_words_is_named(tmp_path, content):
    (tmp_path / "train.gz").write_bytes(content)
    (tmp_path / "valid.gz").write_bytes(gzip.compress(b"fine\n"))
    with pytest.raises(UserError, match=r"words: .*train\.gz"):
        data.words(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 half"])
def test_a_broken_archive_of_images_is_named(tmp_path, content):
    (tmp_path / "train_data_batch_1.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"imagenet_npz: cannot read data of .*batch_1\.npz"):
        data.imagenet_npz(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split: got 'test'; need one of train, validation"),
        ({"batch_size": 0}, "batch_size: got 0; need at least 1"),
        ({"seed": -1}, "seed: got -1; need 0 to 2147483647"),
        ({"seed": 2**31}, "seed: got 2147483648; need 0 to 2147483647"),
        ({"seed": True}, "seed: got True; need an int"),
        ({"rows": [0, 2]}, "rows: got 2; need 0 to 1"),
        ({"rows": [-1]}, "rows: got -1; need 0 to 1"),
        ({"rows": []}, r"rows: got \[\]; need a sequence of ints, or None for all"),
        ({"rows": 1}, "rows: got 1; need a sequence of ints"),
        ({"rows": "0"}, "rows: got '0'; need an int"),
    ],
)
def test_wrong_calls_for_batches_are_named(options, message):
    corpus = data.Corpus("letters", np.arange(9, dtype=np.uint8), np.arange(9, dtype=np.uint8))
    images, source = data.digits(), data.Copy()
    given = {"split": "train", "batch_size": 2, "seed": 0, **options}
    split = given.pop("split")
    with pytest.raises((ValueError, TypeError), match=message):
        data.text_batches(corpus, split, sequence_length=3, **given)
    with pytest.raises((ValueError, TypeError), match=message):
        data.image_batches(images, split, **given)
    with pytest.raises((ValueError, TypeError), match=message):
        data.sequence_batches(source, split, validation_examples=3, **given)
