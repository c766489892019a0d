"""CUDA without a GPU: torch's fake tensors, which have a shape, a dtype and a device, but no values.

Only tensors on ``cuda`` are fake; those on the CPU are as usual. Operations on fake tensors compute no
numbers, and refuse to mix devices as CUDA does, so code that forgets to move a tensor fails here too. What
the host reads of a fake GPU is noted, since on a real one the host waits for it; the answers are ones, or the
values of whole numbers that came from the host; what is copied to given memory is zero.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# The one private import: torch documents fake tensors (docs.pytorch.org, "Fake tensor") under this name only.
# The public ways to them, torch.export and make_fx, trace a program, and cannot run one with its host code.
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: PLC2701
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)
PRECISIONS = ("fp32", "bf16", pytest.param("fp16", marks=pytest.mark.long))
"""Of inference. Networks in fp16 go the same ways as in bf16."""
READS: Mapping[Callable[..., Any], str] = {
    getattr(Tensor, name): name
    for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "bincount")
} | {torch.nonzero: "nonzero", torch.bincount: "bincount"}


_FAKE = FakeTensorMode()
"""One for all tests, because caches of the code outlive a test, and modes do not mix."""


class FakeGpu(TorchFunctionMode):
    """Runs functions on fake tensors as soon as a GPU takes part.

    Attributes:
        waits: ``path:function what`` for each place at which the host waits for the GPU, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # pinning needs a driver
        first = args[0] if args else None
        if not _names_gpu((args, kwargs)):
            return func(*args, **kwargs)
        if func in READS and on_gpu(first):
            self._note(READS[func])
            with _FAKE:
                return _answer(READS[func], first, kwargs)
        if func is Tensor.numpy and on_gpu(first):
            raise TypeError("can't convert a CUDA tensor to numpy")
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            assert first.device == args[1].device, "a mask of another device"
            self._note("selection by mask")
            with _FAKE:
                return first.flatten(0, args[1].ndim - 1).clone()
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            index = self._fakes(torch.tensor(args[1]))
            with _FAKE:
                return first[index.to(CUDA)]
        if func is Tensor.__deepcopy__:
            made = first.detach().clone()
            if hasattr(first, "on_host"):
                made.on_host = first.on_host
            return nn.Parameter(made, first.requires_grad) if isinstance(first, nn.Parameter) else made
        if func is Tensor.backward:
            return _backward(first)
        if func is Tensor.copy_ and not on_gpu(first):
            self._note_copy(kwargs)
            return first.zero_()
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            # Made by the fake mode, they would keep their values, and be computed with for real.
            kwargs["device"], kwargs["dtype"] = "cpu", kwargs.get("dtype", getattr(first, "dtype", None))
            made = torch.as_tensor(args[-1], **kwargs)
            self._note_copy(kwargs)
            with _FAKE:
                return self._fakes(made).to(CUDA)
        with _FAKE:
            result = func(*self._fakes(args), **self._fakes(kwargs))
        source = args[1] if func is Tensor.copy_ else first
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_) and on_gpu(result) != on_gpu(source):
            self._note_copy(kwargs)
            if on_gpu(result) and not result.is_floating_point():
                result.on_host = source.clone()  # ids, from which shapes follow
            elif hasattr(source, "on_host"):
                return source.on_host.clone()
        if func is Tensor.detach and hasattr(first, "on_host"):
            result.on_host = first.on_host
        if isinstance(result, Tensor) and result.device.type == "cpu":
            return torch.ones(result.shape, dtype=result.dtype)
        return result

    def _fakes(self, value: Any) -> Any:
        """Arguments with fake tensors in place of real ones on the CPU."""
        if isinstance(value, list | tuple):
            made = [self._fakes(each) for each in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            return {key: self._fakes(each) for key, each in value.items()}
        return _FAKE.from_tensor(value) if isinstance(value, Tensor) and not on_gpu(value) else value

    def _note_copy(self, kwargs: Mapping[str, Any]) -> None:
        if not kwargs.get("non_blocking"):
            self._note("copy")

    def _note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__):
                self.waits.append(f"{path.relative_to(ROOT)}:{frame.name} {what}")
                return


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeGpu]:
    """A fake GPU named ``cuda:0``, for code that is told its device."""
    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            (nn.Module, "to", _moved),
            (nn.Module, "float", lambda module: _moved(module, torch.float32)),
            (torch.cuda, "current_device", lambda: CUDA.index),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.cuda, "Event", Event),
            # Else autocast and loss scaling would be off.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        yield stack.enter_context(FakeGpu())


class Event:
    """``torch.cuda.Event`` without a driver."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


def _names_gpu(value: Any) -> bool:
    """Whether arguments hold a tensor on a GPU, or name one."""
    if isinstance(value, list | tuple):
        return any(_names_gpu(each) for each in value)
    if isinstance(value, dict):
        return any(_names_gpu(each) for each in value.values())
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return on_gpu(value) or (isinstance(value, str) and value.startswith("cuda"))


def _answer(read: str, tensor: Tensor, kwargs: Mapping[str, Any]) -> Any:
    if read == "nonzero":
        return torch.zeros((tensor.numel(), tensor.ndim), dtype=torch.int64, device=tensor.device)
    if read == "bincount":
        return torch.zeros(kwargs["minlength"], dtype=torch.int64, device=tensor.device)
    if read == "tolist":
        return np.ones(tensor.shape).tolist()
    if read in ("__int__", "__index__"):
        return 1
    return 1.0 if read == "__float__" or (read == "item" and tensor.is_floating_point()) else True


def _backward(loss: Tensor) -> None:
    """Give every leaf a gradient; the engine itself does not run for a GPU without a driver."""
    seen: set[Any] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad + torch.zeros_like(leaf)
        nodes += [following for following, _ in node.next_functions]


def _moved(module: nn.Module, *given: Any, memory_format: torch.memory_format | None = None) -> nn.Module:
    """``nn.Module.to``, which would swap tensors, and fake ones cannot be swapped."""
    device = next((torch.device(each) for each in given if isinstance(each, str | torch.device)), None)
    dtype = next((each for each in given if isinstance(each, torch.dtype)), None)
    for part in module.modules():
        for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            new = value.detach().to(device or value.device, kind)
            if memory_format is not None and new.ndim == 4:
                new = new.contiguous(memory_format=memory_format)
            setattr(
                part, name, nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
            )
    return module
