"""``maskmill export``: a student as a program for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from jobs.console import stderr_console

Format = Literal["onnx", "torch"]


def run(
    student: str,
    *,
    format: Format,
    output: Path,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Write the program, compared with the student, and say how to use it.

    Args:
        student: the ``--output`` of ``maskmill train``.
        format: ``onnx``, or ``torch`` for a program of ``torch.export``.
        output: the file, ``.onnx`` or ``.pt2``.
        overwrite: replace a file that is there.
        console: for what it says.

    Raises:
        MaskMillError: as ``pipeline.trained.export``.
    """
    from pipeline.trained.export import OPSET, SMALLEST, to_onnx, to_torch_export

    console = console or stderr_console()
    with console.status("exporting, and comparing with the student"):
        write = to_onnx if format == "onnx" else to_torch_export
        made = write(student, output, overwrite=overwrite)
    kind = f"ONNX, opset {OPSET}" if format == "onnx" else "torch.export"
    lines = (
        f"Exported       {made.path} ({kind}, {made.size / 1e6:.1f} MB)",
        f"  input        images: uint8 (batch, 3, height, width), RGB; any batch, sides from {SMALLEST}",
        "  output       logits: float32 (batch, classes, height, width); argmax of classes is the label map",
        f"  compared     logits equal the student's to {made.difference:.0e} of the largest",
        "  metadata     maskmill: JSON with class names, ignore index and the size to resize images to",
    )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    return 0
