"""What an evaluation says is what the model does: the same in pieces as whole, right for models whose answers are known, and readable again."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from memarch import ConfigError, LMOutput, create_model
from memarch.data import MQAR, Copy, Facts, Needle, SelectiveCopy, Shards, Text
from memarch.evaluation import TASKS, estimate, evaluate, like, make_task, plots, report
from memarch.evaluation.size import state_size
from memarch.evaluation.stream import score

SMALL = {
    "mqar": {"lengths": (16, 64), "pairs": (4, 8), "examples": 6},
    "copy": {"lengths": (24, 40), "copies": (4, 8), "examples": 6},
    "selective_copy": {"lengths": (24, 40), "copies": (4, 8), "examples": 6},
    "needle": {"lengths": (32, 64), "depths": (0.0, 0.5, 1.0), "examples": 6, "value_len": 2},
    "age": {"pairs": 12, "every": 5, "examples": 6},
    "facts": {"facts": 250, "sets": 2, "asked": 8},
    "inertial": {"lengths": (64, 130), "examples": 6},
    "text": {"tokens": 600, "context": 250},
}
CONTINUOUS = {"inertial": {"embed": "linear", "inputs": 6, "head": "regression", "outputs": 2, "tie": False}}


class Copycat(nn.Module):
    """Answers with what stood behind the last earlier occurrence of the token, at most `reach` tokens back. Its state is all it has read."""

    def __init__(self, reach: int = 10**9, vocab_size: int = 256):
        super().__init__()
        self.weight, self.reach = nn.Parameter(torch.zeros(1)), reach
        self.config = create_model("transformer-tiny", device="meta", vocab_size=vocab_size).config

    def forward(self, tokens, state=None, *, lengths=None):
        old = tokens[:, :0] if state is None else state[0]
        seen = torch.cat([old, tokens], 1)
        answer = torch.zeros_like(tokens)
        for b, row in enumerate(seen.tolist()):
            for t in range(old.shape[1], len(row)):
                for back in range(1, min(t, self.reach) + 1):
                    if row[t - back] == row[t] and t - back + 1 < t:
                        answer[b, t - old.shape[1]] = row[t - back + 1]
                        break
        return LMOutput(10.0 * F.one_hot(answer, self.config.vocab_size).float() + self.weight, (seen,))


class Uniform(Copycat):
    def forward(self, tokens, state=None, *, lengths=None):
        return LMOutput(torch.zeros(*tokens.shape, 256), ())


class Knows(Copycat):
    """Knows some facts of a world and guesses where it knows nothing. With `wrong` it is sure of another value. Its state is the last token."""

    def __init__(self, world: Facts, facts, wrong: int = 0):
        super().__init__()
        keys, values = world.tell(np.array(facts))
        self.logits = torch.zeros(256, 256, 256)
        self.logits[keys[:, 0], keys[:, 1], (values + wrong) % 256] = 100.0

    def forward(self, tokens, state=None, *, lengths=None):
        before = torch.cat([torch.zeros_like(tokens[:, :1]) if state is None else state[0], tokens[:, :-1]], 1)
        return LMOutput(self.logits[before, tokens] + self.weight, (tokens[:, -1:],))


# ------------------------------------------------------------------------------------------------ pieces and the whole


@pytest.mark.parametrize("name", ["transformer-tiny", "hybrid-tiny", "rmt-tiny"])
@pytest.mark.parametrize("task", TASKS)
def test_streamed_in_ragged_pieces_equals_whole(task, name):
    model = create_model(name, seed=1, **CONTINUOUS.get(task, {}))
    whole = evaluate(model, task, chunk=10**6, **SMALL[task])
    pieces = evaluate(model, task, chunk=13, batch_size=4, **SMALL[task])
    assert len(whole.rows) == len(pieces.rows) > 0
    ours, theirs = ([*table.rows, *(row for part in whole.parts for row in table.parts[part])] for table in (whole, pieces))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] or math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-5), key


def test_rows_that_end_early_score_as_alone():
    model, tokens = create_model("hybrid-tiny", seed=2), torch.randint(256, (4, 50))
    lengths = torch.tensor([50, 7, 33, 1])
    targets = torch.randint(256, (4, 50)).masked_fill(torch.arange(50) >= lengths[:, None], -100)
    together = score(model, tokens, targets, lengths, chunk=16)
    for b, n in enumerate(lengths.tolist()):
        alone = score(model, tokens[b : b + 1, :n], targets[b : b + 1, :n])
        torch.testing.assert_close(together.nats[b, :n], alone.nats[0], rtol=1e-4, atol=1e-5)
        assert not together.nats[b, n:].any()


def test_the_model_is_left_as_it_was():
    model = create_model("hybrid-tiny").train()
    model.backbone.norm.eval()  # frozen by its owner
    before = {name: p.clone() for name, p in model.named_parameters()}
    evaluate(model, "mqar", **SMALL["mqar"])
    assert model.training and model.embed.training and not model.backbone.norm.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
def test_a_gpu_says_what_a_cpu_says(task):
    model = create_model("hybrid-tiny", seed=1, **CONTINUOUS.get(task, {}))
    here, there = (evaluate(model.to(device), task, chunk=13, **SMALL[task]) for device in ("cpu", "cuda"))
    for a, b in zip(here.rows, there.rows, strict=True):
        assert a[here.metric] == pytest.approx(b[here.metric], rel=1e-3, abs=0.1)  # a tie may fall the other way


# ------------------------------------------------------------------------------------------------ models whose answers are known


def test_a_model_that_remembers_everything_is_right_everywhere():
    table = evaluate(Copycat(), "mqar", lengths=(32, 128), pairs=(4, 8), examples=5, filler="zero")
    assert [row["accuracy"] for row in table.rows] == [1.0] * 4
    assert [row["exact"] for row in table.rows] == [1.0] * 4
    assert table.value(length=128, pairs=8) == table.mean() == 1.0


def test_gap_buckets_show_where_a_window_ends():
    table = evaluate(Copycat(reach=17), "mqar", lengths=(128,), pairs=(8,), examples=12, filler="zero", power=1.0)
    for row in table.parts["gap"]:
        if row["below"] <= 16:  # the key stands one before its value
            assert row["accuracy"] == 1.0
        if row["gap"] >= 17:
            assert row["accuracy"] == 0.0
    assert 0 < table.rows[0]["accuracy"] < 1


def test_a_pair_is_read_from_the_state_at_every_age():
    """Every question comes from a copy of the same state: one that remembers all is right, one that looks back 20 tokens knows what is younger."""
    assert all(row["accuracy"] == 1.0 for row in evaluate(Copycat(), "age", pairs=12, every=5, examples=4).rows)
    table = evaluate(Copycat(reach=20), "age", pairs=12, every=5, examples=4)
    assert [(row["age"], row["answers"]) for row in table.rows] == [(4, 4), (8, 8), (16, 12), (32, 24)]  # ages 4, 9 and 14, 19 and 24 and 29, ..
    assert [row["accuracy"] for row in table.rows] == [1.0, 1.0, pytest.approx(1 / 3), 0.0]


def test_uniform_guessing_costs_eight_bits_a_byte(tmp_path):
    for name, text in (("a.txt", b"abcd" * 50), ("b.txt", b"xy" * 120), ("c.txt", b"q" * 75), ("d.txt", b"zzy" * 41)):
        (tmp_path / name).write_bytes(text)
    task = {"kind": "text", "path": str(tmp_path), "split": "train", "tokens": None}
    table = evaluate(Uniform(), task)
    (row,) = table.rows
    assert row["bits_per_byte"] == pytest.approx(8) and row["perplexity"] == pytest.approx(256) and row["error"] == pytest.approx(0, abs=1e-6)
    stream = make_task(task).stream()
    assert row["tokens"] == len(stream) - len(stream.begins)  # all but the first of each document
    cut = evaluate(Uniform(), task, context=32)
    assert cut.rows[0]["tokens"] == row["tokens"]
    assert sum(part["tokens"] for part in cut.parts["position"]) == row["tokens"]
    assert max(part["position"] for part in cut.parts["position"]) == 32


def test_facts_known_are_counted_set_by_set():
    world = Facts(facts=1000, sets=2, world=3)
    model = Knows(world, range(400))
    table = evaluate(model, "facts", facts=1000, sets=2, world=3)
    first, second = table.rows
    guessed = [(world.tell(np.arange(low, high))[1] == 0).sum() for low, high in ((400, 500), (500, 1000))]  # the arg max of nothing is token 0
    assert table.value(set=0) == (400 + guessed[0]) / 500 and table.value(set=1) == guessed[1] / 500
    assert first["bits"] == pytest.approx(400 * 8) and second["bits"] == pytest.approx(0, abs=1e-2)
    assert first["stored"] == pytest.approx(500 * (table.value(set=0) - 1 / 256) / (1 - 1 / 256))
    assert first["bits_per_parameter"] == pytest.approx(3200 / model.config.num_params())
    assert first["bits_per_active_parameter"] == pytest.approx(3200 / model.config.active_params())
    assert [(row["facts"], row["answers"]) for row in table.rows] == [(500, 500)] * 2


def test_other_worlds_and_wrong_beliefs_are_worth_nothing():
    world = Facts(facts=1000)
    for model in (Knows(world, range(1000), wrong=1), Knows(Facts(facts=1000, world=1), range(1000)), Uniform()):
        (row,) = evaluate(model, "facts", facts=1000).rows
        assert row["accuracy"] < 0.02 and row["stored"] < 20 and row["bits"] == pytest.approx(0, abs=1e-2)


def test_a_sample_of_many_facts_speaks_for_all():
    model = Knows(Facts(), range(0, 65536, 2))
    (row,) = evaluate(model, "facts", questions=3000).rows
    assert row["answers"] == 3000 and row["facts"] == 65536
    assert abs(row["accuracy"] - 0.5) < 4 * row["error"] < 0.05 and abs(row["stored"] / 32768 - 1) < 0.1


def test_a_limit_of_tokens_is_kept():
    assert evaluate(Uniform(), "text", tokens=321).rows[0]["tokens"] == 321


def test_estimate_is_the_error_over_examples_not_over_tokens():
    values, units = np.array([1.0, 1, 1, 1, 0, 0, 0, 0]), np.repeat([0, 1, 2, 3], 2)
    found = estimate(values, units)
    assert found.mean == 0.5 and found.error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert estimate(values[:2], units[:2]).error is None
    rng = np.random.default_rng(0)  # unlike sizes: against many repetitions of the same draw
    sizes = rng.integers(1, 20, (4000, 30))
    shared = rng.random((4000, 30))
    ratio = (shared * sizes).sum(1) / sizes.sum(1)
    errors = [estimate(np.repeat(v, s), np.repeat(np.arange(30), s)).error for v, s in zip(shared[:300], sizes[:300], strict=True)]
    assert np.mean(errors) == pytest.approx(ratio.std(), rel=0.08)


# ------------------------------------------------------------------------------------------------ tasks


def test_impossible_cells_are_skipped_with_the_reason():
    table = evaluate(Uniform(), "mqar", lengths=(16, 64), pairs=(8,), examples=2)
    assert [row["length"] for row in table.rows] == [64]
    (reason,) = table.skipped
    assert reason.startswith("length 16, pairs 8: ") and "a pair takes two tokens to tell and two to ask" in reason


def test_lengths_beyond_the_vocabulary_are_fine():
    assert evaluate(Uniform(), "mqar", lengths=(1024,), pairs=(4,), examples=2).rows[0]["length"] == 1024


@pytest.mark.parametrize(
    ("data", "kind", "first"),
    [
        (MQAR(settings=((64, 4), (128, 8)), filler="zero"), "mqar", {"length": 64, "pairs": 4}),
        (Copy(length=32, copies=4), "copy", {"length": 32, "copies": 4}),
        (SelectiveCopy(length=32, copies=4), "selective_copy", {"length": 32, "copies": 4}),
        (Needle(length=64), "needle", {"length": 64, "depth": 0.0}),
        (Text(), "text", {"context": None}),
    ],
)
def test_like_asks_for_what_was_trained(data, kind, first):
    task = like(data)
    assert task.kind == kind
    if kind != "text":
        cells, _ = task.plan(256)
        assert cells[0][0] == first and cells[-1][0]["length"] >= 8 * data.length
        assert task.vocab_size == data.vocab_size


def test_like_asks_about_the_world_that_was_trained():
    source = Facts(facts=600, asked=10, key_length=3, vocab_size=10, world=4, sets=3, passes=2)
    assert like(source).plan(256) == dataclasses.replace(source, passes=None)


def test_like_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"no task asks for what int trains"):
        like(3)


def test_shards_are_text_too(tmp_path):
    from memarch.data.prepare import prepare

    (tmp_path / "in").mkdir()
    for i in range(12):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i} " * 20)
    prepare([tmp_path / "in"], tmp_path / "out", validation=0.4)
    task = make_task("text", path=str(tmp_path / "out"))
    assert isinstance(task.source(), Shards)
    assert evaluate(Uniform(), task).rows[0]["bits_per_byte"] == pytest.approx(8)


BAD = {
    "unknown task": (lambda: make_task("mqr"), r"unknown task 'mqr'. Did you mean 'mqar'\?"),
    "unknown field": (lambda: make_task({"kind": "mqar", "pair": [4]}), r"mqar: unknown key 'pair'. Did you mean 'pairs'\?"),
    "no example": (lambda: make_task("copy", examples=0), r"examples = 0: must be at least 1"),
    "empty axis": (lambda: make_task("needle", depths=()), r"depths is empty: give at least one value"),
    "nothing possible": (lambda: evaluate(Uniform(), "mqar", lengths=(8,), pairs=(16,)), r"no cell of the grid is possible. length 8, pairs 16: "),
    "vocabulary": (lambda: evaluate(Uniform(), "mqar", vocab_size=512), r"vocab_size = 512: the model knows 256 tokens"),
    "text of other tokens": (lambda: evaluate(Copycat(vocab_size=100), "text"), r"256 different tokens and the model knows 100"),
    "no such text": (lambda: evaluate(Uniform(), "text", path="/no/such/file"), r"no such file or folder"),
    "facts without keys": (lambda: evaluate(Uniform(), "facts", facts=70000), r"key_length 2 make 65536 distinct keys"),
    "facts of other tokens": (lambda: evaluate(Uniform(), "facts", vocab_size=512), r"vocab_size = 512: the model knows 256 tokens"),
    "more pairs than keys": (lambda: evaluate(Uniform(), "age", pairs=128), r"pairs = 128: a vocabulary of 256 has 127 distinct keys"),
    "pairs on top of each other": (lambda: make_task("age", every=1), r"every = 1: must be at least 2"),
    "no question": (lambda: make_task("facts", questions=0), r"questions = 0: must be at least 1, or null for every fact"),
    "cell": (lambda: evaluate(Uniform(), "copy", examples=2).value(length=3), r"0 cells match .*Cells: length 64, copies 8;"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_regression_model_is_refused():
    model = create_model("hybrid-tiny", tie=False, embed="linear", inputs=2, head="regression", outputs=1)
    with pytest.raises(ConfigError, match=r"embed 'linear' to head 'regression'; mqar asks a model from 'tokens' to 'tokens'"):
        evaluate(model, "mqar")
    with pytest.raises(ConfigError, match=r"6 inputs and 2 outputs are asked for; the model has 2 and 1"):
        evaluate(model, "inertial")
    with pytest.raises(ConfigError, match=r"embed 'tokens' to head 'tokens'; inertial asks a model from 'linear' to 'regression'"):
        evaluate(Uniform(), "inertial")


# ------------------------------------------------------------------------------------------------ tables and figures


@pytest.fixture(scope="module")
def tables():
    return {task: evaluate(create_model("hybrid-tiny", **CONTINUOUS.get(task, {})), task, **SMALL[task]) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_written_and_read_again(task, tables, tmp_path):
    files = report.write(tables[task], tmp_path, pdf=True)
    assert report.read(tmp_path / f"{task}.json") == tables[task]
    assert {file.suffix for file in files} == {".json", ".csv", ".png", ".pdf"} and all(file.stat().st_size for file in files)
    lines = (tmp_path / f"{task}.csv").read_text().splitlines()
    assert len(lines) == 1 + len(tables[task].rows)
    about = json.loads((tmp_path / f"{task}.json").read_text())["about"]
    assert about["task"]["kind"] == task and {"config", "parameters", "dtype", "device", "torch"} <= about.keys()


@pytest.mark.parametrize("task", TASKS)
def test_figures_have_the_width_of_a_column(task, tables, tmp_path):
    (file,) = plots.save(plots.draw(tables[task]), tmp_path / "figure")
    width, height = size_of(file)
    assert 3.2 * 200 < width < 3.5 * 200 and height < 5 * 200


def test_a_run_of_an_ablation_keeps_what_cells_measure(tables):
    from memarch.ablation.folder import evaluated

    for task, table in tables.items():
        row = evaluated(table)
        assert row[task] == pytest.approx(table.mean()) and [cell["value"] for cell in row["cells"]] == [cell[table.metric] for cell in table.rows]
        assert "error" not in row  # that is the run's own
    assert "perplexity" in evaluated(tables["text"])
    facts = evaluated(tables["facts"])
    assert facts["bits"] == pytest.approx(np.mean([cell["bits"] for cell in tables["facts"].rows]))
    assert facts.keys() == {"facts", "accuracy, set 0", "accuracy, set 1", "stored", "bits", "bits_per_parameter", "bits_per_active_parameter", "cells"}


@pytest.mark.parametrize("task", [task for task, cls in TASKS.items() if hasattr(cls, "parts")])
def test_a_part_is_a_table_of_its_own(task, tables):
    """A task says what the cells of its parts differ in."""
    for name, axes in make_task(task).parts.items():
        part = tables[task].part(name, axes)
        assert part.rows == tables[task].parts[name]
        assert len({tuple(part.settings(row).values()) for row in part.rows}) == len(part.rows) > 0
    with pytest.raises(ValueError, match=f"{task} answered no colour by"):
        tables[task].part(name, axes, "colour")


def test_show_prints_every_cell(tables):
    console = Console(width=120)
    with console.capture() as said:
        for table in tables.values():
            report.show(table, console)
    text = said.get()
    for task in TASKS:
        assert task in text
    assert "skipped length 16, pairs 8" in text and text.count("±") >= sum(len(table.rows) for table in tables.values()) - 1


@pytest.mark.parametrize("hints", [{}, {"x": "length", "group": "variant"}, {"x": "variant"}, {"x": "lr", "group": "length"}])
def test_comparisons_draw_whatever_varies(hints, tmp_path):
    points = [{"variant": v, "lr": lr, "length": n, "value": 0.1 * s} for v in "ab" for lr in (1e-3, 1e-2) for n in (64, 128) for s in range(3)]
    (file,) = plots.save(plots.compare(points, metric="accuracy", **hints), tmp_path / "figure")
    assert size_of(file)[0] < 3.5 * 200


def test_comparisons_without_numbers_are_strips(tmp_path):
    for points in ([{"variant": v, "value": 0.5} for v in "abc"], [{"value": 0.5}]):
        (file,) = plots.save(plots.compare(points, metric="val/loss"), tmp_path / "figure")
        assert size_of(file)[1] < 2 * 200


def size_of(png: Path) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", ["transformer-tiny", "hybrid-tiny", "rmt-tiny", "hiss-tiny", "short-conv-tiny"])
def test_state_size_is_what_a_stream_holds(name):
    from memarch.state import nbytes

    model = create_model(name)
    found = state_size(create_model(name, device="meta"))
    sizes, state = [], None
    with torch.no_grad():
        for _ in range(70):
            state = model(torch.zeros(1, 1, dtype=torch.int64), state).state
            sizes.append(nbytes(state))
    if found.per_token:
        assert sizes[-1] == found.bytes + 70 * found.per_token
    else:
        assert max(sizes) == found.bytes


def test_the_package_draws_and_prints_nothing_by_itself():
    import subprocess
    import sys

    code = "import sys, memarch.evaluation; print([m for m in ('matplotlib', 'rich', 'lightning', 'triton') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
