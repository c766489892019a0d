"""cluster.yaml against the schema of the installed Ray, and against what its comments promise."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cli import parse
from jobs.submit import Submit

ROOT = Path(__file__).resolve().parents[1]
SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",  # access keys
    r"(?i)(secret|password|passwd|token|api_?key)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+=_-]{12,}",
    r"(?<![A-Za-z0-9/+=])[A-Za-z0-9+]{40}(?![A-Za-z0-9/+=])",  # secret access keys
    r"\b\d{12}\b",  # account numbers
    r"-----BEGIN",
    r"\.pem\b",
]


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "cluster.yaml").read_text()


@pytest.fixture(scope="module")
def config(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads((importlib.resources.files("ray.autoscaler") / "ray-schema.json").read_text())


def test_schema(config: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(config, schema)


def test_schema_refuses_what_ray_does_not_know(config: dict[str, Any], schema: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="min_workers"):
        jsonschema.validate({**config, "min_workers": 1}, schema)


def test_nothing_of_rays_defaults_creeps_in(config: dict[str, Any], schema: dict[str, Any]) -> None:
    """Such as old images, or ``pip install ray`` of a nightly."""
    from ray.autoscaler.sdk import fillout_defaults  # which `ray up` calls before it speaks to AWS

    filled = fillout_defaults(copy.deepcopy(config))
    jsonschema.validate(filled, schema)
    assert {key: filled[key] for key in config} == config


def test_the_head_does_no_work(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    start = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0" in start and "--num-gpus=0" in start
    assert "--object-store-memory=0" not in start


def test_workers(config: dict[str, Any]) -> None:
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    for name, node in workers.items():
        assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, name
        assert 0 <= node["min_workers"] < node["max_workers"] <= config["max_workers"], name
        assert node["resources"]["CPU"] > 0
    assert {bool(node["resources"]["GPU"]) for node in workers.values()} == {True, False}
    # The totals fit together: the types' own limits can be reached.
    assert sum(node["max_workers"] for node in workers.values()) <= config["max_workers"]


def test_every_node_has_the_same_image_and_gets_its_rights_from_a_profile(config: dict[str, Any]) -> None:
    nodes = [node["node_config"] for node in config["available_node_types"].values()]
    assert len({node["ImageId"] for node in nodes}) == 1
    # The Debian name of the root disk; another name would add a second disk and leave the first at 8 GB.
    assert all(node["BlockDeviceMappings"][0]["DeviceName"] == "/dev/sda1" for node in nodes)
    assert all(node["IamInstanceProfile"] == {"Name": "maskmill"} for node in nodes)


def test_what_is_mounted_exists_and_is_installed(config: dict[str, Any]) -> None:
    mounts = dict(config["file_mounts"])
    assert mounts.pop("/home/ubuntu/.ray/auth_token") == "~/.ray/auth_token"  # where Ray keeps a user's token
    for remote, local in mounts.items():
        assert not Path(local).is_absolute()
        assert (ROOT / local).exists(), local
        assert any(remote in command for command in config["setup_commands"])


def test_every_node_wants_the_token(config: dict[str, Any]) -> None:
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "export RAY_AUTH_MODE=token && " in start.split("ray start")[0]
    assert "chmod 600 /home/ubuntu/.ray/auth_token" in config["setup_commands"]


def test_the_commands_in_its_comments_are_understood(text: str) -> None:
    lines = re.findall(r"^#   (maskmill submit .*)$", text, flags=re.MULTILINE)
    jobs = []
    for line in lines:
        command = parse(shlex.split(line)[1:])
        assert isinstance(command, Submit)
        jobs.append(type(parse(command.job)).__name__)
    assert jobs == ["Label", "Retrain"]


def test_the_sizes_follow_from_what_was_measured(text: str) -> None:
    results = (ROOT / "benchmarks/results/epyc-bf16-2cores.md").read_text()
    bare, job = (
        float(re.search(rf"^\| {row}[^|]*\| ([\d.]+) \|", results, flags=re.MULTILINE)[1])  # type: ignore[index]
        for row in (r"\(a\) bare loop", r"\(b\) whole job")
    )
    share = f"{2 / job - 2 / bare:.2f}"  # of one of two vCPUs
    for place in (text, (ROOT / "docs/cluster.md").read_text()):
        assert re.search(rf"\b{share} (x|×) the GPU's images/s", place)


def test_the_requirements_start_a_cluster_on_aws() -> None:
    import ray

    pins = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    )
    assert pins["ray"] == ray.__version__  # the laptop's ray and the cluster's have to be the same
    assert "boto3" in pins and "s3fs" in pins


def test_no_secrets(text: str) -> None:
    for pattern in SECRETS:
        found = re.search(pattern, text)
        assert not found, f"{pattern} matches {found and found.group()}"


@pytest.mark.parametrize(
    "line",
    [
        "aws_secret_access_key: " + "x1Y2" * 10,
        "key: AKIA" + "A1B2" * 4,
        "arn:aws:iam::" + "1234" * 3 + ":role",
    ],
)
def test_the_secret_patterns_find_secrets(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in SECRETS)
