"""A failing case, small enough to mail: what failed, on which data, and how to see it again."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from convt_tvm.errors import RowsError
from convt_tvm.examine import examine
from convt_tvm.findings import Finding, Stage
from convt_tvm.implementations import Implementation, find_implementation
from convt_tvm.machine import package_versions
from convt_tvm.runtime import Kernel
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.target import Target

__all__ = ["Replay", "Reproducer", "read_reproducer", "replay", "write_reproducer"]


@dataclass(frozen=True, slots=True)
class Reproducer:
    """One finding, and all that is needed to come by it again.

    Attributes
    ----------
    spec, implementation, stage, data, seed, reason
        Those of the `Finding`.
    target
        The target's name.
    digest, schedule, layout
        Of the artifact that failed; None for other implementations.
    versions, commit
        What it was compiled and run with.
    """

    spec: str
    implementation: str
    stage: Stage
    data: str
    seed: int
    reason: str
    target: str
    digest: str | None
    schedule: str | None
    layout: Mapping[str, Any] | None
    versions: Mapping[str, str | None]
    commit: str | None

    @classmethod
    def of(cls, finding: Finding, implementation: Implementation, target: Target, commit: str | None) -> Self:
        """The reproducer of a finding about an implementation, whose kernel is taken from it."""
        try:
            operator = implementation.make(ConvTranspose2dSpec.from_name(finding.spec))
        except Exception:  # whatever kept it from being built is the finding's reason already
            operator = None
        manifest = operator.manifest if isinstance(operator, Kernel) else None
        return cls(
            spec=finding.spec,
            implementation=finding.implementation,
            stage=finding.stage,
            data=finding.data,
            seed=finding.seed,
            reason=finding.reason,
            target=target.name,
            digest=None if manifest is None else manifest.digest,
            schedule=None if manifest is None else manifest.schedule,
            layout=None if manifest is None else dict(manifest.layout),
            versions=package_versions(["apache-tvm", "apache-tvm-ffi", "torch", "numpy"]),
            commit=commit,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The reproducer that `to_json` wrote; raises RowsError for missing or unknown fields."""
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) - {"command"} != known:
            raise RowsError(
                f"a reproducer has the fields {sorted(known)}; `convt-tvm check --conformance` writes one for each "
                "failure."
            )
        return cls(**{name: values[name] for name in known})

    @property
    def file_name(self) -> str:
        """A name for its file that tells what failed."""
        words = [self.implementation.replace("/", "-"), self.stage, self.data.replace(" ", "-"), self.spec]
        return f"{'_'.join(words)}.json"


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a reproducer.

    Attributes
    ----------
    finding
        The same stage on the same data, now.
    same_artifact
        Whether the kernel is the one that failed; None if that was not ours.
    """

    finding: Finding
    same_artifact: bool | None


def write_reproducer(directory: Path, reproducer: Reproducer) -> Path:
    """Write a reproducer to a file of its own, with the command that runs it, and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / reproducer.file_name
    values = {**reproducer.to_json(), "command": f"convt-tvm check --replay {path}"}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return path


def read_reproducer(path: Path) -> Reproducer:
    """The reproducer in a file; raises RowsError if it is none, OSError if there is no such file."""
    try:
        return Reproducer.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RowsError(f"{path}: {error}") from error


def replay(reproducer: Reproducer) -> Replay:
    """Run the stage again on the same data.

    Raises
    ------
    RowsError
        if the stage has no such data any more, or there is no such implementation.
    SpecError, TargetError
        if the spec or the target is none.
    """
    target, spec = Target.parse(reproducer.target), ConvTranspose2dSpec.from_name(reproducer.spec)
    implementation = find_implementation(reproducer.implementation, target)
    for finding in examine(
        spec, [implementation], seed=reproducer.seed, stages=(reproducer.stage,), distributions=(reproducer.data,)
    ):
        if finding.data == reproducer.data:
            digest = Reproducer.of(finding, implementation, target, None).digest
            return Replay(finding, None if digest is None else digest == reproducer.digest)
    raise RowsError(f"the stage {reproducer.stage} has no data {reproducer.data!r} for {spec.name}.")
