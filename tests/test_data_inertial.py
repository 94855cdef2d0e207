"""The inertial sensor: a pure function of (config, seed, index), solved by a program that knows the physics; and regression from file to table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from memarch import LM, LMConfig, decode
from memarch.commands import load
from memarch.config import ConfigError
from memarch.config_file import read
from memarch.data import SPLITS, Inertial, split_seed
from memarch.data.draw import Draw
from memarch.data.inertial import GYRO, HEADING, MEAN, SCALE, TURNS, normal, waves
from memarch.evaluation import InertialTask, evaluate, like
from memarch.training import main

SOURCES = [Inertial(length=64), Inertial(length=100, every=7), Inertial(length=5, every=1, noise=0.0)]
each = pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))


def same(a, b):
    for x, y in ((a.tokens, b.tokens), (a.targets, b.targets)):
        assert x.dtype == y.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ the generator


@each
def test_a_row_depends_on_its_index_alone(source):
    whole = source.batch(3, range(20))
    same(whole, source.batch(3, range(20)))
    for i in (0, 13, 19):
        one = source.batch(3, [i])
        same(one, whole._replace(tokens=whole.tokens[i : i + 1], targets=whole.targets[i : i + 1]))
    same(source.step(2, 3, range(4, 8), 16), source.batch(2, range(52, 56)))


@each
def test_splits_and_seeds_share_no_samples(source):
    batches = [source.batch(split_seed(seed, split), range(50)) for seed in (0, 1) for split in SPLITS]
    assert not any(torch.equal(a.tokens, b.tokens) for i, a in enumerate(batches) for b in batches[:i])


@each
def test_questions_stand_at_the_ends_of_chunks(source):
    batch = source.batch(0, range(8))
    assert batch.tokens.shape == (8, source.length, source.inputs) and batch.targets.shape == (8, source.length, source.outputs)
    asked = ~batch.targets.isnan()
    ends = torch.arange(source.length) % source.every == source.every - 1
    assert torch.equal(asked, ends[None, :, None].expand_as(asked))
    assert batch.tokens.isfinite().all()


@each
def test_the_second_half_of_the_inputs_is_the_first_difference(source):
    x = source.batch(0, range(8)).tokens
    torch.testing.assert_close(x[:, 1:, 3:], x[:, 1:, :3] - x[:, :-1, :3], rtol=0, atol=1e-5)
    assert not x[:, 0, 3:].any()


def test_targets_are_normalised():
    y = Inertial(length=400, every=20).batch(0, range(1000)).targets.double()
    y = y[~y.isnan().any(-1)]
    assert y.mean(0).abs().max() < 0.1 and (y.std(0) - 1).abs().max() < 0.1


def test_waves_are_a_function_its_derivative_and_its_integral():
    t = np.arange(0, 400, 0.01)
    f, rate, area = waves(Draw(0, range(5)), "any", 0.3, t)
    np.testing.assert_allclose(np.gradient(f, t, axis=1)[:, 1:-1], rate[:, 1:-1], atol=1e-6)
    np.testing.assert_allclose(np.gradient(area, t, axis=1)[:, 1:-1], f[:, 1:-1], atol=1e-4)
    many = waves(Draw(0, range(2000)), "any", 0.3, np.zeros(1))[0]
    assert many.std() == pytest.approx(0.3, rel=0.05) and abs(many.mean()) < 0.02


def test_normal_numbers_are_normal():
    x = normal(Draw(0, range(200)), "any", 1000)
    assert [(x**n).mean() for n in (1, 2, 3, 4)] == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert abs(np.corrcoef(x[:, 0], x[:, 1])[0, 1]) < 0.3


def test_the_answer_follows_from_the_readings():
    """Without noise: the turn rate summed up is the heading, and the phase that the two accelerometers go through in a chunk is the way."""
    source = Inertial(length=640, noise=0.0)
    batch = source.batch(0, range(100))
    forward, left, turn = batch.tokens[..., :3].double().numpy().transpose(2, 0, 1)
    heading = GYRO * np.cumsum(turn, 1)
    phase = np.unwrap(np.arctan2(left, forward), axis=1)
    chunks = lambda x: x.reshape(100, -1, source.every)  # noqa: E731
    speed = (chunks(phase)[:, :, -1] - chunks(phase)[:, :, 0]) / (2 * math.pi * TURNS * (source.every - 1))
    velocity = np.stack([speed * np.cos(chunks(heading)).mean(2), speed * np.sin(chunks(heading)).mean(2)], 2)
    target = batch.targets[:, source.every - 1 :: source.every].numpy()
    assert ((velocity - MEAN) / SCALE - target).var() < 0.05 * target.var()
    alone = np.stack([speed, 0 * speed], 2)  # without the heading
    assert ((alone - MEAN) / SCALE - target).var() > 0.5 * target.var() and HEADING > 0


@pytest.mark.parametrize(
    "fields, message", [({"every": 0}, "every = 0"), ({"length": 5}, "length = 5: must be at least every"), ({"noise": -1.0}, "noise = -1.0: must not")]
)
def test_a_bad_field_is_said(fields, message):
    with pytest.raises(ConfigError, match=message):
        Inertial(**fields)


def test_samples_of_a_seed_never_change():
    batch = Inertial(length=4, every=2).batch(0, [7])
    assert batch.tokens[0, 1].tolist() == pytest.approx(GOLDEN[0], abs=1e-5)
    assert batch.targets[0, 3].tolist() == pytest.approx(GOLDEN[1], abs=1e-5)


GOLDEN = ([0.209562, -1.529951, -3.079733, 1.026747, -0.749024, -1.105373], [1.049802, -0.083916])


# ------------------------------------------------------------------------------------------------ regression


def small(name="hiss"):
    data = read(f"configs/inertial/{name}.yaml")["model"]
    return LM(decode(LMConfig, {**data, "dim": 8}))


def test_a_target_with_nan_is_not_scored():
    model, batch = small(), Inertial(length=43).batch(0, range(3))
    out = model.loss(batch.tokens, batch.targets)
    y, asked = model(batch.tokens).logits, ~batch.targets.isnan().any(-1)
    torch.testing.assert_close(out.loss, (y[asked] - batch.targets[asked]).square().mean(-1).sum())
    assert out.count == asked.sum() == 12
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    part = batch.targets.clone()
    part[0, 9, 1] = float("nan")
    assert model.loss(batch.tokens, part).count == 11
    short = model.loss(batch.tokens, batch.targets, lengths=torch.tensor([43, 20, 9]))
    assert short.count == 4 + 2 and short.loss.isfinite()


def test_both_runs_are_of_one_size_and_differ_in_the_model_alone():
    hiss, flat = (read(f"configs/inertial/{name}.yaml") for name in ("hiss", "mamba"))
    sizes = [decode(LMConfig, data.pop("model")).num_params() for data in (hiss, flat)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02) and hiss == flat


def test_the_evaluation_is_the_error_over_the_variance():
    model, task = small(), InertialTask(lengths=(50, 90), examples=5)
    table = evaluate(model, task)
    for row in table.rows:
        batch = task.source(row["length"]).batch(split_seed(0, "test"), range(5))
        with torch.no_grad():
            y, target = (x[:, 9::10].double() for x in (model(batch.tokens).logits, batch.targets))
        wanted = (y - target).square().mean() / (target - target.mean((0, 1))).square().mean()
        assert row["nmse"] == pytest.approx(float(wanted), rel=1e-5) and row["answers"] == target.shape[0] * target.shape[1]
    parts = [row for row in table.parts["position"] if row["length"] == 90]
    assert sum(row["nmse"] * row["answers"] for row in parts) == pytest.approx(table.value(length=90) * 45)
    assert like(Inertial(length=50, every=5)) == InertialTask(lengths=(50, 100, 200), every=5)


def test_a_regression_run_trains_validates_is_exported_and_evaluated(tmp_path):
    words = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--data.batch_size", "2", "--data.train.length", "40", "--model.dim", "8"]
    run = main(["fit", "--config", "configs/inertial/hiss.yaml", *words, "--run.folder", str(tmp_path / "run")])
    assert math.isfinite(run.metrics["val/loss"]) and "val/accuracy" not in run.metrics
    again = LM.from_pretrained(tmp_path / "run" / "export")
    x = Inertial(length=40).batch(0, range(2)).tokens
    torch.testing.assert_close(again(x).logits, run.task.model(x).logits)
    assert load.training_data(str(tmp_path / "run"))["kind"] == "inertial"
    done = main(["validate", "--resume", str(tmp_path / "run")])
    assert done.metrics["val/loss"] == pytest.approx(run.metrics["val/loss"])


def test_data_and_model_must_both_be_of_numbers(capsys, tmp_path):
    for words, message in (
        (["--config", "configs/inertial/hiss.yaml", "--preset", "mamba-tiny"], "set model.embed linear, inputs 6, head regression, outputs 2 and tie false"),
        (["--config", "configs/recall/mamba.yaml", "--model.embed", "linear", "--model.inputs", "3", "--model.tie", "false"], "the data are tokens"),
    ):
        with pytest.raises(SystemExit):
            main(["fit", *words, "--run.root", str(tmp_path)])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_ablation_of_regressions_has_a_table(tmp_path):
    from memarch.ablation import load as plan_of
    from memarch.ablation import run_plan, shown

    data = read("configs/ablations/hiss.yaml")
    base = read("configs/inertial/hiss.yaml")
    base["trainer"] = {"max_steps": 2, "val_check_interval": 2}
    base["data"] |= {"train": {"kind": "inertial", "length": 40}, "batch_size": 2, "val_batches": 1}
    del data["set"]["HiSS, same time"]  # it sets its own number of steps
    data |= {"base": base, "seeds": 2, "grid": {}, "metric": {"kind": "inertial", "lengths": [40, 80], "examples": 2}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(data))
    plan = plan_of(file)
    rows = run_plan(plan, tmp_path / "out")
    assert [row["status"] for row in rows] == ["done"] * 4, json.dumps(rows)
    table = shown(plan, rows)
    assert [row["variant"] for row in table] == list(data["set"]) and all("±" in row["length 40"] for row in table)
    assert Path(tmp_path / "out").is_dir()
