"""Text files, folders and .jsonl into a folder of token shards (shards.py says what a finished one holds).

Everything is written under a temporary name beside `out` and renamed at the very end: whatever is called `out` is finished.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memarch.config import require
from memarch.data import documents
from memarch.data import tokenizer as tokenizers
from memarch.data.draw import Array
from memarch.data.progress import Progress
from memarch.data.reading import Document, read
from memarch.data.shards import Index, Part, begins_file, shard_file

AT_ONCE = 1 << 22  # bytes of text handed to the tokenizer together: it spreads the documents over the cores


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    tokenizer: Path | str = "bytes",
    *,
    shard_tokens: int = 1 << 26,
    text_field: str = "text",
    validation: float = 0.01,
) -> Index:
    """Write the folder `out` and say what is in it. tokenizer: "bytes", or the path of a tokenizer.json of the tokenizers library.
    text_field: where a .jsonl line keeps its text. validation: the share of documents held out, chosen by a hash of their content; of a
    single text file, its end."""
    out, places = Path(out).expanduser(), [Path(place).expanduser() for place in inputs]
    require(bool(places), "prepare: no input: name at least one file or folder.")
    require(shard_tokens >= 1, f"prepare: shard_tokens = {shard_tokens}: must be at least 1.")
    require(0 <= validation < 1, f"prepare: validation = {validation}: must lie in 0 .. 1, 1 excluded; 0 holds nothing out.")
    require(not out.exists(), f"{out}: exists already: remove it, or write to another name.")
    files = [file for place in places for file in documents.files(place)]
    coder = tokenizers.load(str(tokenizer))
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        index = _write(files, unfinished, coder, shard_tokens, text_field, validation)
        unfinished.chmod(0o755)  # mkdtemp lets nobody else in; a data set is for the group
        os.rename(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return index


def _write(files: list[Path], folder: Path, coder: tokenizers.Tokenizer, shard_tokens: int, text_field: str, validation: float) -> Index:
    dtype = np.min_scalar_type(coder.vocab_size - 1)
    writers = {split: _Writer(folder, split, dtype, shard_tokens) for split in (("train", "val") if validation else ("train",))}
    fingerprint = hashlib.blake2b(coder.fingerprint.encode(), digest_size=8)
    with Progress("prepare", sum(file.stat().st_size for file in files)) as progress:
        for group in _groups(read(files, text_field, validation)):
            for document, tokens in zip(group, coder.encode(group), strict=True):
                fingerprint.update(hashlib.blake2b(document.text).digest())
                writers[document.split].add(tokens)
            progress.advance(sum(document.size for document in group))
    parts = {split: writer.close() for split, writer in writers.items()}
    _check_not_empty(files, parts, validation)
    index = Index(dtype=dtype.name, vocab_size=coder.vocab_size, tokenizer=coder.name, fingerprint=fingerprint.hexdigest(), splits=parts)
    if coder.file:
        shutil.copyfile(coder.file, folder / "tokenizer.json")
    index.write(folder)
    return index


def _check_not_empty(files: list[Path], parts: dict[str, Part], validation: float) -> None:
    count = sum(part.documents for part in parts.values())
    named = ", ".join(map(str, files[:3])) + (" .." if len(files) > 3 else "") if files else "an empty folder"
    require(count > 0, f"prepare: no text in {named}: every file is empty or binary.")
    for split, part in parts.items():
        require(
            part.tokens > 0,
            f"prepare: none of {count} documents fell into the {split} split at validation = {validation}: "
            "give more documents, another share, or 0 to hold nothing out.",
        )


def _groups(found: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
        size += len(document.text)
        if size >= AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Writer:
    """Gathers the tokens of one split and writes them in files of `shard_tokens`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.waiting: list[Array] = []
        self.begins: list[int] = []
        self.tokens = self.held = self.shards = 0

    def add(self, tokens: Array) -> None:
        if len(tokens):
            self.begins.append(self.tokens)
            self.waiting.append(tokens.astype(self.dtype))
            self.tokens += len(tokens)
            self.held += len(tokens)
        if self.held >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def close(self) -> Part:
        self._flush(1)
        np.save(begins_file(self.folder, self.split), np.array(self.begins, dtype=np.int64))
        return Part(tokens=self.tokens, documents=len(self.begins), shards=self.shards)

    def _flush(self, at_least: int) -> None:
        """Write files while `at_least` tokens wait: full ones on the way, the rest at the end."""
        waiting = np.concatenate([np.empty(0, dtype=self.dtype), *self.waiting])
        while len(waiting) >= at_least:
            np.save(shard_file(self.folder, self.split, self.shards), waiting[: self.shard_tokens])
            self.shards, waiting = self.shards + 1, waiting[self.shard_tokens :]
        self.waiting, self.held = [waiting.copy()], len(waiting)
