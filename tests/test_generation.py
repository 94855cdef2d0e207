"""Generation: together as alone, in pieces as whole, here as in another process."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from memarch import LM, create_model, from_pretrained, list_models
from memarch import state as states
from memarch.generation import Sampler, _decoded, decode_text, encode_text, generate, generate_text

TINY = [name for name in list_models("*-tiny") if create_model(name, device="meta").config.embed == "tokens"]
SAMPLED = {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "seed": 7}
PROMPTS = [[3], [5, 8, 13, 21, 34, 55, 89], list(range(100, 150)), [9] * 20]  # one token; shorter than every window; longer than every segment


@cache
def model(name: str = "hybrid-tiny") -> LM:
    """In float64, where no rounding can tip a choice, and with noise, so that every parameter matters. In training mode, as after training."""
    made = create_model(name).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return made


def same(a, b) -> bool:
    """Equal states, by value: a history may have got more zeros on its left."""
    pairs = [states.level(x, y) for (_, x), (_, y) in zip(states.leaves(a), states.leaves(b), strict=True)]
    return all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in pairs)


# ------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", TINY)
def test_together_is_alone(name, how):
    together = generate(model(name), PROMPTS, max_new_tokens=9, **how)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model(name), [prompt], max_new_tokens=9, **how)
        assert alone.tokens[0] == together.tokens[i]
        assert alone.seeds[0] == together.seeds[i]
        assert same(alone.state, states.take(together.state, torch.tensor([i])))


@pytest.mark.parametrize("name", TINY)
def test_going_on_is_one_call(name):
    whole = generate(model(name), PROMPTS, max_new_tokens=11, **SAMPLED)
    first = generate(model(name), PROMPTS, max_new_tokens=4, **SAMPLED)
    rest = generate(model(name), first.unread, state=first.state, max_new_tokens=7, **{**SAMPLED, "seed": first.seeds})
    assert [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)] == whole.tokens
    assert rest.seeds == whole.seeds
    assert same(rest.state, whole.state)


@pytest.mark.parametrize("name", TINY)
def test_chunks_of_a_prompt_change_nothing(name):
    whole = generate(model(name), PROMPTS, max_new_tokens=6, **SAMPLED)
    for chunk in (1, 7, 32):
        assert generate(model(name), PROMPTS, max_new_tokens=6, chunk=chunk, **SAMPLED).tokens == whole.tokens


def test_the_state_is_what_the_model_makes_of_the_same_tokens():
    out = generate(model(), [PROMPTS[1]], max_new_tokens=5)
    with torch.no_grad():
        read = model()(torch.tensor([PROMPTS[1] + out.tokens[0][:-1]]))
    assert same(out.state, read.state)
    assert read.logits[0, -1].argmax() == out.tokens[0][-1]


OTHER_PROCESS = """
import json, sys, torch
from memarch import create_model, state
from memarch.generation import generate
torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
model = create_model("hybrid-tiny", seed=3)
out = generate(model, job["unread"], state=state.load(job["state"], model), seed=job["seeds"], **job["how"])
json.dump(out.tokens, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_a_saved_state_goes_on_in_another_process(tmp_path, how):
    here = create_model("hybrid-tiny", seed=3)
    whole = generate(here, PROMPTS, max_new_tokens=12, seed=5, **how)
    first = generate(here, PROMPTS, max_new_tokens=5, seed=5, **how)
    states.save(first.state, tmp_path / "state.safetensors", here)
    job = {"unread": first.unread, "seeds": first.seeds, "state": str(tmp_path / "state.safetensors"), "how": {"max_new_tokens": 7, **how}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "job.json")], check=True, timeout=120)
    rest = json.loads((tmp_path / "job.json").read_text())
    assert [a + b for a, b in zip(first.tokens, rest, strict=True)] == whole.tokens


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_gpu_says_the_same(how, tmp_path):
    model().save_pretrained(tmp_path)
    there = from_pretrained(tmp_path, device="cuda")
    out = generate(there, PROMPTS, max_new_tokens=9, stop=[7], **how)
    assert out.tokens == generate(model(), PROMPTS, max_new_tokens=9, stop=[7], **how).tokens
    assert {leaf.device.type for _, leaf in states.leaves(out.state)} == {"cuda"}


# ------------------------------------------------------------------------------------------------ choosing


def frequencies(sampler: Sampler, logits: torch.Tensor, n: int = 20_000) -> torch.Tensor:
    """What the sampler chooses over an even grid of u: exact up to 1/n, nothing random."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return sampler.choose(logits.expand(n, -1), u).bincount(minlength=logits.shape[-1]) / n


LOGITS = torch.tensor([0.5, -1.0, 2.0, 2.0, 0.0, -torch.inf, 1.0])


@pytest.mark.parametrize(
    "sampler, kept",
    [
        (Sampler(1.0), [0, 1, 2, 3, 4, 6]),
        (Sampler(2.5), [0, 1, 2, 3, 4, 6]),
        (Sampler(1.0, top_k=3), [2, 3, 6]),
        (Sampler(1.0, top_k=100), [0, 1, 2, 3, 4, 6]),
        (Sampler(1.0, top_p=0.7), [2, 3]),  # they have 0.38 each
        (Sampler(1.0, top_p=0.77), [2, 3, 6]),
        (Sampler(1.0, top_p=1.0), [0, 1, 2, 3, 4, 6]),
        (Sampler(1.0, top_k=3, top_p=0.8), [2, 3]),  # of the three kept they have 0.84
        (Sampler(0.5, top_p=1e-9), [2]),
    ],
)
def test_tokens_come_with_their_probabilities(sampler, kept):
    want = torch.full_like(LOGITS, -torch.inf)
    want[kept] = LOGITS[kept]
    assert torch.allclose(frequencies(sampler, LOGITS), (want / sampler.temperature).softmax(-1), atol=1e-3)


def test_what_has_no_probability_is_never_chosen():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf]).expand(2, -1)
    assert Sampler(1.0).choose(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_temperature_zero_takes_the_most_likely():
    assert Sampler().choose(LOGITS[[0, 1, 4, 6]].expand(3, -1), torch.tensor([0.0, 0.5, 0.99])).tolist() == [3, 3, 3]


def test_random_numbers_belong_to_the_prompt_not_to_the_batch():
    a, b = PROMPTS[1], PROMPTS[3]
    first = generate(model(), [a, b, a, a], max_new_tokens=8, **SAMPLED).tokens
    again = generate(model(), [b, a, a, a], max_new_tokens=8, **SAMPLED).tokens
    assert len({tuple(row) for row in first}) == 4  # copies of a prompt are different draws
    assert first == [again[1], again[0], again[2], again[3]]
    assert first != generate(model(), [a, b, a, a], max_new_tokens=8, **{**SAMPLED, "seed": 8}).tokens


# ------------------------------------------------------------------------------------------------ stopping and streaming


def test_a_row_ends_with_its_stop_token_and_costs_nothing_afterwards(monkeypatch):
    free = generate(model(), PROMPTS, max_new_tokens=12, **SAMPLED)
    stop = {free.tokens[0][2], free.tokens[2][5]}
    asked = []
    forward = LM.forward
    monkeypatch.setattr(LM, "forward", lambda self, x, *a, **k: asked.append(len(x)) or forward(self, x, *a, **k))
    out = generate(model(), PROMPTS, max_new_tokens=12, stop=stop, **SAMPLED)
    lengths = [next((i + 1 for i, token in enumerate(row) if token in stop), 12) for row in free.tokens]
    assert lengths[0] <= 3
    assert lengths[2] <= 6
    assert out.tokens == [row[:n] for row, n in zip(free.tokens, lengths, strict=True)]
    assert asked == [sum(n > i for n in lengths) for i in range(max(lengths))]
    for i, n in enumerate(lengths):
        alone = generate(model(), [PROMPTS[i]], max_new_tokens=n, **SAMPLED)
        assert alone.seeds[0] == out.seeds[i]
        assert same(alone.state, states.take(out.state, torch.tensor([i])))


def test_generation_ends_when_every_row_has():
    first = [row[0] for row in generate(model(), PROMPTS, max_new_tokens=1).tokens]
    out = generate(model(), PROMPTS, max_new_tokens=10**9, stop=first)
    assert out.tokens == [[token] for token in first]
    assert out.unread == out.tokens


def test_every_token_is_called_as_it_comes():
    seen = []
    out = generate(model(), PROMPTS, max_new_tokens=5, on_token=lambda row, token: seen.append((row, token)))
    assert seen == [(row, out.tokens[row][i]) for i in range(5) for row in range(4)]


def test_text_comes_in_whole_characters():
    text = "naïve λ → 🙂 done"
    assert list(_decoded(encode_text(text))) == list(text)
    assert decode_text(encode_text(text)) == text
    assert decode_text([0xF0, 0x9F, 65, 0xFF]) == "�A�"
    assert decode_text([*encode_text("é"), 0xE2, 0x82]) == "é�"


def test_text_is_what_the_tokens_say():
    pieces = list(generate_text(model(), "Once ", max_new_tokens=40, temperature=1.0, seed=2))
    tokens = generate(model(), [encode_text("Once ")], max_new_tokens=40, temperature=1.0, seed=2).tokens[0]
    assert "".join(pieces) == decode_text(tokens)
    assert len(pieces) > 1
    assert all(pieces)


# ------------------------------------------------------------------------------------------------ what a call leaves


def test_the_models_flags_are_the_callers():
    made = create_model("hybrid-tiny")
    made.backbone.blocks[0].eval()
    before = [module.training for module in made.modules()]
    inside = []
    hook = made.head.register_forward_hook(lambda module, *_: inside.append(module.training))
    generate(made, PROMPTS, max_new_tokens=2, on_token=lambda *_: inside.append(not made.training))
    hook.remove()
    assert not any(inside)  # eval in the forward, the caller's flag between tokens
    with pytest.raises(ZeroDivisionError):
        generate(made, PROMPTS, max_new_tokens=2, on_token=lambda *_: 1 / 0)
    assert [module.training for module in made.modules()] == before


def test_a_given_state_is_not_changed_and_one_that_comes_back_can_be_trained_from():
    out = generate(model(), PROMPTS, max_new_tokens=3)
    before = states.tree(torch.clone, out.state)
    generate(model(), out.unread, state=out.state, max_new_tokens=3)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(states.leaves(before), states.leaves(out.state), strict=True))
    assert not any(leaf.requires_grad or leaf.is_inference() for _, leaf in states.leaves(out.state))
    model()(torch.tensor(out.unread), out.state).logits.sum().backward()
    assert model().embed.weight.grad is not None
    model().zero_grad()


@pytest.mark.parametrize("name", [n for n in TINY if create_model(n, device="meta").backbone.grows() is not None])
def test_the_state_of_a_recurrent_model_does_not_grow(name):
    """What a token costs is then constant in its position. After 150 tokens every tiny window has filled, and soon after a wrapper's segment."""
    settled = 2 + 3 * max((wrapper.span() for wrapper in model(name).config.wrap), default=0)
    short, long = (generate(model(name), [list(range(150))], max_new_tokens=n) for n in (settled, settled + 40))
    assert states.nbytes(long.state) == states.nbytes(short.state)


# ------------------------------------------------------------------------------------------------ refusals

STATE_OF_TWO = lambda: model().start(2)  # noqa: E731


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 2], {}, "a list of token lists"),
        ("text", {}, "a list of token lists"),
        (["text"], {}, "a list of token lists"),
        ([[1], [2, 256]], {}, "prompt 1: token id 256 is out of range: this model knows 0 to 255"),
        ([[-1]], {}, "token id -1 is out of range"),
        ([[1]], {"temperature": -0.5}, "temperature must be 0 .* or more, got -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0"),
        ([[1]], {"top_k": 0}, "top_k counts the tokens to choose from, at least 1"),
        ([[1]], {"top_p": 0.0}, "top_p is a probability above 0 and up to 1"),
        ([[1]], {"top_p": 1.5}, "top_p is a probability above 0 and up to 1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"chunk": 0}, "chunk must be at least 1, got 0"),
        ([[1]], {"stop": [256]}, "stop holds token ids from 0 to 255"),
        ([[1]], {"stop": "\n"}, "stop holds token ids from 0 to 255"),
        ([[1]], {"seed": [1, 2]}, "seed is one number, or 1 numbers"),
        ([[1]], {"seed": [-1]}, "seed is one number, or 1 numbers"),
        ([[1]], {"state": STATE_OF_TWO}, "the state has 2 rows and there are 1 prompts"),
    ],
)
def test_refusals_say_what_is_wrong(prompts, options, message):
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts, **options)


def test_the_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="comes from another model"):
        generate(model(), [[1]], state=model("gated-delta-tiny").start(1))


def test_text_refuses_at_the_call_not_at_the_first_piece():
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        generate_text(model(), "")
    with pytest.raises(ValueError, match="models of bytes"):
        generate_text(create_model("hybrid-tiny", vocab_size=300), "x")


def test_a_model_without_tokens_is_refused():
    made = create_model("gated-delta-tiny", embed="linear", inputs=3, tie=False)
    with pytest.raises(ValueError, match="only a model from tokens to tokens generates"):
        generate(made, [[1]])
