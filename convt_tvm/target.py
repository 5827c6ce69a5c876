"""What code is compiled for. Neither TVM nor torch is imported, except by `Target.to_tvm`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from convt_tvm.digests import sha256
from convt_tvm.errors import IncompatibleMachineError, TargetError
from convt_tvm.gpu import ARCHITECTURES, DEFAULT_ARCHITECTURES, OLDEST_CUDA_DRIVER, find_driver, newest_architecture
from convt_tvm.processor import IMPLIES, LEVELS, TILE_FEATURES, host_architecture, host_features, with_implied

if TYPE_CHECKING:
    import tvm.target

__all__ = ["Target"]

TF32 = "tf32"
"""The feature of a target for GPUs that lets float32 be multiplied as tf32."""

_FORMS = (
    "write llvm, llvm:x86-64-v2, llvm:x86-64-v3, llvm:x86-64-v4, llvm:ARCH+FEATURE+FEATURE, cuda, cuda:sm_90, "
    "cuda:sm_80+sm_90 or cuda:sm_90+tf32"
)


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
        if self.arch not in IMPLIES:
            raise TargetError(f"architecture {self.arch!r} is not supported; use one of {', '.join(sorted(IMPLIES))}.")
        object.__setattr__(self, "features", with_implied(self.features, self.arch))

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
        if arch not in IMPLIES:
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
    def keeps_channels_last(self) -> bool:
        """Whether there are kernels that read and write channels_last: for processors."""
        return self.kind == "llvm"

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
        return f"{base}-{sha256(self.name.encode())[:8]}"

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
    def joins_vectors(self) -> bool:
        """Whether an instruction takes a vector from anywhere in two, and vectors are cache lines (AVX-512)."""
        return "avx512f" in self.features

    @property
    def loads_some(self) -> bool:
        """Whether an instruction loads some lanes of 32 or 64 bits each and leaves the others' memory alone (AVX2)."""
        return "avx2" in self.features

    @property
    def vector_registers(self) -> int:
        """Number of vector registers: 32 with AVX-512 and on aarch64, otherwise 16."""
        return 32 if self.arch == "aarch64" or "avx512f" in self.features else 16

    @property
    def has_few_registers(self) -> bool:
        """Whether the sums of two column phases, or loads made ahead, are too many for them: 16 vector registers."""
        return self.vector_registers <= 16

    @property
    def cache_bytes(self) -> int:
        """Size of a core's second cache to rely on.

        1 MiB with AVX-512, as since Skylake-SP; 512 KiB with AVX2, as Zen to Zen 3 (Intel's clients had 256 KiB until
        2020, and have had 1.25 MiB and more since); otherwise 256 KiB.
        """
        if "avx512f" in self.features:
            return 1 << 20
        return 1 << 19 if "avx2" in self.features else 1 << 18

    @property
    def held_weight_bytes(self) -> int:
        """What weights may take of that cache and still be found there when they are read again."""
        return self.cache_bytes * 3 // 4

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
