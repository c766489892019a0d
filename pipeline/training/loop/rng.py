"""Random number generator states of a process, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(*numbers: int) -> None:
    """Seed the generators of torch, numpy and Python from a sequence of numbers (seed, rank …)."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


def capture() -> dict[str, Any]:
    """Capture the states of torch (CPU, and the current GPU if CUDA is in use), numpy and Python."""
    generator: dict[str, Any] = dict(np.random.get_state(legacy=False))
    keys, position = generator["state"]["key"], generator["state"]["pos"]
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(generator["has_gauss"]),
            float(generator["gauss"]),
        ],
        "python": [version, list(words), gauss],
    }


def restore(state: Mapping[str, Any]) -> None:
    """Restore the states that ``capture`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
