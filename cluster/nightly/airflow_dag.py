"""A DAG of Airflow 3 that labels what is new every night. Copy it to the folder of the DAGs.

The task is `nightly.sh`, on a worker that has catdog installed. The script tries again after a crash, and not where
that is of no use. So Airflow itself has no retries. `max_active_runs` keeps two nights from running at once.
"""

from datetime import datetime, timedelta

from airflow.sdk import dag, task

COMMAND = (
    "/opt/catdog/cluster/nightly/nightly.sh"
    " --images s3://bucket/photographs --output s3://bucket/predictions --allow-empty"
)


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=20),
    tags=["catdog"],
)
def catdog_nightly() -> None:
    """Label what is new."""

    @task.bash(retries=0, append_env=True, env={"PATH": "/opt/catdog/bin:/usr/local/bin:/usr/bin:/bin"})
    def label() -> str:
        return COMMAND

    label()


catdog_nightly()
