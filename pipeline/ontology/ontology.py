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

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
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

from pipeline.ontology.examples import FOLDER_OF_FILE, Example
from pipeline.ontology.palette import BACKGROUND_GREY, palette
from pipeline.ontology.problems import Location, located, told

#: Ids 0..65,533 and the ignore index 65,535 fit a 16-bit mask.
MAX_CLASSES: Final = 65_534
#: Up to this number, ids and the ignore index 255 fit an 8-bit mask.
MAX_CLASSES_8BIT: Final = 254
#: Name of class 0 if there are background words.
BACKGROUND: Final = "background"
#: Stands for the words of ``builtin/background.yaml`` that no class uses.
DEFAULT_BACKGROUND: Final = "default"

#: Folder of the built-in ontologies.
BUILTIN: Final = Path(__file__).parent / "builtin"

Merge = Literal["max", "mean"]


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
                raise located(("templates",), f"template '{template}' must contain {{}} exactly once")
        return tuple(listed)

    @model_validator(mode="after")
    def _check_whole(self) -> Ontology:
        owners: dict[str, tuple[str, Location]] = {}

        def claim(word: str, owner: str, where: Location) -> None:
            key = word.casefold()
            if key in owners:
                other = owners[key][0]
                raise located(where, f"'{word}' ({owner}) is already used: {other}")
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
                    raise located(where, f"'{prompt}' is already used: prompt of '{other}'")
        for number, word in enumerate(self.background or ()):
            if word.casefold() != BACKGROUND:  # "background" itself may be a prompt of class 0
                claim(word, "background word", ("background", number))
            if word.casefold() in asked:
                raise located(
                    ("background", number), f"'{word}' is already used: prompt of '{asked[word.casefold()]}'"
                )
        if self.num_classes > MAX_CLASSES:
            raise located(("classes",), f"{self.num_classes} classes with background; at most 65,534 fit")
        highest = 255 if self.num_classes <= MAX_CLASSES_8BIT else 65_535
        if not self.num_classes <= self.ignore_index <= highest:
            raise located(
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
        return validate(dict(data), origin=origin, lines={})


def _from_record(value: Any) -> Any:
    return Ontology.from_record(value) if isinstance(value, dict) else value


RecordedOntology = Annotated[Ontology, BeforeValidator(_from_record), PlainSerializer(Ontology.to_record)]
"""An ontology as a field of a record."""


@cache
def default_background() -> tuple[str, ...]:
    """The default background words, in order."""
    words = yaml.safe_load((BUILTIN / "background.yaml").read_text(encoding="utf-8"))["words"]
    return tuple(words)


def validate(
    data: dict[str, Any], *, origin: str, lines: Mapping[Location, int], folder: Path | None = None
) -> Ontology:
    """Build an ontology from plain values.

    Args:
        data: fields as in the YAML file.
        origin: name of the source in errors.
        lines: the line of every key and item, for errors.
        folder: folder for relative paths of examples, which are then read and hashed.

    Raises:
        MaskMillError: ``ontology_invalid``.
    """
    try:
        return Ontology.model_validate(data, context={FOLDER_OF_FILE: folder})
    except ValidationError as error:
        raise told(error, origin=origin, lines=lines, known_keys=_known_keys) from None


def _known_keys(where: Location) -> Iterable[str]:
    holder = Example if "examples" in where[:-1] else ClassEntry if where[0] == "classes" else Ontology
    return holder.model_fields


def _number_forms(word: str) -> set[str]:
    """A word and its possible singulars: shelves -> shelves, shelve, shelv, shelf."""
    word = word.casefold()
    forms = {word}
    for ending, singular in (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            forms.add(word.removesuffix(ending) + singular)
    return forms
