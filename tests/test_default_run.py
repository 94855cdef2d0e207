"""The default run: five seeds learn, the memory is what does it, and it costs seconds."""

import time

import pytest

from memarch.evaluation import evaluate
from memarch.training import main

QUIET = ["--run.bar", "false", "--trainer.enable_progress_bar", "false", "--run.export", "false"]


def trained(folder, *flags):
    begin = time.process_time()
    run = main(["fit", "--run.root", str(folder), *QUIET, *flags])
    table = evaluate(run.task.model, "mqar", lengths=(64, 1024), pairs=(8,), filler="zero", examples=500)
    return table.value(length=64), table.value(length=1024), time.process_time() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_five_seeds_learn_and_the_memory_is_what_does_it(seed, tmp_path):
    short, long, seconds = trained(tmp_path, "--seed", str(seed))
    assert min(short, long) >= 0.98, f"recall {short:.3f} at 64, {long:.3f} at 1024"
    assert seconds <= 60
    short, long, _ = trained(tmp_path, "--seed", str(seed), "--model.pattern", "WW")
    assert max(short, long) < 0.3, f"without memory: {short:.3f} at 64, {long:.3f} at 1024"
