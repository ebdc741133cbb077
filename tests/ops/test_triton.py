"""Triton's kernels without a GPU: run by its interpreter, compiled for GPUs, and left alone where they cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.ops import gated, norm, rotary
from qlora.ops.triton.available import can_use_triton, works_on

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_every_kernel_in_the_interpreter() -> None:
    """The cases are in triton_interpreted.py. They need a process in which Triton was told before it was imported."""
    cases = str(Path(__file__).with_name("triton_interpreted.py"))
    warnings = ["-W", "error", "-W", "ignore:overflow:RuntimeWarning"]  # of exp(-x) in sigmoid, far out
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *warnings, cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda t: str(t[1]))
def test_every_kernel_compiles(target: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not check types as the compiler does, which needs no GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlora.ops.triton import gated as gated_kernels
    from qlora.ops.triton import norm as norm_kernels
    from qlora.ops.triton import probe
    from qlora.ops.triton import rotary as rotary_kernels

    if {"cuda": "nvidia", "hip": "amd"}[target[0]] not in triton.backends.backends:
        pytest.skip(f"this Triton has no compiler for {target[0]}")
    rows = norm_kernels._tile(576)
    num_warps = rows.pop("num_warps")
    heads = {"HEADS": 16, "HALF": 32}
    floats = {"eps": "fp32", "offset": "fp32", "rstd": "*fp32", "parts": "*fp32"}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (probe._double, {"BLOCK": 64}),
        (gated_kernels._forward, {"KIND": "gelu", "BLOCK": 1024}),
        (gated_kernels._backward, {"KIND": "gelu_tanh", "BLOCK": 1024}),
        (gated_kernels._backward, {"KIND": "silu", "BLOCK": 1024}),
        (norm_kernels._forward, {"LATE": False, "AGAIN": False, **rows}),
        (norm_kernels._forward, {"LATE": True, "AGAIN": True, **rows}),
        (norm_kernels._backward, {"NEED_WEIGHT": True, **rows}),
        (norm_kernels._backward, {"NEED_WEIGHT": False, **rows}),
        (rotary_kernels._rotate, {"BACKWARD": False, "REST": 0, **heads}),
        (rotary_kernels._rotate, {"BACKWARD": True, "REST": 64, **heads}),
    ]
    pointers = {"x", "y", "weight", "dy", "dx", "gate", "up", "dgate", "dup", "q", "k", "q_out", "k_out", "cos", "sin"}
    for kernel, constants in kernels:
        signature = {
            name: "constexpr" if name in constants else "*bf16" if name in pointers else floats.get(name, "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget(*target), options={"num_warps": num_warps})
        assert built.asm["cubin" if target[0] == "cuda" else "hsaco"], kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where it should work")
def test_where_no_kernel_runs_torch_does_the_work(caplog: pytest.LogCaptureFixture) -> None:
    works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not works_on(0)
        assert not works_on(0)
    works_on.cache_clear()
    # Said once, and only where there is a Triton that could have worked.
    installed = importlib.util.find_spec("triton") is not None
    assert len(caplog.records) == installed
    assert not installed or "torch's own operations are used" in caplog.text


def test_cpu_tensors_and_wide_ones_are_torchs() -> None:
    assert not can_use_triton(torch.ones(2, 2))
    assert not can_use_triton(torch.ones(2, 2, dtype=torch.float64))


def test_nothing_imports_triton_where_there_is_no_gpu() -> None:
    code = (
        "import sys, torch, qlora\n"
        "from qlora.ops import gated, norm, rotary\n"
        "x = torch.ones(4, 8, requires_grad=True)\n"
        "y = norm.rms_norm(x, torch.ones(8), 1e-6) + gated.gated_activation(x, x, 'silu')\n"
        "q = y.view(1, 2, 2, 8)\n"
        "sum(t.sum() for t in rotary.apply_rotary(q, q, torch.ones(1, 2, 8), torch.ones(1, 2, 8))).backward()\n"
        "assert x.grad.any()\n"
        "sys.exit('triton' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_compile_sees_through_all_of_them() -> None:
    """Inside it torch's own operations are used, on whole tensors, which it fuses by itself."""

    def everything(x: Tensor, weight: Tensor, q: Tensor, cos: Tensor) -> Tensor:
        y = norm.rms_norm(x, weight, 1e-6)
        z = gated.gated_activation(y, x, "silu")
        return z.sum() + sum((t**2 * cos).sum() for t in rotary.apply_rotary(q, q[:, :2], cos, cos.flip(-1)))

    def run(function: Any) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((2, 3, 8), (8,), (2, 4, 3, 8))]
        loss = function(*given, torch.linspace(0, 1, 24).view(1, 3, 8))
        return loss, *torch.autograd.grad(loss, given)

    torch.testing.assert_close(run(torch.compile(everything, backend="aot_eager", fullgraph=True)), run(everything))
