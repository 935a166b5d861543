"""Wrong values are refused before anything is sent to a cluster, in words that name the value."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python.errors import HelmError

from tests.helm.chart import render

DECODE = {"name": "decode", "role": "decode"}
PREFILL = {"name": "prefill", "role": "prefill"}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown value": ({"poools": []}, r"additional properties 'poools' not allowed"),
    "no pools": ({"pools": []}, r"/pools'.*minItems"),
    "a pool without workers": ({"pools": [{**DECODE, "replicas": 0}]}, r"/pools/0/replicas'.*minimum: got 0, want 1"),
    "an unknown role": ({"pools": [{"name": "a", "role": "encode"}]}, r"/pools/0/role'.*'prefill', 'decode'"),
    "a pool without a name": ({"pools": [{"role": "decode"}]}, r"/pools/0'.*missing property 'name'"),
    "a misspelt setting": (
        {"pools": [DECODE, {**PREFILL, "settings": {"kv_mb": 1}}]},
        r"/pools/1/settings'.*additional properties 'kv_mb' not allowed",
    ),
    "a setting of the other role": (
        {"pools": [DECODE, {**PREFILL, "settings": {"local_prefill_tokens": 1}}]},
        r"/pools/1/settings'.*'local_prefill_tokens' not allowed",
    ),
    "a setting out of bounds": (
        {"router": {"settings": {"processes": 65}}},
        r"/router/settings/processes'.*maximum: got 65, want 64",
    ),
    "a setting of the wrong type": (
        {"workers": {"settings": {"max_running": "many"}}},
        r"/workers/settings/max_running'.*got string, want",
    ),
    "an unknown parser": (
        {"router": {"settings": {"tool_parser": "hermit"}}},
        r"/router/settings/tool_parser'.*must be one of.*'hermes'",
    ),
    "a setting that the chart makes": (
        {"workers": {"settings": {"port": 1}}},
        r"/workers/settings'.*additional properties 'port' not allowed",
    ),
    "no decode pool": ({"pools": [PREFILL]}, r"pools has no pool with role decode: .*add one"),
    "two pools of one name": (
        {"pools": [DECODE, DECODE]},
        r"pools\[1\]\.name is decode, which pools\[0\] is called already",
    ),
    "a pool with the routers' name": ({"pools": [{**DECODE, "name": "router"}]}, r"pools\[0\]\.name is router"),
    "two GPUs for one worker": (
        {"pools": [{**DECODE, "gpus": 2}]},
        r"pools\[0\] \(decode\)\.gpus is 2: a worker computes on one GPU",
    ),
    "a worker on two hosts": (
        {"pools": [{**DECODE, "workload": "LeaderWorkerSet", "hostsPerWorker": 2}]},
        r"pools\[0\] \(decode\)\.hostsPerWorker is 2: a worker cannot span hosts yet",
    ),
    "a device without a GPU": (
        {"pools": [{**DECODE, "settings": {"device": "cuda"}}]},
        r"pools\[0\] \(decode\)\.settings\.device is cuda, and its gpus is 0",
    ),
    "workers that do not match": (
        {"pools": [{**DECODE, "settings": {"dtype": "float32"}}, PREFILL]},
        r"pools\[1\] \(prefill\)\.settings\.dtype .* must be the same on all workers",
    ),
    "no model": ({"model": {"demo": False}}, r"model has 0 sources .*exactly one of demo, pvc"),
    "two models": ({"model": {"pvc": {"claimName": "a"}}}, r"model has 2 sources \(demo, pvc\)"),
    "a model without a name": (
        {"model": {"demo": False, "pvc": {"claimName": "models"}}},
        r"model\.servedName is empty",
    ),
    "certificates without a name": ({"tls": {"existingSecret": "tls"}}, r"tls\.name is empty"),
    "a scaler that asks nobody": (
        {"workers": {"autoscaling": {"kind": "keda"}}},
        r"pools\[0\] \(prefill\)\.autoscaling\.keda\.serverAddress is empty",
    ),
    "a scaler upside down": (
        {"workers": {"autoscaling": {"kind": "hpa", "minReplicas": 5}}},
        r"autoscaling\.minReplicas is 5, above maxReplicas 4",
    ),
    "a scaler that never scales down": (
        {"workers": {"autoscaling": {"scaleDownSeconds": 3601}}},
        r"/workers/autoscaling/scaleDownSeconds'.*maximum: got 3,601, want 3,600",
    ),
    "a route to no gateway": ({"gateway": {"enabled": True}}, r"gateway\.parentRefs is empty"),
    "a pool without a picker": (
        {"gateway": {"inferencePool": {"enabled": True}}},
        r"gateway\.inferencePool\.endpointPicker\.name is empty",
    ),
    "a user who is root": ({"security": {"runAsUser": 0}}, r"/security/runAsUser'.*minimum: got 0, want 1"),
    "a digest that is none": (
        {"images": {"cpu": {"digest": "latest"}}},
        r"/images/cpu/digest'.*does not match pattern",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(case: str) -> None:
    values, said = WRONG[case]
    with pytest.raises(HelmError, match=said):
        render(values)


def test_right_values_are_taken() -> None:
    pools = [{**DECODE, "replicas": 1, "settings": {"local_prefill_tokens": 1, "device": "cpu"}}, PREFILL]
    assert render({"pools": pools, "router": {"settings": {"processes": 64}}}).objects
