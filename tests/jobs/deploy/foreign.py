"""Runs in the environment of requirements-deploy.txt: other programs look at deployment files."""

from __future__ import annotations

import json
import sys
from typing import Any


def kubernetes(path: str) -> list[dict[str, Any]]:
    """Each manifest's kind, and what is wrong with it by the schemas of Kubernetes."""
    import kubernetes_validate
    import yaml

    told = []
    with open(path) as file:
        for manifest in yaml.safe_load_all(file):
            error = ""
            try:
                kubernetes_validate.validate(manifest, "1.34", strict=True)
            except kubernetes_validate.ValidationError as problem:
                error = problem.message
            told.append({"kind": manifest["kind"], "error": error})
    return told


def airflow(folder: str) -> dict[str, Any]:
    """The DAGs of a folder, as Airflow reads them."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=folder)
    return {
        "errors": {str(path): str(error) for path, error in bag.import_errors.items()},
        "dags": {
            name: {
                "catchup": dag.catchup,
                "max_active_runs": dag.max_active_runs,
                "schedule": dag.schedule,
                "tasks": {
                    task.task_id: {
                        "kind": type(task).__name__,
                        "command": task.bash_command,
                        "skip_on_exit_code": list(task.skip_on_exit_code),
                        "retries": task.retries,
                    }
                    for task in dag.tasks
                },
            }
            for name, dag in bag.dags.items()
        },
    }


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    print(json.dumps({"kubernetes": kubernetes, "airflow": airflow}[name](*rest)))
