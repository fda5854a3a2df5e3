"""Writes jobset.schema.json, by which tests check the filled manifest. Run by hand:

    pip install kubeflow-trainer-api==2.3.0
    python tests/launch/make_jobset_schema.py

The types are those that Kubeflow generates from the published OpenAPI definitions of JobSet
(jobset.x-k8s.io/v1alpha2) and Kubernetes (batch/v1, core/v1), in the package kubeflow-trainer-api,
Apache-2.0, https://github.com/kubeflow/trainer. Three things are changed: null is no value, a field
that a type does not know is an error, and where the definitions only say "string", the values count
that the API's documentation allows.
"""

import json
import pathlib

from kubeflow_trainer_api.models import jobset_v1alpha2_job_set

_ALLOWED = {
    ("JobsetV1alpha2JobSet", "apiVersion"): ["jobset.x-k8s.io/v1alpha2"],
    ("JobsetV1alpha2JobSet", "kind"): ["JobSet"],
    ("JobsetV1alpha2FailurePolicyRule", "action"): [
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
    ],
    ("IoK8sApiBatchV1JobSpec", "completionMode"): ["NonIndexed", "Indexed"],
    ("IoK8sApiBatchV1JobSpec", "podReplacementPolicy"): ["TerminatingOrFailed", "Failed"],
    ("IoK8sApiBatchV1PodFailurePolicyRule", "action"): ["FailJob", "FailIndex", "Ignore", "Count"],
    ("IoK8sApiBatchV1PodFailurePolicyOnExitCodesRequirement", "operator"): ["In", "NotIn"],
    ("IoK8sApiCoreV1PodSpec", "restartPolicy"): ["Always", "OnFailure", "Never"],
    ("IoK8sApiCoreV1Toleration", "operator"): ["Exists", "Equal"],
    ("IoK8sApiCoreV1Toleration", "effect"): ["NoSchedule", "PreferNoSchedule", "NoExecute"],
}


def _bare(node: object, names: bool = False) -> object:
    """Without prose and defaults; `names`: the keys are names of fields."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    match node:
        case {"anyOf": [wanted, {"type": "null"}]}:  # optional; our manifest writes no nulls
            return _bare(wanted)
    prose = () if names else ("title", "description", "default")
    bare = {k: _bare(v, k in ("properties", "$defs")) for k, v in node.items() if k not in prose}
    if "properties" in bare and not names:
        bare.setdefault("additionalProperties", False)
    return bare


def main() -> None:
    schema = _bare(jobset_v1alpha2_job_set.JobsetV1alpha2JobSet.model_json_schema())
    types = schema.pop("$defs")
    # Pydantic wraps these two in objects of its own.
    types["IoK8sApimachineryPkgApiResourceQuantity"] = {"type": ["string", "number"]}
    types["IoK8sApimachineryPkgUtilIntstrIntOrString"] = {"type": ["string", "integer"]}
    top = {"JobsetV1alpha2JobSet": {k: schema[k] for k in ("properties", "additionalProperties")}}
    for (name, field), values in _ALLOWED.items():
        (types | top)[name]["properties"][field] = {"enum": values}
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(t)}" for n, t in sorted(types.items()))
    comment = (
        "Derived by make_jobset_schema.py from kubeflow-trainer-api 2.3.0, Copyright The Kubeflow"
        " Authors, Apache License 2.0 (LICENSE.jobset.schema); changed as it"
        " says."
    )
    head = {
        "$comment": comment,
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        **top["JobsetV1alpha2JobSet"],
    }
    text = json.dumps(head)[:-1] + ', "$defs": {\n' + lines + "\n}}\n"
    pathlib.Path(__file__).with_name("jobset.schema.json").write_text(text)


if __name__ == "__main__":
    main()
