"""Train a prompt decoder on whitened inputs.

The outputs of a frozen tower are far from white: single channels are large, the embeddings of all texts are
nearly alike, and the differences between prompts are comparatively small. A linear map learns slowly from
such input. Here each map that reads CLIP's outputs gets them whitened, so it starts with equal weight on all
directions and learns them at the same rate. A whitened linear map is still linear: after training, ``fold``
computes the plain weights, and the decoder is like any other.

The CLIPSeg paper does not do this, and its recipes leave it off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clipseg.decoder import PromptDecoder

_SHRINKAGE = 0.03
"""Share of the mean variance added to all directions, so that those that hardly vary stay small."""
_FLOOR = 1e-3
"""Minimum of that addition, as a share of the mean square, in case there is almost no variance."""
_MEAN, _WHITENING = "mean", "whitening"


class WhitenedLinear(nn.Linear):
    """A linear map of ``(x - mean) @ whitening``.

    Args:
        linear: its weights and bias are taken over and apply to the whitened input.
        mean: (in,), of the input.
        whitening: (in, in), symmetric.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, linear: nn.Linear, mean: Tensor, whitening: Tensor) -> None:
        # On the meta device no weights are drawn, so the global random state does not change.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer(_MEAN, mean.to(linear.weight))
        self.register_buffer(_WHITENING, whitening.to(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        # Half precision would lose the small directions among the large ones.
        with torch.autocast(x.device.type, enabled=False):
            white = (x.to(self.mean.dtype) - self.mean) @ self.whitening
        return F.linear(white, self.weight, self.bias)


def whiten(decoder: PromptDecoder, run: Callable[[], object], *, keep: bool = False) -> None:
    """Whiten the inputs of a decoder's ``readers``, in place.

    Mean and covariance are those of all vectors that the readers see during ``run``. Directions without
    variance are scaled like those with very little.

    Args:
        decoder: changed in place.
        run: calls ``decoder`` with typical inputs.
        keep: adapt the weights so that the decoder computes the same as before, for a trained decoder. By
            default they are reused as weights of the whitened input, which suits a new decoder.
    """
    readers = decoder.readers
    moments = {name: _Moments(module) for name, module in readers.items()}
    hooks = [module.register_forward_pre_hook(moments[name]) for name, module in readers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, linear in readers.items():
        mean, matrix, inverse = moments[name].whitening()
        if keep:
            with torch.no_grad():
                weight = linear.weight.double()
                linear.bias.copy_(linear.bias.double() + weight @ mean)
                linear.weight.copy_(weight @ inverse)
        decoder.set_submodule(name, WhitenedLinear(linear, mean, matrix))


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a decoder's state, whitened or not, to that of an equivalent decoder with plain linear maps.

    Returns:
        A new mapping; unchanged tensors are shared.
    """
    plain = dict(state)
    for key in state:
        reader, _, last = key.rpartition(".")
        if last != _WHITENING:
            continue
        name = f"{reader}.weight", f"{reader}.bias"
        mean = plain.pop(f"{reader}.{_MEAN}").double()
        weight = state[name[0]].double() @ plain.pop(key).double()
        plain[name[0]] = weight.to(state[name[0]])
        plain[name[1]] = (state[name[1]].double() - weight @ mean).to(state[name[1]])
    return plain


class _Moments:
    """A forward pre-hook that accumulates first and second moments of a linear map's input."""

    def __init__(self, linear: nn.Linear) -> None:
        zeros = linear.weight.new_zeros
        width = linear.in_features
        self._count = 0
        self._sum = zeros(width, dtype=torch.float64)
        self._squares = zeros(width, width, dtype=torch.float64)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        self._count += len(rows)
        self._sum += rows.sum(0)
        self._squares += rows.T @ rows

    def whitening(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, inverse square root and square root of the shrunk covariance, fp64."""
        mean = self._sum / self._count
        covariance = self._squares / self._count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        square = self._squares.trace() / (self._count * len(mean))
        values = values.clamp(min=0) + torch.maximum(_SHRINKAGE * values.mean(), _FLOOR * square)
        return mean, (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T
