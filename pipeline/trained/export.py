"""A student as a program for other runtimes: ``torch.export`` (.pt2) and ONNX.

Both take and give the same, at any batch size and any height and width from 16 pixels:

* input ``images``: uint8 (B, 3, H, W), RGB; normalisation is part of the program;
* output ``logits``: float32 (B, C, H, W), one score per class and pixel.

``logits.argmax(1)`` is the label map and ``softmax(logits, 1).max(1)`` its confidence, which is what the
student's Labeller gives for an image of the size that it is fed (it resizes first: ``labelling`` in the
metadata). Logits rather than labels, so that thresholds, merging tiles and resizing to another size remain
possible; C scores a pixel is what that costs.

A program is compared with the student itself before it is put in place.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import FailedWork, WrongUse
from pipeline.files.outputs import check_output_file
from pipeline.trained.student import StudentRecord, load_student, read_student_record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.student.deeplab import DeepLab

OPSET = 18
"""Of the ONNX file: the oldest that PyTorch's exporter writes, so that most runtimes read it."""
TOLERANCE = 1e-4
"""Greatest difference of a logit, relative to the greatest of all: what another order of summing may do."""
SMALLEST = 16
"""Least height and width of a program's images: below it a grid of one cell would be a case of its own."""
METADATA_KEY = "maskmill"

_CHECKED_SIZES = ((1, 96, 128), (3, 75, 53))  # B, H, W; odd, and more than one


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: in words.
        path: the file.
        size: in bytes.
        difference: greatest relative difference of a logit from the student's own, as ``TOLERANCE``.
    """

    format: str
    path: Path
    size: int
    difference: float


def to_torch_export(folder: str | Path, path: str | Path, *, overwrite: bool = False) -> Exported:
    """Write a student as a ``torch.export`` program; ``torch.export.load(path).module()`` runs it.

    Its extra file ``maskmill`` is the JSON of ``export_metadata``.

    Args:
        folder: the student's, local or in an object store.
        path: of the file; ends in ``.pt2``.
        overwrite: replace a file that is there.

    Raises:
        MaskMillError: as ``pipeline.trained.student``; ``wrong_use``, ``output_exists``,
            ``export_failed``.
    """

    def write(model: DeepLab, metadata: str, target: Path) -> None:
        import torch

        program = _program(model)
        torch.export.save(program, target, extra_files={METADATA_KEY: metadata})

    def load(target: Path) -> Callable[[np.ndarray], np.ndarray]:
        import torch

        module = torch.export.load(target).module()
        return lambda images: module(torch.from_numpy(images)).numpy()

    return write_checked(folder, Path(path), "torch.export", ".pt2", overwrite, write, load)


def to_onnx(folder: str | Path, path: str | Path, *, overwrite: bool = False) -> Exported:
    """Write a student as an ONNX file of opset ``OPSET`` with the axes batch, height and width open.

    Its metadata property ``maskmill`` is the JSON of ``export_metadata``.

    Args:
        folder: the student's, local or in an object store.
        path: of the file; ends in ``.onnx``.
        overwrite: replace a file that is there.

    Raises:
        MaskMillError: as ``to_torch_export``; ``package_missing`` without ``onnx``, ``onnxscript`` and
            ``onnxruntime``.
    """
    absent = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if absent:
        raise WrongUse(
            "package_missing",
            f"ONNX needs {', '.join(absent)}, which MaskMill does not install by itself.",
            f"pip install {' '.join(absent)}",
        )

    def write(model: DeepLab, metadata: str, target: Path) -> None:
        import onnx
        import torch

        exported = torch.onnx.export(
            _program(model),
            input_names=["images"],
            # Already in the program; given again for the names that its open axes get.
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert exported is not None
        proto = exported.model_proto
        onnx.helper.set_model_props(proto, {METADATA_KEY: metadata})
        onnx.checker.check_model(proto)
        onnx.save(proto, target)

    def load(target: Path) -> Callable[[np.ndarray], np.ndarray]:
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        return lambda images: np.asarray(session.run(["logits"], {"images": images})[0])

    return write_checked(folder, Path(path), f"ONNX, opset {OPSET}", ".onnx", overwrite, write, load)


EXPORTERS: Mapping[str, Callable[..., Exported]] = {"onnx": to_onnx, "torch": to_torch_export}
"""By the name of the format in ``maskmill export``."""


def export_metadata(record: StudentRecord) -> dict[str, Any]:
    """What a program says about itself: classes, sizes, and which student it is."""
    fields = record.to_dict()
    return {
        "classes": fields["ontology"]["names"],
        "ignore_index": record.ontology.ignore_index,
        "ontology": fields["ontology"],
        "labelling": fields["labelling"],
        "fingerprint": record.fingerprint,
        "created": record.created,
    }


def write_checked(
    folder: str | Path,
    path: Path,
    format: str,
    suffix: str,
    overwrite: bool,
    write: Callable[[DeepLab, str, Path], None],
    load: Callable[[Path], Callable[[np.ndarray], np.ndarray]],
) -> Exported:
    """Write a program to a temporary file, compare it with the student, and put it in place.

    Args:
        folder: the student's, local or in an object store.
        path: of the file.
        format: in words.
        suffix: that ``path`` must have.
        overwrite: replace a file that is there.
        write: writes the program of a student, and its ``export_metadata`` as JSON, to a file.
        load: reads that file and returns what maps images uint8 (B, 3, H, W) to logits (B, C, H, W).

    Raises:
        MaskMillError: as ``to_torch_export``.
    """
    if path.suffix != suffix:
        raise WrongUse(
            "wrong_use",
            f"{path} does not end in {suffix}, which programs that load it look for.",
            f"Name it {path.stem}{suffix}.",
        )
    check_output_file(path)
    if path.exists() and not overwrite:
        raise WrongUse(
            "output_exists", f"There is a file {path} already.", "Name another, or add --overwrite."
        )
    record = read_student_record(folder)
    import torch

    model = load_student(record, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(False)
    metadata = json.dumps(export_metadata(record), ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as made:
        target = Path(made) / path.name
        with _quiet():
            try:
                write(model, metadata, target)
            except Exception as error:  # the exporters raise dozens of unrelated types
                raise FailedWork(
                    "export_failed",
                    f"PyTorch {torch.__version__} could not export the student: "
                    f"{type(error).__name__}: {_first_line(error)}.",
                    "Use the versions of requirements.txt, with which every kind of student was exported.",
                ) from error
        difference = _difference(model, load(target))
        if not difference <= TOLERANCE:
            raise FailedWork(
                "export_failed",
                f"The exported program's logits are off by {difference:.1e} of the largest one, more than "
                f"{TOLERANCE:.0e}; nothing was written.",
                "Use the versions of requirements.txt, with which every kind of student was exported.",
            )
        os.replace(target, path)
    return Exported(format, path, path.stat().st_size, difference)


def _program(model: DeepLab) -> torch.export.ExportedProgram:
    import torch

    # Two images: with one, torch.export takes the batch for a constant.
    example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    sizes = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=SMALLEST),
        3: torch.export.Dim("width", min=SMALLEST),
    }
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes={"images": sizes}, strict=False)


def _difference(model: DeepLab, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Greatest difference of a program from its student, over some sizes, relative to the greatest logit."""
    import torch

    found = []
    rng = np.random.default_rng(0)
    for batch, height, width in _CHECKED_SIZES:
        images = rng.integers(0, 256, (batch, 3, height, width), dtype=np.uint8)
        with torch.inference_mode():
            expected: Tensor = model(torch.from_numpy(images))
        given = torch.from_numpy(run(images))
        if given.shape != expected.shape:
            return float("inf")
        scale = float(expected.abs().max()) or 1.0
        found.append(float((given - expected).abs().max()) / scale)
    return float(np.max(found))  # NaN if one is, unlike max()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their progress and what they deprecate; neither is for users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300].rstrip(".")
