"""Conjugate gradients for symmetric positive definite systems, cut off after a number of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    steps: int,
    dims: tuple[int, ...],
    start: Tensor | None = None,
) -> Tensor:
    """Approximate x in ``apply(x) = right``.

    Args:
        apply: the matrix, as a linear map.
        right: the right sides, fp32 or fp64; not written to.
        steps: how many.
        dims: the dimensions that make up one system; the others count systems, each with its own step sizes.
        start: the first x; None is 0.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    found = torch.zeros_like(right) if start is None else start
    rest = right if start is None else right - apply(start)
    along, left = rest, dot(rest, rest)
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(steps):
        image = apply(along)
        length = left / dot(along, image).clamp(min=tiny)  # 0 / tiny once it is solved
        found = found + length * along
        rest = rest - length * image
        before, left = left, dot(rest, rest)
        along = rest + left / before.clamp(min=tiny) * along
    return found
