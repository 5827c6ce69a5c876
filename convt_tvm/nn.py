"""``torch.nn.ConvTranspose2d`` on compiled kernels, and the exchange of a model's layers for it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from convt_tvm.errors import ArgumentTypeError, SpecError
from convt_tvm.functional import call_plan, conv_transpose2d, is_plain_call
from convt_tvm.packed import PackedWeights
from convt_tvm.plan import Plan, as_count, as_pair, check_parameters, find_plan

__all__ = ["ConvTranspose2d", "ReplaceReport", "SkippedLayer", "replace"]


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that computes with compiled kernels; the same arguments, state_dict and numbers.

    The weight is packed at the first call and again whenever it has changed. What is noticed: another Parameter,
    ``load_state_dict``, an optimiser's step, ``.to()``, any operation on the Parameter itself, and, on the CPU, a
    change of all values through ``weight.data`` (16 of them are compared at each call). A change of few values through
    ``weight.data``, or of any there on a GPU, through a numpy view or by another process is not: call `forget_packed`
    after it.

    Packed weights are no part of the state: not in ``state_dict``, nor in pickles, nor in copies.

    No gradients are computed: the backward pass raises NotImplementedError, see `functional.conv_transpose2d`. Under
    `torch.compile`, `torch.export` and `torch.jit.trace` the layer is the operator ``convt_tvm::conv_transpose2d``,
    which packs the weight at each call.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode
        As in PyTorch.
    device, dtype
        Of the parameters. They can be anywhere; the layer computes on the CPU and on CUDA GPUs.

    Raises
    ------
    SpecError
        (a ValueError and a RuntimeError) if the parameters are not valid; for some of them PyTorch raises at the first
        call only.
    UnsupportedDtypeError
        (also a NotImplementedError) for dtypes other than float32, float64, float16 and bfloat16.
    ArgumentTypeError
        (a TypeError) for parameters that are no integers.

    Examples
    --------
    >>> import torch
    >>> layer = ConvTranspose2d(2, 3, kernel_size=4, stride=2, padding=1)
    >>> with torch.inference_mode():
    ...     layer(torch.ones(1, 2, 8, 8)).shape
    torch.Size([1, 3, 16, 16])
    """

    _packed: "PackedWeights | None" = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise SpecError(
                f"padding_mode={padding_mode!r} is not supported; a transposed convolution has 'zeros' only."
            )
        in_channels, out_channels, groups = (
            as_count("in_channels", in_channels),
            as_count("out_channels", out_channels),
            as_count("groups", groups),
        )
        kernel_size, stride, padding, output_padding, dilation = (
            as_pair("kernel_size", kernel_size),
            as_pair("stride", stride),
            as_pair("padding", padding),
            as_pair("output_padding", output_padding),
            as_pair("dilation", dilation),
        )
        check_parameters(
            in_channels,
            out_channels,
            kernel_size,
            (stride, padding, output_padding, groups, dilation),
            str(torch.get_default_dtype() if dtype is None else dtype),
        )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_torch(cls, module: torch.nn.ConvTranspose2d) -> Self:
        """Return a layer that shares the Parameters of `module`; the module keeps its hooks to itself.

        Raises ArgumentTypeError for another type of module or a layer whose weight is no Parameter (parametrised,
        weight-normed, pruned), and what the constructor raises.
        """
        if not isinstance(module, torch.nn.ConvTranspose2d):
            raise ArgumentTypeError(f"{type(module).__name__} is no torch.nn.ConvTranspose2d.")
        reason = _reason_weight_is_computed(module)
        if reason is not None:
            raise ArgumentTypeError(f"this ConvTranspose2d cannot be taken over: {reason}.")
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=_padding(module),
            output_padding=module.output_padding,
            groups=module.groups,
            bias=module.bias is not None,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
            device="meta",
            dtype=module.weight.dtype,
        )
        layer.register_parameter("weight", module._parameters["weight"])
        layer.register_parameter("bias", module._parameters["bias"])
        return layer.train(module.training)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the transposed convolution of `input`.

        Parameters
        ----------
        input
            ``(n, in_channels, ih, iw)`` or ``(in_channels, ih, iw)``.
        output_size
            Output height and width, or the whole output shape; ``output_padding`` is then what they require, whatever
            the constructor was given. ValueError if that is negative or not below the stride.
        """
        if output_size is None:
            output_padding: Sequence[int] = self.output_padding
        else:
            stride, kernel_size, dilation = list(self.stride), list(self.kernel_size), list(self.dilation)
            output_padding = self._output_padding(
                input, list(output_size), stride, _padding(self), kernel_size, 2, dilation
            )
        weight, bias = self.weight, self.bias
        if not is_plain_call(input, weight, bias):
            return conv_transpose2d(  # type: ignore[no-any-return]
                input, weight, bias, self.stride, _padding(self), output_padding, self.groups, self.dilation
            )
        parameters = (
            as_pair("stride", self.stride),
            as_pair("padding", self.padding),
            as_pair("output_padding", output_padding),
            as_count("groups", self.groups),
            as_pair("dilation", self.dilation),
        )
        plan = find_plan(input, weight, bias, parameters)
        return call_plan(plan, partial(plan.run, weight=self._pack(plan, weight)), input, weight, bias)

    def forget_packed(self) -> None:
        """Drop the packed weights; the next call packs anew.

        Needed only after a change that PyTorch does not record, see above.
        """
        self.__dict__.pop("_packed", None)

    def _pack(self, plan: Plan, weight: Tensor) -> Tensor:
        if plan.kernel is None or weight.is_inference():
            # Inference tensors count no versions, so a change could not be seen.
            return weight
        packed = self._packed
        if packed is None or not packed.are_of(weight):
            packed = PackedWeights(weight)
            self.__dict__["_packed"] = packed
        return packed.get(plan)

    def __getstate__(self) -> dict[str, Any]:
        """Return the module's state without packed weights, for pickle and copy."""
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state


@dataclass(frozen=True, slots=True)
class SkippedLayer:
    """A layer that `replace` left alone, by its qualified name, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        """Return ``name: reason``."""
        return f"{_shown(self.name)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ReplaceReport:
    """What `replace` did to a model.

    ``replaced`` holds qualified names, all of them for a layer with several; the model itself is called ``""``.
    ``max_difference`` is the largest absolute difference between the model's outputs on the example before and after,
    None without an example.
    """

    replaced: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    max_difference: float | None = None
    _layers: tuple[ConvTranspose2d, ...] = field(default=(), repr=False, compare=False)

    def restore(self) -> None:
        """Give the replaced layers back to PyTorch, with the parameters and hooks they have now; twice is once."""
        for layer in self._layers:
            if type(layer) is ConvTranspose2d:
                layer.forget_packed()
                _change_class(layer, torch.nn.ConvTranspose2d)

    def __str__(self) -> str:
        """Return the report as lines of text."""
        layers = "layer" if len(self.replaced) == 1 else "layers"
        lines = [f"replaced {len(self.replaced)} {layers}"]
        lines += [f"  {_shown(name)}" for name in self.replaced]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)}")
            lines += [f"  {skipped}" for skipped in self.skipped]
        if self.max_difference is not None:
            lines.append(f"largest difference of the outputs: {self.max_difference:.3g}")
        return "\n".join(lines)


def replace(model: torch.nn.Module, example_inputs: Any = None) -> ReplaceReport:
    """Make every `torch.nn.ConvTranspose2d` of a model compute with compiled kernels, in place.

    The layers change their class and nothing else: whoever holds one holds the same object, with its parameters,
    buffers and hooks, wherever it is used. Subclasses, and layers whose weight is computed anew at each call, are
    skipped and named in the report.

    Parameters
    ----------
    model
        Any module; it may be a `torch.nn.ConvTranspose2d` itself.
    example_inputs
        A tensor, a tuple or list of arguments, or a mapping of keyword arguments. With them the model runs before and
        after, in eval mode, without gradients and with the same random numbers, so that its kernels are built here
        and not at the first request. If that fails the model is restored and the error passed on.

    Raises
    ------
    ArgumentTypeError
        if `model` is no torch module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentTypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module.")
    replaced: list[str] = []
    skipped: list[SkippedLayer] = []
    layers: dict[int, torch.nn.ConvTranspose2d] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.nn.ConvTranspose2d) or isinstance(module, ConvTranspose2d):
            continue
        reason = _reason_to_skip(module)
        if reason is None:
            replaced.append(name)
            layers[id(module)] = module
        else:
            skipped.append(SkippedLayer(name, reason))

    before = None if example_inputs is None else _example_outputs(model, example_inputs)
    for module in layers.values():
        _change_class(module, ConvTranspose2d)
    report = ReplaceReport(tuple(replaced), tuple(skipped), _layers=tuple(layers.values()))  # type: ignore[arg-type]
    if before is None:
        return report
    try:
        difference = _max_difference(before, _example_outputs(model, example_inputs))
    except BaseException:
        report.restore()
        raise
    return dataclasses.replace(report, max_difference=difference)


def _change_class(module: torch.nn.Module, to: type[torch.nn.Module]) -> None:
    # What torch.nn.utils.parametrize does too: the object stays, so containers, hooks and references to it stay right.
    module.__class__ = to


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _padding(module: torch.nn.ConvTranspose2d) -> Any:
    # PyTorch declares it as str for the sake of its other convolutions.
    return module.padding


def _reason_weight_is_computed(module: torch.nn.ConvTranspose2d) -> str | None:
    if parametrize.is_parametrized(module):
        return "it is parametrised; remove_parametrizations first (torch.nn.utils.parametrize)"
    if module._parameters.get("weight") is None or "bias" not in module._parameters:
        return "its weight is computed at each call; fold it first, as with torch.nn.utils.remove_weight_norm"
    return None


def _reason_to_skip(module: torch.nn.ConvTranspose2d) -> str | None:
    computed = _reason_weight_is_computed(module)
    if computed is not None:
        return computed
    if type(module) is not torch.nn.ConvTranspose2d:
        return f"it is a {type(module).__qualname__}, a subclass that may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced by another function"
    if module.weight.device.type not in ("cpu", "cuda"):
        return f"it is on {module.weight.device}; the kernels run on CPUs and CUDA GPUs"
    try:
        check_parameters(
            module.in_channels,
            module.out_channels,
            as_pair("kernel_size", module.kernel_size),
            (
                as_pair("stride", module.stride),
                as_pair("padding", module.padding),
                as_pair("output_padding", module.output_padding),
                as_count("groups", module.groups),
                as_pair("dilation", module.dilation),
            ),
            str(module.weight.dtype),
        )
    except (SpecError, ArgumentTypeError) as error:
        return str(error)
    return None


def _example_outputs(model: torch.nn.Module, example_inputs: Any) -> list[Tensor]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if isinstance(example_inputs, Mapping):
                outputs = model(**example_inputs)
            elif isinstance(example_inputs, tuple | list):
                outputs = model(*example_inputs)
            else:
                outputs = model(example_inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    return [leaf.clone() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _max_difference(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        if old.numel():
            difference = (old.double() - new.double()).abs()
            # Inf - Inf and NaN - NaN are NaN, and no difference.
            same = (old == new) | (old.isnan() & new.isnan())
            largest = max(largest, difference.masked_fill(same, 0.0).max().item())
    return largest
