"""Whether a label table is whole: every image once, with a mask that decodes and fits its row.

A part is checked by ``check_part``, alone and in bounded memory, in this process or on Ray. What concerns
several parts (ids that are missing, unknown or there twice) follows from their ids, in ``Verification``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from models.errors import Damaged, MaskMillError
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import Storage
from pipeline.table.changed import Images, image_state
from pipeline.table.committed import (
    apply_relabelled,
    discard_leftovers,
    doubled,
    keep_rows,
    part_name,
    read_part,
    set_aside,
    settle_index,
    trust,
)
from pipeline.table.index import Ids, PartIndex
from pipeline.table.labels import (
    DATASET_FILE,
    OK,
    REQUIRED_COLUMNS,
    decode_confidence,
    decode_mask,
    is_large,
    iter_batches,
    summarise,
)
from pipeline.table.statistics import MapStatistics, QualityScore
from pipeline.table.strips import png_size, read_strips

#: What can be wrong, and whether ``repair`` mends it so that labelling again makes the table whole.
PROBLEMS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "part_unreadable": ("files that cannot be read", "repair"),
        "part_foreign": ("files of labels/ that lack columns of a label table", "repair"),
        "part_copied": ("files that repeat the rows of others", "repair"),
        "part_misnamed": ("files whose names are not those of their ids", "repair"),
        "id_doubled": ("rows of images that have another row", "repair"),
        "id_missing": ("images without a row", "label"),
        "id_unknown": ("rows of images that are not among those given", ""),
        "row_inconsistent": ("rows whose fields do not fit their status", "repair"),
        "mask_damaged": ("masks that cannot be decoded", "repair"),
        "confidence_damaged": ("confidence maps that cannot be decoded", "repair"),
        "size_differs": ("rows whose mask, confidence map and size differ", "repair"),
        "class_unknown": ("masks with ids that are no class", "repair"),
        "statistics_differ": ("rows whose segments or quality are not those of their mask", "repair"),
        "image_changed": ("images that have changed since they were labelled", "changed"),
        "image_gone": ("images that are no longer there", ""),
        "image_unreadable": ("images that cannot be read now", ""),
        "counts_differ": ("counts of dataset.json that are not those of the rows", "repair"),
    }
)
EXAMPLES = 5
_STATES = {"changed": "image_changed", "gone": "image_gone", "unreadable": "image_unreadable"}
_TOLERANCE = 1e-3
"""For means stored as 32-bit numbers."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: a key of ``PROBLEMS``.
        part: name of the file, relative to the table.
        text: what is wrong.
        id: of the row, if it is one row's fault.
        uri: of its image.
    """

    kind: str
    part: str
    text: str
    id: int | None = None
    uri: str | None = None


@dataclass
class Checked:
    """What ``check_part`` found in a part.

    Attributes:
        part: its name.
        ids: of its rows, int64 (n,).
        problems: what is wrong.
    """

    part: str
    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    problems: list[Problem] = field(default_factory=list)


def check_part(
    part: str,
    *,
    storage: Storage,
    num_classes: int,
    ignore_index: int,
    score: QualityScore = "classes",
    images: Images | None = None,
) -> Checked:
    """Check the rows of a part, a few at a time.

    Args:
        part: name of the file.
        storage: the table.
        num_classes: C of its ontology.
        ignore_index: id of uncertain pixels.
        score: what the column ``quality`` holds.
        images: also read the images again, which are here, and compare their hashes.
    """
    found = Checked(part)
    try:
        ids = read_part(storage, part, ["id"])["id"].to_numpy()
        rows = _rows(storage, part)
        for row in rows:
            found.problems += _row_problems(part, row, num_classes, ignore_index, score)
            if images is not None:
                found.problems += image_problems(part, row, images)
        found.ids = ids
    except FileNotFoundError:  # a run that is at work may take parts away
        return found
    except Damaged as error:
        foreign = " no column " in error.message
        kind = "part_foreign" if foreign else "part_unreadable"
        return Checked(part, problems=[Problem(kind, part, error.message)])
    if trust(part, ids) and part.rpartition("/")[2].startswith("part-") and len(ids):
        found.problems.append(Problem("part_misnamed", part, f"its ids make it {part_name(ids)}"))
    return found


def _rows(storage: Storage, part: str) -> Iterator[dict[str, Any]]:
    for batch in iter_batches(storage, REQUIRED_COLUMNS, batch_size=16, names=[part]):
        yield from batch.to_pylist()


def _row_problems(
    part: str, row: Mapping[str, Any], num_classes: int, ignore_index: int, score: QualityScore
) -> Iterator[Problem]:
    def problem(kind: str, text: str) -> Problem:
        return Problem(kind, part, text, row["id"], row["uri"])

    lacking = [name for name in ("uri", "status") if row[name] is None]
    labelled = ("sha256", "height", "width", "mask", "confidence", "segments", "quality")
    if row["status"] == OK:
        lacking += [name for name in labelled if row[name] is None]
        given = ["error"] if row["error"] is not None else []
    else:
        given = [name for name in labelled[3:] if row[name] is not None]
    if lacking or given:
        said = [f"no {name}" for name in lacking] + [f"{name} given" for name in given]
        yield problem("row_inconsistent", f"status {row['status']}, but {', '.join(said)}")
        return
    if row["status"] != OK:
        return
    counted = MapStatistics(ignore_index)
    size = row["height"], row["width"]
    maps = {}
    for name in ("mask", "confidence"):
        try:
            maps[name] = _strips(row[name]["bytes"] or b"", name)
        except MaskMillError as error:
            yield problem(f"{name}_damaged", error.message)
            return
    (mask_size, mask), (confidence_size, confidence) = maps.values()
    if not mask_size == confidence_size == size:
        yield problem(
            "size_differs", f"row {size}, mask {mask_size}, confidence {confidence_size} (height, width)"
        )
        return
    reading = "mask"
    try:
        for top, labels in mask:
            reading = "confidence"
            counted.add(labels, next(confidence)[1], top)
            reading = "mask"
    except MaskMillError as error:
        yield problem(f"{reading}_damaged", error.message)
        return
    unknown = [
        class_id for class_id in counted.classes if class_id >= num_classes and class_id != ignore_index
    ]
    if unknown:
        yield problem("class_unknown", f"ids {unknown[:5]} of {num_classes} classes")
        return
    differs = _differing(row, counted, score)
    if differs:
        yield problem("statistics_differ", differs)


def _strips(data: bytes, name: str) -> tuple[tuple[int, ...], Iterator[tuple[int, Any]]]:
    """The size of a map, and its rows: those of a large one in strips, of others at once.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    if is_large(data):
        return png_size(data) or (0, 0), read_strips(data)
    decoded = decode_mask(data) if name == "mask" else decode_confidence(data)
    return decoded.shape, iter([(0, decoded)])


def _differing(row: Mapping[str, Any], counted: MapStatistics, score: QualityScore) -> str:
    """How the statistics of a row differ from those of its maps; "" if they do not."""
    stored = {segment["class_id"]: segment for segment in row["segments"]}
    right = {segment["class_id"]: segment for segment in counted.segments()}
    if stored.keys() != right.keys() or len(stored) != len(row["segments"]):
        return f"classes {sorted(stored)} in the segments, {sorted(right)} in the mask"
    for class_id, segment in right.items():
        theirs = stored[class_id]
        if (theirs["area"], theirs["bbox"]) != (segment["area"], segment["bbox"]):
            return (
                f"class {class_id} has {theirs['area']:,} pixels in {theirs['bbox']}, "
                f"{segment['area']:,} in {segment['bbox']} in the mask"
            )
        if not _close(theirs["mean_confidence"], segment["mean_confidence"]):
            return f"mean confidence {theirs['mean_confidence']}, {segment['mean_confidence']:.3f} in the map"
    right_quality = counted.quality(score)
    return (
        "" if _close(row["quality"], right_quality) else f"quality {row['quality']}, not {right_quality:.3f}"
    )


def _close(stored: float | None, right: float) -> bool:
    return stored is not None and abs(stored - right) <= _TOLERANCE


def image_problems(part: str, row: Mapping[str, Any], images: Images) -> Iterator[Problem]:
    """What has become of the image of a row since it was labelled: its bytes are read again."""
    if row["sha256"] is None or (row["id"] not in images and row["id"] != stable_id(row["uri"])):
        return  # it could not be read then; or it is a byte range, and only the manifest knows which
    state = image_state({**row, "version": None}, images, trust_version=False)
    if state != "same":
        yield Problem(_STATES[state], part, f"the image is {state}", row["id"], row["uri"])


# --- the whole table ---


class Verification:
    """What is wrong with a table.

    Add what was found in each part, then call ``finish``.

    Attributes:
        rows, parts: how many there are.
        counts: number of problems by kind, in the order of ``PROBLEMS``.
        examples: some problems of each kind.
    """

    def __init__(self) -> None:
        self.rows = self.parts = 0
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[Problem]] = {}
        self._ids = PartIndex()
        self._broken: list[str] = []
        self._bad_rows: dict[str, set[int]] = {}
        self._misnamed: list[str] = []

    def add(self, checked: Checked) -> None:
        """Add a part."""
        self.parts += 1
        self.rows += len(checked.ids)
        self._ids.add(checked.part, checked.ids)
        for problem in checked.problems:
            self._note(problem)
            if problem.kind in ("part_unreadable", "part_foreign"):
                self._broken.append(problem.part)
            elif problem.kind == "part_misnamed":
                self._misnamed.append(problem.part)
            elif problem.id is not None and PROBLEMS[problem.kind][1] == "repair":
                self._bad_rows.setdefault(problem.part, set()).add(problem.id)

    def note(self, problems: Iterable[Problem]) -> None:
        """Add problems of images, whose rows are not at fault."""
        for problem in problems:
            self._note(problem)

    def _note(self, problem: Problem, count: int = 1) -> None:
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + count
        shown = self.examples.setdefault(problem.kind, [])
        if len(shown) < EXAMPLES:
            shown.append(problem)

    def finish(self, corpus: Corpus | None, recorded: Mapping[str, Any]) -> None:
        """Compare the parts with each other, with the images, and with the record.

        Args:
            corpus: the images that the table should have, if known.
            recorded: counts of ``dataset.json``.
        """
        repeated = self._ids.of(self._ids.repeated())
        extra = 0
        for part, keep in doubled(repeated).items():
            ids = repeated[part]
            extra += int(np.count_nonzero(~keep))
            if not keep.any():
                self._note(Problem("part_copied", part, f"all {len(ids):,} rows are in other files"))
                continue
            for row_id in ids[~keep].tolist():
                self._note(Problem("id_doubled", part, "the image has another row", row_id))
        if corpus is not None:
            self._compare(corpus)
        images = self._ids.rows - extra
        counted = recorded.get("images")
        if counted is not None and counted != images:
            text = f"{counted:,} images in {DATASET_FILE}, {images:,} in the table"
            self._note(Problem("counts_differ", DATASET_FILE, text))
        self.counts = {kind: self.counts[kind] for kind in PROBLEMS if self.counts.get(kind)}

    def _compare(self, corpus: Corpus) -> None:
        """Find rows that are missing, and rows of other images."""
        for span in max(corpus.partitions, self._ids.spans, key=len):
            manifest = corpus.read(span)
            wanted = manifest["id"].to_numpy()
            ids, parts = self._ids.read(span)
            missing = ~np.isin(wanted, ids)
            self._count("id_missing", int(missing.sum()))
            shown = manifest.filter(pa.array(missing)).slice(0, EXAMPLES)
            for row_id, uri in zip(shown["id"].to_pylist(), shown["uri"].to_pylist(), strict=True):
                self._note(Problem("id_missing", "", "no row", row_id, uri), 0)
            unknown = np.flatnonzero(~np.isin(ids, wanted))
            self._count("id_unknown", len(unknown))
            for at in unknown[:EXAMPLES]:
                (part,) = self._ids.names(parts[at : at + 1])
                self._note(Problem("id_unknown", part, "not among the images given", int(ids[at])), 0)

    def _count(self, kind: str, more: int) -> None:
        if more:
            self.counts[kind] = self.counts.get(kind, 0) + more

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "rows": self.rows,
            "parts": self.parts,
            "problems": {
                kind: {
                    "count": count,
                    "meaning": PROBLEMS[kind][0],
                    "remedy": PROBLEMS[kind][1] or None,
                    "examples": [
                        {"part": one.part, "id": one.id, "uri": one.uri, "text": one.text}
                        for one in self.examples[kind]
                    ],
                }
                for kind, count in self.counts.items()
            },
        }

    def repair(self, storage: Storage, *, fence: Callable[[], None] = lambda: None) -> list[str]:
        """Do what is safe. Call only while holding the lease.

        Files that cannot be read, rows that are wrong and rows that are there twice are taken out of the
        table. The files that had them are in ``set_aside/``. Their images become new again.

        Args:
            storage: the table.
            fence: called before each step; raises if the lease was lost.

        Returns:
            What was done, as sentences.
        """
        done: list[str] = []
        discarded = discard_leftovers(storage)
        if discarded:
            done.append(f"{discarded} half-written file(s) of a killed run deleted")
        for part in self._broken:
            fence()
            done.append(f"{part} set aside as {set_aside(storage, part)}")
        known = self._ids.of({*self._bad_rows, *self._misnamed})
        for part, bad in self._bad_rows.items():
            fence()
            ids = known[part]
            keep_rows(storage, part, ids[~np.isin(ids, list(bad))])
            done.append(f"{part}: {len(bad):,} row(s) taken out")
        for part in self._misnamed:
            to = f"{part.rpartition('/')[0]}/{part_name(known[part])}"
            if part not in self._bad_rows and not storage.exists(to):
                fence()
                storage.move(part, to)
                done.append(f"{part} renamed {to}")
        fence()
        index = settle_index(storage, notice=done.append)
        replaced = apply_relabelled(storage, index, fence=fence)
        if len(replaced.ids):
            done.append(f"{len(replaced.ids):,} row(s) replaced that a killed run had labelled again")
        record = storage.read_json(DATASET_FILE, {})
        if done or "counts_differ" in self.counts:
            fence()
            storage.write_json(DATASET_FILE, record | {"counts": summarise(storage)})
            done.append(f"counts of {DATASET_FILE} corrected")
        return done


def verify(
    checked: Iterable[Checked],
    *,
    corpus: Corpus | None,
    recorded: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda _parts, _rows: None,
    compare: Callable[[list[str]], Iterable[list[Problem]]] = lambda _parts: (),
) -> Verification:
    """Sum up what was found in all parts.

    Args:
        checked: from ``check_part``, in any order.
        corpus: the images that the table should have, if known.
        recorded: counts of its ``dataset.json``.
        progress: called with the number of parts and rows checked.
        compare: called with the parts that can be read, when all are checked; finds problems of their images.
    """
    found = Verification()
    whole: list[str] = []
    for one in checked:
        found.add(one)
        whole += [one.part] if len(one.ids) else []
        progress(found.parts, found.rows)
    for problems in compare(whole):
        found.note(problems)
    found.finish(corpus, recorded)
    return found
