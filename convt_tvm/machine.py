"""Which machine this is, and which versions of libraries it has. None of them is imported."""

import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from convt_tvm.digests import sha256
from convt_tvm.gpu import find_driver
from convt_tvm.processor import TILE_FEATURES, cpuinfo, features_in, host_features, parse_cpuinfo
from convt_tvm.target import Target

__all__ = ["Machine", "machine", "machine_key", "package_versions"]

_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the library versions that a measurement or an artifact comes from.

    ``model`` tells apart processors that call themselves the same, as virtual ones do: family, model and stepping.
    """

    cpu: str
    model: str
    cores: int
    features: tuple[str, ...]
    os: str
    python: str
    versions: dict[str, str | None]

    @property
    def key(self) -> str:
        """Eight digits that are equal where the same code takes the same time: of processor and features.

        Without `TILE_FEATURES`: code that uses them is for another target.
        """
        named = "\n".join((self.cpu, self.model, *(name for name in self.features if name not in TILE_FEATURES)))
        return sha256(named.encode())[:8]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "features": list(self.features)}


def package_versions(names: Iterable[str] = _PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution name, None where there is none; imports nothing of them."""
    return {name: _version(name) for name in names}


@functools.cache
def _version(distribution: str) -> str | None:
    """Read once: a process keeps what it has imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(text: str | None = None) -> Machine:
    """Describe this machine: processor, cores this process may use, features, system and library versions.

    With the text of another machine's /proc/cpuinfo, describe that one; its system and versions are not known.
    """
    if text is not None:
        values = parse_cpuinfo(text)
        cores = sum(line.startswith("processor") for line in text.splitlines())
        features, system, python, versions = features_in(values), "", "", {}
    else:
        values, cores, features = cpuinfo(), _usable_cores(), host_features()
        system, python, versions = platform.platform(), platform.python_version(), package_versions()
    cpu = values.get("model name") or values.get("CPU part") or platform.processor() or platform.machine()
    return Machine(
        cpu=re.sub(r"\s+", " ", cpu),
        model="/".join(values[name] for name in ("cpu family", "model", "stepping") if name in values),
        cores=cores,
        features=tuple(sorted(features)),
        os=system,
        python=python,
        versions=versions,
    )


def machine_key(target: Target) -> str | None:
    """What tuning records name the machine that runs `target` by: `Machine.key`, or the name of its first GPU.

    None for GPUs where there is none: whatever is known of their architecture is worth using there.
    """
    if target.kind != "cuda":
        return machine().key
    driver = find_driver()
    return re.sub(r"\W+", "-", driver.gpus[0].name).strip("-") if driver and driver.gpus else None
