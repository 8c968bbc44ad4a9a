"""Text as tokens in ArrayRecord files, for corpora that do not fit into memory: made once, then read by index.

A folder has facts.json, tokenizer.json of the library `tokenizers`, and train-00000-of-00003.array_record and so on,
whose records are tokens that follow each other, little-endian, of two bytes where the vocabulary allows it.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from attnlab.attention._shared.checks import check_int
from attnlab.data.batches import read_once
from attnlab.data.text import Corpus
from attnlab.errors import UserError, parse_json

END_OF_TEXT = "<|endoftext|>"  # after each document

_RECORD = 2**13  # tokens
_LEARNED_FROM = 2**28  # bytes of text, from which a tokenizer is learned
_BLOCK = 2**22  # bytes of text, tokenised at a time
_PARTS = ("train", "validation")


class Tokens:
    """Tokens of some files: tokens[start:stop] reads the records that hold them. integers [tokens]."""

    def __init__(self, paths: Sequence[Path], count: int, dtype: np.dtype):
        self._paths, self._count, self.dtype = [str(path) for path in paths], count, dtype

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        return grain.sources.ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self._count)
        if start >= stop:
            return np.zeros(0, self.dtype)
        first = start // _RECORD
        held = self._records.__getitems__(range(first, -(-stop // _RECORD)))
        tokens = np.frombuffer(b"".join(held), self.dtype)
        return tokens[start - first * _RECORD : stop - first * _RECORD]


@dataclasses.dataclass(frozen=True)
class ShardedCorpus(Corpus):
    """Text in shards, which `token_shards` gives. Its unit is "token", a piece of text of the tokenizer's."""

    train: Any  # Tokens, and so is
    validation: Any
    folder: Path = Path()
    sha256: str = ""

    def __post_init__(self) -> None:
        """What the shards hold was checked when they were written."""

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return _library().Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def decoder(self) -> Callable[[int, bool], str]:
        stream = _library().decoders.DecodeStream(skip_special_tokens=False)
        return lambda token, is_last: stream.step(self._tokenizer, token) or ""

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "train tokens": len(self.train),
            "validation tokens": len(self.validation),
            "vocabulary": self.vocabulary,
            "sha256": self.sha256,
        }


@read_once
def token_shards(path: str) -> ShardedCorpus:
    """A text that `attnlab tokenize` wrote into a folder. Tokens are read when they are asked for."""
    folder = Path(path).expanduser()
    try:
        facts = parse_json((folder / "facts.json").read_bytes())
        dtype, vocabulary = np.dtype(facts["dtype"]), facts["vocabulary"]
        train, validation = (
            Tokens([folder / name for name in facts[part]["files"]], facts[part]["tokens"], dtype) for part in _PARTS
        )
        missing = [name for part in _PARTS for name in facts[part]["files"] if not (folder / name).is_file()]
        corpus = ShardedCorpus(facts["name"], train, validation, "token", vocabulary, (), folder, facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"token_shards: {path} is no folder of `attnlab tokenize` ({reason})") from error
    if missing:
        raise UserError(f"token_shards: {path} has lost {missing[0]}; make it again with `attnlab tokenize`")
    return corpus


def write_token_shards(
    texts: Sequence[Path], folder: Path, *, vocabulary: int = 32768, tokenizer: Path | None = None, shard: int = 2**27
) -> dict[str, Any]:
    """Tokenises text files, UTF-8, into a new folder that `token_shards` reads; gives its facts.

    Of one file the last tenth is for validation, from the beginning of a line on; of several a tenth of the files, by a
    hash of their names. Each file is a document, and so are the two parts of one.

    Args:
      vocabulary: tokens of a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) that is learned from the first
        256 MiB of the training text. At least 257: bytes, and END_OF_TEXT.
      tokenizer: a tokenizer.json to use in its place, with END_OF_TEXT among its tokens.
      shard: tokens per file.

    Raises UserError: the folder is there already, a text cannot be read, or is too short.
    """
    vocabulary = check_int("vocabulary", vocabulary, least=257, most=2**31 - 1)
    shard = check_int("shard", shard, least=_RECORD)
    if folder.exists():
        raise UserError(f"tokenize: {folder} is there already; give another --out, or move it away")
    documents = _split(texts)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was ended
    partial.mkdir(parents=True)
    try:
        coder = _learned(documents["train"], vocabulary) if tokenizer is None else _read(tokenizer)
        name = texts[0].name if len(texts) == 1 else f"{len(texts)} files"
        facts = _write_all(name, coder, documents, partial, shard)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


@dataclasses.dataclass(frozen=True)
class _Document:
    """The bytes of a file from `start` to `stop`."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def blocks(self) -> Iterator[tuple[str, int]]:
        """Its text in pieces that end with a line, each with its number of bytes."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left, rest = self.size, b""
                while left:
                    read = file.read(min(_BLOCK, left))
                    if not read:
                        raise UserError(f"tokenize: {self.path} became shorter while it was read")
                    left -= len(read)
                    rest += read
                    cut = rest.rfind(b"\n") + 1 if left else len(rest)
                    if cut:
                        yield rest[:cut].decode(), cut
                        rest = rest[cut:]
        except OSError as error:
            raise UserError(f"tokenize: cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"tokenize: {self.path} is not UTF-8 ({error.reason}); leave it out") from error


def _write_all(
    name: str, coder: Any, documents: Mapping[str, Sequence[_Document]], folder: Path, shard: int
) -> dict[str, Any]:
    end, vocabulary = coder.token_to_id(END_OF_TEXT), coder.get_vocab_size()
    if end is None:
        raise UserError(f"tokenize: the tokenizer has no token {END_OF_TEXT}, which ends a document")
    coder.save(str(folder / "tokenizer.json"))
    dtype, digest = np.dtype("<u2" if vocabulary <= 2**16 else "<u4"), hashlib.sha256()
    facts: dict[str, Any] = {"name": name, "vocabulary": vocabulary, "dtype": dtype.str}
    total = sum(document.size for those in documents.values() for document in those)
    with tqdm(total=total, desc="text", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as progress:
        for part, those in documents.items():
            tokens = _tokens(coder, those, end, dtype, progress.update)
            facts[part] = _write(tokens, folder, part, shard // _RECORD, digest)
            if facts[part]["tokens"] < 2:
                raise UserError(f"tokenize: the texts leave {facts[part]['tokens']} tokens for {part}; give more text")
    facts["sha256"] = digest.hexdigest()
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _split(texts: Sequence[Path]) -> dict[str, list[_Document]]:
    files = [file for text in texts for file in _files(text)]
    documents: dict[str, list[_Document]] = {part: [] for part in _PARTS}
    if len(files) == 1:
        size = files[0].stat().st_size
        cut = min(size, size * 9 // 10 + len(_rest_of_line(files[0], size * 9 // 10)))
        return {"train": [_Document(files[0], 0, cut)], "validation": [_Document(files[0], cut, size)]}
    for file in files:
        held_out = hashlib.sha256(file.name.encode()).digest()[0] % 10 == 0
        documents[_PARTS[held_out]].append(_Document(file, 0, file.stat().st_size))
    for part, those in documents.items():
        if not those:
            raise UserError(f"tokenize: of {len(files)} files none is for {part}; give more of them")
    return documents


def _files(text: Path) -> list[Path]:
    if text.is_file():
        return [text]
    if not text.is_dir():
        raise UserError(f"tokenize: no file or folder {text}")
    found = (path for path in text.rglob("*") if path.is_file())
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(text).parts)]
    if not shown:
        raise UserError(f"tokenize: {text} holds no files")
    return sorted(shown)


def _rest_of_line(file: Path, start: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.readline()


def _learned(documents: Sequence[_Document], vocabulary: int) -> Any:
    """A byte-level BPE of the first texts."""
    library = _library()
    coder = library.Tokenizer(library.models.BPE())
    coder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def first() -> Iterator[str]:
        left = _LEARNED_FROM
        for document in documents:
            for block, size in document.blocks():
                yield block
                left -= size
                if left <= 0:
                    return

    coder.train_from_iterator(first(), trainer)
    return coder


def _read(tokenizer: Path) -> Any:
    try:
        return _library().Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"tokenize: {tokenizer} is no tokenizer.json ({' '.join(str(error).split())[:80]})") from error


def _tokens(
    coder: Any, documents: Iterable[_Document], end: int, dtype: np.dtype, progress: Callable[[int], Any]
) -> Iterator[np.ndarray]:
    for document in documents:
        for block, size in document.blocks():
            lines = block.splitlines(keepends=True)
            encoded = coder.encode_batch_fast(_joined(lines))
            yield np.concatenate([np.array(each.ids, dtype) for each in encoded])
            progress(size)
        yield np.array([end], dtype)


def _joined(lines: Sequence[str], size: int = 2**16) -> list[str]:
    """Lines in texts of some length, which the library shares among its threads."""
    texts, text, length = [], [], 0
    for line in lines:
        text.append(line)
        length += len(line)
        if length >= size:
            texts.append("".join(text))
            text, length = [], 0
    return [*texts, "".join(text)] if text else texts


def _write(tokens: Iterable[np.ndarray], folder: Path, part: str, records: int, digest: Any) -> dict[str, Any]:
    """Writes files of so many records each; gives their names and the number of tokens."""
    files: list[Path] = []
    writer: Any = None
    count, written, rest = 0, 0, b""

    def write(record: bytes) -> None:
        nonlocal writer, written
        if written % records == 0:
            if writer is not None:
                writer.close()
            files.append(folder / f"{part}-{len(files):05d}")
            writer = ArrayRecordWriter(str(files[-1]), "group_size:1")  # read one by one
        writer.write(record)
        written += 1

    for some in tokens:
        count += len(some)
        held = some.tobytes()
        rest += held
        digest.update(held)
        size = _RECORD * some.itemsize
        whole = len(rest) // size * size
        for start in range(0, whole, size):
            write(rest[start : start + size])
        rest = rest[whole:]
    if rest:
        write(rest)
    if writer is not None:
        writer.close()
    names = [f"{part}-{number:05d}-of-{len(files):05d}.array_record" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    return {"files": names, "tokens": count}


def _library() -> Any:
    """The library of tokenizers, of which a run on bytes has no need."""
    return importlib.import_module("tokenizers")
