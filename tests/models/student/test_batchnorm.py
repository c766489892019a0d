"""Batch norm over two real processes (gloo) against one process with the joint batch, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.clip.text import TextClassifier
from models.settings import StudentConfig
from models.student.batchnorm import CrossReplicaBatchNorm2d, synchronise_batchnorm, world_size
from models.student.deeplab import DeepLab

WORLD = 2
CHANNELS = 3
# Processes have batches and images of different sizes; one process could not even stack them.
SHAPES = [(3, CHANNELS, 4, 5), (2, CHANNELS, 6, 2)]
LAYERS: dict[str, dict[str, object]] = {
    "plain": {},
    "average": {"momentum": None},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def layer(options: dict[str, object]) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    module = nn.BatchNorm2d(CHANNELS, **options).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return module


def inputs(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """An input far from zero, where variances by cancellation go wrong, and the weights of a loss."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, weights = (torch.randn(SHAPES[rank], dtype=torch.float64, generator=generator) for _ in range(2))
    return (50 + (1 + rank) * x).requires_grad_(), weights


def student() -> nn.Module:
    torch.manual_seed(1)
    text = TextClassifier(F.normalize(torch.randn(4, 16), dim=1), torch.arange(4), 4)
    return DeepLab(StudentConfig(decoder="light", backbone="light", embed_dim=16, width=4), text).double()


def student_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (4, 3, 24, 32), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 4, (4, 24, 32), generator=generator)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Buffers and gradients."""
    found = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer is not None}
    return found | {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for name, options in LAYERS.items():
        plain = layer(options)
        module = synchronise_batchnorm(plain)
        assert type(module) is CrossReplicaBatchNorm2d and module.weight is plain.weight
        outputs, gradients = [], []
        for step in range(2):
            x, weights = inputs(rank, step)
            y = module(x)
            (y * weights).sum().backward()
            outputs.append(y.detach())
            gradients.append(x.grad)
        with torch.no_grad():
            outputs.append(module.eval()(inputs(rank, 2)[0]))
        half = module.train()(inputs(rank, 3)[0].detach().bfloat16())
        results[name] = (outputs, gradients, state(module), half.dtype)
    model = synchronise_batchnorm(student())
    parallel = DistributedDataParallel(model)
    images, labels = (tensor.chunk(WORLD)[rank] for tensor in student_batch())
    F.cross_entropy(parallel(images), labels).backward()
    torch.save((results, state(model)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict]]:
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_are_one_with_the_joint_batch(name: str, processes: list[tuple[dict, dict]]) -> None:
    module = layer(LAYERS[name])
    found = [results[name] for results, _ in processes]

    def joint(step: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        parts = [inputs(rank, step) for rank in range(WORLD)]
        columns = [x.transpose(0, 1).flatten(1) for x, _ in parts]
        y = module(torch.cat(columns, 1)[None, :, :, None])[0, :, :, 0]
        split = y.split([column.shape[1] for column in columns], 1)
        ys = [
            part.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1)
            for part, shape in zip(split, SHAPES, strict=True)
        ]
        return ys, [x for x, _ in parts], [weights for _, weights in parts]

    for step in range(2):
        ys, xs, weights = joint(step)
        sum((y * w).sum() for y, w in zip(ys, weights, strict=True)).backward()
        for rank, (outputs, gradients, _, _) in enumerate(found):
            torch.testing.assert_close(outputs[step], ys[rank].detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(gradients[step], xs[rank].grad, rtol=0, atol=1e-10)
    statistics = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.eval()
    if statistics:  # without running statistics, evaluation is by the batch at hand, as in torch
        with torch.no_grad():
            for rank, (outputs, *_) in enumerate(found):
                torch.testing.assert_close(outputs[2], module(inputs(rank, 2)[0]), rtol=0, atol=1e-10)
    expected = {f"{key}.grad": parameter.grad for key, parameter in module.named_parameters()}
    for key, gradient in expected.items():
        total = sum(states[key] for _, _, states, _ in found)
        torch.testing.assert_close(total, gradient, rtol=0, atol=1e-9)
    assert all(dtype is torch.bfloat16 for *_, dtype in found)


def test_running_statistics_are_those_of_the_joint_batches(processes: list[tuple[dict, dict]]) -> None:
    module = layer(LAYERS["average"])
    for step in range(3):  # the third of a step in bf16
        parts = [inputs(rank, step if step < 2 else 3)[0].detach() for rank in range(WORLD)]
        if step == 2:
            parts = [part.bfloat16().double() for part in parts]
        columns = [part.transpose(0, 1).flatten(1) for part in parts]
        module(torch.cat(columns, 1)[None, :, :, None])
    for results, _ in processes:
        states = results["average"][2]
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(states[name], buffer, rtol=1e-6, atol=1e-6)


def test_a_student_on_two_processes_has_the_gradients_of_one(processes: list[tuple[dict, dict]]) -> None:
    model = student()
    images, labels = student_batch()
    F.cross_entropy(model(images), labels).backward()
    expected = state(model)
    for _, found in processes:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("grouped", [False, True], ids=["no process group", "one process"])
def test_alone_nothing_changes(grouped: bool, tmp_path: Path) -> None:
    model = student()
    kinds = [type(module) for module in model.modules()]
    if grouped:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert world_size() == 1
        assert synchronise_batchnorm(model) is model
        assert [type(module) for module in model.modules()] == kinds
        layer_, other = layer({}), CrossReplicaBatchNorm2d(CHANNELS).double()
        other.load_state_dict(layer_.state_dict())
        x = inputs(0, 0)[0].detach()
        assert torch.equal(layer_(x), other(x))
    finally:
        if grouped:
            dist.destroy_process_group()
