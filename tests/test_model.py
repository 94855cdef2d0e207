"""The language model around the backbone: packing, losses, aux, branches, init, errors."""

import subprocess
import sys

import pytest
import torch

import zoo
from memarch import LM, LMConfig, create_model, decode, list_models
from memarch import state as states
from memarch.contracts import EMPTY, Fed
from memarch.kernels.attention import attention
from memarch.layers import attention as attention_module
from memarch.layers.swiglu import SwiGLU
from memarch.models import lm as lm_module
from zoo import close, same_state

TINY = list_models("*-tiny")
SWIGLU = {"kind": "swiglu", "hidden": 24}


def ids(model, batch, length, seed=0):
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TINY)
def test_law_5_packed_documents_at_the_model(name):
    model = create_model(name).double()
    x = ids(model, 2, 90)
    starts = torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [10, 40]] = True
    starts[1, [0, 3]] = True
    first = model(ids(model, 2, 20, 1))
    out = model(x, first.state, starts=starts)
    alone = model(x[:1, :10], states.take(first.state, torch.tensor([0])))
    close(out.logits[:1, :10], alone.logits, "the continued document")
    close(out.logits[:1, 10:40], model(x[:1, 10:40]).logits, "a document in the middle")
    close(out.logits[1:, :3], model(x[1:, :3]).logits, "a fresh document at position 0")
    close(out.logits[1:, 3:], model(x[1:, 3:]).logits, "the last document")
    same_state(states.take(out.state, torch.tensor([1])), model(x[1:, 3:]).state, "the last document's")
    changed = x.clone()
    changed[0, 10:40] = (changed[0, 10:40] + 1) % 256
    close(model(changed, first.state, starts=starts).logits[0, 40:], out.logits[0, 40:], "nothing leaks across a start", 1e-12)


@pytest.mark.parametrize("name", TINY)
def test_law_8_aux_reaches_the_output(name, monkeypatch):
    """Every scalar that any layer answers arrives at the model's output, through blocks, wrappers, packing and recomputation."""
    model = create_model(name)
    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: Fed(plain(self, x).y, {"loss/extra": x.square().mean(), "gauge": x.mean().detach()}))
    x = ids(model, 2, 40)
    swiglus = [n.removeprefix("backbone.") for n, m in model.named_modules() if isinstance(m, SwiGLU)]
    inner = [n.removeprefix("inner.") for n in swiglus]
    assert swiglus
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 7] = True
    for label, out in {"plain": model(x), "streamed": model(x, model.start(2)), "packed": model(x, starts=starts), "loss": model.loss(x, x)}.items():
        for name in inner:
            assert f"loss/{name}.extra" in out.aux, f"{label}: {sorted(out.aux)}"
            assert f"{name}.gauge" in out.aux, label
            assert out.aux[f"loss/{name}.extra"].requires_grad and not out.aux[f"{name}.gauge"].requires_grad
    model.core.recompute = True
    again = model(x)
    assert torch.equal(again.aux[f"loss/{inner[0]}.extra"], model(x).aux[f"loss/{inner[0]}.extra"])


@pytest.mark.parametrize("name", TINY)
def test_aux_of_a_stream_is_that_of_the_whole(name, monkeypatch):
    """A segment wrapper runs some pieces that hold no token of a row; they must not count in the mean."""
    plain = SwiGLU.forward
    monkeypatch.setattr(SwiGLU, "forward", lambda self, x: Fed(plain(self, x).y, {"loss/extra": x.abs().mean()}))
    model = create_model(name).double()
    x = ids(model, 2, 10)
    whole, streamed = model(x).aux, model(x, model.start(2)).aux
    assert whole.keys() == streamed.keys()
    for key in whole:
        close(streamed[key], whole[key], key)


@pytest.mark.parametrize("name", TINY)
def test_recomputation_changes_no_gradient(name):
    a, b = create_model(name).double(), create_model(name).double()
    b.core.recompute = True
    x = ids(a, 2, 50)
    for model in (a, b):
        model.loss(x[:, :-1], x[:, 1:]).loss.backward()
    for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        close(p.grad, q.grad, key, 1e-12)


ACROSS = [{"reads": 0, "adds": 7, "layer": SWIGLU}, {"reads": 5, "adds": 6, "layer": SWIGLU}, {"reads": 2, "adds": 5, "layer": SWIGLU}]
PREFILLED = {name: lambda name=name: create_model(name) for name in TINY}
PREFILLED |= {f"stack-{seed}": lambda seed=seed: LM(zoo.stack(seed)) for seed in range(zoo.STACKS)}
PREFILLED["branches past the last memory"] = lambda: create_model("sambay-tiny", branches=ACROSS)
PREFILLED["no memory at all"] = lambda: create_model("transformer-tiny", set={"parts.M.mixer": None})


@pytest.mark.parametrize("name", PREFILLED)
def test_a_prefill_is_the_last_row_of_forward(name):
    model = zoo.noisy(PREFILLED[name]())
    first, more = ids(model, 3, 40), ids(model, 3, 23, 1)
    lengths, state = torch.tensor([23, 0, 9]), None
    for x, given in ((first, None), (more, None), (first, torch.tensor([40, 7, 1])), (more, lengths)):
        whole, found = model(x, state, lengths=given), model.prefill(x, state, lengths=given)
        assert found.logits.shape == (3, 1, model.config.vocab_size)
        same_state(found.state, whole.state, "state", 1e-12)
        for b, n in enumerate([x.shape[1]] * 3 if given is None else given.tolist()):
            if n:
                close(found.logits[b, 0], whole.logits[b, n - 1], f"row {b}")
        state = whole.state  # in the last turn rows stand at different places


@pytest.mark.parametrize("name, full", [("sambay-tiny", 5), ("yoco-tiny", 1), ("transformer-tiny", 1)])
def test_what_lies_above_the_last_memory_runs_for_one_token(name, full):
    """`full`: how many feed-forwards see the whole prompt. Mixers above the last memory, and the head, see one token a row."""
    model = create_model(name)
    blocks, seen = model.core.blocks, []
    for i, block in enumerate(blocks):
        block.norm1.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, "mixer", args[0].shape[1])))
        block.ffn.register_forward_pre_hook(lambda _, args, i=i: seen.append((i, "ffn", args[0].shape[1])))
    model.head.register_forward_pre_hook(lambda _, args: seen.append((len(blocks), "head", args[0].shape[1])))
    model.prefill(ids(model, 2, 30), lengths=torch.tensor([30, 12]))
    layers = [(i, kind) for i in range(len(blocks)) for kind in ("mixer", "ffn")] + [(len(blocks), "head")]
    assert seen == [(i, kind, 30 if i < full or (i == full and kind == "mixer") else 1) for i, kind in layers]


def test_the_last_attention_asks_for_one_token(monkeypatch):
    """Two windows over the whole prompt, and one query to all keys: the time of a prefill is linear."""
    model, asked = create_model("sambay-tiny"), []
    monkeypatch.setattr(attention_module, "attention", lambda q, *args, **more: asked.append(q.shape[1]) or attention(q, *args, **more))
    model.prefill(ids(model, 2, 30))
    assert asked == [30, 30, 1]


def test_the_loss_in_pieces_equals_the_loss_at_once(monkeypatch):
    model = create_model("hybrid-tiny", vocab_size=97).double()
    x, y = ids(model, 3, 700), ids(model, 3, 700, 1)
    y[0, :100] = -100
    whole = model.loss(x, y)
    whole.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(lm_module, "LOGITS", 97 * 256)
    pieces = model.loss(x, y)
    pieces.loss.backward()
    close(pieces.loss, whole.loss, "loss")
    assert pieces.correct == whole.correct and pieces.count == whole.count == 2000
    close(torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten(), reduction="sum"), whole.loss, "against torch")
    for p, g in zip(model.parameters(), grads, strict=True):
        close(p.grad, g, "gradient")


@pytest.mark.slow
def test_a_long_batch_never_holds_all_its_logits():
    """64k tokens x 50k words would be 13 GB of logits and as much again for their gradient."""
    code = """
import resource, torch
from memarch import create_model
torch.set_num_threads(2)
m = create_model("short-conv-tiny", vocab_size=50304, dim=32, layers=1)
x = torch.randint(0, 50304, (1, 65536))
m.loss(x, x).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < 2500, f"{peak} MiB"


def test_a_branch_reads_below_and_adds_above():
    parts = {"A": {"mixer": {"kind": "short_conv"}, "ffn": SWIGLU}, "B": {"mixer": {"kind": "short_conv"}}}
    data = {"vocab_size": 11, "dim": 16, "layers": 3, "pattern": "ABB", "parts": parts}
    plain = LM(decode(LMConfig, data))
    model = LM(decode(LMConfig, {**data, "branches": [{"reads": 0, "adds": 1, "layer": SWIGLU}], "trace": True}))
    model.load_state_dict({**plain.state_dict(), **{k: v for k, v in model.state_dict().items() if "branches" in k}})
    x = ids(model, 1, 5)
    h = model.features(x)
    before, after = h.note["trace"][0], h.note["trace"][1]
    block = model.core.blocks[0]
    mixed = model.embed(x) + block.mixer(block.norm1(model.embed(x))).y
    expected = model.core.blocks[1](before, None, EMPTY, None)[0].y + model.core.branches[0](block.norm2(mixed)).y
    close(after, expected, "after block 1", 1e-6)


def test_models_with_one_seed_are_equal_and_the_global_generator_does_not_matter():
    a = create_model("hybrid-tiny", seed=5)
    torch.manual_seed(99)
    b = create_model("hybrid-tiny", seed=5)
    c = create_model("hybrid-tiny", seed=6)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_materialising_a_meta_model_gives_the_seeds_weights():
    model = create_model("hybrid-tiny", device="meta").to_empty(device="cpu")
    model.retie()
    zoo.initialise(model, model.config.layers, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), create_model("hybrid-tiny", seed=0).parameters(), strict=True))


def test_continuous_inputs_and_outputs():
    parts = {"A": {"mixer": {"kind": "gated_delta", "heads": 2}, "ffn": SWIGLU}}
    config = decode(LMConfig, {"dim": 16, "layers": 1, "parts": parts, "tie": False, "embed": "linear", "inputs": 3, "head": "regression", "outputs": 2})
    model = LM(config)
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    x, y = torch.randn(2, 9, 3), torch.randn(2, 9, 2)
    out = model.loss(x, y, lengths=torch.tensor([9, 4]))
    wanted = (model(x[:1]).logits - y[:1]).square().mean(-1).sum() + (model(x[1:, :4]).logits - y[1:, :4]).square().mean(-1).sum()
    close(out.loss, wanted, "sum of squared errors", 1e-5)
    assert out.count == 13


def test_states_move_reshape_and_weigh():
    model = create_model("hybrid-tiny")
    state = model(ids(model, 3, 20)).state
    assert states.rows(state) == 3
    assert states.nbytes(state) == sum(t.numel() * t.element_size() for _, t in states.leaves(state))
    half = states.to(state, torch.bfloat16)
    assert {t.dtype for _, t in states.leaves(half)} == {torch.bfloat16, torch.int64}
    assert not any(t.requires_grad for _, t in states.leaves(states.detach(state)))
    assert any(t.requires_grad for _, t in states.leaves(state)), "a state is differentiable"


def test_a_saved_state_is_the_same_bytes_every_time(tmp_path):
    model = create_model("hybrid-tiny")
    state = model(ids(model, 2, 20)).state
    files = [tmp_path / f"{i}" for i in range(8)]
    for file in files:
        states.save(state, file, model)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("name", TINY)
def test_bf16_runs_and_keeps_its_recurrence_wide(name):
    model = create_model(name, dtype=torch.bfloat16)
    x = ids(model, 2, 70)
    out = model(x)
    out = model(x, out.state)
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    for path, leaf in states.leaves(out.state):
        if path.endswith("memory"):
            assert leaf.dtype == torch.float32, f"{path}: a recurrence in bf16 forgets what it adds up"
    whole = create_model(name)
    with torch.autocast("cpu", torch.bfloat16):
        streamed = whole(x, whole(x).state)
        streamed = whole(x, streamed.state)
    assert streamed.logits.isfinite().all()


def test_importing_is_light():
    """memarch costs torch and little else; the heavy friends come when they are called."""
    code = """
import sys, time, torch
begin = time.perf_counter()
import memarch
print(time.perf_counter() - begin, [m for m in ("lightning", "triton", "transformers", "matplotlib", "huggingface_hub") if m in sys.modules])
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1) for _ in range(2)]
    assert runs[0][1].strip() == "[]", runs[0][1]
    assert min(float(r[0]) for r in runs) < 2.0
