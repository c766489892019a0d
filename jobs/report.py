"""``maskmill report``: result folders → one page of numbers, charts and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import stderr_console, timed
from jobs.options import Maybe
from pipeline.files.storage import canonical_uri, is_remote
from pipeline.report.results_page import write_report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make one page from result folders: scores next to published ones, curves, worst and best images.

    Attributes:
        results: folders of maskmill evaluate or maskmill benchmark.
        output: page to write; default: report.html in the first folder, or here if that is remote.
    """

    results: Annotated[Positional[tuple[str, ...]], arg(metavar="RESULT...", help_behavior_hint="")]
    output: Maybe[Path] = None

    def run(self, console: Console | None = None) -> int:
        """Write the page.

        Raises:
            MaskMillError: if a folder has no result or a damaged one, or the output exists but is no report.
        """
        console = console or Console()
        here = not self.results or is_remote(canonical_uri(self.results[0]))
        output = self.output or (Path() if here else Path(self.results[0])) / "report.html"
        with timed(stderr_console(), "writing the page"):
            page = write_report(self.results, output)
        console.print(f"Open in a browser: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
        return 0
