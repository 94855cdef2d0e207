"""A chunk of the gated recurrence as matrices of scalars: how much of every write, and of the start, is in the memory after every token.

    S_t = eta_t S_{t-1} + sum_i P_ti w_i          what token t writes: a mixture P [C, C] of the chunk's writes w_i
    M_t = a_t M_{t-1} + r_t S_t                   r is 1, or 0 for a token that is not one

unrolled from the chunk's start:

    S_t = m_t S + sum_i E_ti w_i                  D^x_ti = x_{i+1} ... x_t for i <= t, else 0
    M_t = beta_t M + f_t S + sum_i G_ti w_i       E = D^eta P    G = D^a r E    m = eta_1 ... eta_t    beta = a_1 ... a_t    f = D^a r m

Without momentum E = P and f, m do not exist. Every exponent is <= 0. With Z = dD o D the gradient of log x_p is the sum of Z_ti over i < p <= t:
only what it has a part in, so that strong decay loses nothing to cancellation.

    C tokens in a chunk   n chunks of all rows and heads
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Maybe = Tensor | None


class Gates(NamedTuple):
    beta: Tensor  # [n, C, 1]
    Da: Tensor  # [n, C, C]
    G: Tensor  # [n, C, C]
    E: Any  # [n, C, C]; None where it is the identity
    f: Any  # [n, C, 1]; None without momentum
    m: Any
    De: Any
    r: Any  # [n, C, 1], or None for ones
    P: Any  # None for the identity


def gates(log_decay: Tensor, log_momentum: Maybe, r: Maybe, P: Maybe, masks: tuple[Tensor, Tensor, Tensor]) -> Gates:
    """log_decay, log_momentum [n, C, 1]; masks as `triangles` of the delta rule gives them."""
    beta, Da = _products(log_decay, masks)
    if log_momentum is None:
        return Gates(beta, Da, Da if P is None else torch.bmm(Da, P), P, None, None, None, r, P)
    m, De = _products(log_momentum, masks)
    E = De if P is None else torch.bmm(De, P)
    rE, rm = (E, m) if r is None else (r * E, r * m)
    return Gates(beta, Da, torch.bmm(Da, rE), E, torch.bmm(Da, rm), m, De, r, P)


def _products(log: Tensor, masks: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    _, below, future = masks
    return log.cumsum(-2).exp_(), (log * below).cumsum(-2).add_(future).exp_()  # sums of their own: differences lose what is small


def gates_back(g: Gates, dbeta: Tensor, dG: Tensor, dE: Maybe, df: Maybe, dm: Maybe, masks: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Maybe, Maybe]:
    """-> the gradients of log_decay, log_momentum [n, C, 1] and P [n, C, C]. dE and dm count what G and f did not ask for."""
    if g.De is None:
        dDa, dP = (dG, None) if g.P is None else (torch.bmm(dG, g.P.mT), torch.bmm(g.Da.mT, dG))
        return _log(dDa, g.Da, dbeta, g.beta, masks), None, dP
    assert df is not None and dm is not None and dE is not None
    rE, rm = (g.E, g.m) if g.r is None else (g.r * g.E, g.r * g.m)
    dDa = torch.baddbmm(df * rm.mT, dG, rE.mT)
    into, once = torch.bmm(g.Da.mT, dG), torch.bmm(g.Da.mT, df)
    dE, dm = (dE + into, dm + once) if g.r is None else (dE + g.r * into, dm + g.r * once)
    dP = None if g.P is None else torch.bmm(g.De.mT, dE)
    dDe = dE if g.P is None else torch.bmm(dE, g.P.mT)
    return _log(dDa, g.Da, dbeta, g.beta, masks), _log(dDe, g.De, dm, g.m, masks), dP


def _log(dD: Tensor, D: Tensor, dwhole: Tensor, whole: Tensor, masks: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    lower, below, _ = masks
    Z = torch.cat([dD * D, dwhole * whole], -1)  # the start as one more column, which every token has a part in
    before = torch.cat([below, torch.ones_like(below[:, :1])], -1)
    return torch.matmul(lower.mT, Z).mul_(before).sum(-1, keepdim=True)
