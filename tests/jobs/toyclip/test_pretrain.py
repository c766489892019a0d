"""Training the bundled CLIP: a few small steps end to end, and where it may write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.toyclip.pretrain import (
    Arguments,
    PretrainRecipe,
    corpus,
    destination,
    main,
    model_config,
    new_model,
    pretrain,
    train,
)
from models.clip import toy as toyclip
from models.clip.loading import load_source
from models.clip.text import build_text_classifier
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.errors import MaskMillError
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.toyworld import scenes as toyworld

TINY = PretrainRecipe(
    scenes=64,
    size=32,
    steps=(8, 4),
    batch=(16, 8),
    warmup=(2, 1),
    learning_rate=(2e-3, 1e-3),
    patch_dropout=(0.5, 0.25),
    token_swap=(0.0, 0.5),
    width=32,
    layers=2,
    head_width=16,
    embed_dim=32,
    text_width=32,
    text_layers=1,
    card_scenes=6,
)
CPU = torch.device("cpu")


def test_a_few_steps_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = pretrain(TINY, tmp_path, device=CPU, workers=1)
    assert "phase 2/2  step 4/4" in capsys.readouterr().out
    assert scores is not None
    assert set(scores.iou) >= {"maskclip", "plain"}
    assert list(scores.iou["maskclip"]) == [32, 64, 96, 128, 192]
    assert len(scores.auc) == 14
    card = (tmp_path / "MODEL_CARD.md").read_text()
    for words in (
        "A toy.",
        "Apache License 2.0",
        "| learning rate | (0.002, 0.001) |",
        "| ladybug |",
        "something striped",
        "| seed | 0 |",
    ):
        assert words in card

    config = json.loads((tmp_path / "toyclip.json").read_text())
    weights = tmp_path / "toyclip.safetensors"
    source = WeightSource(toyclip.MODEL_NAME, str(weights), config, weights, None, OPENAI_MEAN, OPENAI_STD)
    clip = load_source(source)
    # The vocabulary is the bundled one, so the bundled tokenizer fits the new weights.
    assert (tmp_path / "toyclip_bpe.txt.gz").read_bytes() == toyclip.vocabulary_path().read_bytes()
    text = build_text_classifier(clip, [[name] for name in toyworld.CLASSES], templates="toyworld")
    labeller = MaskClip(clip, text, MaskClipSettings(image_stats="clip", profile="weights"))
    grid = labeller.grid_scores(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))
    assert grid.shape == (1, 14, 4, 6)
    assert bool(torch.isfinite(grid).all())


@pytest.mark.slow
def test_training_learns_and_repeats() -> None:
    """The loss falls below that of guessing, and the same settings give the same weights."""
    recipe = replace(
        TINY,
        steps=(40,),
        batch=(16,),
        learning_rate=(2e-3,),
        warmup=(2,),
        patch_dropout=(0.25,),
        token_swap=(0.0,),
    )
    images, captions = corpus(recipe, workers=1)
    tokenizer = toyclip.tokenizer()
    tokens = tokenizer(captions)
    config = model_config(recipe, tokenizer.vocab_size)

    def trained() -> tuple[list[float], dict[str, torch.Tensor]]:
        model = new_model(recipe, config)
        return train(model, images, tokens, recipe, phase=0, device=CPU), model.state_dict()

    losses, state = trained()
    again, same = trained()
    assert losses == again
    assert all(torch.equal(state[name], same[name]) for name in state)
    # Six seeds, 1 and 2 threads: 0.38 to 0.52 of the loss of guessing.
    assert np.mean(losses[-5:]) < 0.85 * np.log(recipe.batch[0])


@pytest.mark.slow
def test_the_corpus_does_not_depend_on_the_number_of_workers() -> None:
    recipe = replace(TINY, scenes=270)
    images, captions = corpus(recipe, workers=1)
    shared, words = corpus(recipe, workers=2)
    made = toyworld.generate(recipe.seed, 270, recipe.size)
    np.testing.assert_array_equal(images.numpy(), made.images.transpose(0, 3, 1, 2))
    assert torch.equal(images, shared)
    assert captions == words == made.captions


@pytest.mark.parametrize("rest", [[], ["--output", str(toyclip.weights_path().parent)]])
def test_the_bundled_weights_are_not_overwritten_by_accident(
    rest: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = toyclip.weights_path().stat().st_mtime_ns
    assert main(rest) == 2
    assert "--bundled" in capsys.readouterr().err
    assert toyclip.weights_path().stat().st_mtime_ns == before


def test_earlier_weights_are_kept_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "toyclip.safetensors").write_bytes(b"kept")
    with pytest.raises(MaskMillError, match="already") as caught:
        destination(Arguments(output=tmp_path))
    assert caught.value.code == "output_exists"
    assert destination(Arguments(output=tmp_path, overwrite=True)) == tmp_path
    assert destination(Arguments(bundled=True)) == toyclip.weights_path().parent


def test_every_setting_has_one_value_per_phase() -> None:
    with pytest.raises(
        MaskMillError,
        match="steps, batch, learning_rate, warmup, patch_dropout, token_swap have 4, 3",
    ):
        PretrainRecipe(steps=(3, 3, 3, 3))
