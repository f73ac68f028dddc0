"""oneDNN's products in place of MKL's, and attention over short contexts, against torch's own."""

import pytest
import torch
from conftest import SHARED  # noqa: F401
from torch.nn import functional as F

from common import cpu
from model import attention

CPU = torch.device('cpu')


@pytest.fixture
def onednn():
    """As train.py computes on a CPU; torch's own ways afterwards."""
    with cpu.torch_products():
        cpu.use_onednn_products(CPU)
        yield
    assert cpu.short_context == 0


@pytest.mark.parametrize('shape', [(768, 128, 384), (5, 33, 7), (1, 64, 64), (300, 1000, 65)])
def test_products_are_float32(onednn, shape):
    """Of every layout: as exact as torch's own, not rounded to bfloat16."""
    torch.manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(n, k)
    expected = a.double() @ b.double().T
    at, bt = a.T.contiguous().T, b.T.contiguous()
    for product in (F.linear(a, b), a @ bt, at @ b.T, at @ bt, torch.bmm(a[None], bt[None])[0]):
        torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-5 * k**0.5)


@pytest.mark.parametrize('short', [0, 128])
@pytest.mark.parametrize('heads', [4, 2, 1])
@pytest.mark.parametrize('kind', ['causal', 'bool', 'float'])
def test_attention(monkeypatch, heads, kind, short):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, T, 8, dtype=torch.float64, requires_grad=True) for n, T in ((4, 5), (heads, 9), (heads, 9))
    )
    mask = {
        'causal': torch.ones(5, 9).tril(4).bool(),
        'bool': torch.rand(2, 1, 5, 9) > 0.5,
        'float': torch.randn(4, 5, 9).double(),
    }[kind]
    if kind == 'bool':
        mask[..., 0] = True  # each sees something
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    monkeypatch.setattr(cpu, 'short_context', short)
    y = attention(q, k, v, None if kind == 'causal' else mask)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (q, k, v)), gradients)


def test_short_attention_drops(monkeypatch):
    """A share of the probabilities, the rest scaled up: right on average."""
    monkeypatch.setattr(cpu, 'short_context', 128)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    draws = torch.stack([attention(q, k, v, dropout=0.3) for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), attention(q, k, v), rtol=0.1, atol=0.1)
    assert (draws[:, 0, 0, 0] == 0).all(dim=-1).float().mean().item() == pytest.approx(
        0.3, abs=0.03
    )  # of a position that sees one


def test_torch_products_restores():
    with cpu.torch_products():
        cpu.use_onednn_products(CPU)
        inside = cpu.short_context
        with cpu.torch_products():
            assert cpu.short_context == 0
        assert cpu.short_context == inside
    assert cpu.short_context == 0
