"""Mutations of bytes and of nested data; everything random comes from the caller's generator."""

from __future__ import annotations

import copy
import random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 255, 256, 2**31, -(2**31) - 1, 2**63, 10**30, 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "-1", "nan", "null", "é", "猫", "e\u0301",
    "\u200b", "\0", "\n", "a" * 5000, "../../x", "/dev/zero", "{}", "%s", [], {}, [[]], [None], [0, 0],
    [0.0] * 6, {"": None}, {"a": {"a": 1}}, [1, "2", None],
)  # fmt: skip
_EDGES = (0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def mutate_bytes(rng: random.Random, data: bytes, *, most: int = 4) -> bytes:
    """Apply 0 to ``most`` random changes, half of them near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, most)):
        _change(rng, changed)
    return bytes(changed)


def _change(rng: random.Random, data: bytearray) -> None:
    size = len(data)
    reach = min(size, 64) if rng.random() < 0.5 else size
    at = rng.randrange(reach + 1)
    length = min(size - at, int(2 ** rng.uniform(0, 10)))
    match rng.randrange(11):
        case 0 if at < size:
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < size:
            data[at] = rng.randrange(256)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.randbytes(length or 1)
        case 4:
            del data[at : at + length]
        case 5:
            data[at:at] = data[at : at + length]
        case 6:
            data[at : at + length] = bytes(length)
        case 7:
            data[at : at + length] = b"\xff" * length
        case 8:
            width = rng.choice((1, 2, 4))
            edge = rng.choice(_EDGES) % 256**width
            data[at : at + width] = edge.to_bytes(width, rng.choice(("little", "big")))
        case 9:
            data += rng.randbytes(length or 1)
        case 10:
            other = rng.randrange(size + 1)
            data[at : at + length] = data[other : other + length]


def mutate_tree(rng: random.Random, tree: Any, *, most: int = 3) -> Any:
    """Change 0 to ``most`` places of nested dicts and lists."""
    holder = {"root": copy.deepcopy(tree)}
    for _ in range(rng.randint(0, most)):
        places = list(_places(holder))
        container, key = rng.choice(places)
        _change_place(rng, container, key, holder["root"])
    return holder["root"]


def _places(container: Any) -> list[tuple[Any, Any]]:
    found = []
    keys = list(container) if isinstance(container, dict) else range(len(container))
    for key in keys:
        found.append((container, key))
        if isinstance(container[key], dict | list):
            found += _places(container[key])
    return found


def _change_place(rng: random.Random, container: Any, key: Any, root: Any) -> None:
    value = container[key]
    match rng.randrange(10):
        case 0 | 1 | 2:
            container[key] = copy.deepcopy(rng.choice(JUNK))
        case 3:
            if len(container) > 1:
                del container[key]
        case 4:
            container[key] = [value]
        case 5:
            container[key] = str(value)
        case 6 if isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(value))
        case 7 if isinstance(container, dict) and value is not root:
            container[rng.choice(("x", "id", "name", str(key).upper(), f" {key}"))] = container.pop(key)
        case 8:
            for _ in range(rng.choice((3, 30, 300))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            container[key] = value
        case 9 if isinstance(value, int | float):
            container[key] = value * rng.choice((-1, 0, 1000, 1e-3, 1e12))
        case _:
            container[key] = copy.deepcopy(root) if rng.random() < 0.1 else copy.deepcopy(rng.choice(JUNK))
