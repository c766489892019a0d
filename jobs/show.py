"""``maskmill show``: a label table → one page of pictures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.files.storage import canonical_uri, is_remote
from pipeline.report.gallery import write_gallery


def run(table: str, *, output: Path | None, limit: int, console: Console | None = None) -> int:
    """Write the gallery of a label table.

    Args:
        table: folder of the table, here or remote.
        output: the page; None writes ``gallery.html`` beside the table, or here if the table is remote.
        limit: images on the page.
        console: where to say where it is.

    Raises:
        MaskMillError: if there is no label table.
    """
    console = console or Console()
    if output is None:
        output = Path("gallery.html") if is_remote(canonical_uri(table)) else Path(table) / "gallery.html"
    page = write_gallery(table, output, limit=limit)
    console.print(f"Open in a browser: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
    return 0
