"""A student as one file: weights, text classifier and configuration in safetensors.

The configuration is JSON in the file's metadata, so the file is self-contained. It holds no code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load, save

from models.clip.text import TextClassifier
from models.errors import Damaged, MaskMillError, WrongUse
from models.files import write_file
from models.settings import StudentConfig
from models.student.deeplab import DeepLab

FILE = "model.safetensors"
_ENTRY = "maskmill_student"  # one entry, because safetensors does not fix the order of several
_VERSION = 1  # of the entry and the tensor names


def write_student(folder: Path, model: DeepLab) -> Path:
    """Write a student into a folder as ``model.safetensors``, replacing an existing file atomically.

    Args:
        folder: created if necessary.
        model: on any device, in any dtype; the file keeps the dtype.

    Returns:
        The file's path.
    """
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
        {_ENTRY: json.dumps({"version": _VERSION, "config": model.config.model_dump()})},
    )
    path = folder / FILE
    write_file(path, data)
    return path


def read_student(
    source: Path | bytes, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DeepLab:
    """Read a file of ``write_student``.

    Args:
        source: the file, or its bytes.
        device: the student's device.
        dtype: of its weights; None keeps the file's. The text classifier stays in fp32.

    Returns:
        The student in evaluation mode.

    Raises:
        OSError: the file cannot be read.
        MaskMillError: ``model_damaged`` if it is damaged or not a student; ``newer_version`` if a later
            MaskMill wrote it.
    """
    data, name = (source, "The data") if isinstance(source, bytes) else (source.read_bytes(), str(source))
    try:
        tensors = load(data)
        about = json.loads(_metadata(data).get(_ENTRY, "null"))
    except Exception as error:  # on damaged files the readers raise many types
        raise _unreadable(name, f"it is no safetensors file, or damaged: {error}") from error
    if not isinstance(about, dict):
        raise _unreadable(name, "it is a safetensors file of something else")
    if about.get("version") != _VERSION:
        raise WrongUse(
            "newer_version",
            f"{name} is a student of version {about.get('version')!r}; this MaskMill reads {_VERSION}.",
            "Use the version of MaskMill that trained it, or train it again with this one.",
        )
    try:
        config = StudentConfig(**about["config"])
        class_ids = tensors["text_class_ids"]
        text = TextClassifier(tensors["text_rows"].float(), class_ids, int(class_ids.max()) + 1)
        with torch.random.fork_rng(devices=[]):  # do not change the global random state
            model = DeepLab(config, text)
        model.load_state_dict(tensors, assign=True)
    except Exception as error:  # what does not fit shows in many ways
        reason = error.message if isinstance(error, MaskMillError) else " ".join(str(error).split())
        raise _unreadable(name, f"its parts do not fit together: {reason[:300]}") from error
    model.to(device, dtype)
    model.set_classifier(text)
    return model.eval()


def fingerprint(source: Path | bytes) -> str:
    """SHA-256 of a student's file in hex."""
    digest = hashlib.sha256()
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file, which starts with the length of a JSON header, then the header."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _unreadable(name: str, reason: str) -> MaskMillError:
    return Damaged(
        "model_damaged",
        f"{name} cannot be read as a student: {reason}.",
        f"Name the {FILE} that training left in its output folder; copy it again if it was cut off.",
    )
