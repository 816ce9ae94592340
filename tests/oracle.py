"""What training slices must come to, computed slowly: dense gradients, and a parameter that is new after every move."""

import copy

import torch

from slicefine.kernel import vectors


def simulate(base, schedule, make_optimizer, steps, x, *, padded=False, targets=("lin0", "lin1"), seed=2):
    """A copy of `base` trained like `tiny.fit(model, steps, x)`; `make_optimizer(parameters)` is called after every move.

    `padded`: the parameter is as large as the master, with zeros around the slice, for optimizers that look at the whole of it.
    """
    model = copy.deepcopy(base)
    parameters, optimizers, pieces = {}, {}, {}
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for name in targets:
            weight = getattr(model, name).weight
            piece = schedule.slice_at(step, tuple(weight.shape))
            if pieces.get(name) != piece:
                values = vectors(weight.detach(), piece.axis)[piece.start : piece.stop].float()
                size = schedule.widest(tuple(weight.shape)) if padded else values.shape
                pieces[name], parameters[name] = piece, _framed(values, size).requires_grad_()
                optimizers[name] = make_optimizer([parameters[name]])
        model.zero_grad()
        y = model(x)
        (y.float() - torch.randn(y.shape, generator=generator)).square().mean().backward()
        for name in targets:
            weight, piece, parameter = getattr(model, name).weight, pieces[name], parameters[name]
            gradient = vectors(weight.grad, piece.axis)[piece.start : piece.stop].float()
            parameter.grad = _framed(gradient, parameter.shape)
            optimizers[name].step()
            with torch.no_grad():
                width, length = gradient.shape
                vectors(weight, piece.axis)[piece.start : piece.stop] = parameter[:width, :length].to(weight.dtype)
    return model


def _framed(values, size):
    framed = torch.zeros(size)
    framed[: values.shape[0], : values.shape[1]] = values
    return framed
