from __future__ import annotations

import torch

from hadaptive_q.models.cross_hadamard import CrossHadamard, pair_indices


def test_pairs_are_row_major() -> None:
    i, j = pair_indices(4)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_pairs_share_no_memory() -> None:
    # safetensors refuses tensors that are views of one another.
    i, j = pair_indices(5)
    assert i.untyped_storage().data_ptr() != j.untyped_storage().data_ptr()


def test_the_training_form_equals_the_indexed_form_and_its_gradient() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 7, 3, 4, requires_grad=True)
    i, j = pair_indices(7)
    fast, indexed = CrossHadamard.apply(z), z[:, i] * z[:, j]
    assert torch.equal(fast, indexed)
    gradient = torch.randn_like(fast)
    (got,) = torch.autograd.grad(fast, z, gradient)
    (wanted,) = torch.autograd.grad(indexed, z, gradient)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # the same sums of 6 terms in another order


def test_the_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CrossHadamard.apply, (z,))


def test_two_channels_make_one_product() -> None:
    z = torch.randn(2, 2, 3, 3)
    assert torch.equal(CrossHadamard.apply(z), z[:, :1] * z[:, 1:])
