"""Do the laws catch what they are for? Each mutation is a one-line flaw of the kind that real code has had; a copy of the package gets it,
the tests run, and the table says which law noticed.

    python tests/mutations.py            all of them, with the table
    python tests/mutations.py 3 5        only these
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    flaw: str
    file: str
    old: str
    new: str
    tests: str  # what is run: the laws that see this file, so that a run takes seconds


LAWS, TABLES, MODEL = "tests/test_laws.py", "tests/test_tables.py", "tests/test_model.py"
GD, AT, LM = "memarch/layers/parts/recurrent.py", "memarch/layers/attention.py", "memarch/models/lm.py"
TITANS = "tests/test_layer_titans.py"
HEADS, BUCKETS = "memarch/layers/parts/heads.py", "memarch/layers/parts/buckets.py"

MUTATIONS = [
    Mutation(
        "drop the state when several tokens arrive",
        GD,
        "memory, tail = (None, None) if state is None else state",
        "memory, tail = (None, None) if state is None or x.shape[1] > 1 else state",
        LAWS,
    ),
    Mutation(
        "detach the state inside",
        GD,
        "return Mixed(self.read(o, x), RecurrentState(memory, tail))",
        "return Mixed(self.read(o, x), RecurrentState(memory.detach(), tail))",
        LAWS,
    ),
    Mutation(
        "a window one key too wide when streaming",
        AT,
        "kept = size if cfg.window is None else cfg.window - 1",
        "kept = size if cfg.window is None else cfg.window - 2 if cfg.window > 2 else cfg.window - 1",
        LAWS,
    ),
    Mutation(
        "a mask that shows one token of the future",
        "memarch/layers/short_conv.py",
        "y, tail = self.conv(b * v,",
        "y, tail = self.conv(b * v.roll(-1, 1),",
        LAWS,
    ),
    Mutation(
        "forget the carried decay",
        "memarch/layers/gated_delta.py",
        "return delta_rule(l2_norm(q, self.key**-0.5), l2_norm(k), v, b.sigmoid(), g, memory,",
        "g = g * (torch.arange(g.shape[1]) > 0)[:, None]\n        return delta_rule(l2_norm(q, self.key**-0.5), l2_norm(k), v, b.sigmoid(), g, memory,",
        LAWS,
    ),
    Mutation("drop aux in a block", LM, 'aux |= under("ffn", fed.aux)', "pass", MODEL),
    Mutation("miscount parameters", "memarch/layers/swiglu.py", "return 3 * dim * self.width(dim)", "return 3 * dim * self.width(dim) + 1", TABLES),
    Mutation(
        "share a table between instances",
        "memarch/layers/parts/pool.py",
        "        return ValuePool(rows, width)\n",
        "        return SHARED.setdefault((rows, width), ValuePool(rows, width))\n",
        TABLES,
    ),
    Mutation(
        "leak across a document's start",
        "memarch/models/packing.py",
        "given = states.select(docs.fresh[index],",
        "given = states.select(docs.fresh[index] & (begin > 4),",
        MODEL,
    ),
    Mutation(
        "change the state that was given",
        GD,
        "        q, k, v, tail = self.into(x, tail, lengths)  # [B, T, H, K or V]\n",
        "        if isinstance(memory, Tensor):\n            memory.data.mul_(0.5)\n        q, k, v, tail = self.into(x, tail, lengths)\n",
        LAWS,
    ),
    Mutation("mix rows", HEADS, "o = self.norm(o).flatten(2)  # [B, T, H V]", "o = self.norm(o + 1e-3 * o.mean(0, keepdim=True)).flatten(2)", LAWS),
    Mutation("pads enter the history", AT, "newest(k, kept, lengths, T).to(dtype)", "newest(k, kept, None, T).to(dtype)", LAWS),
    Mutation(
        "positions restart in every call",
        AT,
        "seen = state.pos + (T if lengths is None else lengths)",
        "seen = state.pos * 0 + (T if lengths is None else lengths)",
        LAWS,
    ),
    Mutation(
        "a state that keeps the whole buffer alive", "memarch/layers/parts/history.py", "return rows[:, size - n :].clone()", "return rows[:, size - n :]", LAWS
    ),
    Mutation(
        "a segment that closes one token late",
        "memarch/layers/parts/segment.py",
        "take = torch.minimum(self.size - place, left - done).clamp(min=0)  # [B]",
        "take = torch.minimum(self.size + 1 - place, left - done).clamp(min=0)",
        LAWS,
    ),
    Mutation(
        "what the memory knows of the next token",
        "memarch/layers/titans_mac.py",
        "seen.repeat_interleave(2, -1)",
        "torch.stack([seen | seen.roll(1, -1), seen], -1).flatten(-2)",
        TITANS,
    ),
    Mutation(
        "a memory that forgets its place in a chunk",
        "memarch/layers/titans_mac.py",
        "memory = state.memory if state.k.shape[1] else aligned(state.memory)",
        "memory = aligned(state.memory)",
        TITANS,
    ),
    Mutation(
        "a parameter that nothing reads",
        HEADS,
        "        o = self.norm(o).flatten(2)  # [B, T, H V]",
        "        o = torch.nn.functional.rms_norm(o, o.shape[-1:]).flatten(2)",
        LAWS,
    ),
    Mutation(
        "an init that draws from the global generator",
        "memarch/layers/parts/linear.py",
        "normal_(mean, std, generator=generator))",
        "normal_(mean, std))",
        LAWS,
    ),
    Mutation(
        "a channel mixer that looks at the whole row",
        "memarch/layers/swiglu.py",
        "return Fed(self.down(F.silu(gate) * up))",
        "return Fed(self.down(F.silu(gate - 1e-3 * gate.mean(1, keepdim=True)) * up))",
        TABLES,
    ),
    Mutation(
        "shuffle tokens inside a bucket",
        BUCKETS,
        "order = key.argsort(dim=1, stable=True)",
        "order = (key + 0.9 * torch.rand(key.shape)).argsort(dim=1)",
        LAWS,
    ),
    Mutation(
        "a bucket reads on into the next one",
        BUCKETS,
        "groups.append(Group(some, count, width, length.flatten()))",
        "groups.append(Group(some, count, width, (length + (length > 0)).clamp(max=width).flatten()))",
        LAWS,
    ),
    Mutation(
        "a memory that was not chosen decays",
        "memarch/layers/mom.py",
        "        new = old.clone()\n",
        "        new = old * 0.999\n",
        LAWS,
    ),
    Mutation(
        "a span adds the wrong total of its other half",
        "memarch/kernels/gated_linear/torch_impl.py",
        "        R1 += P2[:, :, -1:]\n",
        "        R1 += P2[:, :, :1]\n",
        "tests/test_kernels_ops.py",
    ),
    Mutation(
        "a window of a shared table that begins one row late",
        "memarch/layers/parts/pool.py",
        "return at % self.rows",
        "return (at + 1) % self.rows",
        "tests/test_pool.py",
    ),
    Mutation(
        "a second moment of the sum, not the mean, of a row",
        "memarch/kernels/row_adam/__init__.py",
        "square.mean(1, keepdim=True)",
        "square.sum(1, keepdim=True)",
        "tests/test_optim_tables.py",
    ),
    Mutation("usage that never begins again", "memarch/layers/parts/usage.py", "self.mass.zero_()", "pass", "tests/test_gauges.py"),
    Mutation(
        "values without their pre-values",
        "memarch/layers/ultramem_v2.py",
        "found.own * p[..., None]",
        "found.own",
        "tests/test_layer_ultramem_v2.py",
    ),
    Mutation(
        "a lazy gradient that is not made unique",
        "memarch/kernels/weighted_bag/operator.py",
        "if not grad.is_coalesced() and not bool((rows[1:] > rows[:-1]).all()):",
        "if False:",
        "tests/test_optim_tables.py",
    ),
]


def plant(m: Mutation, root: Path) -> None:
    path = root / m.file
    text = path.read_text()
    if text.count(m.old) < 1:
        raise SystemExit(f"{m.file} no longer holds the line that this mutation changes: {m.old!r}. Bring tests/mutations.py up to date.")
    text = text.replace(m.old, m.new, 1)
    path.write_text(text + ("\nSHARED: dict = {}\n" if "SHARED" in m.new else ""))


def caught_by(m: Mutation) -> list[str]:
    """The tests that fail on a copy of the package with the flaw in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("memarch", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        plant(m, copy)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=3", "-p", "no:cacheprovider", m.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        return sorted(set(re.findall(r"^FAILED \S+::(\w+)", run.stdout, re.MULTILINE)) or set(re.findall(r"^(ERROR .*)", run.stdout, re.MULTILINE)))


def main(chosen: list[int]) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "flaw", "where", "caught by")
    missed = 0
    for i in chosen:
        m = MUTATIONS[i]
        found = caught_by(m)
        missed += not found
        table.add_row(str(i), m.flaw, m.file.removeprefix("memarch/"), "\n".join(found) or "[bold red]nobody[/]")
        print(f"{i}: {m.flaw}: {', '.join(found) or 'NOT CAUGHT'}", flush=True)
    Console(width=140).print(table)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]] or list(range(len(MUTATIONS)))))
