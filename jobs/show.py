"""``maskmill show``: label table → one page of pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import stderr_console, timed
from jobs.options import FLAT, Maybe, ViewOptions
from pipeline.files.outputs import check_output_file
from pipeline.files.storage import canonical_uri, is_remote
from pipeline.report.gallery import Order, write_gallery
from pipeline.report.gallery_filter import Only
from pipeline.table.record import read_table_record


@dataclass(frozen=True, kw_only=True)
class Show:
    """Make a page of pictures from a label table: overlays, coverage, confidence, failures.

    Attributes:
        table: the --output of maskmill label.
        output: page to write; default: gallery.html in the table's folder, or here if the table is remote.
        limit: largest number of labelled images on the page.
        order: which images: a sample, or those with the worst or the best quality of the table.
        name: show images in whose labels this class is.
        status: show images with this status: ok, or the code of a failure.
        quality: show images whose quality is in this range, the upper end left out: 0-0.5.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    output: Maybe[Path] = None
    limit: int = 60
    order: Order = "sample"
    name: Annotated[Maybe[str], arg(name="class", metavar="NAME")] = None
    status: Annotated[Maybe[str], arg(metavar="ok|CODE")] = None
    quality: Annotated[Maybe[str], arg(metavar="LOW-HIGH")] = None
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)

    def run(self, console: Console | None = None) -> int:
        """Write the page.

        Raises:
            MaskMillError: if there is no label table.
        """
        console = console or Console()
        remote = is_remote(canonical_uri(self.table))
        output = self.output or (Path() if remote else Path(self.table)) / "gallery.html"
        read_table_record(self.table)
        only = Only.of(self.name, self.status, self.quality)
        view = self.seen.of_table(self.table)
        check_output_file(output)
        for line in self.seen.keep(self.table, view):
            console.print(line, soft_wrap=True, highlight=False)
        with timed(stderr_console(), "writing the page"):
            page = write_gallery(self.table, output, limit=self.limit, order=self.order, view=view, only=only)
        console.print(f"Open in a browser: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
        return 0
