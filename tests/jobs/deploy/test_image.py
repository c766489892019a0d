"""The Dockerfile, as far as it can be checked without building it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "jobs/deploy/Dockerfile"


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, its arguments), comments left out and continued lines joined."""
    lines = [text for text in DOCKERFILE.read_text().splitlines() if text and not text.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    found = [line.partition(" ") for line in joined.splitlines()]
    assert {name for name, _, _ in found} <= {"ARG", "FROM", "USER", "WORKDIR", "COPY", "RUN"}
    return [(name, rest) for name, _, rest in found]


def of(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in steps if instruction == name]


def pins() -> dict[str, str]:
    text = (ROOT / "requirements.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))


def test_the_base_is_pinned_and_has_the_ray_and_python_that_we_have(steps: list[tuple[str, str]]) -> None:
    (base,) = of(steps, "FROM")
    match = re.fullmatch(r"rayproject/ray:([\d.]+)-py(\d)(\d+)-\$\{PLATFORM\}", base)
    assert match and match[1] == pins()["ray"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"Programming Language :: Python :: {match[2]}.{match[3]}"' in project
    assert of(steps, "ARG") == ["PLATFORM=gpu"]
    assert steps[0][0] == "ARG"  # before FROM, which reads it
    assert f"ray.__version__ == '{pins()['ray']}'" in of(steps, "RUN")[-1]


def test_nothing_runs_as_root(steps: list[tuple[str, str]]) -> None:
    assert of(steps, "USER") == ["ray"]
    names = [name for name, _ in steps]
    assert names.index("USER") < min(names.index("RUN"), names.index("COPY"))
    assert all(copy.startswith("--chown=ray:users ") for copy in of(steps, "COPY"))


def test_what_is_copied_exists_and_is_sent(steps: list[tuple[str, str]]) -> None:
    copied = {
        source for copy in of(steps, "COPY") for source in copy.split()[1:-1] if not source.startswith("--")
    }
    assert all((ROOT / source).exists() for source in copied)
    ignored = [
        line
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored[0] == "*" and {line[1:] for line in ignored if line[0] == "!"} == copied
    # All that the package is made of.
    project = (ROOT / "pyproject.toml").read_text()
    fields = dict(re.findall(r"^(readme|license-files|include) = (.*)$", project, flags=re.MULTILINE))
    named = {name for value in fields.values() for name in re.findall(r'"([\w.]+)"', value)}
    assert len(fields) == 3 and named | {"pyproject.toml"} <= copied


def test_the_packages_are_those_of_the_tests_and_installed_before_the_code(
    steps: list[tuple[str, str]],
) -> None:
    runs = of(steps, "RUN")
    assert runs[0] == "pip install --no-cache-dir --requirement requirements.txt"
    assert runs[1].startswith("pip install --no-cache-dir --no-deps . && maskmill --version && ")
    program = re.search(r'python -c "(.*)"', runs[1])
    assert program and ast.parse(program[1])
    order = [rest for _, rest in steps]
    assert order.index(runs[0]) < next(n for n, rest in enumerate(order) if rest.endswith("jobs jobs"))
