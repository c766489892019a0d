"""``maskmill split``: label table → which images are for training, validation and test."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from jobs.console import counted, stderr_console
from jobs.options import Address, Flag, Maybe
from models.errors import WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.table.record import TableRecord, read_table_record

if TYPE_CHECKING:
    from models.clip.weights import WeightSource
    from pipeline.splitting.alike import Alike
    from pipeline.splitting.making import Made, PartIndex
    from pipeline.table.changed import Images
    from pipeline.table.splits import Split, SplitRecord

ON_RAY_FROM = 20_000
"""Images from which Ray hashes them on this machine: it takes seconds to start."""
DISTANCE = 10
"""Of 64 bits. Of 300 photographs that were halved, compressed, made brighter and cropped by 2 % on each side,
99 % are within 10 bits of the original; of 45,000 pairs that have nothing to do with each other, none is."""
SIMILARITY = 0.95
MIN_SIMILARITY = 0.5
"""Cosines of CLIP embeddings: of most changes of an image with the image; what is below means nothing."""


@dataclass(frozen=True, kw_only=True)
class MakeSplit:
    """Divide a label table into training, validation and test images that do not leak into each other.

    Near-duplicates, found by a perceptual hash or CLIP, stay together, as do images of one folder or of one
    value of a column, if asked for; every part gets its share of each class. The split is kept beside the
    table; train, evaluate and export use it. Run it again after the table has grown: old images stay where
    they are.

    Attributes:
        table: the --output of maskmill label or maskmill import.
        train: share of the images for training, 0 to 1.
        val: share for validation.
        test: share for the test.
        by: also keep together the images of one folder, or those with one value of this column of --groups.
        groups: CSV or Parquet file with a column id, uri or name (of the image's file), and that of --by.
        near: how near-duplicates are found; clip: by the hash, and by embeddings of the CLIP that labelled
            them, which also recognise crops, shifts and mirror images; none: not at all.
        distance: near-duplicates differ in at most this many of the 64 bits of their hashes; more finds
            stronger changes, but also takes more different images for duplicates.
        similarity: smallest cosine of the CLIP embeddings of near-duplicates; less finds more.
        seed: of the order in which images are assigned.
        manifest: manifest in Parquet that says where images lie within larger files.
        overwrite: replace a split that was made with other settings; most images then change their part.
        json: print the result as JSON.
        workers: number of Ray tasks that read images; 0: this process alone; default: depends on the table.
        address: of a Ray cluster.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    train: float = 0.8
    val: float = 0.1
    test: float = 0.1
    by: Annotated[str, arg(metavar="folder|COLUMN")] = "none"
    groups: Annotated[Maybe[str], arg(metavar="FILE")] = None
    near: Literal["hash", "clip", "none"] = "hash"
    distance: int = DISTANCE
    similarity: float = SIMILARITY
    seed: int = 0
    manifest: Maybe[str] = None
    overwrite: Flag = False
    json: Flag = False
    workers: Maybe[int] = None
    address: Address = None

    def run(self, console: Console | None = None) -> int:
        """Split the table, and say what came out.

        Raises:
            MaskMillError: ``wrong_use``; ``output_differs`` if there is a split of other settings;
                ``document_invalid``; as ``pipeline.splitting.making.make_split`` and, for CLIP,
                ``pipeline.splitting.alike.find_alike``.
        """
        from pipeline.corpus.manifest import build_manifest
        from pipeline.splitting.duplicates import MOST_DISTANCE
        from pipeline.splitting.grouping import read_groups
        from pipeline.splitting.making import FOLDER, NONE, check_by, check_shares, make_split
        from pipeline.table.changed import Images
        from pipeline.table.splits import find_split, write_split

        console = console or stderr_console()
        shares = check_shares({"train": self.train, "val": self.val, "test": self.test})
        by = check_by(self.by, self.groups)
        if not 0 <= self.distance <= MOST_DISTANCE:
            raise WrongUse(
                "wrong_use",
                f"--distance {self.distance} is not from 0 to {MOST_DISTANCE}.",
                "Images that have nothing to do with each other differ in 32 bits on average.",
            )
        if not MIN_SIMILARITY <= self.similarity <= 1:
            raise WrongUse(
                "wrong_use",
                f"--similarity {self.similarity:g} is not from {MIN_SIMILARITY:g} to 1.",
                "It is the cosine of two embeddings; those of near-duplicates are close to 1.",
            )
        for option, number in (("--workers", self.workers), ("--seed", self.seed)):
            if number is not None and number < 0:
                raise WrongUse("wrong_use", f"{option} {number} is negative.", "Give 0 or more.")
        table = read_table_record(self.table)
        storage = open_storage(self.table)
        before = find_split(storage)
        clip, notice = self._clip(table)
        record = self._record(shares, by, clip)
        if before is not None:
            record, before = self._continued(record, before)
        column = (
            read_groups(self.groups, by) if self.groups is not None and by not in (NONE, FOLDER) else None
        )
        manifest = None if self.manifest is None else build_manifest(self.manifest)
        images = Images(manifest)
        if notice:
            console.print(notice, highlight=False, soft_wrap=True)
        alike = None if clip is None else self._alike(storage, clip, images, console)
        with self._indexed(storage, table, record, images, before, console) as indexed:
            made = make_split(indexed, record, table=storage, before=before, groups=column, alike=alike)
        write_split(storage, made.split)
        self._tell(made, storage, table)
        return 0

    def _clip(self, table: TableRecord) -> tuple[WeightSource | None, str]:
        """The CLIP to look with, if one is to; and what the user should know of it."""
        if self.near != "clip":
            return None, ""
        from pipeline.table.embedding import find_clip

        source, why = find_clip(table)
        return source, f"Images are told apart by the small bundled CLIP: {why}" if why else ""

    def _alike(self, storage: Storage, clip: WeightSource, images: Images, console: Console) -> Alike:
        from pipeline.splitting.alike import find_alike

        with counted(console, f"looking at the images with {clip.name}", "images") as progress:
            return find_alike(storage, clip, self.similarity, images=images, progress=progress)

    def _record(self, shares: dict[str, float], by: str, clip: WeightSource | None) -> SplitRecord:
        from pipeline.files.records import now
        from pipeline.table.splits import SplitRecord

        given = {"shares": shares, "seed": self.seed, "by": by, "near": self.near, "distance": self.distance}
        if clip is not None:
            given |= {"similarity": self.similarity, "clip": f"{clip.name} {clip.fingerprint[:12]}"}
        return SplitRecord.model_validate({"created": now(), **given})

    def _continued(self, record: SplitRecord, before: Split) -> tuple[SplitRecord, Split | None]:
        """What to record, and the split to go on from; None to begin anew."""
        different = record.differences(before.record)
        if self.overwrite:
            return record, None
        if different:
            raise WrongUse(
                "output_differs",
                f"{self.table} has been split otherwise: {'; '.join(different)}.",
                "Give the same settings to let the split grow, or --overwrite to replace it: models trained "
                "by the old one may then be measured on images that they have seen.",
            )
        return record.model_copy(update={"created": before.record.created}), before

    @contextlib.contextmanager
    def _indexed(
        self,
        storage: Storage,
        table: TableRecord,
        record: SplitRecord,
        images: Images,
        before: Split | None,
        console: Console,
    ) -> Iterator[Iterable[PartIndex]]:
        """The parts of the table, read and hashed in this process or on Ray."""
        from pipeline.cluster.session import joins_cluster
        from pipeline.splitting.making import Known, index_part
        from pipeline.table.labels import table_files

        folder, parts = table_files(storage)
        near = record.near != "none"
        index = functools.partial(
            index_part, storage=folder, images=images, by=record.by, near=near, known=Known.of(before)
        )
        total = int(table.counts.get("labelled", 0))
        workers = self.workers
        if workers is None:
            bulk = near and (total >= ON_RAY_FROM or joins_cluster(self.address))
            workers = _own_cores() if bulk else 0
        with counted(console, "looking at the images" if near else "reading the table", "images") as progress:

            def told(indexed: Iterable[PartIndex]) -> Iterator[PartIndex]:
                done = 0
                for one in indexed:
                    done += len(one.ids)
                    progress(done, max(total, done))
                    yield one

            if workers and parts:
                from pipeline.cluster.disks import Landmarks, files_of_table
                from pipeline.cluster.mapping import on_ray

                yield told(
                    on_ray(
                        index,
                        parts,
                        workers,
                        address=self.address,
                        notice=lambda text: console.print(text, highlight=False, soft_wrap=True),
                        landmarks=Landmarks.of(files_of_table(folder, parts, images=near)),
                    )
                )
            else:
                yield told(map(index, parts))

    def _tell(self, made: Made, storage: Storage, table: TableRecord) -> None:
        from pipeline.table.splits import PARTS, SPLIT_FILE

        record = made.split.record
        names = table.ontology.names
        classes = {
            names[number] if number < len(names) else str(number): {
                part: int(counts[at]) for at, part in enumerate(PARTS)
            }
            for number, counts in enumerate(made.classes.tolist())
            if sum(counts)
        }
        place = storage.uri_of(SPLIT_FILE)
        if self.json:
            print(
                json.dumps(
                    {
                        "split": place,
                        **record.model_dump(mode="json"),
                        "added": made.added,
                        "gone": made.gone,
                        "ungrouped": made.ungrouped,
                        "classes": classes,
                    },
                    indent=2,
                    ensure_ascii=False,
                )
            )
            return
        told = Console()
        total = sum(record.images.get(part, 0) for part in PARTS)
        shown = Table(title=f"Images by class, {record.groups:,} groups", title_justify="left")
        shown.add_column("")
        parts = [part for part in PARTS if record.shares.get(part)]
        for part in parts:
            shown.add_column(part, justify="right")
        for name, counts in classes.items():
            whole = sum(counts.values())
            shown.add_row(
                name, *(f"{counts[part]:,} ({counts[part] / whole:.0%})" for part in parts if whole)
            )
        shown.add_section()
        shown.add_row(
            "all images",
            *(f"{record.images.get(p, 0):,} ({record.images.get(p, 0) / total:.1%})" for p in parts),
        )
        told.print(shown)
        lines = [f"Split kept in {place}"]
        if made.added and made.added != total:
            lines.append(f"{made.added:,} images are new; the others stay where they were.")
        if record.largest > 1:
            lines.append(f"The largest group has {record.largest:,} images.")
        if record.near != "none" and record.largest > max(10, 0.05 * total):
            other = "a smaller --distance" if record.near == "hash" else "a larger --similarity"
            lines.append(f"That is many: if they are not alike, take {other} with --overwrite.")
        if record.unread:
            lines.append(
                f"{record.unread:,} images could not be read, and may have near-duplicates elsewhere."
            )
        if made.apart:
            lines.append(f"{made.apart:,} images are in no part: they resemble images of several.")
        if made.ungrouped:
            lines.append(f"{made.ungrouped:,} images are not in {self.groups}: each is a group of its own.")
        if made.gone:
            lines.append(f"{made.gone:,} images of the earlier split are no longer in the table.")
        lines += [
            f"Train on it:   maskmill train maskclip-plus --labels {self.table} --output student",
            f"Measure:       maskmill evaluate --labels {self.table} --part test --images … --truth …",
        ]
        told.print("\n".join(lines), highlight=False, soft_wrap=True)


def _own_cores() -> int:
    from pipeline.cluster.disks import own_cores

    return own_cores()
