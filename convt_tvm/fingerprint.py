"""What tells one state of the code that makes kernels from another."""

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from convt_tvm.digests import canonical, sha256
from convt_tvm.machine import package_versions

__all__ = ["source_fingerprint"]

_SOURCES = (
    *("phases", "spec", "gpu", "processor", "target", "layout", "depthwise_layout", "dot_layout", "thread_layout"),
    *("tile_layout", "tap_layout", "tensor_layout", "tensor_intrinsics", "bfloat16", "compute", "compute_depthwise"),
    *("compute_dot", "compute_tiles", "compute_taps", "compute_cuda", "compute_tensor", "cost", "cost_cuda"),
    *("cost_tensor", "schedule", "schedule_cuda", "schedule_tensor", "space", "shuffle", "statements", "stream"),
    *("tile_tap_layout", "compute_tile_taps", "lower_tile_taps", "tile_stores", "outputs", "lower", "lower_products"),
    *("lower_window", "lower_dot", "lower_tiles", "lower_taps"),
    *("lower_prefetch", "lower_cuda", "lower_tensor", "cuda_toolkit"),
    *("emulator", "cuda_device_code", "cpu_code", "backends", "batches", "entry", "compiler"),
)
_COMPILERS = ("apache-tvm", "apache-tvm-ffi")


def _fingerprint(sources: Iterable[tuple[str, bytes]], versions: Mapping[str, str | None]) -> str:
    digests = {name: sha256(text.replace(b"\r\n", b"\n")) for name, text in sources}
    return sha256(canonical([digests, dict(versions)]))


def _schedule_directory() -> Path:
    """Where ``convt_tvm.schedules`` is, installed or in a checkout that is only on the path."""
    found = importlib.util.find_spec("convt_tvm.schedules")
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    return Path(__file__).parent.parent / "schedules"


@functools.cache
def source_fingerprint() -> str:
    """SHA-256 over everything outside spec and target that changes generated code.

    That is the text of `build` and of all that it compiles with, every schedule included, and the versions of
    apache-tvm and apache-tvm-ffi. The same in a checkout, an editable install and a wheel. Computed once a process.
    """
    package = Path(__file__).parent
    paths = {f"{name}.py": package / f"{name}.py" for name in _SOURCES}
    paths |= {f"schedules/{path.name}": path for path in sorted(_schedule_directory().glob("*.py"))}
    paths |= {f"cuda/{path.name}": path for path in sorted((package / "cuda").iterdir())}
    return _fingerprint([(name, path.read_bytes()) for name, path in paths.items()], package_versions(_COMPILERS))
