"""From one file to runs, and from runs to a table. Training is a fake here, which reads what training reads and writes what it writes; the last
tests run the real thing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from memarch import ConfigError, cli
from memarch.ablation import Runner, execute, load, points, run_plan, table, write
from memarch.evaluation import Table, plots, report

ROOT = Path(__file__).parents[1]
BASE = {
    "preset": "hybrid-tiny",
    "data": {"train": {"kind": "mqar", "settings": [[16, 2]], "filler": "zero"}, "batch_size": 4, "val_batches": 1},
    "optim": {"lr": 1e-3, "warmup": 1},
    "run": {"threads": 1, "flops": False},
    "trainer": {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu"},
}
TASK = {"kind": "mqar", "lengths": [16, 32], "pairs": [2], "examples": 2}


def ablation(folder, name="study", **fields):
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, **fields}, sort_keys=False))
    return file


@pytest.fixture
def fake(monkeypatch):
    """Stands in for the processes. `fake.fails` names what fails; `fake.calls` lists what was asked for."""

    class Fake:
        def __init__(self):
            self.calls, self.fails, self.stops = [], set(), set()

        def __call__(self, runner, words, log, device):
            folder = Path(words[words.index("--config") + 1]).parent if words[0] == "train" else Path(words[1]).parent
            self.calls.append((words[0], folder.name))
            config = yaml.safe_load((folder / "run.yaml").read_text())
            if any(text in folder.name for text in self.stops):
                (folder / "checkpoints").mkdir()
                (folder / "checkpoints" / "step-00000002.ckpt").touch()
                raise KeyboardInterrupt
            if any(text in folder.name for text in self.fails):
                os.write(log, b"Traceback (most recent call last):\n  File x\nRuntimeError: the moon is full\nbye\n")
                return 1, 1.0
            if words[0] == "train":
                assert config["run"]["folder"] == str(folder)
                score = config["optim"]["lr"] * 10 + config["data"]["seed"] / 100
                (folder / "metrics.csv").write_text(f"step,train/loss,val/loss\n2,1.0,\n4,0.5,{score}\n")
                (folder / "export").mkdir(exist_ok=True)
            else:
                task = json.loads(words[words.index("--task") + 1])
                rows = [{"length": n, "pairs": 2, "accuracy": n / 100, "error": None} for n in task["lengths"]]
                out = Path(words[words.index("--out") + 1])
                out.mkdir(exist_ok=True)
                parts = {"gap": tuple({"length": 16, "pairs": 2, "gap": n, "accuracy": 0.0, "recall": n / 10} for n in (4, 8))}
                (out / "mqar.json").write_text(json.dumps(Table("mqar", "accuracy", ("length", "pairs"), tuple(rows), parts).to_dict()))
            return 0, 2.5

    it = Fake()
    monkeypatch.setattr(Runner, "process", lambda self, *args: it(self, *args))
    return it


def go(file, out, *words):
    return cli.main(["ablate", str(file), "--out", str(out), *words])


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# ------------------------------------------------------------------------------------------------ the plan


def test_variants_times_grid_times_seeds(tmp_path):
    plan = load(
        ablation(
            tmp_path, set={"small": {"model.dim": 32}, "base": {}}, grid={"optim.lr": [1e-3, 1e-2], "data.train.settings": [[[16, 2]], [[32, 4]]]}, seeds=[3, 5]
        )
    )
    assert len(plan.runs) == 2 * 2 * 2 * 2 and len({run.name for run in plan.runs}) == 16
    first = plan.runs[0]
    assert first.name.startswith("small-lr=0.001-settings=16_2-seed3-")
    assert first.config["model"]["dim"] == 32 and first.config["optim"]["lr"] == 1e-3
    assert [first.config[key] if isinstance(first.config[key], int) else first.config[key]["seed"] for key in ("seed_everything", "task", "data")] == [3, 3, 3]
    assert plan.runs[1].config["task"]["seed"] == 5
    assert first.parameters < plan.runs[-1].parameters and first.state_bytes > 0


def test_a_set_replaces_the_node_it_names(tmp_path):
    (run,) = load(ablation(tmp_path, set={"plain": {"model.parts.W.mixer": {"kind": "attention", "heads": 4}}})).runs
    assert run.config["model"]["parts"]["W"]["mixer"]["window"] is None  # not the base's 16


def test_the_base_may_be_a_file_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "study.yaml").write_text("base: ../base.yaml\nset: {a: {model.dim: 32}}\n")
    assert load(tmp_path / "deeper" / "study.yaml").runs[0].config["model"]["dim"] == 32


def test_the_digest_is_of_what_decides_numbers(tmp_path):
    def digest(**changes):
        return load(ablation(tmp_path, set={"v": changes})).runs[0].digest

    plain = digest()
    assert digest(**{"run.name": "else", "run.bar": False}) == plain
    assert len({plain, digest(**{"optim.lr": 2e-3}), digest(**{"run.stop_at": 0.5}), digest(**{"trainer.max_steps": 5})}) == 4


BAD = {
    "unknown key": ({"grids": {}}, r"unknown key 'grids'. Did you mean 'grid'\?"),
    "path that names nothing": (
        {"grid": {"model.parts.Q.mixer.heads": [1]}},
        r"grid: path 'model.parts.Q.mixer.heads' names nothing. model.parts: unknown key 'Q'",
    ),
    "leaf that names nothing": ({"set": {"a": {"optim.learning_rate": 1}}}, r"a: optim: unknown key 'learning_rate'"),
    "trainer": ({"set": {"a": {"trainer.max_step": 1}}}, r"a: trainer: unknown key 'max_step'. Did you mean 'max_steps'\?"),
    "task": ({"set": {"a": {"task.cary": True}}}, r"task: unknown key 'cary'. Did you mean 'carry'\?"),
    "group": ({"set": {"a": {"optimiser.lr": 1}}}, r"names nothing. config: unknown key 'optimiser'. Did you mean 'optim'\?"),
    "kind": ({"set": {"a": {"model.parts.M.mixer": {"kind": "gated_dleta"}}}}, r"unknown kind 'gated_dleta'. Did you mean 'gated_delta'\?"),
    "pattern": ({"set": {"a": {"model.pattern": "MX"}}}, r"pattern 'MX': unknown part 'X'"),
    "what only building shows": (
        {"set": {"a": {"model.parts.W.mixer": {"kind": "cross_attention", "heads": 2}, "model.pattern": "WM"}}},
        r"reads the note 'kv'",
    ),
    "empty grid": ({"grid": {"optim.lr": []}}, r"grid.optim.lr is empty"),
    "no seeds": ({"seeds": 0}, r"seeds: at least one"),
    "a seed twice": ({"seeds": [1, 1]}, r"one stands twice"),
    "metric": ({"metric": "accuracy"}, r"must be a column of metrics.csv such as val/loss"),
    "metric task": ({"metric": {"kind": "mqr"}}, r"unknown task 'mqr'. Did you mean 'mqar'\?"),
    "impossible evaluation": ({"metric": {"kind": "mqar", "lengths": [8], "pairs": [16]}}, r"no cell of the grid is possible"),
    "part of a column": ({"part": "gap"}, r"part 'gap' is a part of what a task answers"),
    "part that no task has": ({"metric": {"kind": "age"}, "part": "gap"}, r"part 'gap': age answers in cells only"),
    "part that this task has not": ({"metric": TASK, "part": "position"}, r"part: unknown part 'position'. Allowed: gap"),
    "hint": ({"x": "lenght", "metric": TASK}, r"x: unknown dimension 'lenght'. Did you mean 'length'\?"),
    "no model": ({"base": {"data": BASE["data"]}}, r"'model' is missing"),
    "no data": ({"base": {"preset": "hybrid-tiny"}}, r"data.train is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_everything_wrong_is_said_before_anything_runs(name, tmp_path, fake, capsys):
    fields, message = BAD[name]
    file = ablation(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        load(file)
    assert go(file, tmp_path / "out") == 2 and capsys.readouterr().err.count("\n") == 1
    assert fake.calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_ablation_resolves(file):
    plan = load(file)
    assert len(plan.runs) > 1 and len({run.digest for run in plan.runs}) == len(plan.runs)


def test_print_runs_nothing(tmp_path, fake, capsys):
    assert go(ablation(tmp_path, set={"a": {}, "b": {"optim.lr": 1.0}}), tmp_path / "out", "--print") == 0
    out = capsys.readouterr().out
    assert out.count("to do") == 2 and fake.calls == [] and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ running


def test_rows_table_and_figure(tmp_path, fake, capsys):
    file, out = ablation(tmp_path, set={"a": {}, "b": {}}, grid={"optim.lr": [1e-3, 1e-2]}, seeds=3, x="optim.lr"), tmp_path / "out"
    # Two variants that say the same are the same runs, so they get different names and the same digest.
    assert go(file, out, "--processes", "2") == 0
    rows = rows_of(out / "runs.csv")
    assert len(rows) == 12 and {row["status"] for row in rows} == {"done"}
    assert rows[0].keys() >= {
        "variant",
        "optim.lr",
        "seed",
        "val/loss",
        "train/loss",
        "parameters",
        "state_bytes",
        "cpu_seconds",
        "steps",
        "config",
        "status",
        "error",
    }
    assert [float(row["val/loss"]) for row in rows[:3]] == pytest.approx([0.01, 0.02, 0.03])
    assert rows[0]["steps"] == "4" and float(rows[0]["cpu_seconds"]) == 2.5
    lines = rows_of(out / "table.csv")
    assert len(lines) == 4 and lines[0]["n"] == "3"
    assert float(lines[0]["val/loss"]) == pytest.approx(0.02) and float(lines[0]["val/loss std"]) == pytest.approx(0.01)
    assert (out / "plot.png").is_file()
    assert "0.020 ±.010" in capsys.readouterr().out


def test_a_figure_along_the_bytes_of_state_with_families_as_lines(tmp_path, fake, monkeypatch):
    """A state that grows counts at the longest length asked for; a family is what stands before the slash."""
    seen = {}
    monkeypatch.setattr(plots, "compare", lambda points, **how: seen.update(how, points=list(points)) or plots.Figure())
    attention = {"kind": "attention", "heads": 2}
    sets = {f"window / {n}": {"model.pattern": "WW", "model.parts.W.mixer": {**attention, "window": n}} for n in (4, 8)}
    sets["full"] = {"model.pattern": "WW", "model.parts.W.mixer": attention}
    assert go(ablation(tmp_path, set=sets, seeds=2, metric=TASK, x="state_bytes", group="family"), tmp_path / "out") == 0
    assert (seen["x"], seen["group"]) == ("state", "family")
    assert {point["family"] for point in seen["points"]} == {"window", "full"} and len(seen["points"]) == 3 * 2 * 2
    runs = {row["variant"]: row for row in rows_of(tmp_path / "out" / "runs.csv")}
    for name, at in {"window / 4": 0, "window / 8": 0, "full": 32}.items():
        size = (int(runs[name]["state_bytes"]) + at * int(runs[name]["bytes_per_token"])) / 1024
        assert any(point["state"] == size and point["family"] == name.partition(" / ")[0] for point in seen["points"])
    assert go(ablation(tmp_path, set=sets, x="state_bits"), tmp_path / "out") == 2


def test_what_is_done_is_not_done_again(tmp_path, fake):
    file, out = ablation(tmp_path, seeds=2), tmp_path / "out"
    assert go(file, out) == 0 and len(fake.calls) == 2
    assert go(file, out) == 0 and len(fake.calls) == 2
    ablation(tmp_path, seeds=3)
    assert go(file, out) == 0 and len(fake.calls) == 3
    ablation(tmp_path, seeds=3, set={"base": {"optim.lr": 5e-3}})  # another config is another run
    assert go(file, out) == 0 and len(fake.calls) == 6
    ablation(tmp_path, seeds=3)  # and the old ones are still there
    assert go(file, out) == 0 and len(fake.calls) == 6


def test_another_metric_asks_the_trained_model_again(tmp_path, fake):
    file, out = ablation(tmp_path), tmp_path / "out"
    go(file, out)
    ablation(tmp_path, metric=TASK)
    assert go(file, out) == 0
    assert [what for what, _ in fake.calls] == ["train", "evaluate"]
    (row,) = rows_of(out / "runs.csv")
    assert float(row["accuracy, length 32"]) == 0.32 and float(row["mqar"]) == pytest.approx(0.24) and float(row["cpu_seconds"]) == 5.0


def test_a_part_of_the_answer(tmp_path, fake):
    """The same trained model is asked; the cells are those of the part, and the figure's axis is theirs."""
    out = tmp_path / "out"
    go(ablation(tmp_path, metric=TASK), out)
    file = ablation(tmp_path, metric=TASK, part="gap.recall", x="gap")
    assert go(file, out) == 0 and [what for what, _ in fake.calls] == ["train", "evaluate", "evaluate"]
    (row,) = rows_of(out / "runs.csv")
    assert float(row["recall, gap 4"]) == 0.4 and float(row["recall, gap 8"]) == 0.8 and float(row["mqar"]) == pytest.approx(0.6)
    ablation(tmp_path, metric=TASK, part="gap.recal")
    assert go(file, out) == 1 and "mqar answered no recal by gap" in rows_of(out / "runs.csv")[0]["error"]


def test_a_failure_is_a_row_and_is_tried_again(tmp_path, fake, capsys):
    file, out = ablation(tmp_path, set={"good": {}, "bad": {"optim.lr": 2e-3}}, seeds=2), tmp_path / "out"
    fake.fails = {"bad"}
    assert go(file, out) == 1
    assert {(row["variant"], row["status"], row["error"]) for row in rows_of(out / "runs.csv")} == {
        ("good", "done", ""),
        ("bad", "failed", "RuntimeError: the moon is full"),
    }
    assert "failed: variant bad, seed 0: RuntimeError: the moon is full" in capsys.readouterr().out
    fake.fails, before = set(), len(fake.calls)
    assert go(file, out) == 0 and len(fake.calls) == before + 2
    assert {row["status"] for row in rows_of(out / "runs.csv")} == {"done"}
    assert float(rows_of(out / "runs.csv")[-1]["cpu_seconds"]) == 3.5  # the failed try included


def test_missing_files_are_this_run_s_failure(tmp_path, fake):
    file = ablation(tmp_path, metric="val/acuracy")
    assert go(file, tmp_path / "out") == 1
    assert rows_of(tmp_path / "out" / "runs.csv")[0]["error"] == "metrics.csv has no 'val/acuracy'; it has train/loss, val/loss"


def test_an_interrupt_stops_all_and_is_gone_on_from(tmp_path, fake):
    file, out = ablation(tmp_path, seeds=3), tmp_path / "out"
    fake.stops = {"seed1"}
    assert go(file, out) == 130
    plan = load(file)
    runner = Runner(plan, out)
    first, second, third = (runner.status(run) for run in plan.runs)
    assert (first, second) == ("done", "stopped") and third != "done"
    fake.stops = set()
    assert go(file, out) == 0 and [runner.status(run) for run in plan.runs] == ["done"] * 3


def test_half_a_result_file_is_no_result(tmp_path, fake):
    plan = load(ablation(tmp_path))
    run_plan(plan, tmp_path)
    result = tmp_path / "runs" / plan.runs[0].name / "result.json"
    result.write_text(result.read_text()[:40])
    assert Runner(plan, tmp_path).status(plan.runs[0]) == "to do"
    assert run_plan(plan, tmp_path)[0]["status"] == "done"


def test_two_commands_do_not_do_one_run_twice(tmp_path, fake, capsys):
    plan = load(ablation(tmp_path))
    folder = tmp_path / "runs" / plan.runs[0].name
    folder.mkdir(parents=True)
    with execute.lock(folder / ".lock") as mine:
        assert mine
        assert run_plan(plan, tmp_path) == [] and fake.calls == []
    assert run_plan(plan, tmp_path)[0]["status"] == "done"


def test_only_some(tmp_path, fake, capsys):
    file, out = ablation(tmp_path, set={"wide one": {"model.dim": 96}, "narrow": {"model.dim": 32}}, seeds=2), tmp_path / "out"
    assert go(file, out, "--only", "wide one") == 0 and len(fake.calls) == 2 and not (out / "table.csv").exists()
    assert go(file, out, "--only", "narrow-seed1*") == 0 and len(fake.calls) == 3
    assert go(file, out, "--only", "narow") == 2
    assert "Did you mean 'narrow'?" in capsys.readouterr().err


def test_the_job_array_does_what_the_command_would(tmp_path, fake, capsys):
    file, out = ablation(tmp_path, seeds=2), tmp_path / "out"
    script = tmp_path / "jobs.sh"
    go(file, out, "--only", "*seed0*")
    assert go(file, out, "--slurm", str(script)) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-0" in text and "seed1" in text and "seed0" not in text
    # the shell sees the words it should: memarch itself is replaced by echo
    text = text.replace(f"exec {sys.executable} -m memarch", "echo")
    said = subprocess.run(["bash", "-c", text], env={"SLURM_ARRAY_TASK_ID": "0", "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    assert said.stdout.split()[:2] == ["ablate", str(file)] and "--only base-seed1-" in said.stdout


def test_time_to_go_follows_the_steps(tmp_path, fake):
    plan = load(ablation(tmp_path))
    runner = Runner(plan, tmp_path)
    assert runner.share(plan.runs[0]) == 0
    folder = tmp_path / "runs" / plan.runs[0].name
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,train/loss\n2,1.0\n")
    assert runner.share(plan.runs[0]) == 0.5


# ------------------------------------------------------------------------------------------------ results


def test_points_keep_what_varies(tmp_path, fake):
    plan = load(ablation(tmp_path, set={"a": {}, "b": {"optim.lr": 2e-3}}, seeds=2, metric=TASK))
    rows = run_plan(plan, tmp_path)
    found = points(plan, rows)
    assert len(found) == 2 * 2 * 2 and found[0].keys() == {"variant", "length", "value"}
    line = table(plan, rows)[0]
    assert line["variant"] == "a" and line["n"] == 2 and line["accuracy, length 16"] == 0.16 and line["mqar std"] == 0
    assert {file.name for file in write(plan, rows, tmp_path, pdf=True)} == {"runs.csv", "table.csv", "plot.png", "plot.pdf"}


def test_one_seed_has_no_spread(tmp_path, fake):
    plan = load(ablation(tmp_path))
    (line,) = table(plan, run_plan(plan, tmp_path))
    assert line["n"] == 1 and line["val/loss std"] is None and "variant" not in line


# ------------------------------------------------------------------------------------------------ the real thing


def test_a_real_run_from_file_to_figure(tmp_path, capsys):
    file, out = ablation(tmp_path, metric=TASK), tmp_path / "out"
    assert go(file, out) == 0, (rows_of(out / "runs.csv"), next(out.glob("runs/*/log.txt")).read_text())
    (row,) = rows_of(out / "runs.csv")
    folder = out / "runs" / row["run"]
    model = report.read(folder / "evaluation" / "mqar.json")
    assert row["steps"] == "4" and row["status"] == "done" and float(row["mqar"]) == model.mean()
    assert float(row["cpu_seconds"]) > 0 and int(row["parameters"]) == model.about["parameters"]
    assert (folder / "export" / "model.safetensors").is_file() and (out / "plot.png").is_file()


@pytest.mark.slow
def test_a_killed_ablation_ends_as_one_that_was_not(tmp_path):
    """SIGTERM in the middle of a run; the second command goes on from its checkpoint and ends with the numbers of an undisturbed one."""
    long = {**BASE, "trainer": {**BASE["trainer"], "max_steps": 300, "val_check_interval": 50}}
    file = ablation(tmp_path, base=long)
    words = [sys.executable, "-m", "memarch", "ablate", str(file), "--out"]
    child = subprocess.Popen([*words, str(tmp_path / "killed")])
    metrics = tmp_path / "killed" / "runs" / load(file).runs[0].name / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130
    assert list(metrics.parent.glob("checkpoints/*.ckpt")) and not (metrics.parent / "export").exists()
    subprocess.run([*words, str(tmp_path / "killed")], check=True)
    subprocess.run([*words, str(tmp_path / "whole")], check=True)
    killed, whole = (rows_of(tmp_path / name / "runs.csv")[0] for name in ("killed", "whole"))
    assert killed["steps"] == whole["steps"] == "300" and killed["val/loss"] == whole["val/loss"]


@pytest.mark.slow
def test_a_run_that_blows_up_does_not_stop_the_others(tmp_path):
    file = ablation(tmp_path, set={"good": {}, "bad": {"optim.lr": 1e30, "trainer.max_steps": 30}})
    assert go(file, tmp_path / "out", "--processes", "2") == 1
    found = {row["variant"]: row for row in rows_of(tmp_path / "out" / "runs.csv")}
    assert found["good"]["status"] == "done" and found["bad"]["status"] == "failed" and "not finite" in found["bad"]["error"]
