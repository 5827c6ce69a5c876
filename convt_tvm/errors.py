"""The exceptions this package raises; each is also the built-in type that PyTorch raises for the same mistake."""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactNotFoundError",
    "BuildError",
    "BundleError",
    "ConvTError",
    "IncompatibleMachineError",
    "InputsError",
    "RowsError",
    "SpecError",
    "SpecTypeError",
    "TargetError",
    "TuningError",
    "TuningLogError",
    "UnknownWorkloadError",
    "UnsupportedDtypeError",
]


class ConvTError(Exception):
    """Base of every error that convt_tvm raises on purpose."""


class SpecError(ConvTError, ValueError, RuntimeError):
    """Parameters that describe no transposed convolution.

    PyTorch raises ValueError for some of them in the constructor and RuntimeError for others at the call; this is both.
    """


class SpecTypeError(SpecError, TypeError):
    """A parameter that is no integer where PyTorch takes integers only."""


class UnsupportedDtypeError(SpecError, NotImplementedError):
    """A dtype the operator is not defined for."""


class ArgumentError(ConvTError, ValueError, RuntimeError):
    """A tensor whose shape, dtype or device is not what the kernel was built for."""


class ArgumentTypeError(ConvTError, TypeError):
    """An argument that is neither a torch tensor nor a numpy array, or a mixture of both."""


class TargetError(ConvTError, ValueError):
    """A target string that names nothing this package can compile for."""


class BuildError(ConvTError, RuntimeError):
    """Compilation or linking failed."""


class BundleError(ConvTError, ValueError):
    """A bundle that cannot be made, or not be run as asked."""


class UnknownWorkloadError(ConvTError, ValueError):
    """A workload argument that is no suite, no name and no canonical spec name."""


class ArtifactError(ConvTError, RuntimeError):
    """An artifact that cannot be used."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """No artifact where one was asked for, or one of its files is missing."""


class ArtifactCorruptError(ArtifactError):
    """An artifact whose content is not what its manifest says."""


class IncompatibleMachineError(ArtifactError):
    """An artifact compiled for a machine that this one is not."""


class InputsError(ConvTError, ValueError):
    """Data on which a wrong kernel could give the right answer."""


class RowsError(ConvTError, ValueError):
    """Benchmark rows that cannot be read or compared."""


class TuningError(ConvTError, RuntimeError):
    """An autotuning session that cannot go on."""


class TuningLogError(ConvTError, ValueError):
    """Stored tuning records that cannot be read or used."""
