"""Choose the queue of a review: doubtful images of many scenes, some by chance, honeypots between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.review.candidates import Candidates, Top, look_through, pooled, read_areas, reason
from pipeline.review.honeypots import DRAWN, draw_honeypots, scattered
from pipeline.review.queue import Entry, Reason
from pipeline.review.spread import interleaved, spread
from pipeline.table.labels import OK, decode_mask, table_files
from pipeline.table.record import TableRecord, read_table_record
from pipeline.table.rows import Place, find_rows, images_of, read_row
from pipeline.table.strips import png_size

DIFFERS = 0.05
"""Share of pixels from which two models disagree on an image."""
UNLIKE = 2.0
"""Standard deviations below the mean similarity to its class from which an image is unlike it."""
POOL = 4
"""Candidates for each image that is wanted."""
_LEAST_IMAGES = 8
"""Images of a class among the candidates from which it is known what they are like."""
_READERS = 16
_COLUMNS = ("id", "uri", "sha256", "status", "height", "width", "segments", "quality")


@dataclass
class Wish:
    """What is asked for.

    Attributes:
        worst: images that are doubtful.
        chance: images by chance.
        known: ids of images whose truth is known.
        honeypots: how many of these are to be mixed in.
        leave_out: ids of images that people have seen already.
        against: a second table, whose labels are compared; None for none.
        diverse: spread by CLIP embeddings.
        seed: of what is drawn.
    """

    worst: int
    chance: int
    known: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    honeypots: int = 0
    leave_out: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    against: str | None = None
    diverse: bool = True
    seed: int = 0


@dataclass
class Chosen:
    """The queue's images, and what is to be told.

    Attributes:
        entries: in order.
        embedding: the CLIP by which they were spread; "" without.
        notes: for the user.
    """

    entries: list[Entry]
    embedding: str = ""
    notes: list[str] = field(default_factory=list)


def choose(
    table: str,
    wish: Wish,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Chosen:
    """Choose the images of a queue.

    Args:
        table: the label table.
        wish: what is asked for.
        progress: called with the number of images that were embedded, and of all to embed.

    Raises:
        MaskMillError: ``input_missing``, ``table_damaged``; ``classes_differ`` if the second table has no
            class of the first.
    """
    record, storage = read_table_record(table), open_storage(table)
    ontology = record.ontology
    classes = None if wish.against is None else _classes_of(wish.against, ontology, table)
    other = None if wish.against is None else open_storage(wish.against)
    areas = None if other is None or classes is None else read_areas(other, classes)

    def look(most: int, chance: int, **which: Any) -> Candidates:
        seen = look_through(
            storage, ontology, most=most, chance=chance, seed=wish.seed, against=areas, **which
        )
        if other is not None and classes is not None:
            _compare(storage, other, classes, ontology, seen)
        return seen

    known: dict[int, list[Reason]] = {}
    if wish.honeypots:
        doubtful = round(wish.honeypots * wish.worst / max(wish.worst + wish.chance, 1))
        may = look(POOL * doubtful, wish.honeypots, leave_out=wish.leave_out, only=wish.known)
        known = draw_honeypots(
            may, ontology.names, doubtful=doubtful, count=wish.honeypots, other=wish.against or ""
        )
    pool = POOL * wish.worst
    taken = np.union1d(wish.leave_out, np.array([*known], np.int64))
    found = look(pool, wish.chance + (wish.worst if wish.diverse else 0), leave_out=taken)
    chance = found.chance.ids[: wish.chance]
    work = _Work(wish, storage, record, found, chance)
    worst, chosen = work.worst(pool, progress)
    if found.too_large:
        chosen.notes.append(
            f"{found.too_large:,} images have more than {MAX_PIXELS:,} pixels, and cannot be painted here: "
            f"look at them with maskmill show {storage.uri}"
        )
    rows = work.rows([*worst, *chance.tolist(), *known])
    by_chance = set(chance.tolist())
    lists = [
        [(number, [*work.reasons[number], *(DRAWN if number in by_chance else ())]) for number in worst],
        [(number, DRAWN) for number in chance.tolist() if number not in set(worst)],
    ]
    queued = [*itertools.chain.from_iterable(lists)]
    order = [queued[at] for at in interleaved(*map(len, lists)).tolist()]
    for number, reasons in scattered(order, [*known.items()], wish.seed):
        row = rows[number]
        if row is not None:
            chosen.entries.append(
                Entry(
                    id=number,
                    uri=row["uri"],
                    quality=row["quality"],
                    reasons=tuple(reasons or [reason("quality", 1 - float(row["quality"]))]),
                    known=number in known,
                )
            )
    return chosen


def _classes_of(other: str, ontology: Ontology, table: str) -> npt.NDArray[np.int32]:
    """Id of the table by id of the second one, -1 for none, for every value of a mask."""
    names = read_table_record(other).ontology.names
    position = {name.casefold(): number for number, name in enumerate(ontology.names)}
    classes = np.full(1 << 16, -1, np.int32)
    classes[: len(names)] = [position.get(name.casefold(), -1) for name in names]
    if classes.max() < 0:
        raise WrongUse(
            "classes_differ",
            f"{other} and {table} have no class in common.",
            "Compare with labels of the same classes.",
        )
    return classes


def _compare(
    table: Storage,
    other: Storage,
    classes: npt.NDArray[np.int32],
    ontology: Ontology,
    found: Candidates,
) -> None:
    """Replace the bounds on disagreement by what it is, pixel by pixel."""
    top = found.lists["disagree"]
    mine, theirs = find_rows(table, top.ids.tolist()), find_rows(other, top.ids.tolist())
    folders = table_files(table)[0], table_files(other)[0]

    def differs(number: int) -> float:
        stored = [
            read_row(folder, places[number], ["mask"])["mask"]["bytes"]
            for folder, places in zip(folders, (mine, theirs), strict=True)
        ]
        if png_size(stored[0]) != png_size(stored[1]):
            return 0.0
        masks = [decode_mask(data) for data in stored]
        own = np.where(masks[0] < ontology.num_classes, masks[0].astype(np.int32), -1)
        return float((own != classes[masks[1]]).mean())

    with ThreadPoolExecutor(_READERS) as pool:
        exact = np.array(list(pool.map(differs, top.ids.tolist())))
    sorted_top = Top(top.most)
    sorted_top.offer(top.ids[exact >= DIFFERS], exact[exact >= DIFFERS])
    found.lists["disagree"] = sorted_top


class _Work:
    """The rows that are looked at more closely.

    Attributes:
        reasons: of each candidate, by id.
    """

    def __init__(
        self,
        wish: Wish,
        storage: Storage,
        record: TableRecord,
        found: Candidates,
        chance: npt.NDArray[np.int64],
    ) -> None:
        self._wish, self._storage, self._record = wish, storage, record
        self._found, self._chance = found, chance
        self._folder = table_files(storage)[0]
        self.reasons: dict[int, list[Reason]] = {}

    def worst(self, pool: int, progress: Callable[[int, int], None]) -> tuple[list[int], Chosen]:
        """Ids of the doubtful images, most doubtful first, and what is to be told."""
        chosen = Chosen([])
        if not self._wish.worst:
            return [], chosen
        ids, weights, self.reasons = pooled(
            self._found,
            self._record.ontology.names,
            worst=self._wish.worst,
            most=pool,
            other=self._wish.against or "",
        )
        if self._wish.diverse and len(ids):
            ids, weights, vectors = self._embedded(ids, weights, chosen, progress)
            order = spread(vectors, weights, self._wish.worst)
        else:
            order = np.argsort(-weights, kind="stable")[: self._wish.worst]
        return ids[order].tolist(), chosen

    def rows(self, ids: Sequence[int]) -> dict[int, dict[str, Any] | None]:
        """Rows by id; None for those that have no labels, and for images too large to be looked at."""
        places = find_rows(self._storage, ids)

        def read(place: Place) -> dict[str, Any] | None:
            row = read_row(self._folder, place, _COLUMNS)
            return row if row["status"] == OK and row["height"] * row["width"] <= MAX_PIXELS else None

        with ThreadPoolExecutor(_READERS) as pool:
            found = dict(zip(places, pool.map(read, places.values()), strict=True))
        return {number: found.get(number) for number in ids}

    def _embedded(
        self,
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float64],
        chosen: Chosen,
        progress: Callable[[int, int], None],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """The pool with its embeddings, without images that cannot be read, and with those unlike others."""
        from pipeline.table.embedding import embed_images, find_clip

        # Images by chance say what a class looks like: the doubtful ones alone do not.
        usual = self._found.chance.ids[len(self._chance) :]
        usual = usual[~np.isin(usual, ids)]
        joined = np.concatenate([ids, usual])
        rows = self.rows(joined.tolist())
        known = np.array([rows[number] is not None for number in joined.tolist()])
        joined, weights = joined[known], np.concatenate([weights, np.full(len(usual), 0.25)])[known]
        source, why = find_clip(self._record)
        chosen.embedding = source.name
        if why:
            chosen.notes.append(f"Scenes are told apart by the small bundled CLIP: {why}")
        read = [row for number in joined.tolist() if (row := rows[number]) is not None]
        vectors, found = embed_images(
            source, read, images=images_of(self._storage, joined.tolist()), progress=progress
        )
        lost = len(found) - int(found.sum())
        if lost:
            chosen.notes.append(
                f"{lost:,} candidates cannot be shown: their images are gone or have changed."
            )
        main = np.array([_main_class(row) for row in read], np.int64)
        joined, weights, vectors, main = joined[found], weights[found], vectors[found], main[found]
        low = _unlike(vectors, main)
        for at in np.flatnonzero(low).tolist():
            told = reason("unlike", 1.0, self._record.ontology.names[main[at]])
            self.reasons.setdefault(int(joined[at]), []).append(told)
        weights = np.where(low, np.maximum(weights, 0.9), weights)
        doubtful = np.array([bool(self.reasons.get(number)) for number in joined.tolist()], np.bool_)
        doubtful |= np.isin(joined, ids)
        for number in joined[doubtful].tolist():
            if not self.reasons.get(number):
                quality = rows[number]["quality"]  # type: ignore[index]
                self.reasons[number] = [reason("quality", 1 - float(quality))]
        return joined[doubtful], weights[doubtful], vectors[doubtful]


def _main_class(row: dict[str, Any]) -> int:
    """The class with the largest area; -1 for none."""
    return max(row["segments"], key=lambda segment: segment["area"], default={"class_id": -1})["class_id"]


def _unlike(vectors: npt.NDArray[np.float32], main: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Images that are far from the mean of those with the same main class, bool (N,)."""
    low = np.zeros(len(vectors), np.bool_)
    for number in np.unique(main[main >= 0]).tolist():
        members = np.flatnonzero(main == number)
        if len(members) < _LEAST_IMAGES:
            continue
        centre = vectors[members].mean(0)
        alike = vectors[members] @ centre / max(float(np.linalg.norm(centre)), 1e-9)
        low[members] = alike < alike.mean() - UNLIKE * max(float(alike.std()), 1e-6)
    return low
