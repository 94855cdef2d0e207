"""Tables stepped by rows: the formulas written out, AdamW where every row is read, and rows nobody read left as they were.

The command is this file, for the test of two processes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from memarch import create_model
from memarch.callbacks import Guard, NonFinite
from memarch.config import ConfigError
from memarch.data import MQAR
from memarch.data.module import TokenData
from memarch.kernels.row_adam import PIECE
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers.parts.pool import ValuePool
from memarch.optim import LazyAdamW, OptimConfig, average, build, clip, kept
from memarch.optim.tables import unique
from memarch.task import Task

F64 = torch.float64
MODES = ("lazy", "row")
modes = pytest.mark.parametrize("mode", MODES)


class Reader(nn.Module):
    """A table [N, d] and a linear map of what is read from it."""

    def __init__(self, N=12, d=4, dtype=F64):
        super().__init__()
        self.pool, self.out = ValuePool(N, d), nn.Linear(d, 3)
        with torch.no_grad():
            self.pool.table.normal_(generator=torch.Generator().manual_seed(1))
            self.out.weight.normal_(generator=torch.Generator().manual_seed(2)), self.out.bias.zero_()
        self.to(dtype)

    def forward(self, ids, weights):
        return self.out(weighted_bag(self.pool.table, ids, weights, sparse_grad=self.pool.sparse_grad))


def batch(seed, N, tokens=6, R=3, dtype=F64):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, N, (tokens, R), generator=source), torch.randn(tokens, R, generator=source, dtype=dtype)


def config(tables, **more):
    return OptimConfig(**{"lr": 0.05, "schedule": "constant", "warmup": 3, "memory_lr": 2.0, "tables": tables} | more)


def train(model, cfg, batches, divide=1):
    """Plain torch: each batch in `divide` micro-batches, then clip and step."""
    optimizer, schedule = build(model, cfg, 100)
    for ids, weights in batches:
        for i, w in zip(ids.chunk(divide), weights.chunk(divide), strict=True):
            model(i, w).square().sum().backward()
        clip(optimizer, cfg.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a, b, **near):
    torch.testing.assert_close(weights_of(a), weights_of(b), **near or {"rtol": 0, "atol": 0})


# ------------------------------------------------------------------------------------------------ the formulas


def test_lazy_is_adamw_where_every_row_is_read():
    """To float64 round-off, for many steps: the other weights are stepped by the same kernel, to the bit."""
    ids = torch.arange(12).view(4, 3)
    batches = [(ids.flip(step % 2), batch(step, 12, 4)[1]) for step in range(20)]
    models = {tables: Reader() for tables in ("dense", "lazy", "row")}
    for tables, model in models.items():
        train(model, config(tables), batches)
    same(models["dense"], models["lazy"], rtol=1e-11, atol=1e-13)
    assert not torch.allclose(models["dense"].pool.table, models["row"].pool.table, rtol=1e-3), "row has other second moments"


@modes
@pytest.mark.parametrize("N, d", [(12, 4), (5, 1), (9, PIECE)], ids=["usual", "one column", "pieces of one row"])
def test_a_loop_over_rows(mode, N, d):
    model, cfg = Reader(N, d), config(mode, clip=None)
    table = model.pool.table.detach().clone()
    m, v = torch.zeros(N, d, dtype=F64), torch.zeros(N, d if mode == "lazy" else 1, dtype=F64)
    optimizer, schedule = build(model, cfg, 100)
    for step in range(4):
        ids, weights = batch(step, N, 2)
        model(ids, weights).square().sum().backward()
        grad, rate, t = model.pool.table.grad.to_dense(), optimizer.param_groups[-1]["lr"], step + 1
        assert rate == pytest.approx(0.05 * 2.0 * min(1, t / 3))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for u in set(ids.flatten().tolist()):
            m[u] = cfg.betas[0] * m[u] + (1 - cfg.betas[0]) * grad[u]
            v[u] = cfg.betas[1] * v[u] + (1 - cfg.betas[1]) * (grad[u] ** 2 if mode == "lazy" else (grad[u] ** 2).mean())
            table[u] -= rate * m[u] / (1 - cfg.betas[0] ** t) / ((v[u] / (1 - cfg.betas[1] ** t)) ** 0.5 + cfg.eps)
    torch.testing.assert_close(model.pool.table.detach(), table, rtol=1e-11, atol=1e-13)


@modes
def test_rows_that_are_not_read_keep_value_and_moments(mode):
    model = Reader()
    optimizer, _ = build(model, config(mode), 100)
    state = optimizer.state[model.pool.table]

    def kept():
        return [x.detach().clone() for x in (model.pool.table, state["exp_avg"], state["exp_avg_sq"])]

    for step in range(5):
        ids, weights = batch(step, 12, 2, 2)
        model(ids, weights).square().sum().backward()
        before = kept() if step else None
        optimizer.step()
        optimizer.zero_grad()
        read = torch.zeros(12, dtype=torch.bool).index_fill(0, ids.flatten(), True)
        for old, new in zip(before or [], kept(), strict=False):
            assert torch.equal(old[~read], new[~read]) and not (old[read] == new[read]).all(1).any()


@modes
def test_a_step_without_gradient_leaves_tables_alone(mode):
    """As when the guard takes the gradients away."""
    model = Reader()
    optimizer = train(model, config(mode), [batch(0, 12)])
    before, moments = {n: p.clone() for n, p in weights_of(model).items()}, {p: dict(s) for p, s in optimizer.state.items()}
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in weights_of(model).items())
    assert optimizer.state[model.pool.table] == moments[model.pool.table], "the step does not count"


@modes
def test_a_closure_is_called_with_gradients(mode):
    """Lightning computes the whole step, clipping included, inside one."""
    plain, closed = Reader(), Reader()
    train(plain, config(mode), [batch(0, 12)])
    optimizer, _ = build(closed, config(mode), 100)

    def closure():
        loss = closed(*batch(0, 12)).square().sum()
        loss.backward()
        clip(optimizer, 1.0)
        return loss

    assert optimizer.step(closure).requires_grad
    same(plain, closed)


# ------------------------------------------------------------------------------------------------ gradients


@modes
def test_two_micro_batches_are_one_batch(mode):
    """Rows read in both are added up before they are clipped and squared."""
    whole, pieces = Reader(), Reader()
    batches = [batch(step, 12) for step in range(5)]
    train(whole, config(mode), batches)
    train(pieces, config(mode), batches, divide=2)
    same(whole, pieces, rtol=1e-11, atol=1e-13)


def test_clipping_is_that_of_the_dense_gradient():
    norms, grads = [], []
    for tables in ("dense", "lazy"):
        model = Reader()
        optimizer, _ = build(model, config(tables), 100)
        for seed in range(2):  # accumulated: rows come twice
            model(*batch(seed, 12)).square().sum().backward()
        norms.append(clip(optimizer, 0.5, 0.25))
        grad = model.pool.table.grad
        assert grad.is_sparse == (tables == "lazy")
        grads.append(grad.to_dense())
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert norms[0]["tables"] > 0.5, "nothing was clipped"
    torch.testing.assert_close(grads[1].norm(), torch.tensor(0.5, dtype=F64), rtol=1e-5, atol=0)


def test_rows_are_made_unique_once():
    """Rows of several processes come in any order and more than once."""
    table = ValuePool(12, 2).to(F64).table
    values = torch.arange(6, dtype=F64).view(3, 2)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[3, 1, 3]]), values, table.shape, check_invariants=True)
    rows, sums = unique(table)
    assert rows.tolist() == [1, 3] and torch.equal(sums, torch.stack([values[1], values[0] + values[2]]))
    assert sums.data_ptr() == unique(table)[1].data_ptr() == table.grad.values().data_ptr()


def test_a_dense_gradient_is_refused():
    model = Reader()
    optimizer, _ = build(model, config("lazy"), 100)
    model(*batch(0, 12)).square().sum().add(model.pool.table.square().sum()).backward()
    with pytest.raises(ValueError, match=r"optim\.tables: dense"):
        optimizer.step()


# ------------------------------------------------------------------------------------------------ size


@modes
def test_a_step_allocates_nothing_as_large_as_the_table(mode):
    """Also not in backward, clipping and the next forward: the largest allocation is that of the rows read. The dense optimiser fails this."""
    N, d = 2**16, 8

    def largest(tables):
        model, cfg = Reader(N, d, torch.float32), config(tables)
        train(model, cfg, [batch(0, N, dtype=torch.float32)])
        optimizer, _ = build(model, cfg, 100)
        model(*batch(0, N, dtype=torch.float32)).sum().backward()
        optimizer.step()  # the moments
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(*batch(1, N, dtype=torch.float32)).square().sum().backward()
            clip(optimizer, 1.0)
            optimizer.step()
        return max(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")

    assert largest("dense") >= 4 * N * d
    assert largest(mode) <= 18 * 16 * d, "6 bags of 3 rows; a few numbers for each of their elements"


@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_what_is_kept_is_what_is_told(mode):
    model = Reader()
    optimizer = train(model, config(mode), [batch(0, 12)])
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert sum(x.nbytes for x in moments) == kept(model, config(mode)) == 8 * (2 * 15 + 12 * 4 + (12 if mode == "row" else 12 * 4))


# ------------------------------------------------------------------------------------------------ saved and loaded


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_in_the_middle_it_goes_on_to_the_bit(mode, dtype, tmp_path):
    def steps(model, optimizer, schedule, which):
        for step in which:
            model(*batch(step, 12, dtype=dtype)).square().sum().backward()
            clip(optimizer, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    cfg = config(mode, memory_decay=0.5)
    whole = Reader(dtype=dtype)
    steps(whole, *build(whole, cfg, 10), range(8))
    first = Reader(dtype=dtype)
    pieces = build(first, cfg, 10)
    steps(first, *pieces, range(3))
    torch.save([first.state_dict(), *(part.state_dict() for part in pieces)], tmp_path / "saved")
    second = Reader(dtype=dtype)
    pieces = build(second, cfg, 10)
    for part, state in zip((second, *pieces), torch.load(tmp_path / "saved", weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(second, *pieces, range(3, 8))
    same(whole, second)
    assert not torch.equal(whole.pool.table, first.pool.table)


# ------------------------------------------------------------------------------------------------ models


@modes
def test_every_table_of_a_model_is_told(mode):
    """Built again for another optimiser, it is told again."""
    model = create_model("memory-plus-tiny")
    pools = [module for module in model.modules() if isinstance(module, ValuePool)]
    optimizer, _ = build(model, config(mode), 10)
    assert isinstance(optimizer, LazyAdamW) and pools and all(pool.sparse_grad for pool in pools)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    model.loss(tokens, tokens).loss.backward()
    assert all(pool.table.grad.is_sparse for pool in pools)
    build(model, config("dense"), 10)
    assert not any(pool.sparse_grad for pool in pools)


@modes
def test_the_task_is_a_loop(mode):
    """Through Lightning: the loss by count, micro-batches, the schedule, clipping."""
    from lightning.pytorch import Trainer

    from memarch.data import MQAR, split_seed
    from memarch.data.module import TokenData
    from memarch.task import Task

    data, cfg = MQAR(settings=((16, 4),), vocab_size=32), config(mode, schedule="cosine", memory_decay=0.5)
    learner, model = (create_model("pkm-tiny", vocab_size=32, dim=16).double() for _ in range(2))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    steps = {"max_steps": 3, "max_epochs": -1, "accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None}
    Trainer(accelerator="cpu", precision="64-true", **steps, **quiet).fit(Task(learner, cfg), TokenData(data, batch_size=4))
    optimizer, schedule = build(model, cfg, 3)
    for step in range(3):
        batch = data.step(split_seed(0, "train"), step, range(12), 12)
        out = model.loss(batch.tokens, batch.targets)
        (out.loss / out.count).backward()
        clip(optimizer, cfg.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    same(learner, model, rtol=1e-9, atol=1e-12)


def test_compiled_code_has_no_row_sparse_gradients():
    from memarch.task import Task

    with pytest.raises(ConfigError, match=r"task\.compile false"):
        Task(create_model("pkm-tiny"), config("lazy"), compile=True)
    Task(create_model("transformer-tiny"), config("lazy"), compile=True)  # which has no tables


# ------------------------------------------------------------------------------------------------ processes


def main(rank, store):
    """Rank `rank` of two takes its half of every batch, in two micro-batches, and says what became of the table."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = Reader()
    optimizer, _ = build(model, config("lazy", warmup=0), 100)
    for step in range(3):
        for micro in range(2):
            ids, weights = batch(step, 12, 12)
            half = slice(6 * rank + 3 * micro, 6 * rank + 3 * micro + 3)
            ids = ids[half].clamp(max=5) if rank else ids[half]  # so that they read different numbers of rows
            (2 * model(ids, weights[half]).square().sum()).backward()  # a mean over processes of twice the sum
        for p in model.out.parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2
        average(optimizer)
        clip(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), f"{store}-{rank}")
    dist.destroy_process_group()


def test_two_processes_with_half_a_batch_each_are_one(tmp_path):
    store = str(tmp_path / "store")
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), store], env={**os.environ, "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    whole, batches = Reader(), []
    for step in range(3):
        ids, weights = batch(step, 12, 12)
        batches.append((torch.cat([ids[:6], ids[6:].clamp(max=5)]), weights))
    train(whole, config("lazy", warmup=0), batches)
    first, second = (torch.load(f"{store}-{rank}", weights_only=True) for rank in range(2))
    for name, p in weights_of(whole).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], p, rtol=1e-11, atol=1e-13)


def test_a_bad_row_is_named():
    task = Task(create_model("pkm-tiny", vocab_size=32, dim=16), OptimConfig(schedule="constant", tables="lazy"))
    task.model.core.pools["facts"].table.register_hook(lambda grad: grad * float("nan"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    run = Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[Guard(1)], **quiet)
    with pytest.raises(NonFinite, match=r"first bad gradient is that of backbone\.pools\.facts\.table: \d+ NaN"):
        run.fit(task, TokenData(MQAR(settings=((16, 4),), vocab_size=32), batch_size=4))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
