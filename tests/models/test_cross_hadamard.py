from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.cross_hadamard import _gradient, cross_hadamard, pair_indices


def test_pairs_are_row_major() -> None:
    i, j = pair_indices(4)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@given(st.integers(2, 64))
def test_every_pair_has_one_slot(cs: int) -> None:
    """Slot ``i (2 cs - i - 1) / 2 + j - i - 1`` holds channels i < j; an ACH has that many more than it is given."""
    i, j = pair_indices(cs)
    slots = i * (2 * cs - i - 1) // 2 + j - i - 1
    assert torch.equal(slots, torch.arange(cs * (cs - 1) // 2))
    assert bool((i < j).all())
    assert int(j.max()) == cs - 1
    assert ACH(cs + 3, cs).out_channels == cs + 3 + cs * (cs - 1) // 2


@given(st.integers(2, 9), st.integers(0, 2**32))
def test_products_of_any_channels(cs: int, seed: int) -> None:
    z = torch.randn(2, cs, 2, 3, generator=torch.Generator().manual_seed(seed))
    i, j = pair_indices(cs)
    assert torch.equal(cross_hadamard(z), z[:, i] * z[:, j])


def test_pairs_share_no_memory() -> None:
    # safetensors refuses tensors that are views of one another.
    i, j = pair_indices(5)
    assert i.untyped_storage().data_ptr() != j.untyped_storage().data_ptr()


def test_the_training_form_equals_the_indexed_form_and_its_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 7, 3, 4, requires_grad=True)
    i, j = pair_indices(7)
    fast, indexed = cross_hadamard(z), z[:, i] * z[:, j]
    assert torch.equal(fast, indexed)
    gradient = torch.randn_like(fast)
    (got,) = torch.autograd.grad(fast, z, gradient)
    (wanted,) = torch.autograd.grad(indexed, z, gradient)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # the same sums of 6 terms in another order


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cross_hadamard, (z,))


def test_two_channels_make_one_product() -> None:
    z = torch.randn(2, 2, 3, 3)
    assert torch.equal(cross_hadamard(z), z[:, :1] * z[:, 1:])


@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (1, 2, 1, 1), (3, 4, 5, 2)])
def test_the_operator_keeps_its_contract(shape: tuple[int, ...]) -> None:
    """Its schema, its shape without data, its gradient and both in a traced graph, as torch checks them."""
    z = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(cross_hadamard, (z,))
    pairs = shape[1] * (shape[1] - 1) // 2
    torch.library.opcheck(_gradient, (torch.randn(shape[0], pairs, *shape[2:]), z.detach()))


def test_channels_last_gives_the_same_products_and_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, 4)
    last = z.to(memory_format=torch.channels_last)
    gradient = torch.randn(2, 10, 3, 4)
    assert torch.equal(cross_hadamard(last), cross_hadamard(z))
    assert torch.equal(_gradient(gradient.to(memory_format=torch.channels_last), last), _gradient(gradient, z))
    torch.library.opcheck(cross_hadamard, (last.requires_grad_(),))


def test_only_the_channels_are_kept_for_the_gradient() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    z = torch.randn(2, 5, 3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_hadamard(z)
    assert [tensor.data_ptr() for tensor in kept] == [z.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_exact_and_do_not_overflow_under_autocast(dtype: torch.dtype) -> None:
    z = torch.tensor([300.0, -700.0, 1.0]).to(dtype).reshape(1, 3, 1, 1).requires_grad_()
    assert z.dtype == dtype
    with torch.autocast("cpu", dtype):
        products = cross_hadamard(z)
    a, b, c = z.detach().flatten().tolist()
    assert products.flatten().tolist() == [a * b, a * c, b * c]
    products.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert torch.equal(z.grad.flatten(), torch.tensor([b + c, a + c, a + b]).to(dtype))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_sees_the_training_form_whole(backend: str) -> None:
    """No graph breaks, and the gradients of the network as it is."""
    torch._dynamo.reset()
    for norm in ("dysoft", "batch_norm"):
        torch.manual_seed(0)
        plain = ACH(12, 5, norm).train()
        compiled = copy.deepcopy(plain)
        x = torch.randn(4, 12, 6, 6)
        results = []
        for module, run in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True, backend=backend))):
            torch.manual_seed(1)
            out = run(x)
            out.square().mean().backward()
            results.append([out, *(p.grad for p in module.parameters()), *module.buffers()])
        for got, wanted in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


IN_AN_INTERPRETER = """
import torch
from hadaptive_q.models.cross_hadamard import _gradient, cross_hadamard
from hadaptive_q.models.cross_hadamard_triton import gradient, products

for shape in (2, 7, 3, 4), (3, 2, 1, 1), (2, 5, 20, 17):
    for dtype in torch.float32, torch.float64, torch.float16, torch.bfloat16:
        step = torch.finfo(dtype).eps
        z = torch.randn(shape).to(dtype)
        wanted = cross_hadamard(z)
        got = products(z, torch.full_like(wanted, torch.nan))
        # The interpreter truncates to bfloat16, where the device rounds.
        torch.testing.assert_close(got, wanted, rtol=step if dtype == torch.bfloat16 else 0, atol=0)
        incoming = torch.randn(wanted.shape).to(dtype)
        exact = _gradient(incoming.double(), z.double())
        got = gradient(incoming, z, torch.full_like(z, torch.nan))
        torch.testing.assert_close(got.double(), exact, rtol=2 * step, atol=8 * step)
"""

FOR_A_DEVICE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hadaptive_q.models import cross_hadamard_triton as kernels

for kernel in kernels._products, kernels._gradient:
    for number in "fp32", "fp16", "bf16", "fp64":
        names = kernel.arg_names
        signature = {name: f"*{number}" if name in ("z", "out", "incoming") else "i32" for name in names}
        constants = {"cs": 16, "block": kernels.BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
        assert "atom" not in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
"""


@pytest.mark.parametrize(("code", "interpreted"), [(IN_AN_INTERPRETER, "1"), (FOR_A_DEVICE, "0")])
def test_the_kernels_for_cuda_without_one(code: str, interpreted: str) -> None:
    """Their logic in Triton's interpreter, on the CPU, and that they compile; that they run there needs a GPU."""
    pytest.importorskip("triton", reason="no triton: the kernels for CUDA are neither run nor compiled")
    environment = {**os.environ, "TRITON_INTERPRET": interpreted}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA: the kernels for it are not run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 9, 14, 14).to(dtype)
    gradient = torch.randn(3, 36, 14, 14).to(dtype)
    assert torch.equal(cross_hadamard(z.cuda()).cpu(), cross_hadamard(z))
    got, exact = _gradient(gradient.cuda(), z.cuda()).cpu(), _gradient(gradient.double(), z.double())
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(got.double(), exact, rtol=2 * step, atol=8 * step)
