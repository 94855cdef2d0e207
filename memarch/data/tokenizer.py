"""Text into token numbers: its bytes, or a tokenizer.json of the tokenizers library (an optional dependency, asked for only here)."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memarch.config import require
from memarch.data.draw import Array
from memarch.data.reading import Document


class Tokenizer(NamedTuple):
    """No beginning or end tokens are added: where documents begin is in `starts`, so nothing in the vocabulary is spent on it."""

    name: str
    vocab_size: int
    fingerprint: str
    encode: Callable[[list[Document]], list[Array]]
    file: Path | None = None


def load(name: str) -> Tokenizer:
    """`name`: "bytes", or the path of a tokenizer.json."""
    if name == "bytes":
        return Tokenizer(name, 256, name, lambda group: [np.frombuffer(document.text, dtype=np.uint8) for document in group])
    file = Path(name).expanduser()
    require(file.is_file(), f"tokenizer {name!r}: no such file: give 'bytes', or the path of a tokenizer.json.")
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"tokenizer {name!r} needs the tokenizers library: `pip install tokenizers`, or take 'bytes'.") from None
    try:
        coder = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer of the tokenizers library ({error}).") from None

    def encode(group: list[Document]) -> list[Array]:
        found = coder.encode_batch([_decode(document) for document in group], add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in found]

    size = max(coder.get_vocab(with_added_tokens=True).values(), default=0) + 1  # the ids may have holes, so counting them is not enough
    return Tokenizer(file.name, size, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(), encode, file)


def _decode(document: Document) -> str:
    try:
        return document.text.decode()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 ({error.reason})"
        raise ValueError(f"{document.where}: {what}: convert the file, leave it out, or take tokenizer 'bytes'.") from None
