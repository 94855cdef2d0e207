"""Two processes of one run decide alike: which step is skipped, when to save, when to stop. The command is this file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def main(run_dir: Path, devices: int, steps: int, bad: str, tables: str) -> None:
    """bad: "loss:3,4" makes the loss of these micro-batches infinite on the last process only, "layer:3,4" the output of a layer. tables: ""
    for a model without, else optim.tables."""
    from lightning.pytorch import Trainer

    from memarch.callbacks import Guard, default_callbacks, latest
    from memarch.callbacks.together import find
    from memarch.data import MQAR
    from memarch.data.module import TokenData
    from memarch.layers import GatedDeltaConfig, PKMConfig, SwiGLUConfig
    from memarch.models.lm import BlockConfig, LMConfig
    from memarch.optim import OptimConfig
    from memarch.task import Task

    torch.set_num_threads(1)
    what, _, when = bad.partition(":")
    sick = [int(number) for number in when.split(",") if number]

    class Spy(Task):
        seen: list[list[int]] = []
        spoil = False

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            time.sleep(0.02)
            self.spoil = index in sick and self.global_rank == self.trainer.world_size - 1
            return super().training_step(batch, index) + (float("inf") if self.spoil and what == "loss" else 0.0)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            self.seen.append(batch.tokens.sum(1).tolist())

    part = BlockConfig(mixer=GatedDeltaConfig(heads=2), ffn=PKMConfig(keys=16, heads=2, topk=4, query_norm="half") if tables else SwiGLUConfig())
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup=2, tables=tables or "dense")  # type: ignore[arg-type]
    task = Spy(LMConfig(vocab_size=64, dim=16, layers=2, pattern="G", parts={"G": part}), optim)
    if tables:
        task.double()  # now: Lightning would do it after a checkpoint's weights are loaded, and round them
    if tables and os.environ.get("LOCAL_RANK", "0") != "0":
        torch.nn.init.zeros_(task.model.core.blocks[0].ffn.values.table)  # the weights of the first process count
    ffn = task.model.core.blocks[1].ffn
    ffn.register_forward_hook(lambda module, args, fed: fed._replace(y=fed.y * float("nan")) if what == "layer" and task.spoil else None)
    data = TokenData(MQAR(vocab_size=64, settings=((16, 2),)), batch_size=4, val_batches=1)
    trainer = Trainer(
        callbacks=default_callbacks(run_dir, save_every=4, patience=3),
        max_steps=steps,
        precision="64-true" if tables else "32-true",
        accumulate_grad_batches=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        log_every_n_steps=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(task, data, ckpt_path=latest(run_dir))
    finally:
        guard = find(trainer, Guard)
        assert guard is not None
        norms = {name: float(p.detach().double().square().sum()) for name, p in task.named_parameters()}
        told = {"seen": Spy.seen, "skipped": guard.skipped, "step": trainer.global_step, "norm": sum(norms.values()), "norms": norms}
        (run_dir / f"process-{trainer.global_rank}.json").write_text(json.dumps(told))


def start(run_dir: Path, devices: int, steps: int = 8, bad: str = "", tables: str = "") -> subprocess.Popen[str]:
    run_dir.mkdir(exist_ok=True)
    command = [sys.executable, __file__, str(run_dir), str(devices), str(steps), bad, tables]
    quiet = {"OMP_NUM_THREADS": "1", "PL_DISABLE_FORK": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, **quiet})


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, said
    return said


def told(run_dir: Path, devices: int) -> list[dict[str, Any]]:
    return [json.loads((run_dir / f"process-{rank}.json").read_text()) for rank in range(devices)]


def test_one_bad_process_is_all_of_them(tmp_path: Path) -> None:
    """The third step's first micro-batch is bad on process 1, in its loss alone: no gradient tells process 0, which must skip the step too."""
    said = finish(start(tmp_path, devices=2, bad="loss:4"))
    first, second = told(tmp_path, 2)
    assert (first["skipped"], second["skipped"], first["step"], second["step"]) == (1, 1, 8, 8)
    assert first["norm"] == second["norm"]
    assert said.count("step 8/8") == 1  # process 1 is silent


def test_the_error_says_where_it_was(tmp_path: Path) -> None:
    said = finish(start(tmp_path, devices=2, bad="layer:4,6,9"), status=1)
    assert "comes out of backbone.blocks.1.ffn (SwiGLU), from finite inputs" in said
    assert "(On process 1.)" in said


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_stops_all_at_one_step(tmp_path: Path, number: int, status: int) -> None:
    process = start(tmp_path, devices=2, steps=200)
    while not list((tmp_path / "checkpoints").glob("*.ckpt")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = finish(process, status)
    first, second = told(tmp_path, 2)
    assert first["step"] == second["step"] < 200
    assert f"Stopped by a signal at step {first['step']}" in said
    finish(start(tmp_path, devices=2, steps=first["step"] + 4))
    whole = tmp_path / "whole"
    finish(start(whole, devices=2, steps=first["step"] + 4))
    assert told(tmp_path, 2)[0]["norm"] == told(whole, 2)[0]["norm"]


def test_another_number_of_processes_sees_the_same_data(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    finish(start(alone, devices=1, steps=8))
    finish(start(both, devices=2, steps=4))
    begun = [a + b for a, b in zip(*(process["seen"] for process in told(both, 2)), strict=True)]
    finish(start(both, devices=1, steps=6))
    begun += told(both, 1)[0]["seen"]
    finish(start(both, devices=2, steps=8))
    begun += [a + b for a, b in zip(*(process["seen"] for process in told(both, 2)), strict=True)]
    whole = told(alone, 1)[0]
    assert begun == whole["seen"]
    assert told(both, 2)[0]["norm"] == pytest.approx(whole["norm"], rel=1e-5)


@pytest.mark.parametrize("tables", ["dense", "lazy"])
def test_tables_learn_the_same_in_any_number_of_processes(tmp_path: Path, tables: str) -> None:
    """Their gradients are not DDP's: each process reads other rows, in two micro-batches. One bad step is skipped, and a run is resumed."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    finish(start(alone, devices=1, steps=8, bad="loss:6", tables=tables))
    finish(start(both, devices=2, steps=4, bad="loss:6", tables=tables))
    finish(start(both, devices=2, steps=8, tables=tables))
    (whole,), (first, second) = told(alone, 1), told(both, 2)
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(whole["norms"], rel=1e-9)
    assert whole["skipped"] == first["skipped"] == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
