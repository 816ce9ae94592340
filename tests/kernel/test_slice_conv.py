"""The kernel of convolutions against torch's own layer and autograd's dense weight gradient, cut to the slice."""

import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slicefine import SliceFineError
from slicefine.kernel import slice_conv, vectors
from slicefine.slicing import Slice

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZE = (8, 7, 5)


def layer_of(dims=2, channels=(12, 24), kernel=3, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return CONVOLUTIONS[dims](*channels, kernel, **settings).to(dtype).requires_grad_(False)


def input_of(conv, batch=(2,), channels_last=False):
    x = torch.randn(*batch, conv.in_channels, *SIZE[: conv.weight.dim() - 2], dtype=conv.weight.dtype)
    return (x.to(memory_format=LAYOUTS[x.dim()]) if channels_last else x).requires_grad_()


def master_of(conv, piece, room=0):
    width, length, *kernel = vectors(conv.weight, piece.axis)[piece.start : piece.stop].shape
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    master = torch.zeros(width + room, length + 2 * room, *kernel, dtype=dtype)
    return master.requires_grad_(), torch.tensor(list(piece.indices))


def run(conv, x, master, index, axis, bias_master=None, check=None):
    return slice_conv(
        x,
        conv.weight,
        conv.bias,
        master,
        index,
        axis,
        bias_master,
        check,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
    )


def oracle(conv, x, g, piece, wide=None):
    """y, dx, d_slice, d_bias of the layer itself by dense autograd, in its own dtype or in `wide`."""
    x = x.detach().to(wide or x.dtype, copy=True).requires_grad_()
    weight, bias = (p.detach().to(x.dtype, copy=True).requires_grad_() for p in (conv.weight, conv.bias))
    y = conv._conv_forward(x, weight, bias)
    y.backward(g.to(x.dtype))
    return y, x.grad, vectors(weight.grad, piece.axis)[piece.start : piece.stop], bias.grad


def compare(conv, x, piece, room=0, **tolerance):
    master, index = master_of(conv, piece, room)
    bias_master = conv.bias.to(master.dtype, copy=True).requires_grad_()
    y = run(conv, x, master, index, piece.axis, bias_master)
    g = torch.randn_like(y)
    y.backward(g)
    expected, dx, _, _ = oracle(conv, x, g, piece)
    _, _, d_slice, d_bias = oracle(conv, x, g, piece, wide=master.dtype)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert torch.equal(x.grad, dx)
    assert master.grad.dtype is bias_master.grad.dtype is master.dtype
    assert master.grad.is_contiguous()
    width, length = d_slice.shape[:2]
    torch.testing.assert_close(master.grad[:width, :length], d_slice, **tolerance)
    assert not master.grad[width:].any()
    assert not master.grad[:, length:].any()
    torch.testing.assert_close(bias_master.grad, d_bias, **tolerance)


PIECES = [Slice("row", 2, 3), Slice("row", 0, 1), Slice("column", 1, 2), Slice("column", 11, 1)]
BOTH = [PIECES[0], PIECES[2]]
SETTINGS = [
    {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode, "kernel": kernel}
    for kernel, stride, dilation, (padding, mode) in itertools.product(
        (1, 2, 3),
        (1, 2),
        (1, 2),
        [
            (0, "zeros"),
            (1, "zeros"),
            (5, "zeros"),
            ("valid", "zeros"),
            (1, "reflect"),
            (2, "circular"),
            (1, "replicate"),
        ],
    )
] + [
    {"padding": "same", "padding_mode": mode, "kernel": kernel, "dilation": dilation}
    for mode, kernel, dilation in itertools.product(("zeros", "reflect"), (1, 3, 4), (1, 2))
]


# torch says once in a process that it pads for an even kernel; whether that is in this test depends on the order.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_agrees_with_the_layer_for_all_settings(piece, dims):
    for settings in SETTINGS:
        conv = layer_of(dims, dtype=torch.float64, **settings)
        compare(conv, input_of(conv), piece)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"stride": 2}, {"kernel": 1}, {"padding": 1, "bias": True}], ids=str)
@pytest.mark.parametrize("piece", PIECES, ids=str)
def test_agrees_in_every_dtype_and_layout(piece, settings, dtype, channels_last):
    conv = layer_of(dtype=dtype, **settings)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    compare(conv, input_of(conv, channels_last=channels_last), piece, **tolerance)


@pytest.mark.parametrize("kernel", [1, (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("channels", [(1, 6), (3, 40), (40, 3)], ids=str)
@pytest.mark.parametrize("axis", ["row", "column"])
def test_slices_wide_and_narrow_against_the_other_side(axis, channels, kernel):
    """Both ways of computing the gradient, and a slice that is the whole weight."""
    conv = layer_of(channels=channels, kernel=kernel, dtype=torch.float64, stride=(2, 1))
    most = conv.weight.shape[0 if axis == "row" else 1]
    for width in {1, min(5, most), most}:
        compare(conv, input_of(conv), Slice(axis, 0, width))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels", [(12, 12), (12, 24), (12, 36)], ids=str)
@pytest.mark.parametrize("groups", [2, 6, 12])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_groups(axis, groups, channels, dims):
    """A slice within a group, across groups, with as many rows as groups, and with all rows; column j is of every group."""
    conv = layer_of(dims, channels=channels, groups=groups, dtype=torch.float64, padding=1, stride=2)
    most = conv.weight.shape[0 if axis == "row" else 1]
    for start, width in {(0, 1), (most - 1, 1), (0, min(most, 5)), (0, min(most, groups)), (0, most)}:
        compare(conv, input_of(conv, channels_last=dims > 1), Slice(axis, start, width))


@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_a_larger_master_gets_zeros_outside_the_slice(axis, groups):
    conv = layer_of(groups=groups, dtype=torch.float64)
    compare(conv, input_of(conv), Slice(axis, 0, 1), room=2)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("batch", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("piece", [Slice("row", 2, 3), Slice("column", 0, 2)], ids=str)
def test_no_batch_dimension_and_empty_batches(piece, batch, groups):
    conv = layer_of(dtype=torch.float64, groups=groups)
    compare(conv, input_of(conv, batch), piece)


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_non_contiguous_input_and_gradient(piece):
    conv = layer_of(dtype=torch.float64)
    x = torch.randn(*SIZE[:2], 2, 12, dtype=torch.float64).permute(2, 3, 1, 0).detach().requires_grad_()
    master, index = master_of(conv, piece)
    y = run(conv, x, master, index, piece.axis)
    g = torch.randn(1, dtype=torch.float64).expand(y.shape)
    y.backward(g)
    _, dx, d_slice, _ = oracle(conv, x, g, piece)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(master.grad, d_slice)


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_gradcheck_in_float64(piece):
    """The slice's gradient, by finite differences through a layer that really reads the master."""
    conv = layer_of(channels=(4, 5), kernel=2, dtype=torch.float64)
    values = vectors(conv.weight, piece.axis)
    index = torch.tensor(list(piece.indices))
    master = values.index_select(0, index).requires_grad_()
    bias_master = conv.bias.clone().requires_grad_()

    def layer(x, master, bias_master):
        with torch.no_grad():
            values.index_copy_(0, index, master)
            conv.bias.copy_(bias_master)
            weight, bias = conv.weight.clone(), conv.bias.clone()
        settings = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        return slice_conv(x, weight, bias, master, index, piece.axis, bias_master, **settings)

    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, master, bias_master))


@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_autocast_gives_the_bits_of_the_plain_layer_and_an_fp32_gradient(piece):
    conv = layer_of()
    x = input_of(conv)
    master, index = master_of(conv, piece)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(conv, x, master, index, piece.axis)
        assert torch.equal(y, conv(x))
    assert y.dtype is torch.bfloat16
    g = torch.randn_like(y)
    y.backward(g)
    _, dx, d_slice, _ = oracle(conv, x, g, piece)
    assert x.grad.dtype is master.grad.dtype is torch.float32
    torch.testing.assert_close(x.grad, dx, rtol=2e-2, atol=8e-2)
    torch.testing.assert_close(master.grad, d_slice, rtol=2e-2, atol=8e-2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_repeats_bit_by_bit_and_accumulates(piece, channels_last):
    conv = layer_of()
    x = input_of(conv, channels_last=channels_last)
    master, index = master_of(conv, piece)
    found = []
    for _ in range(2):
        run(conv, x, master, index, piece.axis).square().sum().backward()
        found.append(master.grad.clone())
    assert torch.equal(found[1], 2 * found[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("piece", BOTH, ids=str)
def test_gradient_checkpointing(piece, reentrant):
    conv = layer_of()
    x = input_of(conv)
    master, index = master_of(conv, piece)
    checkpoint(lambda x: run(conv, x, master, index, piece.axis).tanh(), x, use_reentrant=reentrant).sum().backward()
    checkpointed = x.grad, master.grad
    x.grad = master.grad = None
    run(conv, x, master, index, piece.axis).tanh().sum().backward()
    assert torch.equal(checkpointed[0], x.grad)
    assert torch.equal(checkpointed[1], master.grad)


@pytest.mark.parametrize(
    ("piece", "groups", "channels"),
    [
        (Slice("row", 2, 3), 1, 12),  # all that the layer reads
        (Slice("row", 2, 3), 12, 3),  # those of three groups of one channel
        (Slice("row", 2, 3), 2, 12),
        (Slice("column", 1, 2), 1, 2),
        (Slice("column", 0, 1), 4, 4),  # one of every group
    ],
    ids=str,
)
def test_kept_for_backward_is_what_the_docstring_says(piece, groups, channels):
    conv = layer_of(groups=groups)
    x = input_of(conv)
    master, index = master_of(conv, piece)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = run(conv, x, master, index, piece.axis)
    entries = sum(t.numel() for t in kept.values() if t.is_floating_point() and t.data_ptr() != conv.weight.data_ptr())
    assert entries == channels * x.numel() // conv.in_channels
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not held, "a tensor is stashed outside of the saved tensors"


def test_no_gradient_of_the_size_of_the_weight_is_made():
    """Rows and columns of a layer with many channels: no product of all outputs with all inputs, of any layout."""

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                self.entries = max(self.entries, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return made

    for groups, piece in itertools.product((1, 4, 128), (Slice("row", 2, 1), Slice("column", 0, 1))):
        conv = layer_of(channels=(128, 256), groups=groups)
        if conv.weight.shape[1] == 1 and piece.axis == "column":
            continue  # the slice is the weight
        x = torch.randn(1, 128, 3, 3)
        master, index = master_of(conv, piece)
        y = run(conv, x, master, index, piece.axis)
        with Largest() as largest:
            y.sum().backward()
        assert largest.entries < conv.weight.numel()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("piece", [Slice("row", 2, 3), Slice("column", 0, 2)], ids=str)
def test_shapes_and_dtypes_on_the_meta_device(piece, groups, channels_last):
    conv = layer_of(dtype=torch.bfloat16, groups=groups)
    x = input_of(conv, channels_last=channels_last)
    master, index = master_of(conv, piece)
    conv, x, index = conv.to("meta"), x.detach().to("meta").requires_grad_(), index.to("meta")
    master = master.detach().to("meta").requires_grad_()
    run(conv, x, master, index, piece.axis).sum().backward()
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert (master.grad.shape, master.grad.dtype) == (master.shape, torch.float32)


# dynamo makes an instance of every autograd function that it traces, and torch warns of that
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("piece", "settings"),
    [
        (Slice("row", 2, 3), {"stride": 2}),
        (Slice("column", 1, 2), {"padding": "same", "padding_mode": "reflect"}),
        (Slice("row", 2, 3), {"groups": 6}),
        (Slice("column", 0, 1), {"groups": 6}),
    ],
    ids=str,
)
def test_a_compiled_graph_survives_a_move(piece, settings):
    conv = layer_of(**settings)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, m, i: run(conv, x, m, i, piece.axis), fullgraph=True, backend=counter)
    x = input_of(conv)
    for moved in (0, 1, 0):
        start = min(piece.start + moved, conv.weight.shape[0 if piece.axis == "row" else 1] - piece.width)
        there = Slice(piece.axis, start, piece.width)
        master, index = master_of(conv, there)
        x.grad = None
        y = compiled(x, master, index)
        g = torch.randn_like(y)
        y.backward(g)
        expected, dx, d_slice, _ = oracle(conv, x, g, there)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, dx)
        torch.testing.assert_close(master.grad, d_slice, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_a_frozen_master_keeps_nothing_of_the_input():
    conv = layer_of()
    x = input_of(conv)
    master, index = master_of(conv, PIECES[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run(conv, x, master.detach(), index, "row")
    assert all(tensor.data_ptr() != x.data_ptr() for tensor in kept)
    y.sum().backward()
    assert x.grad is not None


def test_the_check_runs_when_backward_begins():
    conv = layer_of()
    master, index = master_of(conv, PIECES[0])

    def refuse():
        raise SliceFineError("changed")

    y = run(conv, input_of(conv), master, index, "row", None, refuse)
    with pytest.raises(SliceFineError, match="changed"):
        y.sum().backward()


def test_a_write_to_the_weight_makes_the_graph_stale():
    conv = layer_of()
    master, index = master_of(conv, PIECES[0])
    y = run(conv, input_of(conv), master, index, "row")
    conv.weight[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    conv = layer_of()
    x = input_of(conv)
    master, index = master_of(conv, PIECES[0])
    y = run(conv, x, master, index, "row")
    with pytest.raises(SliceFineError, match=r"first derivative only.*create_graph"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
