from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import MaskMillError
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES, MaskClipPlusRecipe

BOOK = MASKCLIP_PLUS_RECIPES


def _facts(recipe: MaskClipPlusRecipe) -> dict[str, Any]:
    return {
        "iterations": recipe.loop.iterations,
        "rate": recipe.loop.learning_rate,
        "decay": recipe.loop.weight_decay,
        "guided": recipe.selftrain.guided,
        "self": recipe.selftrain.self_train,
        "scale": recipe.augment.scale,
        "crop": recipe.augment.crop,
        "decoder": recipe.student.decoder,
        "background": recipe.student.learned_background,
    }


_FREE = {"self": (-1, -1), "guided": (1, -1), "decoder": "deeplabv2", "background": False}
_SGD = {"rate": 0.01, "decay": 5e-4}
_VOC = {"scale": (2048, 512), "crop": (512, 512)}
_CONTEXT = {"scale": (520, 520), "crop": (480, 480)}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        # The schedules of the reference (its configs).
        ("maskclip-plus-voc20", _FREE | _SGD | _VOC | {"iterations": 2000}),
        ("maskclip-plus-context59", _FREE | _SGD | _CONTEXT | {"iterations": 4000}),
        ("maskclip-plus-cocostuff171", _FREE | _SGD | _VOC | {"iterations": 8000}),
        (
            "maskclip-plus-voc20-zero-shot",
            _FREE | _SGD | _VOC | {"iterations": 20_000, "guided": (1, 1999), "self": (2000, -1)},
        ),
        (
            "maskclip-plus-context59-zero-shot",
            _CONTEXT
            | {"iterations": 40_000, "guided": (1, 3999), "self": (4000, -1), "rate": 0.004, "decay": 1e-4}
            | {"decoder": "deeplabv3plus", "background": True},
        ),
        (
            "maskclip-plus-cocostuff171-zero-shot",
            _FREE | _SGD | _VOC | {"iterations": 80_000, "guided": (1, 7999), "self": (8000, -1)},
        ),
    ],
)
def test_the_references_schedules(name: str, facts: dict[str, Any]) -> None:
    recipe = BOOK.recipes[name]
    assert _facts(recipe) == facts
    assert (recipe.loop.optimizer, recipe.loop.momentum, recipe.loop.power) == ("sgd", 0.9, 0.9)
    assert (recipe.loop.min_learning_rate, recipe.loop.warmup, recipe.loop.clip_norm) == (1e-4, 0, 0)
    assert (recipe.augment.ratio_range, recipe.augment.flip) == ((0.5, 2.0), 0.5)
    # Its bugs are settings, and off.
    assert not recipe.augment.guess_is_category and not recipe.selftrain.threshold_overwrites_seen
    assert recipe.selftrain.teacher == ("online" if recipe.unseen else "table")
    assert not recipe.void_from_truth and recipe.selftrain.ema_decay == 0


@pytest.mark.parametrize("name", BOOK.recipes)
def test_round_trip(name: str) -> None:
    recipe = BOOK.recipes[name]
    assert BOOK.from_dict(recipe.to_dict()) == recipe
    assert BOOK.load(name) == recipe


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("toy", ["iterations=100", "guided=[1, 120]", "self_train=[121, -1]"], "go beyond"),
        ("toy", ["iterations=0"], "iterations"),
        ("toy", ["iterations=many"], "iterations"),
        ("toy", ["guided=soon"], "guided"),
        ("toy", ["unseen=[sand]"], "form is annotation-free"),
        ("toy-zero-shot", ["unseen=[]"], "form is zero-shot"),
        ("toy-zero-shot", ["void_from_truth=true"], "void"),
        ("toy", ["form=supervised"], "guesses nothing"),
        ("toy", ["guided=[2, 1000]"], "begin with step 1"),
        ("toy", ["ema_decay=0"], "keep_average"),
        ("toy", ["learned_background=true"], "no words"),
        ("toy", ["loss_over=valid", "accumulation=2"], "unevenly"),
        ("toy", ["student.decoder=unet"], "deeplabv2"),
        ("toy", ["loop.batch_size=0"], "batch_size"),
    ],
)
def test_contradictory_settings_are_refused(name: str, settings: list[str], says: str) -> None:
    with pytest.raises(MaskMillError, match=says):
        BOOK.load(name, settings)


def test_the_bug_in_the_references_vit_configs_can_be_reproduced() -> None:
    assert BOOK.load("maskclip-plus-voc20", ["backbone=resnet50c"]).student.backbone == "resnet50c"


@pytest.mark.parametrize(
    ("settings", "iterations", "guided", "self_train", "warmup", "log_every", "checkpoint_every"),
    [
        ([], 1400, (1, 1000), (1001, -1), 20, 20, 200),
        (["iterations=20"], 20, (1, 14), (15, -1), 1, 1, 3),
        (["iterations=2"], 2, (1, 1), (2, -1), 1, 1, 1),
        (["iterations=1"], 1, (1, 1), (-1, -1), 1, 1, 1),
        # Longer: phases and warm-up grow, intervals stay.
        (["iterations=14000"], 14_000, (1, 10_000), (10_001, -1), 200, 20, 200),
        # What is named stays, whatever the order; what follows a named phase begins after it.
        (["warmup=7", "log_every=5", "iterations=20"], 20, (1, 14), (15, -1), 7, 5, 3),
        (["iterations=20", "guided=[1, 12]"], 20, (1, 12), (13, -1), 1, 1, 3),
        (["iterations=20", "guided=[1, 20]"], 20, (1, 20), (-1, -1), 1, 1, 3),
        (["iterations=20", "guided=[1, 12]", "self_train=[13, 16]"], 20, (1, 12), (13, 16), 1, 1, 3),
        (["guided=[1, 600]"], 1400, (1, 600), (601, -1), 20, 20, 200),
        (["guided=[1, -1]"], 1400, (1, -1), (-1, -1), 20, 20, 200),
    ],
)
def test_what_counts_steps_follows_the_iterations(
    settings: list[str],
    iterations: int,
    guided: tuple[int, int],
    self_train: tuple[int, int],
    warmup: int,
    log_every: int,
    checkpoint_every: int,
) -> None:
    recipe = BOOK.load("toy", settings)
    assert (recipe.loop.iterations, recipe.loop.warmup) == (iterations, warmup)
    assert (recipe.selftrain.guided, recipe.selftrain.self_train) == (guided, self_train)
    assert (recipe.loop.log_every, recipe.loop.checkpoint_every) == (log_every, checkpoint_every)


@pytest.mark.parametrize("name", BOOK.recipes)
@pytest.mark.parametrize("iterations", [1, 2, 3, 20, 100_000])
def test_every_recipe_takes_any_number_of_iterations(name: str, iterations: int) -> None:
    recipe = BOOK.load(name, [f"iterations={iterations}"])
    assert recipe.loop.iterations == iterations
    assert recipe.selftrain.phase(1) == BOOK.recipes[name].selftrain.phase(1)


def test_a_file_that_changes_the_iterations_changes_the_phases(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("base: toy\nloop: {iterations: 140}\n")
    assert BOOK.load(str(path)).selftrain.self_train == (101, -1)
    # The file's own phases are what later changes scale.
    path.write_text("base: toy\niterations: 140\nguided: [1, 70]\n")
    assert BOOK.load(str(path)).selftrain.self_train == (71, -1)
    assert BOOK.load(str(path), ["iterations=14"]).selftrain.guided == (1, 7)
