"""Mutants of the conditions under which a fast way may be taken: each lets in what it may not."""

from __future__ import annotations

from tests.mutants.mutant import Mutant


def _mutant(
    name: str, file: str, before: str, after: str, *tests: str, gate: str = "torch", reason: str = ""
) -> Mutant:
    return Mutant(f"condition: {name}", f"tkernels/{file}", before, after, gate, tests, reason)


GUARD, STAGE, NORM, LOSS = "cpu/guard.py", "cpu/stage.py", "cpu/norm.py", "cpu/loss.py"
PRODUCT, PACKED, CONVOLUTION = "cpu/product.py", "cpu/packed.py", "cpu/convolution.py"
CHAINS, PLAN, MODE, OPERATOR = "fusion/chains.py", "core/plan.py", "core/mode.py", "core/operator.py"
# tests
STAGES = "tests/cpu/test_stage.py"
UNSOUND = "tests/cpu/test_values_left_to_torch.py"
PASSES = "tests/cpu/test_norm_and_loss.py"
CHAIN = "tests/cpu/test_chain.py"
PRODUCTS = "tests/cpu/test_linear.py"
GRADIENTS = "tests/cpu/test_one_gradient.py"

MUTANTS = [
    _mutant("a trace goes the CPU's fast way", GUARD,
            "        not is_dynamo_compiling()\n        and type(x) in PLAIN\n",
            "        type(x) in PLAIN\n", UNSOUND, PASSES, "tests/core", "tests/conformance"),
    _mutant("a CPU's negated view goes it", GUARD, "        and not x.is_neg()\n", "", UNSOUND, PASSES,
            "tests/conformance"),
    _mutant("a transform goes it", GUARD, "        and plain_eager()\n", "", UNSOUND, PASSES, "tests/conformance"),
    _mutant("float16 goes it", GUARD, "DTYPES = (torch.float32, torch.bfloat16)",
            "DTYPES = (torch.float32, torch.bfloat16, torch.float16)", UNSOUND, PASSES, "tests/conformance"),
    _mutant("other tensors' dtypes are not asked", GUARD, "(is_plain(t) and t.dtype in dtypes and not t.is_neg())",
            "(is_plain(t) and not t.is_neg())", UNSOUND, PASSES, "tests/conformance"),
    _mutant("a CPU stage with another activation", STAGE,
            '        and all(layer.activation == "relu" for layer in layers)\n', "", STAGES, UNSOUND),
    _mutant("a CPU stage whose windows overlap", STAGE,
            "        and (pool.kernel_h, pool.kernel_w) == (pool.stride_h, pool.stride_w)\n", "", STAGES, UNSOUND),
    _mutant("a CPU stage with asymmetric padding", STAGE, "all(_is_symmetric(g) and packed", "all(packed", STAGES,
            UNSOUND),
    _mutant("a CPU stage in evaluation that is differentiated", STAGE,
            "stage.p > 0 or guard.recorded(x, *_parameters(layers))", "stage.p > 0", STAGES, UNSOUND),
    _mutant("a CPU's batch norm with a residual", NORM, "residual is not None or not guard",
            "not guard", PASSES, UNSOUND, "tests/batch_norm"),
    _mutant("a CPU's batch norm in evaluation", "ops/batch_norm/op.py", "if bn.training is True and activation",
            "if activation", PASSES, UNSOUND, "tests/batch_norm"),
    _mutant("a CPU's batch norm over strided vectors", NORM, "(t.shape == x.shape[1:2] and t.is_contiguous())",
            "t.shape == x.shape[1:2]", PASSES, UNSOUND, "tests/batch_norm", "tests/conformance"),
    _mutant("a CPU's batch norm of an inference tensor", NORM, "x.numel() > x.shape[1] and not x.is_inference()",
            "x.numel() > x.shape[1]", PASSES, UNSOUND, "tests/batch_norm", "tests/conformance"),
    _mutant("a CPU's loss with weights", LOSS, "        weight is None\n        and guard", "        guard",
            PASSES,
            "tests/cross_entropy"),
    _mutant("a CPU's loss over strided logits", LOSS, "        and x.is_contiguous()\n", "", PASSES,
            "tests/cross_entropy"),
    _mutant("a CPU's loss of smoothing beyond 1", LOSS, "        and 0.0 <= options.smoothing <= 1.0\n", "",
            PASSES,
            "tests/cross_entropy"),
    _mutant("a CPU's product under autocast", PRODUCT,
            ' or torch.is_autocast_enabled("cpu"):', ":", PRODUCTS, PASSES, "tests/linear"),
    _mutant("a CPU's product that is differentiated", PRODUCT, "if torch.is_grad_enabled() or not guard",
            "if not guard", PRODUCTS, PASSES, "tests/linear"),
    _mutant("a kept weight that was written to", PACKED, " or not torch.equal(copy.bits, now):", ":", CHAIN, UNSOUND),
    _mutant("oneDNN's unsafe convolution of one channel", PACKED,
            "return channels > 1 or (stride[0] == stride[1] and dilation == (1, 1))", "return True", CHAIN, UNSOUND,
            reason="foreign memory, whose values may be right: not seen again in 4,608 calls of 2,304 kinds"),
    _mutant("a padded 1x1 convolution's gradients as products", CONVOLUTION,
            "weight[2:] != (1, 1) or padding != (0, 0) or groups != 1", "weight[2:] != (1, 1) or groups != 1",
            GRADIENTS, CHAIN),
    _mutant("a grouped 1x1 convolution's gradients as products", CONVOLUTION,
            "padding != (0, 0) or groups != 1", "padding != (0, 0)", GRADIENTS, CHAIN),
    _mutant("a chain over a result with two uses", CHAINS,
            "    if len(step.node.users) != 1:\n        return None\n    node",
            "    node", "tests/fusion"),
    _mutant("a chain over a writer in between", CHAINS, "if touched & (reads | writes):", "if touched & writes:",
            "tests/fusion"),
    _mutant("a chain over a reader in between", CHAINS, "if writes & {s for argument", "if set() & {s for argument",
            "tests/fusion"),
    _mutant("a chain over a switch of modes", CHAINS, "if not _computes_tensors(node):", "if False:", "tests/fusion"),
    _mutant("an addition of one result to itself", CHAINS, "if first is second or (writes", "if (writes",
            "tests/fusion"),
    _mutant("a plan's key without strides", PLAN, "t.shape, t.stride(), t.data_ptr() & 15,",
            "t.shape, t.data_ptr() & 15,", "tests/core"),
    _mutant("a plan's key without alignment", PLAN, "t.stride(), t.data_ptr() & 15,", "t.stride(),", "tests/core"),
    _mutant("a plan's key without the sign bit", PLAN, "t.get_device(), t.is_neg())", "t.get_device())", "tests/core"),
    _mutant("a call's key without who wants gradients", PLAN, "marshal.dumps(arguments, 2), recorded, cast,",
            "marshal.dumps(arguments, 2), cast,", "tests/core"),
    _mutant("a call's key without autocast", PLAN, "recorded, cast, precision,", "recorded, precision,", "tests/core"),
    _mutant("a call's key without the backend", PLAN, "mode.get_backend(), _torch.cudnn_is_enabled()",
            "_torch.cudnn_is_enabled()", "tests/core"),
    _mutant("a plan's key without float32 precision", PLAN,
            "precision = mode.float32_products() if first.dtype is torch.float32 else None", "precision = None",
            "tests/core"),
    _mutant("a decision made while a graph is captured is kept", OPERATOR,
            "None if autotune.enabled and autotune.capturing() else plan.call_key(tensors, arguments)",
            "plan.call_key(tensors, arguments)", "tests/core"),
    _mutant("float64 on kernels", MODE, "TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)",
            "TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)", "tests/core",
            "tests/linear", gate="ttsem"),
    _mutant("a transform on kernels", MODE, "    if not HAS_TRITON or transformed():\n        return False\n", "",
            "tests/conformance/test_transforms.py", "tests/core", gate="ttsem"),
    _mutant("a negated view on kernels", MODE, "if _wraps_others(t) or (eager and t.is_neg()):",
            "if _wraps_others(t):", "tests/conformance", "tests/core", gate="ttsem"),
    _mutant("linear with a bias of two axes drops out in the kernel", "ops/linear/op.py",
            "dropout=p if bias is None or bias.dim() < 2 else 0.0)", "dropout=p)", "tests/core"),
    _mutant("a conv stage without images on kernels", "ops/conv_stage/op.py",
            "if call.input.numel() == 0 or not mode", "if not mode", "tests/conv_stage", gate="ttsem"),
]  # fmt: skip
