"""TLP, the refiner of PEARL (arXiv 2603.21528), without its text term: smoothing that stops at edges.

On cells: (diag(c) + L) f = c y for each class, with y the cosines, c = max(confidence, 0.05)² of their
softmax, and L the Laplacian of the grid whose edges weigh exp(-5 |Δgrey| / mean |Δgrey|), the mean per
direction. It is left after a number of conjugate gradient steps from y, which makes them a parameter of the
method; step lengths are shared by all classes of an image. The text term of the paper has no effect in the
released code, and almost none as written: cosines make a nearly uniform softmax.

Shapes as in ``models.clip.refiners.base``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.clip.refiners.base import RefineOptions, Refiner
from models.clip.weights import OPENAI_STD
from models.conjugate import conjugate_gradient

GREY = (0.299, 0.587, 0.114)


def _weights(images: Tensor) -> tuple[Tensor, Tensor]:
    """Edge weights downwards (B, 1, h - 1, w) and to the right (B, 1, h, w - 1), in (0, 1]."""
    # Of images as CLIP takes them: each channel divided by its standard deviation.
    red, green, blue = (share / std for share, std in zip(GREY, OPENAI_STD, strict=True))
    grey = red * images[:, 0] + green * images[:, 1] + blue * images[:, 2]

    def weigh(difference: Tensor) -> Tensor:
        mean = difference.abs().mean((1, 2), keepdim=True)
        tiny = torch.finfo(difference.dtype).tiny
        return (-5 * difference.abs() / mean.clamp(min=tiny)).exp()[:, None]

    return weigh(grey.diff(dim=1)), weigh(grey.diff(dim=2))


def tlp(images: Tensor, cosines: Tensor, options: RefineOptions) -> Tensor:
    """See the module."""
    down, right = _weights(images)
    certain = cosines.softmax(1).amax(1, keepdim=True).clamp(min=0.05).square()

    def applied(x: Tensor) -> Tensor:
        y = certain * x
        step = down * x.diff(dim=2)
        y[:, :, :-1] -= step
        y[:, :, 1:] += step
        step = right * x.diff(dim=3)
        y[..., :-1] -= step
        y[..., 1:] += step
        return y

    return conjugate_gradient(applied, certain * cosines, steps=options.steps, dims=(1, 2, 3), start=cosines)


TLP = Refiner(tlp, on_cells=True)
