"""Data that papers fix: protocols, zero-shot splits, one-shot folds and episodes; and the toy world."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from models.catalogue import HEADS
from models.clip.templates import get_templates
from models.errors import MaskMillError
from pipeline.datasets.cocoobject import coco_object_ontology
from pipeline.datasets.oneshot import BENCHMARKS, class_areas, draw_episodes
from pipeline.datasets.protocols import PROTOCOLS, Protocol, check_comparable, get_protocol
from pipeline.datasets.registry import DATASETS, open_dataset
from pipeline.datasets.zeroshot import SPLITS, zero_shot_split
from pipeline.labelling.recipes import RECIPES, change_recipe, templates_for
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld import scenes as toyworld

EVERY = [protocol for both in PROTOCOLS.values() for protocol in both.values()]


@pytest.mark.parametrize("protocol", EVERY, ids=lambda protocol: f"{protocol.dataset}-{protocol.name}")
def test_protocols_make_valid_recipes(protocol: Protocol) -> None:
    overrides = protocol.recipe_overrides()
    recipe = change_recipe(RECIPES["maskclip"], overrides)
    assert recipe.images.scale == protocol.scale
    assert recipe.effective().items() >= _listed(protocol).items()
    assert len(get_templates(protocol.templates)) == {"seed": 85, "unified": 80}[protocol.name]
    assert PROTOCOLS[protocol.dataset][protocol.name] is protocol
    assert protocol.dataset in DATASETS


def test_background_handling_agrees_with_the_datasets() -> None:
    for protocol in EVERY:
        ontology = (
            coco_object_ontology() if protocol.dataset == "cocoobject81" else load_ontology(protocol.dataset)
        )
        assert (protocol.background == "class") == (ontology.background is not None)
        assert protocol.ontology(ontology).names == ontology.names
        assert (protocol.background_threshold > 0) == (protocol.background == "class")


@pytest.mark.parametrize(
    ("dataset", "name", "scale", "size"),
    [
        # the worked examples of the reference: 375 x 500 becomes 512 x 683, and 390 x 520
        ("voc20", "seed", (2048, 512), (512, 683)),
        ("context59", "seed", (520, 520), (390, 520)),
        ("cocostuff171", "unified", (2048, 448), (448, 597)),
        ("cityscapes19", "unified", (2048, 560), (560, 747)),
        ("ade150", "unified", (2048, 336), (336, 448)),
    ],
)
def test_scales(dataset: str, name: str, scale: tuple[int, int], size: tuple[int, int]) -> None:
    from pipeline.files.images import target_size

    protocol = get_protocol(dataset, name)
    assert protocol.scale == scale
    assert target_size(375, 500, scale=protocol.scale) == size


def test_recipes_of_the_project_are_the_protocols() -> None:
    assert RECIPES["maskclip"].effective().items() >= _listed(get_protocol("voc20", "seed")).items()
    wanted = _listed(get_protocol("voc20", "unified"))
    unified = [recipe for name, recipe in RECIPES.items() if name.startswith("unified-")]
    alone = [head for head, entry in HEADS.items() if entry.alone]
    assert len(unified) == len(alone) - 2, "all heads of CLIP alone but value and plain"
    for recipe in unified:
        assert recipe.effective().items() >= wanted.items()
        assert templates_for(recipe, None) == get_protocol("voc20", "unified").templates


def _listed(protocol: Protocol) -> dict[str, object]:
    overrides = protocol.recipe_overrides()
    return overrides | {"images.scale": list(overrides["images.scale"])}


def test_protocols_are_kept_apart() -> None:
    seed, unified = get_protocol("voc20", "seed"), get_protocol("voc20", "unified")
    check_comparable(seed, seed)
    for other in (unified, get_protocol("context59", "seed")):
        with pytest.raises(MaskMillError) as caught:
            check_comparable(seed, other)
        assert caught.value.code == "output_differs"
    for dataset, name in (("voc21", "seed"), ("voc20", "paper"), ("toyworld", "seed")):
        with pytest.raises(MaskMillError, match=r"Known|Datasets with") as caught:
            get_protocol(dataset, name)
        assert caught.value.code == "name_unknown"


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("voc20", (15, 16, 17, 18, 19)),
        ("voc21", (16, 17, 18, 19, 20)),
        ("context60", (20, 34, 49, 15, 8, 25, 7, 55, 32, 1)),
        ("cocostuff171", (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160)),
        ("pascal-unseen2", (10, 14)),
        ("pascal-unseen4", (10, 14, 1, 18)),
        ("pascal-unseen6", (10, 14, 1, 18, 8, 20)),
        ("pascal-unseen8", (10, 14, 1, 18, 8, 20, 19, 5)),
        ("pascal-unseen10", (10, 14, 1, 18, 8, 20, 19, 5, 9, 16)),
    ],
)
def test_zero_shot_splits_are_the_published_ids(name: str, ids: tuple[int, ...]) -> None:
    split = zero_shot_split(name)
    assert split.unseen_ids == ids
    ontology = load_ontology(split.ontology)
    assert sorted(split.seen_ids + split.unseen_ids) == list(range(ontology.num_classes))
    assert not set(split.seen_ids) & set(ids)


def test_every_zero_shot_split_is_tested_and_none_other_found() -> None:
    assert len(SPLITS) == 9
    with pytest.raises(MaskMillError, match="pascal-unseen10"):
        zero_shot_split("pascal-unseen3")


@pytest.mark.parametrize(
    ("name", "classes", "third"),
    [
        ("pascal5i", range(1, 21), (11, 12, 13, 14, 15)),
        ("pascal5i-hsnet", range(1, 21), (11, 12, 13, 14, 15)),
        ("coco20i", range(1, 81), tuple(range(3, 81, 4))),
    ],
)
def test_folds_partition_the_classes(name: str, classes: range, third: tuple[int, ...]) -> None:
    benchmark = BENCHMARKS[name]
    assert sorted(number for fold in benchmark.folds for number in fold) == list(classes)
    assert benchmark.folds[2] == third
    assert benchmark.dataset in DATASETS


NAMES = [f"img{number:02d}" for number in range(40)]


def areas(columns: int, *, area: int = 5000) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 2, (len(NAMES), columns)) * area


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("shots", [1, 3])
def test_episodes(name: str, shots: int) -> None:
    benchmark = BENCHMARKS[name]
    table = areas(81)
    episodes = draw_episodes(benchmark, 1, NAMES, table, seed=5, shots=shots)
    assert episodes == draw_episodes(benchmark, 1, NAMES, table, seed=5, shots=shots)
    assert episodes != draw_episodes(benchmark, 1, NAMES, table, seed=6, shots=shots)
    # The beginning of a longer list is the shorter list.
    assert draw_episodes(benchmark, 1, NAMES, table, seed=5, shots=shots, episodes=7) == episodes[:7]
    assert len(episodes) == (
        benchmark.episodes or np.count_nonzero(table[:, list(benchmark.folds[1])].any(1))
    )
    for episode in episodes:
        assert episode.class_id in benchmark.folds[1]
        assert episode.query not in episode.support and len(set(episode.support)) == shots
        for image in (episode.query, *episode.support):
            assert table[NAMES.index(image), episode.class_id] >= benchmark.min_area
    if benchmark.draw != "image":
        assert {episode.class_id for episode in episodes} == set(benchmark.folds[1])


def test_every_query_has_its_turn() -> None:
    table = areas(21)
    by_image = draw_episodes(BENCHMARKS["pascal5i"], 0, NAMES, table)
    shows = [name for name, row in zip(NAMES, table, strict=True) if row[1:6].any()]
    assert [episode.query for episode in by_image] == shows
    by_pair = draw_episodes(BENCHMARKS["pascal5i-hsnet"], 0, NAMES, table)
    pairs = [(NAMES[row], number) for row, number in np.argwhere(table[:, :6] > 0) if number > 0]
    cycled = [pairs[index % len(pairs)] for index in range(1000)]
    assert [(episode.query, episode.class_id) for episode in by_pair] == cycled


def test_small_objects_do_not_count_in_pascal5i() -> None:
    table = areas(21, area=2047)
    with pytest.raises(MaskMillError, match="no image shows") as caught:
        draw_episodes(BENCHMARKS["pascal5i"], 0, NAMES, table)
    assert caught.value.code == "dataset_invalid"
    table[:3, 4] = 2048
    episodes = draw_episodes(BENCHMARKS["pascal5i"], 0, NAMES, table)
    assert [(episode.query, episode.class_id) for episode in episodes] == [(name, 4) for name in NAMES[:3]]
    with pytest.raises(MaskMillError, match="class 4 is in 3 images only"):
        draw_episodes(BENCHMARKS["pascal5i"], 0, NAMES, table, shots=3)


@pytest.mark.parametrize(
    ("fold", "shots", "episodes"), [(4, 1, None), (-1, 1, None), (0, 0, None), (0, 1, 0)]
)
def test_wrong_episodes(fold: int, shots: int, episodes: int | None) -> None:
    with pytest.raises(MaskMillError) as caught:
        draw_episodes(BENCHMARKS["coco20i"], fold, NAMES, areas(81), shots=shots, episodes=episodes)
    assert caught.value.code == "wrong_use"


def test_toy_world() -> None:
    dataset = open_dataset("toyworld", split="seed-7", count=5, size=32)
    made = toyworld.generate(7, 5, 32)
    assert dataset.class_names == toyworld.CLASSES and dataset.ontology == "toyworld"
    again = pickle.loads(pickle.dumps(dataset.reader()))
    for index, sample in enumerate(dataset.samples):
        assert sample.image == "" and sample.truth is None
        np.testing.assert_array_equal(again.truth(sample), made.labels[index])
        np.testing.assert_array_equal(again.image(sample), made.images[index])
        image, truth = dataset.image_and_truth(sample)
        np.testing.assert_array_equal(image, made.images[index])
        np.testing.assert_array_equal(truth, made.labels[index])
    prints = {
        open_dataset("toyworld", split=split, count=count, size=size).fingerprint()
        for split, count, size in (("seed-7", 5, 32), ("seed-8", 5, 32), ("seed-7", 6, 32), ("seed-7", 5, 48))
    }
    assert len(prints) == 4
    assert dataset.fingerprint() in prints

    counted = class_areas(dataset)
    assert counted.shape == (5, len(toyworld.CLASSES)) and (counted.sum(1) == 32 * 32).all()
    np.testing.assert_array_equal(counted[2], np.bincount(made.labels[2].ravel(), minlength=counted.shape[1]))
