"""A sum over many rows, a piece of them in memory at a time."""

import torch


def sum_in_pieces(function, x, targets, rows, parameters):
    """Sum of function(piece of x, piece of targets), a scalar each, over pieces of `rows` rows, of which one is in memory at a time.

    x: (N, C), targets: (N,). parameters: all that the function computes with and that want a gradient; others get none. The gradients of
    a piece are computed right after it, in the forward pass (as in Liger Kernel, Hsu et al. 2024, section 3.2): to keep what they are
    computed from is what costs the memory, to compute it again (torch.utils.checkpoint) costs the function a third more time.
    """
    pieces = zip(x.split(rows), targets.split(rows))
    if not torch.is_grad_enabled():
        return sum(function(*piece) for piece in pieces)
    return SumInPieces.apply(function, targets, rows, x, *parameters)


class SumInPieces(torch.autograd.Function):
    """sum_in_pieces, with its gradients."""

    @staticmethod
    def forward(ctx, function, targets, rows, x, *parameters):
        total, gradients = 0, [None] * len(parameters)
        x_gradient = torch.empty_like(x)
        for x_piece, x_gradient_piece, target in zip(x.split(rows), x_gradient.split(rows), targets.split(rows)):
            x_piece = x_piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = function(x_piece, target)
                first, *rest = torch.autograd.grad(loss, (x_piece, *parameters), allow_unused=True)
            total += loss.detach()
            x_gradient_piece.copy_(first)
            for i, new in enumerate(rest):
                if gradients[i] is None:
                    gradients[i] = new
                elif new is not None:
                    gradients[i] += new
        ctx.save_for_backward(x_gradient, *gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, *(None if known is None else gradient * known for known in ctx.saved_tensors)
