"""Which device and which number format to compute with."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """The GPU that this process may use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_precision(device: torch.device) -> str:
    """The fastest precision that the processor computes natively: ``bf16``, ``fp16`` or ``fp32``.

    bf16 keeps more than 99.5 % of the labels of fp32 (``benchmarks/maskclip_forward.py``). On a processor
    without bf16 instructions it is emulated, and slower than fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
