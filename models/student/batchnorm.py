"""Batch norm over the joint batch of all training processes, on GPUs and on CPUs.

PyTorch's ``SyncBatchNorm`` refuses tensors on a CPU. The one here does the same there; its parameters and
buffers have the same names, so weights travel freely between plain and synchronised modules.

Shapes: B batch, C channels, H W size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors, in each of them; so is the gradient."""

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
    """``nn.BatchNorm2d`` whose training statistics are those of the batches of all processes together.

    Processes may have batches and images of different sizes; each has to take part in every training step,
    and in its backward pass. In evaluation, and without a process group, it is ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), of the input's dtype.

        Raises:
            ValueError: one value per channel in all processes together: there is no variance.
        """
        local = self.running_mean is not None and not self.training
        if local or world_size() == 1:
            return super().forward(input)
        if input.ndim != 4:
            raise ValueError(f"Images (B, C, H, W) are expected, not {input.ndim} dimensions.")
        # Half precision overflows in sums; torch's own keeps its statistics in fp32 as well.
        x = input if input.dtype == torch.float64 else input.float()
        sums = torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() // x.shape[1]])])
        sums = _SumOverProcesses.apply(sums)
        count = sums[-1].detach()
        if count <= 1:
            raise ValueError("Batch norm needs more than one value per channel in training.")
        mean = sums[:-1] / count
        centred = x - mean[:, None, None]
        # Around the joint mean, and not as the difference of two large sums, which cancels.
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
    """Let the batch norms of a module see the joint batch of all processes.

    Call it in every process after the process group is there and before ``DistributedDataParallel``. Without
    a process group, or alone in it, nothing changes.

    Args:
        module: changed in place; on its device, which decides between PyTorch's ``SyncBatchNorm`` (CUDA) and
            ``CrossReplicaBatchNorm2d``. Parameters and buffers stay the same objects with the same names.

    Returns:
        The module; another one only if it is a batch norm itself.
    """
    if world_size() == 1:
        return module
    first = next(module.parameters(), None)
    if first is not None and first.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _convert(module)


def world_size() -> int:
    """Processes in the default group; 1 without one."""
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
