"""Fidelity probes say what their formulas say: on models whose answer is known, against the formulas written out, and in pieces as whole."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from memarch import ConfigError, cli, create_model, list_models
from memarch.data import MQAR
from memarch.data.packed import Packed, Stream
from memarch.evaluation import evaluate, report
from memarch.evaluation.fidelity import Fidelity, Moments

F64 = torch.float64
VIEWS = ("x_in_sample", "x_held_out", "y_in_sample", "y_held_out")


@dataclasses.dataclass(frozen=True)
class Given(Packed):
    """These documents, in every split."""

    documents: tuple[list[int], ...]
    vocab_size: int = 256
    fingerprint: str = "given"
    kind: str = "given"

    def stream(self, split):
        sizes = [len(document) for document in self.documents]
        return Stream([np.concatenate(self.documents)], np.cumsum([0, *sizes[:-1]]))


def letters(n, seed=0):
    return np.random.default_rng(seed).integers(97, 123, n).tolist()


def probe(model, *documents, chunk=None, batch_size=None, **fields):
    return evaluate(model, Fidelity(data=Given(documents), **fields), chunk=chunk, batch_size=batch_size)


# ------------------------------------------------------------------------------------------------ ETMF


def sure(ahead):
    """A model that is certain of the byte it has just read, moved on by `ahead`: its blocks do nothing, and its head knows the embedding."""
    model = create_model("transformer-tiny", tie=False).double()
    with torch.no_grad():
        for p in model.core.blocks.parameters():
            p.zero_()
        model.embed.weight.copy_(F.normalize(torch.randn(256, model.config.dim, dtype=F64), dim=1))
        model.head.weight.copy_(1e4 * model.embed.weight.roll(ahead, 0))
    return model


def test_certain_of_the_token_it_has_read_is_one_at_offset_0():
    table = probe(sure(0), letters(400))
    assert table.value(distance=0, offset=0) == pytest.approx(1, abs=1e-9)
    assert abs(table.value(distance=0, offset=1)) < 0.2 and abs(table.value(distance=8, offset=0)) < 0.2


@pytest.mark.parametrize("offset", [0, 1])
def test_distance_lies_between_the_token_and_what_the_reconstruction_is_about(offset):
    """Bytes that count up begin again after 256: a model that is sure of the byte at `offset` agrees with what stands 256 further back."""
    table = probe(sure(offset), [i % 256 for i in range(600)], distances=(0, 8, 256))
    for distance, same in ((0, True), (8, False), (256, True)):
        found = [table.value(distance=distance, offset=o) for o in (offset, 1 - offset)]
        assert found[0] == pytest.approx(1, abs=1e-9) if same else abs(found[0]) < 0.2
        assert abs(found[1]) < 0.2


def test_etmf_is_its_formula():
    """Documents are apart: no pair reaches from one into the next."""
    model, documents = create_model("hybrid-tiny", seed=3).double(), [letters(90), letters(60, seed=1)]
    table, E = probe(model, *documents, temperature=0.5, distances=(0, 8)), model.embed.weight
    for row in table.rows:
        D, o, cosines = row["distance"], row["offset"], []
        for x in documents:
            r = (model(torch.tensor([x[:-1]])).logits[0] / 0.5).softmax(-1) @ E
            cosines += [F.cosine_similarity(E[x[j - D + o]], r[j], dim=0).item() for j in range(len(r)) if j - D + o >= 0]
        assert row["ETMF"] == pytest.approx(np.mean(cosines), abs=1e-12)
        assert row["positions"] == len(cosines) and row["error"] is not None


def test_a_distance_that_no_document_has_is_skipped():
    table = probe(create_model("transformer-tiny"), letters(9), letters(5))
    assert {row["distance"] for row in table.rows} == {0, 8} and any("distance 16" in reason for reason in table.skipped)


# ------------------------------------------------------------------------------------------------ ECLMF


def moments(x, y):
    """Of two blocks; the first half of the rows is the first half of the text."""
    found = Moments(2, x.shape[1], (1,), torch.device("cpu"))
    half = torch.arange(len(x)) >= len(x) // 2
    for rows in torch.arange(len(x)).split(700):
        found.add(torch.stack([x, y])[:, rows], half[rows])
    return {name: value.item() for name, value in found.scores(1, 1e-4).items()}


def test_a_linear_map_of_the_layer_below_loses_nothing():
    x = torch.randn(3000, 12, dtype=F64)
    assert moments(x, x @ torch.randn(12, 12, dtype=F64)) == pytest.approx(dict.fromkeys(VIEWS, 1), abs=1e-6)


def test_an_independent_layer_is_as_lost_as_it_is_large():
    x, y = torch.randn(40000, 12, dtype=F64), 3 * torch.randn(40000, 12, dtype=F64)
    found = moments(x, y)
    assert (found["x_in_sample"], found["x_held_out"]) == pytest.approx([1 - (y.norm() / x.norm()).item()] * 2, abs=0.01)
    assert (found["y_in_sample"], found["y_held_out"]) == pytest.approx([0, 0], abs=0.01)


def test_with_few_tokens_only_the_held_out_half_tells_chance():
    found = moments(torch.randn(50, 40, dtype=F64), torch.randn(50, 40, dtype=F64))
    assert found["y_in_sample"] > 0.4 and found["y_held_out"] < 0


@pytest.mark.parametrize("name", ["hybrid-tiny", "yoco-tiny", "ultramem-tiny"])
def test_eclmf_is_its_formula(name):
    """Against least squares on the states that a backbone with `trace` posts, the two halves of the text cut by hand."""
    x = letters(301)
    model = create_model(name, seed=2).double()
    traced = create_model(name, seed=2, trace=True).double()
    states = [h[0] for h in traced.features(torch.tensor([x[:-1]])).note["trace"]]
    halves = (slice(0, 150), slice(150, 300))

    def left(fit, on, X, Y):
        ridge = 1e-2 * torch.eye(X.shape[1], dtype=F64)  # the root of 1e-4: rows that ask for small weights
        W = torch.linalg.lstsq(torch.cat([X[fit], ridge]), torch.cat([Y[fit], 0 * ridge])).solution
        return (Y[on] - X[on] @ W).square().sum()

    table = probe(model, x)
    assert table.parts["blocks"] and {row["apart"] for row in table.parts["ECLMF"]} == {g for g in (1, 2, 5, 10) if g < len(states)}
    for row in table.parts["blocks"]:
        X, Y = states[row["block"]], states[row["block"] + row["apart"]]
        whole, cut = left(slice(None), slice(None), X, Y).sqrt(), (left(*halves, X, Y) + left(*halves[::-1], X, Y)).sqrt()
        for of, size in (("x", X.norm()), ("y", Y.norm())):
            assert row[f"{of}_in_sample"] == pytest.approx((1 - whole / size).item(), abs=1e-6)
            assert row[f"{of}_held_out"] == pytest.approx((1 - cut / size).item(), abs=1e-6)
    for row in table.parts["ECLMF"]:
        mean = [np.mean([b[view] for b in table.parts["blocks"] if b["apart"] == row["apart"]]) for view in VIEWS]
        assert [row[view] for view in VIEWS] == pytest.approx(mean, abs=1e-12)


def test_one_block_has_no_eclmf():
    table = probe(create_model("transformer-tiny", layers=1), letters(40))
    assert len(table.rows) == 8 and not table.parts
    assert any("the model has 1 block" in reason for reason in table.skipped)


# ------------------------------------------------------------------------------------------------ any model, any pieces


@pytest.mark.parametrize("name", ["hybrid-tiny", "yoco-tiny", "rmt-tiny", "titans-mac-tiny"])
def test_in_ragged_pieces_as_whole(name):
    documents = [letters(90), letters(31, seed=1), letters(33, seed=2)]
    model = create_model(name, seed=1).double()
    whole, pieces = probe(model, *documents, batch_size=1, chunk=10**6), probe(model, *documents, chunk=13)
    for part, rows in {"ETMF": whole.rows, **whole.parts}.items():
        for a, b in zip(rows, {"ETMF": pieces.rows, **pieces.parts}[part], strict=True):
            assert a == pytest.approx(b, abs=1e-7), part


@pytest.mark.parametrize("name", [name for name in list_models() if name.endswith("-tiny")])
def test_every_tiny_preset(name):
    """Every token is a row of ECLMF, and nothing else is: no pad, and no vector that a wrapper puts between segments."""
    if create_model(name, device="meta").backbone.every > 1:
        with pytest.raises(ConfigError, match=r"in this model they read one vector for \d+ tokens"):
            probe(create_model(name), letters(70))
        return
    table = probe(create_model(name), letters(70), letters(41), chunk=64)
    assert table.about["states"] == 109
    numbers = [row[view] for row in table.parts["blocks"] for view in VIEWS] + [row["ETMF"] for row in table.rows]
    assert np.isfinite(numbers).all() and max(numbers) <= 1


def test_the_model_is_left_as_it_was():
    model = create_model("rmt-tiny").train()
    probe(model, letters(40))
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_generated_data_is_read_row_by_row():
    """A mixture of lengths comes in the order of training; every row is a document, and its last token is only foreseen."""
    table = evaluate(create_model("hybrid-tiny"), Fidelity(data=MQAR(settings=((16, 2), (64, 8))), tokens=3000, distances=(0, 32)))
    assert table.about["states"] == 3000
    at_0, far = (next(row["positions"] for row in table.rows if row["distance"] == d and row["offset"] == 0) for d in (0, 32))
    assert at_0 == 3000 and 0 < far < 3000 / 2, "rows of 16 tokens have nothing at distance 32"
    again = evaluate(create_model("hybrid-tiny"), Fidelity(data=MQAR(settings=((16, 2),)), tokens=1000))
    assert again.about["states"] == 1000, "64 rows of 16 tokens are 960 that can be read"


BAD = {
    "tokens": ({"tokens": 0}, r"tokens = 0: must be at least 1"),
    "temperature": ({"temperature": 0.0}, r"temperature = 0.0: must be above 0"),
    "ridge": ({"ridge": 0.0}, r"ridge = 0.0: must be above 0"),
    "distances": ({"distances": (-1,)}, r"distances = \(-1,\): each must be at least 0"),
    "gaps": ({"gaps": (0,)}, r"gaps = \(0,\): each must be at least 1"),
    "vocabulary": ({"data": MQAR(vocab_size=512)}, r"has 512 different tokens and the model knows 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said(name):
    fields, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        evaluate(create_model("hybrid-tiny"), Fidelity(**fields))


# ------------------------------------------------------------------------------------------------ memarch inspect fidelity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that learned recall."""
    folder = tmp_path_factory.mktemp("run")
    create_model("yoco-tiny").save_pretrained(folder / "export")
    train = {"kind": "mqar", "settings": [[64, 4]], "vocab_size": 128}
    (folder / "config.json").write_text(json.dumps({"data": {"train": train}}))
    return folder


def call(capsys, *words):
    status = cli.main(["inspect", "fidelity", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_inspect_fidelity_reads_what_the_run_learned_from(run, capsys):
    status, out, err = call(capsys, run, "--tokens", 400, "--gaps", 1, 2, 9)
    assert status == 0 and err == ""
    for words in ("mqar, the data of the run", r"fidelity: ETMF", r"offset \\ distance +0 +8 +16 +32", r"ECLMF", r"skipped ECLMF, gap 9"):
        assert re.search(words, out), out
    folder = run / "export" / "evaluation"
    table = report.read(folder / "fidelity.json")
    assert {row["apart"] for row in table.parts["ECLMF"]} == {1, 2} and table.about["task"]["data"]["vocab_size"] == 128
    assert [row["block"] for row in table.parts["blocks"] if row["apart"] == 2] == [0, 1]
    assert all((folder / f"fidelity{end}").stat().st_size for end in (".csv", "-ECLMF.csv", "-blocks.csv", ".png"))


def test_inspect_fidelity_reads_a_text(run, tmp_path, capsys):
    (tmp_path / "book.txt").write_bytes(bytes(letters(900)))
    words = ["--path", tmp_path / "book.txt", "--split", "train", "--distances", 0, 4, "--temperature", 2, "--out", tmp_path, "--pdf"]
    status, out, _ = call(capsys, run / "export", *words)
    assert status == 0 and "of the run" not in out and (tmp_path / "fidelity.pdf").is_file()
    task = report.read(tmp_path / "fidelity.json").about["task"]
    assert (task["temperature"], task["distances"], task["data"]["kind"]) == (2.0, [0, 4], "text")


def test_inspect_fidelity_of_one_block(tmp_path, capsys):
    create_model("transformer-tiny", layers=1).save_pretrained(tmp_path / "model")
    status, out, _ = call(capsys, tmp_path / "model", "--tokens", 200)
    assert status == 0 and "ECLMF: the model has 1 block" in out and (tmp_path / "model" / "evaluation" / "fidelity.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [("nowhere/at-all/x", r"there is no folder"), ("{run} --path {run}/none.txt", r"no such file or folder"), ("{run} --gaps 0", r"gaps = \(0,\)")],
)
def test_inspect_fidelity_says_mistakes_in_a_line(words, message, run, capsys):
    status, _, err = call(capsys, *words.format(run=run).split())
    assert status == 2 and err.count("\n") == 1 and re.search(message, err), err
