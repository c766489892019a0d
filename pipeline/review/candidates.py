"""Rows of a table that a person should look at: those at the top of each of several lists.

One pass over the columns of the table, a few thousand rows at a time; no mask is read. Of each list only its
top is kept, so memory does not grow with the table. Only the comparison with a second table holds the class
areas of that one: some 40 bytes an image.

Shapes: N rows of a batch, S segments of them, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import BACKGROUND, Ontology
from pipeline.review.queue import Kind, Reason
from pipeline.table.labels import OK, iter_batches

FLOODS = 0.95
"""Share of an image from which one class floods it."""
EMPTY = 0.01
"""Share of an image below which its labels are none."""
_ROWS = 4096
_COLUMNS = ("id", "status", "height", "width", "segments", "quality", "agreement")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass
class Top:
    """The rows with the largest scores of those that were offered.

    Attributes:
        most: how many are kept.
        ids: of the rows, best first.
        scores: theirs.
        extra: the class that the reason names, -1 for none.
    """

    most: int
    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    scores: Floats = field(default_factory=lambda: np.empty(0))
    extra: Ids = field(default_factory=lambda: np.empty(0, np.int64))

    def offer(self, ids: Ids, scores: Floats, extra: Ids | None = None) -> None:
        """Take the best of these, too. Ties go to the smaller id, however the table is split into files."""
        extra = np.full(len(ids), -1) if extra is None else extra
        ids, scores = np.concatenate([self.ids, ids]), np.concatenate([self.scores, scores])
        extra = np.concatenate([self.extra, extra])
        best = np.lexsort((ids, -scores))[: self.most]
        self.ids, self.scores, self.extra = ids[best], scores[best], extra[best]


@dataclass
class Candidates:
    """What a look through a table finds.

    Attributes:
        lists: by kind of reason, the rows that it concerns most.
        chance: rows by chance: the scores are random numbers.
        rows: labelled rows that were looked at.
        too_large: labelled rows of images that are not decoded whole, so that nobody could look at them.
    """

    lists: dict[Kind, Top]
    chance: Top
    rows: int = 0
    too_large: int = 0


@dataclass(frozen=True)
class Areas:
    """Class areas of the images of a second table, in classes of the first.

    Attributes:
        ids: of the images, sorted.
        starts: of each image's segments, (N + 1,).
        classes: int32 (S,); -1 is no class of the first table.
        shares: of the image, float32 (S,).
    """

    ids: Ids
    starts: Ids
    classes: npt.NDArray[np.int32]
    shares: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Batch:
    """Labelled rows of a batch, and their segments: the owner is the number of a row."""

    ids: Ids
    pixels: Floats
    quality: Floats
    agreement: Floats
    owner: Ids
    classes: Ids
    areas: Floats
    confidence: Floats


def look_through(
    table: Storage,
    ontology: Ontology,
    *,
    most: int,
    chance: int,
    seed: int,
    leave_out: Ids,
    only: Ids | None = None,
    against: Areas | None = None,
) -> Candidates:
    """Find the candidates of a table.

    Args:
        table: the label table.
        ontology: its classes.
        most: rows of each list.
        chance: rows by chance.
        seed: of these.
        leave_out: sorted ids that are not to be found.
        only: ids that alone are to be found; None is all.
        against: areas of a second table.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    kinds: tuple[Kind, ...] = ("quality", "confidence", "floods", "empty", "disagree")
    found = Candidates({kind: Top(most) for kind in kinds}, Top(chance))
    background = 0 if ontology.names[0].casefold() == BACKGROUND else -1
    for batch in _batches(table):
        keep = ~np.isin(batch.ids, leave_out)
        if only is not None:
            keep &= np.isin(batch.ids, only)
        large = keep & (batch.pixels > MAX_PIXELS)
        found.too_large += int(large.sum())
        keep &= ~large
        found.rows += int(keep.sum())
        ids, rows = batch.ids[keep], len(batch.ids)
        lists = found.lists
        lists["quality"].offer(ids, 1 - batch.quality[keep])
        labelled = np.bincount(batch.owner, batch.areas, rows)
        sure = np.bincount(batch.owner, batch.areas * batch.confidence, rows) / np.maximum(labelled, 1)
        some = keep & (labelled > 0)
        lists["confidence"].offer(batch.ids[some], 1 - sure[some])
        front = batch.classes != background
        shown = np.bincount(batch.owner[front], batch.areas[front], rows) / batch.pixels
        empty = keep & (shown < EMPTY)
        lists["empty"].offer(batch.ids[empty], 1 - shown[empty])
        share = np.where(front, batch.areas / batch.pixels[batch.owner], 0.0)
        flood = keep[batch.owner] & (share >= FLOODS)
        lists["floods"].offer(batch.ids[batch.owner[flood]], share[flood], batch.classes[flood])
        if against is not None:
            apart, known = _apart(batch, against)
            lists["disagree"].offer(batch.ids[keep & known], apart[keep & known])
        else:
            known = keep & (batch.agreement < 1)  # NaN, where there was no second reading, is not
            lists["disagree"].offer(batch.ids[known], 1 - batch.agreement[known])
        found.chance.offer(ids, _dice(ids, seed))
    return found


def _dice(ids: Ids, seed: int) -> Floats:
    """A number in [0, 1) for each id, by which the table's order and files do not matter."""
    mixed = (ids.astype(np.uint64) ^ np.uint64(seed * 0x632BE59BD9B4E019 & (1 << 64) - 1)) * _GOLDEN
    mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return (mixed >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _batches(table: Storage) -> Iterator[_Batch]:
    for read in iter_batches(table, _COLUMNS, batch_size=_ROWS):
        ok = pa.array([status == OK for status in read["status"].to_pylist()])
        batch = read.filter(ok)
        segments = batch["segments"]
        owner = np.repeat(np.arange(len(batch)), segments.value_lengths().fill_null(0).to_numpy())
        flat = segments.flatten()
        classes, areas, confidence = (
            flat.field(name).to_numpy(zero_copy_only=False).astype(kind)
            for name, kind in (("class_id", np.int64), ("area", np.float64), ("mean_confidence", np.float64))
        )
        height, width, quality, agreement = (
            batch[name].to_numpy(zero_copy_only=False).astype(np.float64)
            for name in ("height", "width", "quality", "agreement")
        )
        yield _Batch(
            batch["id"].to_numpy(), height * width, np.nan_to_num(quality), agreement, owner, classes, areas,
            confidence,
        )  # fmt: skip


def read_areas(table: Storage, classes: npt.NDArray[np.int32]) -> Areas:
    """Class areas of a second table.

    Args:
        table: the second table.
        classes: id of the first table by id of the second; -1 for none.
    """
    ids, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    named, shares = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for batch in _batches(table):
        ids.append(batch.ids)
        lengths.append(np.bincount(batch.owner, minlength=len(batch.ids)))
        named.append(classes[batch.classes])
        shares.append((batch.areas / batch.pixels[batch.owner]).astype(np.float32))
    all_ids, length = np.concatenate(ids), np.concatenate(lengths)
    starts = np.concatenate([[0], np.cumsum(length)])
    order = np.argsort(all_ids)
    take = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[at], starts[at + 1]) for at in order)])
    return Areas(
        all_ids[order],
        np.concatenate([[0], np.cumsum(length[order])]).astype(np.int64),
        np.concatenate(named)[take],
        np.concatenate(shares)[take],
    )


def _apart(batch: _Batch, other: Areas) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Half the sum of differences of class shares: at most the share of pixels that differ, (N,)."""
    apart, known = np.zeros(len(batch.ids)), np.zeros(len(batch.ids), np.bool_)
    if not len(other.ids):
        return apart, known
    at = np.minimum(np.searchsorted(other.ids, batch.ids), len(other.ids) - 1)
    known = other.ids[at] == batch.ids
    starts = np.searchsorted(batch.owner, np.arange(len(batch.ids) + 1))
    for row in np.flatnonzero(known).tolist():
        mine = slice(starts[row], starts[row + 1])
        theirs = slice(other.starts[at[row]], other.starts[at[row] + 1])
        shares: dict[int, float] = {}
        for number, area in zip(batch.classes[mine].tolist(), batch.areas[mine].tolist(), strict=True):
            shares[number] = area / batch.pixels[row]
        for number, share in zip(other.classes[theirs].tolist(), other.shares[theirs].tolist(), strict=True):
            shares[number] = shares.get(number, 0.0) - share
        # What neither labels is a class of its own.
        apart[row] = (sum(map(abs, shares.values())) + abs(sum(shares.values()))) / 2
    return apart, known


def reason(kind: Kind, score: float, name: str = "", other: str = "") -> Reason:
    """A reason in words.

    Args:
        kind: of the list.
        score: of the row there.
        name: of the class that it is about.
        other: the second table; "" if the image was read a second time by the first one's own model.
    """
    percent = f"{100 * score:.0f} %"
    text = {
        "quality": f"low quality, {1 - score:.2f}",
        "confidence": f"low confidence, {1 - score:.2f} on average",
        "disagree": f"{other} differs on {percent}"
        if other
        else f"a second reading agrees to {1 - score:.2f}",
        "floods": f"{name} covers {percent}",
        "empty": "nothing labelled" if score > 1 - 1e-6 else f"only {100 * (1 - score):.1f} % labelled",
        "unlike": f"unlike other images of {name}",
        "random": "chosen by chance",
    }[kind]
    return Reason(kind=kind, text=text)


def pooled(
    found: Candidates, names: Sequence[str], *, worst: int, most: int, other: str = ""
) -> tuple[Ids, Floats, dict[int, list[Reason]]]:
    """The tops of all lists in turn, how doubtful each is, above 0 to 1, and its reasons by id.

    Doubt is the score relative to the first of its list, and the place there: in a small table the tops hold
    images that nothing is wrong with, which must not come before doubtful ones for being different.

    Args:
        found: the lists.
        names: of the classes.
        worst: how many are wanted.
        most: how many to return.
        other: the second table; "" without one.
    """
    scored = {"quality", "confidence", *(() if other else ("disagree",))}
    weights: dict[int, float] = {}
    reasons: dict[int, list[Reason]] = {}
    lists = [
        [
            (kind, at, score / max(top.scores[0], 1e-9), number, score, extra)
            for at, (number, score, extra) in enumerate(zip(top.ids, top.scores, top.extra, strict=True))
        ]
        for kind, top in found.lists.items()
    ]
    for kind, at, relative, number, score, extra in filter(
        None, itertools.chain.from_iterable(itertools.zip_longest(*lists))
    ):
        number = int(number)
        if number not in weights and len(weights) >= most:
            continue
        # Every image has a quality; it is a reason for those at the very end alone.
        if kind not in scored or at < max(worst, 1):
            told = reason(kind, float(score), names[extra] if extra >= 0 else "", other)
            reasons.setdefault(number, []).append(told)
        weight = max(relative, 1e-3) * (1 - 0.5 * at / max(most, 1))
        weights[number] = max(weights.get(number, 0.0), weight)
    for number in weights:
        reasons.setdefault(number, [])
    return np.array([*weights], np.int64), np.array([*weights.values()]), reasons
