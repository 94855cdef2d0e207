"""Files of text, one document after the other: what `prepare` reads. A text file is a document, a line of .jsonl is a document."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from memarch.config import require
from memarch.data import documents


class Document(NamedTuple):
    text: bytes  # UTF-8, if the file is
    where: str  # for messages
    split: str
    size: int  # bytes of the file that it took, for a progress bar


def read(files: list[Path], text_field: str, validation: float) -> Iterator[Document]:
    """Empty documents are dropped. A single text file is cut in two, because it cannot be on both sides."""
    if len(files) == 1 and files[0].suffix != ".jsonl":
        parts = documents.cut(files[0].read_bytes(), val=validation)
        yield from (Document(text, str(files[0]), split, len(text)) for split, text in parts.items() if text)
        return
    for text, where, size in chain.from_iterable(_lines(file, text_field) if file.suffix == ".jsonl" else _whole(file) for file in files):
        if text:
            yield Document(text, where, documents.split(text, val=validation), size)


def _whole(file: Path) -> Iterator[tuple[bytes, str, int]]:
    data = file.read_bytes()
    if not documents.is_binary(data):
        yield data, str(file), len(data)


def _lines(file: Path, field: str) -> Iterator[tuple[bytes, str, int]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield _text_of(line, field, where), where, len(line)


def _text_of(line: bytes, field: str, where: str) -> bytes:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not JSON ({error}): every line must be one JSON object in UTF-8.") from None
    require(isinstance(row, dict), f"{where}: not a JSON object: every line must be one, with the text under {field!r}.")
    require(field in row, f"{where}: no {field!r} in it; it has {', '.join(map(repr, row)) or 'nothing'}: choose with text_field.")
    require(isinstance(row[field], str), f"{where}: {field!r} is {type(row[field]).__name__}, not a string.")
    try:
        return row[field].encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair at character {error.start}"
        raise ValueError(f"{where}: {field!r} is not valid Unicode ({half}): write the line again, or leave it out.") from None
