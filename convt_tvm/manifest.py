"""What an artifact says of itself: what its kernel computes, where it may run, how it was made, what its files hold."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from convt_tvm.digests import canonical, sha256
from convt_tvm.errors import ArtifactCorruptError, ArtifactError, SpecError, TargetError
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["FORMAT", "KERNEL_FILE", "MANIFEST_FILE", "REBUILD", "RUNTIME_FILE", "Manifest"]

FORMAT = 3
"""Version of the manifest's fields and of the kernel's calling convention."""

KERNEL_FILE = "kernel.so"
MANIFEST_FILE = "manifest.json"
RUNTIME_FILE = "libtvm_runtime.so"

REBUILD = "build it again with `convt-tvm build`, or copy the whole directory again"
"""The way out of a damaged artifact, in the words of an error."""


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
        `convt_tvm.fingerprint.source_fingerprint` when it was compiled.
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
                raise ArtifactCorruptError(f"a manifest's {name} cannot be {getattr(self, name)!r}; {REBUILD}.")
        for name in self.files:
            if not _is_file_name(name):
                raise ArtifactCorruptError(f"a manifest cannot list the file {name!r}; {REBUILD}.")
        digest = sha256(canonical(self._content()))
        if not self.digest:
            object.__setattr__(self, "digest", digest)
        elif self.digest != digest:
            raise ArtifactCorruptError(
                f"the manifest was changed after it was written: its digest is {str(self.digest)[:12]}, its content's "
                f"{digest[:12]}; {REBUILD}."
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
            raise ArtifactCorruptError(f"a manifest is a JSON object; found {type(values).__name__}; {REBUILD}.")
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
                f"{sorted(set(values) - known)}; {REBUILD}."
            )
        if not isinstance(values["digest"], str) or not values["digest"]:
            raise ArtifactCorruptError(f"a manifest's digest cannot be {values['digest']!r}; {REBUILD}.")
        if not isinstance(values["packed_shape"], list):
            raise ArtifactCorruptError(f"a manifest's packed_shape cannot be {values['packed_shape']!r}; {REBUILD}.")
        try:
            spec = ConvTranspose2dSpec.from_json(values["spec"])
            target = Target.from_json(values["target"])
        except (SpecError, TargetError, TypeError) as error:
            raise ArtifactCorruptError(f"the manifest's spec or target is not valid: {error} {REBUILD}.") from error
        given = {**values, "spec": spec, "target": target, "packed_shape": tuple(values["packed_shape"])}
        return cls(**given)


def _is_text_map(values: object, types: tuple[type, ...]) -> bool:
    return isinstance(values, dict) and all(isinstance(k, str) and isinstance(v, types) for k, v in values.items())
