"""docker/kubernetes/*.yaml are of the shape that Kubernetes' operators publish, and mean three ranks on three GPUs.

tests/schemas/ holds the published fields, their types and what is required; extract.py there says where they are from.
"""

import copy
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "docker" / "kubernetes"
SCHEMAS = [json.loads((ROOT / "tests" / "schemas" / f"{name}.json").read_text()) for name in ("trainer", "mpijob")]
TYPES = {**SCHEMAS[0]["types"], **SCHEMAS[1]["types"]}
KINDS = {
    ("kubeflow.org/v2beta1", "MPIJob"): "MPIJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
}
VALUES = {"string": (str,), "integer": (int,), "boolean": (bool,), "integer or string": (int, str)}


def faults(value, kind, place=""):
    """What is wrong with `value`, a sentence for each, if it shall be of the type `kind` of tests/schemas."""
    if isinstance(kind, str) and kind in VALUES:
        return [] if type(value) in VALUES[kind] else [f"{place} must be {kind}, got {value!r}"]
    if isinstance(kind, list):
        return _items_faults(value, kind[0], place)
    if not isinstance(value, dict):
        return [f"{place} must be an object, got {value!r}"]
    if isinstance(kind, dict):
        return [found for name, item in value.items() for found in faults(item, kind["*"], f"{place}.{name}")]
    return _object_faults(value, TYPES[kind], place)


def _items_faults(value, kind, place):
    if not isinstance(value, list):
        return [f"{place} must be a list, got {value!r}"]
    return [found for i, item in enumerate(value) for found in faults(item, kind, f"{place}[{i}]")]


def _object_faults(value, kind, place):
    found = [f"{place} has no field {name!r}" for name in value if name not in kind["fields"]]
    found += [f"{place} lacks {name!r}" for name in kind["required"] if name not in value]
    choices = kind.get("choices", {})
    found += [f"{place}.{n} cannot be {value[n]!r}" for n in choices if value.get(n, choices[n][0]) not in choices[n]]
    known = [name for name in value if name in kind["fields"]]
    return found + [each for n in known for each in faults(value[n], kind["fields"][n], f"{place}.{n}")]


def documents(name):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def faults_of(document):
    return faults(document, KINDS[document["apiVersion"], document["kind"]])


@pytest.mark.parametrize(("name", "kinds"), [("mpijob", ["MPIJob"]), ("trainjob", ["TrainingRuntime", "TrainJob"])])
def test_documents_have_the_published_shape(name, kinds):
    found = documents(f"{name}.yaml")
    assert [document["kind"] for document in found] == kinds
    assert [faults_of(document) for document in found] == [[]] * len(found)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "slotPerWorker"), 1, ".spec has no field 'slotPerWorker'"),
        (("spec", "slotsPerWorker"), "1", ".spec.slotsPerWorker must be integer, got '1'"),
        (("spec", "slotsPerWorker"), True, ".spec.slotsPerWorker must be integer, got True"),
        (("spec", "launcherCreationPolicy"), "Later", ".spec.launcherCreationPolicy cannot be 'Later'"),
        (("spec", "mpiReplicaSpecs"), None, ".spec lacks 'mpiReplicaSpecs'"),
        (("spec", "mpiReplicaSpecs", "Worker", "replicas"), 1.5, "replicas must be integer, got 1.5"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers"), {}, "must be a list, got {}"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "name"), None, "lacks 'name'"),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "arg"), [], "no field 'arg'"),
    ],
)
def test_another_shape_is_found(path, value, fault):
    document = copy.deepcopy(documents("mpijob.yaml")[0])
    last = document
    for name in path[:-1]:
        last = last[name]
    if value is None:
        del last[path[-1]]
    else:
        last[path[-1]] = value
    found = faults_of(document)
    assert len(found) == 1 and found[0].endswith(fault)


def pods(name):
    """(replicas, pod) for every kind of pod."""
    if name == "mpijob.yaml":
        replicas = documents(name)[0]["spec"]["mpiReplicaSpecs"]
        return {role: (each["replicas"], each["template"]["spec"]) for role, each in replicas.items()}
    spec = documents(name)[0]["spec"]
    jobs = {
        job["name"]: job["template"]["spec"]["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]
    }
    # The launcher is one of the nodes: runLauncherAsNode.
    return {"launcher": (1, jobs["launcher"]), "node": (spec["mlPolicy"]["numNodes"] - 1, jobs["node"])}


@pytest.mark.parametrize("name", ["mpijob.yaml", "trainjob.yaml"])
def test_three_pods_have_one_gpu_each(name):
    limits = [(count, pod["containers"][0]["resources"]["limits"]) for count, pod in pods(name).values()]
    assert sum(count * limit.get("nvidia.com/gpu", 0) for count, limit in limits) == 3
    assert all(limit.get("nvidia.com/gpu", 0) <= 1 for _, limit in limits)


@pytest.mark.parametrize("name", ["mpijob.yaml", "trainjob.yaml"])
def test_pods_fit_the_image(name):
    """Its user, its ssh folder, its port, its entry, and a place on a volume for what a run writes."""
    dockerfile = (ROOT / "docker" / "gpu" / "Dockerfile").read_text()
    port = int((ROOT / "docker" / "ssh" / "server.conf").read_text().split("\nPort ")[1].split()[0])
    for _, pod in pods(name).values():
        assert f"ARG USER_ID={pod['securityContext']['runAsUser']}\n" in dockerfile
        container = pod["containers"][0]
        assert container["image"] == "hvd_qgenx:gpu"
        if container.get("args") == ["sshd"]:
            assert container["ports"][0]["containerPort"] == container["readinessProbe"]["tcpSocket"]["port"] == port
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
    assert "/home/qgenx/.ssh" in dockerfile and "/home/qgenx/.ssh" in (KUBERNETES / name).read_text()


def test_both_launch_the_same_command():
    mpijob = pods("mpijob.yaml")["Launcher"][1]["containers"][0]["args"]
    trainer = documents("trainjob.yaml")[1]["spec"]["trainer"]
    assert trainer["args"] == mpijob
    assert mpijob[mpijob.index("-np") + 1] == "3" == str(trainer["numNodes"])
    assert f'ENTRYPOINT ["{trainer["command"][0]}"]' in (ROOT / "docker" / "gpu" / "Dockerfile").read_text()
