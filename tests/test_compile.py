"""Law 11: forward and backward as one graph, with and without a state. `backend="eager"` proves the graph; inductor's run is slow and marked so."""

import pytest
import torch

import zoo
from memarch import create_model, list_models
from memarch import state as states
from zoo import close, noisy, tokens

SUBJECTS = zoo.mixers() + zoo.wrapped()


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_law_11_one_graph(subject):
    torch._dynamo.reset()
    mixer, x = subject.build(), tokens(subject, 2, min(subject.tokens, 24))
    graph = torch.compile(mixer, fullgraph=True, backend="eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    state = states.detach(mixer(x).state)
    for given in (None, state):
        left, right = graph(a, given), mixer(b, given)
        close(left.y, right.y, "output")
        zoo.same_state(left.state, right.state, "final")
        left.y.square().sum().backward()
        right.y.square().sum().backward()
        close(a.grad, b.grad, "gradient")


@pytest.mark.parametrize("name", list_models("*-tiny"))
def test_law_11_presets_as_one_graph(name):
    torch._dynamo.reset()
    model = noisy(create_model(name))
    x = torch.randint(0, 256, (2, 40))
    graph = torch.compile(model.loss, fullgraph=True, backend="eager")
    out = graph(x[:, :-1], x[:, 1:])
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(x[:, :-1], x[:, 1:]).loss.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        close(p.grad, g, "gradient")


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*-tiny"))
def test_law_11_inductor(name):
    torch._dynamo.reset()
    model = create_model(name)
    x = torch.randint(0, 256, (2, 80))
    out = torch.compile(model.loss, fullgraph=True)(x[:, :-1], x[:, 1:])
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(x[:, :-1], x[:, 1:]).loss.backward()
    for p, g in zip(model.parameters(), grads, strict=True):
        close(p.grad, g, "gradient", 1e-3)
