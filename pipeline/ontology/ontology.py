"""The ontology: the classes with their names, prompts and colours.

An ontology comes from a YAML file, a list on the command line, or a built-in name. Ids are positions; with
``background`` words, class 0 is "background" and the classes start at 1. Outputs made with an ontology record
its hash.

    name: pets
    background: default            # or a list of words; omit it for no background class
    classes:
      - cat
      - {name: dog, synonyms: [puppy, hound], merge: mean, threshold: 0.4, color: "#aa3300", kind: thing}
      - {name: my cup, examples: [{image: cup.jpg, mask: cup.png}, another.jpg]}   # relative to this file
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from models.errors import MaskMillError, WrongUse, did_you_mean
from pipeline.files.documents import check_yaml_depth
from pipeline.files.storage import is_remote, refuse_secrets
from pipeline.ontology.palette import BACKGROUND_GREY, palette

#: Ids 0..65,533 and the ignore index 65,535 fit a 16-bit mask.
MAX_CLASSES: Final = 65_534
#: Up to this number, ids and the ignore index 255 fit an 8-bit mask.
MAX_CLASSES_8BIT: Final = 254
#: Name of class 0 if there are background words.
BACKGROUND: Final = "background"
#: Stands for the words of ``builtin/background.yaml`` that no class uses.
DEFAULT_BACKGROUND: Final = "default"

_FOLDER = Path(__file__).parent / "builtin"
_REMEDY = (
    "Correct the ontology; docs and examples: pipeline/ontology/ontology.py and pipeline/ontology/builtin/."
)
_MAX_SHOWN = 5

# What was expected, by pydantic's type of error.
_WORD = "a word"
_EXPECTED: Final = {
    "string_type": _WORD,
    "model_type": _WORD,
    "model_attributes_type": _WORD,
    "dict_type": _WORD,
    "tuple_type": "a list",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
}
#: Commas of other scripts, which separate names as well.
_COMMAS: Final = str.maketrans(dict.fromkeys("\uff0c\u3001\uff64\u060c", ","))
#: Characters that may be meant to separate names, or belong to one.
_DOUBTFUL: Final = ";\uff1b|"

Merge = Literal["max", "mean"]
Location = tuple[int | str, ...]
#: Key in pydantic's validation context: the folder for relative paths of examples.
_FOLDER_OF_FILE = "folder"


def _clean(text: str) -> str:
    # Keep the case, which matters to some tokenizers; whitespace matters to none.
    if any(unicodedata.category(char) == "Cc" and not char.isspace() for char in text):
        raise PydanticCustomError("control_character", "a name must not contain control characters")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    if not text:
        raise PydanticCustomError("empty_name", "a name must not be empty")
    return text


Name = Annotated[StrictStr, AfterValidator(_clean)]
Color = Annotated[StrictStr, Field(pattern=r"^#[0-9a-fA-F]{6}$"), AfterValidator(str.lower)]


class Example(BaseModel):
    """A picture that shows a class.

    Attributes:
        image: path or URI. A path in a YAML file is relative to the file's folder and made absolute on
            reading.
        mask: path or URI of a picture of the same size, black except on the object; None if the object fills
            the picture.
        sha256: hex digest over the SHA-256 of both files, computed when the YAML file is read. It makes the
            ontology's hash depend on the content of the pictures, not on their location.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: Annotated[StrictStr, Field(min_length=1)]
    mask: Annotated[StrictStr, Field(min_length=1)] | None = None
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _located_and_read(cls, data: Any, info: ValidationInfo) -> Any:
        if isinstance(data, str):
            data = {"image": data}
        folder = (info.context or {}).get(_FOLDER_OF_FILE)
        if folder is None or not isinstance(data, dict):
            return data
        found = dict(data)
        for key in ("image", "mask"):
            path = found.get(key)
            if not isinstance(path, str) or not path:
                continue
            if is_remote(path):
                refuse_secrets(path)
            else:
                found[key] = str((folder / Path(path).expanduser()).resolve())
        image, mask = found.get("image"), found.get("mask")
        if isinstance(image, str) and image and (mask is None or (isinstance(mask, str) and mask)):
            digest = example_digest(image, mask)
            if found.setdefault("sha256", digest) != digest:
                raise PydanticCustomError(
                    "image_invalid",
                    "'{image}' is not the picture that sha256 names",
                    {"image": data["image"]},
                )
        return found

    def check_unchanged(self) -> None:
        """Check that the files have not changed since the ontology was read.

        Raises:
            MaskMillError: ``image_invalid``.
        """
        if self.sha256 is None:
            return
        try:
            same = example_digest(self.image, self.mask) == self.sha256
        except PydanticCustomError as error:
            raise WrongUse("image_invalid", error.message(), "Put the file back.") from error
        if not same:
            raise WrongUse(
                "image_invalid",
                f"{self.image} or its mask is not what it was when the ontology was read.",
                "Read the ontology again from its file, or put the old picture back.",
            )

    @model_serializer
    def _without_absent(self) -> dict[str, str]:
        fields = {"image": self.image, "mask": self.mask, "sha256": self.sha256}
        return {key: value for key, value in fields.items() if value is not None}


def example_digest(image: str, mask: str | None) -> str:
    """SHA-256 (hex) over the files of an example.

    Raises:
        PydanticCustomError: if a file cannot be read.
    """
    from pipeline.files.fetch import fetch
    from pipeline.files.images import ImageError

    digest = hashlib.sha256()
    for path in (image, mask):
        if path is not None:
            try:
                digest.update(hashlib.sha256(fetch(path)).digest())
            except ImageError as error:
                raise PydanticCustomError(
                    "image_invalid",
                    "the example '{path}' cannot be read: {reason}",
                    {"path": path, "reason": error.message},
                ) from error
    return digest.hexdigest()


class ClassEntry(BaseModel):
    """One class.

    Attributes:
        name: also the first prompt, unless there are ``prompts``.
        synonyms: further prompts.
        prompts: what CLIP is asked in place of name and synonyms, for names that are codes ("D20") or mean
            something else to CLIP.
        threshold: probability in [0, 1] below which its pixels are ignored; None for no limit.
        color: "#rrggbb"; None to choose one.
        kind: "thing" (countable) or "stuff"; None if unspecified.
        merge: how to combine prompts or examples: "max" of their scores, or "mean" of their embeddings.
        examples: pictures of the class, for models with visual prompts (CLIPSeg).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    synonyms: tuple[Name, ...] = ()
    prompts: tuple[Name, ...] = ()
    threshold: Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)] | None = None
    color: Color | None = None
    kind: Literal["thing", "stuff"] | None = None
    merge: Merge = "max"
    examples: tuple[Example, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        for key in ("examples", "prompts"):
            if not getattr(self, key):
                del fields[key]  # keeps the hashes of ontologies from before they existed
        return fields

    @property
    def words(self) -> tuple[str, ...]:
        """The prompts in use."""
        return self.prompts or (self.name, *self.synonyms)


class Ontology(BaseModel):
    """Classes by position, background words, ignore index and prompt templates.

    The constructor raises pydantic's ``ValidationError``; ``load_ontology``, ``parse_classes`` and
    ``from_dict`` convert it to ``MaskMillError``.

    Attributes:
        name: name of the ontology.
        classes: the classes, with ids from 0, or from 1 if there is a background.
        background: words that form class 0 (the highest of their scores), or None. "default" stands for the
            words of ``builtin/background.yaml`` that no class uses.
        ignore_index: mask value of unlabelled pixels; by default 255, or 65,535 above 254 classes.
        templates: name of a template set, or templates with one ``{}`` each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    classes: tuple[ClassEntry, ...]
    background: tuple[Name, ...] | None = None
    # Never None after validation: the validator fills in the default.
    ignore_index: Annotated[int, Field(strict=True, validate_default=True)] = None  # type: ignore[assignment]
    templates: StrictStr | tuple[StrictStr, ...] = "openai85"

    @field_validator("classes", mode="before")
    @classmethod
    def _check_length(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or not value:
            raise PydanticCustomError("classes", "must be a list of at least one class")
        if len(value) > MAX_CLASSES:
            raise PydanticCustomError(
                "too_many_classes", "{count} classes; at most 65,534 fit a mask", {"count": len(value)}
            )
        return value

    @field_validator("background", mode="before")
    @classmethod
    def _resolve_background(cls, value: Any, info: ValidationInfo) -> Any:
        if value == DEFAULT_BACKGROUND:
            claimed: set[str] = set()
            for entry in info.data.get("classes", ()):
                claimed = claimed.union(*map(_number_forms, (entry.name, *entry.words)))
            return tuple(w for w in default_background() if claimed.isdisjoint(_number_forms(w))) or None
        if isinstance(value, bool):
            raise PydanticCustomError(
                "background",
                "background is a list of words or 'default', not {value}; "
                "leave it out for no background class",
                {"value": str(value).lower()},
            )
        if isinstance(value, str):
            raise PydanticCustomError(
                "background", "background is a list of words or 'default', not '{value}'", {"value": value}
            )
        if isinstance(value, (list, tuple)) and not value:
            raise PydanticCustomError("background", "background has no words; leave it out for none")
        return value

    @field_validator("ignore_index", mode="before")
    @classmethod
    def _default_ignore_index(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        count = len(info.data.get("classes", ())) + bool(info.data.get("background"))
        return 255 if count <= MAX_CLASSES_8BIT else 65_535

    @field_validator("templates", mode="before")
    @classmethod
    def _check_templates(cls, value: Any) -> str | tuple[str, ...]:
        if isinstance(value, str) and value.strip() and "{" not in value:
            return value.strip()
        listed = (value,) if isinstance(value, str) else value
        if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(t, str) for t in listed):
            raise PydanticCustomError("templates", "give the name of a template set or a list of templates")
        for template in listed:
            rest = template.replace("{}", "", 1)
            if rest == template or "{" in rest or "}" in rest:
                raise _located(("templates",), f"template '{template}' must contain {{}} exactly once")
        return tuple(listed)

    @model_validator(mode="after")
    def _check_whole(self) -> Ontology:
        owners: dict[str, tuple[str, Location]] = {}

        def claim(word: str, owner: str, where: Location) -> None:
            key = word.casefold()
            if key in owners:
                other = owners[key][0]
                raise _located(where, f"'{word}' ({owner}) is already used: {other}")
            owners[key] = (owner, where)

        if self.background is not None:
            claim(BACKGROUND, "name of class 0, from the background words", ("background",))
        for index, entry in enumerate(self.classes):
            claim(entry.name, f"name of class {index + self._offset}", ("classes", index, "name"))
        for index, entry in enumerate(self.classes):
            for number, synonym in enumerate(entry.synonyms):
                claim(synonym, f"synonym of '{entry.name}'", ("classes", index, "synonyms", number))
        asked = {
            word.casefold(): entry.name for entry in self.classes if not entry.prompts for word in entry.words
        }
        for index, entry in enumerate(self.classes):
            for number, prompt in enumerate(entry.prompts):
                other = asked.setdefault(prompt.casefold(), entry.name)
                where = ("classes", index, "prompts", number)
                if other != entry.name or prompt in entry.prompts[:number]:
                    raise _located(where, f"'{prompt}' is already used: prompt of '{other}'")
        for number, word in enumerate(self.background or ()):
            if word.casefold() != BACKGROUND:  # "background" itself may be a prompt of class 0
                claim(word, "background word", ("background", number))
            if word.casefold() in asked:
                raise _located(
                    ("background", number), f"'{word}' is already used: prompt of '{asked[word.casefold()]}'"
                )
        if self.num_classes > MAX_CLASSES:
            raise _located(("classes",), f"{self.num_classes} classes with background; at most 65,534 fit")
        highest = 255 if self.num_classes <= MAX_CLASSES_8BIT else 65_535
        if not self.num_classes <= self.ignore_index <= highest:
            raise _located(
                ("ignore_index",),
                f"ignore_index {self.ignore_index} must be from {self.num_classes} to {highest}: "
                f"no class id, and within the mask's {8 if highest == 255 else 16} bits",
            )
        return self

    @property
    def _offset(self) -> int:
        return int(self.background is not None)

    @property
    def num_classes(self) -> int:
        """Number of classes, including background."""
        return len(self.classes) + self._offset

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by id."""
        return (BACKGROUND,) * self._offset + tuple(entry.name for entry in self.classes)

    @property
    def mask_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """uint8, or uint16 above 254 classes."""
        return np.uint8 if self.num_classes <= MAX_CLASSES_8BIT else np.uint16

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields; examples count by digest if they have one."""
        fields = self.to_dict()
        for entry in fields["classes"]:
            for example in entry.get("examples", ()):
                if "sha256" in example:
                    del example["image"]
                    example.pop("mask", None)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def prompts(self) -> list[list[str]]:
        """Prompts per class id: its own, or name and synonyms; the words of the background."""
        words = [list(entry.words) for entry in self.classes]
        return [list(self.background), *words] if self.background else words

    def merges(self) -> list[Merge]:
        """Merge mode per class id; "max" for background."""
        background: list[Merge] = ["max"] * self._offset
        return background + [entry.merge for entry in self.classes]

    def kinds(self) -> list[Literal["thing", "stuff"] | None]:
        """Kind per class id; "stuff" for background."""
        background: list[Literal["thing", "stuff"] | None] = ["stuff"] * self._offset
        return background + [entry.kind for entry in self.classes]

    def examples(self) -> list[tuple[Example, ...]]:
        """Examples per class id; none for background."""
        return [()] * self._offset + [entry.examples for entry in self.classes]

    def thresholds(self, default: float = 0.0) -> npt.NDArray[np.float32] | None:
        """Minimum probability for labelling a pixel, by class.

        Args:
            default: threshold in [0, 1] for background and classes without one.

        Returns:
            float32 (C,) in [0, 1], or None if all are 0.
        """
        values = [default] * self._offset + [
            default if entry.threshold is None else entry.threshold for entry in self.classes
        ]
        return np.array(values, dtype=np.float32) if any(values) else None

    def palette(self) -> npt.NDArray[np.uint8]:
        """Colour per class id, uint8 (C, 3) sRGB: specified or chosen; dark grey for background."""
        given: list[tuple[int, int, int] | None] = [BACKGROUND_GREY] * self._offset
        for entry in self.classes:
            r, g, b = bytes.fromhex(entry.color[1:]) if entry.color else (0, 0, 0)
            given.append((r, g, b) if entry.color else None)
        return palette(given)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; ``from_dict`` is the inverse."""
        return self.model_dump(mode="json")

    def to_record(self) -> dict[str, Any]:
        """``to_dict`` plus hash and names, as label tables and students record it."""
        return self.to_dict() | {"hash": self.hash, "names": list(self.names)}

    @classmethod
    def from_record(cls, recorded: Mapping[str, Any], *, origin: str = "the record") -> Ontology:
        """Build from the record of a label table or a student; inverse of ``to_record``.

        Raises:
            MaskMillError: ``ontology_invalid``.
        """
        fields = {key: value for key, value in recorded.items() if key not in ("hash", "names")}
        return cls.from_dict(fields, origin=origin)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, origin: str = "ontology") -> Ontology:
        """Build from plain values.

        Args:
            data: fields as in the YAML file.
            origin: name of the source in errors.

        Raises:
            MaskMillError: ``ontology_invalid``.
        """
        return _validate(dict(data), origin=origin, lines={})


def _from_record(value: Any) -> Any:
    return Ontology.from_record(value) if isinstance(value, dict) else value


RecordedOntology = Annotated[Ontology, BeforeValidator(_from_record), PlainSerializer(Ontology.to_record)]
"""An ontology as a field of a record."""


@cache
def default_background() -> tuple[str, ...]:
    """The default background words, in order."""
    words = yaml.safe_load((_FOLDER / "background.yaml").read_text(encoding="utf-8"))["words"]
    return tuple(words)


@cache
def builtin_ontologies() -> tuple[str, ...]:
    """Names of the built-in ontologies."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml") if path.stem != "background"))


def parse_classes(
    text: str,
    *,
    background: Sequence[str] | Literal["default"] | None = DEFAULT_BACKGROUND,
    name: str = "classes",
    templates: str | Sequence[str] = "openai85",
) -> Ontology:
    """Parse an ontology from a list on the command line.

    Args:
        text: class names separated by commas, also those of other scripts; quote a name that contains one:
            ``cat, "salt, pepper"``. A byte order mark in front and commas at the ends are ignored.
        background: see ``Ontology``.
        name: name of the ontology.
        templates: name of a template set, or templates.

    Raises:
        MaskMillError: ``ontology_invalid`` for empty or repeated names, unbalanced quotes, and ``;`` or ``|``
            outside quotes.

    >>> parse_classes("cat, dog", background=None).names
    ('cat', 'dog')
    """
    origin = f"class list {text!r}"
    try:
        rows = csv.reader(_with_commas(text, origin).splitlines(), skipinitialspace=True, strict=True)
        names = [cell for row in rows for cell in row]
    except csv.Error as error:
        message = f"{origin}: unbalanced quotes ({error})"
        remedy = 'Quote names that contain a comma: "salt, pepper".'
        raise WrongUse("ontology_invalid", message, remedy) from None
    if not any(cell.strip() for cell in names):
        remedy = 'Give at least one, for example "cat, dog, grass".'
        raise WrongUse("ontology_invalid", f"{origin}: it has no classes", remedy)
    while not names[0].strip():
        del names[0]
    while not names[-1].strip():
        del names[-1]
    data = {"name": name, "classes": names, "background": background, "templates": templates}
    return _validate(data, origin=origin, lines={})


def _with_commas(text: str, origin: str) -> str:
    """The text with plain commas outside quotes, and without a byte order mark."""
    pieces = text.removeprefix("\ufeff").split('"')
    for number in range(0, len(pieces), 2):
        for mark in _DOUBTFUL:
            if mark in pieces[number]:
                raise WrongUse(
                    "ontology_invalid",
                    f"{origin}: does {mark} separate two names, or does it belong to one?",
                    f'Separate names by commas: "cat, dog". Quote a name that holds {mark}.',
                )
        pieces[number] = pieces[number].translate(_COMMAS)
    return '"'.join(pieces)


def load_ontology(source: str | Path) -> Ontology:
    """Load a built-in ontology or a YAML file.

    Args:
        source: a name from ``builtin_ontologies()`` or the path of a YAML file.

    Raises:
        MaskMillError: ``ontology_invalid``, naming file and line if the file is invalid.
    """
    builtin = str(source) in builtin_ontologies()
    path = _FOLDER / f"{source}.yaml" if builtin else Path(source).expanduser()
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise WrongUse(
            "ontology_invalid",
            f"no ontology file or built-in set '{source}'",
            f"{did_you_mean(str(source), builtin_ontologies())}"
            f"Name a YAML file or one of: {', '.join(builtin_ontologies())}.",
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise _invalid(str(path), None, f"cannot be read: {error.strerror}") from error
    return read_ontology_text(text, origin=str(path), default_name=path.stem, folder=path.resolve().parent)


def read_ontology_text(
    text: bytes | str, *, origin: str, default_name: str, folder: Path | None = None
) -> Ontology:
    """Parse an ontology from YAML text.

    Args:
        text: the document.
        origin: file name for errors.
        default_name: name of the ontology if the document has none.
        folder: folder for relative paths of examples, which are then read and hashed; None leaves them as
            they are.

    Raises:
        MaskMillError: ``ontology_invalid``, naming origin and line.
    """
    data, lines = _parse_yaml(text, origin)
    if not isinstance(data, dict):
        raise _invalid(origin, 1, "the file must be a mapping with the key 'classes'")
    data.setdefault("name", default_name)
    return _validate(data, origin=origin, lines=lines, folder=folder)


# --- YAML with line numbers ---


def _parse_yaml(text: bytes | str, origin: str) -> tuple[Any, dict[Location, int]]:
    """Parse YAML into plain values, and the line (from 1) of every key and item by location."""
    try:
        check_yaml_depth(text)
    except RecursionError:
        raise _invalid(origin, None, "nested too deeply for an ontology") from None
    except (yaml.YAMLError, ValueError):
        pass  # told below, with the line
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise _invalid(origin, 1, "the file is empty")
        lines = dict(_lines_of(node, (), origin, set()))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _invalid(origin, mark.line + 1 if mark else None, f"not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _invalid(origin, None, f"not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _lines_of(
    node: yaml.Node, where: Location, origin: str, seen: set[int]
) -> Iterator[tuple[Location, int]]:
    line = node.start_mark.line + 1
    if id(node) in seen:
        # Refuse aliases, as nested ones can expand without bound.
        raise _invalid(origin, line, "YAML anchors and aliases are not supported here")
    seen.add(id(node))
    yield where, line
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines_of(item, (*where, index), origin, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            key_line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise _invalid(origin, key_line, "keys must be plain words")
            if key.value in keys:
                raise _invalid(origin, key_line, f"key '{key.value}' appears twice")
            keys.add(key.value)
            if key.value == "color" and isinstance(value, yaml.ScalarNode) and value.value == "":
                text = 'color is empty; quote it ("#aabbcc"), since # begins a comment in YAML'
                raise _invalid(origin, key_line, text)
            for place, place_line in _lines_of(value, (*where, key.value), origin, seen):
                yield place, key_line if place == (*where, key.value) else place_line


# --- errors ---


def _located(where: Location, text: str) -> PydanticCustomError:
    return PydanticCustomError("ontology", "{text}", {"text": text, "where": where})


def _invalid(origin: str, line: int | None, text: str) -> MaskMillError:
    place = f"{origin}:{line}" if line is not None else origin
    return WrongUse("ontology_invalid", f"{place}: {text}", _REMEDY)


def _validate(
    data: dict[str, Any], *, origin: str, lines: Mapping[Location, int], folder: Path | None = None
) -> Ontology:
    try:
        return Ontology.model_validate(data, context={_FOLDER_OF_FILE: folder})
    except ValidationError as error:
        problems = [_describe(problem, origin, lines) for problem in error.errors(include_url=False)]
        shown = list(dict.fromkeys(problems))
        if len(shown) > _MAX_SHOWN:
            shown = [*shown[:_MAX_SHOWN], f"… and {len(shown) - _MAX_SHOWN} more"]
        raise WrongUse("ontology_invalid", "\n".join(shown), _REMEDY) from None


def _describe(problem: Any, origin: str, lines: Mapping[Location, int]) -> str:
    where: Location = problem.get("ctx", {}).get("where") or problem["loc"]
    line = next((lines[place] for place in _outwards(where) if place in lines), None)
    if problem["type"] == "extra_forbidden":
        holder = Example if "examples" in where[:-1] else ClassEntry if where[0] == "classes" else Ontology
        known = holder.model_fields
        close = difflib.get_close_matches(str(where[-1]), known, n=1)
        text = f"unknown key '{where[-1]}'" + (f"; did you mean '{close[0]}'?" if close else "")
        text += f" (known: {', '.join(known)})"
    elif problem["type"] == "missing":
        text = f"the key '{where[-1]}' is missing"
    elif problem["type"] in _EXPECTED:
        text = f"{_dotted(where)}: {_not_expected(problem['input'], _EXPECTED[problem['type']])}"
    elif problem["msg"].startswith("Input should be "):
        wanted = problem["msg"].removeprefix("Input should be ")
        text = f"{_dotted(where)}: {_shown(problem['input'])} is not {wanted}"
    elif problem["type"] == "string_pattern_mismatch":
        text = f"{_dotted(where)}: '{problem['input']}' is not a colour of the form \"#rrggbb\""
    else:
        text = f"{_dotted(where)}: {problem['msg']}" if where else problem["msg"]
    return f"{origin}:{line}: {text}" if line is not None else f"{origin}: {text}"


def _not_expected(given: Any, expected: str) -> str:
    """Why a value is not what an ontology has in this place."""
    if given is None:
        return f"there is nothing here, where {expected} is expected (YAML reads null and ~ as nothing)"
    if expected == _WORD and not isinstance(given, str | list | tuple | dict):
        read = str(given).lower() if isinstance(given, bool) else given
        return f"YAML reads this as {read}, not as a word; put it in quotes"
    if expected == "a list" and isinstance(given, str):
        return f"{_shown(given)} is a word, where a list is expected; write [{given}]"
    return f"{_shown(given)} is not {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _outwards(where: Location) -> Iterable[Location]:
    return (where[:end] for end in range(len(where), -1, -1))


def _dotted(where: Location) -> str:
    return ".".join(map(str, where))


# --- words ---


def _number_forms(word: str) -> set[str]:
    """A word and its possible singulars: shelves -> shelves, shelve, shelv, shelf."""
    word = word.casefold()
    forms = {word}
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms.add(word.removesuffix(ending) + singular)
    return forms
