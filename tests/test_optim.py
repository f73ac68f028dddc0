"""Schedule, groups, AdamW and the state it leaves."""
import copy

import pytest
import torch
from conftest import SHARED  # noqa: F401

from model import GPT, GPTConfig
from optim import Muon, learning_rate_at, make_optimizer, orthogonalize, qkv_rows, update_ratio
from runtime import Ranks


def tiny_model(n_layer=2):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=16, block_size=8, vocab_size=11))


def test_schedule():
    rate = [learning_rate_at(step, 1.0, 0.1, 10, 100) for step in range(130)]
    assert rate[0] == pytest.approx(1 / 11) and rate[9] == pytest.approx(10 / 11) and rate[10] == 1.0
    assert rate[55] == pytest.approx(0.55) and rate[100] == rate[129] == 0.1
    assert all(a <= b for a, b in zip(rate[:10], rate[1:11])) and all(a >= b for a, b in zip(rate[10:], rate[11:]))
    assert learning_rate_at(5, 1.0, 0.1, 10, 10) < 1 and learning_rate_at(10, 1.0, 0.1, 10, 10) == 0.1  # no cosine at all
    assert learning_rate_at(3, 1.0, 0.1, 0, 0) == 0.1


def test_cooldown():
    rate = [learning_rate_at(step, 1.0, 0.1, 10, 100, 40) for step in range(130)]
    assert rate[9] == pytest.approx(10 / 11) and set(rate[10:61]) == {1.0} and rate[80] == pytest.approx(0.55)
    assert rate[100] == rate[129] == 0.1 and rate[61] == pytest.approx(1 - 0.9 / 40)


def test_every_parameter_in_one_group():
    model = tiny_model()
    decayed, plain = make_optimizer(model, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert {id(p) for p in decayed['params']} | {id(p) for p in plain['params']} == {id(p) for p in model.parameters()}
    assert len(decayed['params']) + len(plain['params']) == len(list(model.parameters()))
    assert decayed['weight_decay'] == 0.1 and plain['weight_decay'] == 0
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() == 1 for p in plain['params'])


def test_steps_are_adamw():
    """Three steps against Loshchilov and Hutter's algorithm 2, in float64."""
    model = tiny_model()
    optimizer = make_optimizer(model, 1e-2, 0.1, (0.9, 0.95))
    expected = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step in range(1, 4):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids, ids.roll(-1, 1))[1].backward()
        for name, p in model.named_parameters():
            w, m, v = expected[name]
            g = p.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            w = w * (1 - 1e-2 * (0.1 if p.dim() > 1 else 0))
            expected[name] = [w - 1e-2 * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8), m, v]
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name][0], rtol=1e-4, atol=2e-5)


def test_bits_and_state_are_those_of_torch():
    """The same weights to the last bit as torch.optim.AdamW's, and each loads the other's state."""
    ours, theirs = tiny_model(), tiny_model()
    optimizer = make_optimizer(ours, 1e-2, 0.1, (0.9, 0.95))
    groups = [[p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]]
    reference = torch.optim.AdamW([{'params': group, 'weight_decay': decay} for group, decay in zip(groups, (0.1, 0.0))],
                                  lr=1e-2, betas=(0.9, 0.95), fused=True)

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
    optimizer.load_state_dict(reference.state_dict())
    mine = copy.deepcopy(optimizer.state_dict())  # torch keeps what it is given
    reference.load_state_dict({'state': mine['state'], 'param_groups': reference.state_dict()['param_groups']})
    step(ours, optimizer, 9)
    step(theirs, reference, 9)
    assert same()


def test_loaded_state_keeps_this_runs_hyperparameters():
    model = tiny_model()
    old, new = (make_optimizer(model, rate, decay, (0.9, 0.95)) for rate, decay in ((1e-3, 0.1), (5e-4, 0.2)))
    ids = torch.randint(11, (2, 8))
    model(ids, ids)[1].backward()
    old.step()
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]['weight_decay'] == 0.2 and new.param_groups[0]['lr'] == 5e-4
    for p in model.parameters():
        assert torch.equal(new.state[p]['exp_avg'], old.state[p]['exp_avg']) and new.state[p]['step'] == 1
    with pytest.raises(ValueError, match='groups'):
        make_optimizer(tiny_model(3), 1e-3, 0.1, (0.9, 0.95)).load_state_dict(old.state_dict())


def test_skipped_updates_change_nothing():
    """With skip, not even gradients that are no numbers leave a trace; without, the update is the same as if there were no skip."""
    for kind in ('adamw', 'muon'):
        one, two = (make_optimizer(tiny_model(), 1e-2, 0.1, (0.9, 0.95), kind, ranks=Ranks()) for _ in range(2))
        for gradient in (0.1, float('nan'), -0.2, float('inf')):
            for optimizer in (one, two):
                for i, p in enumerate(optimizer.parameters()):
                    p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            one.step(skip=torch.tensor(abs(gradient) not in (0.1, 0.2)))
            if abs(gradient) in (0.1, 0.2):
                two.step()
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
        for a, b in zip(one.state.values(), two.state.values()):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_skipping_on_a_device_that_is_not_waited_for():
    """On a CPU a skipped update ends at once; elsewhere it is computed, and comes to nothing. Here too, group by group."""
    optimizer = make_optimizer(tiny_model(), 1e-2, 0.1, (0.9, 0.95), 'muon')
    reference = make_optimizer(tiny_model(), 1e-2, 0.1, (0.9, 0.95), 'muon')
    for gradient, skip in ((0.1, False), (float('nan'), True), (-0.2, False), (float('inf'), True)):
        for which in (optimizer, reference):
            for i, p in enumerate(which.parameters()):
                p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            for group in optimizer.param_groups:
                optimizer.step_group(group, torch.tensor(skip))
        if not skip:
            reference.step()
    assert all(torch.equal(a, b) for a, b in zip(optimizer.parameters(), reference.parameters()))
    for a, b in zip(optimizer.state.values(), reference.state.values()):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_orthogonalize():
    """The singular vectors of the singular value decomposition, and singular values near 1; the same alone and in a stack."""
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
    """Five updates against torch.optim.Muon, which iterates in bfloat16 too, but rounds elsewhere."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.9)
    optimizer = Muon([{'params': [ours], 'rows': [[shape[0]]], 'weight_decay': 0.1, 'momentum': 0.9}], 0.05, (0.9, 0.95), Ranks(),
                     torch.bfloat16)
    for _ in range(5):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.dist(ours, theirs) < 0.05 * torch.dist(ours, before)
        theirs.data.copy_(ours.data)


def test_muon_treats_queries_keys_and_values_apart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=8, vocab_size=11, n_kv_head=2, mlp='swiglu'))
    optimizer = make_optimizer(model, 1e-2, 0.0, (0.9, 0.95), 'muon', 0.02, ranks=Ranks())
    for group in optimizer.param_groups:
        group['lr'] = 1e-2 * group['lr_scale']
    assert [len(group['params']) for group in optimizer.param_groups] == [2, 18, 8]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(11, (2, 8))
    model(ids, ids.roll(-1, 1))[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith('c_attn.weight'):
            assert qkv_rows(p) == [16, 8, 8]
            for was, now, gradient in zip(before[name].split([16, 8, 8]), p.split([16, 8, 8]), p.grad.split([16, 8, 8])):
                # the first momentum is 0.05 of the gradient, and counts 0.95 beside 0.05 of the gradient: 0.0975 of it
                wide = gradient if len(gradient) <= 16 else gradient.T
                torch.testing.assert_close(now - was, -0.02 * orthogonalize(0.0975 * wide[None])[0], rtol=1e-3, atol=1e-5)


def test_muon_state_loads():
    model, other = tiny_model(), tiny_model()
    one, two = (make_optimizer(m, 1e-2, 0.1, (0.9, 0.95), 'muon', ranks=Ranks()) for m in (model, other))
    for step in range(4):
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        for m, optimizer in ((model, one), (other, two)):
            m(ids, ids.roll(-1, 1))[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # a new optimizer takes over
            two = make_optimizer(other, 1e-2, 0.1, (0.9, 0.95), 'muon', ranks=Ranks())
            two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    with pytest.raises(ValueError, match='groups'):
        make_optimizer(tiny_model(), 1e-2, 0.1, (0.9, 0.95)).load_state_dict(one.state_dict())


def test_update_ratio():
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert update_ratio(before + torch.tensor([[0.0, 0.3], [-0.4, 0.0]]), before) == pytest.approx(0.5 / 5)
    assert update_ratio(before, before) == 0
