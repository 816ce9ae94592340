"""The kernel against a slow, obvious oracle: autograd's dense weight gradient, cut to the slice."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from slicefine import SliceFineError
from slicefine.kernel import slice_linear, vectors
from slicefine.slicing import Slice

O, I = 6, 5
PIECES = [Slice("row", 2, 3), Slice("row", 0, 1), Slice("column", 1, 2), Slice("column", 4, 1), Slice("row", 0, O)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype=torch.float32, leading=(4, 3), bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return draw(*leading, I).requires_grad_(), draw(O, I), draw(O) if bias else None, draw(*leading, O)


def master_of(weight, piece, shape=None):
    values = vectors(weight, piece.axis)[piece.start : piece.stop]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    master = torch.zeros(shape or values.shape, dtype=dtype)
    master[: values.shape[0], : values.shape[1]] = values
    return master.requires_grad_(), torch.tensor(list(piece.indices))


def oracle(x, weight, bias, g, piece):
    """y, dx, d_slice, d_bias by dense autograd, in fp32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    x, weight = x.detach().to(wide).requires_grad_(), weight.to(wide).requires_grad_()
    bias = None if bias is None else bias.to(wide).requires_grad_()
    y = F.linear(x, weight, bias)
    y.backward(g.to(wide))
    return y, x.grad, vectors(weight.grad, piece.axis)[piece.start : piece.stop], None if bias is None else bias.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_agrees_with_dense_autograd(piece, bias, dtype):
    x, weight, b, g = tensors(dtype, bias=bias)
    master, index = master_of(weight, piece)
    bias_master = None if b is None else b.float().requires_grad_()
    y = slice_linear(x, weight, b, master, index, piece.axis, bias_master)
    y.backward(g)
    _, dx, d_slice, d_bias = oracle(x, weight, b, g, piece)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    assert torch.equal(y, F.linear(x, weight, b))
    torch.testing.assert_close(x.grad.to(dx.dtype), dx, **tolerance)
    torch.testing.assert_close(master.grad, d_slice, **tolerance)
    assert master.grad.dtype is torch.float32
    if bias_master is not None:
        torch.testing.assert_close(bias_master.grad, d_bias, **tolerance)
        assert bias_master.grad.dtype is torch.float32


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 4), (0,), (2, 0, 3)])
@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_any_leading_dimensions_and_empty_batches(piece, leading):
    x, weight, b, g = tensors(leading=leading)
    master, index = master_of(weight, piece)
    y = slice_linear(x, weight, b, master, index, piece.axis)
    y.backward(g)
    _, dx, d_slice, _ = oracle(x, weight, b, g, piece)
    assert y.shape == (*leading, O)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(master.grad, d_slice)


@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_non_contiguous_input_and_gradient(piece):
    _, weight, b, _ = tensors()
    x = torch.randn(I, 4, 3).permute(2, 1, 0).detach().requires_grad_()
    master, index = master_of(weight, piece)
    y = slice_linear(x, weight, b, master, index, piece.axis)
    g = torch.randn(1).expand(y.shape)
    y.backward(g)
    _, dx, d_slice, _ = oracle(x, weight, b, g, piece)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(master.grad, d_slice)


@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_a_larger_master_gets_zeros_outside_the_slice(piece):
    x, weight, b, g = tensors()
    master, index = master_of(weight, piece, shape=(O, max(O, I)))
    slice_linear(x, weight, b, master, index, piece.axis).backward(g)
    expected = torch.zeros_like(master)
    d_slice = oracle(x, weight, b, g, piece)[2]
    expected[: d_slice.shape[0], : d_slice.shape[1]] = d_slice
    torch.testing.assert_close(master.grad, expected)


@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_input_that_needs_no_gradient(piece):
    x, weight, b, g = tensors()
    x = x.detach()
    master, index = master_of(weight, piece)
    y = slice_linear(x, weight, b, master, index, piece.axis)
    y.backward(g)
    torch.testing.assert_close(master.grad, oracle(x, weight, b, g, piece)[2])


def test_a_frozen_master_keeps_nothing_of_the_input():
    x, weight, b, g = tensors()
    master, index = master_of(weight, Slice("row", 0, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = slice_linear(x, weight, b, master.detach(), index, "row")
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ weight)


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_gradcheck_in_float64(piece):
    """The slice's gradient, by finite differences through a layer that really reads the master."""
    x, weight, b, _ = tensors(torch.float64)
    master, index = master_of(weight, piece)
    bias_master = b.clone().requires_grad_()

    def layer(x, master, bias_master):
        current = weight.clone()
        vectors(current, piece.axis)[piece.start : piece.stop] = master.detach()
        return slice_linear(x, current, bias_master.detach(), master, index, piece.axis, bias_master)

    assert torch.autograd.gradcheck(layer, (x, master, bias_master))


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_repeats_bit_by_bit(piece):
    def once():
        x, weight, b, g = tensors(torch.bfloat16, leading=(64, 33))
        master, index = master_of(weight, piece)
        slice_linear(x, weight, b, master, index, piece.axis).backward(g)
        return x.grad, master.grad

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_autocast_gives_the_bits_of_the_plain_layer_and_an_fp32_gradient(piece):
    x, weight, b, g = tensors()
    master, index = master_of(weight, piece)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = slice_linear(x, weight, b, master, index, piece.axis)
        assert torch.equal(y, F.linear(x, weight, b))
    assert y.dtype is torch.bfloat16
    y.backward(g.bfloat16())
    _, dx, d_slice, _ = oracle(x, weight, b, g, piece)
    assert x.grad.dtype is master.grad.dtype is torch.float32
    torch.testing.assert_close(x.grad, dx, rtol=2e-2, atol=8e-2)
    torch.testing.assert_close(master.grad, d_slice, rtol=2e-2, atol=8e-2)


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_gradients_accumulate(piece):
    x, weight, b, g = tensors()
    master, index = master_of(weight, piece)
    for _ in range(3):
        slice_linear(x, weight, b, master, index, piece.axis).backward(g)
    torch.testing.assert_close(master.grad, 3 * oracle(x, weight, b, g, piece)[2])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_gradient_checkpointing(piece, reentrant):
    x, weight, b, g = tensors()
    master, index = master_of(weight, piece)
    y = checkpoint(lambda x: slice_linear(x, weight, b, master, index, piece.axis).tanh(), x, use_reentrant=reentrant)
    y.backward(g)
    checkpointed = x.grad, master.grad
    x.grad = master.grad = None
    slice_linear(x, weight, b, master, index, piece.axis).tanh().backward(g)
    assert torch.equal(checkpointed[0], x.grad)
    assert torch.equal(checkpointed[1], master.grad)


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_kept_for_backward_is_what_the_docstring_says(piece):
    x, weight, b, _ = tensors(leading=(32, 8))
    master, index = master_of(weight, piece)
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks:
        y = slice_linear(x, weight, b, master, index, piece.axis)
    entries = sum(t.numel() for t in kept.values() if t.is_floating_point() and t.data_ptr() != weight.data_ptr())
    assert entries == (x.numel() if piece.axis == "row" else 32 * 8 * piece.width)
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not held, "a tensor is stashed outside of the saved tensors"


@pytest.mark.parametrize("piece", [PIECES[0], PIECES[2]], ids=str)
def test_shapes_and_dtypes_on_the_meta_device(piece):
    x, weight, b, g = tensors(torch.bfloat16)
    master, index = master_of(weight, piece)
    x, weight, b, g, index = (t.detach().to("meta") for t in (x, weight, b, g, index))
    x.requires_grad_()
    master = master.detach().to("meta").requires_grad_()
    slice_linear(x, weight, b, master, index, piece.axis).backward(g)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert (master.grad.shape, master.grad.dtype) == (master.shape, torch.float32)


def test_a_write_to_the_weight_makes_the_graph_stale():
    x, weight, b, g = tensors()
    master, index = master_of(weight, PIECES[0])
    y = slice_linear(x, weight, b, master, index, "row")
    weight[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(g)


def test_a_second_derivative_is_refused():
    x, weight, b, _ = tensors()
    master, index = master_of(weight, PIECES[0])
    y = slice_linear(x, weight, b, master, index, "row")
    with pytest.raises(SliceFineError, match=r"first derivative only.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
