from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hadaptive_q.models.ach import ACH
from hadaptive_q.models.cross_hadamard import CrossHadamard, pair_indices


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
    assert torch.equal(CrossHadamard.apply(z), z[:, i] * z[:, j])


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
