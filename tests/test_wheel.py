"""The package as a user gets it: a wheel, in a fresh environment, without the checkout."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*words, cwd):
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_a_wheel_works_in_a_fresh_environment(tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    memarch = tmp_path / "env" / "bin" / "memarch"
    where = run(python, "-c", "import memarch; print(memarch.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where
    assert "hybrid-tiny" in run(memarch, "list", cwd=tmp_path)
    run(memarch, "doctor", cwd=tmp_path)
    run(memarch, "train", "--trainer.max_steps", "20", "--run.root", tmp_path / "runs", cwd=tmp_path)
    (export,) = (tmp_path / "runs").glob("*/*/export")
    run(memarch, "evaluate", export, "--task", "mqar", "--lengths", "32", "--pairs", "4", "--examples", "8", "--out", tmp_path / "answers", cwd=tmp_path)
    assert list((tmp_path / "answers").glob("*.png"))
