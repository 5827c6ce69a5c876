"""What code is compiled for, and which machine this is.

Neither TVM nor torch is imported, except by `Target.to_tvm`.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from convt_tvm.errors import IncompatibleMachineError, TargetError
from convt_tvm.gpu import ARCHITECTURES, DEFAULT_ARCHITECTURES, OLDEST_CUDA_DRIVER, find_driver, newest_architecture

if TYPE_CHECKING:
    import tvm.target

__all__ = [
    "LEVELS",
    "TILE_FEATURES",
    "Machine",
    "Target",
    "host_architecture",
    "host_features",
    "machine",
    "machine_key",
    "package_versions",
]

# What each LLVM feature implies, so that a target names everything that its code may use.
_IMPLIES: dict[str, dict[str, tuple[str, ...]]] = {
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

TF32 = "tf32"
"""The feature of a target for GPUs that lets float32 be multiplied as tf32."""

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy")
_FORMS = (
    "write llvm, llvm:x86-64-v2, llvm:x86-64-v3, llvm:x86-64-v4, llvm:ARCH+FEATURE+FEATURE, cuda, cuda:sm_90, "
    "cuda:sm_80+sm_90 or cuda:sm_90+tf32"
)


def _with_implied(features: Iterable[str], arch: str) -> tuple[str, ...]:
    known = _IMPLIES[arch]
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


def _cpuinfo() -> dict[str, str]:
    """The first value of each key of /proc/cpuinfo; empty where there is no such file."""
    try:
        return _parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def _parse_cpuinfo(text: str) -> dict[str, str]:
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
    return _features_in(_cpuinfo())


def _features_in(values: Mapping[str, str]) -> frozenset[str]:
    flags = set(values.get("flags", values.get("Features", "")).split())
    known = _IMPLIES[host_architecture()]
    found = {feature for feature in known if _LINUX_FLAGS.get(feature, feature) in flags}
    # A feature whose prerequisite is masked cannot be used: generated code would use the prerequisite as well.
    while incomplete := {feature for feature in found if not found.issuperset(known[feature])}:
        found -= incomplete
    return frozenset(found)


def _visible_architectures() -> tuple[str, ...]:
    """For each GPU of this machine the newest known architecture whose code it runs, or the default ones."""
    driver = find_driver()
    found = {newest_architecture(gpu) for gpu in (driver.gpus if driver else ())}
    return tuple(arch for arch in ARCHITECTURES if arch in found) or DEFAULT_ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Target:
    """A compiler back end, an architecture and the CPU features that generated code may use.

    Parameters
    ----------
    kind
        ``llvm`` or ``cuda``.
    arch
        ``x86_64`` or ``aarch64``; for ``cuda`` one of `convt_tvm.gpu.ARCHITECTURES`, the lowest there is code for.
    features
        LLVM feature names. Stored sorted, with everything they imply: ``avx2`` brings ``avx`` and ``sse4.2``. A machine
        runs the code if `host_features` there contains all of them. For ``cuda`` further architectures that there is
        code for, ascending; a kernel holds machine code for each, and PTX of the last for newer GPUs. Last may come
        ``tf32``: float32 may be multiplied as tf32, what ``torch.backends.cudnn.allow_tf32`` says of cuDNN. Without it
        float32 is IEEE's.

    Raises
    ------
    TargetError
        If the kind, the architecture or a feature is unknown.

    Examples
    --------
    >>> Target("llvm", "x86_64", ("fma", "avx2"))
    Target(kind='llvm', arch='x86_64', features=('avx', 'avx2', 'fma', 'sse4.2'))
    >>> Target.parse("llvm:x86-64-v4").vector_bytes
    64
    >>> Target.parse("cuda:sm_90+sm_80")
    Target(kind='cuda', arch='sm_80', features=('sm_90',))
    """

    kind: str
    arch: str
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        """Validate, and close the features under implication."""
        if self.kind == "cuda":
            archs = {self.arch, *self.features} - {TF32}
            unknown = sorted(archs - ARCHITECTURES.keys())
            if unknown:
                raise TargetError(
                    f"{', '.join(map(repr, unknown))} is not a known CUDA architecture; use any of "
                    f"{', '.join(ARCHITECTURES)}, and {TF32} to let float32 be multiplied as tf32."
                )
            first, *others = (arch for arch in ARCHITECTURES if arch in archs)
            object.__setattr__(self, "arch", first)
            object.__setattr__(self, "features", (*others, TF32) if TF32 in self.features else tuple(others))
            return
        if self.kind != "llvm":
            raise TargetError(f"target kind {self.kind!r} is not supported; {_FORMS}.")
        if self.arch not in _IMPLIES:
            raise TargetError(f"architecture {self.arch!r} is not supported; use one of {', '.join(sorted(_IMPLIES))}.")
        object.__setattr__(self, "features", _with_implied(self.features, self.arch))

    @classmethod
    def parse(cls, text: "str | Target") -> "Target":
        """The target that a string names.

        ``llvm`` is this machine with all its features. ``llvm:x86-64-v2``, ``-v3`` and ``-v4`` are the psABI's levels
        (`LEVELS`). ``llvm:x86_64+avx2+fma`` names every feature, as `name` does; ``llvm:x86_64`` alone is the baseline.
        ``cuda:sm_80+sm_90`` names GPU architectures; ``cuda`` is those of this machine's GPUs, or, where it has none,
        `convt_tvm.gpu.DEFAULT_ARCHITECTURES`. ``cuda:sm_90+tf32`` and ``cuda:tf32`` allow tf32 besides. A target is
        returned as it is.

        Raises
        ------
        TargetError
            If the text has none of these forms.
        """
        if isinstance(text, Target):
            return text
        kind, colon, rest = str(text).strip().partition(":")
        if kind not in ("llvm", "cuda") or (colon and not rest):
            raise TargetError(f"target {text!r} is not understood; {_FORMS}.")
        if kind == "cuda":
            named = rest.split("+") if colon else []
            archs = [name for name in named if name != TF32] or _visible_architectures()
            return cls(kind, archs[0], (*archs[1:], *([TF32] if TF32 in named else [])))
        if not colon:
            return cls(kind, host_architecture(), tuple(host_features()))
        if rest in LEVELS:
            return cls(kind, "x86_64", LEVELS[rest])
        arch, *features = rest.split("+")
        if arch not in _IMPLIES:
            raise TargetError(f"target {text!r} is not understood; {_FORMS}.")
        return cls(kind, arch, tuple(features))

    def for_dtype(self, dtype: str) -> "Target":
        """The target without features that kernels in `dtype` do not use, so that they run without them as well.

        >>> Target("llvm", "x86_64", ("fma", "amx-tile")).for_dtype("float32").name
        'llvm:x86_64+avx+fma+sse4.2'
        """
        if self.kind != "llvm" or dtype == "bfloat16" or TILE_FEATURES.isdisjoint(self.features):
            return self
        return Target(self.kind, self.arch, tuple(sorted(set(self.features) - TILE_FEATURES)))

    @property
    def name(self) -> str:
        """The canonical text, which `parse` takes back; equal targets have equal names."""
        return f"{self.kind}:{'+'.join((self.arch, *self.features))}"

    @property
    def level(self) -> str | None:
        """The highest of `LEVELS` whose features this target has all of."""
        if self.arch != "x86_64":
            return None
        return max((level for level, needed in LEVELS.items() if set(needed) <= set(self.features)), default=None)

    @property
    def key(self) -> str:
        """A short name that is safe as a directory's; equal targets have equal keys.

        The level alone where the features are exactly a level's (``llvm-x86-64-v3``), or one GPU architecture
        (``cuda-sm_90``), otherwise with eight digits of a hash of `name`.
        """
        base = f"{self.kind}-{self.level or self.arch}"
        if self.kind == "cuda" and not self.features:
            return base
        if self.level is not None and self.features == LEVELS[self.level]:
            return base
        return f"{base}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def gpu_archs(self) -> tuple[str, ...]:
        """Every GPU architecture that there is code for, ascending; empty unless the kind is ``cuda``."""
        return tuple(name for name in (self.arch, *self.features) if name in ARCHITECTURES)

    @property
    def allows_tf32(self) -> bool:
        """Whether float32 may be multiplied as tf32, with 10 bits behind the point, on GPUs: not unless asked for."""
        return TF32 in self.features

    @property
    def vector_bytes(self) -> int:
        """Width of a vector register: 64 with AVX-512, 32 with AVX, 16 with SSE and NEON."""
        if "avx512f" in self.features:
            return 64
        return 32 if "avx" in self.features else 16

    @property
    def halves_vectors(self) -> bool:
        """Whether cores work on a whole vector in two halves, as AMD's Zen 4 does.

        It has avx512bf16 without avx512fp16. So have Zen 5 and Intel's rare Cooper Lake, with units as wide as a
        vector; they lose little by what suits Zen 4.
        """
        return "avx512bf16" in self.features and "avx512fp16" not in self.features

    @property
    def multiplies_pairs(self) -> bool:
        """Whether an instruction multiplies and adds pairs of bfloat16, in vectors of any length (AVX-512 BF16)."""
        return {"avx512bf16", "avx512vl"} <= set(self.features)

    @property
    def vector_registers(self) -> int:
        """Number of vector registers: 32 with AVX-512 and on aarch64, otherwise 16."""
        return 32 if self.arch == "aarch64" or "avx512f" in self.features else 16

    @property
    def cache_bytes(self) -> int:
        """Size of a core's second cache to rely on: 1 MiB with AVX-512, as since Skylake-SP; otherwise 256 KiB."""
        return 1 << 20 if "avx512f" in self.features else 1 << 18

    def require_host(self) -> None:
        """Return if this machine can run the code.

        Raises
        ------
        IncompatibleMachineError
            Naming the architecture, the features that this processor lacks, or what is wrong with driver and GPUs.
        """
        if self.kind == "cuda":
            self._require_gpu()
            return
        here = host_architecture()
        if self.arch != here:
            raise IncompatibleMachineError(
                f"code for {self.arch} does not run on this machine, which is {here}; build it for target 'llvm' here."
            )
        missing = sorted(set(self.features) - host_features())
        if missing:
            levels = [f"'llvm:{level}'" for level, needed in LEVELS.items() if host_features().issuperset(needed)]
            raise IncompatibleMachineError(
                f"this machine lacks the CPU features {', '.join(missing)}; build for one of the targets it can run: "
                f"{', '.join([*levels, repr('llvm')])}."
            )

    def _require_gpu(self) -> None:
        needs = f"code for {', '.join(self.gpu_archs)}"
        driver = find_driver()
        if driver is None or not driver.gpus:
            lacks = "NVIDIA driver (libcuda.so.1 is not there or does not start)" if driver is None else "NVIDIA GPU"
            raise IncompatibleMachineError(
                f"{needs} does not run on this machine, which has no {lacks}; run it where there is one, check it here "
                f"with `convt-tvm check --emulate --target {self.name}`, or build for target 'llvm'."
            )
        if driver.cuda < OLDEST_CUDA_DRIVER:
            found, wanted = (".".join(map(str, version)) for version in (driver.cuda, OLDEST_CUDA_DRIVER))
            raise IncompatibleMachineError(
                f"this machine's NVIDIA driver supports CUDA {found}, and kernels need {wanted}; install driver 580 or "
                "newer."
            )
        if not any(gpu.runs(self.gpu_archs) for gpu in driver.gpus):
            found = ", ".join(f"{gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})" for gpu in driver.gpus)
            raise IncompatibleMachineError(f"{needs} does not run on {found}; build for target 'cuda' there.")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"kind": self.kind, "arch": self.arch, "features": list(self.features)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The target that `to_json` wrote; raises TargetError for missing, unknown or ill-typed fields."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            raise TargetError(f"a target has the fields {sorted(known)}; found {values!r}.")
        features = values["features"]
        if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
            raise TargetError(f"a target's features are a list of names; found {features!r}.")
        return cls(str(values["kind"]), str(values["arch"]), tuple(features))

    def to_tvm(self) -> "tvm.target.Target":
        """Build the same target for TVM, which this imports.

        Features are spelled out, and ``mcpu`` is no more than a psABI level whose features are all present: a
        processor's own name would let LLVM use what a virtual machine masks. The level matters for LLVM's instruction
        costs only. The triple is fixed on Linux, so that two builds of TVM write the same target into tuning records.
        ``num-cores`` is 1 because tuning demands a number there; nothing generated depends on it.
        """
        import tvm.target

        if self.kind == "cuda":
            host = Target(kind="llvm", arch=host_architecture(), features=())
            device = {
                "kind": "cuda",
                "arch": self.arch,
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 48 << 10,
                "thread_warp_size": 32,
            }
            return tvm.target.Target(device, host=host.to_tvm())

        config: dict[str, Any] = {"kind": self.kind, "num-cores": 1}
        if self.level is not None:
            config["mcpu"] = self.level
        elif self.arch == "x86_64":
            config["mcpu"] = "x86-64"
        if sys.platform == "linux":
            config["mtriple"] = f"{self.arch}-unknown-linux-gnu"
        if self.features:
            config["mattr"] = [f"+{feature}" for feature in self.features]
        return tvm.target.Target(config)


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
        return hashlib.sha256(named.encode()).hexdigest()[:8]

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


def machine(cpuinfo: str | None = None) -> Machine:
    """Describe this machine: processor, cores this process may use, features, system and library versions.

    With the text of another machine's /proc/cpuinfo, describe that one; its system and versions are not known.
    """
    if cpuinfo is not None:
        values = _parse_cpuinfo(cpuinfo)
        cores = sum(line.startswith("processor") for line in cpuinfo.splitlines())
        features, system, python, versions = _features_in(values), "", "", {}
    else:
        values, cores, features = _cpuinfo(), _usable_cores(), host_features()
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
