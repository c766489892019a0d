"""Published figures: pinned values, consistency between columns, and protocols kept apart."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.errors import MaskMillError
from pipeline.evaluation import published
from pipeline.evaluation.published import Figure, PublishedTable, load_published, lookup, names
from pipeline.ontology.reading import load_ontology

PROTOCOLS = {"maskclip": "seed", "unified": "unified", "clipseg": "clipseg"}
FIGURES = [figure for name in names() for figure in load_published(name).figures()]


def values(dataset: str, method: str, protocol: str, metric: str = "miou") -> dict[Any, float]:
    """Figures by model, or by threshold where there are no models."""
    found = [figure for figure in lookup(dataset, method, protocol) if figure.metric == metric]
    keyed = {figure.model or figure.threshold: figure.value for figure in found}
    assert len(keyed) == len(found)
    return keyed


@pytest.mark.parametrize("name", names())
def test_every_file_is_a_sourced_table(name: str) -> None:
    table = load_published(name)
    assert table.name == name
    assert table.protocol == PROTOCOLS[name.partition("_")[0]]
    assert all(table.source_of(row).citation for row in table.rows)
    lines = Counter((row.method, row.model) for row in table.rows)
    assert max(lines.values()) == 1
    assert len(set(table.columns)) == len(table.columns)
    assert any(value is not None for row in table.rows for value in row.values)


def test_every_yaml_file_ships() -> None:
    assert {path.stem for path in Path(published.__file__).parent.iterdir() if path.suffix == ".yaml"} == set(
        names()
    )
    assert len(names()) == 14


@pytest.mark.parametrize(
    ("dataset", "method", "protocol", "metric", "expected"),
    [
        ("context59", "MaskCLIP", "seed", "miou", {"RN50": 18.5, "RN50x16": 20.3, "ViT-B/16": 21.7}),
        ("voc20", "MaskCLIP", "seed", "miou", {"RN50": 41.5, "RN50x16": 50.9, "ViT-B/16": 49.5}),
        ("voc20", "MaskCLIP", "unified", "miou", {"ViT-B/16": 74.9, "OpenCLIP ViT-H/14": 41.7}),
        ("context59", "MaskCLIP + KS + PD", "seed", "miou", {"RN50": 21.8, "ViT-B/16": 25.5}),
        ("cocostuff171", "MaskCLIP + KS + PD", "seed", "miou", {"RN50": 12.8, "ViT-B/16": 14.6}),
        ("context59", "MaskCLIP + KS", "seed", "miou", {}),  # in the paper, but not found
        ("ade150", "MaskCLIP+", "seed", "miou", {"RN50": 10.6, "RN50x16": 13.5}),
        ("voc20/speckle_noise:1", "MaskCLIP", "seed", "miou", {"RN50": 30.9}),
        ("cocostuff171/zero-shot", "MaskCLIP+", "seed", "miou_unseen", {"RN50": 54.7}),
        ("cocostuff171/zero-shot", "STRICT", "seed", "hiou", {None: 32.6}),
        ("context60/zero-shot", "fully supervised", "seed", "miou", {None: 48.2}),
        ("context60/zero-shot", "fully supervised", "seed", "hiou", {}),
        ("ade150", "Trident", "unified", "miou", {"ViT-B/16": 21.9, "OpenCLIP ViT-H/14": 26.7}),
        ("cityscapes19", "NACLIP + PAMR", "unified", "miou", {"ViT-B/16": 38.27}),
        ("phrasecut", "CLIPSeg (PC+)", "clipseg", "miou", {0.3: 43.4, "best": 43.6}),
        ("phrasecut", "clipseg (pc+)", "clipseg", "iou_fg", {0.3: 54.7}),  # case does not matter
        ("phrasecut/visual", "CLIPSeg (PC+)", "clipseg", "ap", {"best": 55.6}),
        ("voc21/unseen4", "CLIPSeg (PC+)", "clipseg", "miou_seen", {None: 20.8}),  # as printed
        ("voc21/unseen10", "JoEm", "clipseg", "miou_unseen", {None: 22.5}),
        ("pascal5i", "CLIPSeg (PC+)", "clipseg", "miou", {0.3: 59.5}),
        ("pascal5i", "HSNet", "clipseg", "iou_bin", {"RN50": 76.7, "RN101": 77.6}),
        ("pascal5i/text", "CLIPSeg (PC+)", "clipseg", "ap", {0.3: 93.5}),
        ("coco20i", "CLIPSeg (COCO+N)", "clipseg", "miou", {0.1: 33.3}),
        ("lvis/meronymy", "CLIPSeg (LVIS)", "clipseg", "ap", {"best": 13.8}),
        ("lvis/visual-prompts", "mask all, all layers", "clipseg", "delta_probability", {None: -14.44}),
    ],
)
def test_pinned_figures(
    dataset: str, method: str, protocol: str, metric: str, expected: dict[Any, float]
) -> None:
    assert values(dataset, method, protocol, metric) == expected


def test_the_provenance_of_each_figure_is_told() -> None:
    (transcribed,) = (f for f in lookup("context59", "MaskCLIP + KS + PD", "seed") if f.model == "ViT-B/16")
    assert transcribed.source.provenance == "transcription"
    released = lookup("voc20/zero-shot", "MaskCLIP+, released model", "seed")[0]
    assert released.source.provenance == "repository" and released.value == 87.8
    assert {figure.source.provenance for figure in lookup("pascal5i", None, "clipseg")} == {"published"}


def test_a_figure_as_an_entry_of_a_result() -> None:
    (figure,) = (f for f in lookup("context59", "MaskCLIP + KS + PD", "seed") if f.model == "ViT-B/16")
    source = (
        "Zhou et al., Extract Free Dense Labels from CLIP, ECCV 2022, table of annotation-free segmentation "
        "(second-hand transcription)"
    )
    assert figure.entry() == {
        "method": "MaskCLIP + KS + PD (ViT-B/16)",
        "metric": "miou",
        "value": 0.255,
        "source": source,
        "protocol": "seed",
    }
    assert lookup("coco20i", "CLIPSeg (COCO)", "clipseg")[0].entry()["method"] == "CLIPSeg (COCO)"


# --- protocols ---


def test_protocols_are_never_mixed() -> None:
    datasets = {figure.dataset for figure in FIGURES}
    found: dict[str, list[Figure]] = {
        protocol: [figure for dataset in sorted(datasets) for figure in lookup(dataset, None, protocol)]
        for protocol in PROTOCOLS.values()
    }
    for protocol, figures in found.items():
        assert {figure.protocol for figure in figures} == {protocol}
        assert {PROTOCOLS[figure.table.partition("_")[0]] for figure in figures} == {protocol}
    for one, other in itertools.combinations(found.values(), 2):
        assert not set(one) & set(other)
    assert sum(map(len, found.values())) == len(FIGURES) == len(set(FIGURES))


@pytest.mark.parametrize(
    ("dataset", "method", "protocol"),
    [
        ("voc20", None, "custom"),
        ("voc20", None, "clipseg"),
        ("phrasecut", None, "seed"),
        ("voc20", "SCLIP", "seed"),
        ("nothing", None, "seed"),
    ],
)
def test_what_is_not_published_is_not_found(dataset: str, method: str | None, protocol: str) -> None:
    assert lookup(dataset, method, protocol) == []


def test_a_setting_is_another_task() -> None:
    assert not {f.table for f in lookup("voc20", None, "seed")} & {
        f.table for f in lookup("voc20/zero-shot", None, "seed")
    }


@pytest.mark.parametrize(
    "dataset",
    ["voc20", "voc21", "context59", "context60", "cocostuff171", "cityscapes19", "ade150"],
)
def test_datasets_are_called_as_ontologies_are(dataset: str) -> None:
    assert load_ontology(dataset).name == dataset
    assert any(figure.dataset.partition("/")[0] == dataset for figure in FIGURES)


# --- columns agree with each other ---

UNSEEN = {"voc20/zero-shot": (5, 20), "cocostuff171/zero-shot": (15, 171), "context60/zero-shot": (10, 60)}
# As transcribed; their files say so.
DISAGREE = {
    ("CaGNet", "context60/zero-shot"),
    ("ZS3Net+ST", "cocostuff171/zero-shot"),
    ("CaGNet+ST", "voc20/zero-shot"),
}


def _zero_shot_rows() -> list[tuple[str, str, float, float, float]]:
    figures = {(f.method, f.dataset, f.metric): f.value for f in FIGURES if f.table == "maskclip_zero_shot"}
    return [
        (method, dataset, value, figures[method, dataset, "miou"], figures[method, dataset, "hiou"])
        for (method, dataset, metric), value in figures.items()
        if metric == "miou_unseen" and value > 0
    ]


@pytest.mark.parametrize(("method", "dataset", "unseen", "both", "printed"), _zero_shot_rows())
def test_harmonic_mean_follows_from_its_columns(
    method: str, dataset: str, unseen: float, both: float, printed: float
) -> None:
    count, total = UNSEEN[dataset]
    possible = []
    for unseen_error, both_error in itertools.product((-0.05, 0.05), repeat=2):  # of rounding in print
        u, m = unseen + unseen_error, both + both_error
        seen = (total * m - count * u) / (total - count)
        possible.append(2 * seen * u / (seen + u))
    agrees = min(possible) - 0.0501 <= printed <= max(possible) + 0.0501
    assert agrees != ((method, dataset) in DISAGREE)


def test_disagreement_is_noted() -> None:
    for row in load_published("maskclip_zero_shot").rows:
        assert bool(row.note and "does not follow" in row.note) == (row.method in {m for m, _ in DISAGREE})
    assert len(_zero_shot_rows()) == 17


@pytest.mark.parametrize("name", ["unified_eight_sets", "unified_repositories"])
def test_printed_means_are_the_means(name: str) -> None:
    table = load_published(name)
    assert [column.dataset for column in table.columns][-1] == "mean of eight"
    checked = 0
    for row in table.rows:
        *eight, mean = row.values
        if mean is not None:
            assert mean == pytest.approx(sum(v for v in eight if v is not None) / 8, abs=0.1), row.method
            checked += 1
    assert checked >= 4


# --- mistakes ---


def test_unknown_tables_are_named() -> None:
    with pytest.raises(MaskMillError, match="Did you mean clipseg_ablation") as caught:
        load_published("clipseg_ablations")
    assert caught.value.code == "name_unknown"


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "custom"},
        {"rows": [{"method": "a", "values": [1.0, 2.0]}]},
        {"rows": [{"method": "a", "values": [101.0]}]},
        {"rows": [{"method": "", "values": [1.0]}]},
        {"rows": []},
        {"source": None},
        {"source": {"citation": " ", "provenance": "published"}},
        {"source": {"citation": "x", "provenance": "hearsay"}},
        {"remark": "x"},
    ],
    ids=str,
)
def test_damaged_tables_do_not_load(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "name": "x",
        "title": "x",
        "protocol": "seed",
        "source": {"citation": "x", "provenance": "published"},
        "columns": [{"dataset": "voc20", "metric": "miou"}],
        "rows": [{"method": "a", "values": [1.0]}],
    }
    assert PublishedTable.model_validate(good).rows[0].values == (1.0,)
    with pytest.raises(ValidationError):
        PublishedTable.model_validate(good | change)
