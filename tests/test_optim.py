"""Schedule, parameter groups, AdamW, Muon, and optimizer state that is saved and loaded."""

import copy
import subprocess
import sys

import pytest
import torch
from conftest import REPO, environment

from common.distributed import Ranks
from model import GPT, GPTConfig
from optim import (
    ALONE,
    OPTIMIZERS,
    Muon,
    learning_rate_at,
    load_optimizer_state,
    make_optimizer,
    orthogonalize,
    step_unless,
    update_ratio,
)


def tiny_model(n_layer=2):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=16, block_size=8, vocab_size=11))


def optimizer_of(model, learning_rate, weight_decay, betas, kind='adamw', muon_learning_rate=0.02, ranks=ALONE):
    """make_optimizer with these settings."""
    config = {'optimizer': kind, 'learning_rate': learning_rate, 'weight_decay': weight_decay}
    config.update(beta1=betas[0], beta2=betas[1], muon_learning_rate=muon_learning_rate, muon_momentum=0.95)
    return make_optimizer(model, config, ranks)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def test_schedule():
    rate = [learning_rate_at(step, 1.0, 0.1, 10, 100) for step in range(130)]
    assert rate[0] == pytest.approx(1 / 11) and rate[9] == pytest.approx(10 / 11) and rate[10] == 1.0
    assert rate[55] == pytest.approx(0.55) and rate[100] == rate[129] == 0.1
    assert all(a <= b for a, b in zip(rate[:10], rate[1:11])) and all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert learning_rate_at(5, 1.0, 0.1, 10, 10) < 1 and learning_rate_at(10, 1.0, 0.1, 10, 10) == 0.1  # no decay
    assert learning_rate_at(3, 1.0, 0.1, 0, 0) == 0.1


def test_cooldown():
    rate = [learning_rate_at(step, 1.0, 0.1, 10, 100, 40) for step in range(130)]
    assert rate[9] == pytest.approx(10 / 11) and set(rate[10:61]) == {1.0} and rate[80] == pytest.approx(0.55)
    assert rate[100] == rate[129] == 0.1 and rate[61] == pytest.approx(1 - 0.9 / 40)


def test_every_parameter_in_one_group():
    model = tiny_model()
    decayed, plain = optimizer_of(model, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert {id(p) for p in decayed['params']} | {id(p) for p in plain['params']} == {id(p) for p in model.parameters()}
    assert len(decayed['params']) + len(plain['params']) == len(list(model.parameters()))
    assert decayed['weight_decay'] == 0.1 and plain['weight_decay'] == 0
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() == 1 for p in plain['params'])


def test_steps_are_adamw():
    """Three steps against Loshchilov and Hutter's algorithm 2, in float64."""
    model = tiny_model()
    optimizer = optimizer_of(model, 1e-2, 0.1, (0.9, 0.95))
    expected = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step in range(1, 4):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids, ids.roll(-1, 1))[1].backward()
        for name, p in model.named_parameters():
            w, m, v = expected[name]
            g = p.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - 1e-2 * (0.1 if p.dim() > 1 else 0))
            expected[name] = [w - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8), m, v]
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name][0], rtol=1e-4, atol=2e-5)


def test_bits_and_state_are_those_of_torch():
    """The same weights to the last bit as torch.optim.AdamW's, and each loads the other's state."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer = optimizer_of(ours, 1e-2, 0.1, (0.9, 0.95))
    groups = [[p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]]
    groups = [{'params': group, 'weight_decay': decay} for group, decay in zip(groups, (0.1, 0.0))]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)

    def step(model, optimizer, seed):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(ids, ids.roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()

    def same():
        return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))

    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
        assert same()
    load_optimizer_state(optimizer, reference.state_dict())
    mine = copy.deepcopy(optimizer.state_dict())  # torch keeps what it is given
    reference.load_state_dict({'state': mine['state'], 'param_groups': reference.state_dict()['param_groups']})
    step(ours, optimizer, 9)
    step(theirs, reference, 9)
    assert same()


def test_loaded_state_keeps_this_runs_hyperparameters():
    model = tiny_model()
    old, new = (optimizer_of(model, rate, decay, (0.9, 0.95)) for rate, decay in ((1e-3, 0.1), (5e-4, 0.2)))
    ids = torch.randint(11, (2, 8))
    model(ids, ids)[1].backward()
    old.step()
    load_optimizer_state(new, old.state_dict())
    assert new.param_groups[0]['weight_decay'] == 0.2 and new.param_groups[0]['lr'] == 5e-4
    for p in model.parameters():
        assert torch.equal(new.state[p]['exp_avg'], old.state[p]['exp_avg']) and new.state[p]['step'] == 1
    with pytest.raises(ValueError, match='groups'):
        load_optimizer_state(optimizer_of(tiny_model(3), 1e-3, 0.1, (0.9, 0.95)), old.state_dict())


def test_skipped_steps_change_nothing():
    """With skip, not even NaN or infinite gradients change anything; without, the step is an ordinary one."""
    for kind in ('adamw', 'muon'):
        one, two = (optimizer_of(tiny_model(), 1e-2, 0.1, (0.9, 0.95), kind, ranks=Ranks()) for _ in range(2))
        for gradient in (0.1, float('nan'), -0.2, float('inf')):
            for optimizer in (one, two):
                for i, p in enumerate(parameters(optimizer)):
                    p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            step_unless(torch.tensor(abs(gradient) not in (0.1, 0.2)), one)
            if abs(gradient) in (0.1, 0.2):
                two.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(two)))
        for a, b in zip(one.state.values(), two.state.values()):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_skipping_on_a_device_that_is_not_waited_for():
    """On CUDA a skipped step is computed and changes nothing; so it is here, with found_inf set by hand."""
    optimizer = optimizer_of(tiny_model(), 1e-2, 0.1, (0.9, 0.95), 'muon')
    reference = optimizer_of(tiny_model(), 1e-2, 0.1, (0.9, 0.95), 'muon')
    for gradient, skip in ((0.1, False), (float('nan'), True), (-0.2, False), (float('inf'), True)):
        for which in (optimizer, reference):
            for i, p in enumerate(parameters(which)):
                p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.step()
        if not skip:
            reference.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters(optimizer), parameters(reference)))
    for a, b in zip(optimizer.state.values(), reference.state.values()):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_orthogonalize():
    """The singular vectors of torch's decomposition, with singular values near 1; the same alone and in a stack."""
    torch.manual_seed(0)
    stack = torch.randn(5, 24, 40, dtype=torch.float64)
    out = orthogonalize(stack, torch.float64)
    for x, y in zip(stack, out):
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        inner = u.T @ y @ v.T  # y in the basis of x's singular vectors: diagonal
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-6
        assert 0.6 < inner.diagonal().min() and inner.diagonal().max() < 1.3
        torch.testing.assert_close(orthogonalize(x[None], torch.float64)[0], y)
    torch.testing.assert_close(orthogonalize(stack.float()).double(), out, rtol=1e-3, atol=1e-3)
    assert not orthogonalize(torch.zeros(1, 3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch has none before 2.9')
@pytest.mark.parametrize('shape', [(16, 16), (48, 16), (16, 64)])
def test_muon_is_torchs(shape):
    """Five steps against torch.optim.Muon, which iterates in bfloat16 too, but rounds at other places."""
    torch.manual_seed(0)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.9)
    group = {'params': [ours], 'weight_decay': 0.1, 'momentum': 0.9}
    optimizer = Muon([group], 0.05, (0.9, 0.95), dtype=torch.bfloat16)
    for _ in range(5):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.dist(ours, theirs) < 0.05 * torch.dist(ours, before)
        theirs.data.copy_(ours.data)


def test_muon_orthogonalizes_queries_keys_and_values_separately():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=8, vocab_size=11, n_kv_head=2, mlp='swiglu'))
    optimizer = optimizer_of(model, 1e-2, 0.0, (0.9, 0.95), 'muon', 0.02, ranks=Ranks())
    assert [group['initial_lr'] for group in optimizer.param_groups] == [1e-2, 1e-2, 0.02]
    assert [len(group['params']) for group in optimizer.param_groups] == [2, 18, 8]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(11, (2, 8))
    model(ids, ids.roll(-1, 1))[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith('c_attn.weight'):
            for was, now, gradient in zip(*(x.split([16, 8, 8]) for x in (before[name], p, p.grad))):
                # the first momentum is 0.05 gradient; Nesterov: 0.95 * 0.05 gradient + 0.05 gradient
                expected = -0.02 * orthogonalize(0.0975 * gradient[None])[0]
                torch.testing.assert_close(now - was, expected, rtol=1e-3, atol=1e-5)


def test_muon_state_loads():
    model, other = tiny_model(), tiny_model()
    one, two = (optimizer_of(m, 1e-2, 0.1, (0.9, 0.95), 'muon', ranks=Ranks()) for m in (model, other))
    for step in range(4):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        for m, optimizer in ((model, one), (other, two)):
            m(ids, ids.roll(-1, 1))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # a new optimizer takes over
            two = optimizer_of(other, 1e-2, 0.1, (0.9, 0.95), 'muon', ranks=Ranks())
            load_optimizer_state(two, copy.deepcopy(one.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match='groups'):
        load_optimizer_state(optimizer_of(tiny_model(), 1e-2, 0.1, (0.9, 0.95)), one.state_dict())


def test_update_ratio():
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert update_ratio(before + torch.tensor([[0.0, 0.3], [-0.4, 0.0]]), before) == pytest.approx(0.5 / 5)
    assert update_ratio(before, before) == 0


# --- torch's schedulers and checkpoints accept our optimizers, and torch's can take their place -----------------------


def learn(model, optimizer, steps=2, seed=0):
    """Some steps on random ids -> the losses."""
    losses = []
    for step in range(steps):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed + step))
        loss = model(ids, ids.roll(-1, 1))[1]
        loss.backward()
        step_unless(torch.zeros((), dtype=torch.bool), optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_schedulers_of_torch_accept_ours(kind):
    """LambdaLR multiplies 'initial_lr', and so does train.py: the same run to the last bit."""
    one, two = tiny_model(), tiny_model()
    scheduled, by_hand = (optimizer_of(model, 1e-2, 0.1, (0.9, 0.95), kind) for model in (one, two))
    assert isinstance(scheduled, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1 / (1 + step))
    for step in range(3):
        for group in by_hand.param_groups:
            group['lr'] = group['initial_lr'] * (1 / (1 + step))
        assert learn(one, scheduled, 1, step) == learn(two, by_hand, 1, step)
        scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_distributed_checkpoints_accept_ours(kind):
    """State by parameter names, moved to the optimizer of another model: both continue identically."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    one, two = tiny_model(), tiny_model()
    optimizer, other = (optimizer_of(model, 1e-2, 0.1, (0.9, 0.95), kind) for model in (one, two))
    learn(one, optimizer)
    state = copy.deepcopy(get_optimizer_state_dict(one, optimizer))
    names = {name for name, p in one.named_parameters()}
    assert set(state['state']) == names
    assert {name for group in state['param_groups'] for name in group['params']} == names
    two.load_state_dict(one.state_dict())
    set_optimizer_state_dict(two, other, state)
    assert learn(one, optimizer, seed=5) == learn(two, other, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize(
    'make',
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
        lambda p: torch.optim.NAdam(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    ],
)
def test_optimizers_of_torch_drop_in(make):
    """The same functions save and load their state, and they continue as without interruption."""
    one, two = tiny_model(), tiny_model()
    optimizer, other = (make(model.parameters()) for model in (one, two))
    learn(one, optimizer)
    two.load_state_dict(one.state_dict())
    load_optimizer_state(other, copy.deepcopy(optimizer.state_dict()))
    assert learn(one, optimizer, seed=5) == learn(two, other, seed=5)
    before = [p.detach().clone() for p in one.parameters()]
    one(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    step_unless(torch.tensor(True), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters()))


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_frozen_parameters_and_empty_groups(kind):
    """Frozen parameters stay and are in no group; empty groups and parameters without a gradient are accepted."""
    model = tiny_model()
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith('mlp.c_fc.weight')
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = optimizer_of(model, 1e-2, 0.1, (0.9, 0.95), kind)
    assert 0 in [len(group['params']) for group in optimizer.param_groups] and len(parameters(optimizer)) == 2
    learn(model, optimizer)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    optimizer.step()
    again = optimizer_of(model, 1e-2, 0.1, (0.9, 0.95), kind)
    load_optimizer_state(again, copy.deepcopy(optimizer.state_dict()))
    learn(model, again)


@pytest.mark.parametrize('skipped', [(), (1,), (0, 2, 3)])
def test_skipped_steps_are_those_of_torch(skipped):
    """torch.optim.AdamW(fused=True) with found_inf set before step(), and ours: the same bits and step counts."""
    one, two = tiny_model(), tiny_model()
    groups = [
        {'params': [p for p in two.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in two.parameters() if p.dim() < 2], 'weight_decay': 0.0},
    ]
    ours = optimizer_of(one, 1e-2, 0.1, (0.9, 0.95))
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for step in range(5):
        for optimizer in (ours, theirs):
            for i, p in enumerate(parameters(optimizer)):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step in skipped))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters(ours), parameters(theirs)))
    for a, b in zip(ours.state_dict()['state'].values(), theirs.state_dict()['state'].values()):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert ours.state[parameters(ours)[0]]['step'] == 5 - len(skipped)


def test_ours_start_without_the_compiler():
    """Creating, stepping, saving and loading import nothing that takes a second."""
    program = (
        'import sys, torch; from optim import *; from model import GPT, GPTConfig; '
        'model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=5)); '
        'settings = dict(optimizer="muon", learning_rate=1, weight_decay=1, beta1=0.5, beta2=0.5, '
        'muon_learning_rate=1, muon_momentum=0.5); '
        'optimizer = make_optimizer(model, settings); model(*torch.zeros(2, 1, 4, dtype=torch.long))[1].backward(); '
        'optimizer.step(); optimizer.zero_grad(); load_optimizer_state(optimizer, optimizer.state_dict()); '
        'print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])'
    )
    result = subprocess.run(
        [sys.executable, '-c', program], env=environment(PYTHONPATH=str(REPO)), capture_output=True, text=True
    )
    assert result.stdout == '[]\n', result.stdout + result.stderr
