"""The kernel of a spec, compiled once for each machine and kept in the user's cache directory."""

import json
import os
import threading
import warnings
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from convt_tvm.database import find_result
from convt_tvm.digests import sha256
from convt_tvm.errors import ArtifactCorruptError, ArtifactNotFoundError
from convt_tvm.fingerprint import source_fingerprint
from convt_tvm.manifest import FORMAT
from convt_tvm.runtime import Kernel, load
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["cache_directory", "cached_kernel"]

_kernels: dict[tuple[ConvTranspose2dSpec, Target], Kernel] = {}
_flights: defaultdict[tuple[ConvTranspose2dSpec, Target], threading.Lock] = defaultdict(threading.Lock)
_guard = threading.Lock()


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``$CONVT_TVM_CACHE_DIR``, or else the platform's cache directory for this user.

    The variable is read at each call. Nothing is created. Deleting the directory is always safe; what is needed is
    compiled again.
    """
    override = os.environ.get("CONVT_TVM_CACHE_DIR")
    return Path(override).expanduser().absolute() if override else user_cache_path("convt_tvm", appauthor=False)


def cached_kernel(spec: ConvTranspose2dSpec, target: str | Target | None = None) -> Kernel:
    """Compiled kernel of a spec: this process's, or the one on disk, or else a newly built one.

    The entry on disk is keyed by the spec, the target, the stored tuning result that chooses its schedule and
    `source_fingerprint`: a kernel compiled by other code, by another TVM or for another machine is never
    found. A miss imports the compiler; a hit does not.

    Threads that ask for one kernel at the same time wait for a single build; so do processes, on a lock file beside
    the entry. An entry appears complete or not at all. One whose content is not what its manifest says is reported by
    a RuntimeWarning and built again. Where the cache directory cannot be written, a miss warns as well and builds
    a kernel that lives as long as this process.

    Parameters
    ----------
    spec
        What the kernel computes.
    target
        What it is compiled for; this machine by default.

    Raises
    ------
    TargetError
        if the target is a string that names none.
    BuildError
        if compilation fails; the next call tries again.
    IncompatibleMachineError
        if the target is another architecture or has CPU features that this machine lacks; nothing is built then.
    """
    target = Target.parse("llvm" if target is None else target).for_dtype(spec.dtype)
    key = (spec, target)
    found = _kernels.get(key)
    if found is not None:
        return found
    with _guard:
        flight = _flights[key]
    with flight:
        if key not in _kernels:
            _kernels[key] = _from_disk(spec, target)
        return _kernels[key]


def _from_disk(spec: ConvTranspose2dSpec, target: Target) -> Kernel:
    fingerprint = source_fingerprint()
    directory = cache_directory() / _entry_name(spec, target, fingerprint)
    try:
        # Without the lock: a directory that exists is complete, and a read-only cache can serve hits.
        return _load_entry(directory, spec, target, fingerprint)
    except (ArtifactNotFoundError, ArtifactCorruptError):
        pass
    target.require_host()

    # On a miss only: serving from the cache needs no compiler.
    from convt_tvm.compiler import build, build_artifact

    with ExitStack() as held:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(directory.with_name(directory.name + ".lock")))
        except OSError as error:
            warnings.warn(
                f"{directory.parent} cannot be written ({error}), so the kernel of {spec.name} is built for this "
                "process only; set CONVT_TVM_CACHE_DIR to a directory that can.",
                RuntimeWarning,
                stacklevel=3,
            )
            return build(spec, target)
        try:
            # Whoever held the lock before may have built it.
            return _load_entry(directory, spec, target, fingerprint)
        except (ArtifactNotFoundError, ArtifactCorruptError) as error:
            if directory.exists():
                warnings.warn(f"{str(error).rstrip('.')}; it is built again.", RuntimeWarning, stacklevel=3)
        build_artifact(spec, target, directory)
        return load(directory)


def _entry_name(spec: ConvTranspose2dSpec, target: Target, fingerprint: str) -> str:
    result = find_result(spec, target).result
    fields = {
        "format": FORMAT,
        "spec": spec.to_json(),
        "target": target.to_json(),
        "fingerprint": fingerprint,
        "result": None if result is None else result.summary(),
    }
    digest = sha256(json.dumps(fields, sort_keys=True).encode())
    return f"{spec.name}-{digest[:16]}"


def _load_entry(directory: Path, spec: ConvTranspose2dSpec, target: Target, fingerprint: str) -> Kernel:
    kernel = load(directory)
    manifest = kernel.manifest
    if (manifest.spec, manifest.target, manifest.fingerprint) != (spec, target, fingerprint):
        raise ArtifactCorruptError(
            f"{directory} holds {manifest.spec.name} for {manifest.target.name} where {spec.name} for {target.name} "
            "belongs"
        )
    return kernel
