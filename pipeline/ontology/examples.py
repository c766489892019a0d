"""Pictures that show a class, for models with visual prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictStr,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from models.errors import WrongUse
from pipeline.files.storage import is_remote, refuse_secrets

#: Key in pydantic's validation context: the folder for relative paths of examples.
FOLDER_OF_FILE: Final = "folder"


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
        folder = (info.context or {}).get(FOLDER_OF_FILE)
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
