"""``maskmill export``: convert a student for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import stderr_console, timed
from jobs.options import Flag


@dataclass(frozen=True, kw_only=True)
class Export:
    """Convert a student to ONNX or torch.export, and check that it computes the same.

    Attributes:
        student: the --output of maskmill train maskclip-plus.
        format: onnx, or torch for torch.export.
        output: file to write, ending in .onnx or .pt2.
        overwrite: replace an existing file.
    """

    student: Annotated[Positional[str], arg(metavar="STUDENT")]
    format: Literal["onnx", "torch"]
    output: Path
    overwrite: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Write the file, and say how to use it."""
        from pipeline.trained.export import EXPORTERS, SMALLEST

        console = console or stderr_console()
        with timed(console, "exporting, and comparing with the student"):
            made = EXPORTERS[self.format](self.student, self.output, overwrite=self.overwrite)
        lines = [
            f"Exported       {made.path} ({made.format}, {made.size / 1e6:.1f} MB)",
            f"  input        images: uint8 (batch, 3, height, width), RGB; any batch, sides from {SMALLEST}",
            "  output       logits: float32 (batch, classes, height, width); the argmax is the label map",
            f"  compared     logits equal the student's to {made.difference:.0e} of the largest",
            "  metadata     maskmill: JSON with class names, ignore index and the size to resize images to",
        ]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        return 0
