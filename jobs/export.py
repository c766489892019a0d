"""``maskmill export``: a label table → a dataset in another format; a student → a program."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.believed import KnownTable, KnownView, open_believed
from jobs.console import counted, duration, name_run, stderr_console, stop_at_once, timed
from jobs.options import FLAT, Address, Corrected, Flag, Maybe, Settings, Verbose, ViewOptions, named_values
from models.errors import WrongUse, did_you_mean
from pipeline.cluster.session import joins_cluster, make_variables
from pipeline.files.outputs import check_output_folder
from pipeline.files.status import StatusFile, settle_status
from pipeline.files.storage import open_storage
from pipeline.formats.registry import FORMATS, make_format
from pipeline.table.record import TableRecord, find_table_record, read_table_record

if TYPE_CHECKING:
    from pipeline.formats.plan import Plan
    from pipeline.formats.record import Export as Work
    from pipeline.formats.record import ExportRecord

OF_STUDENTS = ("onnx", "torch")
"""Names of ``pipeline.trained.export.EXPORTERS``, which needs torch."""
ON_RAY_FROM = 5_000
"""Images from which Ray works at an export on this machine: it takes seconds to start."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a label table as a dataset in another format, or convert a student to ONNX or torch.export.

    Run the same command again to resume after a crash, or to add what is new in the table.

    Attributes:
        source: the --output of maskmill label or maskmill import, or of maskmill train maskclip-plus.
        output: folder (or s3://… prefix) for the dataset; of a student, the file, ending in .onnx or .pt2.
        overwrite: replace an existing export; only its own files are deleted.
        with_images: copy the images, upright, beside the labels.
        val_share: share of the images (0 to 1) for a split "val"; the rest is "train". Default: the splits
            made by maskmill split, else "train" alone.
        queue: export only the images of this queue of maskmill review: its file, or the table that it lies
            beside.
        manifest: manifest in Parquet that says where images lie within larger files, for --with-images.
        settings: an option of the format, such as min_area=20 of coco; may be repeated.
        workers: number of Ray tasks that work at once; 0: this process alone; default: depends on the table.
    """

    source: Annotated[Positional[str], arg(metavar="TABLE|STUDENT")]
    format: Annotated[
        str,
        arg(
            help="of labels: "
            + "; ".join(f"{name}, {info.title}" for name, info in FORMATS.items())
            + ". Of students: onnx, torch (torch.export)."
        ),
    ]
    output: str
    overwrite: Flag = False
    with_images: Flag = False
    val_share: Maybe[float] = None
    queue: Annotated[Maybe[str], arg(metavar="QUEUE|TABLE")] = None
    corrections: Corrected = None
    known: KnownTable = None
    known_view: KnownView = None
    manifest: Maybe[str] = None
    settings: Settings = ()
    workers: Maybe[int] = None
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)
    address: Address = None
    verbose: Verbose = False

    def run(self, console: Console | None = None) -> int:
        """Write the export, and say how to use it.

        Raises:
            MaskMillError: ``wrong_use`` for a format that does not fit what is exported; see
                ``pipeline.formats.export`` and ``pipeline.trained.export``.
        """
        console = console or stderr_console()
        known = (*FORMATS, *OF_STUDENTS)
        if self.format not in known:
            raise WrongUse(
                "wrong_use",
                f"There is no format {self.format}.",
                f"{did_you_mean(self.format, known)}There are: {', '.join(known)}.",
            )
        table = find_table_record(open_storage(self.source))
        if table is not None and self.format in OF_STUDENTS:
            raise WrongUse(
                "wrong_use",
                f"{self.source} is a label table, and {self.format} is a format of students.",
                f"Formats of tables: {', '.join(FORMATS)}.",
            )
        if self.format in OF_STUDENTS:
            return self._export_student(console)
        if table is None:
            from pipeline.trained.record import is_recorded
            from pipeline.trained.student import StudentRecord

            if is_recorded(StudentRecord, self.source):
                raise WrongUse(
                    "wrong_use",
                    f"{self.source} is a trained model, and {self.format} is a format of label tables.",
                    f"Formats of students: {', '.join(OF_STUDENTS)}.",
                )
            table = read_table_record(self.source)
        return self._export_table(table, console)

    def _export_student(self, console: Console) -> int:
        from pipeline.trained.export import EXPORTERS, SMALLEST

        with timed(console, "exporting, and comparing with the student"):
            made = EXPORTERS[self.format](self.source, Path(self.output), overwrite=self.overwrite)
        lines = [
            f"Exported       {made.path} ({made.format}, {made.size / 1e6:.1f} MB)",
            f"  input        images: uint8 (batch, 3, height, width), RGB; any batch, sides from {SMALLEST}",
            "  output       logits: float32 (batch, classes, height, width); the argmax is the label map",
            f"  compared     logits equal the student's to {made.difference:.0e} of the largest",
            "  metadata     maskmill: JSON with class names, ignore index and the size to resize images to",
        ]
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
        return 0

    def _export_table(self, table: TableRecord, console: Console) -> int:
        from pipeline.formats import export
        from pipeline.formats.marks import OWN_DIR
        from pipeline.formats.plan import make_plan
        from pipeline.formats.record import check_output, find_export, write_record

        began = time.monotonic()
        notices: list[str] = []
        work = self._prepared(table, notices.append)
        check_output(work, overwrite=self.overwrite)
        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        for line in [*self.seen.keep(self.source, work.source.view), *notices]:
            say(line)
        from pipeline.table.lease import Lease, refuse_other_holder

        own = work.output.child(OWN_DIR)
        make_variables(verbose=self.verbose)  # before the lease starts threads
        with ExitStack() as stack:
            lease = stack.enter_context(
                Lease.acquire(own, on_lost=stop_at_once, cluster=joins_cluster(self.address), notice=say)
            )
            fence = functools.partial(refuse_other_holder, own, lease.run_id)
            check_output(work, overwrite=self.overwrite)
            there = find_export(work.output)
            if there is not None and self.overwrite:
                with timed(console, "deleting the old export"):
                    export.delete_export(work.output, fence=fence)
                there = None
            if there is not None and not there.complete:
                export.discard_leftovers(work.output)
            with counted(console, "looking through the table", "files") as progress:
                plan = make_plan(work, progress=progress)
            rows = sum(plan.parts[name].rows for name in plan.todo)
            if there is not None and there.complete and not plan.todo:
                settle_status(own)
                say(f"Nothing new: all {plan.rows:,} rows of {self.source} are in {work.output.uri}.")
                return 0
            status = stack.enter_context(StatusFile(own, "export", lease.run_id, fence=fence, notice=say))
            status.begin()
            name_run(console, lease.run_id)
            write_record(work.output, work.record)
            if plan.done:
                say(f"Going on: {rows:,} of {plan.rows:,} rows are left to do.")
            self._write_parts(work, plan, lease.run_id, fence, status, console)
            took = time.monotonic() - began
            with timed(console, "writing what names all images", status):
                record = export.finish(work, plan, fence=fence)
            lines = [*self._summary(work, record, rows, took)]
            status.update(done=rows, total=rows, unit="images")
            status.finish("ok", lines[0])
        say("\n".join(lines))
        return 0

    def _prepared(self, table: TableRecord, say: Callable[[str], None]) -> Work:
        """What is asked for; says whose labels it has.

        Raises:
            MaskMillError: for anything that is wrong with it, before anything is made.
        """
        from pipeline.corpus.manifest import build_manifest
        from pipeline.formats.record import new_export
        from pipeline.formats.samples import Source
        from pipeline.table.changed import Images
        from pipeline.table.splits import find_split

        made = make_format(self.format, named_values("--set", self.settings, last=False))
        if self.val_share is not None and not 0 <= self.val_share < 1:
            raise WrongUse(
                "wrong_use", f"--val-share {self.val_share} is not a share.", "Give a share, such as 0.1."
            )
        if self.workers is not None and self.workers < 0:
            raise WrongUse(
                "wrong_use", f"--workers {self.workers} is not a number of tasks.", "Give 0 or more."
            )
        view = self.seen.of_table(self.source)
        check_output_folder(self.output)
        only = None
        if self.queue is not None:
            from pipeline.review.queue import read_queue

            only = frozenset(entry.id for entry in read_queue(self.queue).entries)
        manifest = None if self.manifest is None else build_manifest(self.manifest)
        source = Source(
            open_storage(self.source),
            view=None if view is None or view.view.changes_nothing else view,
            with_confidence=made.with_confidence,
            with_images=made.with_images or self.with_images,
            val_share=self.val_share or 0.0,
            split=find_split(self.source) if self.val_share is None else None,
            images=Images(manifest),
            corrections=open_believed(self.source, self.corrections, self.known, self.known_view, say),
            only=only,
        )
        return new_export(source, table, made, open_storage(self.output))

    def _write_parts(
        self,
        work: Work,
        plan: Plan,
        run_id: str,
        fence: Callable[[], None],
        status: StatusFile,
        console: Console,
    ) -> None:
        """Write what is to do, in this process or on Ray."""
        from pipeline.formats.parts import write_part

        total = sum(plan.parts[name].rows for name in plan.todo)
        done = 0
        with ExitStack() as stack:
            workers, results = 0, None
            write = functools.partial(
                write_part, export=work, plan=plan, fence=fence, sync=joins_cluster(self.address)
            )
            if self._on_ray(total):
                from pipeline.cluster.disks import Landmarks, files_of_table
                from pipeline.cluster.mapping import on_ray
                from pipeline.cluster.session import ray_session
                from pipeline.formats.marks import OWN_DIR
                from pipeline.table.labels import table_files

                say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
                with timed(console, "starting Ray", status):
                    workers = stack.enter_context(
                        ray_session(
                            run_id, address=self.address, verbose=self.verbose, notice=say, plan=count_cpus
                        )
                    )
                workers = self.workers or workers
                files = files_of_table(*table_files(work.source.table), images=work.source.with_images)
                landmarks = Landmarks.of(files, output=work.output.child(OWN_DIR), run_id=run_id)
                results = on_ray(write, plan.todo, workers, notice=say, landmarks=landmarks)
            progress = stack.enter_context(counted(console, f"exporting {self.format}", "images", status))
            for counts in results if results is not None else map(write, plan.todo):
                done += counts.rows
                progress(done, total)

    def _on_ray(self, rows: int) -> bool:
        if self.workers is not None:
            return self.workers > 0
        return bool(rows) and (
            joins_cluster(self.address) or (rows >= ON_RAY_FROM and len(os.sched_getaffinity(0)) > 1)
        )

    def _summary(self, work: Work, record: ExportRecord, rows: int, took: float) -> Iterator[str]:
        from pipeline.formats.export import LEFT_OUT_FILE
        from pipeline.formats.record import EXPORT_FILE

        images = sum(record.images.values())
        splits = ", ".join(f"{count:,} {split}" for split, count in record.images.items())
        yield (
            f"Exported {images:,} images ({splits or 'none'}) as {self.format} in {duration(took)}"
            f"{f' ({rows / took:,.0f} images/s)' if rows else ''}"
        )
        for number, file in enumerate(record.files):
            yield f"  {'open first' if number == 0 else '':<12} {work.output.uri_of(file)}"
        if record.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in record.left_out.items())
            yield f"  left out     {sum(record.left_out.values()):,}: {reasons} (see {LEFT_OUT_FILE})"
        lost = ", ".join(f"{count:,} {what}" for what, count in record.lost.items() if count)
        yield f"  not carried  {lost or 'nothing was lost'}"
        yield f"  its record   {work.output.uri_of(EXPORT_FILE)}"
        hint = FORMATS[self.format].next_step
        if hint:
            yield f"Use it:        {hint.format(output=self.output)}"
        yield f"Train on them: maskmill train maskclip-plus --labels {self.source} --output student"


def count_cpus(nodes: Sequence[tuple[float, float]], *, cores: int | None) -> int:
    """Tasks at once: a core each."""
    return cores or max(1, int(sum(cpus for cpus, _ in nodes)))
