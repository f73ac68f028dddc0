"""Dropout by masks, and attention with it, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from common.attention import attend
from common.dropout import Dropout, dropout_mask
from model import GPT, GPTConfig


@pytest.mark.parametrize('p', [0.0, 1e-3, 0.2, 0.5, 0.999, 0.999999])
def test_masks(p):
    torch.manual_seed(0)
    mask = dropout_mask((3, 7, 47619), p)  # a million, and no multiple of 4
    n = mask.numel()
    assert mask.unique().tolist() in ([0.0, torch.tensor(1 / (1 - p)).item()], [1.0])
    dropped = (mask == 0).double().mean().item()
    assert abs(dropped - p) < 2e-5 + 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    first, second = mask[:, :, ::2].flatten(), mask[:, :, 1::2].flatten()
    first, second = (x[: n // 2 - 20].double() - x.double().mean() for x in (first, second))
    size = min(len(first), len(second))
    assert abs((first[:size] * second[:size]).mean().item()) <= 5 * p / (1 - p) / size**0.5  # neighbors are independent
    torch.manual_seed(0)
    assert torch.equal(mask, dropout_mask(mask.shape, p))
    assert not p or not torch.equal(mask, dropout_mask(mask.shape, p))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropout_layer(dtype):
    x = torch.ones(50, 70, dtype=dtype, requires_grad=True)
    layer = Dropout(0.25)
    y = layer(x)
    assert y.dtype == dtype and set(y.detach().float().unique().tolist()) == {
        0.0,
        torch.tensor(4 / 3, dtype=dtype).item(),
    }
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert layer.eval()(x) is x or torch.equal(layer(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize('nkv', [4, 2])
@pytest.mark.parametrize('kind', ['causal', 'bool', 'numbers'])
def test_attention_with_dropout(nkv, kind):
    """The same as a naive computation in float64 with the same mask, and its gradients; torch's, with none dropped."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 9, 6, requires_grad=True) for heads in (4, nkv, nkv))
    mask = {'causal': None, 'bool': torch.rand(2, 1, 9, 9) < 0.7, 'numbers': torch.randn(4, 9, 9)}[kind]
    if kind == 'bool':
        mask |= torch.eye(9, dtype=torch.bool)  # each query sees a key
    torch.manual_seed(2)
    y = attend(q, k, v, mask, 0.3)
    torch.manual_seed(2)
    kept = dropout_mask((2, 4, 9, 9), 0.3).double()
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    many_k, many_v = (x.repeat_interleave(4 // nkv, dim=1) for x in (k64, v64))
    logits = q64 @ many_k.mT / 6**0.5
    if kind == 'numbers':
        logits = logits + mask.double()
    else:
        seen = torch.ones(9, 9, dtype=torch.bool).tril() if mask is None else mask
        logits = logits.masked_fill(~seen, -torch.inf)
    expected = (logits.softmax(-1) * kept) @ many_v
    torch.testing.assert_close(y, expected.float())
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, x64 in ((q, q64), (k, k64), (v, v64)):
        torch.testing.assert_close(x.grad, x64.grad.float())
    causal = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, mask, 1e-9), causal)  # rounds to none
    if kind == 'causal':  # one query over a cache sees all keys
        torch.testing.assert_close(attend(q[:, :, -1:], k, v, None, 1e-9), causal[:, :, -1:])
    torch.testing.assert_close(attend(q, k, v, mask), causal)


def test_the_model_drops_where_nanogpt_does():
    """With all but one place of dropout turned off, each of them changes the loss."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8, dropout=0.5)).train()
    x = torch.randint(11, (4, 8))
    layers = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    assert len(layers) == 3 and not any(type(layer) is torch.nn.Dropout for layer in model.modules())
    attention = model.transformer.h[0].attn
    places = [(layer, 'p') for layer in layers] + [(attention, 'dropout')]
    for owner, name in places:
        setattr(owner, name, 0.0)
    exact = model(x, x)[1]
    for owner, name in places:
        setattr(owner, name, 0.5)
        assert model(x, x)[1] != exact
        setattr(owner, name, 0.0)
    assert model(x, x)[1] == exact
