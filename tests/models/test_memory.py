from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.clip.loading import load_clip
from models.clip.text import build_text_classifier
from models.errors import MaskMillError
from models.maskclip import MaskClip
from models.memory import Memory, centred, exact_search
from models.regions import components, means
from models.settings import MaskClipSettings
from pipeline.toyworld.scenes import CLASSES, generate


def made(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = 3 + torch.randn(count, 16, generator=generator)
    return keys, F.normalize(torch.randn(count, 8, generator=generator), dim=1)


def test_support_is_the_mean_of_the_nearest_values() -> None:
    keys, values = made()
    mean = keys.mean(0)
    memory = Memory(values, mean, exact_search(centred(keys, mean)), "labels", 0)
    queries = keys[:5] + 0.1
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    all_keys, asked = unit((keys - mean).numpy()), unit((queries - mean).numpy())
    nearest = np.argsort(-(asked @ all_keys.T), axis=1)[:, :7]
    expected = unit(values.numpy()[nearest].mean(1))
    np.testing.assert_allclose(memory.support(queries, 7).numpy(), expected, atol=1e-5)
    assert memory.support(queries, 5000).shape == (5, 8), "no more neighbours than there are regions"


SETTINGS = {"head": "value", "image_stats": "clip", "profile": "weights"}


def test_a_memory_of_the_image_itself_gives_region_means() -> None:
    """With its own regions and one neighbour each, support is the score of a region's mean feature."""
    clip = load_clip("toyclip", "bundled")
    text = build_text_classifier(clip, [[name] for name in CLASSES], templates=("a photo of {}",))
    image = torch.from_numpy(generate(5, 1, 128).images[0]).permute(2, 0, 1)[None]
    alone = MaskClip(clip, text, MaskClipSettings(**SETTINGS), key_block=0)
    seen = alone.describe(image)
    plain = alone.grid_scores(image)
    assert torch.equal(plain, seen.scores)
    regions = components(plain[0].argmax(0).numpy())
    keys = means(seen.keys[0], regions)
    values = F.normalize(means(seen.features[0], regions), dim=1)
    memory = Memory(values, keys.mean(0), exact_search(centred(keys, keys.mean(0))), "labels", 0)
    settings = MaskClipSettings(**SETTINGS, memory="here", memory_neighbours=1, memory_share=0.25)
    mixed = MaskClip(clip, text, settings, memory=memory).grid_scores(image)[0]
    of_regions = (values @ text.embeddings.T)[torch.from_numpy(regions)].permute(2, 0, 1)
    torch.testing.assert_close(mixed, 0.75 * plain[0] + 0.25 * of_regions, atol=1e-5, rtol=0)
    share = MaskClipSettings(**SETTINGS, memory="here", memory_share=0.0)
    assert torch.equal(MaskClip(clip, text, share, memory=memory).grid_scores(image), plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": "m", "window": 64, "window_stride": 32},
        {"memory": "m", "ks_threshold": 1.0},
        {"memory_share": 0.3},
        {"memory_neighbours": 3},
    ],
)
def test_settings_that_do_not_go_with_a_memory(wrong: dict[str, object]) -> None:
    with pytest.raises(MaskMillError) as caught:
        MaskClipSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == "setting_invalid"


@pytest.mark.parametrize("block", [-1, 2, 9])
def test_keys_come_from_a_block_before_the_last(block: int) -> None:
    clip = load_clip("toyclip", "bundled", towers="visual")
    text = build_text_classifier(load_clip("toyclip", "bundled"), [["grass"]], templates=("{}",))
    with pytest.raises(MaskMillError, match="block"):
        MaskClip(clip, text, MaskClipSettings(**SETTINGS), key_block=block)
