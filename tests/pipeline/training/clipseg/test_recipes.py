"""CLIPSeg recipes against the authors' experiment files, and how their settings select data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from models.clipseg.decoder import ClipSegDecoder
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.datasets.cocoobject import coco_object_ontology
from pipeline.datasets.oneshot import BENCHMARKS
from pipeline.datasets.toy import open_toyworld
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import CLASSES
from pipeline.training.clipseg.data import SourceSettings, open_source, seen_ids, unseen_names, unseen_phrases
from pipeline.training.clipseg.recipes import ABLATIONS, CLIPSEG_RECIPES
from pipeline.training.clipseg.sources.base import OBJECT
from pipeline.training.loop.optimisation import learning_rate
from tests.pipeline.training.samples.test_table import SEED, SIZE, make, teacher_of

PAPER = [name for name in CLIPSEG_RECIPES.recipes if name.startswith("clipseg-")]


@pytest.mark.parametrize("name", PAPER)
def test_optimisation_is_the_papers(name: str) -> None:
    recipe = CLIPSEG_RECIPES.load(name)
    loop = recipe.loop
    assert loop.iterations == {"clipseg-coco": 7000, "clipseg-phrasecut-plus-refined": 50_000}.get(
        name, 20_000
    )
    assert (loop.batch_size, loop.optimizer, loop.weight_decay, loop.precision) == (64, "adamw", 0.01, "fp16")
    assert (recipe.triplets.size, recipe.model.clip) == (352, "ViT-B-16-quickgelu:openai")
    assert recipe.model.decoder == ClipSegConfig(extract_layers=(3, 7, 9), refined=name.endswith("refined"))
    # torch's own schedule, stepped after each update.
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, loop.iterations, 1e-4)
    for step in range(1, 40):
        assert learning_rate(step, loop) == pytest.approx(schedule.get_last_lr()[0], rel=1e-3)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("name", "visual", "negatives", "prefix", "weight", "unseen"),
    [
        ("clipseg-phrasecut", False, 0.2, "plain", (0.0, 0.5), ()),
        ("clipseg-phrasecut-plus", True, 0.2, "shuffle+", (0.0, 0.5), ()),
        ("clipseg-phrasecut-plus-refined", True, 0.2, "shuffle+", (0.0, 0.5), ()),
        ("clipseg-pascal-0shot", True, 0.2, "shuffle+", (0.0, 0.5), ("pascal-unseen10",)),
        ("clipseg-pascal-1shot", True, 0.2, "shuffle+", (0.0, 0.5), ("pascal5i:0",)),
        ("clipseg-coco", True, 0.0, "shuffle+", (0.0, 1.0), ("coco20i:0",)),
    ],
)
def test_samples_are_the_papers(
    name: str,
    visual: bool,
    negatives: float,
    prefix: str,
    weight: tuple[float, float],
    unseen: tuple[str, ...],
) -> None:
    recipe = CLIPSEG_RECIPES.load(name)
    triplets = recipe.triplets
    assert (triplets.with_visual, triplets.q_neg, triplets.prefix) == (visual, negatives, prefix)
    assert triplets.text_weight == weight and recipe.source.unseen == unseen
    assert triplets.visual_prompt == "crop_blur_highlight352"


@pytest.mark.parametrize("name", CLIPSEG_RECIPES.recipes)
def test_recipes_round_trip(name: str) -> None:
    recipe = CLIPSEG_RECIPES.load(name)
    again = CLIPSEG_RECIPES.from_dict(recipe.to_dict())
    assert again == recipe and again.hash == recipe.hash


@pytest.mark.parametrize("row", ABLATIONS)
def test_ablations_change_what_they_name_and_nothing_else(row: str) -> None:
    base = CLIPSEG_RECIPES.load("clipseg-phrasecut-plus")
    changed = CLIPSEG_RECIPES.load("clipseg-phrasecut-plus", ABLATIONS[row])
    differing = {
        f"{group}.{name}"
        for group in ("model", "source", "triplets", "loop")
        for name, value in changed.to_dict()[group].items()
        if value != base.to_dict()[group][name]
    }
    assert (
        differing
        == {
            "no CLIP pre-training": {"model.clip", "loop.learning_rate"},
            "no negatives": {"triplets.q_neg"},
            "50 % negatives": {"triplets.q_neg"},
            "no visual": {"triplets.with_visual", "triplets.prefix"},
            "D = 16": {"model.decoder"},
            "D = 128": {"model.decoder"},
            "only layer 3": {"model.decoder"},
            "highlight mask": {"triplets.visual_prompt"},
            "CLIP-Deconv": {"model.kind"},
            "ViTSeg": {"model.kind", "loop.learning_rate"},
        }[row]
    )
    # The parameters that the spec counted in both reference implementations.
    counts = {"D = 16": 263_681, "D = 128": 2_238_465, "no negatives": 1_073_153}
    if row in counts:
        with torch.device("meta"):
            decoder = ClipSegDecoder(changed.model.decoder)
        assert sum(p.numel() for p in decoder.parameters()) == counts[row]


def test_a_baseline_has_no_start() -> None:
    with pytest.raises(MaskMillError) as error:
        CLIPSEG_RECIPES.load("finetune", ["kind=clip-deconv"])
    assert error.value.code == "setting_invalid"


# --- selection of data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", range(4))
@pytest.mark.parametrize("benchmark", ["pascal5i", "coco20i"])
def test_a_fold_trains_on_the_other_folds(benchmark: str, fold: int) -> None:
    classes = load_ontology("voc21") if benchmark == "pascal5i" else coco_object_ontology()
    found = seen_ids([f"{benchmark}:{fold}"], classes.names)
    others = [ids for number, ids in enumerate(BENCHMARKS[benchmark].folds) if number != fold]
    assert found == tuple(sorted(itertools.chain(*others)))


@pytest.mark.parametrize(
    ("unseen", "phrase", "dropped"),
    [
        (("pascal5i:0",), "white sparrows", True),  # in WordNet, a sparrow is a bird
        (("pascal5i:0",), "brown horse", False),
        (("pascal5i:2",), "brown horse", True),
        (("pascal-unseen10",), "black cat", True),
        (("pascal-unseen10",), "brown horse", False),
        (("coco20i:1", "affordances"), "bicycles", True),  # thing 1 of COCO, counted from 0
        (("affordances",), "legs of a chair", True),
        (("affordances",), "a chair", False),
        (("umbrella", "cow"), "red umbrellas", True),
        (("umbrella", "cow"), "grazing cattle", True),
        (("umbrella", "cow"), "red hat", False),
        ((), "anything", False),
    ],
)
def test_phrases_that_name_unseen_classes_match(unseen: tuple[str, ...], phrase: str, dropped: bool) -> None:
    assert unseen_phrases(unseen)(phrase) is dropped


def test_names_of_folds_and_splits() -> None:
    assert unseen_names(["pascal5i:0", "zebra", "bird"]) == (
        "airplane", "bicycle", "bird", "boat", "bottle", "zebra",
    )  # fmt: skip
    assert len(unseen_names(["pascal-unseen10"])) == 10


@pytest.mark.parametrize("unseen", ["pascal5i:4", "pascal5i:x", "nothing:0", "unicorn"])
def test_unknown_classes_are_named(unseen: str) -> None:
    with pytest.raises(MaskMillError) as error:
        open_source(SourceSettings(unseen=(unseen,)), dataset=open_toyworld(count=1))
    assert error.value.code == "ontology_invalid" and unseen in error.value.message


def test_unseen_toy_classes_are_never_asked() -> None:
    settings = SourceSettings(unseen=("sand", "zebra"))
    source = open_source(settings, dataset=open_toyworld(count=20, size=32))
    asked = {text for texts in source.pairs.phrases for text in texts}
    words = ("sand", "zebra", "striped")
    assert len(asked) > 20 and not {text for text in asked if any(word in text for word in words)}
    assert {"something spotted", "two things"} <= asked


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("toy"), 20)


def test_unseen_classes_are_learnt_from_labels_and_the_others_from_truth(table: str) -> None:
    settings = SourceSettings(unseen=("sand", "zebra"))
    truth = open_toyworld(split=f"seed-{SEED}", count=20, size=SIZE)
    source = open_source(settings, labels=table, dataset=truth)
    alone = open_source(settings, dataset=truth)
    assert source.pairs.phrases[: len(alone.pairs.phrases)] == alone.pairs.phrases
    guessed = [wordings[0] for wordings in source.pairs.phrases[len(alone.pairs.phrases) :]]
    assert sorted(guessed) == ["sand", "zebra"]
    for pair in range(len(source.pairs)):
        example = source.read(pair)
        image = int(source.pairs.image[pair])
        if pair < len(alone.pairs):
            assert example.weight is None and np.array_equal(example.mask, alone.read(pair).mask)
            continue
        name = guessed[int(source.pairs.phrase[pair]) - len(alone.pairs.phrases)]
        labels, _ = teacher_of(image - (source.pairs.seam or (0, 0))[0])
        assert np.array_equal(example.mask == OBJECT, labels == CLASSES.index(name))
        assert example.weight is not None and example.weight.max() < 1


def test_truth_with_labels_needs_unseen_classes(table: str) -> None:
    with pytest.raises(MaskMillError) as error:
        open_source(SourceSettings(), labels=table, dataset=open_toyworld(count=1))
    assert error.value.code == "wrong_use" and "--unseen" in error.value.remedy
