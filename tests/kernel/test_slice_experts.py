"""The kernels of fused experts against autograd's dense gradient of all experts' matrices, cut to the slice."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from slicefine import SliceFineError
from slicefine.kernel.slice_experts import batched, grouped, one_expert
from slicefine.slicing import Slice

E, O, I = 5, 16, 24
PIECES = [Slice("row", 2, 3), Slice("row", 15, 1), Slice("column", 1, 2), Slice("column", 8, 16), Slice("row", 0, O)]
BOTH = [PIECES[0], PIECES[2]]
SHARES = {
    "of all sizes": (8, 1, 11, 7, 13),
    "two without tokens": (0, 17, 0, 23, 0),
    "all at one": (0, 0, 40, 0, 0),
    "no tokens": (0, 0, 0, 0, 0),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def tensors(dtype=torch.float32, share=SHARES["of all sizes"], turned=False):
    """x, weight, offs, the expert of every row, and a gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = draw(E, I, O).transpose(1, 2) if turned else draw(E, O, I)
    experts = torch.repeat_interleave(torch.arange(E), torch.tensor(share))
    pairs = len(experts)
    return draw(pairs, I).requires_grad_(), weight, torch.tensor(share).cumsum(0).int(), experts, draw(pairs, O)


def master_of(weight, piece, room=0):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    length = I if piece.axis == "row" else O
    master = torch.zeros(piece.width + room, length + 2 * room, E, dtype=dtype)
    return master.requires_grad_(), torch.tensor(list(piece.indices))


def by_loop(x, weight, offs):
    """What `grouped_mm` computes, in plain torch: in fp64, and where torch's own is not to be had."""
    ends = [0, *offs.tolist()]
    rows = [x[start:end] @ weight[e] for e, (start, end) in enumerate(itertools.pairwise(ends))]
    return torch.cat([*rows, x.new_zeros(len(x) - ends[-1], weight.shape[2])])


def grouped_mm_for(dtype):
    return by_loop if dtype is torch.float64 else F.grouped_mm


def expert_by_expert(x, weight, experts, master, index, axis):
    """As the models' own loops do it: experts without tokens are left out; experts are told by tensors."""
    masters = master.unbind(-1)
    rows = [
        one_expert(x[experts == e], weight, e, None, masters, index, axis)
        for e in torch.arange(E)
        if (experts == e).any()
    ]
    return torch.cat(rows) if rows else x.new_zeros(0, O)


def oracle(x, weight, experts, g, piece):
    """dx, d_slice by dense autograd, in fp32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    x, weight = x.detach().to(wide, copy=True).requires_grad_(), weight.to(wide, copy=True).requires_grad_()
    torch.cat([F.linear(x[experts == e], weight[e]) for e in range(E)]).backward(g.to(wide))
    d = weight.grad if piece.axis == "row" else weight.grad.transpose(1, 2)
    return x.grad, d[:, piece.start : piece.stop].permute(1, 2, 0)


def compare(x, master, y, g, expected):
    y.backward(g)
    low = x.dtype is torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 0.1} if low else {"rtol": 1e-5, "atol": 1e-5}
    dx, d_slice = expected
    torch.testing.assert_close(x.grad.to(dx.dtype), dx, **tolerance)
    width, length, _ = d_slice.shape
    assert master.grad.dtype is master.dtype
    torch.testing.assert_close(master.grad[:width, :length], d_slice, **tolerance)
    assert not master.grad[width:].any()
    assert not master.grad[:, length:].any()


every_case = [
    pytest.mark.parametrize("turned", [False, True], ids=["EOI", "EIO"]),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("share", list(SHARES.values())[:3], ids=list(SHARES)[:3]),
    pytest.mark.parametrize("piece", PIECES, ids=str),
]


def in_every_case(test):
    for mark in every_case:
        test = mark(test)
    return test


@in_every_case
def test_grouped_agrees_with_dense_autograd(piece, share, dtype, turned):
    x, weight, offs, experts, g = tensors(dtype, share, turned)
    master, index = master_of(weight, piece)
    grouped_mm = grouped_mm_for(dtype)
    y = grouped(x, weight, offs, master, index, piece.axis, grouped_mm=grouped_mm)
    own = grouped_mm(x, weight.transpose(-2, -1), offs=offs)
    assert torch.equal(y, own)
    (dx,) = torch.autograd.grad(own, x, g)
    compare(x, master, y, g, oracle(x, weight, experts, g, piece))
    assert torch.equal(x.grad, dx)


@in_every_case
def test_batched_agrees_with_dense_autograd(piece, share, dtype, turned):
    x, weight, _, experts, g = tensors(dtype, share, turned)
    master, index = master_of(weight, piece)
    gathered = weight[experts]
    y = batched(x, gathered, experts, master, index, piece.axis, turned=turned)
    if turned:
        own = torch.bmm(x.unsqueeze(1), gathered.transpose(1, 2)).squeeze(1)
    else:
        own = torch.bmm(gathered, x.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(y, own)
    (dx,) = torch.autograd.grad(own, x, g)
    compare(x, master, y, g, oracle(x, weight, experts, g, piece))
    assert torch.equal(x.grad, dx)


@in_every_case
def test_one_expert_agrees_with_dense_autograd(piece, share, dtype, turned):
    x, weight, _, experts, g = tensors(dtype, share, turned)
    master, index = master_of(weight, piece)
    y = expert_by_expert(x, weight, experts, master, index, piece.axis)
    assert torch.equal(y, torch.cat([F.linear(x[experts == e], weight[e]) for e in range(E) if (experts == e).any()]))
    compare(x, master, y, g, oracle(x, weight, experts, g, piece))


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_one_expert_trains_its_bias(piece):
    x, weight, _, _, g = tensors()
    master, index = master_of(weight, piece)
    bias = torch.randn(O)
    bias_master = bias.clone().requires_grad_()
    y = one_expert(x, weight, 2, bias, master.unbind(-1), index, piece.axis, bias_master)
    assert torch.equal(y, F.linear(x, weight[2], bias))
    y.backward(g)
    torch.testing.assert_close(bias_master.grad, g.sum(0))


WAYS = {
    "grouped": lambda x, w, offs, experts, *slice_: grouped(x, w, offs, *slice_),
    "grouped, another's product": lambda x, w, offs, experts, *slice_: grouped(x, w, offs, *slice_, grouped_mm=by_loop),
    "batched": lambda x, w, offs, experts, *slice_: batched(x, w[experts], experts, *slice_),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@every_way
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_a_larger_master_gets_zeros_outside_the_slice(piece, way):
    x, weight, offs, experts, g = tensors()
    master, index = master_of(weight, piece, room=2)
    y = way(x, weight, offs, experts, master, index, piece.axis)
    compare(x, master, y, g, oracle(x, weight, experts, g, piece))


@every_way
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_no_tokens_at_all(piece, way):
    x, weight, offs, experts, g = tensors(share=SHARES["no tokens"])
    master, index = master_of(weight, piece)
    way(x, weight, offs, experts, master, index, piece.axis).backward(g)
    assert not master.grad.any()
    assert x.grad.shape == (0, I)


@pytest.mark.parametrize("grouped_mm", [F.grouped_mm, by_loop])
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_rows_behind_the_last_expert_count_for_nothing(piece, grouped_mm):
    """Where experts are on several machines, rows of other machines' experts stand at the end."""
    x, weight, offs, experts, g = tensors()
    master, index = master_of(weight, piece)
    more = torch.cat([x.detach(), torch.full((3, I), torch.nan)]).requires_grad_()
    y = grouped(more, weight, offs, master, index, piece.axis, grouped_mm=grouped_mm)
    y[: len(x)].backward(g)
    torch.testing.assert_close(master.grad, oracle(x, weight, experts, g, piece)[1], rtol=1e-5, atol=1e-5)


@every_way
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_repeats_bit_by_bit_and_accumulates(piece, way):
    x, weight, offs, experts, g = tensors(torch.bfloat16)
    master, index = master_of(weight, piece)
    found = []
    for _ in range(2):
        way(x, weight, offs, experts, master, index, piece.axis).backward(g)
        found.append(master.grad.clone())
    assert torch.equal(found[1], 2 * found[0])


@every_way
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_input_or_master_that_needs_no_gradient(piece, way):
    x, weight, offs, experts, g = tensors()
    dx, d_slice = oracle(x, weight, experts, g, piece)
    master, index = master_of(weight, piece)
    way(x.detach(), weight, offs, experts, master, index, piece.axis).backward(g)
    torch.testing.assert_close(master.grad, d_slice, rtol=1e-5, atol=1e-5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = way(x, weight, offs, experts, master.detach(), index, piece.axis)
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    y.backward(g)
    torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-5)


@every_way
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_kept_for_backward_is_what_the_docstring_says(piece, way):
    x, weight, offs, experts, _ = tensors()
    master, index = master_of(weight, piece)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        way(x, weight, offs, experts, master, index, piece.axis)
    of_input = [t for t in kept.values() if t.is_floating_point() and t.dim() == 2]
    assert sum(t.numel() for t in of_input) == (x.numel() if piece.axis == "row" else len(x) * piece.width)


@pytest.mark.parametrize("way", [WAYS["grouped"], WAYS["batched"]], ids=["grouped", "batched"])
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_shapes_and_dtypes_on_the_meta_device(piece, way):
    x, weight, offs, experts, g = tensors(torch.bfloat16)
    master, index = master_of(weight, piece)
    weight, offs, experts, g, index = (t.to("meta") for t in (weight, offs, experts, g, index))
    x, master = (t.detach().to("meta").requires_grad_() for t in (x, master))
    way(x, weight, offs, experts, master, index, piece.axis).backward(g)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert (master.grad.shape, master.grad.dtype) == (master.shape, torch.float32)


@torch.library.custom_op("slicefine_tests::by_loop", mutates_args=())
def opaque(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return by_loop(x, weight, offs)


@opaque.register_fake
def _(x, weight, offs):
    return x.new_empty(x.shape[0], weight.shape[2])


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("piece", BOTH, ids=str)
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        (WAYS["grouped"], torch.bfloat16),  # torch compiles its own for no other dtype
        (lambda x, w, offs, experts, *slice_: grouped(x, w, offs, *slice_, grouped_mm=opaque), torch.float32),
        (WAYS["batched"], torch.float32),
    ],
    ids=list(WAYS),
)
def test_a_compiled_graph_survives_a_move_and_other_shares(way, dtype, piece):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(way, fullgraph=True, backend=counter)
    for start, share in [(1, (8, 0, 12, 7, 13)), (3, (13, 7, 12, 0, 8)), (1, (0, 0, 40, 0, 0))]:
        x, weight, offs, experts, g = tensors(dtype, share)
        there = Slice(piece.axis, start, piece.width)
        master, index = master_of(weight, there)
        y = compiled(x, weight, offs, experts, master, index, piece.axis)
        compare(x, master, y, g, oracle(x, weight, experts, g, there))
    assert counter.frame_count == 1


@every_way
def test_the_check_runs_and_a_second_derivative_is_refused(way):
    x, weight, offs, experts, g = tensors()
    master, index = master_of(weight, PIECES[0])

    def refuse():
        raise SliceFineError("changed")

    with pytest.raises(SliceFineError, match="changed"):
        way(x, weight, offs, experts, master, index, "row", refuse).backward(g)
    y = way(x, weight, offs, experts, master, index, "row")
    with pytest.raises(SliceFineError, match=r"first derivative only.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
