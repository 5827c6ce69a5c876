import json
import sys
from dataclasses import replace

import pytest
import torch

from convt_tvm import conformance as module
from convt_tvm.cases import FAMILIES, FUZZ, missing_families, onnx_nodes, sampled_cases, spec_of_onnx
from convt_tvm.conformance import Block, blocks, examine_block, read_tallies, untried
from convt_tvm.distributions import DISTRIBUTIONS, require_telling, telling_integers
from convt_tvm.errors import InputsError, RowsError, SpecError
from convt_tvm.fuzz import fuzzed_specs
from convt_tvm.implementations import Implementation
from convt_tvm.json_lines import append_lines
from convt_tvm.reference import expect, reference
from convt_tvm.replay import read_reproducer, replay, write_reproducer
from convt_tvm.rounding import measure_rounding, ulp
from convt_tvm.spec import DTYPE_BYTES, ConvTranspose2dSpec
from convt_tvm.target import Target

TARGET = Target.parse("llvm")
SPEC = ConvTranspose2dSpec(n=1, ci=4, ih=4, iw=5, co=3, kernel_size=3, stride=2, padding=1)


def right(spec):
    return lambda *inputs: reference(spec, *inputs).to(inputs[0].dtype)


def without_bias(spec):
    return lambda input, weight, bias: right(spec)(input, weight, None)


def test_a_block_is_tallied_and_its_failures_can_be_replayed(tmp_path, monkeypatch):
    compared = [Implementation("ours", without_bias), Implementation("torch", right)]
    ours, torch_ = examine_block(Block(FUZZ, 6, 0, 5), TARGET, compared, "c0ffee")
    biased = sum(case.spec.bias for case in sampled_cases(FUZZ, 6, range(6)))
    assert 0 < biased < 6
    assert (ours.passed, ours.failed, ours.rejected) == (6 - biased, biased, 0)
    assert (torch_.passed, torch_.failed, torch_.max_ratio <= 1) == (6, 0, True)
    path = write_reproducer(tmp_path, ours.failures[0])
    assert json.loads(path.read_text())["command"] == f"convt-tvm check --replay {path}"
    stored = read_reproducer(path)
    assert stored == ours.failures[0]
    for make, status in ((without_bias, "fail"), (right, "pass")):
        monkeypatch.setattr(
            "convt_tvm.replay.find_implementation", lambda name, target, make=make: Implementation(name, make)
        )
        found = replay(stored)
        assert (found.finding.status, found.same_artifact) == (status, None)
        assert found.finding.reason == (stored.reason if status == "fail" else "")

    append_lines(tmp_path / "rows.jsonl", [ours, torch_])
    assert read_tallies(tmp_path / "rows.jsonl") == [ours, torch_]
    wanted = [Block(FUZZ, 6, 0, 5), Block(FUZZ, 6, 6, 11)]
    assert untried(wanted, [ours]) == wanted[1:]
    assert untried(wanted, [replace(ours, source="0" * 64)]) == wanted


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"spec": 1}')
    with pytest.raises(RowsError, match="a reproducer has the fields"):
        read_reproducer(tmp_path / "a.json")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(RowsError, match="line 1: a tally lacks the fields"):
        read_tallies(tmp_path / "b.jsonl")


def test_an_implementation_is_found_by_name():
    with pytest.raises(RowsError, match=r"no implementation 'mine'; there are ours, ours/llvm_amx, ours/llvm_amx_taps"):
        replay(read_reproducer_of("mine"))


def read_reproducer_of(name):
    ours, _ = examine_block(
        Block(FUZZ, 6, 0, 5), TARGET, [Implementation("ours", without_bias), Implementation("torch", right)], None
    )
    return module.Reproducer(**{**ours.failures[0].to_json(), "implementation": name})


def test_blocks_cover_every_case_once():
    found = blocks([FUZZ], seed=1, fuzz=60)
    assert [number for block in found for number in range(block.first, block.last + 1)] == list(range(60))
    assert blocks([FUZZ], seed=1, fuzz=0) == []


def test_fuzzed_specs_do_not_depend_on_which_others_are_drawn_and_reach_everything():
    specs = dict(fuzzed_specs(0, range(400)))
    assert dict(fuzzed_specs(0, range(390, 400))) == {number: specs[number] for number in range(390, 400)}
    assert dict(fuzzed_specs(1, range(400))) != specs
    assert {spec.dtype for spec in specs.values()} == set(DTYPE_BYTES)
    assert {spec.groups for spec in specs.values()} >= {1, 2, 5}
    assert any(min(spec.output_padding) >= max(spec.stride) for spec in specs.values())
    assert any(max(spec.stride) > max(spec.kernel_size) for spec in specs.values())


def test_sampled_families_have_cases():
    for family in FAMILIES.keys() - missing_families():
        assert len(sampled_cases(family, 0, range(1000))) >= 8


def test_a_family_without_its_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert missing_families() == {"ONNX node tests": "no module onnx; pip install 'convt-tvm[peers]'"}


def test_onnx_nodes_are_mapped_to_specs_that_give_their_outputs():
    pytest.importorskip("onnx")
    mapped, refused = 0, []
    for node in onnx_nodes():
        try:
            spec = spec_of_onnx(node)
        except SpecError as error:
            refused.append(f"{node.name}: {error}")
            continue
        input, weight = node.inputs[0].reshape(spec.input_shape), node.inputs[1].reshape(spec.weight_shape)
        found = reference(spec, input, weight, None).reshape(node.output.shape)
        torch.testing.assert_close(found, node.output.double())
        mapped += 1
    assert mapped >= 9
    assert refused == [
        "test_convtranspose_3d: 3 spatial axes; the operator has two.",
        "test_convtranspose_autopad_same: more is cropped from the end of an axis than from its beginning, by 1.",
    ]


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_are_finite_repeat_and_do_what_they_say(name, dtype):
    spec = ConvTranspose2dSpec(n=1, ci=8, ih=6, iw=7, co=3, kernel_size=4, stride=2, padding=1, dtype=dtype)
    inputs = DISTRIBUTIONS[name](spec, 5)
    again, other = DISTRIBUTIONS[name](spec, 5), DISTRIBUTIONS[name](spec, 6)
    assert all(torch.equal(mine, same) for mine, same in zip(inputs, again, strict=True))
    assert not torch.equal(inputs[1], other[1])
    exact = reference(spec, *inputs)
    assert exact.isfinite().all() and (exact != 0).all()
    assert (exact.abs() < torch.finfo(inputs[0].dtype).max).all()
    tiny = torch.finfo(inputs[0].dtype).smallest_normal
    if name == "subnormal":
        assert (inputs[1].double().abs() < tiny).all()
    if name == "cancellation":
        magnitude = reference(spec, *(each.double().abs() for each in inputs))
        assert (magnitude / exact.abs()).median() > 30
    if name == "wide":
        assert inputs[0].double().abs().log2().std() > 3
    if name == "uniform":
        assert all((each >= 0).all() for each in inputs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, w, b: x.__setitem__((0, 0, 0, 0), 0), "1 of 80 values of the input are zero"),
        (lambda x, w, b: b.__setitem__(0, 0), "1 of 3 values of the bias are zero"),
        (
            lambda x, w, b: w.__setitem__((slice(None), 1, 2, 0), 0),
            "1 of 27 taps of the output channels have",
        ),
        (lambda x, w, b: w.__setitem__(2, 0), "1 of 4 input channels have no weight"),
        (lambda x, w, b: x.copy_(x[..., :1].expand_as(x)), "the input is constant along axis 3"),
        (lambda x, w, b: b.fill_(3), "the bias is constant along axis 0"),
    ],
)
def test_data_that_could_not_catch_an_error_are_rejected(spoil, message):
    inputs = telling_integers(SPEC, 0)
    require_telling(SPEC, *inputs)
    spoil(*inputs)
    with pytest.raises(InputsError, match=message):
        require_telling(SPEC, *inputs)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_an_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, -3.0, 1e-3, 0.0], dtype=getattr(torch, dtype))
    if dtype == "bfloat16":
        distance = (values.view(torch.int16) + 1).view(torch.bfloat16).double() - values.double()
    else:
        distance = torch.nextafter(values, values + values.sign() + (values == 0)).double() - values.double()
    assert torch.equal(ulp(values, dtype), distance.abs())


def test_rounding_counts_every_output_once():
    inputs = DISTRIBUTIONS["normal"](SPEC, 0)
    expected = expect(SPEC, *inputs)
    right_ = measure_rounding(SPEC, expected, expected.exact.float())
    assert sum(right_.ulps) == expected.exact.numel()
    assert sum(right_.ulps[2:]) == 0 and right_.max_ulps <= 0.5 and 0 < right_.max_ratio < 1
    assert sum(each.outputs for each in right_.lengths) == expected.exact.numel()
    off = expected.exact.float()
    off[0, 0, 0, 0] = float("nan")
    wrong = measure_rounding(SPEC, expected, off)
    assert wrong.max_ratio == float("inf") and wrong.ulps[-1] == 1
