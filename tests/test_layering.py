"""Imports point one way, and only the compiling half of the package imports the compiler."""

import ast
import functools
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module and what it may import of the package, anywhere in its text: itself a part of the plan, so a new module needs a
# row. A row names earlier rows only. "schedules" stands for every file of schedules/.
MAY_IMPORT = {
    "errors": "",
    "phases": "",
    "spec": "errors phases",
    "workloads": "errors spec",
    "gpu": "",
    "digests": "",
    "processor": "errors",
    "target": "errors gpu digests processor",
    "machine": "gpu digests processor target",
    "fingerprint": "digests machine",
    "manifest": "digests errors spec target",
    "artifact": "digests errors spec target manifest",
    "huge_pages": "",
    "arguments": "errors spec huge_pages",
    "threads": "errors",
    "tile_unit": "errors",
    "libraries": "errors manifest",
    "kernel": "errors spec manifest artifact arguments threads libraries",
    "gpu_kernel": "errors gpu spec manifest arguments kernel",
    "runtime": "errors processor manifest artifact threads tile_unit libraries kernel gpu_kernel",
    "layout": "phases spec",
    "statements": "",
    "shuffle": "statements",
    "bfloat16": "shuffle statements",
    "compute": "spec target layout",
    "thread_layout": "spec layout",
    "tile_layout": "spec layout",
    "dot_layout": "spec layout",
    "depthwise_layout": "spec layout",
    "tap_layout": "spec layout",
    "tile_tap_layout": "spec tap_layout tile_layout",
    "compute_depthwise": "spec target layout compute depthwise_layout",
    "compute_dot": "spec target layout bfloat16 compute dot_layout",
    "compute_tiles": "spec target layout compute tile_layout",
    "compute_taps": "spec target layout compute tap_layout",
    "compute_tile_taps": "spec target compute compute_taps compute_tiles tile_tap_layout",
    "compute_cuda": "spec target layout compute thread_layout",
    "tensor_layout": "phases spec layout",
    "tensor_intrinsics": "spec tensor_layout thread_layout",
    "compute_tensor": "spec target compute compute_cuda tensor_layout tensor_intrinsics",
    "cost": "spec target layout",
    "cost_cuda": "gpu spec target layout thread_layout",
    "cost_tensor": "gpu spec target thread_layout tensor_layout cost_cuda",
    "schedule": "spec layout compute",
    "schedule_cuda": "thread_layout",
    "schedule_tensor": "spec compute thread_layout tensor_layout tensor_intrinsics compute_tensor",
    "schedules": "spec processor target layout depthwise_layout dot_layout tile_layout tap_layout tile_tap_layout "
    "tensor_layout thread_layout compute compute_tiles compute_taps compute_tile_taps compute_cuda compute_tensor cost "
    "cost_cuda cost_tensor schedule schedule_cuda schedule_tensor",
    "records": "digests errors",
    "store": "errors records",
    "database": "errors gpu spec target machine threads records store",
    "space": "errors spec target layout cost schedules records",
    "stream": "layout statements",
    "tile_stores": "spec bfloat16 shuffle statements",
    "outputs": "spec target layout bfloat16 compute shuffle statements stream tile_stores",
    "lower_products": "spec target layout compute shuffle statements stream",
    "lower_window": "layout compute shuffle statements target",
    "lower": "spec target layout bfloat16 compute statements stream outputs lower_products lower_window",
    "lower_dot": "dot_layout bfloat16 compute lower lower_products",
    "lower_tiles": "spec compute compute_taps compute_tiles statements lower tile_layout",
    "lower_taps": "spec target compute compute_taps tap_layout shuffle statements stream lower lower_products",
    "lower_tile_taps": "spec bfloat16 compute compute_taps compute_tiles compute_tile_taps tile_layout shuffle "
    "statements lower lower_taps lower_tiles",
    "lower_prefetch": "thread_layout statements",
    "lower_cuda": "spec layout compute compute_cuda thread_layout statements lower lower_prefetch",
    "lower_tensor": "spec compute compute_tensor tensor_layout statements lower_cuda",
    "cuda_toolkit": "errors",
    "emulator": "errors cuda_toolkit",
    "emulated_torch": "errors gpu emulator",
    "cuda_device_code": "errors target tensor_intrinsics cuda_toolkit emulator",
    "backends": "spec target layout depthwise_layout dot_layout thread_layout tensor_layout tile_layout tap_layout "
    "tile_tap_layout compute compute_depthwise compute_dot compute_tiles compute_taps compute_tile_taps compute_cuda "
    "compute_tensor schedule schedule_cuda lower lower_dot lower_tiles lower_taps lower_tile_taps lower_cuda "
    "lower_tensor cuda_toolkit cuda_device_code",
    "batches": "statements",
    "entry": "statements",
    "cpu_code": "target",
    "compiler": "errors spec target machine layout fingerprint manifest artifact runtime records database space "
    "entry backends batches cpu_code",
    "cache": "digests errors spec target fingerprint manifest runtime database compiler",
    "plan": "errors gpu phases spec target layout runtime cache",
    "functional": "errors plan",
    "packed": "plan",
    "nn": "errors plan functional packed",
    "reference": "errors spec",
    "measure": "",
    "place": "errors gpu target reference measure",
    "check": "errors spec workloads target runtime compiler reference measure place",
    "emulate": "errors spec workloads target space emulator compiler check",
    "json_lines": "errors",
    "rows": "errors json_lines measure",
    "fuzz": "errors spec",
    "distributions": "errors spec reference",
    "rounding": "spec reference",
    "errormap": "phases spec",
    "findings": "errors errormap rounding json_lines",
    "special": "spec reference check",
    "determinism": "errors spec runtime reference check",
    "peers": "spec reference",
    "roofline": "spec huge_pages target bfloat16 runtime statements stream measure",
    "roofline_torch": "spec roofline",
    "bench": "spec workloads processor target machine runtime compiler reference measure place check rows peers "
    "roofline roofline_torch",
    "workers": "",
    "trials": "errors spec target runtime records space emulator emulated_torch compiler reference measure place "
    "workers",
    "remote": "errors spec processor target machine manifest artifact trials workers reference",
    "search": "spec records",
    "session": "errors records store measure trials search",
    "metaschedule": "spec target records store space backends",
    "generic": "spec target machine layout compute records space compiler search",
    "tune": "errors spec workloads target machine fingerprint compute records store database space compiler "
    "reference measure place check bench trials remote search session metaschedule generic",
    "bundle": "errors rows spec workloads target fingerprint manifest libraries records database space emulator "
    "workers trials bench",
    "bundle_run": "errors machine artifact runtime cuda_toolkit emulated_torch place check bench peers workloads "
    "json_lines records store search session workers trials tune bundle",
    "explain": "spec workloads target records space compiler roofline",
    "pictures": "errors",
    "report": "errors rows pictures",
    "implementations": "errors spec target layout dot_layout tile_layout cost space compiler check emulate peers",
    "examine": "errors spec reference check distributions errormap findings rounding special determinism "
    "implementations peers target machine workloads",
    "check_plots": "errors findings rounding pictures",
    "check_report": "errors findings rounding json_lines check_plots",
    "replay": "errors spec target machine runtime findings examine implementations",
    "cases": "errors spec fuzz",
    "conformance": "fingerprint target distributions findings implementations json_lines examine replay cases",
    "doctor": "errors gpu cuda_toolkit target machine runtime",
    "__init__": "errors spec target runtime compiler functional nn",
    "terminal": "check doctor rows explain",
    "terminal_numerics": "findings implementations conformance terminal",
    "session_report": "errors spec target records store compiler search pictures",
    "terminal_tune": "spec records session session_report terminal",
    "cli_options": "machine workloads target terminal",
    "cli_tune": "errors workloads target threads records database session tune session_report terminal_tune "
    "cli_options",
    "cli_bench": "workloads target json_lines rows peers roofline place bench explain report findings check_report "
    "terminal cli_options cli_tune",
    "cli_bundle": "machine workloads target emulated_torch terminal bundle cli_options",
    "cli_check": "errors workloads target machine check emulate bench findings implementations examine json_lines "
    "pictures check_report replay cases conformance terminal terminal_numerics cli_options",
    "cli": "__init__ errors workloads target machine manifest artifact runtime compiler cache check determinism doctor "
    "store terminal cli_options cli_bench cli_bundle cli_check cli_tune",
    "__main__": "cli",
}

# These import tvm when they are imported; the others may do so inside a function only.
COMPILING = {
    *("compute", "compute_depthwise", "compute_dot", "compute_tiles", "compute_taps", "compute_cuda", "compute_tensor"),
    *("schedule", "schedule_cuda", "schedule_tensor", "schedules", "shuffle", "bfloat16", "statements", "stream"),
    *("compute_tile_taps", "tensor_intrinsics", "space"),
    *("tile_stores", "outputs", "lower", "lower_products", "lower_window", "lower_dot", "lower_tiles", "lower_cuda"),
    *("lower_tensor", "lower_taps", "lower_tile_taps", "lower_prefetch"),
    *("cuda_device_code", "cpu_code", "entry", "backends", "batches", "compiler", "emulate", "metaschedule", "generic"),
}

# What runs where no compiler is installed.
SERVING = ["__init__", "artifact", "runtime", "cache", "plan", "functional", "packed", "nn", "cli"]


def read_sources():
    sources = {}
    for package, folder in (("convt_tvm", ROOT / "convt_tvm"), ("convt_tvm.schedules", ROOT / "schedules")):
        for path in folder.rglob("*.py"):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
            sources[name] = path.read_text(encoding="utf-8")
    return sources


def row_of(module):
    """`spec` for convt_tvm.spec, `__init__` for convt_tvm itself, `schedules` for all below convt_tvm.schedules."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@functools.cache
def imports_of(source, module):
    """Triples (imported module, line, whether it is imported as soon as `module` is)."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.rpartition(".")[0]
            origin = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            if origin == "convt_tvm":
                submodules = {alias.name for alias in node.names} & MAY_IMPORT.keys()
                found.extend((f"convt_tvm.{name}", node.lineno, at_import) for name in sorted(submodules))
                if len(submodules) == len(node.names):
                    return
            found.append((origin, node.lineno, at_import))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, at_import)

    visit(ast.parse(source), True)
    return found


def violations(sources):
    """One line for each import that the table does not allow."""
    found = []
    for module, source in sources.items():
        row = row_of(module)
        if row not in MAY_IMPORT:
            found.append(f"{module} has no row in MAY_IMPORT")
            continue
        allowed = {row, *MAY_IMPORT[row].split()}
        for name, line, at_import in imports_of(source, module):
            if name.split(".")[0] == "convt_tvm" and row_of(name) not in allowed:
                found.append(f"{module}:{line} imports {name}")
            if name.split(".")[0] == "tvm" and at_import and row not in COMPILING:
                found.append(f"{module}:{line} imports {name} when it is imported")
    return found


def reached(sources, start):
    """Rows whose import `start` brings about, its packages' included, and what it was that led there."""
    graph = {}
    for module, source in sources.items():
        names = {name for name, _, at_import in imports_of(source, module) if at_import}
        graph.setdefault(row_of(module), set()).update(
            "tvm" if name.split(".")[0] == "tvm" else row_of(name)
            for name in names
            if name.split(".")[0] in ("tvm", "convt_tvm")
        )
    via = {start: None}
    queue = [start]
    for row in queue:
        for following in sorted(graph.get(row, set()) | ({"__init__"} if row != "tvm" else set())):
            if following not in via:
                via[following] = row
                queue.append(following)
    return via


def test_the_table_itself_points_one_way():
    seen = set()
    for row, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= seen, row
        seen.add(row)


def test_imports_follow_the_table():
    assert violations(read_sources()) == []


def test_every_row_of_the_table_is_a_module():
    assert {row_of(name) for name in read_sources()} == MAY_IMPORT.keys()


@pytest.mark.parametrize("row", SERVING)
def test_serving_does_not_reach_the_compiler(row):
    assert "tvm" not in reached(read_sources(), row)


@pytest.mark.parametrize(
    ("module", "planted", "complaint"),
    [
        ("convt_tvm.spec", "from convt_tvm.compiler import build", "convt_tvm.spec:1 imports convt_tvm.compiler"),
        ("convt_tvm.spec", "from convt_tvm import compiler", "convt_tvm.spec:1 imports convt_tvm.compiler"),
        ("convt_tvm.spec", "from . import compiler", "convt_tvm.spec:1 imports convt_tvm.compiler"),
        ("convt_tvm.spec", "from .compiler import build", "convt_tvm.spec:1 imports convt_tvm.compiler"),
        ("convt_tvm.spec", "import convt_tvm.compiler as b", "convt_tvm.spec:1 imports convt_tvm.compiler"),
        ("convt_tvm.spec", "from convt_tvm import load", "convt_tvm.spec:1 imports convt_tvm"),
        (
            "convt_tvm.runtime",
            "def f():\n    from convt_tvm import compute",
            "convt_tvm.runtime:2 imports convt_tvm.compute",
        ),
        ("convt_tvm.runtime", "import tvm", "convt_tvm.runtime:1 imports tvm when it is imported"),
        (
            "convt_tvm.runtime",
            "try:\n    from tvm import te\nexcept ImportError: pass",
            "convt_tvm.runtime:2 imports tvm when",
        ),
        ("convt_tvm.runtime", "class A:\n    import tvm.ir", "convt_tvm.runtime:2 imports tvm.ir when it is imported"),
        (
            "convt_tvm.schedules.llvm_new",
            "from convt_tvm.compiler import build",
            "convt_tvm.schedules.llvm_new:1 imports",
        ),
        ("convt_tvm.helpers", "", "convt_tvm.helpers has no row in MAY_IMPORT"),
    ],
)
def test_a_planted_import_is_found(module, planted, complaint):
    sources = read_sources()
    before = violations(sources)
    sources[module] = planted + "\n" + sources.get(module, "")
    (found,) = [line for line in violations(sources) if line.startswith(complaint) and line not in before]
    assert found


@pytest.mark.parametrize(
    "harmless",
    [
        "import tvm_ffi",
        "def f():\n    import tvm",
        "if TYPE_CHECKING:\n    import tvm",
        "f = lambda: __import__('tvm')",
    ],
)
def test_a_late_import_of_the_compiler_is_allowed(harmless):
    assert violations({"convt_tvm.runtime": harmless}) == []
    assert "tvm" not in reached({"convt_tvm.runtime": harmless}, "runtime")


def test_a_planted_detour_to_the_compiler_is_found():
    sources = {"convt_tvm.nn": "import convt_tvm.cache", "convt_tvm.cache": "import convt_tvm.compiler"}
    sources["convt_tvm.compiler"] = "from tvm import te"
    assert reached(sources, "nn")["tvm"] == "compiler"
    assert "tvm" in reached({"convt_tvm.nn": "", "convt_tvm.__init__": "import tvm"}, "nn")


def loaded_after(statement):
    command = [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())


def test_serving_modules_load_without_the_compiler():
    loaded = loaded_after("import convt_tvm, convt_tvm.runtime, convt_tvm.functional, convt_tvm.nn")
    assert "convt_tvm.nn" in loaded
    assert "tvm" not in loaded


def test_the_check_for_loaded_modules_sees_the_compiler():
    # A stand-in with its name: the real one takes seconds to import.
    assert "tvm" in loaded_after("import types; sys.modules['tvm'] = types.ModuleType('tvm')\nimport tvm")


def test_importing_the_package_loads_no_tensor_library():
    loaded = loaded_after("import convt_tvm")
    assert loaded.isdisjoint({"tvm", "torch"})


def test_no_public_name_is_shadowed_by_a_module_of_the_same_name():
    """Importing `convt_tvm.build` would put that module where `convt_tvm.build(spec)` looks for the function."""
    import convt_tvm

    modules = {path.stem for path in (ROOT / "convt_tvm").glob("*.py")}
    assert set(convt_tvm._HOME) & modules == set()
