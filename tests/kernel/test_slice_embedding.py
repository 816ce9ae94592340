"""The kernel of embeddings against autograd's dense gradient of the table, cut to the slice."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from slicefine import SliceFineError
from slicefine.kernel import slice_embedding, vectors
from slicefine.slicing import Slice

TOKENS, FEATURES = 11, 6
PIECES = [
    Slice("row", 2, 3),
    Slice("row", 10, 1),
    Slice("column", 1, 2),
    Slice("column", 5, 1),
    Slice("row", 0, TOKENS),
]
BOTH = [PIECES[0], PIECES[2]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(dtype=torch.float32, shape=(4, 7)):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(TOKENS, shape, generator=generator)
    weight, g = (torch.randn(*of, FEATURES, generator=generator).to(dtype) for of in ((TOKENS,), shape))
    return ids, weight, g


def master_of(weight, piece, room=0):
    width, length = vectors(weight, piece.axis)[piece.start : piece.stop].shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(width + room, length + 2 * room, dtype=dtype).requires_grad_(), torch.tensor(list(piece.indices))


def oracle(ids, weight, g, piece, padding_idx=None):
    """d_slice by dense autograd, in fp32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide, copy=True).requires_grad_()
    F.embedding(ids, weight, padding_idx).backward(g.to(wide))
    return vectors(weight.grad, piece.axis)[piece.start : piece.stop]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_agrees_with_dense_autograd(piece, padding_idx, ids_dtype, dtype):
    ids, weight, g = tensors(dtype)
    ids = ids.to(ids_dtype)
    master, index = master_of(weight, piece)
    y = slice_embedding(ids, weight, master, index, piece.axis, padding_idx)
    y.backward(g)
    assert torch.equal(y, F.embedding(ids, weight, padding_idx))
    assert master.grad.dtype is master.dtype
    low = dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if low else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(master.grad, oracle(ids, weight, g, piece, padding_idx), **tolerance)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 0, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_ids_of_any_shape(piece, shape):
    ids, weight, g = tensors(shape=shape)
    master, index = master_of(weight, piece)
    y = slice_embedding(ids, weight, master, index, piece.axis)
    y.backward(g)
    assert y.shape == (*shape, FEATURES)
    torch.testing.assert_close(master.grad, oracle(ids, weight, g, piece))


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_a_gradient_that_is_not_contiguous(piece):
    ids, weight, _ = tensors()
    master, index = master_of(weight, piece)
    slice_embedding(ids, weight, master, index, piece.axis).sum().backward()
    torch.testing.assert_close(master.grad, oracle(ids, weight, torch.ones(4, 7, FEATURES), piece))


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_a_larger_master_gets_zeros_outside_the_slice(piece):
    ids, weight, g = tensors()
    master, index = master_of(weight, piece, room=2)
    slice_embedding(ids, weight, master, index, piece.axis).backward(g)
    expected = torch.zeros_like(master)
    d_slice = oracle(ids, weight, g, piece)
    expected[: d_slice.shape[0], : d_slice.shape[1]] = d_slice
    torch.testing.assert_close(master.grad, expected)


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_repeats_bit_by_bit_and_accumulates(piece):
    ids, weight, g = tensors(torch.bfloat16, shape=(64, 33))
    master, index = master_of(weight, piece)
    found = []
    for _ in range(2):
        slice_embedding(ids, weight, master, index, piece.axis).backward(g)
        found.append(master.grad.clone())
    assert torch.equal(found[1], 2 * found[0])


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_kept_for_backward_are_the_ids(piece):
    ids, weight, _ = tensors()
    master, index = master_of(weight, piece)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        slice_embedding(ids, weight, master, index, piece.axis)
    assert set(kept) == {ids.data_ptr(), index.data_ptr()}


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_shapes_and_dtypes_on_the_meta_device(piece):
    ids, weight, g = (t.to("meta") for t in tensors(torch.bfloat16))
    master, index = master_of(weight, piece)
    master = master.detach().to("meta").requires_grad_()
    slice_embedding(ids, weight, master, index.to("meta"), piece.axis, 3).backward(g)
    assert (master.grad.shape, master.grad.dtype) == (master.shape, torch.float32)


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_a_compiled_graph_survives_a_move(piece):
    ids, weight, g = tensors()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(slice_embedding, fullgraph=True, backend=counter)
    for start in (1, 3, 1):
        there = Slice(piece.axis, start, piece.width)
        master, index = master_of(weight, there)
        y = compiled(ids, weight, master, index, piece.axis, 3)
        y.backward(g)
        assert torch.equal(y, F.embedding(ids, weight))
        torch.testing.assert_close(master.grad, oracle(ids, weight, g, there, 3))
    assert counter.frame_count == 1


def test_the_check_runs_when_backward_begins():
    ids, weight, g = tensors()
    master, index = master_of(weight, PIECES[0])

    def refuse():
        raise SliceFineError("changed")

    y = slice_embedding(ids, weight, master, index, "row", None, refuse)
    with pytest.raises(SliceFineError, match="changed"):
        y.backward(g)


def test_a_second_derivative_is_refused():
    ids, weight, _ = tensors()
    master, index = master_of(weight, PIECES[0])
    y = slice_embedding(ids, weight, master, index, "row")
    with pytest.raises(SliceFineError, match=r"first derivative only.*create_graph"):
        torch.autograd.grad(y.sum(), master, create_graph=True)
