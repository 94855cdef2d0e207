"""Text: documents, splits, packing into rows, and rows that continue each other."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from memarch.data import SPLITS, Steps, Text, documents, split_seed
from memarch.data.packed import Packed, Stream


class Given(Packed):
    """A source over documents that a test spells out; every split holds them all."""

    kind = "given"

    def __init__(self, docs, length, carry=False, pieces=1):
        tokens = np.concatenate([np.array(doc, dtype=np.uint16) for doc in docs])
        self.data = Stream(np.array_split(tokens, pieces), np.cumsum([0, *map(len, docs)])[:-1])
        self.length, self.carry, self.tokens = length, carry, tokens

    def stream(self, split):
        return self.data


def some_documents(n=40, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 30, n)
    ends = lengths.cumsum()
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]  # every token is its own position


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("pieces", [1, 7])
def test_rows_are_cut_from_the_stream(carry, pieces):
    docs = some_documents()
    source = Given(docs, 16, carry, pieces)
    firsts = {doc[0] for doc in docs}
    rows = source.rows(0)
    assert rows == (len(source.tokens) - 1) // 16
    batch = source.batch(0, range(rows))
    assert sorted(batch.tokens[:, 0].tolist()) == list(range(0, rows * 16, 16))  # an epoch: every row once
    for tokens, targets, starts in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.starts.tolist(), strict=True):
        assert tokens == list(range(tokens[0], tokens[0] + 16))
        for t, token in enumerate(tokens):
            assert targets[t] == (-100 if token + 1 in firsts else token + 1)
            assert starts[t] == (token in firsts or (t == 0 and not carry))


def test_every_epoch_has_its_own_order_and_a_batch_may_span_two():
    source = Given(some_documents(), 16)
    rows = source.rows(0)
    firsts = [source.batch(4, range(e * rows, (e + 1) * rows)).tokens[:, 0].tolist() for e in range(3)]
    assert sorted(firsts[0]) == sorted(firsts[1]) == sorted(firsts[2])
    assert firsts[0] != firsts[1] != firsts[2]
    assert source.batch(4, range(rows - 2, rows + 2)).tokens[:, 0].tolist() == firsts[0][-2:] + firsts[1][:2]
    assert source.batch(5, range(rows)).tokens[:, 0].tolist() != firsts[0]


@pytest.mark.parametrize("world", [1, 2])
def test_carry_continues_row_by_row(world):
    docs = some_documents(60)
    source, firsts = Given(docs, 8, carry=True), {doc[0] for doc in docs}
    per_lane = source.rows(0) // 4
    for rank in range(world):
        steps = Steps(source, 0, 4, rank=rank, world=world)
        before = None
        for step in range(2 * per_lane):
            batch = steps[step]
            anew = step % per_lane == 0
            if before is not None and not anew:
                assert torch.equal(batch.tokens[:, 0], before.tokens[:, -1] + 1)
                continued = torch.tensor([int(token) not in firsts for token in batch.tokens[:, 0]])
                assert torch.equal(before.targets[:, -1] == batch.tokens[:, 0], continued)
                assert torch.equal(batch.starts[:, 0], ~continued)
            if anew:
                assert batch.starts[:, 0].all()
                assert batch.tokens[:, 0].tolist() == [lane * per_lane * 8 for lane in steps.mine]
            before = batch


def test_too_little_text_says_what_to_do():
    with pytest.raises(ValueError, match=r"given: the val split has 3 tokens and a row of length 8 takes 9: give more text"):
        Given([[1, 2, 3]], 8).batch(split_seed(0, "val"), [0])
    with pytest.raises(ValueError, match=r"has only 4 rows of length 8: take a smaller batch"):
        Steps(Given([list(range(33))], 8, carry=True), 0, 5)[0]


def test_a_stream_reads_across_pieces():
    tokens = np.arange(20, dtype=np.uint8)
    stream = Stream([tokens[:3], tokens[3:4], tokens[4:15], tokens[15:]], np.array([0]))
    for begin in range(20):
        for count in range(1, 21 - begin):
            assert stream.read(begin, count).tolist() == list(range(begin, begin + count))


# ------------------------------------------------------------------------------------------------ documents


def write(folder, texts, prefix=""):
    for i, text in enumerate(texts):
        file = folder / f"{prefix}{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def documents_of(source, split):
    stream = source.stream(split)
    edges = [*stream.begins.tolist(), len(stream)]
    return [stream.read(a, b - a).tobytes() for a, b in pairwise(edges)]


def test_folder_splits_follow_content_not_names(tmp_path):
    texts = [f"text number {i} " * (1 + i % 7) for i in range(200)]
    a = Text(path=str(write(tmp_path / "a", texts)), held_out=0.1)
    b = Text(path=str(write(tmp_path / "b", [*reversed(texts), texts[3], texts[3]], "other")), held_out=0.1)
    parts = [documents_of(a, split) for split in SPLITS]
    assert parts == [documents_of(b, split) for split in SPLITS]  # names, order and copies do not matter
    assert sorted(chain(*parts)) == sorted(text.encode() for text in texts)
    assert 8 <= len(parts[1]) <= 35
    assert 8 <= len(parts[2]) <= 35
    assert a.fingerprint == b.fingerprint
    more = Text(path=str(write(tmp_path / "c", [*texts, "one more"])), held_out=0.1)
    assert more.fingerprint != a.fingerprint
    assert all(set(part) <= set(documents_of(more, split)) for part, split in zip(parts, SPLITS, strict=True))


def test_binary_empty_and_hidden_files_are_passed_over(tmp_path):
    folder = write(tmp_path / "a", ["plain", b"\x89PNG\0\0", "", b"latin \xe9"])
    (folder / ".git").mkdir()
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "dangling").symlink_to(folder / "nowhere")
    source = Text(path=str(folder), held_out=0.4)
    assert sorted(chain(*(documents_of(source, split) for split in SPLITS))) == [b"latin \xe9", b"plain"]


def test_a_single_file_is_held_out_at_its_end(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    source = Text(path=str(file), held_out=0.1, length=32)
    parts = [documents_of(source, split) for split in SPLITS]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert b"".join(part[0] for part in parts) == file.read_bytes()
    assert all(part[0].endswith(b"\n") for part in parts)
    assert abs(len(parts[1][0]) / file.stat().st_size - 0.1) < 0.01
    batch = source.batch(split_seed(0, "val"), range(4))
    assert bytes(batch.tokens[0].tolist()) in parts[1][0]


def test_cut_never_tears_a_character():
    data = "é漢字😀".encode() * 50
    for val in np.linspace(0.01, 0.49, 40):
        parts = documents.cut(data, val=val, test=val)
        assert b"".join(parts.values()) == data
        for part in parts.values():
            part.decode()


def test_standard_library_is_there():
    source = Text(length=128)
    batch = source.batch(split_seed(0, "val"), range(8))
    assert batch.tokens.shape == (8, 128)
    assert batch.starts[:, 0].all()
    assert source.vocab_size == 256
    assert len(source.fingerprint) == 16
    docs = [set(documents_of(source, split)) for split in SPLITS]
    assert not docs[0] & docs[1]
    assert not docs[0] & docs[2]
    sizes = [sum(map(len, part)) for part in docs]
    assert sizes[0] > 5e6
    assert min(sizes[1:]) > 1e5


def test_a_row_of_text_depends_on_its_index_alone(tmp_path):
    source = Text(path=str(write(tmp_path, [f"some text {i} " * 20 for i in range(50)])), length=20, held_out=0.2)
    whole = source.batch(7, range(30))
    for i in (0, 11, 29):
        one = source.batch(7, [i])
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(whole[:3], one[:3], strict=True))


def test_bad_text_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder"):
        Text(path=str(tmp_path / "nowhere")).rows(0)
    with pytest.raises(ValueError, match=r"no text in .*: no files, or all empty or binary"):
        Text(path=str(tmp_path)).rows(0)
    with pytest.raises(ValueError, match=r"text: length = 0"):
        Text(length=0)
    with pytest.raises(ValueError, match=r"text: held_out = 0\.5: must lie between 0 and 0\.5"):
        Text(held_out=0.5)
