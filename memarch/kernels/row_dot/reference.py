"""Products of a vector with rows of a table, bag by bag.

a[t, r] = <table[ids[t, r]], x[t]>

N rows   d width   T bags   R rows a bag
"""

import torch
from torch import Tensor


def row_dot(table: Tensor, ids: Tensor, x: Tensor, sparse_grad: bool) -> Tensor:
    out = torch.promote_types(table.dtype, x.dtype)
    wide = torch.promote_types(out, torch.float32)
    return torch.stack([table[ids[t].long()].to(wide) @ x[t].to(wide) for t in range(ids.shape[0])]).to(out)
