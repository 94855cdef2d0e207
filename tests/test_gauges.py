"""What sparse memories report: usage counted over steps, told when it is due, through compile; from metrics.csv to a table and a figure."""

import json
import math
import re

import pytest
import torch

from memarch import cli, create_model
from memarch.callbacks.files import latest
from memarch.callbacks.table import read
from memarch.layers import PEERConfig, PKMConfig
from memarch.layers.parts.pool import watch
from memarch.layers.parts.usage import Usage
from memarch.training import main
from zoo import DIM

SPARSE = ["memory-former-tiny", "memory-plus-tiny", "peer-tiny", "pkm-tiny", "ultramem-tiny", "ultramem-v2-tiny"]


def told(usage, *calls):
    """What the last of these calls says, (ids, weights) each."""
    for ids, weights in calls[:-1]:
        assert usage.add(torch.tensor(ids), torch.tensor(weights), 8) == {}
    usage.due = True
    found = usage.add(*map(torch.tensor, calls[-1]), 8)
    usage.due = False
    return {name: value.item() for name, value in found.items()}


def test_usage_is_its_formula_over_several_steps():
    z = torch.tensor([0.5, 0.25, 0.25])
    found = told(Usage(), ([[0, 1]], [[1.0, 1.0]]), ([[0, 3]], [[-1.0, 1.0]]))
    assert found == pytest.approx({"usage": 3 / 8, "unevenness": math.log(8) + (z * z.log()).sum().item()})


def test_rows_used_alike_are_even_and_counting_begins_again():
    usage = Usage()
    assert told(usage, (list(range(8)), [0.3] * 8)) == pytest.approx({"usage": 1, "unevenness": 0}, abs=1e-6)
    assert told(usage, ([5], [0.3])) == pytest.approx({"usage": 1 / 8, "unevenness": math.log(8)})


@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_memory_reports_when_it_is_due(name):
    model = create_model(name)
    x = torch.randint(256, (2, 64))
    assert not any(gauge.endswith("usage") for gauge in model(x).aux)
    layers = watch(model)
    model(x)
    for usage in layers:
        usage.due = True
    with torch.no_grad():
        assert not any(gauge.endswith("usage") for gauge in model(x).aux), "evaluation is not counted"
    found = {gauge: value.item() for gauge, value in model(x).aux.items() if gauge.endswith(("usage", "unevenness"))}
    assert len(found) >= 2
    assert all(0 < value <= 1 for gauge, value in found.items() if gauge.endswith("usage")), found
    assert all(value > 0 for gauge, value in found.items() if gauge.endswith("unevenness")), found


def test_peer_counts_experts():
    layer = PEERConfig(keys=2, heads=2, topk=2).build(DIM)
    (usage,) = watch(layer)
    usage.due = True
    assert layer(torch.randn(1, 200, DIM)).aux["usage"] == 1
    assert len(usage.mass) == 4


def test_compiled_layers_count_too():
    layer = PKMConfig(keys=4, heads=2, topk=4, query_dim=8).build(DIM)
    (usage,) = watch(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 30, DIM)
    compiled(x)
    compiled(x)
    assert usage.mass.sum().item() == pytest.approx(2 * 2 * 30 * 2, rel=1e-5), "two steps, 60 tokens, weights of two heads"
    usage.due = True
    assert {"usage", "unevenness"} <= compiled(x).aux.keys()


# ------------------------------------------------------------------------------------------------ in a run


def gauges_of(folder):
    """step -> gauges of the tables, of every row that has them."""
    rows = read(folder / "metrics.csv")[1]
    return {int(row["step"]): {c: v for c, v in row.items() if v and re.search(r"(usage|unevenness|table|top1)$", c)} for row in rows}


@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_a_run_reports_and_a_resumed_one_reports_the_same(tmp_path, tables):
    def run():
        words = f"fit --preset memory-plus-tiny --data.train.kind mqar --data.batch_size 4 --run.folder {tmp_path} --run.save_every 5"
        words += " --run.bar false --run.export false --trainer.max_steps 6 --trainer.log_every_n_steps 3"
        words += " --trainer.accumulate_grad_batches 2 --trainer.val_check_interval 100"
        main([*words.split(), "--optim.tables", tables, "--optim.schedule", "constant", "--run.threads", "1"])

    run()
    whole = gauges_of(tmp_path)
    latest(tmp_path).unlink()  # as if it had been killed after step 5, whose numbers are in no row yet
    run()
    assert set(whole[6]) == {
        "grad_norm/backbone.pools.facts.table",
        *(f"train/blocks.{i}.ffn.{gauge}" for i in (0, 2) for gauge in ("usage", "unevenness", "top1")),
    }
    assert gauges_of(tmp_path) == whole, "rows that were read before the cut count"
    assert float(whole[3]["train/blocks.0.ffn.usage"]) > float(whole[1]["train/blocks.0.ffn.usage"]), "three steps read more than one"
    assert cli.main(["inspect", "memory", str(tmp_path)]) == 0


# ------------------------------------------------------------------------------------------------ memarch inspect memory

CSV = """step,train/loss,grad_norm,train/blocks.1.ffn.usage,train/blocks.1.ffn.top1,train/branches.0.ratio,grad_norm/tables,grad_norm/backbone.pools.facts.table
1,5.5,1.0,0.25,0.5,0.9,1,0.01
2,5.4,1.0,,,,1,
3,5.3,1.0,0.5,0.75,0.8,1,0.02
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.csv").write_text(CSV)
    return tmp_path


def test_inspect_memory(run, capsys):
    assert cli.main(["inspect", "memory", str(run)]) == 0
    said = capsys.readouterr().out
    for words in (r"blocks\.1\.ffn +0\.5 +0\.75", r"branches\.0 .*0\.8", r"pools\.facts .*0\.02", "At step 3", r"memory\.png"):
        assert re.search(words, said), said
    assert (run / "memory.png").stat().st_size > 10_000
    assert cli.main(["inspect", "memory", str(run), "--json", "--out", str(run / "other"), "--pdf"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "blocks.1.ffn": {"usage": 0.5, "top1": 0.75},
        "branches.0": {"ratio": 0.8},
        "pools.facts": {"grad_norm": 0.02},
    }
    assert (run / "other.png").exists() and (run / "other.pdf").exists()


def test_inspect_says_what_is_missing(run, capsys):
    (run / "metrics.csv").write_text("step,train/loss\n1,5.5\n")
    for folder, words in ((run, "no gauges of a sparse memory"), (run / "nowhere", "does not exist or has no rows")):
        assert cli.main(["inspect", "memory", str(folder)]) == 2
        assert words in capsys.readouterr().err
