"""Datasets that hypothesis draws, written and compared as the engine and a user would."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from pipeline.files.storage import Storage
from pipeline.formats.base import Format, Imported, Loss, Sample
from pipeline.ontology.ontology import Ontology

NAMES = ("猫", "a.b.c", "traffic light", 'ÄÖ, "quoted": #1', "a/b", "100%", "yes", "null", "dog's")
FILES = (
    "plain",
    "with space",
    "dots.in.the.name",
    "猫/犬.v2",
    "a%2Eb",
    "deep/er/x",
    "{a}",
    "x#1?",
    "-o",
)


@st.composite
def ontologies(draw: st.DrawFn) -> Ontology:
    """One to nine classes, or more than fit eight bits."""
    more = draw(st.sampled_from([0, 0, 0, 0, 246, 300]))
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, len(NAMES)))]
    kinds = st.sampled_from(["thing", "stuff", None])
    return Ontology.from_dict(
        {
            "name": "drawn",
            "background": draw(st.sampled_from([None, ["rest"]])),
            "classes": [{"name": name, "kind": draw(kinds)} for name in names]
            + [f"class {number}" for number in range(more)],
        }
    )


@st.composite
def datasets(draw: st.DrawFn, *, images: bool = False) -> tuple[Ontology, list[Sample]]:
    """An ontology and up to five labelled images of it."""
    ontology = draw(ontologies())
    ids = [*range(ontology.num_classes), ontology.ignore_index]
    few = draw(st.lists(st.sampled_from(ids), min_size=1, max_size=6))
    samples = []
    for number, name in enumerate(draw(st.permutations(FILES))[: draw(st.integers(0, 5))]):
        size = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
        seed = draw(st.integers(0, 2**32 - 1))
        labels = np.random.default_rng(seed).choice(np.array(few, ontology.mask_dtype), size)
        suffix = draw(st.sampled_from([".jpg", ".png"]))
        samples.append(
            Sample(
                number=3 * number,
                id=-number,
                name=name,
                uri=f"/photos/{name}{suffix}",
                suffix=suffix,
                split=draw(st.sampled_from(["train", "val", "my split"])),
                labels=labels,
                image=picture(*size, suffix) if images else None,
            )
        )
    return ontology, samples


def picture(height: int, width: int, suffix: str = ".png") -> bytes:
    """An encoded image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    return buffer.getvalue()


def export(form: Format, ontology: Ontology, samples: Sequence[Sample], output: Storage) -> tuple[Any, Loss]:
    """Write in parts of two images, and finish with entries that went through JSON."""
    entries, lost = [], Loss()
    for start in range(0, len(samples), 2):
        part = samples[start : start + 2]
        written = list(form.write_part(f"{start:05d}", iter(part), ontology, output))
        assert len(written) == len(part)
        for one in written:
            entries.append(json.dumps(one.entry))
            lost.add(one.lost)
    return form.finish(map(json.loads, entries), ontology, output), lost


def check_same(
    imported: Imported, ontology: Ontology, samples: Iterable[Sample], *, ignore_split: bool = False
) -> None:
    """Every image is there, with the same label at every pixel."""
    assert imported.ontology.names == ontology.names
    found = list(imported.samples)
    assert [one.number for one in found] == list(range(len(found)))
    assert imported.count in (None, len(found))
    by_name = {one.name: one for one in found}
    wanted = {one.name: one for one in samples}
    assert by_name.keys() == wanted.keys() and len(found) == len(by_name)
    for name, one in wanted.items():
        labels = by_name[name].labels
        expected = np.where(one.labels == ontology.ignore_index, imported.ontology.ignore_index, one.labels)
        assert labels.dtype == imported.ontology.mask_dtype
        np.testing.assert_array_equal(labels, expected)
        assert by_name[name].suffix == one.suffix
        assert by_name[name].split == one.split


def contents(output: Storage) -> dict[str, bytes]:
    """All files."""
    return {name: output.read_bytes(name) for name in output.list(recursive=True)}
