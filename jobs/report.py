"""``maskmill report``: result folders → one page of numbers, charts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.files.storage import canonical_uri, is_remote
from pipeline.report.results_page import write_report


def run(folders: Sequence[str | Path], output: Path | None, *, console: Console | None = None) -> int:
    """Write the report of one or several results.

    Args:
        folders: outputs of ``maskmill evaluate`` and ``maskmill benchmark``, here or remote.
        output: the page; None writes ``report.html`` into the first folder, or here if that is remote.
        console: where to say where it is.

    Raises:
        MaskMillError: if a folder has no result or a damaged one, or the output is there and no report.
    """
    console = console or Console()
    if output is None:
        here = not folders or is_remote(canonical_uri(folders[0]))
        output = Path("report.html") if here else Path(folders[0]) / "report.html"
    page = write_report(folders, output)
    console.print(f"Open in a browser: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
    return 0
