"""Schedule, groups, AdamW and the state it leaves."""
import copy

import pytest
import torch
from conftest import SHARED  # noqa: F401

from model import GPT, GPTConfig
from optim import learning_rate_at, make_optimizer, update_ratio


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


def test_update_ratio():
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert update_ratio(before + torch.tensor([[0.0, 0.3], [-0.4, 0.0]]), before) == pytest.approx(0.5 / 5)
    assert update_ratio(before, before) == 0
