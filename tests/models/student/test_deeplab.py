"""Students against plain re-derivations from their description; export, ONNX and compilation.

The re-derivations work on the tensors of the state dict alone, in fp64, and share no code with ``models``.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from models.clip.text import TextClassifier
from models.errors import MaskMillError
from models.settings import StudentConfig
from models.student.deeplab import DeepLab, load_backbone_weights

D = 16


def light(**fields: Any) -> StudentConfig:
    return StudentConfig(**({"decoder": "light", "backbone": "light", "embed_dim": D, "width": 4} | fields))


LIGHT = light()
CONFIGS = [
    LIGHT,
    StudentConfig(decoder="deeplabv2", backbone="light", embed_dim=D, width=4),
    StudentConfig(decoder="deeplabv3plus", backbone="light", embed_dim=D, width=4),
]
MEAN = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)[:, None, None]
STD = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64)[:, None, None]


def classifier(class_ids: list[int], seed: int = 0, dim: int = D) -> TextClassifier:
    rows = torch.randn(len(class_ids), dim, generator=torch.Generator().manual_seed(seed))
    return TextClassifier(F.normalize(rows, dim=1), torch.tensor(class_ids), max(class_ids) + 1)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def student(config: StudentConfig = LIGHT, text: TextClassifier | None = None) -> DeepLab:
    """With batch norms that differ from the identity."""
    torch.manual_seed(0)
    model = DeepLab(config, text or classifier([0, 1, 2, 3]))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.0, 0.2)
            nn.init.normal_(part.running_mean, 0.0, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.eval()


def id_of(config: StudentConfig) -> str:
    return f"{config.decoder}-{config.backbone}"


# --- the decoders, re-derived -------------------------------------------------------------------------------


class Derived:
    """Convolution, batch norm in evaluation, ReLU, from the tensors of a state dict."""

    def __init__(self, model: DeepLab) -> None:
        self.state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def layer(self, name: str, x: Tensor, *, dilation: int = 1, groups: int = 1, relu: bool = True) -> Tensor:
        weight = self.state[f"decoder.{name}.0.weight"]
        reach = dilation * (weight.shape[-1] // 2)
        x = F.conv2d(x, weight, None, 1, reach, dilation, groups)
        mean, var, scale, shift = (
            self.state[f"decoder.{name}.1.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift
        return x.clamp(min=0) if relu else x

    def separable(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        return self.layer(f"{name}.1", self.layer(f"{name}.0", x, dilation=dilation, groups=x.shape[1]))

    def deeplabv2(self, low: Tensor, high: Tensor) -> Tensor:
        return sum(self.layer(f"branches.{i}", high, dilation=6 * (i + 1)) for i in range(4))

    def light(self, low: Tensor, high: Tensor) -> Tensor:
        up = bilinear(self.layer("lateral", high, relu=False), *low.shape[-2:])
        x = (self.layer("skip", low, relu=False) + up).clamp(min=0)
        return sum(self.layer(f"branches.{i}", x, dilation=d) for i, d in enumerate((1, 3, 6)))

    def deeplabv3plus(self, low: Tensor, high: Tensor) -> Tensor:
        pooled = self.layer("pool", high.mean((-2, -1), keepdim=True))
        parts = [pooled.repeat(1, 1, *high.shape[-2:]), self.layer("branches.0", high)]
        parts += [self.separable(f"branches.{i}", high, d) for i, d in ((1, 12), (2, 24), (3, 36))]
        up = bilinear(self.layer("bottleneck", torch.cat(parts, 1)), *low.shape[-2:])
        x = torch.cat([up, self.layer("skip", low)], 1)
        return self.separable("refine.1", self.separable("refine.0", x))


def bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation between the centres of cells, as one matrix per axis."""

    def matrix(source: int, target: int) -> Tensor:
        weights = torch.zeros(target, source, dtype=torch.float64)
        for row in range(target):
            centre = min(max((row + 0.5) * source / target - 0.5, 0.0), source - 1.0)
            left = math.floor(centre)
            weights[row, left] += 1 - (centre - left)
            weights[row, min(left + 1, source - 1)] += centre - left
        return weights

    return torch.einsum("yh,xw,bchw->bcyx", matrix(x.shape[2], height), matrix(x.shape[3], width), x)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("size", [(40, 56), (37, 51)])
def test_a_student_is_its_description(config: StudentConfig, size: tuple[int, int]) -> None:
    model = student(config).double()
    images = pictures(2, 3, *size)
    derived = Derived(model)
    with torch.inference_mode():
        low, high = model.backbone((images.double() - MEAN) / STD)
        features = getattr(derived, config.decoder)(low, high)
        torch.testing.assert_close(model.features(images), features, rtol=0, atol=1e-10)
        logits = torch.einsum("pd,bdhw->bphw", derived.state["text_rows"], features)
        torch.testing.assert_close(model.grid_logits(features), logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(images), bilinear(logits, *size), rtol=0, atol=1e-9)
    assert logits.std() > 0.1


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("training", [False, True])
def test_features_are_not_negative(config: StudentConfig, training: bool) -> None:
    with torch.no_grad():
        features = student(config).train(training).features(pictures(2, 3, 48, 48))
    assert features.min() == 0 and features.max() > 0.5


def test_what_the_reference_trains() -> None:
    """ResNet-101 v1c with the summed branches: parameters counted by hand from the architecture."""
    model = DeepLab(StudentConfig(), classifier([0, 1], dim=512))
    stem = 9 * (3 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)
    trunk = 0
    for channels_in, width, blocks in ((64, 64, 3), (256, 128, 4), (512, 256, 23), (1024, 512, 3)):
        out = 4 * width
        trunk += channels_in * out + 2 * out  # the shortcut of the first block
        for block in range(blocks):
            trunk += (out if block else channels_in) * width + 9 * width**2 + width * out
            trunk += 2 * (width + width + out)
    head = 4 * (9 * 2048 * 512 + 2 * 512)
    assert sum(p.numel() for p in model.parameters()) == stem + trunk + head


# --- sizes and inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 3), (64, 64), (65, 127)])
def test_scores_have_the_image_s_size(config: StudentConfig, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        scores = student(config)(pictures(2, 3, *size))
    assert scores.shape == (2, 4, *size) and scores.dtype == torch.float32
    assert bool(scores.isfinite().all())


def test_floats_of_the_same_range_are_the_same_image() -> None:
    model, images = student(), pictures(2, 3, 33, 40)
    with torch.inference_mode():
        expected = model(images)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(model(images.to(dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_dtype_keeps_image_statistics_exact(dtype: torch.dtype) -> None:
    """Rounded to bf16 they would shift every input by up to a three-hundredth of its deviation."""
    model, taken = student().to(dtype), []
    model.backbone.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    images = pictures(2, 3, 32, 32)
    with torch.inference_mode():
        assert model(images).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 0 if dtype == torch.bfloat16 else 1e-12
    exact = ((images.double() - MEAN) / STD).to(dtype)
    different = (taken[0] - exact).abs() > tolerance
    assert different.float().mean() < 1e-3  # fp32 before it is rounded: a rare tie goes the other way


def test_scores_are_fp32_under_autocast() -> None:
    model, images = student(), pictures(2, 3, 48, 48)
    with torch.inference_mode():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.features(images)
            scores = model.grid_logits(features)
            whole = model(images)
    assert features.dtype == torch.bfloat16 and whole.dtype == scores.dtype == torch.float32
    assert torch.equal(scores, model.grid_logits(features.float()))
    assert 0 < (whole - exact).abs().max() < 0.05 * exact.abs().max()


def test_an_image_s_scores_do_not_depend_on_its_batch() -> None:
    model, images = student().double(), pictures(3, 3, 40, 48)
    with torch.inference_mode():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, rtol=0, atol=1e-10)


# --- the classifier -----------------------------------------------------------------------------------------


def test_the_text_is_never_trained() -> None:
    model = student(light(learned_background=True)).train()
    before = model.text_rows.clone()
    assert "text_rows" not in dict(model.named_parameters()) and "text_rows" in model.state_dict()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    labels = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        F.cross_entropy(model(pictures(2, 3, 32, 32)), labels).backward()
        optimiser.step()
    assert torch.equal(model.text_rows, before)
    assert not model.text_rows.requires_grad and model.text_rows.grad is None
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, old[name])]
    assert still == []  # all else is


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = DeepLab(LIGHT, classifier([0, 1])).train()
    labels = torch.zeros(4, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1
    images = (60 + 120 * labels[:, None].expand(-1, 3, -1, -1) + pictures(4, 3, 32, 32) // 8).to(torch.uint8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    with torch.inference_mode():
        # Six seeds, 1 and 2 threads: all pixels.
        assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("background", [False, True])
def test_other_classes_are_as_if_built_with_them(background: bool) -> None:
    config = StudentConfig(
        decoder="light", backbone="light", embed_dim=D, width=4, learned_background=background
    )
    other = classifier([0, 0, 1, 2, 2, 2], seed=5)
    model, built = student(config), student(config, other)
    images = pictures(1, 3, 40, 40)
    with torch.inference_mode():
        assert not torch.equal(model(images)[:, :3], built(images)[:, :3])
        model.set_classifier(other)
        assert torch.equal(model(images), built(images))
    assert model.num_classes == built.num_classes == 3 + background
    assert torch.equal(model.text.embeddings, other.embeddings)
    assert torch.equal(model.text.class_ids, other.class_ids) and model.text.num_classes == 3


def test_the_classifier_is_a_copy() -> None:
    text = classifier([0, 1])
    model = student(text=text)
    text.embeddings.zero_()
    assert model.text_rows.abs().sum() > 0


def test_permuted_classes_permute_scores() -> None:
    text, order = classifier([0, 1, 2, 3]), torch.tensor([2, 0, 3, 1])
    images = pictures(2, 3, 33, 40)
    model = student(text=text)
    with torch.inference_mode():
        expected = model(images)[:, order]
        model.set_classifier(TextClassifier(text.embeddings[order], text.class_ids, 4))
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("background", [False, True])
def test_a_class_scores_the_best_of_its_rows(background: bool) -> None:
    ids = [0, 0, 0, 1, 2, 2]
    config = StudentConfig(
        decoder="light", backbone="light", embed_dim=D, width=4, learned_background=background
    )
    model = student(config, classifier(ids))
    features = model.features(pictures(2, 3, 32, 32)).detach()
    rows = torch.einsum("pd,bdhw->bphw", model.text_rows, features)
    expected = [rows[:, :3].amax(1), rows[:, 3], rows[:, 4:].amax(1)]
    if background:
        vector = model.background[0] / model.background[0].norm()
        expected = [torch.einsum("d,bdhw->bhw", vector, features), *expected]
    torch.testing.assert_close(model.grid_logits(features), torch.stack(expected, 1), rtol=0, atol=1e-5)


def test_the_learned_background_starts_as_a_normal_vector() -> None:
    torch.manual_seed(0)
    config = StudentConfig(
        decoder="light", backbone="light", embed_dim=4096, width=4, learned_background=True
    )
    vector = DeepLab(config, classifier([0, 1], dim=4096)).background
    assert vector.requires_grad and vector.shape == (1, 4096)
    assert abs(vector.mean()) < 0.1 and abs(vector.std() - 1) < 0.1


def test_scale_and_normalisation() -> None:
    images = pictures(1, 3, 32, 32)
    plain, cosine = student(), student(
        light(normalize_features=True, logit_scale=30.0)
    )  # fmt: skip
    features = plain.features(images).detach()
    length = features.square().sum(1, keepdim=True).sqrt()
    assert length.min() > 0
    expected = 30 * plain.grid_logits(features) / length
    torch.testing.assert_close(cosine.grid_logits(features), expected, rtol=1e-5, atol=1e-5)
    zeros = torch.zeros(1, D, 2, 2, requires_grad=True)
    cosine.grid_logits(zeros).sum().backward()
    assert bool(zeros.grad.isfinite().all())


def test_weights_bring_their_classes() -> None:
    """As many rows, otherwise shared out: the index of rows must follow."""
    source, target = student(text=classifier([0, 0, 1, 1])), student(text=classifier([0, 1, 1, 1], seed=3))
    images = pictures(1, 3, 32, 32)
    target.load_state_dict(source.state_dict())
    with torch.inference_mode():
        assert torch.equal(target(images), source(images))


def test_copies_and_pickles_are_whole() -> None:
    model, images = student(text=classifier([0, 0, 1])), pictures(1, 3, 32, 32)
    with torch.inference_mode():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), model(images))
            assert other.num_classes == 2


def test_the_seed_makes_the_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(DeepLab(LIGHT, classifier([0])).state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert not torch.equal(states[0]["decoder.skip.0.weight"], states[2]["decoder.skip.0.weight"])


# --- settings -----------------------------------------------------------------------------------------------


def test_settings_survive_json() -> None:
    config = StudentConfig(
        decoder="light",
        backbone="light",
        embed_dim=128,
        dilations=(1, 2),
        width=24,
        depth=4,
        normalize_features=True,
        logit_scale=10.0,
        learned_background=True,
    )
    assert StudentConfig.model_validate_json(config.model_dump_json()) == config
    assert StudentConfig(decoder="deeplabv3plus").dilations == (1, 12, 24, 36)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"decoder": "unet"}, "deeplabv2"),
        ({"backbone": "vgg16"}, "resnet101c"),
        ({"embed_dim": 0}, "embed_dim"),
        ({"backbone": "light", "depth": 0}, "depth"),
        ({"width": 32}, "backbone light"),
        ({"depth": 5}, "backbone light"),
        ({"dilations": (0, 1)}, "dilations"),
        ({"dilations": (1.5,)}, "dilations"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"wings": 2}, "wings"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(values: dict[str, object], words: str) -> None:
    with pytest.raises(MaskMillError, match=words) as caught:
        StudentConfig(**values)
    assert caught.value.code == "setting_invalid"


def test_a_classifier_of_another_width_is_refused() -> None:
    model = student()
    for make in (lambda text: DeepLab(LIGHT, text), model.set_classifier):
        with pytest.raises(MaskMillError, match="has 8 channels") as caught:
            make(classifier([0], dim=8))
        assert caught.value.code == "weights_do_not_fit"


def test_backbone_weights_that_do_not_exist() -> None:
    model = student()
    load_backbone_weights(model, "none")
    with pytest.raises(MaskMillError, match="no ImageNet weights of the backbone light"):
        load_backbone_weights(model, "imagenet")


# --- other runtimes -----------------------------------------------------------------------------------------

SIZES = ({0: Dim("batch"), 2: Dim("height", min=16), 3: Dim("width", min=16)},)
OTHERS = [(1, 3, 41, 77), (3, 3, 64, 50), (1, 3, 16, 17)]


def export(model: DeepLab) -> torch.export.ExportedProgram:
    return torch.export.export(model, (pictures(2, 3, 48, 64),), dynamic_shapes=SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        light(learned_background=True),
        StudentConfig(decoder="deeplabv2", backbone="resnet50c", embed_dim=D),
        StudentConfig(decoder="deeplabv3plus", backbone="light", embed_dim=D, width=4),
    ],
    ids=id_of,
)
def test_export_takes_any_size(config: StudentConfig) -> None:
    model = student(config, classifier([0, 1, 1, 2]))
    program = export(model).module()
    with torch.inference_mode():
        for shape in OTHERS:
            images = pictures(*shape)
            torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx_takes_any_size() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = student(light(), classifier([0, 1, 1, 2]))
    data = torch.onnx.export(export(model), dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    for shape in OTHERS:
        images = pictures(*shape)
        (found,) = session.run(None, {name: images.numpy()})
        with torch.inference_mode():
            expected = model(images).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_compilation_sees_one_graph() -> None:
    """The capture is what can break; the code made of it is not this project's."""
    torch.compiler.reset()
    model = student(LIGHT, classifier([0, 1, 1, 2])).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = pictures(2, 3, 32, 48)
    for network in (compiled, twin):
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(images)
        scores.square().mean().backward()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-4, msg=name)
