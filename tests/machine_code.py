"""What objdump shows of compiled kernels: for tests of what their innermost loops do."""

import re
import shutil
import subprocess

import pytest


def disassemble(path):
    """All of a library, without the bytes of its instructions; skips the test where there is no objdump."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def innermost_loops(text):
    """Mnemonics and operands of each loop in a listing of x86 code that has no other loop in it."""
    lines = [re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line) for line in text.splitlines()]
    code = [(int(line[1], 16), line[2], line[3]) for line in lines if line]
    ends = []
    for at, name, operands in code:
        target = re.match(r"([0-9a-f]+) ", operands)
        if name.startswith("j") and target and int(target[1], 16) < at:
            ends.append((int(target[1], 16), at))
    return [
        [entry[1:] for entry in code if first <= entry[0] <= last]
        for first, last in ends
        if not any(first <= other <= end <= last for other, end in ends if (other, end) != (first, last))
    ]
