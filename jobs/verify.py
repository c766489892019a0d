"""``maskmill verify``: label table → what is wrong with it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import stderr_console
from jobs.options import Address, Flag, Maybe
from models.errors import WrongUse
from pipeline.cluster.session import joins_cluster
from pipeline.cluster.signals import interrupt
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import build_corpus
from pipeline.files.storage import Storage, open_storage
from pipeline.table.committed import part_files
from pipeline.table.lease import Lease, refuse_other_holder
from pipeline.table.record import TableRecord, read_table_record

if TYPE_CHECKING:
    from pipeline.table.verify import Verification

P = TypeVar("P")
R = TypeVar("R")
_AT_ONCE = 64
ON_RAY_FROM = 500
"""Number of files from which Ray checks them: it takes seconds to start."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a label table: every image once, masks that decode, sizes, classes and statistics that agree.

    Exits with 1 if something is wrong.

    Attributes:
        table: the --output of maskmill label.
        images: the images that the table should have: folder, glob or list file, as for maskmill label.
        manifest: manifest in Parquet, instead of --images.
        hashes: read every image again, and count those that have changed, are gone or cannot be read.
        repair: do what is safe. Damaged files and wrong or doubled rows are moved to set_aside/ in the
            table; label then labels their images again.
        json: print the result as JSON.
        workers: number of Ray tasks that check; 0: this process alone; default: depends on the number of
            files.
        address: of a Ray cluster.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    images: Maybe[str] = None
    manifest: Maybe[str] = None
    hashes: Flag = False
    repair: Flag = False
    json: Flag = False
    workers: Maybe[int] = None
    address: Address = None

    def run(self, console: Console | None = None) -> int:
        """Check the table, and repair it if asked to.

        Returns:
            0; 1 if something is wrong, and was not repaired.

        Raises:
            MaskMillError: ``wrong_use``; ``input_missing``, ``table_damaged`` without a record of the table;
                ``output_in_use`` if it cannot be repaired now.
        """
        console = console or stderr_console()
        if self.images is not None and self.manifest is not None:
            raise WrongUse(
                "wrong_use", "Give either --images or --manifest, not both.", "See maskmill verify --help."
            )
        if self.workers is not None and self.workers < 0:
            raise WrongUse(
                "wrong_use", f"--workers {self.workers} is not a number of tasks.", "Give 0 or more."
            )
        storage = open_storage(self.table)
        record = read_table_record(self.table)
        source = self.images if self.images is not None else self.manifest
        corpus = None if source is None else build_corpus(source)
        if not self.repair:
            found, done = self._check(storage, record, corpus, console), []
        else:
            with Lease.acquire(
                storage,
                on_lost=lambda _reason: interrupt(),
                cluster=joins_cluster(self.address),
                notice=lambda text: console.print(text, highlight=False, soft_wrap=True),
            ) as lease:
                found = self._check(storage, record, corpus, console)
                fence = functools.partial(refuse_other_holder, storage, lease.run_id)
                done = found.repair(storage, fence=fence)
        return self._tell(storage, found, done)

    def _check(
        self, storage: Storage, record: TableRecord, corpus: Corpus | None, console: Console
    ) -> Verification:
        return check_table(
            storage,
            record,
            corpus,
            console,
            hashes=self.hashes,
            workers=self.workers,
            address=self.address,
        )

    def _tell(self, storage: Storage, found: Verification, done: list[str]) -> int:
        """Print what is wrong and what was done; the exit status."""
        from pipeline.table.verify import PROBLEMS

        left = [kind for kind in found.counts if not (self.repair and PROBLEMS[kind][1] == "repair")]
        if self.json:
            result = {"table": storage.uri, **found.to_dict(), "repaired": done}
            print(json.dumps(result, indent=2, ensure_ascii=False))
            return 1 if left else 0
        print(f"{storage.uri}: {found.rows:,} rows in {found.parts:,} files")
        for kind, count in found.counts.items():
            print(f"  {count:,} {PROBLEMS[kind][0]} [{kind}]")
            for one in found.examples[kind]:
                row = f" {one.uri or one.id}" if one.id is not None else ""
                print(f"    {one.part}{row}: {one.text}".replace(": :", ":"))
            if count > len(found.examples[kind]):
                print(f"    and {count - len(found.examples[kind]):,} more")
        for line in done:
            print(f"  repaired: {line}")
        print("\n".join(self._advice(found)))
        return 1 if left else 0

    def _advice(self, found: Verification) -> list[str]:
        from pipeline.table.verify import PROBLEMS

        remedies = {PROBLEMS[kind][1] for kind in found.counts}
        advice = []
        if not found.counts:
            advice.append("Nothing is wrong.")
        if "repair" in remedies and not self.repair:
            advice.append("Repair it with --repair: nothing is lost, and label makes the table whole again.")
        if "label" in remedies or ("repair" in remedies and self.repair):
            advice.append("Run the labelling command again: it labels the images without a row.")
        if "changed" in remedies:
            advice.append("Label images that have changed again with maskmill label --changed.")
        return advice


def check_table(
    storage: Storage,
    record: TableRecord,
    corpus: Corpus | None,
    console: Console,
    *,
    parts: Sequence[str] | None = None,
    hashes: bool = False,
    workers: int | None = None,
    address: str | None = None,
) -> Verification:
    """Look through a label table.

    Args:
        storage: of the table.
        record: of the table.
        corpus: the images that it should have; None if that is not known.
        console: shows the progress.
        parts: look through these files only; None is all. The recorded counts are of all.
        hashes: read every image again.
        workers: number of Ray tasks that check; 0: this process; None: depends on the number of files.
        address: of a Ray cluster.
    """
    from pipeline.table import hashes as by_hashes
    from pipeline.table.changed import Images
    from pipeline.table.verify import Problem, check_part, verify

    whole = parts is None
    parts = part_files(storage) if parts is None else list(parts)
    # The manifest of a small corpus, or none, goes to whoever checks a part.
    apart = corpus if hashes and corpus is not None and len(corpus.partitions) > 1 else None
    images = Images(None if corpus is None else corpus.table()) if hashes and apart is None else None
    check = functools.partial(
        check_part,
        storage=storage,
        num_classes=record.ontology.num_classes,
        ignore_index=record.ontology.ignore_index,
        score=record.quality,
        images=images,
    )
    if workers is None:
        workers = (os.cpu_count() or 1) if len(parts) >= ON_RAY_FROM else 0
    with console.status(f"checking {len(parts):,} files") as status, contextlib.ExitStack() as stack:
        mapped: Callable[[Callable[[P], R], Iterable[P]], Iterable[R]]
        if workers and parts:
            from pipeline.cluster.disks import Landmarks, files_of_table
            from pipeline.cluster.mapping import on_ray

            mapped = functools.partial(
                on_ray,
                workers=workers,
                address=address,
                notice=lambda text: console.print(text, highlight=False, soft_wrap=True),
                landmarks=Landmarks.of(files_of_table(storage, parts, images=hashes)),
            )
        else:
            pool = ThreadPoolExecutor()
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # at once after Ctrl-C
            mapped = functools.partial(_in_threads, pool)

        def compare(readable: list[str]) -> Iterable[list[Problem]]:
            if apart is None:
                return
            status.update("comparing the images")
            yield from mapped(by_hashes.compare, by_hashes.pieces(storage, readable, apart))

        return verify(
            mapped(check, parts),
            corpus=corpus,
            recorded=record.counts if whole else {},
            progress=lambda done, rows: status.update(
                f"checked {done:,} of {len(parts):,} files, {rows:,} rows"
            ),
            compare=compare,
        )


def _in_threads(pool: ThreadPoolExecutor, function: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
    """Yield what a function returns for each part, with few of them in memory."""
    rest = iter(parts)
    while some := list(itertools.islice(rest, _AT_ONCE)):
        yield from pool.map(function, some)
