"""Valid MLflow names from any text, and settings as flat parameters."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pipeline.files.redaction import redact
from pipeline.table.record import TableRecord

MAX_NAME = 200
"""MLflow allows 250 characters; the rest is for a prefix."""

_FORBIDDEN = re.compile(r"[^\w.\- ]")


def key_part(text: str) -> str:
    """One part of a metric's or parameter's name, between slashes.

    MLflow allows letters of any script, digits, ``_ - .`` and spaces, and treats names as paths.

    >>> key_part("traffic light / sign")
    'traffic light _ sign'
    """
    part = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", text))[:MAX_NAME].strip()
    return part if part.strip(".") else part.replace(".", "_") or "_"


def key_parts(texts: Sequence[str]) -> list[str]:
    """``key_part`` of each text, made unique.

    Some of MLflow's databases ignore case and accents, so names that would collide get their position
    appended.

    >>> key_parts(["cat", "a/b", "a:b", "Cat"])
    ['cat', 'a_b', 'a_b 2', 'Cat 3']
    """
    taken: set[str] = set()
    result = []
    for index, text in enumerate(texts):
        part = key_part(text)
        while _folded(part) in taken:
            part = f"{part} {index}"
        taken.add(_folded(part))
        result.append(part)
    return result


def run_name(command: str, model: str, data: str = "") -> str:
    """Name of a run, which says at a glance what was done, with what, and to which data.

    >>> run_name("label", "maskclip (ViT-B-16-quickgelu)", "pets/photos")
    'label maskclip (ViT-B-16-quickgelu) on pets/photos'
    """
    return redact(f"{command} {model}{f' on {data}' if data else ''}")[:MAX_NAME]


def recipe_name(recipe: Mapping[str, Any]) -> str:
    """A labelling recipe, with its model: the architecture, the folder of a student, CLIPSeg's weights.

    >>> recipe_name({"name": "toy", "model": "toyclip", "pretrained": "bundled"})
    'toy (toyclip)'
    >>> recipe_name({"name": "student", "model": "/home/me/pets/student", "pretrained": None})
    'student (pets/student)'
    """
    name, model = str(recipe.get("name") or "labels"), str(recipe.get("model") or "")
    if model == "clipseg":
        model = str(recipe.get("pretrained") or "")
    model = place_name(model)
    return name if model in ("", name) else f"{name} ({model})"


def place_name(place: str) -> str:
    """The end of a path or URI, two parts long; a single part is too often ``images`` or ``train``.

    >>> place_name("s3://bucket/pets/photos/*.jpg")
    'photos/*.jpg'
    """
    parts = PurePosixPath(place.partition("://")[2] or place).parts
    return "/".join(part for part in parts[-2:] if part != "/")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as parameters: dotted names, JSON for everything but text.

    >>> flatten({"recipe": {"scale": [2048, 512], "head": "maskclip"}})
    {'recipe.scale': '[2048, 512]', 'recipe.head': 'maskclip'}
    """
    result: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}.{key_part(str(key))}" if prefix else key_part(str(key))
        if isinstance(value, Mapping):
            result |= flatten(value, name)
        else:
            result[name] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            )
    return result


def record_params(record: TableRecord) -> dict[str, Any]:
    """The settings to log from the record of a label table."""
    ontology = record.ontology
    return {
        "recipe": record.recipe,
        "weights": record.weights,
        "ontology": {"name": ontology.name, "hash": ontology.hash, "classes": list(ontology.names)},
    }


def _folded(text: str) -> str:
    spread = unicodedata.normalize("NFKD", text.casefold())
    return "".join(char for char in spread if not unicodedata.combining(char))
