"""Matrix products on tensor cores: where they are chosen, what they take, and whether they are right when emulated."""

import re
import shutil
from dataclasses import replace
from itertools import islice
from random import Random

import pytest
import torch
from emulated_kernels import cheapest, is_exact, needs_toolkit, plant

from convt_tvm import emulator
from convt_tvm.artifact import read_manifest
from convt_tvm.check import compare
from convt_tvm.compiler import build_artifact, lower_choice
from convt_tvm.cost_cuda import MAX_REGISTERS, SHARED_BYTES
from convt_tvm.cost_tensor import fits_tensor_cores, tensor_layouts, tensor_shared_bytes
from convt_tvm.emulate import EmulatedKernel, check_emulated
from convt_tvm.fuzz import Domain, fuzzed_specs
from convt_tvm.reference import TF32_UNIT, normal_inputs
from convt_tvm.space import choices, default_choice
from convt_tvm.spec import CONTIGUOUS, ConvTranspose2dSpec
from convt_tvm.special import judge_special, special_inputs
from convt_tvm.target import Target
from convt_tvm.tensor_layout import fragment_depth, reaches_of
from convt_tvm.workloads import Workload, resolve

TARGET = Target.parse("cuda:sm_90+tf32")
SPEC = ConvTranspose2dSpec(
    n=2, ci=20, ih=5, iw=7, co=18, kernel_size=3, stride=2, padding=1, output_padding=1, dtype="float16"
)


def tensor(spec=SPEC):
    return cheapest(spec, TARGET, "cuda_tensor")


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        ("cuda:sm_75+sm_90+tf32", ["float16"]),
        ("cuda:sm_80", ["float16", "bfloat16"]),
        ("cuda:sm_80+tf32", ["float32", "float16", "bfloat16"]),
    ],
)
def test_tensor_cores_take_what_every_architecture_and_the_target_allow(target, dtypes):
    every = ["float32", "float64", "float16", "bfloat16"]
    assert [dtype for dtype in every if fits_tensor_cores(replace(SPEC, dtype=dtype), Target.parse(target))] == dtypes


def test_few_channels_are_left_to_other_schedules():
    for changes in ({"ci": 15}, {"co": 15}, {"ci": 40, "co": 20, "groups": 2}):
        found = choices(replace(SPEC, **changes), TARGET)
        assert found
        assert "cuda_tensor" not in {choice.space.name for choice in found}


def test_wide_layers_run_on_tensor_cores_by_default_and_float32_only_where_tf32_is_allowed():
    spec = resolve(["unet/up1"])[0].spec
    for target, dtype, name in (
        ("cuda:sm_90", "float16", "cuda_tensor"),
        ("cuda:sm_90", "float32", "cuda_shared"),
        ("cuda:sm_90+tf32", "float32", "cuda_tensor"),
    ):
        assert default_choice(replace(spec, dtype=dtype), Target.parse(target)).space.name == name


def test_what_a_reach_says_of_taps_is_what_phases_say():
    for _, spec in fuzzed_specs(1, range(50), memory_formats=[CONTIGUOUS]):
        for axis, reach in zip(spec.axes, reaches_of(spec), strict=True):
            assert reach.taps == tuple(phase.taps for phase in axis.phases)
            for phase, shift in zip(axis.phases, reach.shifts, strict=True):
                assert 0 <= shift <= reach.span - reach.tap_span
                for tap in range(phase.taps):
                    read = reach.first + shift + (reach.most_taps - 1 - tap) * reach.step
                    assert read == phase.base - tap * phase.input_step


def test_layouts_stay_within_the_limits_of_a_launch():
    for workload in resolve(["dcgan/1", "dcgan/4", "fcn8s/up8", "hifigan/up1"]):
        for spec in (workload.spec, replace(workload.spec, dtype="float16")):
            found = list(tensor_layouts(spec))
            assert found
            for layout in found:
                assert layout.warps <= 16
                assert len(spec.axes[1].phases) % layout.phases == 0
                assert layout.ci_block % (fragment_depth(spec) * layout.depth_warps) == 0
                assert layout.positions >= (layout.row_block - 1) * layout.pitch(spec) + layout.column_block
                assert layout.co_block == 16 * layout.channel_tiles * layout.channel_warps
                assert layout.positions == 16 * layout.position_tiles * layout.position_warps
                assert tensor_shared_bytes(spec, layout) <= SHARED_BYTES


@needs_toolkit
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_artifact_for_tensor_cores_spills_nothing_and_says_what_it_takes(dtype, tmp_path):
    spec = replace(SPEC, dtype=dtype)
    manifest = build_artifact(spec, TARGET, tmp_path / "kernel", choice=tensor(spec))
    assert read_manifest(tmp_path / "kernel") == manifest
    assert manifest.schedule == "cuda_tensor"
    assert manifest.packed_dtype == dtype
    assert manifest.target.allows_tf32
    assert {found["function"] for found in manifest.resources} == {"pack_kernel", "convt_kernel"}
    for found in manifest.resources:
        assert 0 < found["registers"] <= MAX_REGISTERS
        assert found["shared_bytes"] <= tensor_shared_bytes(spec, tensor(spec).layout)
        assert found["spill_bytes"] == found["stack_bytes"] == 0


@needs_toolkit
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "bias": False},
        {"groups": 2, "ci": 64, "co": 48, "stride": 1, "output_padding": 0, "dilation": 2},
        {"dtype": "bfloat16", "stride": (3, 1), "kernel_size": (2, 5), "dilation": (2, 3), "output_padding": (1, 0)},
        {"kernel_size": 1, "stride": 3, "padding": 0, "output_padding": 2},
        {"kernel_size": 4, "ih": 1, "iw": 1, "stride": 1, "padding": 0, "output_padding": 0},
    ],
)
def test_emulated_products_are_exact(changes):
    spec = replace(SPEC, **changes)
    kernel = EmulatedKernel(spec, TARGET, tensor(spec))
    assert compare(spec, kernel).reason == ""
    kernel.descending = True
    assert is_exact(kernel)


def divided(spec, **fields):
    """The cheapest choice whose layout has these fields."""
    found = (choice for _, _, choice in tensor_choices(spec))
    return next(choice for choice in found if all(getattr(choice.layout, name) == fields[name] for name in fields))


@needs_toolkit
@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"ci": 70, "co": 40}, {"depth_warps": 2, "phases": 2, "channel_warps": 2}),
        ({"ci": 40, "dtype": "float32"}, {"depth_warps": 2, "phases": 1, "position_warps": 2}),
        ({"kernel_size": 8, "stride": 4, "padding": 2, "dtype": "bfloat16"}, {"phases": 4, "ci_block": 32}),
        ({"kernel_size": (3, 4), "stride": (1, 4), "dilation": (1, 3), "padding": (1, 4)}, {"phases": 4}),
    ],
)
def test_warps_that_share_channels_positions_phases_and_depths_are_exact(changes, fields):
    spec = replace(SPEC, iw=18, **{"output_padding": 0, **changes})
    kernel = EmulatedKernel(spec, TARGET, divided(spec, **fields))
    assert is_exact(kernel)
    kernel.descending = True
    assert is_exact(kernel)


@needs_toolkit
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, {"padding": 2}, {"kernel_size": 5, "iw": 34}, {"stride": 1, "dilation": 2}])
def test_columns_are_loaded_in_pairs_that_begin_at_even_ones(changes, dtype):
    spec = replace(SPEC, **{"iw": 8, "output_padding": 0, "dtype": dtype, **changes})
    kernel = EmulatedKernel(spec, TARGET, divided(spec, loaded=2))
    assert is_exact(kernel)


@needs_toolkit
def test_pairs_that_begin_at_odd_columns_are_caught(monkeypatch):
    spec = replace(SPEC, iw=8, kernel_size=4, output_padding=0)
    choice = divided(spec, loaded=2)
    assert choice.layout.margin(spec) == 1
    monkeypatch.setattr("convt_tvm.tensor_layout.margin_of", lambda spec, loaded: 0)
    assert not is_exact(EmulatedKernel(spec, TARGET, choice))


def test_odd_rows_are_loaded_one_by_one():
    assert {layout.loaded for layout in tensor_layouts(replace(SPEC, iw=7))} == {1}
    assert {layout.loaded for layout in tensor_layouts(replace(SPEC, iw=8, padding=0))} == {1, 2}


@needs_toolkit
@pytest.mark.parametrize("phases", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"kernel_size": 1, "padding": 0}])
def test_what_is_not_finite_goes_where_a_tap_takes_it_and_nowhere_else(changes, phases):
    spec = replace(SPEC, **changes)
    kernel = EmulatedKernel(spec, TARGET, divided(spec, phases=phases))
    for case, inputs in special_inputs(spec, 3):
        assert judge_special(spec, case, inputs, kernel).reason == "", case.name


@needs_toolkit
def test_a_tap_that_a_phase_does_not_have_is_caught(monkeypatch):
    monkeypatch.setattr("convt_tvm.lower_tensor.rebuild", lambda node, body: node)
    with pytest.raises(AssertionError, match="outputs are wrong"):
        test_what_is_not_finite_goes_where_a_tap_takes_it_and_nowhere_else({}, 1)


@needs_toolkit
@pytest.mark.parametrize("number", [0, 1, 2])
def test_emulated_products_of_drawn_specs_and_layouts_are_exact(number):
    domain = Domain(n=2, groups=2, ci=40, ih=6, iw=20, co=40)
    dtypes = ["float16", "bfloat16", "float32"]
    found = fuzzed_specs(5, range(1000), dtypes=dtypes, memory_formats=[CONTIGUOUS], domain=domain)
    drawn = (spec for _, spec in found)
    fitting = (found for spec in drawn if (found := tensor_choices(spec)))
    chosen = Random(number).choice(next(islice(fitting, number, None)))
    assert is_exact(EmulatedKernel(*chosen))


def tensor_choices(spec):
    return [(spec, TARGET, choice) for choice in choices(spec, TARGET, "cuda_tensor")]


@needs_toolkit
def test_tf32_is_exact_on_integers_and_within_the_bound_of_its_own_rounding(monkeypatch):
    spec = replace(SPEC, dtype="float32")
    monkeypatch.setattr("convt_tvm.emulate.default_choice", lambda spec, target: tensor(spec))
    row = check_emulated(Workload(name=spec.name, source="", spec=spec), TARGET)
    assert (row.verdict, row.exact, row.schedule) == ("good", True, "cuda_tensor")
    assert 0 < row.error_over_bound <= 1
    kernel = EmulatedKernel(spec, TARGET)
    assert "beyond the error bound of float32" in compare(spec, kernel).reason
    assert compare(spec, kernel, operand_unit=TF32_UNIT / 4).reason


@needs_toolkit
@pytest.mark.parametrize("descending", [False, True])
def test_a_missing_barrier_is_caught(monkeypatch, descending):
    plant(monkeypatch, "__syncthreads();", ";")
    spec = replace(SPEC, co=64)
    layout = next(layout for layout in tensor_layouts(spec) if layout.warps == 4)
    kernel = EmulatedKernel(spec, TARGET, replace(tensor(spec), layout=layout), descending=descending)
    assert not is_exact(kernel)


@needs_toolkit
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ("load_transposed(f.x, ", "load_matrices(f.x, ", "float16"),
        ("b + (lane % 8 + lane / 16 * 8)", "b + (lane % 8 + lane / 8 % 2 * 8)", "bfloat16"),
        ("b.x + 2 * half", "b.x + half", "float16"),
        ("lane % 4 + i / 2 * 4", "lane % 4 + i % 2 * 4", "float32"),
        ("f.x[2 * i], f.x[2 * i + 1]", "f.x[2 * i + 1], f.x[2 * i]", "float32"),
    ],
)
def test_a_value_in_the_wrong_register_is_caught(monkeypatch, tmp_path, before, after, dtype):
    changed = shutil.copytree(emulator._DEVICE_SOURCES, tmp_path / "cuda") / "warp_matrix.h"
    text = changed.read_text()
    assert before in text
    changed.write_text(text.replace(before, after))
    monkeypatch.setattr(emulator, "_DEVICE_SOURCES", tmp_path / "cuda")
    monkeypatch.setattr(emulator, "_device_header", emulator._device_header.__wrapped__)
    spec = replace(SPEC, dtype=dtype)
    assert not is_exact(EmulatedKernel(spec, TARGET, tensor(spec)))


@needs_toolkit
@pytest.mark.parametrize(
    ("array", "elements"),
    [("taps_shared_ptr", 16), ("window_shared_ptr", 24), ("acc_wmma_accumulator_shared_ptr", 1)],
)
def test_a_wrong_shared_extent_is_caught(monkeypatch, array, elements):
    honest = emulator._translate

    def translate(code):
        shorter = lambda found: f"{found[1]}[{int(found[2]) - elements}];"  # noqa: E731
        changed, count = re.subn(rf"(static \w+ {array})\[(\d+)\];", shorter, honest(code))
        assert count == 1
        return changed

    monkeypatch.setattr(emulator, "_translate", translate)
    with pytest.raises(RuntimeError, match="access outside of its memory"):
        is_exact(EmulatedKernel(SPEC, TARGET, tensor()))


@needs_toolkit
def test_a_tap_that_reads_what_another_should_is_caught(monkeypatch):
    plant(monkeypatch, "- (ax17 * 40)", "- ((1 - ax17) * 40)")
    assert not is_exact(EmulatedKernel(SPEC, TARGET, tensor()))


@needs_toolkit
def test_a_fragment_at_an_address_that_instructions_forbid_is_caught(monkeypatch):
    plant(monkeypatch, "(&(window_shared_ptr[(", "(&(window_shared_ptr[4 + (")
    with pytest.raises(RuntimeError, match="access outside of its memory, or at a forbidden address"):
        is_exact(EmulatedKernel(SPEC, TARGET, tensor()))


@needs_toolkit
def test_a_product_that_some_lanes_skip_is_caught(monkeypatch):
    plant(monkeypatch, "convt::mma_sync(acc", "if (threadIdx.x) convt::mma_sync(acc")
    with pytest.raises(RuntimeError, match="instruction of a warp that not all of its lanes reach"):
        is_exact(EmulatedKernel(SPEC, TARGET, tensor()))


@needs_toolkit
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bits_of_a_sum_depend_on_the_number_of_depths_alone(dtype):
    spec = replace(SPEC, ci=70, kernel_size=4, output_padding=0, dtype=dtype)
    inputs = normal_inputs(spec, seed=0)
    found = {
        (depths, stage, phases): EmulatedKernel(
            spec, TARGET, divided(spec, depth_warps=depths, ci_block=stage, phases=phases)
        )(*inputs)
        for depths, stage, phases in ((1, 16, 1), (1, 32, 2), (2, 32, 2), (2, 64, 1))
    }
    one, same, two, alike = found.values()
    assert torch.equal(one, same)
    assert torch.equal(two, alike)
    assert not torch.equal(one, two)


def test_an_image_is_summed_alike_in_every_batch():
    spec = replace(resolve(["dcgan/3"])[0].spec, dtype="float16")
    orders = [default_choice(spec.with_batch(n), TARGET).layout.sum_order for n in (1, 8, 64)]
    assert orders == [orders[0]] * 3


@needs_toolkit
def test_sums_of_neighbouring_phases_lie_in_different_banks(monkeypatch):
    layout = divided(SPEC, phases=2).layout
    assert layout.sums_skew == 16
    size = layout.warps * 16 * 16 + layout.depth_warps * layout.phases * layout.sums_skew
    plant(monkeypatch, f"acc_wmma_accumulator_shared_ptr[{size}]", f"acc_wmma_accumulator_shared_ptr[{size}]")
    assert is_exact(EmulatedKernel(SPEC, TARGET, divided(SPEC, phases=2)))


def test_the_digest_of_lowered_code_is_the_same_each_time():
    spec = ConvTranspose2dSpec(n=1, ci=32, ih=4, iw=4, co=32, kernel_size=4, stride=2, padding=1, dtype="float16")
    choice = cheapest(spec, TARGET, "cuda_tensor")
    assert lower_choice(spec, TARGET, choice).code == lower_choice(spec, TARGET, choice).code
