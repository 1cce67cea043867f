"""The environment of a run: the machine and the software that its exact numbers depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from phi3_lora.engine.protocol import Backend, Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Machine, device and versions; None where a value does not apply or was not stored."""

    backend: str = "unknown"
    device: str = "unknown"
    """The engine's device, in words."""
    dtype: str = "unknown"
    """Compute dtype of the base model, for example float32."""
    world_size: int | None = None
    """Processes that share each step."""
    machine: str | None = None
    """Processor architecture."""
    num_cpus: int | None = None
    versions: Mapping[str, str] | None = None
    """Package -> version."""
    blas: str | None = None
    num_threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; blas and num_threads are left out where they do not apply."""
        values: dict[str, Any] = {
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "world_size": self.world_size,
            "machine": self.machine,
            "num_cpus": self.num_cpus,
            "versions": dict(self.versions or {}),
        }
        if self.blas is not None:
            values["blas"] = self.blas
        if self.num_threads is not None:
            values["num_threads"] = self.num_threads
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Environment:
        """Read the output of to_dict, also of a version that stored fewer or more values."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        if not isinstance(known.get("versions", {}), Mapping):
            del known["versions"]
        return cls(**known)

    def changes_since(self, before: Environment) -> list[str]:
        """Return one phrase for each value that differs from an earlier environment."""
        changes = []
        old_values, new_values = before.to_dict(), self.to_dict()
        for name, new in new_values.items():
            if name == "versions":
                changes += _differences(old_values[name], new, sorted({*old_values[name], *new}))
            else:
                changes += _differences(old_values, new_values, [name])
        return changes


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def read_environment(engine: Engine, backend: Backend) -> Environment:
    """Read the environment of an open engine."""
    described = backend.describe()
    return Environment(
        backend=backend.name,
        device=engine.device_name,
        dtype=engine.dtype,
        world_size=engine.world_size,
        machine=platform.machine(),
        num_cpus=os.cpu_count(),
        versions={
            "phi3-lora": version("phi3-lora"),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            **described.versions,
        },
        blas=described.blas,
        num_threads=described.num_threads,
    )
