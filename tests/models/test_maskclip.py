"""MaskCLIP against a plain re-derivation from the paper's method and the reference's documented behaviour.

The re-derivation works on the tensors of the state dict alone, in fp64, and shares no code with ``models``.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip.dense import Dense, dense_encoder
from models.clip.loading import Clip, load_clip
from models.clip.text import TextClassifier, build_text_classifier
from models.denoising import DENIED, key_smoothing, prompt_denoising
from models.errors import MaskMillError
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.maskclip import MaskClipLabeller
from pipeline.toyworld.scenes import generate

MEAN = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)
STD = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64)
SIZES = [(320, 480), (333, 500)]
CLASSES = 20
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "voc2012_subset" / "JPEGImages"
PHOTOGRAPHS = sorted(DATA.glob("*.jpg"))[:6]


# --- the re-derivation ----------------------------------------------------------------------------------


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75."""
    t = abs(t)
    if t < 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def bicubic(source: int, target: int) -> Tensor:
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), source - 1)] += cubic(centre - tap)
    return matrix


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def reference_vit(
    state: dict[str, Tensor], images: Tensor, *, patch: int, heads: int, reference: bool, plain: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (B, D, h, w) and both kinds of keys, from normalised images."""
    eps, act = (1e-6, erf_gelu) if reference else (1e-5, quick_gelu)
    batch, _, height, width = images.shape
    h, w = -(-height // patch), -(-width // patch)
    padded = torch.zeros(batch, 3, h * patch, w * patch, dtype=torch.float64)
    padded[:, :, :height, :width] = images
    cells = padded.reshape(batch, 3, h, patch, w, patch)
    x = torch.einsum("bchpwq,dcpq->bhwd", cells, state["conv1.weight"]).reshape(batch, h * w, -1)
    table = state["positional_embedding"]
    native = math.isqrt(len(table) - 1)
    grid = table[1:].reshape(native, native, -1)
    grid = torch.einsum("hi,wj,ijd->hwd", bicubic(native, h), bicubic(native, w), grid).reshape(h * w, -1)
    first = (state["class_embedding"] + table[0]).expand(batch, 1, -1)
    x = layer_norm(torch.cat([first, x + grid], 1), state, "ln_pre", 1e-6 if reference else 1e-5)
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks."))
    keys: dict[str, Tensor] = {}
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        weight = {part: state[f"{name}.{part}"] for part in (
            "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias",
            "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")}  # fmt: skip
        y = layer_norm(x, state, f"{name}.ln_1", eps)
        q, k, v = (y @ weight["attn.in_proj_weight"].T + weight["attn.in_proj_bias"]).chunk(3, -1)
        if layer == layers - 1 and not plain:
            mixed = v
            keys["raw"] = k[:, 1:]
            keys["projected"] = (k @ weight["attn.out_proj.weight"].T + weight["attn.out_proj.bias"])[:, 1:]
        else:
            q, k, v = (t.reshape(batch, -1, heads, t.shape[-1] // heads).transpose(1, 2) for t in (q, k, v))
            attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            mixed = (attention @ v).transpose(1, 2).reshape(x.shape)
        x = x + mixed @ weight["attn.out_proj.weight"].T + weight["attn.out_proj.bias"]
        y = layer_norm(x, state, f"{name}.ln_2", eps)
        hidden = act(y @ weight["mlp.c_fc.weight"].T + weight["mlp.c_fc.bias"])
        x = x + hidden @ weight["mlp.c_proj.weight"].T + weight["mlp.c_proj.bias"]
    x = layer_norm(x, state, "ln_post", eps)[:, 1:] @ state["proj"]
    return x.reshape(batch, h, w, -1).permute(0, 3, 1, 2), keys


def reference_resnet(
    state: dict[str, Tensor], images: Tensor, *, heads: int, plain: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = (
            state[f"{bn}.{p}"][:, None, None] for p in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"attnpool.{name}.weight"].T + state[f"attnpool.{name}.bias"]

    x = images
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        x = conv_bn(x, f"conv{i}", f"bn{i}", stride, 1).clamp(min=0)
    x = F.avg_pool2d(x, 2)
    for stage in range(1, 5):
        count = len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})
        for block in range(count):
            name = f"layer{stage}.{block}"
            pooled = stage > 1 and block == 0
            y = conv_bn(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2", padding=1).clamp(min=0)
            y = conv_bn(F.avg_pool2d(y, 2) if pooled else y, f"{name}.conv3", f"{name}.bn3")
            if block == 0:
                x = F.avg_pool2d(x, 2) if pooled else x
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1")
            x = (x + y).clamp(min=0)
    h, w = x.shape[-2:]
    tokens = x.flatten(2).transpose(1, 2)
    if plain:
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        q, k, v = (linear(tokens, f"{n}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        out = linear((attention @ v).transpose(1, 2).flatten(2), "c_proj")[:, 1:]
        return out.transpose(1, 2).unflatten(2, (h, w)), {}
    keys = linear(tokens, "k_proj")
    out = linear(linear(tokens, "v_proj"), "c_proj")
    return out.transpose(1, 2).unflatten(2, (h, w)), {"projected": keys, "raw": keys}


def reference_scores(
    features: Tensor, keys: Tensor | None, text: Tensor, *, ks: float = 0, axis: str = "token", pd: float = 0
) -> Tensor:
    """Cosines, PD, KS by loops over images, classes and positions."""
    batch, _, h, w = features.shape
    result = []
    for n in range(batch):
        f = features[n].flatten(1)
        s = text @ (f / f.square().sum(0).sqrt())
        if pd > 0:
            probability = (100 * s).softmax(0)
            for c in range(len(s)):
                if probability[c].max() < pd:
                    s[c] = -100.0
        if ks > 0:
            assert keys is not None
            k = keys[n]
            k = k / k.square().sum(0 if axis == "token" else 1, keepdim=True).sqrt()
            votes = k @ k.T
            p = (100 * s).softmax(0).T
            smoothed = votes @ p
            s = torch.stack([smoothed[i] if p[i].max() < ks else p[i] for i in range(len(p))]).T
        result.append(s.reshape(-1, h, w))
    return torch.stack(result)


# --- parity ---------------------------------------------------------------------------------------------


def unit_rows(count: int, width: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    # Text rows are fp32 by contract; the reference gets the very same numbers.
    return F.normalize(rows, dim=-1).float().double()


def photographs(height: int, width: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    coarse = torch.randint(0, 256, (batch, 3, 9, 13), generator=generator).float()
    fine = torch.randint(-20, 21, (batch, 3, height, width), generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + fine).clamp(0, 255).to(torch.uint8)


def classifier(rows: Tensor) -> TextClassifier:
    return TextClassifier(rows.float(), torch.arange(len(rows)), len(rows))


def visual_state(clip: Clip) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in clip.visual.state_dict().items()}


@pytest.fixture(scope="module")
def vit() -> Clip:
    return load_clip("ViT-B-16-quickgelu", "random:3", dtype=torch.float64, towers="visual")


@pytest.fixture(scope="module")
def resnet() -> Clip:
    return load_clip("RN50-quickgelu", "random:3", dtype=torch.float64, towers="visual")


Case = tuple[Clip, str, Tensor, Dense, Tensor, Tensor]


@pytest.fixture(
    scope="module",
    params=[
        ("vit", "reference", SIZES[0]),
        ("vit", "weights", SIZES[1]),
        pytest.param(("vit", "reference", SIZES[1]), marks=pytest.mark.long),
        pytest.param(("vit", "weights", SIZES[0]), marks=pytest.mark.long),
        pytest.param(("resnet", "weights", SIZES[0]), marks=pytest.mark.long),
        ("resnet", "weights", SIZES[1]),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}-{p[2][0]}x{p[2][1]}",
)
def case(request: pytest.FixtureRequest) -> Case:
    """One forward of each implementation per model, profile and size; the KS and PD settings share it."""
    model, profile, size = request.param
    clip: Clip = request.getfixturevalue(model)
    images = photographs(*size, batch=1)  # of a whole CLIP; the small one gets two
    normalised = (images.double() - MEAN[:, None, None]) / STD[:, None, None]
    state = visual_state(clip)
    if model == "vit":
        features, keys = reference_vit(
            state, normalised, patch=16, heads=12, reference=profile == "reference"
        )
        assert features.shape[-2:] == (-(-size[0] // 16), -(-size[1] // 16))
    else:
        features, keys = reference_resnet(state, normalised, heads=32)
    with torch.inference_mode():
        dense = dense_encoder(clip.visual, profile=profile, keys="projected")(normalised)
    for name, tensor in clip.visual.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} was written to"
    return clip, profile, images, dense, features, keys["projected"]


@pytest.mark.slow
@pytest.mark.parametrize("pd", [0.0, 0.5])
@pytest.mark.parametrize(
    ("ks", "axis"), [(0.0, "token"), (1.0, "token"), (1.0, "channel"), (0.6, "token"), (0.6, "channel")]
)
def test_parity_with_the_rederivation(case: Case, ks: float, axis: str, pd: float) -> None:
    clip, profile, _, dense, features, keys = case
    rows = unit_rows(CLASSES, clip.embed_dim)
    config = MaskClipSettings(profile=profile, ks_threshold=ks, ks_axis=axis, pd_threshold=pd)
    scores = MaskClip(clip, classifier(rows), config).scores(dense)
    expected = reference_scores(features, keys, rows, ks=ks, axis=axis, pd=pd)
    assert scores.shape == expected.shape
    assert torch.equal(scores == DENIED, expected == -100)
    if pd and not ks:
        assert (scores == DENIED).any(), "the setting must do something for the test to mean anything"
    scale = expected.abs().amax() if ks else torch.tensor(1.0)
    assert (scores - expected).abs().amax() / scale < 1e-10


def test_whole_path_of_resnet(resnet: Clip) -> None:
    """uint8 in, scores out: the image statistics and the floor of the pools."""
    images = photographs(97, 130)
    rows = unit_rows(5, resnet.embed_dim)
    features, _ = reference_resnet(
        visual_state(resnet), (images.double() - MEAN[:, None, None]) / STD[:, None, None], heads=32
    )
    scores = MaskClip(resnet, classifier(rows)).grid_scores(images)
    assert scores.shape == (2, 5, 3, 4)
    assert (scores - reference_scores(features, None, rows)).abs().max() < 1e-10


# --- a small ViT: what is too slow on the large one -----------------------------------------------------

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def small_clip(dtype: torch.dtype = torch.float64) -> Clip:
    from models.clip.loading import load_source
    from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource

    source = WeightSource("small", "random:5", SMALL, None, 5, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, dtype=dtype, towers="visual")


@pytest.mark.parametrize("profile", ["reference", "weights"])
@pytest.mark.parametrize("stats", ["imagenet", "clip"])
@pytest.mark.parametrize("source", ["projected", "raw"])
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_whole_path_of_a_small_vit(profile: str, stats: str, source: str, axis: str) -> None:
    clip, images = small_clip(), photographs(61, 90)
    mean, std = (
        (MEAN, STD)
        if stats == "imagenet"
        else (255 * torch.tensor(t, dtype=torch.float64) for t in (clip.mean, clip.std))
    )
    normalised = (images.double() - mean[:, None, None]) / std[:, None, None]
    features, keys = reference_vit(
        visual_state(clip), normalised, patch=8, heads=4, reference=profile == "reference"
    )
    rows = unit_rows(6, 32)
    config = MaskClipSettings(
        profile=profile, image_stats=stats, ks_threshold=1.0, ks_axis=axis, ks_source=source, pd_threshold=0.3
    )
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    expected = reference_scores(features, keys[source], rows, ks=1.0, axis=axis, pd=0.3)
    assert (scores - expected).abs().max() / expected.abs().max() < 1e-10


def test_profiles_differ_and_leave_the_model_alone() -> None:
    clip, images, text = small_clip(), photographs(64, 64), classifier(unit_rows(6, 32))
    before = clip.visual(images.double() / 255)
    scores = {
        p: MaskClip(clip, text, MaskClipSettings(profile=p)).grid_scores(images)
        for p in ("reference", "weights")
    }
    assert (scores["reference"] - scores["weights"]).abs().max() > 1e-4
    assert torch.equal(clip.visual(images.double() / 255), before)
    assert {type(block.mlp.gelu).__name__ for block in clip.visual.transformer.resblocks} == {"QuickGELU"}


def test_plain_head_is_the_reference_baseline(resnet: Clip) -> None:
    clip, images, rows = small_clip(), photographs(61, 90), unit_rows(6, 32)
    normalised = (images.double() - MEAN[:, None, None]) / STD[:, None, None]
    features, _ = reference_vit(visual_state(clip), normalised, patch=8, heads=4, reference=True, plain=True)
    scores = MaskClip(clip, classifier(rows), MaskClipSettings(head="plain")).grid_scores(images)
    assert (scores - reference_scores(features, None, rows)).abs().max() < 1e-10

    images = photographs(96, 130)
    normalised = (images.double() - MEAN[:, None, None]) / STD[:, None, None]
    features, _ = reference_resnet(visual_state(resnet), normalised, heads=32, plain=True)
    rows = unit_rows(6, resnet.embed_dim)
    scores = MaskClip(resnet, classifier(rows), MaskClipSettings(head="plain", pd_threshold=0.2)).grid_scores(
        images
    )
    assert (scores - reference_scores(features, None, rows, pd=0.2)).abs().max() < 1e-10


# --- windows, batches, precisions, rows -----------------------------------------------------------------


@pytest.mark.parametrize(("window", "step"), [(48, 24), (64, 64), (32, 16)])
def test_windows_average_where_they_overlap(window: int, step: int) -> None:
    clip, images, rows = small_clip(), photographs(70, 101, batch=1), unit_rows(6, 32)
    config = MaskClipSettings(profile="weights", window=window, window_stride=step)
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    normalised = F.pad((images.double() - MEAN[:, None, None]) / STD[:, None, None], (0, 3, 0, 2))
    total, count = torch.zeros(6, 9, 13, dtype=torch.float64), torch.zeros(9, 13, dtype=torch.float64)

    def starts(length: int) -> list[int]:
        found, at = [], 0
        while at + window < length:
            found.append(at)
            at += step
        return [*found, length - window] if length > window else [0]

    for top in starts(72):
        for left in starts(104):
            crop = normalised[:, :, top : top + window, left : left + window]
            features, _ = reference_vit(visual_state(clip), crop, patch=8, heads=4, reference=False)
            part = reference_scores(features, None, rows)[0]
            y, x = top // 8, left // 8
            total[:, y : y + part.shape[1], x : x + part.shape[2]] += part
            count[y : y + part.shape[1], x : x + part.shape[2]] += 1
    assert (scores[0] - total / count).abs().max() < 1e-10


def starts(length: int, window: int, step: int) -> list[int]:
    """mmseg's: as many steps as are needed, each start moved back so that its window ends in the image."""
    count = max(length - window + step - 1, 0) // step + 1
    return [max(min(i * step + window, length) - window, 0) for i in range(count)]


@pytest.mark.parametrize("size", [(70, 101), (96, 64), (40, 83)])
@pytest.mark.parametrize("head", ["maskclip", "sc"])
def test_windows_by_pixels_are_mmsegs(size: tuple[int, int], head: str) -> None:
    """The last window ends at the image's border, on the grid or not; 40 rows are fewer than a window's."""
    clip, images, rows = small_clip(), photographs(*size), unit_rows(6, 32)
    window, step = 48, 24
    config = MaskClipSettings(
        head=head, profile="weights", window=window, window_stride=step, windows="pixels"
    )
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    assert scores.shape == (2, 6, *size)
    normalised = (images.double() - MEAN[:, None, None]) / STD[:, None, None]
    encoder = dense_encoder(clip.visual, head=head)
    total, count = torch.zeros(2, 6, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for top in starts(size[0], window, step):
        for left in starts(size[1], window, step):
            crop = normalised[:, :, top : top + window, left : left + window]
            part = reference_scores(encoder(crop).features, None, rows)
            y, x = crop.shape[-2:]
            part = F.interpolate(part, scale_factor=8, mode="bilinear", align_corners=False)[:, :, :y, :x]
            total[:, :, top : top + y, left : left + x] += part
            count[top : top + y, left : left + x] += 1
    assert (scores - total / count).abs().max() < 1e-10


def test_spliced_windows_average_unit_features() -> None:
    clip, images, rows = small_clip(), photographs(72, 104, batch=1), unit_rows(6, 32)
    config = MaskClipSettings(profile="weights", window=48, window_stride=24, windows="splice")
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    normalised = (images.double() - MEAN[:, None, None]) / STD[:, None, None]
    total = torch.zeros(1, 32, 9, 13, dtype=torch.float64)
    for top in starts(72, 48, 24):
        for left in starts(104, 48, 24):
            crop = normalised[:, :, top : top + 48, left : left + 48]
            features, _ = reference_vit(visual_state(clip), crop, patch=8, heads=4, reference=False)
            features = features / features.square().sum(1, keepdim=True).sqrt()
            total[..., top // 8 : top // 8 + 6, left // 8 : left // 8 + 6] += features
    expected = reference_scores(total, None, rows)
    assert (scores - expected).abs().max() < 1e-10


@pytest.mark.parametrize("windows", ["pixels", "splice"])
def test_windows_put_together_need_windows(windows: str) -> None:
    with pytest.raises(MaskMillError, match="window is 0"):
        MaskClipSettings(windows=windows)
    with (
        pytest.raises(MaskMillError, match="grid cells") if windows == "pixels" else contextlib.nullcontext()
    ):
        MaskClipSettings(windows=windows, window=224, window_stride=112, ks_threshold=1.0)


def test_one_window_over_everything_is_the_whole_image() -> None:
    clip, images, text = small_clip(), photographs(72, 72), classifier(unit_rows(6, 32))
    knobs = {"ks_threshold": 1.0, "pd_threshold": 0.3}
    whole = MaskClip(clip, text, MaskClipSettings(**knobs)).grid_scores(images)
    windowed = MaskClip(clip, text, MaskClipSettings(window=80, window_stride=40, **knobs)).grid_scores(
        images
    )
    assert (whole - windowed).abs().max() / whole.abs().max() < 1e-12
    whole = MaskClip(clip, text).grid_scores(images)
    spliced = MaskClip(
        clip, text, MaskClipSettings(window=80, window_stride=40, windows="splice")
    ).grid_scores(images)
    assert (whole - spliced).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    model = MaskClip(small_clip(dtype), classifier(unit_rows(6, 32)), MaskClipSettings(ks_threshold=1.0))
    images = photographs(61, 90, batch=4)
    together = model.grid_scores(images)
    assert torch.equal(together, torch.cat([model.grid_scores(image[None]) for image in images]))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS, reason="no photographs in shared/data")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_of_photographs_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Laid out as Labellers stack decoded images: channels last, so that one of a batch has odd strides."""
    clip = load_clip("ViT-B-16-quickgelu", "random:0", dtype=dtype, towers="visual")
    model = MaskClip(clip, classifier(unit_rows(CLASSES, clip.embed_dim)))
    images = [np.asarray(Image.open(path).convert("RGB").resize((96, 80))) for path in PHOTOGRAPHS]

    def labels(some: list[np.ndarray]) -> list[Tensor]:
        scores = model.grid_scores(torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2))
        return [torch.stack(label_map(s, network_size=(80, 96), image_size=(160, 192))) for s in scores]

    alone = [labels([image])[0] for image in images]
    for one, other in zip(alone, labels(images), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 5e-3)]
)
def test_precisions(dtype: torch.dtype, tolerance: float) -> None:
    images, text = photographs(61, 90), classifier(unit_rows(6, 32))
    exact = MaskClip(small_clip(), text).grid_scores(images)
    scores = MaskClip(small_clip(dtype), text).grid_scores(images)
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < tolerance


def test_a_class_scores_the_best_of_its_rows() -> None:
    clip, images, rows = small_clip(), photographs(64, 64), unit_rows(6, 32)
    grouped = TextClassifier(rows.float(), torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    single = MaskClip(clip, classifier(rows)).grid_scores(images)
    merged = MaskClip(clip, grouped).grid_scores(images)
    expected = torch.stack([single[:, :3].amax(1), single[:, 3], single[:, 4:].amax(1)], 1)
    assert torch.equal(merged, expected)


def test_denoising_and_smoothing_at_their_edges() -> None:
    scores = torch.tensor([[0.30, 0.10], [0.10, 0.10]], dtype=torch.float64)[None, :, None, :]
    assert torch.equal(prompt_denoising(scores, 0.0), scores)
    # Strictly below: the best probability of class 1 is exactly one half, at the tie.
    assert torch.equal(prompt_denoising(scores, 0.5), scores)
    assert (prompt_denoising(scores, 0.51)[:, 1] == DENIED).all()
    everything_denied = prompt_denoising(torch.zeros(1, 4, 2, 2), 0.5)
    assert (everything_denied == DENIED).all()
    sure = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[None, :, None, :]
    keys = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    kept = key_smoothing(sure, keys, 1.0)
    assert torch.equal(kept, (100 * sure).softmax(1)), "a probability of exactly 1 is not below 1"


@pytest.mark.parametrize("knobs", [{"window": 50, "window_stride": 8}, {"window": 48, "window_stride": 20}])
def test_windows_lie_on_the_grid(knobs: dict[str, int]) -> None:
    with pytest.raises(MaskMillError) as caught:
        MaskClip(small_clip(), classifier(unit_rows(6, 32)), MaskClipSettings(**knobs))
    assert caught.value.code == "setting_invalid"


def test_classifier_of_another_clip() -> None:
    with pytest.raises(MaskMillError, match="33 channels"):
        MaskClip(small_clip(), classifier(unit_rows(6, 33)))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_the_unchanged_path_is_open_clips_own(model: str, request: pytest.FixtureRequest) -> None:
    clip: Clip = request.getfixturevalue(model)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert isinstance(clip.model, open_clip.CLIP)
        expected = clip.model.encode_image(image)
        assert (dense_encoder(clip.visual).image_embedding(image) - expected).abs().max() < 1e-12


def test_an_image_to_a_mask() -> None:
    clip = load_clip("toyclip", "bundled")
    text = build_text_classifier(clip, [["grass"], ["sky", "clouds"], ["zebra"]], templates="toyworld")
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    for config in (MaskClipSettings(), MaskClipSettings(ks_threshold=1.0)):
        maskclip = MaskClip(clip, text, config)
        labels, confidence = maskclip.label(image)
        scores = F.interpolate(maskclip.grid_scores(image[None]), (96, 128), mode="bilinear")[0]
        assert labels.dtype == confidence.dtype == torch.uint8 and labels.shape == (96, 128)
        assert (labels == scores.argmax(0)).double().mean() > 0.999  # but for ties
        assert maskclip.label(image, size=(50, 61))[0].shape == (50, 61)


@pytest.mark.parametrize(
    "settings", [{"refine": "pamr"}, {"refine": "lposs+", "refine_steps": 4}, {"refine": "tlp"}]
)
def test_refined_labels(settings: dict[str, Any]) -> None:
    """Refined at the image's own size, whatever the network's, and among some of the classes."""
    clip = load_clip("toyclip", "bundled")
    names = ["grass", "sky", "zebra", "sand", "brick", "wood", "leaf"]
    text = build_text_classifier(clip, [[name] for name in names], templates="toyworld")
    made = generate(3, 1, 96).images[0]
    image, size = torch.from_numpy(made).permute(2, 0, 1), (120, 90)
    if settings["refine"] != "tlp":
        settings = settings | {"refine_classes": 3}
    config = MaskClipSettings(head="value", image_stats="clip", profile="weights", **settings)
    maskclip = MaskClip(clip, text, config)
    labels, confidence = maskclip.label(image, size=size)
    scores, classes = maskclip.refine(image[None], maskclip.grid_scores(image[None]), size)
    ids = torch.arange(7) if classes is None else classes[0]
    assert len(ids) == (7 if settings["refine"] == "tlp" else 3)
    scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)[0]
    best = (100 * scores).softmax(0).max(0)
    assert (ids[best.indices] == labels).double().mean() > 0.999
    assert (255 * best.values - confidence).abs().max() < 1
    plain = MaskClip(clip, text, MaskClipSettings(head="value", image_stats="clip", profile="weights"))
    assert 0.5 < (plain.label(image, size=size)[0] == labels).double().mean() < 1
    labeller = MaskClipLabeller(
        LabellerSettings(num_classes=7), model="toyclip", pretrained="bundled", text=text, reading=config
    )
    assert np.array_equal(labeller.label([made], [size])[0].labels, labels.numpy())


# --- which classes an image may have --------------------------------------------------------------------


def class_token(clip: Clip, images: Tensor, rows: Tensor) -> Tensor:
    """Cosines (B, C) of open_clip's own embedding of images at the size that the tower is made for."""
    embeddings = clip.visual((images.double() - MEAN[:, None, None]) / STD[:, None, None])
    return F.normalize(embeddings, dim=-1) @ rows.T


@pytest.mark.slow
@pytest.mark.parametrize("model", ["small", "resnet"])
def test_candidates_are_those_of_open_clips_embedding(model: str, request: pytest.FixtureRequest) -> None:
    clip: Clip = small_clip() if model == "small" else request.getfixturevalue("resnet")
    side = 64 if model == "small" else 224
    images, rows = photographs(side, side), unit_rows(CLASSES, clip.embed_dim)
    config = MaskClipSettings(profile="weights", classes={"candidates": 4})
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    free = MaskClip(clip, classifier(rows), MaskClipSettings(profile="weights")).grid_scores(images)
    best = class_token(clip, images, rows).topk(4, 1).indices
    possible = torch.zeros(2, CLASSES, dtype=torch.bool).scatter(1, best, True)
    assert torch.equal(scores, torch.where(possible[:, :, None, None], free, DENIED))


@pytest.mark.parametrize("windows", ["cells", "pixels"])
def test_a_candidate_of_any_window_is_one_of_the_image(windows: str) -> None:
    clip, images, rows = small_clip(), photographs(64, 96), unit_rows(CLASSES, 32)
    above = 0.25
    config = MaskClipSettings(
        profile="weights", window=64, window_stride=32, windows=windows, classes={"candidates_above": above}
    )
    scores = MaskClip(clip, classifier(rows), config).grid_scores(images)
    best = torch.stack([class_token(clip, images[..., left : left + 64], rows) for left in (0, 32)]).amax(0)
    wanted = (best >= above) | ((best < above).all(1, keepdim=True) & (best == best.amax(1, keepdim=True)))
    assert torch.equal((scores > DENIED).any((2, 3)), wanted)
    assert 0 < int(wanted.sum()) < wanted.numel(), "the threshold must part them"


def test_a_bias_is_subtracted_and_must_fit() -> None:
    clip, images, rows = small_clip(), photographs(40, 56), unit_rows(3, 32)
    free = MaskClip(clip, classifier(rows), MaskClipSettings()).grid_scores(images)
    bias = (0.1, -0.2, 0.0)
    config = MaskClipSettings(classes={"bias": bias})
    found = MaskClip(clip, classifier(rows), config).grid_scores(images)
    expected = free - torch.tensor(bias, dtype=torch.float64)[:, None, None]
    assert torch.equal(found, expected)
    for wrong in ({"bias": (0.1, 0.2)}, {"calibrate": 0.95}):
        with pytest.raises(MaskMillError) as caught:
            MaskClip(clip, classifier(rows), MaskClipSettings(classes=wrong))
        assert caught.value.code == "setting_invalid"


def test_purified_classes_are_gone_from_the_image() -> None:
    clip, images, rows = small_clip(), photographs(64, 64), unit_rows(CLASSES, 32)
    free = MaskClip(clip, classifier(rows), MaskClipSettings()).grid_scores(images)
    config = MaskClipSettings(classes={"redundant_below": 0.4, "ambiguous_above": 0.5})
    model = MaskClip(clip, classifier(rows), config)
    found = model.grid_scores(images)
    gone = (found == DENIED).all(3).all(2)
    assert torch.equal(found, torch.where(gone[:, :, None, None], DENIED, free))
    assert gone.any() and not gone.all(1).any()
    for image, own in zip(images, found, strict=True):
        assert torch.equal(model.grid_scores(image[None])[0], own)


@pytest.mark.parametrize("other", [{"window": 64, "window_stride": 32}, {"ks_threshold": 1.0}])
def test_purification_needs_the_cosines_of_a_whole_image(other: dict[str, Any]) -> None:
    with pytest.raises(MaskMillError) as caught:
        MaskClipSettings(classes={"ambiguous_above": 0.7}, **other)
    assert caught.value.code == "setting_invalid"
