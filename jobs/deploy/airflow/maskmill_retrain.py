"""A retraining every night, by Airflow 3: put this file into its folder of DAGs, and adapt FOLDER.

The task runs on the worker of Airflow. To run it on a Ray cluster instead, let COMMAND begin with
``maskmill submit --address http://HEAD:8265 --again retrain``: the exit status is the same.
"""

from __future__ import annotations

import datetime

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

FOLDER = "/srv/pets"
"""Has retrain.yaml in it, and MaskMill's environment."""

COMMAND = ".venv/bin/maskmill retrain retrain.yaml"

REFUSED = 3
"""Exit status of a candidate that did not pass: the task is skipped, rather than failed and tried again."""

with DAG(
    dag_id="maskmill_retrain",
    description="Label what is new, train, and promote the better model",
    schedule="17 3 * * *",
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    catchup=False,
    max_active_runs=1,
    tags=["maskmill"],
):
    BashOperator(
        task_id="retrain",
        bash_command=COMMAND,
        cwd=FOLDER,
        append_env=True,
        skip_on_exit_code=REFUSED,
        retries=2,
        retry_delay=datetime.timedelta(minutes=10),
        execution_timeout=datetime.timedelta(hours=20),
    )
