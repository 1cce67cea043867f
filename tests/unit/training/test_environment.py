from __future__ import annotations

import json

from phi3_lora.training.environment import Environment
from phi3_lora.training.identity import RunIdentity

HERE = Environment(
    backend="cuda",
    device="cpu",
    dtype="float32",
    world_size=1,
    machine="x86_64",
    num_cpus=2,
    versions={"numpy": "2.0", "torch": "2.5"},
    num_threads=2,
)


def test_an_environment_keeps_the_keys_of_a_checkpoint_in_order() -> None:
    stored = json.loads(json.dumps(HERE.to_dict()))
    names = ["backend", "device", "dtype", "world_size", "machine", "num_cpus", "versions"]
    assert list(stored) == [*names, "num_threads"]
    assert Environment.from_dict(stored) == HERE
    assert HERE.changes_since(Environment.from_dict(stored)) == []


def test_changes_name_each_value_and_version_also_of_an_older_checkpoint() -> None:
    stored = {**HERE.to_dict(), "device": "gpu", "versions": {"mlx": "1", "numpy": "2.0"}, "x": 1}
    del stored["num_cpus"]
    assert HERE.changes_since(Environment.from_dict(stored)) == [
        "device was gpu, now cpu",
        "num_cpus was None, now 2",
        "mlx was 1, now None",
        "torch was None, now 2.5",
    ]


def test_an_identity_is_read_from_the_state_of_a_checkpoint() -> None:
    identity = RunIdentity(model_identity="m", plan_hash="p", valid_hash="v", lora="l")
    state = {"step": 3, **identity.to_dict()}
    assert RunIdentity.from_dict(state) == identity
    del state["lora"]
    assert RunIdentity.from_dict(state).lora == "unknown"
