"""Corruptions against the statistics that their parameters promise, and against independent filters."""

from __future__ import annotations

import io
from itertools import pairwise

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from models.errors import MaskMillError
from pipeline.files.corruptions import CORRUPTIONS, LEVELS, corrupt, parse
from pipeline.toyworld import scenes as toyworld

NOISES = [name for name in CORRUPTIONS if name.endswith("noise")]
EVERY = [(name, level) for name in CORRUPTIONS for level in LEVELS]
QUALITIES = (25, 18, 15, 10, 7)


def scenes(count: int, side: int = 96) -> list[np.ndarray]:
    return list(toyworld.generate(3, count, side)[0])


def grey(value: int, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def mean_distance(images: list[np.ndarray], name: str, level: int) -> float:
    """Root mean square difference to the clean image in grey levels, averaged over images."""
    return float(
        np.mean(
            [
                np.sqrt(np.mean((corrupt(image, name, level, seed=seed).astype(float) - image) ** 2))
                for seed, image in enumerate(images)
            ]
        )
    )


def test_the_eight_of_the_paper() -> None:
    assert CORRUPTIONS == (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "speckle_noise",
        "gaussian_blur",
        "defocus_blur",
        "spatter",
        "jpeg_compression",
    )


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_level_is_worse_than_the_one_below(name: str) -> None:
    images = scenes(12)
    distances = [mean_distance(images, name, level) for level in LEVELS]
    assert distances[0] > 2
    assert all(worse > 1.02 * better for better, worse in pairwise(distances)), distances


# --- what every corruption keeps ---


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 40), (40, 1), (3, 3), (13, 21)])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_any_size(shape: tuple[int, int], channels: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for name, level in EVERY:
        out = corrupt(image, name, level, seed=1, channels=channels)  # type: ignore[arg-type]
        assert out.shape == image.shape and out.dtype == np.uint8 and out.flags.c_contiguous, (name, level)


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_same_seed_same_image_and_the_input_stays(name: str, level: int) -> None:
    image = scenes(1)[0]
    image.flags.writeable = False
    before = image.copy()
    one = corrupt(image, name, level, seed=2**63 + 5)
    assert np.array_equal(one, corrupt(image, name, level, seed=2**63 + 5))
    assert np.array_equal(image, before) and not np.shares_memory(one, image) and one.flags.writeable
    random = name in NOISES or name == "spatter"
    assert np.array_equal(one, corrupt(image, name, level, seed=6)) != random


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [0, 1, 127, 200, 254, 255])
def test_blur_leaves_an_even_image_as_it_is(name: str, level: int, value: int) -> None:
    assert np.array_equal(corrupt(grey(value, 40), name, level, seed=0), grey(value, 40))


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "jpeg_compression"])
def test_grey_images_stay_grey(name: str) -> None:
    image = np.repeat(scenes(1)[0][..., :1], 3, axis=2)
    for level in LEVELS:
        out = corrupt(image, name, level, seed=0)
        assert (out == out[..., :1]).all()


def test_non_contiguous_images() -> None:
    image = scenes(1)[0][::2, ::-1]
    for name in CORRUPTIONS:
        assert np.array_equal(corrupt(image, name, 2, seed=0), corrupt(image.copy(), name, 2, seed=0))


@pytest.mark.parametrize(("name", "level"), EVERY)
def test_bgr_exchanges_red_and_blue_for_the_corruption_only(name: str, level: int) -> None:
    image = scenes(1)[0]
    exchanged = corrupt(np.ascontiguousarray(image[..., ::-1]), name, level, seed=4)[..., ::-1]
    assert np.array_equal(corrupt(image, name, level, seed=4, channels="bgr"), exchanged)


# --- noise ---


@pytest.mark.parametrize(("level", "sigma"), list(zip(LEVELS, (0.08, 0.12, 0.18, 0.26, 0.38), strict=True)))
def test_gaussian_noise_has_its_sigma(level: int, sigma: float) -> None:
    out = corrupt(grey(128), "gaussian_noise", level, seed=1) / 255
    # The normal distribution clipped at both ends of the range; compared by its quantiles within them.
    low, median, high = np.quantile(out, [0.16, 0.5, 0.84])
    assert median == pytest.approx(128 / 255, abs=0.005)
    assert (high - low) / 2 == pytest.approx(0.9945 * sigma, rel=0.02)
    assert np.corrcoef(out[..., 0].ravel(), out[..., 1].ravel())[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("level", "sigma"), list(zip(LEVELS, (0.15, 0.2, 0.35, 0.45, 0.6), strict=True)))
@pytest.mark.parametrize("value", [30, 80])
def test_speckle_noise_grows_with_the_value(level: int, sigma: float, value: int) -> None:
    out = corrupt(grey(value), "speckle_noise", level, seed=2)
    low, high = np.quantile(out, [0.16, 0.84])
    assert (high - low) / 2 == pytest.approx(0.9945 * sigma * value, rel=0.02, abs=0.6)
    assert not corrupt(grey(0, 8), "speckle_noise", level, seed=2).any()


@pytest.mark.parametrize(("level", "photons"), list(zip(LEVELS, (60, 25, 12, 5, 3), strict=True)))
def test_shot_noise_is_poisson(level: int, photons: int) -> None:
    value = 60
    counts = corrupt(grey(value), "shot_noise", level, seed=3) / 255 * photons
    whole = np.rint(counts)
    assert np.abs(counts - whole).max() < photons / 255 + 1e-6
    law = stats.poisson(value / 255 * photons)
    for count in range(photons):  # the variance with it; what is above white is clipped to white
        assert (whole == count).mean() == pytest.approx(law.pmf(count), abs=0.003)
    assert (whole == photons).mean() == pytest.approx(law.sf(photons - 1), abs=0.003)
    if photons > 5:  # hardly anything is clipped
        assert whole.var() == pytest.approx(law.var(), rel=0.03)
    assert not corrupt(grey(0, 8), "shot_noise", level, seed=3).any()


@pytest.mark.parametrize(("level", "amount"), list(zip(LEVELS, (0.03, 0.06, 0.09, 0.17, 0.27), strict=True)))
def test_impulse_noise_has_its_shares(level: int, amount: float) -> None:
    out = corrupt(grey(100), "impulse_noise", level, seed=4)
    assert set(np.unique(out)) == {0, 100, 255}
    assert (out == 0).mean() == pytest.approx(amount / 2, rel=0.05)
    assert (out == 255).mean() == pytest.approx(amount / 2, rel=0.05)
    # Values fall, not pixels: all three of a pixel rarely together.
    assert (out != 100).all(axis=2).mean() == pytest.approx(amount**3, rel=0.5, abs=1e-4)


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "speckle_noise"])
def test_levels_share_the_pattern_of_a_seed(name: str) -> None:
    image = grey(128, 64)
    mild, strong = (corrupt(image, name, level, seed=5).astype(int) - 128 for level in (1, 5))
    assert (np.abs(strong) >= np.abs(mild) - 1).all()
    moved = np.abs(mild) > 1
    assert (np.sign(strong) == np.sign(mild))[moved].all()


# --- blur ---


@pytest.mark.parametrize(("level", "sigma"), list(zip(LEVELS, (1, 2, 3, 4, 6), strict=True)))
def test_gaussian_blur_is_scipys(level: int, sigma: float) -> None:
    image = scenes(1)[0]
    expected = ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest", truncate=4) * 255
    out = corrupt(image, "gaussian_blur", level, seed=0)
    assert np.abs(out - (expected - 0.5)).max() < 0.51  # truncated: between one level less and the value


def disk(radius: int, alias_sigma: float) -> np.ndarray:
    """A filled circle, softened by a normalised Gaussian of 3 (of 5 beyond radius 8) taps a side, sum 1."""
    reach, taps = (8, 3) if radius <= 8 else (radius, 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    gauss = stats.norm.pdf(np.arange(taps) - taps // 2, scale=alias_sigma)
    soft = (x**2 + y**2 <= radius**2).astype(float)
    for axis in (0, 1):
        soft = ndimage.correlate1d(soft, gauss / gauss.sum(), axis, mode="mirror")
    return soft / soft.sum()


@pytest.mark.parametrize("level", LEVELS)
def test_defocus_spreads_each_point_over_a_soft_disk(level: int) -> None:
    kernel = disk(*((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[level - 1])
    image = grey(0, 41)
    image[20, 20] = (255, 0, 128)
    out = corrupt(image, "defocus_blur", level, seed=0)
    spread = np.pad(kernel, 20 - len(kernel) // 2) * 255
    assert np.abs(out[..., 0] - (spread - 0.5)).max() < 0.51  # truncated
    assert not out[..., 1].any() and (out[..., 2] <= out[..., 0]).all()
    photo = scenes(1)[0]
    wanted = ndimage.correlate(photo.astype(float), kernel[..., None], mode="mirror")
    assert np.abs(corrupt(photo, "defocus_blur", level, seed=0) - (wanted - 0.5)).max() < 0.51


# --- spatter ---


def test_spatter_is_water_then_mud() -> None:
    image = grey(100)
    for level in (1, 2, 3):
        out = corrupt(image, "spatter", level, seed=6).astype(int)
        wet = (out != 100).any(axis=2)
        assert 0.01 < wet.mean() < 0.6
        assert (out >= 99).all()  # water only adds light: (175, 238, 238) times its opacity
        added = out[wet].sum(axis=0) - 100 * wet.sum()
        assert added[0] / added[1] == pytest.approx(175 / 238, abs=0.05)
        assert added[1] == added[2]
    for level in (4, 5):
        out = corrupt(image, "spatter", level, seed=6).astype(int)
        muddy = (out != 100).any(axis=2)
        # An opacity below 0.8 is none, so a pixel is clean or nearly (63, 42, 20).
        assert (np.abs(out[muddy] - (63, 42, 20)) <= 0.2 * np.abs(np.array((63, 42, 20)) - 100) + 1).all()
        assert (np.abs(out[muddy].min(axis=0) - (63, 42, 20)) <= 1).all()
    brown, blue = (corrupt(image, "spatter", 5, seed=6, channels=order) for order in ("rgb", "bgr"))  # type: ignore[arg-type]
    assert brown[..., 0].mean() > brown[..., 2].mean() and blue[..., 0].mean() < blue[..., 2].mean()


# --- JPEG ---


@pytest.mark.parametrize(("level", "quality"), list(zip(LEVELS, QUALITIES, strict=True)))
def test_jpeg_is_pillows(level: int, quality: int) -> None:
    image = scenes(1)[0]
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    assert np.array_equal(corrupt(image, "jpeg_compression", level, seed=0), np.asarray(Image.open(file)))
    # And close to another JPEG library at that quality.
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    other = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    out = corrupt(image, "jpeg_compression", level, seed=0)
    assert np.abs(out.astype(int) - other).mean() < 0.25 * np.abs(out.astype(int) - image).mean()


@pytest.mark.parametrize("turn", [False, True])
def test_jpeg_takes_images_longer_than_jpegs_can_be(turn: bool) -> None:
    long = np.resize(scenes(1)[0], (70_000, 8, 3))
    long = long.transpose(1, 0, 2) if turn else long
    out = corrupt(long, "jpeg_compression", 1, seed=0)
    # The longest side of whole blocks that JPEG, with its limit of 65,500 pixels, can have.
    start = corrupt(long[:65_488, :65_488], "jpeg_compression", 1, seed=0)
    assert out.shape == long.shape
    assert np.array_equal(out[: start.shape[0], : start.shape[1]], start)


# --- mistakes ---


def test_parse_reads_what_it_says() -> None:
    assert [parse(f"{name}:{level}") for name, level in EVERY] == EVERY


@pytest.mark.parametrize(
    "text",
    ["", "spatter", "spatter:", "spatter:0", "spatter:6", "spatter:-1", "spatter:1.0", "spatter:01",
     "spatter: 1", "spatter:1\n", "spatter:²", "spatter:1:2", "Spatter:1", "snow:3", ":3", "3"],
)  # fmt: skip
def test_parse_refuses_the_rest(text: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        parse(text)
    assert caught.value.code == "setting_invalid"
    assert "jpeg_compression" in caught.value.remedy and "1 to 5" in caught.value.remedy


@pytest.mark.parametrize(("name", "level"), [("snow", 1), ("spatter", 0), ("spatter", 6), ("", 1)])
def test_corrupt_refuses_unknown_names_and_levels(name: str, level: int) -> None:
    with pytest.raises(MaskMillError, match=f"{name}:{level}"):
        corrupt(grey(0, 4), name, level, seed=0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["two axes", "four channels", "float", "empty"],
)
def test_corrupt_refuses_other_arrays(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected a uint8"):
        corrupt(image, "spatter", 1, seed=0)
    with pytest.raises(ValueError, match="unknown channels"):
        corrupt(grey(0, 4), "spatter", 1, seed=0, channels="gbr")  # type: ignore[arg-type]
