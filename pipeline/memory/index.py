"""Search in a memory: exactly, with torch; or with faiss, whose index is a file of its own.

faiss is an extra (``pip install maskmill[memory]``): comparing with all keys is as fast up to some hundred
thousand regions, and needs nothing.

Shapes: M regions, K key channels, D embedding channels.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import TYPE_CHECKING, Any

from models.errors import WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.memory.parts import damaged, read_part
from pipeline.memory.record import INDEX_FILE, MemoryRecord, read_memory_record

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from models.memory import Memory, Search

LISTS_PER_ROOT = 4
"""faiss: lists for each √M regions."""
PROBED = 8
"""faiss: one list in so many is searched, at least ``LEAST_PROBED``."""
LEAST_PROBED = 16
_PER_LIST = 39  # regions a list at least; with fewer, faiss warns


def load_memory(uri: str, device: torch.device) -> tuple[Memory, MemoryRecord]:
    """Read a memory for searching, checked against its record.

    Args:
        uri: its folder.
        device: where exact search runs; values stay on the CPU.

    Raises:
        MaskMillError: ``input_missing``, ``file_damaged``, ``newer_version``; ``package_missing`` without
            faiss.
    """
    from models.memory import Memory, centred, exact_search

    storage = open_storage(uri)
    record = read_memory_record(storage)
    keys, values = _tensors(storage, record)
    mean = keys.float().mean(0)
    search: Search
    if record.index == "faiss":
        search = faiss_search(_read_index(storage, record))
    else:
        search = exact_search(centred(keys.float(), mean).to(device))
    return Memory(values, mean, search, record.regions, record.key_block), record


def write_index(storage: Storage, record: MemoryRecord) -> str:
    """Build and write the faiss index of a memory's keys; the SHA-256 (hex) of the file.

    Raises:
        MaskMillError: ``package_missing``; ``file_damaged``.
    """
    from models.memory import centred

    keys, _ = _tensors(storage, record)
    index = build_index(centred(keys.float(), keys.float().mean(0)).numpy())
    data = import_faiss().serialize_index(index).tobytes()
    storage.write_bytes(INDEX_FILE, data)
    return hashlib.sha256(data).hexdigest()


def build_index(keys: npt.NDArray[np.float32]) -> Any:
    """A faiss index of keys (M, K) of length 1: in inverted lists, as 16-bit numbers.

    Raises:
        MaskMillError: ``package_missing``.
    """
    import numpy as np

    faiss = import_faiss()
    vectors = np.ascontiguousarray(keys)
    lists = max(1, min(int(LISTS_PER_ROOT * len(vectors) ** 0.5), len(vectors) // _PER_LIST))
    index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    index.nprobe = min(lists, max(LEAST_PROBED, lists // PROBED))
    return index


def import_faiss() -> Any:
    """The package faiss.

    Raises:
        MaskMillError: ``package_missing``.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise WrongUse(
            "package_missing",
            "This memory is searched with faiss, which is not installed.",
            "Install it: pip install faiss-cpu. Or build the memory with --index exact.",
        ) from error
    return faiss


def _tensors(storage: Storage, record: MemoryRecord) -> tuple[Tensor, Tensor]:
    """All keys fp16 (M, K) and values fp16 (M, D), part by part."""
    import torch

    parts = [read_part(storage, part, record) for part in record.parts if part.regions]
    return torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts])


def _read_index(storage: Storage, record: MemoryRecord) -> Any:
    import numpy as np

    faiss = import_faiss()
    try:
        data = storage.read_bytes(INDEX_FILE)
        # Before faiss reads it: damaged indexes can crash it.
        if hashlib.sha256(data).hexdigest() != record.index_sha256:
            raise ValueError("its content has changed since it was written")
        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        if (index.ntotal, index.d) != (record.count, record.key_width):
            raise ValueError(f"it has {index.ntotal} keys of {index.d}")
    except (OSError, ValueError, RuntimeError) as error:
        raise damaged(storage, INDEX_FILE, error) from error
    return index


def faiss_search(index: Any) -> Search:
    """Search in an index of ``build_index``."""
    import torch

    def search(queries: Tensor, neighbours: int) -> Tensor:
        _, rows = index.search(queries.float().cpu().numpy(), neighbours)
        # Where the lists that are searched have too few, the nearest stands for what is missing.
        found = torch.from_numpy(rows)
        return torch.where(found < 0, found[:, :1].clamp_min(0), found)

    return search
