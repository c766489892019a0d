"""Choose the device and the precision."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """The GPU if this process may use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_precision(device: torch.device) -> str:
    """The fastest precision with native support on a device: ``bf16``, ``fp16`` or ``fp32``.

    More than 99.5 % of the labels are the same in bf16 as in fp32 (``benchmarks/maskclip_forward.py``). A
    processor without bf16 instructions emulates it, slower than fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
