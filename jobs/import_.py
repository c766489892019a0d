"""``maskmill import``: a dataset with masks → a label table of true labels."""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from jobs.console import (
    counted,
    duration,
    name_run,
    say_left_out,
    stderr_console,
    stop_at_once,
    timed,
)
from jobs.options import FLAT, Flag, Maybe, Truth
from models.errors import WrongUse
from pipeline.corpus.spill import ALL
from pipeline.files.outputs import check_output_folder
from pipeline.files.records import now
from pipeline.files.status import StatusFile
from pipeline.files.storage import Storage, open_storage
from pipeline.files.versions import versions
from pipeline.formats.base import Imported
from pipeline.formats.registry import find_reader, readable
from pipeline.ontology.reading import load_ontology
from pipeline.table.committed import (
    LABELS_DIR,
    RELABELLED_DIR,
    Replaced,
    apply_relabelled,
    part_files,
    settle,
)
from pipeline.table.corrections import CORRECTIONS_DIR
from pipeline.table.increment import (
    Table,
    failed_ids,
    no_table,
    nothing_failed,
    open_table,
    record_counts,
)
from pipeline.table.index import Ids
from pipeline.table.labels import DATASET_FILE, OK, Counts, summarise
from pipeline.table.lease import Lease, refuse_other_holder
from pipeline.table.record import TableRecord, find_table_record, read_table_record, write_table_record

PACKAGES = ("maskmill", "pyarrow", "pillow", "opencv-python-headless", "numpy")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import a dataset with masks: it becomes a label table, whose labels count as true.

    Commands that take a table take it: train, evaluate, show, export. Run the same command again to resume
    after a crash.

    Attributes:
        input: folder (or s3://… prefix) of the dataset, or a JSON file (COCO, Label Studio); --images says
            where its images are, if elsewhere.
        output: folder (or s3://… prefix) for the label table; with --corrects, for the corrections, by
            default corrections/ beside that table.
        corrects: a label table that people have corrected in another program, such as Label Studio or CVAT:
            what --input has of its images becomes corrections of it.
        reviewer: who made the corrections; for --corrects.
        ontology: what the values of --truth mean: a YAML file or a built-in name (voc21, …).
        max_failure_rate: exit with 1 if a larger share of the images fails.
        retry_failed: read only the images again that failed, or whose masks did; codes select some
            ("--retry-failed mask_invalid not_found").
        overwrite: delete a table of true labels that is already in --output and start over.
    """

    format: Annotated[
        Maybe[str], arg(help=f"of the dataset in --input: {', '.join(readable())}.", help_behavior_hint="")
    ] = None
    input: Maybe[str] = None
    data: Annotated[Truth, FLAT] = field(default_factory=Truth)
    ontology: Maybe[str] = None
    output: Maybe[str] = None
    corrects: Annotated[Maybe[str], arg(metavar="TABLE")] = None
    reviewer: str = ""
    max_failure_rate: float = 0.05
    retry_failed: Maybe[tuple[str, ...]] = None
    overwrite: Flag = False

    def run(self, console: Console | None = None) -> int:
        """Import the samples that have no row yet, or those that failed.

        Returns:
            0, or 1 if more than ``max_failure_rate`` of the images failed.

        Raises:
            MaskMillError: ``wrong_use``; ``output_differs``, ``output_not_ours``; ``input_missing``; what the
                reader of the format says.
        """
        console = console or stderr_console()
        if self.retry_failed is not None and (self.overwrite or self.corrects is not None):
            raise WrongUse(
                "wrong_use",
                "--retry-failed continues a table; --overwrite starts over, and --corrects imports none.",
                "Leave one of them out.",
            )
        if not 0 <= self.max_failure_rate <= 1:
            raise WrongUse(
                "wrong_use",
                f"--max-failure-rate {self.max_failure_rate} is not between 0 and 1.",
                "Give a share, such as 0.05.",
            )
        if self.corrects is not None:
            return self._take_back(self.corrects, console)
        if self.output is None:
            raise WrongUse("wrong_use", "An import needs --output.", "Name a folder for the label table.")
        check_output_folder(self.output)
        storage = open_storage(self.output)
        kind, imported = self._open(console)
        record = _new_record(kind, imported)
        if _refuse_other(storage, record, overwrite=self.overwrite) is None and self.retry_failed is not None:
            raise no_table(storage)
        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        began = time.monotonic()
        with ExitStack() as stack:
            lease = stack.enter_context(Lease.acquire(storage, on_lost=stop_at_once, notice=say))
            fence = functools.partial(refuse_other_holder, storage, lease.run_id)
            recorded = _refuse_other(storage, record, overwrite=self.overwrite)
            if recorded is not None and self.overwrite:
                _delete(storage)
                recorded = None
            table = Table() if recorded is None else open_table(storage, recorded, fence, say)
            before = table.index.rows
            if recorded is None:
                write_table_record(storage, record)
            status = stack.enter_context(StatusFile(storage, "import", lease.run_id, fence=fence, notice=say))
            status.begin()
            name_run(console, lease.run_id)
            again, nothing = None, f"Nothing new: all {before:,} images are in {storage.uri}."
            if self.retry_failed is not None:
                from pipeline.formats.importing import UNREADABLE

                again = failed_ids(self.retry_failed, storage, table, possible=UNREADABLE)
                nothing = nothing_failed(self.retry_failed, storage)
            fresh, replaced, repeated = self._import(imported, storage, table, again, fence, status, console)
            for line in imported.left_out():
                say(line)
            if again is not None and len(again) > len(replaced.ids):
                nothing = "Nothing to read again."
                gone = len(again) - len(replaced.ids)
                say(f"{gone:,} images that failed are no longer in the dataset: their rows stay.")
            if len(replaced.ids) or fresh.images or table.counts is None:  # None: one was killed before this
                with timed(console, "counting what is new", status):
                    record_counts(storage, table, fresh, replaced)
            fresh.add(replaced.added)
            failures = {code: count for code, count in fresh.status.items() if code != OK}
            too_many = self._too_many(fresh)
            status.update(done=fresh.images, total=fresh.images, unit="images", failures=failures)
            status.finish("failed" if too_many else "ok", too_many)
        self._tell(storage, fresh, nothing, repeated, time.monotonic() - began, console)
        if too_many:
            console.print(too_many, style="bold red", soft_wrap=True, highlight=False)
            return 1
        return 0

    def _take_back(self, corrects: str, console: Console) -> int:
        """What people have corrected elsewhere, as corrections of a table."""
        from pipeline.formats.labelstudio import read_labelstudio
        from pipeline.review.returning import refuse_pseudo, take_back
        from pipeline.review.saving import Saves

        record, table = read_table_record(corrects), open_storage(corrects)
        refuse_pseudo(record, table)
        if self.format is None or self.overwrite:
            raise WrongUse(
                "wrong_use",
                "--corrects takes back a dataset of a --format, and overwrites nothing.",
                "Add --format labelstudio or cvat and --input, and leave out --overwrite.",
            )
        place = table.uri_of(CORRECTIONS_DIR) if self.output is None else self.output
        check_output_folder(place)
        if self.format == "labelstudio" and self.input is not None:
            imported = read_labelstudio(self.input, images=self.data.images, annotated=True)
        else:
            _, imported = self._open(console)
        saves = Saves(open_storage(place))
        saves.begin(record.ontology, table.uri)
        with counted(console, "taking back", "images") as progress:
            done = take_back(
                imported,
                table,
                record,
                saves,
                reviewer=self.reviewer or self.format,
                progress=lambda number: progress(number, imported.count or number),
            )
        lines = [
            f"Corrections    {saves.storage.uri}: {done.decisions.total():,} images, "
            f"{done.decisions['painted']:,} of them with other labels than the table"
        ]
        lines += [f"  the same     {done.same:,} were there already"] if done.same else []
        lines += (
            [f"  replaced     {done.replaced:,}; what was painted is in set_aside/"] if done.replaced else []
        )
        lines += [f"  left out     {count:,} {why}" for why, count in done.left_out.items()]
        if done.absent:
            lines.append(f"  ignored      pixels of {', '.join(done.absent)}: the table has no such class")
        lines.append(f"Train on them: maskmill train maskclip-plus --labels {corrects} --output student")
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
        return 0

    def _too_many(self, fresh: Counts) -> str:
        """What to say if more images failed than may; else empty."""
        failed = fresh.images - fresh.status.get(OK, 0)
        if failed <= self.max_failure_rate * fresh.images:
            return ""
        return (
            f"{failed / fresh.images:.1%} of the images failed, more than --max-failure-rate "
            f"{self.max_failure_rate:.1%}."
        )

    def _open(self, console: Console) -> tuple[str, Imported]:
        """The dataset, and what it is."""
        if self.format is not None:
            if self.data.dataset or self.data.root or self.data.split or self.data.truth or self.ontology:
                raise WrongUse(
                    "wrong_use",
                    "--format reads --input, and takes no other option than --images.",
                    "Leave out --dataset, --root, --split, --truth and --ontology, or --format.",
                )
            if self.input is None:
                raise WrongUse("wrong_use", "--format needs --input.", "Add the folder of the dataset.")
            if Path(self.input).is_file() and not self.input.lower().endswith(".json"):
                raise WrongUse(
                    "dataset_missing",
                    f"{self.input} is a file; a dataset in the format {self.format} is a folder.",
                    "Give the folder that holds it.",
                )
            with timed(console, "opening the dataset"):
                return self.format, find_reader(self.format)(self.input, images=self.data.images)
        if self.input is not None:
            raise WrongUse(
                "wrong_use",
                f"What is in {self.input} is not known.",
                f"Add --format: {', '.join(readable())}.",
            )
        from pipeline.datasets.imported import as_imported

        ontology = None if self.ontology is None else load_ontology(self.ontology)
        with timed(console, "opening the dataset"):
            dataset = self.data.open(ontology, table=None, command="import")
        say_left_out(console, dataset)
        return f"{dataset.name} {dataset.split}", as_imported(dataset)

    def _import(
        self,
        imported: Imported,
        storage: Storage,
        table: Table,
        again: Ids | None,
        fence: functools.partial[None],
        status: StatusFile,
        console: Console,
    ) -> tuple[Counts, Replaced, int]:
        """Counts of the new rows, those that were replaced, and how many samples were listed twice."""
        from pipeline.formats.importing import import_samples

        total = imported.count
        with counted(console, "importing", "images", status) as progress:
            repeated = import_samples(
                imported.samples,
                storage,
                ignore_index=imported.ontology.ignore_index,
                done=table.index.ids(ALL),
                again=again,
                fence=fence,
                progress=lambda done: progress(done, total if total is not None else done),
            )
        new = settle(storage, [part for part in part_files(storage) if part not in table.index])
        replaced = apply_relabelled(storage, table.index, fence=fence)
        return Counts(summarise(storage, list(new))), replaced, repeated

    def _tell(
        self, storage: Storage, fresh: Counts, nothing: str, repeated: int, took: float, console: Console
    ) -> None:
        images, made = fresh.images, fresh.status.get(OK, 0)
        failed = images - made
        lines = [f"Imported {made:,} images with true labels in {duration(took)}" if images else nothing]
        if failed:
            codes = ", ".join(f"{n:,} {code}" for code, n in sorted(fresh.status.items()) if code != OK)
            lines.append(f"  {failed:,} failed: {codes} (rows with a status; maskmill show lists them)")
        if repeated:
            lines.append(f"  {repeated:,} images were listed again, and taken once")
        lines += [
            f"  label table  {storage.uri}/{LABELS_DIR}/*.parquet",
            f"Look at it:    maskmill show {self.output}",
            f"Train on it:   maskmill train clipseg --labels {self.output} --output model",
        ]
        console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _new_record(kind: str, imported: Imported) -> TableRecord:
    """The ``dataset.json`` of an import. Its recipe changes nothing: readers of tables expect one."""
    from pipeline.labelling.recipes import LabelRecipe

    recipe = LabelRecipe(name=f"import of {kind}", model="truth", pretrained=None, precision="fp32")
    return TableRecord(
        created=now(),
        source="truth",
        ontology=imported.ontology,
        recipe=recipe.to_dict() | {"hash": recipe.hash},
        weights={"model": "truth", "pretrained": kind, "fingerprint": ""},
        precision="fp32",
        versions=versions(PACKAGES),
    )


def _refuse_other(storage: Storage, record: TableRecord, *, overwrite: bool) -> TableRecord | None:
    """The record of an import that exists and is resumed; None for a new table.

    Raises:
        MaskMillError: ``output_differs``, ``output_not_ours``.
    """
    found = find_table_record(storage)
    if found is None:
        if storage.list(LABELS_DIR, recursive=True):
            raise WrongUse(
                "output_not_ours",
                f"{storage.uri} has files in {LABELS_DIR}/ but no {DATASET_FILE} that says what they are.",
                "Name another --output.",
            )
        return None
    if found.source != "truth":
        raise WrongUse(
            "output_differs",
            f"{storage.uri} holds labels of a model, not true ones.",
            "Name another --output.",
        )
    same = (found.ontology.hash, found.recipe.get("name")) == (record.ontology.hash, record.recipe["name"])
    if not same and not overwrite:
        raise WrongUse(
            "output_differs",
            f"{storage.uri} holds another {found.recipe.get('name')}, or one with other classes.",
            "Name another --output, or start over with --overwrite.",
        )
    return found


def _delete(storage: Storage) -> None:
    from pipeline.formats.importing import IMAGES_DIR

    for entry in (DATASET_FILE, LABELS_DIR, RELABELLED_DIR, IMAGES_DIR):
        storage.delete(entry)
