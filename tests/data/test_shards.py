"""Text as tokens in ArrayRecord files: what is written is what is read, in windows that start anywhere."""

import json

import numpy as np
import pytest

from attnlab import cli, data
from attnlab.data import shards
from attnlab.errors import UserError
from attnlab.models import LanguageModel
from attnlab.nn import SoftmaxAttention
from attnlab.train import Experiment, LanguageTask, OptimizerOptions, train

LINES = [f"line {number}: héllo wörld, {number**2} times €\n" for number in range(400)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture(scope="module")
def folder(text):
    """Of 20 records of 64 tokens and more, 5 in a file."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "_RECORD", 64)
        patched.setattr(shards, "_BLOCK", 1000)
        path = text.parent / "shards"
        data.write_token_shards([text], path, vocabulary=400, shard=5 * 64)
    return path


@pytest.fixture
def corpus(folder, monkeypatch):
    monkeypatch.setattr(shards, "_RECORD", 64)
    return data.token_shards(str(folder))


def test_the_parts_are_the_text_cut_at_a_line(corpus, folder):
    whole = corpus.train[0 : len(corpus.train)], corpus.validation[0 : len(corpus.validation)]
    texts = [corpus.decode(tokens) for tokens in whole]
    assert all(text.endswith(f"€\n{shards.END_OF_TEXT}") for text in texts)
    assert "".join(text.removesuffix(shards.END_OF_TEXT) for text in texts) == "".join(LINES)
    assert 0.08 < len(texts[1]) / len("".join(LINES)) < 0.12
    assert max(tokens.max() for tokens in whole) < corpus.vocabulary == 400
    files = json.loads((folder / "facts.json").read_text())["train"]["files"]
    assert len(files) > 3
    assert files[1] == f"train-00001-of-{len(files):05d}.array_record"


def test_any_stretch_is_read_from_the_records_that_hold_it(corpus):
    whole = corpus.train[0 : len(corpus.train)]
    for start, stop in ((0, 1), (63, 65), (64, 128), (100, 500), (len(whole) - 3, len(whole) + 9), (9, 9)):
        np.testing.assert_array_equal(corpus.train[start:stop], whole[start:stop])


def test_batches_are_those_of_the_same_tokens_in_memory(corpus):
    parts = (part[0 : len(part)].astype(np.int32) for part in (corpus.train, corpus.validation))
    in_memory = data.Corpus("memory", *parts, unit="word", vocabulary=corpus.vocabulary)
    for split in ("train", "validation"):
        of_each = (
            iter(data.text_batches(each, split, sequence_length=100, batch_size=3, seed=1))
            for each in (corpus, in_memory)
        )
        for _, one, other in zip(range(3), *of_each):
            np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_text_is_encoded_and_decoded_piece_by_piece(corpus):
    text = LINES[7] + "日本"
    tokens = corpus.encode(text)
    assert corpus.decode(tokens) == text
    add = corpus.decoder()
    pieces = [add(int(token), number == len(tokens) - 1) for number, token in enumerate(tokens)]
    assert "".join(pieces) == text
    assert "" in pieces, "of a character that is not whole yet"


def test_a_text_gives_the_same_shards_again_and_another_tokenizer_s_file_is_taken(folder, text, tmp_path):
    options = {"vocabulary": 400, "tokenizer": folder / "tokenizer.json"}
    facts = [
        data.write_token_shards([text], tmp_path / name, **some)
        for name, some in zip("ab", ({"vocabulary": 400}, options))
    ]
    assert facts[0]["sha256"] == facts[1]["sha256"]
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_of_several_files_some_are_held_out(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("".join(LINES[number : number + 3]))
    (tmp_path / ".hidden").write_bytes(b"\xff")
    data.write_token_shards([tmp_path], tmp_path.parent / "of_files", vocabulary=300)
    corpus = data.token_shards(str(tmp_path.parent / "of_files"))
    texts = corpus.decode(corpus.train[0 : len(corpus.train)]).split(shards.END_OF_TEXT)
    assert 20 < len(texts) < 30
    assert texts[0] == "".join(LINES[0:3])


@pytest.mark.long
def test_the_command_writes_what_a_model_trains_on(text, tmp_path, capsys):
    assert cli.main(["tokenize", str(text), "--out", str(tmp_path / "shards"), "--vocabulary", "300"]) == 0
    assert "vocabulary 300" in capsys.readouterr().out
    task = LanguageTask(data.token_shards(str(tmp_path / "shards")), sequence_length=16)
    model = LanguageModel(vocabulary=300, mixers=[SoftmaxAttention], depth=1, features=16)
    optimizer = OptimizerOptions(warmup_steps=1)
    result = train(Experiment(model, task, steps=2, batch_size=2, optimizer=optimizer, evaluation_batches=1))
    assert result.final["bits_per_token"] == pytest.approx(result.final["loss"] / np.log(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "facts.json").unlink(), "is no folder of `attnlab tokenize` .No such file"),
        (lambda folder: (folder / "facts.json").write_text("[]"), "is no folder of `attnlab tokenize`"),
        (lambda folder: next(folder.glob("train-00001*")).unlink(), "has lost train-00001-of"),
    ],
)
def test_a_damaged_folder_is_named(folder, tmp_path, change, message):
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    change(copied)
    with pytest.raises(UserError, match=message):
        data.token_shards(str(copied))


def test_what_cannot_be_tokenised_is_one_line(folder, text, tmp_path, capsys):
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"text\n\xff\xfe\n" * 9)
    short.write_text("")
    (tmp_path / "other.json").write_text("{}")
    calls = {
        f"tokenize: {folder} is there already; give another --out, or move it away": [text, "--out", folder],
        f"tokenize: {binary} is not UTF-8 (invalid start byte); leave it out": [binary, "--out", tmp_path / "a"],
        "tokenize: the texts leave 1 tokens for train; give more text": [short, "--out", tmp_path / "b"],
        "tokenize: no file or folder nowhere": ["nowhere", "--out", tmp_path / "c"],
        "vocabulary: got 9; need at least 257": [text, "--out", tmp_path / "d", "--vocabulary", "9"],
        f"tokenize: {tmp_path / 'other.json'} is no tokenizer.json": [
            *(text, "--out", tmp_path / "e", "--tokenizer", tmp_path / "other.json")
        ],
    }
    for message, arguments in calls.items():
        assert cli.main(["tokenize", *map(str, arguments)]) == 2
        err = capsys.readouterr().err
        assert f"attnlab: {message}" in err
