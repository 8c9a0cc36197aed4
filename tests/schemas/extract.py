"""Write trainer.json: the fields, types and required fields of Kubeflow Trainer's and Kubernetes' types, as far as
docker/kubernetes/*.yaml reaches them. tests/test_cluster_kubernetes.py reads it.

    pip install kubeflow-trainer-api==2.3.0 pyyaml      (Apache-2.0; its models are made from the published OpenAPI)
    python tests/schemas/extract.py

mpijob.json is written by hand: no package carries the MPI operator's schema.
"""

import json
from importlib import metadata
from pathlib import Path

import kubeflow_trainer_api.models as models
import yaml

HERE = Path(__file__).resolve().parent
KUBERNETES = HERE.parent.parent / "docker" / "kubernetes"
PACKAGE = "kubeflow-trainer-api"
ROOTS = {"TrainJob": "TrainerV1alpha1TrainJob", "TrainingRuntime": "TrainerV1alpha1TrainingRuntime"}
POD = "IoK8sApiCoreV1PodTemplateSpec"
#: Types that are a value and not an object, and what they may be.
VALUES = {
    "IoK8sApimachineryPkgUtilIntstrIntOrString": "integer or string",
    "IoK8sApimachineryPkgApiResourceQuantity": "integer or string",
}


def shape(schema):
    """A field's type: a name, [type of items] or {"*": type of values}."""
    if "anyOf" in schema:
        kinds = [shape(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return kinds[0] if len(kinds) == 1 else "any"
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return VALUES.get(name, name)
    if schema.get("type") == "array":
        return [shape(schema["items"])]
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return {"*": shape(values) if isinstance(values, dict) else "any"}
    return schema.get("type", "any")


class Extract:
    """Collects the types that documents reach, each with all of its fields."""

    def __init__(self):
        self.types = {}

    def visit(self, value, kind):
        if isinstance(kind, list):
            for item in value:
                self.visit(item, kind[0])
        elif isinstance(kind, dict):
            for item in value.values():
                self.visit(item, kind["*"])
        elif isinstance(value, dict) and kind != "any":
            fields = self.define(kind)["fields"]
            for name, item in value.items():
                if name in fields:
                    self.visit(item, fields[name])

    def define(self, name):
        if name not in self.types:
            schema = getattr(models, name).model_json_schema()
            schema = schema.get("$defs", {}).get(name, schema)
            fields = {field: shape(each) for field, each in sorted(schema["properties"].items())}
            self.types[name] = {"required": sorted(schema.get("required", [])), "fields": fields}
        return self.types[name]


def documents(name):
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def main():
    extract = Extract()
    for document in documents("trainjob.yaml"):
        extract.visit(document, ROOTS[document["kind"]])
    for replica in documents("mpijob.yaml")[0]["spec"]["mpiReplicaSpecs"].values():
        extract.visit(replica["template"], POD)
    source = f"{PACKAGE} {metadata.version(PACKAGE)} on PyPI, Apache-2.0; written by extract.py"
    types = ",\n".join(f'  "{name}": {json.dumps(extract.types[name])}' for name in sorted(extract.types))
    (HERE / "trainer.json").write_text(f'{{"source": "{source}", "types": {{\n{types}\n}}}}\n')


if __name__ == "__main__":
    main()
