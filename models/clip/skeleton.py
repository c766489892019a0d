"""Modules without weights, for weights that are read from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules that are built meanwhile have shapes and types, on the meta device, and no numbers.

    As ``torch.device("meta")``, without the 2 s in which torch would import its compiler for arithmetic on
    numbers that nobody sees.
    """
    with torch.device("meta"), _WithoutArithmetic():
        yield


class _WithoutArithmetic(TorchFunctionMode):
    """What constructors of modules do to random numbers keeps shape and type."""

    _KEEP_SHAPE = (nn.init.normal_, Tensor.mul, Tensor.div, Tensor.triu_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._KEEP_SHAPE and not any(isinstance(other, Tensor) for other in args[1:]):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
