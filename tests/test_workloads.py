import json
import re
from dataclasses import replace

import pytest

from convt_tvm.errors import SpecError, UnknownWorkloadError, UnsupportedDtypeError
from convt_tvm.spec import ConvTranspose2dSpec
from convt_tvm.workloads import Workload, adapted, resolve, suites

EVERY = [workload for suite in suites().values() for workload in suite]


def test_suites_hold_every_workload_once_and_name_its_origin():
    assert {name: len(suite) for name, suite in suites().items()} == {
        "seed": 3,
        "dcgan": 5,
        "vision": 9,
        "other": 6,
        "overhead": 1,
    }
    assert len({workload.name for workload in EVERY}) == len({workload.spec for workload in EVERY}) == len(EVERY)
    for workload in EVERY:
        assert re.fullmatch(r"[a-z0-9]+/[a-z0-9_]+", workload.name)
        assert len(workload.source) > 15
        assert workload.spec.dtype == "float32"


def test_suites_returns_a_dict_of_its_own():
    suites().clear()
    assert suites()


@pytest.mark.parametrize(
    ("name", "output_shape", "bias"),
    [
        ("seed/square", (20, 33, 101, 201), True),
        ("seed/rect", (20, 33, 93, 100), True),
        ("seed/output_size", (1, 16, 12, 12), True),
        ("dcgan/1", (1, 512, 4, 4), False),
        ("dcgan/5", (1, 3, 64, 64), False),
        ("unet/up1", (1, 512, 64, 64), True),
        ("fsrcnn/x3", (1, 1, 192, 192), True),
        ("fcn8s/up8", (1, 21, 224, 224), False),
        ("hifigan/up1", (1, 256, 512, 1), True),
        ("bilinear/depthwise", (1, 64, 112, 112), False),
        ("dilated/k3d2", (1, 128, 32, 32), True),
    ],
)
def test_output_shapes_are_those_of_the_models(name, output_shape, bias):
    (workload,) = resolve([name])
    assert workload.name == name
    assert workload.spec.output_shape == output_shape
    assert workload.spec.bias is bias


def test_resolve_keeps_the_order_and_drops_repeats():
    names = [workload.name for workload in resolve(["dcgan/3", "seed/rect", "dcgan", "dcgan/3", "seed"])]
    assert names == [
        *("dcgan/3", "seed/rect", "dcgan/1", "dcgan/2", "dcgan/4", "dcgan/5"),
        *("seed/square", "seed/output_size"),
    ]


def test_resolve_all_and_nothing():
    assert resolve(["all"]) == EVERY
    assert resolve([]) == []


def test_resolve_takes_spec_names():
    spec = ConvTranspose2dSpec(n=1, ci=3, ih=5, iw=5, co=2, kernel_size=3, dtype="float16")
    assert resolve([spec.name]) == [Workload(spec.name, "given by its spec name", spec)]
    assert resolve([spec.name, spec.name]) == resolve([spec.name])


@pytest.mark.parametrize("workload", EVERY, ids=lambda workload: workload.name)
def test_the_spec_name_of_a_known_workload_is_that_workload(workload):
    assert resolve([workload.spec.name]) == resolve([workload.spec.name, workload.name]) == [workload]


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("dgcan", "did you mean dcgan or dcgan/"),
        ("DCGAN/2", "did you mean dcgan/2 or "),
        ("unet", "did you mean unet/up4 or unet/up1?"),
        ("visions", "did you mean vision?"),
        ("", "the suites are seed, dcgan, vision, other, overhead."),
        ("zzzzzz", "the suites are seed, dcgan, vision, other, overhead."),
    ],
)
def test_unknown_names_list_what_is_near(argument, hint):
    expected = f"{argument!r} is no suite, no workload and no canonical spec name; {hint}"
    with pytest.raises(UnknownWorkloadError, match=f"^{re.escape(expected)}"):
        resolve(["seed", argument])


@pytest.mark.parametrize(
    ("replaced", "by", "fact"),
    [
        ("_ci3_", "_ci0_", "ci=0 must be at least 1."),
        ("_float16", "_float33", "dtype='float33' is not supported; use one of float32, float64, float16, bfloat16."),
        ("_k3x3_", "_k3_", "is not a canonical spec name such as 'n1_ci512_ih4"),
    ],
)
def test_wrong_spec_names_say_what_is_wrong(replaced, by, fact):
    name = ConvTranspose2dSpec(n=1, ci=3, ih=5, iw=5, co=2, kernel_size=3, dtype="float16").name.replace(replaced, by)
    with pytest.raises(UnknownWorkloadError, match=rf"^no workload '{name}': .*{re.escape(fact)}") as caught:
        resolve([name])
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, SpecError)


def test_rows_are_json_that_rebuilds_the_spec():
    for workload in EVERY:
        assert ConvTranspose2dSpec.from_json(json.loads(json.dumps(workload.spec.to_json()))) == workload.spec


def test_workloads_come_in_another_dtype_and_memory_format_under_the_same_name():
    (own,) = resolve(["dcgan/2"])
    (other,) = adapted([own], dtype="bfloat16")
    assert (other.name, other.spec) == (own.name, replace(own.spec, dtype="bfloat16"))
    (other,) = adapted([own], channels_last=True)
    assert (other.name, other.spec) == (own.name, replace(own.spec, memory_format="channels_last"))
    assert adapted([own]) == [own]
    with pytest.raises(UnsupportedDtypeError, match="dtype='int8' is not supported"):
        adapted([own], dtype="int8")
