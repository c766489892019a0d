"""Training a prompt decoder in whitened coordinates of what it reads.

What a frozen tower gives is far from white: single channels are large, embeddings of all texts are mostly
alike, and what tells one prompt from another is small beside it. A linear map that reads such input learns
slowly. Here each map that reads CLIP's outputs takes them whitened, so that it starts with equal regard to
all directions and learns all of them at the same rate. A whitened linear map is a linear map: after training
``fold`` gives the plain weights, and the decoder is one like any other.

No paper of CLIPSeg does this; the recipes of the paper leave it off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clipseg.decoder import PromptDecoder

_SHRINKAGE = 0.03
"""Share of the mean variance that is added to all directions: those that hardly vary stay small."""
_FLOOR = 1e-3
"""What is added is at least this share of the mean square, should there be next to no variance at all."""
_MEAN, _WHITENING = "mean", "whitening"


class WhitenedLinear(nn.Linear):
    """A linear map of ``(x - mean) @ whitening``.

    Args:
        linear: gives size, weights and bias, which are of the whitened input here.
        mean: (in,) of the input.
        whitening: (in, in), symmetric.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, linear: nn.Linear, mean: Tensor, whitening: Tensor) -> None:
        # Weights are taken over, not drawn: the global random state stays as it is.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer(_MEAN, mean.to(linear.weight))
        self.register_buffer(_WHITENING, whitening.to(linear.weight))

    def forward(self, x: Tensor) -> Tensor:
        # Not in half precision, which would drown the small directions in the large ones.
        with torch.autocast(x.device.type, enabled=False):
            white = (x.to(self.mean.dtype) - self.mean) @ self.whitening
        return F.linear(white, self.weight, self.bias)


def whiten(decoder: PromptDecoder, run: Callable[[], object], *, keep: bool = False) -> None:
    """Whiten what a decoder's maps read that read CLIP's outputs: FiLM's, and those that narrow the tokens.

    Mean and covariance are those of all vectors that the maps are given in ``run``. Directions that do not
    vary in them are scaled like those that hardly do.

    Args:
        decoder: changed in place.
        run: calls ``decoder`` with typical inputs.
        keep: what the decoder computes stays as it is, as for one that is trained already; else its weights
            are taken for those of whitened input, which is what a new decoder wants.
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
    """The state of a decoder with plain linear maps that computes what the whitened one does.

    Args:
        state: of a decoder, be it whitened or not.

    Returns:
        A new mapping; tensors that do not change are shared.
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
    """A forward pre-hook that adds up what a linear map reads."""

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
        """Mean, inverse square root of the covariance, and its inverse, fp64."""
        mean = self._sum / self._count
        covariance = self._squares / self._count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        square = self._squares.trace() / (self._count * len(mean))
        values = values.clamp(min=0) + torch.maximum(_SHRINKAGE * values.mean(), _FLOOR * square)
        return mean, (vectors * values.rsqrt()) @ vectors.T, (vectors * values.sqrt()) @ vectors.T
