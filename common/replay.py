"""The work of each module of a model, done again and alone, so that it can be timed without a profiler.

    calls = record_calls(model, lambda: model.forward(x, y))
    attention = OwnWork([call for call in calls if isinstance(call.module, CausalSelfAttention)], nullcontext)
    attention()      # once more all that attention computes itself, forward and backward

A module's own work is what it computes itself, without the modules that it calls: those answer with what they returned
when the calls were recorded. So attention is timed by its own code, without its linear layers, and nothing twice.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch


class Call:
    """One call of a module in a forward pass.

    args, keywords: what it was given; tensors are the values of then, cut off from the graph.
    output: the tensor that it returned, cut off likewise; kept only if another recorded module called it.
    inner: the calls that it made itself.
    """

    def __init__(self, module, args, keywords):
        self.module, self.output, self.inner = module, None, []
        self.args = [cut(value) for value in args]
        self.keywords = {name: cut(value) for name, value in keywords.items()}

    def sources(self) -> list[torch.Tensor]:
        """Whose gradients the backward pass of its own work computes: inputs, answers, the module's own parameters."""
        tensors = [*self.args, *self.keywords.values(), *(call.output for call in self.inner)]
        tensors = [value for value in tensors if torch.is_tensor(value)]
        return [value for value in (*tensors, *self.module.parameters(recurse=False)) if value.requires_grad]


def cut(value):
    """A tensor as a leaf of the graph, not copied; anything else as it is."""
    return value.detach().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value


def record_calls(model: torch.nn.Module, forward: Callable[[], object]) -> list[Call]:
    """Run forward(), which calls modules of the model -> their calls, in the order in which they began.

    It keeps the activations in memory. A module that returns its argument, as dropout of 0 does, computes nothing and
    is left out; one that returns anything but a tensor counts as a part of its caller.
    """
    calls, running = [], []

    def begin(module, args, keywords):
        running.append(Call(module, args, keywords))
        calls.append(running[-1])

    def end(module, args, keywords, output):
        call = running.pop()
        caller = running[-1] if running else None
        if not torch.is_tensor(output) or any(output is value for value in args):
            calls.remove(call)
            if caller:
                caller.inner += call.inner
        elif caller:
            call.output = cut(output)
            caller.inner.append(call)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class OwnWork:
    """The own work of some recorded calls; calling it does that work once, forward and backward.

    calls: from record_calls, in that order.
    context: makes the context of the forward pass, such as autocast.
    """

    def __init__(self, calls: list[Call], context: Callable):
        self.calls, self.context = calls, context
        self.sources = [tensor for call in calls for tensor in call.sources()]
        self.gradients = {}  # random ones, by shape and type

    def __call__(self):
        with answers(self.calls) as asked:
            outputs = []
            for call in self.calls:
                with self.context():
                    outputs.append(type(call.module).forward(call.module, *call.args, **call.keywords))
        ends = [tensor for tensor in (*asked, *outputs) if tensor.grad_fn is not None]  # where their own work ends
        if ends and self.sources:  # all backward passes in one, as each start of it would take some microseconds
            gradients = [self.gradient(end) for end in ends]
            torch.autograd.grad(ends, self.sources, gradients, allow_unused=True)

    def gradient(self, like):
        """A random gradient for a tensor, always the same."""
        key = like.shape, like.dtype
        if key not in self.gradients:
            self.gradients[key] = torch.randn_like(like, memory_format=torch.contiguous_format)
        return self.gradients[key]


@contextmanager
def answers(calls):
    """A context in which the modules that these calls called return what they returned then -> a list to which each
    adds the tensors that it is given. Calls have to be made in the order in which they were recorded."""
    asked, outputs = [], {}
    for call in calls:
        for inner in call.inner:
            outputs.setdefault(inner.module, []).append(inner.output)

    def answer(remaining):
        def forward(*args, **keywords):
            asked.extend(value for value in (*args, *keywords.values()) if torch.is_tensor(value))
            return next(remaining)

        return forward

    own = {module: vars(module).get('forward') for module in outputs}  # activation checkpointing gives layers one
    for module, values in outputs.items():
        vars(module)['forward'] = answer(iter(values))
    try:
        yield asked
    finally:
        for module, forward in own.items():
            del vars(module)['forward']
            if forward:
                vars(module)['forward'] = forward
