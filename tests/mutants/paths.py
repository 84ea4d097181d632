"""Mutants of paths: each fast way falls back silently. Values stay as they were, so what ran must be counted."""

from __future__ import annotations

from tests.mutants.mutant import Mutant


def _mutant(
    name: str, file: str, before: str, after: str, *tests: str, gate: str = "torch", reason: str = ""
) -> Mutant:
    return Mutant(f"path: {name}", file, before, after, gate, tests, reason)


# tests
STAGES = "tests/cpu/test_stage.py"
PASSES = "tests/cpu/test_norm_and_loss.py"
CHAIN = "tests/cpu/test_chain.py"
PRODUCTS = "tests/cpu/test_linear.py"
GRADIENTS = "tests/cpu/test_one_gradient.py"
COMPILER = "tests/cpu/test_compiler.py"
BUFFERS = "tests/cpu/test_buffers.py"

MUTANTS = [
    _mutant("fuse() changes nothing", "tkernels/fusion/chains.py",
            "        if reason is None:\n            chains.append(chain)\n",
            "        if False:\n            chains.append(chain)\n", "tests/fusion"),
    _mutant("linear's body is PyTorch's", "tkernels/ops/linear/op.py",
            "    if not (checks.are_floats(input, weight, bias) and mode.use_triton(input, weight, bias)):\n",
            "    if True:\n", "tests/linear", gate="ttsem"),
    _mutant("matmul's body is PyTorch's", "tkernels/ops/matmul/op.py",
            "    if not (checks.are_floats(a, b) and mode.use_triton(a, b)):\n",
            "    if True:\n", "tests/matmul", gate="ttsem"),
    _mutant("conv2d's body is PyTorch's", "tkernels/ops/conv/op.py",
            "channels > 0 and mode.use_triton(input, weight, bias)):", "channels < 0):", "tests/conv", gate="ttsem"),
    _mutant("batch norm's body is PyTorch's", "tkernels/ops/batch_norm/op.py",
            "    if not mode.use_triton(input, *bn.vectors, residual):\n",
            "    if True:\n", "tests/batch_norm", gate="ttsem"),
    _mutant("cross entropy's body is PyTorch's", "tkernels/ops/cross_entropy/op.py",
            "    if not mode.use_triton(input, target, weight):\n",
            "    if True:\n", "tests/cross_entropy",
            gate="ttsem"),
    _mutant("attention's body is PyTorch's", "tkernels/ops/attention/op.py",
            "    if not (checks.are_floats(query, key, value) and mode.use_triton(query, key, value, attn_mask)):\n",
            "    if True:\n", "tests/attention", gate="ttsem"),
    _mutant("a stage's body is PyTorch's", "tkernels/ops/conv_stage/op.py",
            "if call.input.numel() == 0 or not mode.use_triton(*given[:-_OTHERS]):", "if True:", "tests/conv_stage",
            gate="ttsem"),
    _mutant("no plan is ever found", "tkernels/core/plan.py",
            "        plan = _plans.values.get(whole)\n", "        plan = None\n", "tests/core"),
    _mutant("no call is ever known", "tkernels/core/operator.py",
            "call = self._calls.get(key)\n", "call = None\n", "tests/core"),
    _mutant("plans launch by Triton's own Python", "tkernels/core/plan.py",
            "        if self._direct is None or launch.is_watched():", "        if True:", "tests/core"),
    _mutant("plans allocate the slow way", "tkernels/core/plan.py",
            "        if empty is None or torch.are_deterministic_algorithms_enabled()",
            "        if True or torch.are_deterministic_algorithms_enabled()", "tests/core"),
    _mutant("dead buffers stay", "tkernels/core/plan.py",
            "            for i in dead:\n                values[i] = None\n", "", "tests/core", "tests/conv_stage"),
    _mutant("a stage on a CPU is torch's calls", "tkernels/ops/conv_stage/op.py",
            "y = None if cpu is None or residual is not None else cpu.conv_stage(x, layers, stage)", "y = None",
            STAGES),
    _mutant("batch norm on a CPU is torch's calls", "tkernels/cpu/norm.py",
            '    if activation != "relu" or residual', '    if activation != "" or residual', PASSES,
            "tests/batch_norm"),
    _mutant("the loss on a CPU is torch's calls", "tkernels/cpu/loss.py",
            "        weight is None\n        and guard", "        weight is not None\n        and guard", PASSES,
            "tests/cross_entropy"),
    _mutant("products on a CPU are torch's", "tkernels/cpu/product.py",
            "    return _onednn(x, weight, bias) if fits and", "    return None if fits and", PRODUCTS, PASSES),
    _mutant("weights are never kept", "tkernels/cpu/packed.py",
            "        bits = _bits(weight)\n", "        bits = None\n", CHAIN),
    _mutant("gradients of convolutions are torch's", "tkernels/cpu/convolution.py",
            "    out, group_in, height, width = weight\n", "    return None\n", GRADIENTS, CHAIN),
    _mutant("passes are not compiled", "tkernels/cpu/compiler.py",
            "        if _broken or not all(is_plain(t) for t in tensors):", "        if True:", COMPILER),
    _mutant("memory is never used again", "tkernels/cpu/buffers.py",
            "        for buffer in self._lent.get(nbytes, ()):", "        for buffer in ():", BUFFERS),
    _mutant("linear's activation on a CPU is torch's", "tkernels/cpu/product.py",
            "        return finish(z) if plain_eager() else activations.apply(z, activation)",
            "        return activations.apply(z, activation)", PRODUCTS, "tests/fusion"),
    _mutant("chains on a CPU are torch's calls", "tkernels/fusion/calls.py",
            "    run = cpu.plan_chain(_described(chain))\n", "    run = 'torch'\n", "tests/fusion", CHAIN),
    _mutant("a planned chain always runs torch's calls", "tkernels/cpu/chain.py",
            "        x.numel() > 0\n        and plain_eager()\n", "        x.numel() < 0\n        and plain_eager()\n",
            CHAIN, "tests/fusion"),
    _mutant("depthwise convolutions run the implicit GEMM", "tkernels/core/geometry.py",
            "return self.group_in == 1 and self.groups > 1", "return self.groups < 0", "tests/conv", gate="ttsem"),
    _mutant("few channels are not one axis with the taps", "tkernels/core/geometry.py",
            "return self.group_in < FLATTEN_BELOW", "return False", "tests/conv", "tests/conv_stage", gate="ttsem"),
    _mutant("a stage's pointwise layers run the implicit GEMM", "tkernels/ops/conv_stage/config.py",
            "return pointwise and prologue_gain(g, dtype, target) > 1.0", "return False", "tests/conv_stage",
            gate="ttsem"),
    _mutant("a stage's products are all ours", "tkernels/ops/conv_stage/routes.py",
            "if not mode.asks_choosers():", "if True:", "tests/conv_stage/test_routes.py", gate="ttsem"),
    _mutant("linear's products are all ours", "tkernels/ops/linear/op.py",
            "if not mode.asks_choosers() or weight.dim() == 1", "if True or weight.dim() == 1",
            "tests/linear/test_routes.py", gate="ttsem"),
    _mutant("conv2d's products are all ours", "tkernels/ops/conv/op.py",
            "    if not (mode.asks_choosers() and g.symmetric):\n", "    if True:\n",
            "tests/conv/test_routes.py", gate="ttsem"),
    _mutant("a shortcut is a stage of its own", "tkernels/fusion/backend.py",
            "joined = calls.with_shortcuts(calls.joined(chosen), order) if eager else calls.joined(chosen)",
            "joined = calls.joined(chosen)", "tests/fusion/test_networks.py", "tests/perf/test_traffic.py"),
    _mutant("autograd adds what a block's readers send back", "tkernels/fusion/backend.py",
            "        if eager:\n            _give_twice(gm.graph, made)\n", "", "tests/perf/test_traffic.py"),
    _mutant("a block's output is read for its signs", "tkernels/ops/conv_stage/triton_body.py",
            "tells = batch_norm.signs_like(raw, _matrix(raw))", "tells = None", "tests/perf/test_traffic.py",
            "tests/conv_stage"),
    _mutant("overlapping windows are searched again", "tkernels/ops/conv_stage/triton_body.py",
            "tells = kernels.taps_like(raw, stage.pool) if keep else None", "tells = None", "tests/conv_stage",
            gate="ttsem"),
    _mutant("a large gradient is formed by each tile", "tkernels/ops/linear/routing.py",
            "return m * n >= LARGE_GRADIENT and k >= MANY_TIMES * 128", "return False", "tests/linear/test_routes.py",
            gate="ttsem"),
    _mutant("an epoch's step is never captured", "models/cuda_graph.py",
            "            if self._eager or not self._is_full(images, target):", "            if True:", "tests/models"),
    _mutant("perf times PyTorch as tkernels", "perf/providers.py",
            '        "conv_stage": conv_stage,\n        "cnn": cnn,\n    }\n    return Provider(OURS',
            '        "conv_stage": _plain_stage,\n        "cnn": cnn,\n    }\n    return Provider(OURS',
            "tests/perf/test_providers.py", "tests/perf"),
]  # fmt: skip
