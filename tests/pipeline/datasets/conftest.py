"""Tiny copies of the official layouts, written file by file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.files.storage import open_storage

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
Write = Callable[[str, Mapping[str, Any]], None]


def png(ids: np.ndarray, *, palette: bool = False) -> bytes:
    picture = Image.fromarray(ids)
    if palette:
        # Any colours but a grey ramp: reading them as colours must not give the ids back.
        picture.putpalette([(7 * value + 90) % 256 for value in range(768)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def photo(height: int, width: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), (200, 30, 60), np.uint8)).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def write() -> Write:
    """Write files below a root; what is no bytes becomes text, JSON or a mask by its type."""

    def files(root: str, contents: Mapping[str, Any]) -> None:
        place = open_storage(root)
        for name, content in contents.items():
            if isinstance(content, np.ndarray):
                content = png(content)
            elif isinstance(content, str):
                content = content.encode()
            elif not isinstance(content, bytes):
                content = json.dumps(content).encode()
            place.write_bytes(name, content)

    return files


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    folder = DATA / "voc2012_subset"
    if not folder.is_dir():
        pytest.skip("the real VOC subset is not on this machine")
    return folder


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    folder = DATA / "coco_tiny"
    if not folder.is_dir():
        pytest.skip("the real COCO subset is not on this machine")
    return folder
