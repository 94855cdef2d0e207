"""prepare writes what shards reads; a folder is finished or it is not there; bad input is named."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from memarch.data import Shards, Text, split_seed
from memarch.data import prepare as prepare_module
from memarch.data.prepare import prepare
from memarch.data.shards import Index


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts_of(folder, split):
    stream = Shards(path=str(folder)).stream(split)
    edges = [*stream.begins.tolist(), len(stream)]
    return [stream.read(a, b - a) for a, b in pairwise(edges)]


TEXTS = [f"Document {i}: " + "wörter 漢字 " * (i % 5) for i in range(120)]


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 20])
def test_bytes_from_jsonl_round_trip(tmp_path, shard_tokens):
    source = jsonl(tmp_path / "a.jsonl", [{"body": text} for text in [*TEXTS, ""]])
    if shard_tokens == 1:
        source = jsonl(tmp_path / "a.jsonl", [{"body": text} for text in TEXTS[:9]])
    out = tmp_path / "deep" / "out"
    index = prepare([source], out, shard_tokens=shard_tokens, text_field="body", validation=0.3)
    assert index == Index.read(out)
    assert (index.dtype, index.vocab_size, index.tokenizer) == ("uint8", 256, "bytes")
    found = {split: [x.tobytes().decode() for x in texts_of(out, split)] for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS[:9] if shard_tokens == 1 else TEXTS)
    assert found["train"] == [text for text in TEXTS if text in set(found["train"])]  # the order of the input
    for split, part in index.splits.items():
        assert part.documents == len(found[split])
        assert part.tokens == sum(len(text.encode()) for text in found[split])
        assert part.shards == -(-part.tokens // shard_tokens)
    names = {file.name for file in out.iterdir()}
    shards = {f"{split}-{n:05d}.npy" for split, part in index.splits.items() for n in range(part.shards)}
    assert names == shards | {"index.json", "train-begins.npy", "val-begins.npy"}


def test_rows_cross_the_borders_of_small_shards(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    prepare([folder], tmp_path / "out", shard_tokens=37, validation=0.1)
    shards = Shards(path=str(tmp_path / "out"), length=24)
    batch = shards.batch(split_seed(1, "train"), range(shards.rows(0)))
    assert batch.tokens.dtype == torch.int64
    joined = b"".join(x.tobytes() for x in texts_of(tmp_path / "out", "train"))
    assert all(bytes(row) in joined for row in batch.tokens.tolist())
    assert (batch.targets[:, :-1] == -100).sum() == batch.starts[:, 1:].sum()
    held = Text(path=str(folder), held_out=0.1).stream("val")  # the same documents are held out, though text has them in another order
    edges = [*held.begins.tolist(), len(held)]
    assert sorted(x.tobytes() for x in texts_of(tmp_path / "out", "val")) == sorted(held.read(a, b - a).tobytes() for a, b in pairwise(edges))


def test_a_single_text_file_is_cut_at_a_line(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)))
    prepare([file], tmp_path / "out", validation=0.1)
    train, val = (texts_of(tmp_path / "out", split)[0].tobytes() for split in ("train", "val"))
    assert train + val == file.read_bytes()
    assert train.endswith(b"\n")
    prepare([file], tmp_path / "all", validation=0)
    assert list(Index.read(tmp_path / "all").splits) == ["train"]
    with pytest.raises(ValueError, match=r"unknown split 'val'.*Allowed: train"):
        Shards(path=str(tmp_path / "all")).rows(split_seed(0, "val"))


def a_tokenizer(file, vocab_size=400):
    tokenizers = pytest.importorskip("tokenizers")
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<end>"],
    )
    coder.train_from_iterator(TEXTS, trainer)
    coder.save(str(file))
    return coder


def test_a_tokenizers_file(tmp_path):
    coder = a_tokenizer(tmp_path / "tok.json")
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    index = prepare([source], tmp_path / "out", tmp_path / "tok.json", shard_tokens=50, validation=0.2)
    assert (index.dtype, index.vocab_size, index.tokenizer) == ("uint16", coder.get_vocab_size(), "tok.json")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tok.json").read_bytes()
    found = [coder.decode(x.tolist()) for split in ("train", "val") for x in texts_of(tmp_path / "out", split)]
    assert sorted(found) == sorted(TEXTS)
    source_config = Shards(path=str(tmp_path / "out"), length=12)
    assert source_config.vocab_size == coder.get_vocab_size()
    assert source_config.fingerprint == index.fingerprint
    assert source_config.batch(0, range(5)).tokens.max() < source_config.vocab_size
    assert index.fingerprint != prepare([source], tmp_path / "bytes", validation=0.2).fingerprint


# ------------------------------------------------------------------------------------------------ finished or not there

KILLED = """
import os, signal, sys
import memarch.data.prepare as p
written = []
save = p.np.save
def save_then_die(*args):
    save(*args)
    written.append(args)
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
p.np.save = save_then_die
p.prepare([sys.argv[1]], sys.argv[2], shard_tokens=50, validation=0.1)
"""


def test_killed_in_the_middle_leaves_nothing_that_looks_finished(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    out = tmp_path / "out"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", KILLED, source, out], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = [place for place in tmp_path.iterdir() if place.is_dir()]
    assert left.name.startswith(".out.unfinished-")
    with pytest.raises(ValueError, match=r"no index\.json, so this is no finished folder"):
        Shards(path=str(left)).rows(0)
    prepare([source], out, validation=0.1)  # and it is in nobody's way
    assert Shards(path=str(out), length=16).rows(0) > 0


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_stopped_in_the_middle_cleans_up(tmp_path, monkeypatch, error):
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])

    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(prepare_module.Index, "write", stop)
    with pytest.raises(type(error)):
        prepare([source], tmp_path / "out", validation=0.1)
    assert [place.name for place in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_damaged_folder_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for name, damage, message in [
        ("gone", lambda out: (out / "train-00001.npy").unlink(), r"train-00001\.npy: cannot be read"),
        ("short", lambda out: np.save(out / "train-00001.npy", np.zeros(3, np.uint8)), r"do not hold what index\.json says"),
        ("torn", lambda out: (out / "train-00001.npy").write_bytes(b"\x93NUMPY"), r"train-00001\.npy: cannot be read"),
        ("json", lambda out: (out / "index.json").write_text("{"), r"index\.json: not an index"),
        ("keys", lambda out: (out / "index.json").write_text('{"format": 1}'), r"index\.json: not an index"),
        ("newer", lambda out: (out / "index.json").write_text('{"format": 9}'), r"format 9, and this memarch reads format 1"),
    ]:
        out = tmp_path / name
        prepare([source], out, shard_tokens=500, validation=0.1)
        damage(out)
        with pytest.raises(ValueError, match=message):
            Shards(path=str(out)).rows(0)


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named(tmp_path, monkeypatch):
    good = jsonl(tmp_path / "good.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-lines.jsonl").write_text("\n\n")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "latin" / "b.txt").write_bytes(b"tea")
    (tmp_path / "not-a-tokenizer.json").write_text("{}")
    a_tokenizer(tmp_path / "tok.json")
    lines = {
        "broken": ('{"text": "a"}\n{"text": ', r"broken\.jsonl, line 2: not JSON"),
        "list": ("[1]\n", r"list\.jsonl, line 1: not a JSON object"),
        "field": (
            '{"text": "a"}\n\n{"body": "b", "id": 3}\n',
            r"field\.jsonl, line 3: no 'text' in it; it has 'body', 'id': choose with text_field",
        ),
        "number": ('{"text": 3}\n', r"number\.jsonl, line 1: 'text' is int, not a string"),
        "half": ('{"text": "\\ud800"}\n', r"half\.jsonl, line 1: 'text' is not valid Unicode"),
    }
    cases = [({"inputs": [tmp_path / f"{name}.jsonl"]}, message) for name, (_, message) in lines.items()]
    for name, (text, _) in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    cases += [
        ({"inputs": [tmp_path / "bytes.jsonl"]}, r"bytes\.jsonl, line 1: not JSON"),
        ({"inputs": []}, r"no input: name at least one"),
        ({"inputs": [tmp_path / "missing.txt"]}, r"missing\.txt: no such file or folder"),
        ({"inputs": [tmp_path / "empty"]}, r"no text in an empty folder"),
        ({"inputs": [tmp_path / "no-lines.jsonl"]}, r"no text in .*no-lines\.jsonl"),
        ({"inputs": [tmp_path / "latin"], "tokenizer": tmp_path / "tok.json"}, r"a\.txt: byte 3 is not UTF-8 .*or take tokenizer 'bytes'"),
        ({"inputs": [good], "tokenizer": "bpe"}, r"tokenizer 'bpe': no such file: give 'bytes'"),
        ({"inputs": [good], "tokenizer": tmp_path / "not-a-tokenizer.json"}, r"not a tokenizer of the tokenizers library"),
        ({"inputs": [good], "validation": 1.0}, r"validation = 1\.0: must lie in 0"),
        ({"inputs": [good], "validation": 1e-9}, r"none of 120 documents fell into the val split"),
        ({"inputs": [good], "shard_tokens": 0}, r"shard_tokens = 0"),
        ({"inputs": [good], "out": tmp_path / "empty"}, r"empty: exists already: remove it"),
    ]
    before = sorted(place.name for place in tmp_path.iterdir())
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            prepare(**{"out": tmp_path / "out", **arguments})
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the tokenizers library: `pip install tokenizers`"):
        prepare([good], tmp_path / "out", tmp_path / "tok.json")
    assert sorted(place.name for place in tmp_path.iterdir()) == before
    prepare([tmp_path / "latin"], tmp_path / "out", validation=0)  # bytes ask for no encoding
    assert sorted(x.tobytes() for x in texts_of(tmp_path / "out", "train")) == [b"caf\xe9 au lait", b"tea"]


def test_progress_is_plain_lines_in_a_log(tmp_path, capfd):
    prepare([jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5000}] * 1000)], tmp_path / "out", validation=0)
    said = capfd.readouterr().err
    assert "prepare: " in said
    assert "MB" in said
    assert "\x1b" not in said
    assert len(said.splitlines()) <= 11
