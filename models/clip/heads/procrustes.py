"""PEARL's attention (arXiv 2603.21528): keys are turned towards the queries before they are compared.

Per attention head, with q_c and k_c the queries and keys minus their means, weighted by |q_t| (0 for the
class token): the orthogonal polar factor R of k_cᵀ q_c turns the keys, and the logits are
q (k R)ᵀ/√d + α k_c k_cᵀ/√d. No residual, no MLP.

R = M (MᵀM)^-½ comes from five coupled Newton–Schulz steps on MᵀM/|MᵀM| + 1e-6 I, with the Frobenius norm;
five steps are part of the method, for directions with small singular values do not converge in them.

Shapes as in ``models.clip.heads.base``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import Attention, mixing

STEPS = 5


def polar(m: Tensor) -> Tensor:
    """Approximate orthogonal polar factor of matrices (..., d, d), fp32 or fp64."""
    one = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    square = m.mT @ m
    norm = torch.linalg.matrix_norm(square, keepdim=True).clamp(min=torch.finfo(m.dtype).tiny)
    y, z = square / norm + 1e-6 * one, one.expand_as(square)
    for _ in range(STEPS):
        t = (3 * one - z @ y) / 2
        y, z = y @ t, t @ z
    return m @ z / norm.sqrt()


def _turned(a: Attention) -> Tensor:
    exact = torch.float64 if a.q.dtype == torch.float64 else torch.float32
    q, k = a.q.to(exact), a.k.to(exact)
    weight = F.pad(torch.linalg.vector_norm(q[:, :, 1:], dim=-1, keepdim=True), (0, 0, 1, 0))
    weight = weight / weight.sum(-2, keepdim=True).clamp(min=torch.finfo(exact).tiny)
    q_c = q - (weight * q).sum(-2, keepdim=True)
    k_c = k - (weight * k).sum(-2, keepdim=True)
    turned = k @ polar(k_c.mT @ q_c)
    # Both terms as one attention of twice the width, which never holds all N x N logits.
    query = torch.cat([q, a.options.alpha * k_c], -1)[:, :, 1:].to(a.q.dtype)
    key = torch.cat([turned, k_c], -1).to(a.q.dtype)
    d = a.v.shape[-1]
    wide = F.pad(a.v, (0, d))  # equal widths, for the kernels that need them
    return F.scaled_dot_product_attention(query, key, wide, scale=d**-0.5)[..., :d]


PA = mixing(_turned)
