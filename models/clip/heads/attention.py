"""Heads that compare queries with queries, or keys with keys: a patch then attends to what is like it.

* ``QQ``: softmax(q qᵀ/√d) v, no residual, no MLP (ClearCLIP, arXiv 2407.12442).
* ``KK``: the same with keys.
* ``NN``: keys, and a bonus for near patches: softmax(k kᵀ/√d + ω) v with
  ω_ij = exp(-|p_i - p_j|²/(2σ²)), positions p in patches, no bonus for the class token (NACLIP, arXiv
  2404.08181).
* ``SCLIP``: (softmax(q qᵀ/√d) + softmax(k kᵀ/√d)) v, whose rows sum to 2, with residual and MLP (arXiv
  2312.01597).

The class token takes part as a key. In a ResNet's attention pool the mean token stands in its place; there is
neither residual nor MLP, and as for the other heads no position table.

Shapes as in ``models.clip.heads.base``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import Attention, mixing


def nearness(grid: tuple[int, int], sigma: float, like: Tensor) -> Tensor:
    """ω (L, L) of NACLIP, in (0, 1], symmetric, in the dtype and on the device of ``like``."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32

    def along(length: int) -> Tensor:
        at = torch.arange(length, device=like.device, dtype=exact)
        return (-(at[:, None] - at).square() / (2 * sigma**2)).exp()

    rows, columns = (along(length) for length in grid)
    return torch.kron(rows, columns).to(like.dtype)


def _alike(x: Tensor, v: Tensor, bonus: Tensor | None = None) -> Tensor:
    """softmax(x xᵀ/√d + bonus) v of the patches: (B, A, N, d) -> (B, A, L, d)."""
    return F.scaled_dot_product_attention(x[:, :, 1:], x, v, attn_mask=bonus)


def _queries(a: Attention) -> Tensor:
    return _alike(a.q, a.v)


def _keys(a: Attention) -> Tensor:
    return _alike(a.k, a.v)


def _near_keys(a: Attention) -> Tensor:
    return _alike(a.k, a.v, F.pad(nearness(a.grid, a.options.sigma, a.k), (1, 0)))


def _queries_and_keys(a: Attention) -> Tensor:
    return _alike(a.q, a.v) + _alike(a.k, a.v)


QQ = mixing(_queries)
KK = mixing(_keys)
NN = mixing(_near_keys)
SCLIP = mixing(_queries_and_keys, whole_block=True)
