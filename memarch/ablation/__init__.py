"""Variants x grid x seeds from one file: plan.py resolves all runs, execute.py runs what is not done, results.py makes table and figure.

from memarch.ablation import load, run_plan, write
plan = load("configs/ablations/recall_memory.yaml")
rows = run_plan(plan, out, processes=2)
write(plan, rows, out)
"""

from memarch.ablation.execute import Runner, run_plan
from memarch.ablation.plan import AblationConfig, Plan, Run, load
from memarch.ablation.results import points, shown, summary, table, write

__all__ = ["AblationConfig", "Plan", "Run", "Runner", "load", "points", "run_plan", "shown", "summary", "table", "write"]
