"""A sum over many rows of which only a chunk is in memory at a time."""

import torch


def chunked_sum(function, x: torch.Tensor, targets: torch.Tensor, rows: int, parameters) -> torch.Tensor:
    """The sum of function(chunk of x, chunk of targets), a scalar each, over chunks of `rows` rows.

    x: (N, C). targets: (N,). parameters: those that the function computes with; others get no gradient.
    The gradients of a chunk are computed right after its forward pass (as in Liger Kernel, Hsu et al. 2024, section
    3.2), because the activations kept for a later backward pass are what needs the memory. To recompute them instead
    (torch.utils.checkpoint) would cost the function a third more time.
    """
    if not torch.is_grad_enabled():
        return sum(function(*chunk) for chunk in zip(x.split(rows), targets.split(rows)))
    return ChunkedSum.apply(function, targets, rows, x, *(p for p in parameters if p.requires_grad))


class ChunkedSum(torch.autograd.Function):
    """chunked_sum with gradients."""

    @staticmethod
    def forward(ctx, function, targets, rows, x, *parameters):
        total, gradients = 0, [None] * len(parameters)
        x_gradient = torch.empty_like(x)
        for x_chunk, x_gradient_chunk, target in zip(x.split(rows), x_gradient.split(rows), targets.split(rows)):
            x_chunk = x_chunk.detach().requires_grad_()
            with torch.enable_grad():
                loss = function(x_chunk, target)
                first, *rest = torch.autograd.grad(loss, (x_chunk, *parameters), allow_unused=True)
            total += loss.detach()
            x_gradient_chunk.copy_(first)
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
