"""What tells one state of the code that makes kernels from another."""

import ast
import subprocess
import sys
from pathlib import Path

from convt_tvm import fingerprint
from convt_tvm.fingerprint import source_fingerprint


def test_the_fingerprint_covers_sources_and_compilers():
    base = fingerprint._fingerprint([("a.py", b"x\n"), ("b.py", b"y\n")], {"apache-tvm": "1"})
    assert base == fingerprint._fingerprint([("b.py", b"y\r\n"), ("a.py", b"x\n")], {"apache-tvm": "1"})
    others = [
        ([("a.py", b"x\n"), ("b.py", b"z\n")], {"apache-tvm": "1"}),
        ([("a.py", b"x\n"), ("c.py", b"y\n")], {"apache-tvm": "1"}),
        ([("a.py", b"x\n")], {"apache-tvm": "1"}),
        ([("a.py", b"x\n"), ("b.py", b"y\n")], {"apache-tvm": "2"}),
        ([("a.py", b"x\n"), ("b.py", b"y\n")], {"apache-tvm": None}),
    ]
    assert base not in {fingerprint._fingerprint(*other) for other in others}


def test_the_fingerprint_covers_every_module_that_a_build_compiles_with():
    package = Path(fingerprint.__file__).parent
    # The tuning logs choose a schedule and change none; what they chose is part of a cached kernel's key.
    apart = {"errors", "digests", "fingerprint", "manifest", "artifact", "arguments", "threads", "runtime"}
    apart |= {"machine", "records", "store", "database"}
    schedules = sorted(fingerprint._schedule_directory().glob("*.py"))
    assert any(path.name.startswith("llvm_") for path in schedules)
    reached, pending = set(), [*schedules, package / "compiler.py"]
    while pending:
        path = pending.pop()
        if path.parent == package:
            reached.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("convt_tvm."):
                name = node.module.split(".")[1]
                if name not in {"schedules", *apart, *reached}:
                    pending.append(package / f"{name}.py")
    assert set(fingerprint._SOURCES) == reached


def test_the_fingerprint_needs_neither_tvm_nor_torch_and_is_the_same_elsewhere():
    code = (
        "import sys; from convt_tvm.fingerprint import source_fingerprint; print(source_fingerprint());"
        "print([m for m in ('tvm', 'torch', 'numpy', 'tvm_ffi') if m in sys.modules])"
    )
    root = Path(fingerprint.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [source_fingerprint(), "[]"]
