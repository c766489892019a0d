"""Views: thresholds and classes that are changed after labelling, from the stored confidence.

A ``View`` is what the user asks for, by class names; it fits in a small file (YAML or JSON), which may lie
beside a table in ``views/``. ``View.of`` binds it to the classes of a table; the result, a ``TableView``,
turns the stored maps of an image into those of the view. Nothing of the table is copied or changed.

    threshold: 0.4                  # least confidence; a class's own threshold in the ontology comes first
    thresholds: {dog: 0.6}
    min_area: 64                    # pixels of a connected component, diagonal neighbours included
    min_areas: {person: 400}
    merge: {pet: [cat, dog]}
    drop: [sky]
    rename: {grass: lawn}

The order is fixed: thresholds, then classes, then components, which are those of the merged classes. A pixel
that is dropped, too weak or in a small component is ignored. Names are those of the table, in any case.

A table holds the confidence of the best class only, as round(255 p). So a threshold t finds the pixels that
labelling with t would have found, except where p is within 1/510 of t; it can be raised but not lowered, for
below the threshold of the labelling the class is not stored; and where CLIPSeg's second-best class would have
stepped in, because its threshold is lower, the pixel is ignored.

Shapes: C classes of the view, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import WrongUse, did_you_mean
from pipeline.files.documents import first_problem, parsed_yaml, read_document
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import BACKGROUND, ClassEntry, Ontology
from pipeline.table.statistics import Confidence, Labels

VIEWS_DIR: Final = "views"
"""Folder of a table in which views are kept."""
SCHEMA_VERSION: Final = 1

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FILE = (".yaml", ".yml", ".json")

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Word = Annotated[str, Field(min_length=1, strict=True)]


class View(BaseModel):
    """What to make of the labels of a table; see the top of this module.

    Attributes:
        schema_version: of the file.
        threshold: least confidence in [0, 1] of classes without a threshold of their own; None keeps the
            labelling's.
        thresholds: the same by class, which takes precedence.
        min_area: pixels that a connected component of any class needs to be kept.
        min_areas: the same by class, which takes precedence.
        merge: classes to merge, by the name of the class that they become.
        drop: classes whose pixels are ignored.
        rename: new name by old name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    threshold: Share | None = None
    thresholds: dict[Word, Share] = {}
    min_area: Pixels = 0
    min_areas: dict[Word, Pixels] = {}
    merge: dict[Word, tuple[Word, ...]] = {}
    drop: tuple[Word, ...] = ()
    rename: dict[Word, Word] = {}

    @property
    def changes_nothing(self) -> bool:
        """Whether it leaves every table as it is."""
        return self == View()

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what it does."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def canonical(self) -> str:
        """What it does as JSON that does not depend on the order in which it was said."""
        fields = self.to_dict()
        if self.drop:
            fields["drop"] = sorted(self.drop)
        if self.merge:
            fields["merge"] = {name: sorted(members) for name, members in self.merge.items()}
        return json.dumps(fields, sort_keys=True, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields that are set, as plain JSON values."""
        return {"schema_version": self.schema_version} | self.model_dump(mode="json", exclude_defaults=True)

    def described(self) -> list[str]:
        """What it does, in words, for pages and terminals."""
        said = [f"confidence from {self.threshold:g}"] if self.threshold is not None else []
        said += [f"{name} from {value:g}" for name, value in self.thresholds.items()]
        said += [f"pieces from {self.min_area:,} pixels"] if self.min_area else []
        said += [f"{name} from {value:,} pixels" for name, value in self.min_areas.items()]
        said += [f"{' and '.join(members)} are {name}" for name, members in self.merge.items()]
        said += [f"without {', '.join(self.drop)}"] if self.drop else []
        return said + [f"{old} is called {new}" for old, new in self.rename.items()]

    def with_changes(self, changes: View) -> View:
        """This view with what another one sets; of fields by class, only the classes that it names."""
        fields = self.to_dict()
        for name, value in changes.to_dict().items():
            if isinstance(value, Mapping):
                fields[name] = fields.get(name, {}) | dict(value)
            elif isinstance(value, list):
                fields[name] = [*fields.get(name, []), *value]
            else:
                fields[name] = value
        return View.model_validate(fields)

    def of(
        self,
        ontology: Ontology,
        *,
        applied: npt.NDArray[np.float32] | None = None,
        remainder: bool = False,
        where: str = "the table",
    ) -> TableView:
        """Bind the view to the classes of a table; ``pipeline.labelling.recipes.table_view`` knows the rest.

        Args:
            ontology: the table's.
            applied: thresholds that the labelling applied, float32 (table's C,); None if there were none.
            remainder: whether class 0 of the table is what no class claims, so that weak pixels are of it.
            where: the table, for errors.

        Raises:
            MaskMillError: ``classes_differ`` for a class that the table does not have; ``wrong_use`` for
                names that contradict each other, and for thresholds below those of the labelling.
        """
        groups = _groups(self, ontology, where)
        made = _ontology(groups, ontology, where)
        lookup: npt.NDArray[Any] = np.full(1 << 16, made.ignore_index, made.mask_dtype)
        for position, group in enumerate(groups):
            lookup[list(group.members)] = position
        limits = _limits(self, ontology, groups, applied, remainder, where)
        least = np.zeros(len(lookup), np.uint16)
        least[: len(limits)] = np.ceil(np.round(255 * limits, 6))
        return TableView(
            view=self,
            ontology=made,
            lookup=lookup,
            least=least,
            weak=int(lookup[0]) if remainder else made.ignore_index,
            areas=_areas(self, ontology, groups, where),
        )


@dataclass(frozen=True, eq=False)
class TableView:
    """A view of one table; make it with ``View.of``. Picklable.

    Attributes:
        view: what was asked for.
        ontology: the classes of the view. Colours and synonyms are those of the table's classes; former names
            are synonyms too; merged classes have the synonyms of all, and the colour of the first.
        lookup: id of the view by id of the table, for every value that its masks can hold.
        least: uint16, smallest stored confidence that is kept, by id of the table.
        weak: id of pixels below it: the ignore index, or the class that is the remainder of the others.
        areas: int64 (C,), smallest component that is kept, in pixels.
    """

    view: View
    ontology: Ontology
    lookup: Labels
    least: npt.NDArray[np.uint16]
    weak: int
    areas: npt.NDArray[np.int64]

    def apply(self, labels: Labels, confidence: Confidence) -> tuple[Labels, Confidence]:
        """The maps of an image as the view has them; the stored ones are not changed.

        Args:
            labels: ids of the table, (H, W).
            confidence: uint8 (H, W), round(255 p).

        Returns:
            Ids of the view's ontology, (H, W) of its ``mask_dtype``, and the confidence, which differs only
            where a weak pixel became the remainder: there it is one minus that of the class it had.
        """
        assert labels.shape == confidence.shape, (labels.shape, confidence.shape)
        found = self.lookup[labels]
        if self.least.any():
            weak = confidence < self.least[labels]
            found[weak] = self.weak
            if self.weak != self.ontology.ignore_index:
                confidence = np.where(weak, 255 - confidence, confidence).astype(np.uint8)
        if self.areas.any():
            _ignore_small(found, self.areas, self.ontology.ignore_index)
        return found, confidence


# --- classes ---


@dataclass(frozen=True)
class _Group:
    """A class of the view: its name, and the table's classes that it is made of, by ascending id."""

    name: str
    members: tuple[int, ...]


def _groups(view: View, ontology: Ontology, where: str) -> list[_Group]:
    """The classes of the view, in the order of their first members."""
    names = ontology.names
    claimed: dict[int, str] = {}

    def claim(name: str, what: str) -> int:
        number = find_class(name, names, where)
        if claimed.get(number, what) != what:
            raise WrongUse(
                "wrong_use",
                f"The view says two things of {names[number]}: {claimed[number]}, and {what}.",
                "Say one of them.",
            )
        claimed[number] = what
        return number

    groups: dict[int, _Group] = {}
    for target, members in view.merge.items():
        if not members:
            raise WrongUse("wrong_use", f"The view merges nothing into {target}.", "Name classes to merge.")
        ids = sorted({claim(name, f"it becomes {target}") for name in members})
        own = position_of(target, names)
        if own is not None and own not in ids:  # a class of that name takes the others in
            ids = sorted([*ids, claim(target, f"it becomes {target}")])
        for number in ids:
            groups[number] = _Group(names[own] if own is not None else target, tuple(ids))
    dropped = {claim(name, "it is dropped") for name in view.drop}
    for old, new in view.rename.items():
        number = claim(old, f"it becomes {new}")
        groups[number] = _Group(new, (number,))
    if names[0] == BACKGROUND and ontology.background is not None:
        group = groups.get(0)
        if group is not None and group.name != BACKGROUND:
            raise WrongUse(
                "wrong_use",
                f"The view makes {BACKGROUND} a part of {group.name}, and it is no class like the others.",
                f"Merge the others into {BACKGROUND}, or drop it.",
            )
    kept = [number for number in range(len(names)) if number not in dropped]
    found = [groups.get(number, _Group(names[number], (number,))) for number in kept]
    if not found:
        raise WrongUse("wrong_use", f"The view drops all classes of {where}.", "Keep one.")
    return list(dict.fromkeys(found))


def _ontology(groups: Sequence[_Group], ontology: Ontology, where: str) -> Ontology:
    """The ontology of the view: the table's own if its classes stay as they are."""
    if [(group.name, group.members) for group in groups] == [
        (name, (number,)) for number, name in enumerate(ontology.names)
    ]:
        return ontology
    offset = int(ontology.background is not None)
    palette = ontology.palette()
    background: tuple[str, ...] | None = None
    classes: list[dict[str, Any]] = []
    for group in groups:
        members = [ontology.classes[number - offset] for number in group.members if number >= offset]
        if group.members[0] < offset:
            words = [word for entry in members for word in entry.words]
            background = (*(ontology.background or ()), *words)
            continue
        red, green, blue = palette[group.members[0]]
        classes.append(_merged(group.name, members) | {"color": f"#{red:02x}{green:02x}{blue:02x}"})
    if not classes:
        raise WrongUse("wrong_use", f"The view leaves {where} no class but {BACKGROUND}.", "Keep one.")
    count = len(classes) + (background is not None)
    fields = ontology.to_dict() | {"classes": classes, "background": background}
    fits = ontology.ignore_index >= count and (ontology.ignore_index <= 255 or count > 254)
    fields["ignore_index"] = ontology.ignore_index if fits else None
    return Ontology.from_dict(fields, origin="the view's classes")


def _merged(name: str, members: Sequence[ClassEntry]) -> dict[str, Any]:
    """The fields of a class that is made of others, without its colour."""
    words = [word for entry in members for word in (entry.name, *entry.synonyms)]
    own = len(members) == 1
    thresholds, kinds = ({getattr(entry, key) for entry in members} for key in ("threshold", "kind"))
    fields = {
        "name": name,
        "synonyms": [word for word in words if word.casefold() != name.casefold()],
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,
        "kind": kinds.pop() if len(kinds) == 1 else None,
        "merge": members[0].merge if own else "max",
    }
    if any(entry.prompts for entry in members):
        fields["prompts"] = [word for entry in members for word in entry.words]
    examples = [example.model_dump(mode="json") for entry in members for example in entry.examples]
    return fields | ({"examples": examples} if examples else {})


def find_class(name: str, names: Sequence[str], where: str) -> int:
    """The id of a class, whose case may differ.

    Raises:
        MaskMillError: ``classes_differ``, naming what is near.
    """
    number = position_of(name, names)
    if number is None:
        raise WrongUse(
            "classes_differ",
            f"There is no class {name} in {where}.",
            f"{did_you_mean(name, names)}It has: {', '.join(names[:30])}{', …' if len(names) > 30 else ''}.",
        )
    return number


def position_of(name: str, names: Sequence[str]) -> int | None:
    """The position of a name among others, whatever its case, spaces and composition of letters; or None."""
    if name in names:
        return names.index(name)
    folded = [_folded(each) for each in names]
    return folded.index(_folded(name)) if _folded(name) in folded else None


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()


# --- thresholds and components ---


def _limits(
    view: View,
    ontology: Ontology,
    groups: Sequence[_Group],
    applied: npt.NDArray[np.float32] | None,
    remainder: bool,
    where: str,
) -> npt.NDArray[np.float64]:
    """Thresholds by id of the table, 0 where the labelling's stay."""
    count, offset = ontology.num_classes, int(ontology.background is not None)
    before = np.zeros(count) if applied is None else applied.astype(np.float64)
    wanted = np.full(count, np.nan)
    if view.threshold is not None:
        wanted[:] = view.threshold
        for number, entry in enumerate(ontology.classes, offset):
            if entry.threshold is not None:
                wanted[number] = np.nan  # applied when it was labelled
    made = [group.name for group in groups]
    for name, value in view.thresholds.items():
        merged = None if position_of(name, ontology.names) is not None else position_of(name, made)
        members = [find_class(name, ontology.names, where)] if merged is None else groups[merged].members
        wanted[list(members)] = value
    if remainder:
        if any(position_of(name, ontology.names) == 0 for name in view.thresholds):
            raise WrongUse(
                "wrong_use",
                f"{ontology.names[0]} has no threshold in {where}: it is what no class claims.",
                "Give thresholds to the other classes.",
            )
        wanted[0] = np.nan
    # The labelling compared 32-bit numbers.
    lower = np.flatnonzero(wanted.astype(np.float32) < before.astype(np.float32))
    if len(lower):
        number = int(lower[0])
        raise WrongUse(
            "wrong_use",
            f"{where} was labelled with a threshold of {before[number]:g} for {ontology.names[number]}: what "
            f"is below it has no class there, so {wanted[number]:g} cannot be had.",
            f"Give at least {before[number]:g}, or label again without a threshold into another --output.",
        )
    return np.where(wanted.astype(np.float32) == before.astype(np.float32), 0, np.nan_to_num(wanted))


def _areas(view: View, ontology: Ontology, groups: Sequence[_Group], where: str) -> npt.NDArray[np.int64]:
    areas = np.full(len(groups), view.min_area, np.int64)
    made = [group.name for group in groups]
    for name, value in view.min_areas.items():
        position = position_of(name, made)
        if position is None:
            number = find_class(name, ontology.names, where)
            holder = next((group for group in groups if number in group.members), None)
            if holder is None or len(holder.members) > 1:
                fate = "dropped" if holder is None else f"a part of {holder.name}"
                raise WrongUse(
                    "wrong_use",
                    f"{name} is {fate} in this view, so it has no smallest area.",
                    "Give that of a class of the view.",
                )
            position = groups.index(holder)
        areas[position] = value
    return np.where(areas > 1, areas, 0)


def _ignore_small(labels: Labels, areas: npt.NDArray[np.int64], ignore_index: int) -> None:
    """Set the pixels of components below their class's area to the ignore index, in place."""
    import cv2

    totals = np.bincount(labels.ravel(), minlength=ignore_index + 1)
    for number in np.flatnonzero(totals[: len(areas)]).tolist():
        least = int(areas[number])
        if not least:
            continue
        if totals[number] < least:
            labels[labels == number] = ignore_index
            continue
        is_class = labels == number
        rows, columns = np.flatnonzero(is_class.any(1)), np.flatnonzero(is_class.any(0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        _, components, statistics, _ = cv2.connectedComponentsWithStats(
            is_class[box].astype(np.uint8), connectivity=8
        )
        small = statistics[:, cv2.CC_STAT_AREA] < least
        small[0] = False  # what is not of the class
        labels[box][small[components]] = ignore_index


# --- files ---


def parse_view(fields: object, where: str) -> View:
    """A view from plain values, as a file has them.

    Raises:
        MaskMillError: ``setting_invalid``, naming the field; ``newer_version``.
    """
    if not isinstance(fields, dict):
        raise WrongUse("setting_invalid", f"{where} is no view: it has no fields.", _HOW)
    version = fields.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise WrongUse(
            "newer_version",
            f"{where} was written by a newer MaskMill (schema {version}; this one reads {SCHEMA_VERSION}).",
            "Update MaskMill.",
        )
    unknown = [str(name) for name in fields if name not in View.model_fields]
    if unknown:
        raise WrongUse(
            "setting_invalid",
            f"{where}: a view has no {unknown[0]}.",
            f"{did_you_mean(unknown[0], View.model_fields)}It has: {', '.join(View.model_fields)}.",
        )
    try:
        return View.model_validate(fields)
    except ValidationError as error:
        raise WrongUse("setting_invalid", f"{where}: {first_problem(error)}.", _HOW) from None


_HOW = "Write it as the top of pipeline/table/views.py shows."


def read_view(name: str, table: str) -> View:
    """Read a view: a file, or one that is kept beside a table.

    Args:
        name: path or URI of a YAML or JSON file, or a name below ``views/``.
        table: the table.

    Raises:
        MaskMillError: ``setting_invalid`` if it is no view or there is none; ``newer_version``;
            ``storage_*``.
    """
    named = _NAME.fullmatch(name) is not None and not name.endswith(_FILE)
    folder, _, file = name.rpartition("/")
    place = (
        open_storage(table).child(VIEWS_DIR)
        if named
        else open_storage(folder or ("/" if name.startswith("/") else "."))
    )
    file = f"{name}.json" if named else file
    try:
        data = read_document(place, file, code="setting_invalid")
    except FileNotFoundError:
        kept = list(saved_views(open_storage(table)))
        raise WrongUse(
            "setting_invalid",
            f"There is no view {name}." if named else f"There is no file {name}.",
            f"{did_you_mean(name, kept)}"
            + (
                f"Kept beside {table}: {', '.join(kept)}."
                if kept
                else "Name a YAML file, or --save-view one."
            ),
        ) from None
    where = place.uri_of(file)
    return parse_view(parsed_yaml(data, where, code="setting_invalid"), where)


def saved_views(storage: Storage) -> Iterator[str]:
    """Names of the views that are kept beside a table."""
    for name in storage.list(VIEWS_DIR):
        file = name.rpartition("/")[2]
        if file.endswith(".json") and not file.startswith("."):
            yield file.removesuffix(".json")


def save_view(view: View, table: str, name: str) -> str:
    """Keep a view beside a table; returns its address. One that is there already with this content stays.

    Raises:
        MaskMillError: ``wrong_use`` for a name that is none; ``output_exists`` if there is another view of
            this name; ``storage_*``.
    """
    if not _NAME.fullmatch(name) or name.endswith(_FILE):
        raise WrongUse(
            "wrong_use",
            f"{name!r} is no name for a view.",
            "Use letters, digits, _, - and dots, without an ending.",
        )
    storage = open_storage(table)
    file = f"{VIEWS_DIR}/{name}.json"
    data = json.dumps(view.to_dict(), indent=2, ensure_ascii=False).encode() + b"\n"
    if not storage.create_bytes(file, data) and storage.read_bytes(file) != data:
        raise WrongUse(
            "output_exists",
            f"{storage.uri_of(file)} is another view.",
            "Give another name, or delete that file.",
        )
    return storage.uri_of(file)
