"""The manifests, built by kustomize: against the operator's schemas, and against what comments promise."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from jobs.cli import parse
from pipeline.retraining.config import read_config
from tests.jobs.deploy.deployments import run_deployer

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "jobs/deploy/kubernetes"
CRDS = ROOT.parent / "shared/data/kuberay_crds"
KUBECTL = shutil.which("kubectl")
OVERLAYS = ("retrain-gpu", "retrain-cpu", "retrain-raycronjob", "label-gpu")
SECRETS = (
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"(?i)(?:secret|password|token|api_?key)\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+=_]{16,}",
    r"(?<![A-Za-z0-9/+=])[A-Za-z0-9+]{40}(?![A-Za-z0-9/+=])",
    r"\b\d{12}\b",
    r"-----BEGIN",
)
Manifest = dict[str, Any]


@functools.cache
def built(overlay: str) -> str:
    if KUBECTL is None:
        pytest.skip("no kubectl on this machine, which has kustomize in it")
    done = subprocess.run(
        [KUBECTL, "kustomize", FOLDER / "overlays" / overlay], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifests(overlay: str) -> list[Manifest]:
    return list(yaml.safe_load_all(built(overlay)))


def one(overlay: str, kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests(overlay) if manifest["kind"] == kind]
    return found


def job_of(overlay: str) -> Manifest:
    """The spec of the overlay's Ray job."""
    if overlay == "retrain-raycronjob":
        return one(overlay, "RayCronJob")["spec"]["jobTemplate"]
    return one(overlay, "RayJob")["spec"]


def pods(overlay: str) -> dict[str, Manifest]:
    """The spec of every kind of pod that an overlay starts, by what it is."""
    job = job_of(overlay)
    cluster = job["rayClusterSpec"]
    found = {
        "submitter": job["submitterPodTemplate"]["spec"],
        "head": cluster["headGroupSpec"]["template"]["spec"],
        **{group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]},
    }
    for manifest in manifests(overlay):
        if manifest["kind"] == "CronJob":
            found["schedule"] = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return found


@functools.cache
def schema_of(kind: str) -> Manifest:
    if not CRDS.is_dir():
        pytest.skip(f"needs the operator's schemas in {CRDS}")
    text = (CRDS / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [entry for entry in definition["spec"]["versions"] if entry["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """A schema that refuses fields which it does not know: a cluster drops them without a word."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    known = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if known and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


def check(manifest: Manifest) -> None:
    schema = copy.deepcopy(schema_of(manifest["kind"]))
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_manifests_obey_the_operators_schemas(overlay: str) -> None:
    found = [manifest for manifest in manifests(overlay) if manifest["apiVersion"].startswith("ray.io/")]
    assert len(found) == 1
    check(found[0])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/backofLimit", 1),
        ("spec/backoffLimit", "1"),
        ("spec/rayClusterSpec/authOptions/mode", "tokens"),
        ("spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/securityContext/runAsUsr", 1),
        ("spec/rayClusterSpec/workerGroupSpecs/0/minimum", 1),
    ],
)
def test_the_check_finds_faults(path: str, value: object) -> None:
    manifest = one("retrain-gpu", "RayJob")
    check(manifest)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = manifest
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_other_manifests_obey_kubernetes_schemas(overlay: str, tmp_path: Path) -> None:
    core = [manifest for manifest in manifests(overlay) if not manifest["apiVersion"].startswith("ray.io/")]
    assert core
    (tmp_path / "core.yaml").write_text(yaml.safe_dump_all(core))
    told = run_deployer("kubernetes", str(tmp_path / "core.yaml"))
    assert [entry["kind"] for entry in told] == [manifest["kind"] for manifest in core]
    assert [entry for entry in told if entry["error"]] == []
    broken = copy.deepcopy(core[0])
    broken["metadta"] = {}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    assert "metadta" in run_deployer("kubernetes", str(tmp_path / "broken.yaml"))[0]["error"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_has_more_rights_than_it_needs(overlay: str) -> None:
    found = pods(overlay)
    assert {"submitter", "head", "cpu"} <= set(found)
    for name, pod in found.items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
        # The schedule alone speaks to Kubernetes.
        assert pod.get("automountServiceAccountToken", True) is (name == "schedule"), name
        assert pod["serviceAccountName"] == ("maskmill-schedule" if name == "schedule" else "maskmill")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_wants_a_token_and_is_not_exposed(overlay: str) -> None:
    cluster = job_of(overlay)["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not {"Service", "Ingress", "Route", "Secret"} & {item["kind"] for item in manifests(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_have_tags_and_the_one_to_fill_in_is_found(overlay: str) -> None:
    images = {container["image"] for pod in pods(overlay).values() for container in pod["containers"]}
    for image in images:
        _, colon, tag = image.rpartition(":")
        assert colon and "/" not in tag and tag != "latest", image
    assert "registry.example.com/maskmill:replace-me" in images
    assert len(images) == (2 if overlay in ("retrain-gpu", "retrain-cpu") else 1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references(overlay: str) -> None:
    for pattern in SECRETS:
        assert not re.search(pattern, built(overlay)), pattern
    for name, pod in pods(overlay).items():
        if name in ("submitter", "schedule"):
            continue
        (container,) = pod["containers"]
        entries = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"]}
        assert entries["MLFLOW_TRACKING_URI"] == {"name": "maskmill", "key": "tracking-uri"}
        assert all(entries[name]["optional"] for name in ("MLFLOW_TRACKING_TOKEN", "MASKMILL_WEBHOOK"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_counts_the_cpus_that_a_pod_asks_for(overlay: str) -> None:
    for group in job_of(overlay)["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        assert group["rayStartParams"]["num-cpus"] == container["resources"]["requests"]["cpu"]
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) is (group["groupName"] == "gpu")


def test_the_overlays_differ_in_what_their_names_say() -> None:
    groups = {
        overlay: [group["groupName"] for group in job_of(overlay)["rayClusterSpec"]["workerGroupSpecs"]]
        for overlay in OVERLAYS
    }
    assert groups == {
        "retrain-gpu": ["cpu", "gpu"],
        "retrain-cpu": ["cpu"],
        "retrain-raycronjob": ["cpu", "gpu"],
        "label-gpu": ["cpu", "gpu"],
    }
    for overlay in OVERLAYS:
        for name, pod in pods(overlay).items():
            if name in ("cpu", "gpu"):
                assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
                assert {"key": "spot", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
            if name == "head":
                assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
        accounts = {
            item["metadata"]["name"]: item for item in manifests(overlay) if item["kind"] == "ServiceAccount"
        }
        assert "role-arn" in str(accounts["maskmill"]["metadata"]["annotations"])
        assert all(
            "annotations" not in item["metadata"] for name, item in accounts.items() if name != "maskmill"
        )


def test_both_schedules_run_the_same_job() -> None:
    pattern, template = job_of("retrain-gpu"), job_of("retrain-raycronjob")
    assert pattern.pop("suspend") is True and template.pop("suspend") is False
    assert pattern == template
    plain, alpha = one("retrain-gpu", "CronJob")["spec"], one("retrain-raycronjob", "RayCronJob")["spec"]
    assert all(plain[name] == alpha[name] for name in ("schedule", "timeZone"))
    assert (
        "feature gate RayCronJob" in (FOLDER / "overlays/retrain-raycronjob/kustomization.yaml").read_text()
    )


def test_runs_do_not_overlap_and_deadlines_fit_together() -> None:
    schedule, job = one("retrain-gpu", "CronJob")["spec"], job_of("retrain-gpu")
    assert schedule["concurrencyPolicy"] == "Forbid" and schedule["startingDeadlineSeconds"] > 0
    assert schedule["successfulJobsHistoryLimit"] > 0 and schedule["failedJobsHistoryLimit"] > 0
    tries = job["backoffLimit"] + 1
    assert schedule["jobTemplate"]["spec"]["activeDeadlineSeconds"] > tries * job["activeDeadlineSeconds"]
    config = yaml.safe_load(one("retrain-gpu", "ConfigMap")["data"]["retrain.yaml"])
    assert config["when"]["budget"]["hours"] * 3600 < job["activeDeadlineSeconds"]
    assert job["suspend"] and job["shutdownAfterJobFinishes"]  # the operator refuses to suspend others


def test_the_retraining_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")  # as the Secret sets it
    config = read_config(FOLDER / "retrain/retrain.yaml")
    assert config.output.startswith("s3://") and config.images.startswith("s3://")
    assert config.tracking is None and config.address is None  # from the environment of the pod
    assert one("retrain-gpu", "ConfigMap")["data"] == {
        "retrain.yaml": (FOLDER / "retrain/retrain.yaml").read_text()
    }


def test_the_schedule_may_read_and_make_ray_jobs_and_nothing_else() -> None:
    assert one("retrain-gpu", "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}
    ]
    binding = one("retrain-gpu", "RoleBinding")
    assert binding["roleRef"]["name"] == "maskmill-schedule"
    # Kubernetes refuses an account without its namespace here, whatever its schema says.
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "maskmill-schedule", "namespace": "maskmill"}
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_one_namespace(overlay: str) -> None:
    assert {manifest["metadata"]["namespace"] for manifest in manifests(overlay)} == {"maskmill"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_entrypoint_is_one_command_of_maskmill(overlay: str) -> None:
    entrypoint = job_of(overlay)["entrypoint"]
    # A shell reads it, on the submitter and on the head.
    assert not re.search(r"[;&|<>$`\\\n\"]", entrypoint)
    words = subprocess.run(
        ["/bin/sh", "-c", f"for word in {entrypoint}; do echo \"$word\"; done"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[0] == "maskmill" and parse(words[1:])


class Kubernetes:
    """As much of an API server as kubectl asks for to read and make RayJobs."""

    def __init__(self, pattern: Manifest, outcomes: list[tuple[str, str]]) -> None:
        self.jobs = {pattern["metadata"]["name"]: pattern}
        self.made: list[Manifest] = []
        self.refusals = 0
        self._outcomes = outcomes
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer(*outer.get(self.path.partition("?")[0]))

            def do_POST(self) -> None:
                made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*outer.create(made))

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def get(self, path: str) -> tuple[int, object]:
        resource = {"name": "rayjobs", "singularName": "rayjob", "namespaced": True, "kind": "RayJob",
                    "verbs": ["get", "create"]}  # fmt: skip
        group = {"groupVersion": "ray.io/v1", "version": "v1"}
        fixed: dict[str, object] = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {
                "kind": "APIGroupList",
                "groups": [{"name": "ray.io", "versions": [group], "preferredVersion": group}],
            },
            "/apis/ray.io/v1": {
                "kind": "APIResourceList", "groupVersion": "ray.io/v1", "resources": [resource],
            },
            "/openapi/v3": {"paths": {}},
        }  # fmt: skip
        if path in fixed:
            return 200, fixed[path]
        name = path.rpartition("/rayjobs/")[2]
        if name not in self.jobs:
            return 404, self._status(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
        found = self.jobs[name]
        if found in self.made and self._outcomes:
            deployment, status = self._outcomes.pop(0)
            found["status"] = {"jobDeploymentStatus": deployment, "jobStatus": status, "reason": "AppFailed",
                               "message": "exit status 1"}  # fmt: skip
        return 200, found

    def create(self, manifest: Manifest) -> tuple[int, object]:
        name = manifest["metadata"]["name"]
        if name in self.jobs:
            self.refusals += 1
            return 409, self._status(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        self.jobs[name] = manifest
        self.made.append(manifest)
        return 201, manifest

    @staticmethod
    def _status(code: int, reason: str, message: str) -> object:
        return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                "message": message}  # fmt: skip


@pytest.fixture
def schedule(tmp_path: Path) -> Iterator[Callable[..., tuple[int, str, Kubernetes]]]:
    """Run the CronJob's own script with kubectl, against a server that knows the suspended RayJob."""
    servers: list[Kubernetes] = []

    def run(*outcomes: tuple[str, str], times: int = 1) -> tuple[int, str, Kubernetes]:
        cluster = Kubernetes(one("retrain-gpu", "RayJob"), list(outcomes))
        servers.append(cluster)
        (container,) = pods("retrain-gpu")["schedule"]["containers"]
        (tmp_path / "config").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here",
                          "cluster": {"server": f"http://127.0.0.1:{cluster.server.server_port}"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "namespace": "mill", "user": "me"}}],
            "users": [{"name": "me", "user": {}}],
        }))  # fmt: skip
        own = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        environment = {
            **own, "PATH": os.environ["PATH"], "KUBECONFIG": str(tmp_path / "config"), "HOME": str(tmp_path),
            "JOB": "maskmill-retrain-29412345", "JOB_UID": "0123-abcd", "EVERY_S": "0.1",
        }  # fmt: skip
        for _ in range(times):
            done = subprocess.run(
                [*container["command"], *container["args"]], env=environment, capture_output=True, text=True,
                timeout=240, check=False,
            )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, cluster

    yield run
    for cluster in servers:
        cluster.server.shutdown()
        cluster.server.server_close()


def test_the_schedule_makes_one_ray_job_and_waits_for_it(
    schedule: Callable[..., tuple[int, str, Kubernetes]],
) -> None:
    status, said, cluster = schedule(
        ("", ""),
        ("Initializing", ""),
        ("Running", "RUNNING"),
        ("Retrying", "FAILED"),
        ("Complete", "SUCCEEDED"),
    )
    assert status == 0, said
    (made,) = cluster.made
    assert made["metadata"]["name"] == "maskmill-retrain-29412345"
    assert made["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "maskmill-retrain-29412345", "uid": "0123-abcd"}
    ]
    pattern = one("retrain-gpu", "RayJob")["spec"]
    assert made["spec"] == pattern | {"suspend": False}
    check({key: value for key, value in made.items() if key != "status"})


def test_a_pod_that_starts_again_makes_no_second_ray_job(
    schedule: Callable[..., tuple[int, str, Kubernetes]],
) -> None:
    status, said, cluster = schedule(("Complete", "SUCCEEDED"), times=2)
    assert status == 0 and "already exists" in said
    assert len(cluster.made) == 1 and cluster.refusals == 1


@pytest.mark.slow
@pytest.mark.parametrize("state", [("Failed", "FAILED"), ("ValidationFailed", ""), ("Complete", "STOPPED")])
def test_a_ray_job_that_failed_is_not_made_again(
    schedule: Callable[..., tuple[int, str, Kubernetes]], state: tuple[str, str]
) -> None:
    status, said, _ = schedule(("Running", "RUNNING"), state)
    rules = one("retrain-gpu", "CronJob")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert {"action": "FailJob", "onExitCodes": {"containerName": "schedule", "operator": "In",
                                                 "values": [status]}} in rules, said  # fmt: skip
    assert "exit status 1" in said
