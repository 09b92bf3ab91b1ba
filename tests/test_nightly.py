"""The recipes in `cluster/nightly/`: their commands parse, exit codes are handled, and no two runs go on at once."""

import ast
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from catdog import __version__, cli
from catdog.config import PredictConfig

PROJECT = Path(__file__).resolve().parents[1]
NIGHTLY = PROJECT / "cluster" / "nightly"
CATDOG = Path(sys.executable).parent / "catdog"


def predict_config(words: Sequence[str]) -> PredictConfig:
    """What the real parser makes of a command line, from `predict` on."""
    name, invocation = cli.parse(list(words))
    assert name == "predict"
    config = invocation.config
    assert isinstance(config, PredictConfig)
    return config


# nightly.sh


def stand_in(directory: Path, *codes: int) -> dict[str, str]:
    """An environment whose `catdog` ends with these exit codes, one after the other, and notes how it was called."""
    (directory / "codes").write_text("\n".join([*map(str, codes), ""]))
    (directory / "catdog").write_text(
        '#!/bin/sh\necho "$@" >> calls\ncode=$(head -n 1 codes)\nsed -i 1d codes\nexit "$code"\n'
    )
    (directory / "catdog").chmod(0o755)
    return {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "CATDOG_LOCK": str(directory / "lock"),
        "CATDOG_PAUSE_S": "0",
    }


@pytest.mark.parametrize(
    ("codes", "exit_code", "num_calls"),
    [
        ([0], 0, 1),
        ([1, 0], 0, 2),
        ([137, 1, 0], 0, 3),
        ([1, 1, 1], 1, 3),
        ([1, 3], 3, 2),
        ([2], 2, 1),
        ([3], 3, 1),
        ([143], 143, 1),
    ],
)
def test_the_script_tries_again_where_that_helps(
    tmp_path: Path, codes: list[int], exit_code: int, num_calls: int
) -> None:
    command = [str(NIGHTLY / "nightly.sh"), "--images", "my photos", "--output", "out"]
    environment = stand_in(tmp_path, *codes)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == exit_code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["predict --images my photos --output out"] * num_calls
    assert bool(run.stderr) == (codes != [0])
    if exit_code == 3:
        assert "too many images failed" in run.stderr


def test_a_second_script_at_once_ends_with_a_code_of_its_own(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, 0)
    command = [str(NIGHTLY / "nightly.sh"), "--images", "p", "--output", "out"]
    holder = ["flock", environment["CATDOG_LOCK"], *command]
    run = subprocess.run(holder, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 75
    assert "another run holds" in run.stderr
    assert not (tmp_path / "calls").exists()


def test_scripts_with_other_arguments_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Two cameras, two outputs, one machine: a common lock would leave one of them without labels every night."""
    environment = stand_in(tmp_path, 0) | {"XDG_RUNTIME_DIR": str(tmp_path)}
    del environment["CATDOG_LOCK"]
    (tmp_path / "catdog").write_text(
        f"#!/bin/sh\necho $5 >> calls\n[ $5 = two ] || exec {NIGHTLY}/nightly.sh --images p --output two\n"
    )
    command = [str(NIGHTLY / "nightly.sh"), "--images", "p", "--output"]
    run = subprocess.run([*command, "one"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert (tmp_path / "calls").read_text() == "one\ntwo\n"


def test_a_signal_to_the_script_reaches_what_it_started(tmp_path: Path) -> None:
    """Else a stopped container, or a supervisor, would leave a run that nobody stops."""
    environment = stand_in(tmp_path)
    (tmp_path / "catdog").write_text(
        "#!/bin/sh\ntrap 'echo told >> calls; exit 143' TERM\necho started\nwhile :; do sleep 0.1; done\n"
    )
    command = [str(NIGHTLY / "nightly.sh"), "--images", "p", "--output", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "started\n"
        script.send_signal(signal.SIGTERM)
        _, said = script.communicate(timeout=60)
    assert script.returncode == 143
    assert "nightly: failed with exit code 143" in said
    assert (tmp_path / "calls").read_text() == "told\n"


def test_a_signal_between_two_tries_ends_the_script(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, 1, 0) | {"CATDOG_PAUSE_S": "60"}
    command = [str(NIGHTLY / "nightly.sh"), "--images", "p", "--output", "out"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as script:
        assert script.stderr is not None
        assert script.stderr.readline() == "nightly: try 1 ended with exit code 1\n"
        script.send_signal(signal.SIGTERM)
        assert script.wait(20) == 143
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_all_tries_count_the_deadline_from_the_first_one(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, 1, 0)
    (tmp_path / "catdog").write_text(
        '#!/bin/sh\necho "$CATDOG_BEGIN" >> calls\ncode=$(head -n 1 codes)\nsed -i 1d codes\nexit "$code"\n'
    )
    before = int(time.time())
    subprocess.run([str(NIGHTLY / "nightly.sh")], cwd=tmp_path, env=environment, timeout=60, check=True)
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first == second
    assert before <= int(first) <= time.time()


def test_the_script_starts_the_real_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{CATDOG.parent}:{os.environ['PATH']}", "CATDOG_LOCK": str(tmp_path / "lock")}
    command = [str(NIGHTLY / "nightly.sh"), "--images", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert "error: " in run.stderr
    assert "nightly: bad usage" in run.stderr


# systemd


def unit(name: str) -> dict[str, list[str]]:
    """`Section.Key` → its values."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (NIGHTLY / name).read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


def test_the_service_labels_and_tries_again_only_after_a_crash() -> None:
    service = unit("catdog-nightly.service")
    (command,) = service["Service.ExecStart"]
    config = predict_config(shlex.split(command)[1:])
    assert config.output in service["Service.ReadWritePaths"]
    assert service["Service.RestartPreventExitStatus"] == ["2 3"]
    assert service["Service.Restart"] == ["on-failure"]
    assert service["Service.Type"] == ["oneshot"]
    assert service["Service.KillMode"] == ["mixed"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, which is not here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for path in NIGHTLY.glob("catdog-nightly.*"):
        text = path.read_text().replace("/opt/catdog/bin/catdog", str(CATDOG)).replace("User=catdog", "User=root")
        (tmp_path / path.name).write_text(text)
    units = [str(path) for path in sorted(tmp_path.iterdir())]
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    complaints = [line for line in run.stderr.splitlines() if "catdog-nightly" in line]
    assert complaints == []
    (calendar,) = unit("catdog-nightly.timer")["Timer.OnCalendar"]
    assert subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, timeout=60).returncode == 0


# cron, Airflow, Argo


CRON_FIELD = r"(\*|\d+(-\d+)?)(/\d+)?(,(\*|\d+(-\d+)?)(/\d+)?)*"


def is_schedule(text: str) -> bool:
    """Whether a text is five fields of cron, each within its limits."""
    limits = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]
    fields = text.split()
    return len(fields) == len(limits) and all(
        re.fullmatch(CRON_FIELD, field) and all(low <= int(number) <= high for number in re.findall(r"\d+", field))
        for field, (low, high) in zip(fields, limits, strict=True)
    )


def script_config(command: str) -> PredictConfig:
    """What the real parser makes of a command line of `nightly.sh`."""
    program, *arguments = shlex.split(command)
    assert program == "/opt/catdog/cluster/nightly/nightly.sh"
    return predict_config(["predict", *arguments])


def test_the_crontab_is_one() -> None:
    lines = [line for line in (NIGHTLY / "catdog.cron").read_text().splitlines() if not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines[:-1])
    assert settings["PATH"].startswith("/opt/catdog/bin:")
    *schedule, user, command = lines[-1].split(maxsplit=6)
    assert is_schedule(" ".join(schedule))
    assert user == "catdog"
    assert "%" not in command  # cron would make a line break of it
    assert script_config(command).allow_empty


def test_what_is_no_schedule_is_seen() -> None:
    assert not is_schedule("0 25 * * *")
    assert not is_schedule("0 2 * *")


def test_the_dag_runs_the_script_and_never_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file itself, with a stand-in for the two names that it has from Airflow, which is too large to install."""
    path = NIGHTLY / "airflow_dag.py"
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module: [name.name for name in node.names] for node in imported} == {
        "datetime": ["datetime", "timedelta"],
        "airflow.sdk": ["dag", "task"],
    }
    said: dict[str, Any] = {}

    def noting(**settings: Any) -> Any:
        def decorate(function: Any) -> Any:
            @functools.wraps(function)
            def call() -> None:
                said[function.__name__] = settings | {"returned": function()}

            return call

        return decorate

    sdk: Any = types.ModuleType("airflow.sdk")
    sdk.dag, sdk.task = noting, types.SimpleNamespace(bash=noting)
    monkeypatch.setitem(sys.modules, "airflow", types.ModuleType("airflow"))
    monkeypatch.setitem(sys.modules, "airflow.sdk", sdk)
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "dag"})
    nightly, label = said["catdog_nightly"], said["label"]
    assert (nightly["max_active_runs"], nightly["catchup"]) == (1, False)
    assert is_schedule(nightly["schedule"])
    assert label["retries"] == 0
    assert script_config(label["returned"]).output == "s3://bucket/predictions"


def test_the_cron_workflow_is_fenced_in_and_never_twice() -> None:
    workflow = yaml.safe_load((NIGHTLY / "argo-cronworkflow.yaml").read_text())
    assert (workflow["apiVersion"], workflow["kind"]) == ("argoproj.io/v1alpha1", "CronWorkflow")
    spec = workflow["spec"]
    assert set(spec) == {
        *("schedules", "timezone", "concurrencyPolicy", "startingDeadlineSeconds"),
        *("successfulJobsHistoryLimit", "failedJobsHistoryLimit", "workflowSpec"),
    }
    assert all(map(is_schedule, spec["schedules"]))
    assert spec["concurrencyPolicy"] == "Forbid"
    (template,) = spec["workflowSpec"]["templates"]
    assert spec["workflowSpec"]["entrypoint"] == template["name"]
    retry = template["retryStrategy"]
    assert set(retry) == {"limit", "retryPolicy", "expression", "backoff"}
    assert retry["expression"] == "!(lastRetry.exitCode in ['2', '3'])"
    container = template["container"]
    assert container["image"] == f"catdog:{__version__}-labelling"
    assert container["command"] == ["catdog"]
    assert predict_config(container["args"]).executor == "inline"
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert spec["workflowSpec"]["securityContext"]["runAsNonRoot"] is True
