"""Compiled kernels on disk: a directory with ``kernel.so`` and ``manifest.json``.

The manifest says what the kernel computes, where it may run, how it was made and the SHA-256 digest of every file. A
directory appears under its name complete or not at all: `publish` and `copy` write a hidden sibling, sync it, and
rename it. Neither TVM nor torch is imported.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, Self

from convt_tvm.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactNotFoundError,
    SpecError,
    TargetError,
)
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target, package_versions

__all__ = [
    "FORMAT",
    "KERNEL_FILE",
    "MANIFEST_FILE",
    "RUNTIME_FILE",
    "Manifest",
    "copy",
    "publish",
    "read",
    "read_manifest",
    "source_fingerprint",
    "verify",
]

FORMAT = 2
"""Version of the manifest's fields and of the kernel's calling convention."""

KERNEL_FILE = "kernel.so"
MANIFEST_FILE = "manifest.json"
RUNTIME_FILE = "libtvm_runtime.so"

_FILES = (KERNEL_FILE, MANIFEST_FILE, RUNTIME_FILE)
_REBUILD = "build it again with `convt-tvm build`, or copy the whole directory again"
_SOURCES = (
    *("phases", "spec", "gpu", "target", "layout", "dot_layout", "thread_layout", "tile_layout", "tensor_layout"),
    *("tensor_intrinsics", "bfloat16", "compute", "compute_dot", "compute_tiles", "compute_cuda", "compute_tensor"),
    *("cost", "cost_cuda", "cost_tensor", "schedule", "schedule_cuda", "schedule_tensor", "space", "shuffle"),
    *("statements", "stream", "outputs", "lower", "lower_window", "lower_dot", "lower_tiles", "lower_cuda"),
    *("lower_tensor", "cuda_toolkit", "emulator", "cuda_device_code", "cpu_code", "backends", "entry", "compiler"),
)
_COMPILERS = ("apache-tvm", "apache-tvm-ffi")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..", MANIFEST_FILE)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact holds; every field but ``digest`` is under the digest.

    Parameters
    ----------
    spec, target
        What is computed, and the CPU features needed to run it.
    schedule
        Name of the schedule space.
    layout
        The packed weight's layout in the words of the schedule; JSON values.
    trace
        The schedule's instructions and decisions; JSON values.
    packed_shape, packed_dtype
        Of the weight that the kernel reads; always 5-D.
    versions
        Distribution name to version, of what compiled it.
    fingerprint
        `source_fingerprint` when it was compiled.
    files
        File name to SHA-256 digest in hexadecimal; has ``kernel.so``.
    tuning
        ``code``, a digest of the lowered code; ``result``, the stored tuning result that chose the schedule;
        ``ignored``, why others did not. JSON values, each left out where there is none.
    resources
        What each function takes of each GPU architecture: registers, shared memory, spills. JSON values; none for CPUs.
    tested
        What `convt_tvm.determinism.confirm_repeats` found to give the same bits; empty if that was not tried.
    format
        `FORMAT`.
    digest
        SHA-256 over the canonical JSON of the others; computed if left out.

    Raises
    ------
    ArtifactCorruptError
        If a value has the wrong type, or the digest given is not the digest of the others.
    """

    spec: ConvTranspose2dSpec
    target: Target
    schedule: str
    layout: dict[str, Any]
    trace: list[Any]
    packed_shape: tuple[int, ...]
    packed_dtype: str
    versions: dict[str, str | None]
    fingerprint: str
    files: dict[str, str]
    tuning: dict[str, Any] = field(default_factory=dict)
    resources: list[dict[str, Any]] = field(default_factory=list)
    tested: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    digest: str = field(default="")

    def __post_init__(self) -> None:
        """Check the types and the digest, or compute it."""
        shape = self.packed_shape
        problems = {
            "schedule": not isinstance(self.schedule, str),
            "layout": not isinstance(self.layout, dict),
            "trace": not isinstance(self.trace, list),
            "packed_shape": len(shape) != 5 or not all(type(size) is int and size > 0 for size in shape),
            "packed_dtype": self.packed_dtype not in tuple(DTYPE_BYTES),
            "versions": not _is_text_map(self.versions, (str, type(None))),
            "fingerprint": not isinstance(self.fingerprint, str),
            "tuning": not isinstance(self.tuning, dict),
            "tested": not isinstance(self.tested, dict),
            "files": not _is_text_map(self.files, (str,)) or KERNEL_FILE not in self.files,
            "resources": not isinstance(self.resources, list),
            "format": self.format != FORMAT,
        }
        for name, wrong in problems.items():
            if wrong:
                raise ArtifactCorruptError(f"a manifest's {name} cannot be {getattr(self, name)!r}; {_REBUILD}.")
        for name in self.files:
            if not _is_file_name(name):
                raise ArtifactCorruptError(f"a manifest cannot list the file {name!r}; {_REBUILD}.")
        digest = _sha256(_canonical(self._content()))
        if not self.digest:
            object.__setattr__(self, "digest", digest)
        elif self.digest != digest:
            raise ArtifactCorruptError(
                f"the manifest was changed after it was written: its digest is {str(self.digest)[:12]}, its content's "
                f"{digest[:12]}; {_REBUILD}."
            )

    def _content(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "spec": self.spec.to_json(),
            "target": self.target.to_json(),
            "schedule": self.schedule,
            "layout": self.layout,
            "trace": self.trace,
            "packed_shape": list(self.packed_shape),
            "packed_dtype": self.packed_dtype,
            "versions": self.versions,
            "fingerprint": self.fingerprint,
            "files": self.files,
            "tuning": self.tuning,
            "resources": self.resources,
            "tested": self.tested,
        }

    @property
    def name(self) -> str:
        """``<spec name>-<first 12 digits of the digest>``."""
        return f"{self.spec.name}-{self.digest[:12]}"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**self._content(), "digest": self.digest}

    @classmethod
    def from_json(cls, values: object) -> Self:
        """The manifest that `to_json` wrote.

        Raises
        ------
        ArtifactCorruptError
            For missing, unknown or ill-typed fields, and if the digest is not that of the other fields.
        ArtifactError
            If the format is another version's.
        """
        if not isinstance(values, dict):
            raise ArtifactCorruptError(f"a manifest is a JSON object; found {type(values).__name__}; {_REBUILD}.")
        version = values.get("format", FORMAT)
        if type(version) is not int or version != FORMAT:
            raise ArtifactError(
                f"the artifact has format {version!r}, this convt_tvm reads format {FORMAT}; build it again with this "
                "version, or install the one that wrote it."
            )
        known = {item.name for item in fields(cls)}
        if set(values) != known:
            raise ArtifactCorruptError(
                f"a manifest lacks the fields {sorted(known - set(values))} and has the unknown fields "
                f"{sorted(set(values) - known)}; {_REBUILD}."
            )
        if not isinstance(values["digest"], str) or not values["digest"]:
            raise ArtifactCorruptError(f"a manifest's digest cannot be {values['digest']!r}; {_REBUILD}.")
        if not isinstance(values["packed_shape"], list):
            raise ArtifactCorruptError(f"a manifest's packed_shape cannot be {values['packed_shape']!r}; {_REBUILD}.")
        try:
            spec = ConvTranspose2dSpec.from_json(values["spec"])
            target = Target.from_json(values["target"])
        except (SpecError, TargetError, TypeError) as error:
            raise ArtifactCorruptError(f"the manifest's spec or target is not valid: {error} {_REBUILD}.") from error
        given = {**values, "spec": spec, "target": target, "packed_shape": tuple(values["packed_shape"])}
        return cls(**given)


def _is_text_map(values: object, types: tuple[type, ...]) -> bool:
    return isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, types) for k, v in values.items())


def _fingerprint(sources: Iterable[tuple[str, bytes]], versions: Mapping[str, str | None]) -> str:
    digests = {name: _sha256(text.replace(b"\r\n", b"\n")) for name, text in sources}
    return _sha256(_canonical([digests, dict(versions)]))


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
    return _fingerprint([(name, path.read_bytes()) for name, path in paths.items()], package_versions(_COMPILERS))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes, lasting: bool) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        if lasting:
            stream.flush()
            os.fsync(stream.fileno())


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories' names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _refuse_foreign(directory: Path) -> None:
    """Raise unless a directory about to be replaced holds nothing but what an artifact may hold."""
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in _FILES)
    if foreign:
        raise ArtifactError(
            f"{directory} is not empty and no artifact: it holds {', '.join(foreign[:5])}; name another directory."
        )


def _put_in_place(temporary: Path, directory: Path, digest: str) -> None:
    """Give a complete directory its name, replacing an artifact of other content that has it."""
    while True:
        try:
            temporary.rename(directory)
            return
        except OSError as error:
            if error.errno == errno.ENOTDIR:
                raise ArtifactError(f"{directory} is a file; name another directory.") from error
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(ArtifactError):
            if verify(directory).digest == digest:
                return
        with contextlib.suppress(FileNotFoundError):
            _refuse_foreign(directory)
            if _exchange(temporary, directory):
                return
            _move_aside_and_rename(temporary, directory)
            return


def _move_aside_and_rename(temporary: Path, directory: Path) -> None:
    """Replace where names cannot be exchanged; raises FileNotFoundError if another publisher came between."""
    aside = temporary.with_suffix(".old")
    directory.rename(aside)
    try:
        temporary.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            aside.rename(directory)
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(
    directory: Path,
    *,
    spec: ConvTranspose2dSpec,
    target: Target,
    schedule: str,
    layout: Mapping[str, Any],
    trace: Iterable[Any],
    packed_shape: Iterable[int],
    packed_dtype: str,
    versions: Mapping[str, str | None],
    fingerprint: str,
    files: Mapping[str, Path],
    tuning: Mapping[str, Any] | None = None,
    resources: Iterable[Mapping[str, Any]] = (),
    lasting: bool = True,
) -> Manifest:
    """Write an artifact and return its manifest; the directory is complete or as it was before, whenever this stops.

    ``files`` maps names inside the artifact, ``kernel.so`` at least, to where their content is now; they are copied,
    with the manifest, to a hidden sibling ``.<name>.<random>.tmp``, synced to the disk and renamed. Missing parents are
    made. Nothing is locked: of several publishers of the same content the first wins and the others succeed; of
    different content the last wins. A crash may leave the hidden sibling behind, which nothing reads and anyone may
    remove.

    A complete artifact with the same digest is left alone. Any other artifact of that name, broken or not, is replaced
    in one step (Linux's renameat2 with RENAME_EXCHANGE); on file systems that cannot exchange directories, the name is
    free for an instant between two renames. A process that has loaded the replaced kernel keeps it.

    Without ``lasting`` nothing is synced: for what is removed before the machine could lose it, as the directory of a
    process that removes it in the end. All else holds; but after the system, not only the process, has crashed, the
    directory may hold less than was written, which `verify` finds.

    Raises
    ------
    ArtifactError
        If the name belongs to a file, or to a directory that holds anything but an artifact's files.
    ArtifactCorruptError
        If a field has the wrong type.
    OSError
        As the file system says.
    """
    return _publish(
        Path(directory),
        {name: path.read_bytes() for name, path in files.items()},
        spec=spec,
        target=target,
        schedule=schedule,
        layout=dict(layout),
        trace=list(trace),
        packed_shape=tuple(int(size) for size in packed_shape),
        packed_dtype=packed_dtype,
        versions=dict(versions),
        fingerprint=fingerprint,
        tuning=dict(tuning or {}),
        resources=[dict(found) for found in resources],
        lasting=lasting,
    )


def _publish(directory: Path, content: Mapping[str, bytes], *, lasting: bool = True, **described: Any) -> Manifest:
    manifest = Manifest(**described, files={name: _sha256(data) for name, data in sorted(content.items())})
    foreign = sorted(set(content) - set(_FILES))
    if foreign:
        raise ArtifactError(f"an artifact holds {KERNEL_FILE} and {RUNTIME_FILE}; cannot publish {', '.join(foreign)}.")
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        for name, data in content.items():
            _write(temporary / name, data, lasting)
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=True, allow_nan=False)
        _write(temporary / MANIFEST_FILE, text.encode() + b"\n", lasting)
        if lasting:
            _sync_directory(temporary)
        _put_in_place(temporary, directory, manifest.digest)
        if lasting:
            _sync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _not_found(directory: Path, name: str) -> NoReturn:
    if not directory.is_dir():
        raise ArtifactNotFoundError(
            f"there is no artifact at {directory}: no such directory; build one with `convt-tvm build WORKLOAD -o DIR`."
        )
    if name == MANIFEST_FILE:
        held = sorted(entry.name for entry in directory.iterdir())[:5]
        raise ArtifactNotFoundError(
            f"{directory} is no artifact: it holds {', '.join(held) or 'nothing'} and no {MANIFEST_FILE}; {_REBUILD}."
        )
    raise ArtifactNotFoundError(f"the artifact {directory} lacks {name}, which its manifest lists; {_REBUILD}.")


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        _not_found(directory, name)
    except OSError as error:
        raise ArtifactError(f"cannot read {directory / name}: {error.strerror or error}.") from error


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an artifact, its own digest verified but not its files'; see `verify`.

    Raises
    ------
    ArtifactNotFoundError
        If the directory or the manifest does not exist.
    ArtifactCorruptError
        If the manifest is not JSON, lacks fields, has unknown ones, or was changed after it was written.
    ArtifactError
        If it cannot be read or has another version's format.
    """
    directory = Path(directory)
    data = _read(directory, MANIFEST_FILE)
    path = directory / MANIFEST_FILE
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{path} is not JSON ({error}; {len(data)} bytes); {_REBUILD}.") from error
    try:
        return Manifest.from_json(values)
    except ArtifactError as error:
        raise type(error)(f"{path}: {error}") from error


def read(directory: Path) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the content of every file it lists, verified; raises as `verify` does."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    content = {name: _read(directory, name) for name in manifest.files}
    for name, wanted in manifest.files.items():
        found = _sha256(content[name])
        if found != wanted:
            raise ArtifactCorruptError(
                f"{directory / name} ({len(content[name])} bytes) is not the file that was published: its SHA-256 is "
                f"{found[:12]}, the manifest says {wanted[:12]}; {_REBUILD}."
            )
    return manifest, content


def verify(directory: Path) -> Manifest:
    """The manifest of an artifact whose files all have the digests it gives.

    Reads every file. Files that the manifest does not list, such as a ``libtvm_runtime.so`` put there by hand, are not
    looked at.

    Raises
    ------
    ArtifactNotFoundError
        If the directory, the manifest or a file it lists does not exist.
    ArtifactCorruptError
        If the manifest is damaged (see `read_manifest`) or a file's digest differs.
    ArtifactError
        If a file cannot be read or the format is another version's.
    """
    return read(directory)[0]


def copy(
    directory: Path, to: Path, *, extra: Mapping[str, Path] | None = None, tested: Mapping[str, Any] | None = None
) -> Manifest:
    """Publish a verified copy of an artifact at ``to``, with ``extra`` files beside it, and return its manifest.

    Atomic, and replacing what is there, as `publish` does. An extra file, and what was ``tested``, are in the copy's
    manifest, which therefore has another digest; without them the copy is the same artifact.

    Raises
    ------
    ArtifactError
        As `verify` and `publish` do.
    """
    manifest, content = read(directory)
    described = {item.name: getattr(manifest, item.name) for item in fields(manifest)}
    for name in ("digest", "files"):
        del described[name]
    if tested is not None:
        described["tested"] = dict(tested)
    return _publish(Path(to), content | {name: path.read_bytes() for name, path in (extra or {}).items()}, **described)
