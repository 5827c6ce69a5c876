import os
import shutil
import tempfile

import pytest
from hypothesis import settings

# No deadline: the first example of a configuration may compile a kernel. `--hypothesis-profile=long` draws more.
settings.register_profile("convt", deadline=None)
settings.register_profile("long", settings.get_profile("convt"), max_examples=5000)
settings.load_profile("convt")

_CACHE = pytest.StashKey[str]()


def pytest_configure(config):
    # Doctests build kernels too, so this is no fixture. The workers of pytest-xdist inherit the variable and share
    # the directory.
    if not hasattr(config, "workerinput"):
        config.stash[_CACHE] = tempfile.mkdtemp(prefix="convt-tvm-tests-")
        os.environ["CONVT_TVM_CACHE_DIR"] = config.stash[_CACHE]


def pytest_unconfigure(config):
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


@pytest.fixture
def run(capsys):
    """Runs `convt-tvm` in this process; returns exit code, stdout and stderr."""
    from convt_tvm import cli

    def call(*arguments):
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exited.value.code, captured.out, captured.err

    return call


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"needs a CUDA device; torch {torch.__version__} sees none")
