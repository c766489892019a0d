"""``maskmill memory``: a memory of a corpus's regions, from a label table."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, cast

from rich.console import Console
from tyro.conf import Positional, arg, subcommand

from jobs.console import counted, duration, name_run, stderr_console, stop_at_once, timed
from jobs.export import count_cpus
from jobs.options import FLAT, Address, Flag, Maybe, Verbose
from models.errors import WrongUse
from pipeline.cluster.session import joins_cluster, make_variables
from pipeline.files.outputs import check_output_folder
from pipeline.files.status import StatusFile, settle_status
from pipeline.files.storage import Storage, canonical_uri, open_storage
from pipeline.memory.record import (
    INDEX_FILE,
    MEMORY_FILE,
    PARTS_DIR,
    MemoryRecord,
    PartRecord,
    find_memory_record,
    read_memory_record,
)
from pipeline.table.lease import Lease, refuse_other_holder
from pipeline.table.record import TableRecord, read_table_record

if TYPE_CHECKING:
    from pipeline.labelling.labeller import PreparedLabeller
    from pipeline.labelling.maskclip import MaskClipLabeller
    from pipeline.memory.build import Plan, Source


@dataclass(frozen=True, kw_only=True)
class BuildMemory:
    """Build a memory of regions from a label table, for --set memory=MEMORY of maskmill label.

    Run the same command again to resume after a crash, or to add what is new in the table.

    Attributes:
        table: the --output of maskmill label, labelled by a CLIP.
        output: folder (or s3://… prefix) for the memory.
        regions: clusters: of CLIP's features; labels: connected cells of one label; superpixels: of colour
            and place.
        key_block: number of the block of the tower, from 0, whose tokens are the keys; default: after a third
            of them.
        index: exact compares with all keys; faiss searches lists of them, for millions of regions, and has
            to be installed.
        manifest: manifest in Parquet that says where images lie within larger files.
        overwrite: delete a memory that is already in --output and start over.
        workers: number of Ray tasks that work at once; 0: this process alone; default: one per core.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    output: str
    regions: Literal["clusters", "labels", "superpixels"] = "clusters"
    key_block: Maybe[int] = None
    index: Literal["exact", "faiss"] = "exact"
    manifest: Maybe[str] = None
    overwrite: Flag = False
    workers: Maybe[int] = None
    address: Address = None
    verbose: Verbose = False

    def run(self, console: Console | None = None) -> int:
        """Build the memory, and say how to use it.

        Raises:
            MaskMillError: for anything that the user can fix; ``output_differs`` if the output holds another
                memory.
        """
        console = console or stderr_console()
        began = time.monotonic()
        if self.workers is not None and self.workers < 0:
            raise WrongUse(
                "wrong_use", f"--workers {self.workers} is not a number of tasks.", "Give 0 or more."
            )
        table = read_table_record(self.table)
        check_output_folder(self.output)
        if self.index == "faiss":
            from pipeline.memory.index import import_faiss

            import_faiss()
        prepared, record, source = self._prepared(table)
        output = open_storage(self.output)
        self._refuse_others(output, record)
        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        make_variables(verbose=self.verbose)  # before the lease starts threads
        from pipeline.memory.build import finish, make_plan

        with ExitStack() as stack:
            lease = stack.enter_context(
                Lease.acquire(output, on_lost=stop_at_once, cluster=joins_cluster(self.address), notice=say)
            )
            fence = functools.partial(refuse_other_holder, output, lease.run_id)
            if self.overwrite:
                for entry in (MEMORY_FILE, PARTS_DIR, INDEX_FILE):
                    output.delete(entry)
            there = self._refuse_others(output, record)
            with timed(console, "looking through the table"):
                plan = make_plan(output, record)
            if there is not None and _is_whole(there, record, plan):
                settle_status(output)
                say(f"Nothing new: {self.output} has {there.count:,} regions of {there.images:,} images.")
                return 0
            status = stack.enter_context(
                StatusFile(output, "memory build", lease.run_id, fence=fence, notice=say)
            )
            status.begin()
            name_run(console, lease.run_id)
            made = self._write_parts(plan, record, prepared, source, output, lease.run_id, status, console)
            with timed(console, "writing the record", status):
                record = record if there is None else record.model_copy(update={"created": there.created})
                record = finish(output, record, [*plan.finished, *made], fence=fence)
            took = time.monotonic() - began
            line = f"Remembered {record.count:,} regions of {record.images:,} images in {duration(took)}"
            status.finish("ok", line)
        say("\n".join([line, *described(output, record), self._next_step()]))
        return 0

    def _prepared(self, table: TableRecord) -> tuple[PreparedLabeller, MemoryRecord, Source]:
        """What sees the images, what the memory is, and how images are read.

        Raises:
            MaskMillError: ``setting_invalid`` for a table that no CLIP has labelled, or whose images are read
                in windows.
        """
        from pipeline.corpus.manifest import build_manifest
        from pipeline.labelling.prepare import prepare_labeller
        from pipeline.labelling.recipes import table_recipe
        from pipeline.memory.build import Source
        from pipeline.table.changed import Images

        if "text" in table.weights or table.weights["model"] == "clipseg" or table.source == "truth":
            raise WrongUse(
                "setting_invalid",
                f"{self.table} was labelled by {table.weights['model']}; a memory is of CLIP's embeddings.",
                "Label with a CLIP, and build it from that table.",
            )
        recipe = table_recipe(table)
        plain = recipe.maskclip.without_memory()
        if plain.window:
            raise WrongUse(
                "setting_invalid",
                f"{self.table} was labelled in windows; a memory is of whole images.",
                "Label with --set window=0 --set window_stride=0 --set windows=cells.",
            )
        recipe = recipe.replace(maskclip=plain)
        prepared = prepare_labeller(recipe, table.ontology)
        if prepared.weights["fingerprint"] != table.weights["fingerprint"]:
            raise WrongUse(
                "weights_do_not_fit",
                f"The weights of {recipe.model} here are not those that {self.table} was labelled with.",
                "Put the same weights in place.",
            )
        key_block = (
            _third_block(recipe.model, recipe.pretrained) if self.key_block is None else self.key_block
        )
        record = MemoryRecord(
            table=canonical_uri(self.table),
            recipe=recipe.to_dict(),
            weights=table.weights,
            regions=self.regions,
            key_block=key_block,
            index=self.index,
        )
        manifest = None if self.manifest is None else build_manifest(self.manifest)
        source = Source(recipe.images, table.ontology.ignore_index, Images(manifest))
        # Refused here, if the tower has no such block, and not by each worker.
        make = cast("functools.partial[MaskClipLabeller]", prepared.make)
        prepared = replace(prepared, make=functools.partial(make, key_block=key_block))
        prepared.build(threads=1)
        return prepared, record, source

    def _refuse_others(self, output: Storage, record: MemoryRecord) -> MemoryRecord | None:
        """The memory in the output, if it is this one.

        Raises:
            MaskMillError: ``output_differs``.
        """
        there = None if self.overwrite else find_memory_record(output)
        if there is None:
            return None
        names = ("table", "regions", "key_block", "recipe", "weights")
        differ = [name for name in names if getattr(there, name) != getattr(record, name)]
        if differ:
            raise WrongUse(
                "output_differs",
                f"{output.uri} holds another memory: {', '.join(differ)} differ.",
                "Name another --output, or start over with --overwrite.",
            )
        return there

    def _write_parts(
        self,
        plan: Plan,
        record: MemoryRecord,
        prepared: PreparedLabeller,
        source: Source,
        output: Storage,
        run_id: str,
        status: StatusFile,
        console: Console,
    ) -> list[PartRecord]:
        """Make what is to do, in this process or on Ray."""
        from pipeline.cluster.disks import Landmarks, files_of_table
        from pipeline.cluster.mapping import on_ray
        from pipeline.cluster.session import ray_session
        from pipeline.memory.build import write_part
        from pipeline.table.labels import table_files

        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        fence = functools.partial(refuse_other_holder, output, run_id)
        # ``_prepared`` has refused every other kind of Labeller.
        load = cast("Callable[[], MaskClipLabeller]", functools.partial(prepared.build, threads=1))
        write = functools.partial(
            write_part, output=output, record=record, plan=plan, source=source, load=load, fence=fence
        )
        made: list[PartRecord] = []
        with ExitStack() as stack:
            results = None
            if plan.todo and self.workers != 0:
                with timed(console, "starting Ray", status):
                    workers = stack.enter_context(
                        ray_session(
                            run_id, address=self.address, verbose=self.verbose, notice=say, plan=count_cpus
                        )
                    )
                files = files_of_table(*table_files(plan.table), images=True)
                landmarks = Landmarks.of(files, output=output, run_id=run_id)
                results = on_ray(
                    write, list(plan.todo), self.workers or workers, notice=say, landmarks=landmarks
                )
            progress = stack.enter_context(counted(console, "remembering", "parts", status))
            for part in results if results is not None else map(write, plan.todo):
                made.append(part)
                progress(len(made), len(plan.todo))
        return made

    def _next_step(self) -> str:
        return f"Label with it: maskmill label … --set memory={self.output}"


@dataclass(frozen=True, kw_only=True)
class ShowMemory:
    """Show what a memory holds, and check that it is complete.

    Attributes:
        memory: the --output of maskmill memory build.
    """

    memory: Annotated[Positional[str], arg(metavar="MEMORY")]

    def run(self, console: Console | None = None) -> int:
        """Read all of it.

        Raises:
            MaskMillError: ``input_missing``, ``file_damaged``.
        """
        console = console or stderr_console()
        storage = open_storage(self.memory)
        record = read_memory_record(storage)
        import torch

        from pipeline.memory.index import load_memory

        load_memory(self.memory, torch.device("cpu"))
        console.print("\n".join(described(storage, record)), highlight=False, soft_wrap=True, markup=False)
        return 0


@dataclass(frozen=True)
class MemoryCommand:
    """A memory of the regions of a corpus: what else looks like this supports the labels of an image."""

    command: Annotated[
        Annotated[BuildMemory, subcommand("build")] | Annotated[ShowMemory, subcommand("show")], FLAT
    ]

    def run(self) -> int:
        """Run the chosen command."""
        return self.command.run()


def described(output: Storage, record: MemoryRecord) -> list[str]:
    """Lines about a memory."""
    each = 2 * (record.key_width + record.value_width) + 8
    size = record.count * each
    left_out: dict[str, int] = {}
    for part in record.parts:
        for reason, count in part.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(left_out.items()))
    return [
        f"  regions      {record.count:,} ({record.regions}) of {record.images:,} images",
        f"  size         {size / 1e6:,.1f} MB, {size / max(record.images, 1) / 1e3:,.1f} kB an image",
        f"  keys         {record.key_width} numbers of block {record.key_block}, searched by {record.index}",
        *([f"  left out     {reasons}"] if reasons else []),
        f"  its record   {output.uri_of(MEMORY_FILE)}",
    ]


def _is_whole(there: MemoryRecord, asked: MemoryRecord, plan: Plan) -> bool:
    """Whether a memory has all that is asked for."""
    same = {part.name for part in there.parts} == {part.name for part in plan.finished}
    return there.complete and there.index == asked.index and same and not plan.todo


def _third_block(model: str, pretrained: str | None) -> int:
    """The last block of the first third of a ViT.

    Raises:
        MaskMillError: ``model_unsupported`` for a ResNet.
    """
    from models.clip.weights import find_weights

    blocks = find_weights(model, pretrained).config["vision_cfg"].get("layers", 12)
    if isinstance(blocks, list):
        raise WrongUse(
            "model_unsupported",
            f"A memory's keys are tokens of a block of a ViT, and {model} is a ResNet.",
            "Label with a ViT.",
        )
    return max(0, round(blocks / 3) - 1)
