"""Each module's own work, done again: together it is the work of a step, nothing is left out or done twice."""

import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import model as model_module
from common.replay import OwnWork, record_calls
from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig
from parallel import checkpoint_activations

SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=40)
MODELS = {
    'gpt2': {},
    'llama': dict(bias=False, norm='rmsnorm', mlp='swiglu', pos='rope', n_kv_head=2, tie_weights=False),
    'modern': dict(bias=False, mlp='relu2', pos='rope', qk_norm=True, qk_gain=True, logit_softcap=15.0),
    'dropout': dict(dropout=0.1),
}


class Work(TorchDispatchMode):
    """Counts FLOPs as torch does, and the calls of operators that compute something for which there is a module."""

    def __init__(self):
        super().__init__()
        self.flops, self.calls = 0, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result, name = operator(*args, **(kwargs or {})), operator.overloadpacket.__name__
        if operator.overloadpacket in flop_registry:
            self.flops += flop_registry[operator.overloadpacket](*args, **(kwargs or {}), out_val=result)
        if re.search('mm|norm|embedding|dot_product|gelu|silu|relu|dropout', name):
            self.calls[name] += 1
        return result


def work_of(function):
    """What function() computes -> Work."""
    with Work() as work:
        function()
    return work


def calls_of(model, x, y):
    """The calls of a training step's forward pass."""
    return record_calls(model, lambda: model.forward(x, y, with_logits=False))


@pytest.mark.parametrize('fields', MODELS.values(), ids=MODELS)
@pytest.mark.parametrize('chunked', [False, True])
def test_the_parts_are_the_step(monkeypatch, fields, chunked):
    torch.manual_seed(0)
    if chunked:
        monkeypatch.setattr(model_module, 'MAX_LOGITS', 20 * SHAPE['vocab_size'])  # 20 rows of 32
    model = GPT(GPTConfig(**SHAPE, **fields))
    x, y = torch.randint(40, (2, 2, 16))
    calls = calls_of(model, x, y)
    covered = {parameter for call in calls for parameter in call.module.parameters(recurse=False)}
    assert covered == set(model.parameters())

    def number(kind):
        return sum(isinstance(call.module, kind) for call in calls)

    assert number(torch.nn.Linear) == 2 * 4 + (2 if chunked else 1)
    assert number(CausalSelfAttention) == number(MLP) == number(Block) == 2
    assert number(torch.nn.Identity) == 0 and number(torch.nn.Dropout) == (5 if 'dropout' in fields else 0)

    def step():
        model(x, y, with_logits=False)[1].backward()

    expected = work_of(step)
    model.zero_grad(set_to_none=True)
    alone = {call: work_of(OwnWork([call], nullcontext)) for call in calls}
    together = work_of(OwnWork(calls, nullcontext))
    assert together.calls == sum((work.calls for work in alone.values()), Counter()) == expected.calls
    assert together.flops == sum(work.flops for work in alone.values()) == expected.flops > 0
    for call, work in alone.items():
        if isinstance(call.module, torch.nn.Linear):
            assert work.flops == 6 * call.args[0].numel() * call.module.out_features
        elif not isinstance(call.module, CausalSelfAttention):
            assert work.flops == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any('forward' in vars(module) for module in model.modules())


def test_activation_checkpointing_changes_nothing():
    """Layers then have a forward of their own, which stays."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    x, y = torch.randint(40, (2, 2, 16))
    expected = [type(call.module) for call in calls_of(model, x, y)]
    for mode in ('selective', 'full'):
        checkpoint_activations(model, mode)
        forwards = [block.forward for block in model.transformer.h]
        calls = calls_of(model, x, y)
        assert [type(call.module) for call in calls] == expected
        OwnWork(calls, nullcontext)()
        assert [block.forward for block in model.transformer.h] == forwards


def test_an_activation_alone():
    """Its work starts and ends at what the linear layers around it returned and were given."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    x, y = torch.randint(40, (2, 2, 16))
    mlp = model.transformer.h[0].mlp
    (call,) = [call for call in calls_of(model, x, y) if call.module is mlp]
    first, second = call.inner
    assert [first.module, second.module] == [mlp.c_fc, mlp.c_proj]
    assert torch.equal(mlp.activation(first.output), second.args[0]) and torch.equal(mlp(call.args[0]), second.output)
    assert work_of(OwnWork([call], nullcontext)).calls == {'gelu': 1, 'gelu_backward': 1}


def test_modules_that_return_no_tensor_are_part_of_their_caller():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x), x

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x, scale=1.0):
            first, second = self.pair(x)
            return scale * (first + second)

    model = torch.nn.Sequential(Both(), torch.nn.Identity())
    x = torch.randn(3, 4)
    calls = record_calls(model, lambda: model.forward(x))
    assert [type(call.module).__name__ for call in calls] == ['Both', 'Linear']
    assert calls[0].inner == [calls[1]]
    own, layers = (work_of(OwnWork(part, nullcontext)).flops for part in (calls[:1], calls[1:]))
    assert own == 0 and layers == 2 * 2 * 3 * 16, 'no gradient of the input, which needs none'
