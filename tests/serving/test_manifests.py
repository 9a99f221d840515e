"""The Kubernetes manifests, without a cluster: what they run can run, and schemas know every field of them.

Schemas come from packages, and those of KubeRay and of the Training Operator, which are in none, from files that
``kubectl get crd NAME -o yaml`` or a checkout of these projects gives:

    pip install kubernetes-validate kubeflow-trainer-api
    LIGHTNING_DUALPIPE_CRDS=crds/ python -m pytest tests/serving/test_manifests.py
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dualpipe.cli import main
from tests.marks import needs
from tests.serving.conftest import ROOT

FOLDER = ROOT / "examples" / "serving" / "kubernetes"
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
TRAINING = ["trainjob", "pytorchjob"]
KUBERNETES = "1.30"


def pods(manifest: Any) -> Iterator[dict[str, Any]]:
    """Specifications of pods, at any depth."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        for value in manifest.values():
            yield from pods(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pods(value)


def training_nodes(name: str) -> list[tuple[list[str], str, int]]:
    """Of each node: what it runs, the GPUs it asks for, and the processes that torchrun is to start."""
    spec = MANIFESTS[name]["spec"]
    if name == "trainjob":
        node = spec["trainer"]
        gpus = node["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
        return [(node["command"] + node["args"], gpus, node["numProcPerNode"])] * node["numNodes"]
    replicas = [replica for replica in spec["pytorchReplicaSpecs"].values() for _ in range(replica["replicas"])]
    containers = [replica["template"]["spec"]["containers"][0] for replica in replicas]
    return [
        (node["command"] + node["args"], node["resources"]["limits"]["nvidia.com/gpu"], int(spec["nprocPerNode"]))
        for node in containers
    ]


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_job_trains_is_what_the_command_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many processes as it starts, and a GPU for each."""
    nodes = training_nodes(name)
    assert all(node == nodes[0] for node in nodes)
    command, gpus, processes = nodes[0]
    assert command[0] == "torchrun"
    arguments = command[command.index("lightning-dualpipe") + 1 :]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lightning-dualpipe"])
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)

    assert config["trainer"]["num_nodes"] == len(nodes)
    assert int(config["trainer"]["devices"]) == processes == int(gpus)
    logger = config["trainer"]["logger"]["init_args"]
    assert config["ckpt_path"] == f"newest:{logger['save_dir']}/{logger['name']}"  # where this run's checkpoints are
    mounted = [mount["mountPath"] for pod in pods(MANIFESTS[name]) for mount in pod["containers"][0]["volumeMounts"]]
    assert {logger["save_dir"], config["data"]["init_args"]["path"]} <= set(mounted)


@pytest.mark.parametrize("name", MANIFESTS)
def test_what_is_mounted_is_a_volume_of_the_pod(name: str) -> None:
    assert list(pods(MANIFESTS[name]))
    for pod in pods(MANIFESTS[name]):
        mounts = [mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]]
        assert sorted(mounts) == sorted(volume["name"] for volume in pod["volumes"])


def test_ray_serves_the_same_way_on_a_laptop_and_on_a_cluster() -> None:
    laptop = yaml.safe_load((FOLDER.parent / "ray_serve.yaml").read_text())
    spec = MANIFESTS["rayservice"]["spec"]
    (ours,), (theirs,) = laptop["applications"], yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert {**ours, "args": None} == {**theirs, "args": None}

    (ours,), (theirs,) = ours["args"]["llm_configs"], theirs["args"]["llm_configs"]
    assert ours.keys() - theirs.keys() == {"accelerator_config", "runtime_env"}  # which say that there is no GPU
    assert ours["deployment_config"].keys() == theirs["deployment_config"].keys()

    cluster = spec["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == theirs["engine_kwargs"]["tensor_parallel_size"]
    scaling = theirs["deployment_config"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (workers["minReplicas"], workers["maxReplicas"])
    images = {container["image"] for pod in pods(spec) for container in pod["containers"]}
    assert len(images) == 1 and f":{cluster['rayVersion']}-" in images.pop()


@needs("kubernetes_validate")
@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_what_kubernetes_takes(name: str) -> None:
    import kubernetes_validate

    for spec in pods(MANIFESTS[name]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
        if name == "trainjob":  # a patch over the pod of the runtime: the rest of the container is the trainer's
            (container,) = spec["containers"]
            trainer = MANIFESTS[name]["spec"]["trainer"]
            own = {key: trainer[key] for key in ("image", "command", "args")}
            pod["spec"] = {**spec, "containers": [{**container, **own, "resources": trainer["resourcesPerNode"]}]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        pod["spec"] = {**spec, "containers": [{**spec["containers"][0], "volumeMount": []}]}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@needs("kubeflow_trainer_api")
def test_the_trainjob_is_one_of_kubeflow_trainer() -> None:
    """Its models ignore what they do not know, so what comes back must be what went in."""
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    job = TrainerV1alpha1TrainJob.from_dict(MANIFESTS["trainjob"])
    assert job is not None and job.to_dict() == MANIFESTS["trainjob"]


@pytest.mark.skipif("LIGHTNING_DUALPIPE_CRDS" not in os.environ, reason="needs LIGHTNING_DUALPIPE_CRDS, a folder")
@needs("jsonschema")
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_their_operators_take(name: str) -> None:
    import jsonschema

    manifest = MANIFESTS[name]
    validator = jsonschema.Draft202012Validator(_schema(manifest["apiVersion"], manifest["kind"]))
    validator.validate(manifest)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**manifest, "spec": {**manifest["spec"], "nodes": 2}})


def _schema(api_version: str, kind: str) -> Any:
    group, _, version = api_version.partition("/")
    files = sorted(Path(os.environ["LIGHTNING_DUALPIPE_CRDS"]).glob("*.yaml"))
    for crd in (crd for file in files for crd in yaml.safe_load_all(file.read_text())):
        if crd["spec"]["group"] == group and crd["spec"]["names"]["kind"] == kind:
            (found,) = (each for each in crd["spec"]["versions"] if each["name"] == version)
            return _strict(found["schema"]["openAPIV3Schema"])
    pytest.fail(f"no {kind} of {group} in {files}")


def _strict(schema: Any) -> Any:
    """A server drops fields that it does not know and says nothing; here they are errors."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _strict(value) for key, value in schema.items()}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not free:
        inner["additionalProperties"] = False
    return inner
