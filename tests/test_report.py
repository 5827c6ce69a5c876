import sys
from dataclasses import replace

import pytest
from test_rows import run_of

from convt_tvm.errors import RowsError
from convt_tvm.report import plot, to_markdown, update_section
from convt_tvm.rows import OURS, OURS_DEFAULT, OURS_ONE_THREAD


def two_workloads():
    measured = {"bound_us": 500.0, "bound_by": "compute", "peak_gflops": 115.6}
    first = run_of({OURS: 617.0, "torch": 2400.0, "onnxruntime": 735.0}, **measured)
    second = run_of({OURS: 100.0, "torch": 1280.0, "onnxruntime": 50.0}, spec="other", workload="dcgan/5", **measured)
    first[0] = replace(first[0], share_of_peak=0.8, share_of_bound=0.81)
    return [*first, *second]


def test_the_table_holds_every_workload_and_its_losses():
    lines = to_markdown(two_workloads()).splitlines()
    assert lines[0] == "**1 thread**, milliseconds a call, median of 3 rounds"
    header = (
        "workload | bound | ours | torch | onnxruntime | best peer / ours | torch / ours | noise | of peak | of bound"
    )
    assert lines[2] == f"| {header} |"
    assert lines[3] == f"|---|---|{'---:|' * 8}"
    assert lines[4] == "| dcgan/2 | 0.500 compute | 0.617 | 2.40 | **0.735** | 1.19 | 3.89 | 2.0% | 80% | 81% |"
    assert (
        lines[5] == "| dcgan/5 | 0.500 compute | 0.100 | 1.28 | **0.0500** | **0.500 behind** | 12.8 | 2.0% | - | - |"
    )
    assert lines[7] == (
        "Geometric means of 2: 0.772 times the best peer of each workload, 7.06 times torch eager. Behind the best "
        "peer by more than the noise: 1."
    )
    assert lines[9] == "Measured peak: 116 GFLOP/s."
    assert lines[-1] == "a cpu, 2 cores, Linux, Python 3.11.0; torch 2.13.0; commit abc; 2026-01-01."


@pytest.mark.parametrize(
    ("machine", "timed"),
    [
        ({}, "the bandwidth that of reading and writing as many bytes as the layer does"),
        ({"gpu": {"name": "a GPU"}}, "of a product of matrices and of a copy no smaller than the layer's tensors"),
    ],
)
def test_what_the_bound_was_measured_with_is_told(machine, timed):
    text = to_markdown(run_of({OURS: 10.0, "torch": 40.0}, machine=machine))
    assert f"both are medians taken by turns with the kernels, {timed}. *noise*" in text


def test_a_tuned_kernel_has_the_default_beside_it():
    rows = run_of({OURS: 100.0, OURS_DEFAULT: 200.0, "torch": 150.0})
    lines = to_markdown([*rows, *run_of({OURS: 100.0, "torch": 150.0}, spec="other", workload="dcgan/5")]).splitlines()
    assert lines[2].startswith("| workload | bound | ours | ours_default | torch |")
    assert lines[4].startswith("| dcgan/2 | - | 0.100 | 0.200 | **0.150** | 1.50 |")
    assert lines[5].startswith("| dcgan/5 | - | 0.100 |  | **0.150** | 1.50 |")
    assert lines[7].endswith("With no search: 1.06 times the best peer, behind 1.")


def test_what_was_not_timed_says_why():
    text = to_markdown(run_of({OURS: 10.0, "torch": None}))
    assert "| rejected | - | - |" in text
    assert "No peer was timed." in text
    assert "| dcgan/2 | - | rejected | **0.0050** | - | - |" in to_markdown(run_of({OURS: None, "torch": 5.0}))


def test_thread_counts_have_tables_of_their_own_and_every_commit_is_named():
    text = to_markdown([*two_workloads(), *run_of({OURS: 5.0, "torch": 6.0}, threads=2, commit="def+")])
    assert text.index("**1 thread**") < text.index("**2 threads**")
    assert "commit abc;" in text and "commit def+;" in text


def test_times_stand_beside_those_with_one_thread_and_in_float32_of_the_same_commit():
    spec, bound = "n1_ci8_bias_{}_channels_last", {"bound_by": "compute"}
    one = run_of({OURS: 4000.0, "torch": 9e3}, spec=spec.format("float32"), **bound)
    # The machine was slower than when one thread had a table of its own.
    beside = {OURS: 2600.0, OURS_ONE_THREAD: 5000.0, "torch": 9e3}
    two = run_of(beside, spec=spec.format("float32"), threads=2, **bound)
    narrow = run_of({OURS: 2000.0, "torch": 9e3}, spec=spec.format("bfloat16"), **bound)
    text = to_markdown([*one, *two, *narrow])
    assert "noise | of peak | of bound | of 1 thread |\n" in text and "| - | - | 0.520 |\n" in text
    assert "noise | of peak | of bound | of float32 |\n" in text and "| - | - | 0.500 |\n" in text
    assert "Where computing is the bound ours take 0.52 of the time with 1 thread (2 ms and more)." in text
    assert "Where computing is the bound ours take 0.50 of the time in float32." in text
    assert "*of 1 thread*: our time over that with one thread" in text
    assert "of 1 thread" not in to_markdown([*one, *(row for row in two if row.implementation != OURS_ONE_THREAD)])
    for changes in {"commit": "def"}, {"spec": spec.format("bfloat16").replace("_channels_last", "")}:
        assert "of float32" not in to_markdown([*one, *(replace(row, **changes) for row in narrow)])
    short = [replace(row, median_us=row.median_us and row.median_us / 3) for row in two]
    assert "of 1 thread |" in to_markdown(short) and "Where computing" not in to_markdown(short)


def test_the_overhead_of_a_call_is_told_apart_from_kernels():
    tiny = run_of({OURS: 2.5, "torch": 7.5}, spec="tiny", workload="overhead/call")
    text = to_markdown([*two_workloads(), *tiny])
    assert "| overhead/call |" not in text
    assert "Geometric means of 2: 0.772 times" in text
    told = "What a call costs (overhead/call, torch tensors, packed weight, `out=`): 2.50 µs, torch eager's 7.50 µs."
    assert told in text.splitlines()
    assert told in to_markdown(tiny)
    assert "- µs, torch eager's 7.50 µs" in to_markdown(
        run_of({OURS: None, "torch": 7.5}, spec="tiny", workload="overhead/call")
    )


def test_no_rows_are_an_error():
    with pytest.raises(RowsError, match="no row of our kernels"):
        to_markdown(run_of({"torch": 1.0}))


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot([*two_workloads(), *run_of({OURS: 5.0, "torch": 5.0}, threads=2)], tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RowsError, match="no workload has both"):
        plot(run_of({OURS: 5.0}), tmp_path / "none.png")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RowsError, match=r"pip install 'convt-tvm\[plot\]'"):
        plot(two_workloads(), tmp_path / "ratios.png")


def test_the_section_of_the_readme_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# a\n\n<!-- results -->\nold \\1\n<!-- /results -->\n\n## b\n")
    update_section(path, "results", to_markdown(two_workloads()))
    once = path.read_text()
    assert once == f"# a\n\n<!-- results -->\n{to_markdown(two_workloads())}<!-- /results -->\n\n## b\n"
    update_section(path, "results", to_markdown(two_workloads()))
    assert path.read_text() == once


@pytest.mark.parametrize(("text", "count"), [("# a\n", 0), (2 * "<!-- results -->\n<!-- /results -->\n", 2)])
def test_a_readme_without_one_section_is_left_alone(tmp_path, text, count):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(RowsError, match=f"has {count} sections"):
        update_section(path, "results", to_markdown(two_workloads()))
    assert path.read_text() == text
