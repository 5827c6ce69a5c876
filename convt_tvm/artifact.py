"""Compiled kernels on disk: a directory with ``kernel.so`` and ``manifest.json``.

The manifest says what the kernel computes, where it may run, how it was made and the SHA-256 digest of every file. A
directory appears under its name complete or not at all: `publish` and `copy` write a hidden sibling, sync it, and
rename it. Neither TVM nor torch is imported.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from convt_tvm.digests import sha256
from convt_tvm.errors import ArtifactCorruptError, ArtifactError, ArtifactNotFoundError
from convt_tvm.manifest import KERNEL_FILE, MANIFEST_FILE, REBUILD, RUNTIME_FILE, Manifest
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["copy", "publish", "read", "read_manifest", "verify"]

_FILES = (KERNEL_FILE, MANIFEST_FILE, RUNTIME_FILE)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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
    manifest = Manifest(**described, files={name: sha256(data) for name, data in sorted(content.items())})
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
            f"{directory} is no artifact: it holds {', '.join(held) or 'nothing'} and no {MANIFEST_FILE}; {REBUILD}."
        )
    raise ArtifactNotFoundError(f"the artifact {directory} lacks {name}, which its manifest lists; {REBUILD}.")


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
        raise ArtifactCorruptError(f"{path} is not JSON ({error}; {len(data)} bytes); {REBUILD}.") from error
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
        found = sha256(content[name])
        if found != wanted:
            raise ArtifactCorruptError(
                f"{directory / name} ({len(content[name])} bytes) is not the file that was published: its SHA-256 is "
                f"{found[:12]}, the manifest says {wanted[:12]}; {REBUILD}."
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
