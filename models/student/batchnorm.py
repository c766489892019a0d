"""Batch norm over the joint batch of all training processes, on GPUs and CPUs.

PyTorch's ``SyncBatchNorm`` rejects CPU tensors. The class here does the same on a CPU. Parameter and buffer
names are the same, so plain and synchronised modules can exchange weights.

Shapes: B batch, C channels, H W size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce (sum) in the forward and the backward pass."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class CrossReplicaBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with training statistics over the batches of all processes.

    Batch and image sizes may differ between processes, but every process must take part in every forward and
    backward pass of training. In evaluation, or without a process group, it is ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) in the input's dtype.

        Raises:
            ValueError: there is only one value per channel over all processes, so no variance.
        """
        local = self.running_mean is not None and not self.training
        if local or world_size() == 1:
            return super().forward(input)
        if input.ndim != 4:
            raise ValueError(f"Images (B, C, H, W) are expected, not {input.ndim} dimensions.")
        # Sums overflow in half precision; torch's SyncBatchNorm keeps its statistics in fp32 too.
        x = input if input.dtype == torch.float64 else input.float()
        sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() // x.shape[1]])])
        sums = _SumOverProcesses.apply(sums)
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError("Batch norm needs more than one value per channel in training.")
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # Around the joint mean, because the difference of two large sums would cancel.
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = centred * scale[:, None, None]
        if self.affine:
            y = y + self.bias[:, None, None]
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:  # the plain average of all batches
                factor = 1 / float(self.num_batches_tracked)
        assert factor is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Make a module's batch norms use the joint batch of all processes.

    Call it in every process, after the process group is initialised and before ``DistributedDataParallel``. A
    no-op without a process group or in a group of one.

    Args:
        module: changed in place. Its device decides between PyTorch's ``SyncBatchNorm`` (CUDA) and
            ``CrossReplicaBatchNorm2d``. Parameters and buffers stay the same objects with the same names.

    Returns:
        The module; a new one only if it is itself a batch norm.
    """
    if world_size() == 1:
        return module
    first = next(module.parameters(), None)
    if first is not None and first.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _convert(module)


def world_size() -> int:
    """Number of processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _convert(module: nn.Module) -> nn.Module:
    if type(module) is nn.BatchNorm2d:
        other = CrossReplicaBatchNorm2d(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        other.weight, other.bias = module.weight, module.bias
        for name, buffer in module.named_buffers():
            setattr(other, name, buffer)
        return other.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module
