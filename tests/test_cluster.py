"""The manifests in `cluster/`: valid by KubeRay's and Ray's own schemas, agreeing with each other and the package."""

import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import SHARED
from packaging.requirements import Requirement

from catdog import __version__, cli
from catdog.config import PredictConfig, ServeConfig, TrainConfig
from catdog.serving import token

PROJECT = Path(__file__).resolve().parents[1]
CLUSTER = PROJECT / "cluster"
CRDS = SHARED / "kuberay-crds"
RAY_OBJECTS = ["raycluster.yaml", "rayjob-train.yaml", "rayjob-predict.yaml", "rayservice.yaml", "cronjob-nightly.yaml"]
RAY_PODS = ["ray-head", "ray-worker"]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def nightly(kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents("cronjob-nightly.yaml") if document["kind"] == kind)
    return found


def ray_object(name: str) -> dict[str, Any]:
    """The RayCluster, RayJob or RayService of a manifest; the nightly one is text in a ConfigMap."""
    if name == "cronjob-nightly.yaml":
        embedded: dict[str, Any] = yaml.safe_load(nightly("ConfigMap")["data"]["rayjob.yaml"])
        return embedded
    (document,) = documents(name)
    return document


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = ray_object(name)["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))
    return cluster


def pod_templates(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """Every container anywhere under `value`."""
    if isinstance(value, dict):
        yield from value.get("containers", [])
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from containers(child)


def strict(schema: Any) -> Any:
    """An openAPIV3Schema as a strict API server applies it: defaults are filled in first, unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
        closed["additionalProperties"] = closed.get("additionalProperties", bool(keeps_unknown))
        closed["required"] = [name for name in schema.get("required", ()) if "default" not in properties[name]]
    return closed


@functools.cache
def crd_schema(kind: str) -> dict[str, Any]:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip("needs KubeRay's CustomResourceDefinitions in ../shared/kuberay-crds, which are not here")
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)
    (served,) = (item for item in crd["spec"]["versions"] if item["name"] == "v1")
    schema: dict[str, Any] = strict(served["schema"]["openAPIV3Schema"])
    # The API server knows these itself; the definitions only say that they are there.
    schema["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return schema


def errors(instance: Any, schema: dict[str, Any]) -> list[str]:
    """Short texts: jsonschema's own quote the whole schema."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(instance)
    return [f"{error.json_path}: {error.message}" for error in found]


@pytest.mark.parametrize("name", RAY_OBJECTS)
def test_manifest_is_valid_and_has_no_unknown_field(name: str) -> None:
    manifest = ray_object(name)
    assert errors(manifest, crd_schema(manifest["kind"])) == []


def test_validation_sees_what_is_wrong() -> None:
    manifest = ray_object("rayjob-train.yaml")
    group = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["replica"] = 2
    group["template"]["spec"]["containers"][0]["image"] = 1
    where = "$.spec.rayClusterSpec.workerGroupSpecs[0]"
    assert errors(manifest, crd_schema("RayJob")) == [
        f"{where}.template.spec.containers[0].image: 1 is not of type 'string'",
        f"{where}: Additional properties are not allowed ('replica' was unexpected)",
    ]


def test_the_nightly_job_is_the_predict_job() -> None:
    assert ray_object("cronjob-nightly.yaml")["spec"] == ray_object("rayjob-predict.yaml")["spec"]


def test_the_cron_jobs_pod_is_valid() -> None:
    submitter = crd_schema("RayJob")["properties"]["spec"]["properties"]["submitterPodTemplate"]
    assert errors(nightly("CronJob")["spec"]["jobTemplate"]["spec"]["template"], submitter) == []


def test_the_cron_job_may_create_rayjobs_one_at_a_time() -> None:
    cron = nightly("CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = nightly("ServiceAccount")["metadata"]["name"]
    binding = nightly("RoleBinding")
    assert cron["apiVersion"] == "batch/v1"
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert pod["serviceAccountName"] == account
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert binding["roleRef"]["name"] == nightly("Role")["metadata"]["name"]
    assert nightly("Role")["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert pod["volumes"] == [{"name": "nightly", "configMap": {"name": nightly("ConfigMap")["metadata"]["name"]}}]
    script = nightly("ConfigMap")["data"]["run.sh"]
    used = set(re.findall(r"kubectl (\w+)", script))
    assert used == {"create", "get"}
    assert pod["containers"][0]["command"] == ["/bin/sh", "/nightly/run.sh"]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "nightly", "mountPath": "/nightly"}]


@pytest.mark.parametrize(
    ("states", "exit_code"),
    [
        (["", "Initializing ", "Running RUNNING", "Complete SUCCEEDED"], 0),
        (["Running RUNNING", "Failed FAILED"], 1),
        (["ValidationFailed "], 1),
    ],
)
def test_the_nightly_script_waits_and_tells_how_it_went(tmp_path: Path, states: list[str], exit_code: int) -> None:
    """The script itself, with a stand-in for the one thing that is not here: a Kubernetes cluster."""
    (tmp_path / "states").write_text("\n".join([*states, ""]))
    stand_ins = {
        "kubectl": """case "$1" in
            create) echo rayjob.ray.io/catdog-nightly-x ;;
            get) head -n 1 states; sed -i 1d states ;;
            esac""",
        "sleep": "true",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = nightly("ConfigMap")["data"]["run.sh"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert run.returncode == exit_code
    assert run.stdout.decode().splitlines() == [
        "created rayjob.ray.io/catdog-nightly-x",
        f"rayjob.ray.io/catdog-nightly-x: {states[-1]}",
    ]
    assert run.stderr == b""


def entrypoint_config(name: str) -> Any:
    """What the real parser makes of a RayJob's command."""
    program, *arguments = shlex.split(ray_object(name)["spec"]["entrypoint"])
    assert program == "catdog"
    parsed, invocation = cli.parse(arguments)
    assert parsed == arguments[0]
    return invocation.config


def test_the_predict_jobs_command_parses() -> None:
    assert isinstance(entrypoint_config("rayjob-predict.yaml"), PredictConfig)


def test_the_train_job_fits_its_cluster() -> None:
    config = entrypoint_config("rayjob-train.yaml")
    assert isinstance(config, TrainConfig)
    (group,) = (group for group in cluster_spec("rayjob-train.yaml")["workerGroupSpecs"] if group["replicas"])
    assert group["replicas"] == config.num_workers
    # Each pod holds one training worker, and has CPU to spare for the tasks that feed it.
    cpus_per_pod = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.cpus_per_worker < cpus_per_pod < 2 * config.cpus_per_worker


def serve_config() -> Any:
    return yaml.safe_load(ray_object("rayservice.yaml")["spec"]["serveConfigV2"])


def test_the_service_labels_with_the_model_of_the_nightly_job_and_fits_its_cluster() -> None:
    (application,) = serve_config()["applications"]
    config = ServeConfig(**application["args"])
    assert config.model == entrypoint_config("cronjob-nightly.yaml").model
    (group,) = cluster_spec("rayservice.yaml")["workerGroupSpecs"]
    assert group["replicas"] == config.num_replicas
    (container,) = group["template"]["spec"]["containers"]
    assert config.cpus_per_replica < int(container["resources"]["limits"]["cpu"])  # Serve's proxy needs one, too
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports["serve"] == serve_config()["http_options"]["port"]
    for pod in pod_templates("rayservice.yaml"):
        assert pod["containers"][0]["env"][0]["name"] == token.VARIABLE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # Ray's own
def test_serve_takes_the_services_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    from catdog.serving import ray_serve

    schema = ServeDeploySchema.model_validate(serve_config())
    (application,) = schema.applications
    module, _, function = application.import_path.partition(":")
    assert (module, getattr(ray_serve, function)) == (ray_serve.__name__, ray_serve.application)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / "compose.yaml").read_text())
    return found["services"]  # type: ignore[no-any-return]


def test_the_services_of_one_machine_share_a_model() -> None:
    configs = {}
    for name, service in compose().items():
        program, *arguments = service["command"]
        assert program == "catdog"
        _, invocation = cli.parse(arguments)
        configs[name] = invocation.config
        assert service["image"] == f"catdog:{__version__}-labelling"
        assert service["user"] != "0"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["volumes"][0].endswith("}:/data:ro")
    serve, nightly_job = configs["serve"], configs["nightly"]
    assert serve.model == nightly_job.model
    assert (serve.host, serve.port) == ("0.0.0.0", 8000)
    assert int(compose()["serve"]["stop_grace_period"].removesuffix("s")) > serve.drain_s
    assert token.VARIABLE in compose()["serve"]["environment"]


@pytest.mark.parametrize("name", RAY_OBJECTS)
def test_every_ray_pod_is_fenced_in(name: str) -> None:
    for spec in pod_templates(name):
        (container,) = spec["containers"]
        assert container["name"] in RAY_PODS
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        # Docker's 64 MB would make Ray's object store fall back to disk.
        (mounted,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        (shm,) = (volume for volume in spec["volumes"] if volume["name"] == mounted)
        assert shm["emptyDir"]["medium"] == "Memory"
        assert container["envFrom"] == [{"secretRef": {"name": "catdog-s3"}}]
    assert cluster_spec(name)["authOptions"] == {"mode": "token"}


def test_one_ray_version_everywhere() -> None:
    pins = dict(line.split("==") for line in constraints())
    stated = {
        "installed": version("ray"),
        "constraints.txt": pins["ray"],
        **{name: cluster_spec(name)["rayVersion"] for name in RAY_OBJECTS},
    }
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py311 AS", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert {**stated, "Dockerfile": base} == dict.fromkeys([*stated, "Dockerfile"], version("ray"))
    allowed = [requirement for requirement in requirements() if requirement.name == "ray"]
    assert {extra for requirement in allowed for extra in requirement.extras} == {
        "data",
        "default",
        "serve",
        "train",
        "tune",
    }
    assert all(requirement.specifier.contains(version("ray")) for requirement in allowed)


def test_images_carry_this_version() -> None:
    images = {container["image"] for name in RAY_OBJECTS for container in containers(ray_object(name))}
    ray_up = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    images |= {ray_up["docker"]["image"], ray_up["available_node_types"]["gpu"]["docker"]["worker_image"]}
    assert images == {f"catdog:{__version__}", f"catdog:{__version__}-gpu"}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert all(f"--tag {image} " in dockerfile for image in images)
    tagged = re.findall(r"--target (\w+) --tag (\S+) \.$", dockerfile, re.MULTILINE)
    assert [target for target, _ in tagged] == re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)
    assert {tag.split("-")[0] for _, tag in tagged} == {f"catdog:{__version__}"}


def test_the_labelling_image_holds_no_tensorflow() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    installed = dict(re.findall(r"^FROM \S+ AS (\w+)$.*?^(RUN pip install .*?)$", dockerfile, re.MULTILINE | re.DOTALL))
    assert re.findall(r"\.\[([\w,-]+)\]", installed["labelling"]) == ["heif,serve-ray"]
    assert "tensorflow" not in installed["labelling"]
    assert re.findall(r"\.\[([\w,-]+)\]", installed["cpu"]) == ["train,efficientnet-lite"]
    assert {"ray", "train", "efficientnet-lite"} <= extras().keys()
    listed = [*dependencies(), *extras()["heif"], *extras()["ray"], *extras()["serve"], *extras()["serve-ray"]]
    names = {requirement.name for requirement in map(Requirement, listed)}
    assert not names & {"tensorflow", "keras"}


def test_no_image_floats() -> None:
    (cron_container,) = containers(nightly("CronJob"))
    tags = re.findall(r"(?:image: (?:&\w+ )?|worker_image: |FROM )(\S+/?\S*:\S+)", all_text())
    assert cron_container["image"] in tags
    assert not [tag for tag in tags if tag.endswith(("latest", "nightly"))]


def all_text() -> str:
    return "\n".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())


def test_ray_up_file_is_valid() -> None:
    ray = importlib.util.find_spec("ray")  # importing Ray would take long
    assert ray is not None
    assert ray.origin is not None
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    assert errors(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text()), schema) == []


def constraints() -> list[str]:
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return table


def dependencies() -> list[str]:
    return list(project()["dependencies"])


def extras() -> dict[str, list[str]]:
    return dict(project()["optional-dependencies"])


def requirements() -> list[Requirement]:
    """Of catdog and of all its extras, which may name each other: `catdog[ray]`."""
    listed = [*dependencies(), *itertools.chain.from_iterable(extras().values())]
    return [requirement for requirement in map(Requirement, listed) if requirement.name != "catdog"]


def test_constraints_are_exact_pins() -> None:
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_constraints_satisfy_the_package_and_are_what_is_installed() -> None:
    pins = {name.lower().replace("_", "-"): pin for name, pin in (line.split("==") for line in constraints())}
    not_installed = {str(Requirement(text)) for text in extras()["bench"]}  # by make, which installs all the others
    for requirement in requirements():
        pin = pins[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pin), requirement
        if str(requirement) not in not_installed:
            assert version(requirement.name) == pin
