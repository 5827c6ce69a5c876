"""Features of processors by LLVM's names: what they imply, and which of them this machine's processor has."""

import functools
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from convt_tvm.errors import TargetError

__all__ = [
    "IMPLIES",
    "LEVELS",
    "TILE_FEATURES",
    "cpuinfo",
    "features_in",
    "host_architecture",
    "host_features",
    "parse_cpuinfo",
    "with_implied",
]

IMPLIES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "popcnt": (),
        "sse4.2": (),
        "lzcnt": (),
        "movbe": (),
        "bmi": (),
        "bmi2": (),
        "avx": ("sse4.2",),
        "avx2": ("avx",),
        "f16c": ("avx",),
        "fma": ("avx",),
        "avx512f": ("avx2", "f16c", "fma"),
        "avx512bw": ("avx512f",),
        "avx512cd": ("avx512f",),
        "avx512dq": ("avx512f",),
        "avx512vl": ("avx512f",),
        "avx512vnni": ("avx512f",),
        "avx512bf16": ("avx512bw",),
        "avx512fp16": ("avx512bw", "avx512dq", "avx512vl"),
        "amx-tile": (),
        "amx-bf16": ("amx-tile", "avx512bw"),
    },
    "aarch64": {
        "fp-armv8": (),
        "neon": ("fp-armv8",),
        "fullfp16": ("fp-armv8",),
        "dotprod": ("neon",),
        "bf16": ("neon",),
    },
}
"""By architecture, what each feature implies, so that a target names everything that its code may use."""

# What Linux calls them in /proc/cpuinfo, where that is another name.
_LINUX_FLAGS = {
    "sse4.2": "sse4_2",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "fp-armv8": "fp",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
}

TILE_FEATURES = frozenset({"amx-tile", "amx-bf16"})
"""Features that only kernels in bfloat16 use."""

_V2 = ("popcnt", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")

LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": tuple(sorted(_V2)),
    "x86-64-v3": tuple(sorted(_V3)),
    "x86-64-v4": tuple(sorted(_V4)),
}
"""The micro-architecture levels of the x86-64 psABI, by the features that generated code uses."""

_CPUINFO = Path("/proc/cpuinfo")


def with_implied(features: Iterable[str], arch: str) -> tuple[str, ...]:
    """Features of an architecture and all that they imply, in order; raises TargetError for one that is not known."""
    known = IMPLIES[arch]
    closed: set[str] = set()
    pending = list(features)
    while pending:
        feature = pending.pop()
        if feature not in known:
            raise TargetError(f"{feature!r} is not a known feature of {arch}; use any of {', '.join(sorted(known))}.")
        if feature not in closed:
            closed.add(feature)
            pending.extend(known[feature])
    return tuple(sorted(closed))


def cpuinfo() -> dict[str, str]:
    """The first value of each key of /proc/cpuinfo; empty where there is no such file."""
    try:
        return parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The first value of each key in the text of a /proc/cpuinfo."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    return values


def host_architecture() -> str:
    """``x86_64`` or ``aarch64``; raises TargetError on any other processor."""
    name = platform.machine().lower()
    arch = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}.get(name)
    if arch is None:
        raise TargetError(f"this machine's processor, {name!r}, is not supported; use an x86_64 or aarch64 one.")
    return arch


@functools.cache
def host_features() -> frozenset[str]:
    """LLVM names of the features that this processor and its kernel offer, of those that a `Target` can name.

    Read once, from /proc/cpuinfo. A virtual machine that masks a feature is taken at its word. Elsewhere than on Linux
    the set is empty, which makes a host target the architecture's baseline.
    """
    return features_in(cpuinfo())


def features_in(values: Mapping[str, str]) -> frozenset[str]:
    """The features of which the values of a /proc/cpuinfo tell, without those whose prerequisites are masked."""
    flags = set(values.get("flags", values.get("Features", "")).split())
    known = IMPLIES[host_architecture()]
    found = {feature for feature in known if _LINUX_FLAGS.get(feature, feature) in flags}
    # A feature whose prerequisite is masked cannot be used: generated code would use the prerequisite as well.
    while incomplete := {feature for feature in found if not found.issuperset(known[feature])}:
        found -= incomplete
    return frozenset(found)
