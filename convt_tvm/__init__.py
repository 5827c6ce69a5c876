"""PyTorch's ConvTranspose2d, declared in TVM TE, scheduled for this machine and compiled ahead of time.

Names are imported when they are first used: loading and calling a kernel needs neither TVM's compiler nor torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convt_tvm import errors, functional, nn
    from convt_tvm.compiler import build
    from convt_tvm.runtime import Kernel, get_num_threads, load, set_num_threads
    from convt_tvm.spec import ConvTranspose2dSpec
    from convt_tvm.target import Target

__version__ = "0.1.0"

__all__ = [
    "ConvTranspose2dSpec",
    "Kernel",
    "Target",
    "build",
    "errors",
    "functional",
    "get_num_threads",
    "load",
    "nn",
    "set_num_threads",
]

_HOME = {
    "ConvTranspose2dSpec": "spec",
    "Kernel": "runtime",
    "Target": "target",
    "build": "compiler",
    "get_num_threads": "runtime",
    "load": "runtime",
    "set_num_threads": "runtime",
}
_MODULES = ("errors", "functional", "nn")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
