"""The differences from torch that are meant: each with its reason, in this one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.cases import Case


class Meant(NamedTuple):
    """``where(case, kind, text)``: whether a difference of this kind is meant."""

    reason: str
    where: Callable[[Case, str, str], bool]


def _kernels(case: Case) -> bool:
    return case.body == "kernels"


def _attends(case: Case) -> bool:
    return case.operator == "attention" or case.options.get("module") == "MultiheadAttention"


def _infinite(case: Case, *names: str) -> bool:
    """Whether something in the call, or in tensors whose names begin so, is not finite."""
    # (float16, which autocast may ask for, ends there)
    cases = [case] if case.between is None else [case, case.between]
    return any(
        not abs(value) < 6e4
        for c in cases for name, t in c.tensors.items() if name.startswith(names or "") for _, value in t.special
    )  # fmt: skip


def _empty(case: Case) -> bool:
    return any(0 in t.shape for t in case.tensors.values())


def _of_conv_bias(case: Case, kind: str) -> bool:
    """Whether this is the gradient of a convolution's bias in front of batch norm."""
    name = kind.removeprefix("gradient of ").removesuffix(" after a write")
    if case.operator == "conv_stage":
        return name in {f"b{i}" for i in range(9)}
    if case.operator == "fused":
        return name.startswith("module.blocks.") and name.endswith(".0.bias")
    return case.options.get("module") in ("ConvStage", "ConvBNReLU2d") and "conv" in name and name.endswith(".bias")


def _fewer_nan(text: str) -> bool:
    """Whether ours has fewer NaN than torch."""
    found = re.match(r"NaN in (\d+) places, torch in (\d+)", text)
    return found is not None and int(found[1]) < int(found[2])


MEANT = (
    Meant(
        "the strict backend says what it cannot run and leaves nothing to torch (tests/conformance/test_transforms.py)",
        lambda case, kind, text: _kernels(case) and "stored with the opposite sign" in text,
    ),
    Meant(
        "kernels' gradients cannot be differentiated again, and say so (rule 14 of the design)",
        lambda case, kind, text: _kernels(case) and case.backward == "double" and (
            "differentiate twice" in text or text == "ours False, torch True"
            or (kind.startswith("requires_grad of gradient") and text == "True, torch's False")),
    ),
    Meant(
        "a fused call saves other tensors than torch's calls in a row: one written to meanwhile is refused, not used",
        lambda case, kind, text: case.mutate is not None and kind.startswith(("ours", "one side"))
        and "modified by an inplace operation" in text,
    ),
    Meant(
        "kernels lay gradients and attention's result out by what they read (tests/conformance/compare.py); torch's "
        "own layouts differ between CPU and GPU",
        lambda case, kind, text: _kernels(case) and (kind.startswith("strides of gradient")
                                                     or (_attends(case) and kind.startswith("strides"))),
    ),
    Meant(
        "torch cannot differentiate its own gradient there",
        lambda case, kind, text: kind == "torch raises in second backward",
    ),
    Meant(
        "a fused chain needs not what its layers, called in place one by one, have overwritten",
        lambda case, kind, text: case.operator == "fused" and kind == "torch raises in backward"
        and "modified by an inplace operation" in text,
    ),
    Meant(
        "a chain gives what is both its input and its residual two gradients at once, and autograd lays their sum out "
        "as the first of them; of torch's own the residual's comes first",
        lambda case, kind, text: case.operator == "fused" and kind.startswith("strides of gradient of")
        and any("residual" in block for block in case.options["blocks"]),
    ),
    Meant(
        "the executor copies operands back, which counts as a write; one image or vector is a view of its batch",
        lambda case, kind, text: _kernels(case) and (
            kind in ("versions", "is_view")
            or ("is a view and its base" in text and any(t.kind == "Subclass" for t in case.tensors.values()))),
    ),
    Meant(
        "a kernel's result is a plain tensor, of whatever class its operands are",
        lambda case, kind, text: _kernels(case) and kind.startswith("class of") and text == "Tensor, torch's Subclass",
    ),
    Meant(
        "the batch's statistics take a convolution's bias away again: its gradient is 0, of NaN and infinities too",
        lambda case, kind, text: _of_conv_bias(case, kind) and "NaN in 0 places" in text,
    ),
    Meant(
        "torch's autocast on a CPU joins no float16 with what it made bfloat16, a GPU's does",
        lambda case, kind, text: _kernels(case) and kind.startswith("torch raises") and "autocast::prioritize" in text,
    ),
    Meant(
        "gradients of ReLU6 and Hardswish at NaN, and sums of them: torch's own vectors and scalars differ",
        lambda case, kind, text: kind.startswith("gradient") and _infinite(case)
        and ("NaN in" in text or "torch's 0.00e+00, of 0.00e+00" in text)
        and any(name in repr(case.options) for name in ("relu6", "hardswish")),
    ),
    Meant(
        "the batch's statistics of bfloat16 parameters: a stage takes vectors of any dtype, torch's CPU float32 or one",
        lambda case, kind, text: case.operator in ("batch_norm", "conv_stage", "module", "fused")
        and kind == "torch raises in forward" and "mixed dtype" in text,
    ),
    Meant(
        "masks without two axes, and grouped heads without three, are refused as torch's kernels on a GPU refuse them",
        lambda case, kind, text: _kernels(case) and case.operator == "attention"
        and ("at least two dimensions" in text or "at least three dimensions" in text),
    ),
    Meant(
        "a target out of range makes the loss NaN on a GPU, where torch's CPU raises (rule 12 of the design)",
        lambda case, kind, text: _kernels(case) and "target" in case.tensors and "is out of bounds" in text,
    ),
    Meant(
        "a key behind a mask counts for nothing, an infinite one too: torch's own composition adds -inf to inf",
        lambda case, kind, text: _kernels(case) and case.operator == "attention" and _infinite(case)
        and bool(case.options.get("is_causal") or "attn_mask" in case.tensors) and _fewer_nan(text),
    ),
    Meant(
        "in evaluation a pooling's gradient of 0 times an infinite pixel that it did not choose: not multiplied at all",
        lambda case, kind, text: _kernels(case) and "pool" in repr(case.options) and kind.startswith("gradient")
        and _infinite(case) and _fewer_nan(text),
    ),
    Meant(
        "where a product with an infinite or huge value overflows: kernels subtract the row sums of dO * O, as torch's "
        "flash attention does, its composition those of the weights and their gradients, inf - inf",
        lambda case, kind, text: _kernels(case) and _attends(case) and _infinite(case) and kind.startswith("gradient")
        and _fewer_nan(text),
    ),
    Meant(
        "a row whose scores are NaN, or beyond float32 before they are scaled, is NaN: to torch's flash attention on a "
        "CPU it is one that is masked, and torch's composition scales first",
        lambda case, kind, text: _kernels(case) and _attends(case) and _infinite(case) and "torch in 0, of" in text,
    ),
    Meant(
        "of a map that is dense in both formats torch's batch norm keeps one or the other, as its vectors are dense",
        lambda case, kind, text: _kernels(case) and case.operator == "batch_norm" and kind == "strides of output"
        and case.tensors["input"].shape[0] == 1 and 1 in case.tensors["input"].shape[2:],
    ),
    Meant(
        "probabilities or weights of classes that are infinite: a sum of differences is taken as a difference of sums",
        lambda case, kind, text: _kernels(case) and case.operator == "cross_entropy" and "NaN in" in text
        and _infinite(case, "target", "weight"),
    ),
    Meant(
        "padding is of zeros that take part: where an infinite weight makes NaN of them, torch's own ways differ",
        lambda case, kind, text: kind in ("gradient of input", "output") and "NaN in" in text
        and case.operator in ("conv2d", "conv_stage", "module") and _infinite(case, "w"),
    ),
    Meant(
        "what torch.compile meets as it traces it tells by a subclass of the error",
        lambda case, kind, text: kind == "class of error in forward" and "ours TorchRuntimeError" in text,
    ),
    Meant(
        "a bias that would make the result larger than its rows and features is refused",
        lambda case, kind, text: _kernels(case) and "bias must have shape [out_features] or broadcast" in text,
    ),
    Meant(
        "dropout's factors are compared as the kernels have them, in float32",
        lambda case, kind, text: _kernels(case) and "float64" in repr(case.tensors) and "torch's 0.00e+00" in text
        and 0 < (case.options.get("dropout_p") or 0) < 1,
    ),
    Meant(
        "torch's own composition takes the root of the scale, and on a CPU a scale of 0 times a mask's -inf is NaN",
        lambda case, kind, text: case.operator == "attention" and case.options.get("scale") is not None
        and "NaN in" in text and case.options["scale"] <= 0,
    ),
    Meant(
        "a bias of another dtype is refused, also for empty batches and layouts where torch adds it to a product",
        lambda case, kind, text: _kernels(case) and kind == "ours raises in forward" and "bias" in case.tensors
        and "expected all tensors to have the same dtype" in text,
    ),
    Meant(
        "a bias of as many axes as the result: torch's CPU refuses it in bfloat16, where it multiplies matrices",
        lambda case, kind, text: _kernels(case) and case.operator == "linear" and kind == "torch raises in forward"
        and "the number of sizes provided" in text,
    ),
    Meant(
        "no keys give the shape that broadcasting says",
        lambda case, kind, text: case.operator == "attention" and _empty(case) and ("shape" in kind or "shape" in text),
    ),
    Meant(
        "torch's own backward does not take what the hooks give back",
        lambda case, kind, text: case.hooks is not None and kind.startswith("torch raises"),
    ),
    Meant(
        "gradients are laid out by tensors as hooks give them back",
        lambda case, kind, text: case.hooks is not None and kind.startswith("strides of gradient"),
    ),
    Meant(
        "the batch's statistics take a convolution's bias away again: its gradient is rounding, if not 0",
        lambda case, kind, text: _of_conv_bias(case, kind) and "no float64" in text,
    ),
    Meant(
        "the executor makes views of subclasses, behind which a refusal to differentiate twice is not found",
        lambda case, kind, text: _kernels(case) and case.backward == "double" and text == "ours True, torch False"
        and any(t.kind == "Subclass" for t in case.tensors.values()),
    ),
    Meant(
        "an expanded tensor can't be written to: on the executor's copy it is refused in another place",
        lambda case, kind, text: case.mutate is not None and "refers to a single memory location" in text,
    ),
    Meant(
        "second gradients of an empty batch are 0 or none",
        lambda case, kind, text: case.backward == "double" and _empty(case)
        and ("requires_grad of gradient" in kind or kind.endswith("None")),
    ),
    Meant(
        "torch's own: the weight's gradient of a dilated, grouped convolution in bfloat16 is memory never written to",
        lambda case, kind, text: not _kernels(case) and case.operator == "conv2d" and kind == "gradient of weight"
        and case.options.get("groups", 1) > 1 and case.options.get("dilation", 1) not in (1, (1, 1))
        and "bfloat16" in repr(case),
    ),
    Meant(
        "a dropped element passes a gradient of 0 behind a ReLU, even where an infinite one comes in (linear's page)",
        lambda case, kind, text: kind.startswith("gradient") and "NaN in 0 places" in text
        and bool(case.options.get("dropout_p")),
    ),
)  # fmt: skip


def meant(case: Case, kind: str, text: str) -> str | None:
    """Why a difference is meant, None where it is not."""
    return next((m.reason for m in MEANT if m.where(case, kind, text)), None)
