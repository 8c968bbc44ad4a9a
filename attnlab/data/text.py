"""Text as bytes, characters or words: the source of Python's standard library, or files of one's own."""

import codecs
import dataclasses
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from attnlab.attention._shared.checks import check_choice, check_int, check_text, keep, require, shape_text, shown
from attnlab.data.batches import MOST_SEED, check_batches, content, endless, one_pass, read_once
from attnlab.errors import UserError

# Left out of the embedded text: what is not part of every installation, generated tables, and packages installed later.
_NOT_EMBEDDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as tokens, in two parts that share none.

    name: where it is from. train, validation: integers [tokens] below `vocabulary`. unit: what a token is, "byte",
    "character", "word", or "token" where it stands for nothing; documents of bytes end with a zero. symbols: what each
    token stands for; none for bytes.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    unit: str = "byte"
    vocabulary: int = 256
    symbols: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_text("name", self.name)
        check_choice("unit", self.unit, ("byte", "character", "word", "token"))
        keep(self, vocabulary=check_int("vocabulary", self.vocabulary, least=1))
        if not isinstance(self.symbols, tuple) or not all(isinstance(symbol, str) for symbol in self.symbols):
            raise TypeError(f"symbols: got {shown(self.symbols)}; need a tuple of strings")
        for part, tokens in (("train", self.train), ("validation", self.validation)):
            if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
                given = shape_text(tokens) if isinstance(tokens, np.ndarray) else shown(tokens)
                raise TypeError(f"{part}: got {given}; need a numpy array of integers [tokens]")
            if len(tokens):
                least, most = int(tokens.min()), int(tokens.max())
                allowed = f"need tokens from 0 to vocabulary - 1 = {self.vocabulary - 1}"
                require(least >= 0 and most < self.vocabulary, part, f"tokens from {least} to {most}", allowed)

    def encode(self, text: str) -> np.ndarray:
        """int32 tokens [length] of a text. Raises UserError for a character that does not occur in the corpus."""
        if self.unit == "byte":
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8).astype(np.int32)
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        parts = list(text) if self.unit == "character" else _words(text)
        unknown = numbers.get("<unk>") if self.unit == "word" else None
        if unknown is None and (strange := [part for part in parts if part not in numbers]):
            raise UserError(f"text: got {strange[0]!r}, a {self.unit} that {self.name} does not have")
        return np.array([numbers.get(part, unknown) for part in parts], np.int32)

    def decoder(self) -> Callable[[int, bool], str]:
        """For a text that comes token by token: (token, whether it is the last) -> what it adds to `decode`'s text.

        Bytes add it with the last one of a character.
        """
        if self.unit == "byte":
            decode = codecs.getincrementaldecoder("utf-8")("replace").decode
            return lambda token, is_last: decode(bytes([min(token, 255)]), is_last)
        first = True

        def added(token: int, is_last: bool) -> str:
            nonlocal first
            blank, first = "" if first or self.unit == "character" else " ", False
            return blank + self.decode(np.array([token]))

        return added

    def decode(self, tokens: np.ndarray) -> str:
        """Text of integer tokens [length]; bytes that are no UTF-8, and numbers outside the vocabulary, give U+FFFD."""
        if self.unit == "byte":
            return bytes(np.where(tokens < 256, tokens, 255).astype(np.uint8)).decode(errors="replace")
        if self.unit == "token":
            return " ".join(map(str, tokens.tolist()))
        known = (self.symbols[token] if token < len(self.symbols) else "\ufffd" for token in tokens)
        return "".join(known) if self.unit == "character" else " ".join(known).replace("<eos>", "\n")

    def describe(self) -> dict[str, Any]:
        """Sizes and a hash of the content, which shows whether two runs read the same text."""
        content = hashlib.sha256(self.train.tobytes() + b"\0" + self.validation.tobytes()).hexdigest()
        return {
            "source": self.name,
            f"train {self.unit}s": len(self.train),
            f"validation {self.unit}s": len(self.validation),
            "sha256": content,
        }


@read_once
def embedded_text() -> Corpus:
    """The source of the standard library of the Python that runs this: real text that needs no download.

    A tenth of the files, by a hash of their path, are for validation. The text differs between versions of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _NOT_EMBEDDED & set(path.relative_to(root).parts)]
    if not files:
        raise UserError(f"embedded_text: {root} holds no source of the standard library; give a text with text_files")
    python = sysconfig.get_python_version()
    return _split_by_file(f"standard library of Python {python}", root, files)


@read_once
def text_files(path: str) -> Corpus:
    """One file, the last tenth of it for validation; or all files below a folder, a tenth of them for validation.

    Hidden files and folders are left out. Bytes are taken as they are, whatever the encoding.
    """
    root = Path(path).expanduser()
    if root.is_file():
        text = np.frombuffer(content("text_files", root), np.uint8)
        cut = len(text) * 9 // 10
        return _checked(Corpus(root.name, text[:cut], text[cut:]), root)
    if not root.is_dir():
        raise UserError(f"text_files: no file or folder {path}")
    files = [
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    return _checked(_split_by_file(root.name, root, files), root)


@read_once
def characters(path: str) -> Corpus:
    """The characters of a UTF-8 file, the last tenth for validation; the vocabulary is those that occur, in order.

    Of tiny Shakespeare (input.txt) that is nanoGPT's split: 1,003,854 and 111,540 characters of 65.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"characters: no file {path}")
    text = _decoded("characters", content("characters", file), file)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    found, tokens = np.unique(codes, return_inverse=True)
    tokens = tokens.astype(np.int32)
    cut = int(0.9 * len(tokens))
    symbols = tuple(map(chr, found.tolist()))
    return _checked(Corpus(file.name, tokens[:cut], tokens[cut:], "character", len(found), symbols), file)


@read_once
def words(path: str, held_out: str = "valid") -> Corpus:
    """Words between blanks, as in WikiText: a folder with one file train* and one valid*, plain or .gz.

    A newline is a word of its own, "<eos>". The vocabulary is that of the training file, WikiText-2's 33,278; a
    word that is not in it becomes "<unk>", which WikiText has.

    Args:
      path: the folder.
      held_out: beginning of the name of the file for validation, "valid" or "test".
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"words: no folder {path}")
    texts = []
    for part in ("train", held_out):
        files = sorted(file for file in folder.iterdir() if file.name.removeprefix("wiki.").startswith(part))
        if len(files) != 1:
            named = ", ".join(file.name for file in files) or "none"
            raise UserError(f"words: need one file {part}* in {path}; found {named}")
        texts.append(_words(_decoded("words", content("words", files[0], unpacks=True), files[0])))
    numbers = {word: number for number, word in enumerate(sorted({*texts[0], "<unk>"}))}
    unknown = numbers["<unk>"]
    train, validation = (np.array([numbers.get(word, unknown) for word in text], np.int32) for text in texts)
    return _checked(Corpus(folder.name, train, validation, "word", len(numbers), tuple(numbers)), folder)


def random_tokens(vocabulary: int = 32768, count: int = 2**20, seed: int = 0) -> Corpus:
    """Tokens drawn at random, each as likely as the others, the last tenth for validation: there is nothing to learn.

    They stand in for data of a vocabulary, to compile a run or to time it.
    """
    vocabulary = check_int("vocabulary", vocabulary, least=1, most=2**31 - 1)
    count = check_int("count", count, least=20, most=2**30)
    seed = check_int("seed", seed, least=0, most=MOST_SEED)
    tokens = np.random.default_rng(seed).integers(vocabulary, size=count, dtype=np.int32)
    cut = count * 9 // 10
    return Corpus(f"random tokens of {vocabulary:,}", tokens[:cut], tokens[cut:], "token", vocabulary)


def _words(text: str) -> list[str]:
    *lines, rest = text.split("\n")
    return [word for line in lines for word in (*line.split(), "<eos>")] + rest.split()


def _decoded(function: str, held: bytes, file: Path) -> str:
    try:
        return held.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{function}: {file} is not UTF-8 ({error.reason} at byte {error.start})") from error


def _checked(corpus: Corpus, root: Path) -> Corpus:
    for part, text in (("train", corpus.train), ("validation", corpus.validation)):
        if len(text) < 2:
            raise UserError(f"text: {root} leaves {len(text)} {corpus.unit}s for {part}; give more text, or more files")
    return corpus


def _split_by_file(name: str, root: Path, files: Iterable[Path]) -> Corpus:
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        parts[digest[0] % 10 == 0].append(content("text", path) + b"\0")
    train, validation = (np.frombuffer(b"".join(parts[key]), np.uint8) for key in (False, True))
    return Corpus(name, train, validation)


class _Windows(grain.sources.RandomAccessDataSource):
    """{"tokens": int32 [length + 1]}, starting every `step` tokens."""

    def __init__(self, text: np.ndarray, length: int, step: int):
        self._text, self._length, self._step = text, length, step

    def __len__(self) -> int:
        return (len(self._text) - self._length - 1) // self._step + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._step
        return {"tokens": self._text[start : start + self._length + 1].astype(np.int32)}


def check_length(corpus: Corpus, sequence_length: int) -> int:
    """Requires texts, for training and for validation, of a sequence and its last target at least."""
    length = check_int("sequence_length", sequence_length, least=1)
    for part, text in (("train", corpus.train), ("validation", corpus.validation)):
        if len(text) < length + 1:
            raise UserError(
                f"sequence_length: got {length}; the {part} text of {corpus.name} has only {len(text)} {corpus.unit}s"
            )
    return length


def text_batches(
    corpus: Corpus,
    split: str,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """{"tokens": int32 [batch, sequence_length + 1]}, inputs and, shifted by one, targets.

    "train": endless; windows that start anywhere in the text, shuffled by seed. "validation": one pass over windows
    side by side, so that no token is predicted twice, in the order of the text; see one_pass for its weights.
    rows: of each batch only these, ascending, for a process that draws a part of it; None draws all of them.
    """
    check_batches(split, batch_size, seed, rows)
    check_length(corpus, sequence_length)
    text = corpus.train if split == "train" else corpus.validation
    if split == "train":
        return endless(_Windows(text, sequence_length, 1), batch_size, seed, rows)
    return one_pass(_Windows(text, sequence_length, sequence_length), batch_size, rows)
