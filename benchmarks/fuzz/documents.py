"""Ontologies, recipes, views, mappings of classes, lists of images and of classes, and ``--set`` options."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import mutate_bytes, mutate_tree
from pipeline.corpus.manifest import build_manifest
from pipeline.evaluation.classes import match_classes, read_mapping
from pipeline.files.recipes import RecipeBook
from pipeline.labelling.recipes import LABEL_RECIPES
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import builtin_ontologies, load_ontology, parse_classes
from pipeline.table.views import parse_view, read_view
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

BOOKS: dict[str, RecipeBook[Any]] = {
    "label": LABEL_RECIPES,
    "maskclip-plus": MASKCLIP_PLUS_RECIPES,
    "clipseg": CLIPSEG_RECIPES,
}
PETS = Ontology.from_dict({"name": "pets", "background": ["wall"], "classes": ["cat", "dog", "grass"]})
VIEWS: tuple[dict[str, Any], ...] = (
    {"threshold": 0.4, "thresholds": {"dog": 0.6}, "min_area": 3, "min_areas": {"cat": 2}},
    {"schema_version": 1, "merge": {"pet": ["cat", "dog"]}, "drop": ["grass"]},
    {"rename": {"grass": "lawn"}, "merge": {"background": ["cat"]}, "min_areas": {"lawn": 2}},
    {},
)
MAPPINGS: tuple[dict[str, Any], ...] = (
    {"cat": "dog", "grass": None},
    {"cat": ["cat", "dog"], "dog": None},
    {"dog": "person", "cat": "person", "grass": ["sofa", "car"]},
)
SNIPPETS = (
    "a: &a [*a]\n", "&x {<<: *x}\n", "!!python/object/apply:os.system ['true']\n", "\tclasses: [a]\n",
    "classes: [a]\nclasses: [b]\n", "---\na: 1\n---\nb: 2\n", "? [a]\n: b\n", "%YAML 9.9\n---\na\n", "'",
    "[", "{",
    "classes: 2020-01-01\n", "name: 2020-01-01\nclasses: [a]\n", "classes: [yes, no, on]\n",
    "\ufeffclasses: [a]\n",
    "classes: [0o7, 1_000, 1e3]\n", "classes:\n  - name: !!binary aGk=\n", "null", "~", "...", "- a\n- b\n",
    "classes: !!set {a, b}\n", "{" * 3000, "[" * 3000, "- " * 3000, "a: " * 500,
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")),
)  # fmt: skip


class Documents(Kind):
    """See the package. The first line of an input says what it is."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ("a.png", "b c.png", "ü.png"):
            Image.new("RGB", (4, 4)).save(folder / name)

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """A document of one of the kinds."""
        sort = rng.choice(
            ("ontology", "ontology", *BOOKS, "view", "mapping", "list.txt", "list.csv", "classes", "set")
        )
        return f"{sort}\n".encode() + cls._document(sort, rng)

    @staticmethod
    def _document(sort: str, rng: random.Random) -> bytes:
        if sort in ("ontology", "view", "mapping", *BOOKS) and rng.random() < 0.15:
            return mutate_bytes(rng, rng.choice(SNIPPETS).encode(), most=1)
        if sort == "ontology":
            text = _yaml(rng, mutate_tree(rng, _ontology(rng)))
        elif sort == "view":
            text = _yaml(rng, mutate_tree(rng, rng.choice(VIEWS), most=rng.randint(0, 2)))
        elif sort == "mapping":
            text = _yaml(rng, mutate_tree(rng, rng.choice(MAPPINGS), most=rng.randint(0, 2)))
        elif sort in BOOKS:
            book = BOOKS[sort]
            fields = rng.choice(list(book.recipes.values())).to_dict()
            if rng.random() < 0.5:
                fields = {key: fields[key] for key in rng.sample(sorted(fields), min(3, len(fields)))}
            if rng.random() < 0.5:
                fields["base"] = rng.choice(list(book.recipes))
            text = _yaml(rng, mutate_tree(rng, fields))
        elif sort == "list.txt":
            text = "\n".join(_entries(rng))
        elif sort == "list.csv":
            head = rng.choice(
                ("uri", "uri,width,height", "uri,offset,length", "id,uri", "", "uri,uri", '"uri')
            )
            cells = ("", "0", "1", "-1", "9" * 30, "1.5", "nan", "x", '"')
            rows = [",".join([entry, rng.choice(cells), rng.choice(cells)]) for entry in _entries(rng)]
            text = "\n".join([head, *rows])
        elif sort == "classes":
            words = (
                "cat",
                "dog",
                " ",
                "",
                '"',
                "猫",
                "，",
                ";",
                "\ufeff",
                "a" * 300,
                "cat",
                "salt, pepper",
                "\0",
            )
            text = rng.choice((",", ", ", ";", "\n")).join(rng.choices(words, k=rng.randint(0, 5)))
        else:
            recipe = rng.choice(list(BOOKS.values())).recipes
            keys = [*_paths(rng.choice(list(recipe.values())).to_dict()), "", "x", "a.b", "name"]
            values = (
                "1",
                "-1",
                "nan",
                "[1, 2]",
                "{a: 1}",
                "x",
                "",
                "'",
                "null",
                "1e400",
                "[" * 2000,
                "9" * 5000,
            )
            text = "\n".join(f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randint(1, 3)))
        data = text.encode(rng.choice(("utf-8",) * 6 + ("utf-16", "latin-1")), "replace")
        return mutate_bytes(rng, data, most=2) if rng.random() < 0.3 else data

    def check(self, data: bytes, rng: random.Random) -> str:
        """Read it the way a command does."""
        first, _, rest = data.partition(b"\n")
        sort = first.decode()
        if sort == "ontology":
            ontology = load_ontology(self._write("ontology.yaml", rest))
            if ontology.num_classes < 1 or len(ontology.palette()) < ontology.num_classes:
                raise Fault("an ontology without classes or colours")
            json.dumps(ontology.to_dict(), allow_nan=False)
            ontology.thresholds(default=0.0)
        elif sort in BOOKS:
            recipe = BOOKS[sort].load(str(self._write("recipe.yaml", rest)))
            json.dumps(recipe.to_dict(), allow_nan=False)
        elif sort == "view":
            view = read_view(str(self._write("view.yaml", rest)), str(self.folder))
            if parse_view(json.loads(json.dumps(view.to_dict(), allow_nan=False)), "again") != view:
                raise Fault("a view that is another one when it is read again")
            bound = view.of(PETS)
            labels = np.array([rng.choices((0, 1, 2, 3, 200, 255), k=12)], np.uint8)
            found, _ = bound.apply(labels, np.arange(12, dtype=np.uint8)[None] * 20)
            if not ((found < bound.ontology.num_classes) | (found == bound.ontology.ignore_index)).all():
                raise Fault(f"labels {np.unique(found)} of {bound.ontology.num_classes} classes")
            view.described()
        elif sort == "mapping":
            given = read_mapping(str(self._write("map.yaml", rest)))
            match_classes(PETS, load_ontology("voc21"), given=given, partial=rng.random() < 0.8)
        elif sort.startswith("list"):
            table = build_manifest(self._write(sort, rest))
            if len(set(table["id"].to_pylist())) != table.num_rows:
                raise Fault("two rows have one id")
        elif sort == "classes":
            parse_classes(rest.decode("utf-8", "surrogateescape"))
        else:
            settings = rest.decode("utf-8", "surrogateescape").split("\n")
            rng.choice(list(BOOKS.values())).load(rng.choice(("toy", "nosuch")), settings)
        return f"read {sort}"

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


def _ontology(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        return load_ontology(
            rng.choice([name for name in builtin_ontologies() if name != "cocostuff171"])
        ).to_dict()
    return {
        "name": "pets",
        "classes": [
            "grass",
            {"name": "cat", "synonyms": ["kitty"], "merge": "mean", "color": "#ff0000", "kind": "thing"},
            {
                "name": "dog", "threshold": 0.5,
                "examples": [{"image": "a.png"}, {"image": "b c.png", "mask": "ü.png"}],
            },
        ],
        "background": rng.choice((None, "default", ["wall", "floor"])),
        "ignore_index": 255,
        "templates": rng.choice(("openai85", ["a photo of a {}."])),
    }  # fmt: skip


def _yaml(rng: random.Random, tree: Any) -> str:
    try:
        return str(
            yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5, default_flow_style=rng.random() < 0.3)
        )
    except (yaml.YAMLError, RecursionError):
        return json.dumps(tree)


def _entries(rng: random.Random) -> list[str]:
    entries = (
        "a.png", "b c.png", "ü.png", "missing.png", "", "#", " a.png ", "/dev/zero", "..", ".", "~",
        "a.png\t",
        "s3://", "s3://user:secret@bucket/x.png", "http://[::1", "file:///x", "nosuch://x", "\x00",
        "C:\\x.png",
        "*.png", "a" * 5000, "https://h/x?sig=1&y", "\ufeffa.png", "ａ.png", "%00", "a.png,1",
    )  # fmt: skip
    return rng.choices(entries, k=rng.randint(0, 6))


def _paths(fields: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in fields.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += _paths(value, f"{prefix}{key}.")
    return found


KIND = Documents
