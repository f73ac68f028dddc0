"""Rearranged and 8-bit weights against the plain product, and against the 8-bit arithmetic done naively."""
import copy
import subprocess
import sys

import pytest
import torch
from conftest import REPO, environment

import packing
from configurator import UserError
from generation import Sample, Sampling, generate
from model import GPT, GPTConfig
from packing import Int8Linear, PackedLinear, pack
from runtime import autocast

CPU = torch.device('cpu')
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch comes without oneDNN')
fbgemm = pytest.mark.skipif('fbgemm' not in torch.backends.quantized.supported_engines, reason='this torch comes without FBGEMM')


def make_inputs(n_in, rows=7):
    """Rows of very different sizes, one of them zero."""
    x = torch.randn(rows, 3, n_in) * torch.logspace(-3, 2, rows)[:, None, None]
    x[2] = 0
    return x


@onednn
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_in, n_out', [(32, 96), (768, 65), (5, 7)])
def test_packed_product(n_in, n_out, bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(n_in, n_out, bias=bias), make_inputs(n_in)
    packed = PackedLinear(linear, torch.float32)
    expected = copy.deepcopy(linear).double()(x.double()).float()
    with torch.no_grad():
        y = packed(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for i in range(7):  # however many rows there are, and for a single one
            torch.testing.assert_close(packed(x[i]), y[i], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(packed(x[i:i + 1, :1]), y[i:i + 1, :1], rtol=1e-5, atol=1e-6)


@onednn
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('alone_is_faster', [True, False])
def test_how_a_single_row_is_multiplied_changes_nothing(alone_is_faster, dtype, monkeypatch):
    """Whatever the trials find, a row gives the same bits alone, in pairs and in fives; also where oneDNN sums up long rows in parts."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip('this processor has no bfloat16')
    torch.manual_seed(0)
    layers = [PackedLinear(torch.nn.Linear(n_in, n_out), dtype) for n_in, n_out in ((768, 768), (3072, 768), (64, 5000))]
    ticks = iter((0, 1, 0, 2) * 6 if alone_is_faster else (0, 2, 0, 1) * 6)  # seconds: of one row, then of several
    monkeypatch.setattr(packing.time, 'perf_counter', lambda: next(ticks))
    packing.choose_copies(layers)
    assert all(layer.copies in ((1, 2) if alone_is_faster else (packing.COPIES,)) for layer in layers)
    with torch.no_grad():
        for layer in layers:
            for row in torch.randn(64, 1, 1, layer.packed.size(1)):
                assert all(torch.equal(layer(row), layer(row.expand(rows, -1, -1))[:1]) for rows in (2, 5))


@onednn
@pytest.mark.parametrize('at_home', [True, False])
def test_the_layout_for_a_single_text(at_home, monkeypatch):
    """By MKL, over transposed matrices, where it is at home, but for bfloat16, and the same model either way; the embedding that the
    head is tied to stays as it is."""
    monkeypatch.setattr(packing, 'SMALLEST', 0)
    monkeypatch.setattr(packing, 'mkl_is_at_home', lambda: at_home)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32)).eval()
    packed, idx = copy.deepcopy(model), torch.randint(64, (1, 40))
    pack(packed, CPU, torch.float32, alone=True)
    assert packed.lm_head.weight.t().is_contiguous() if at_home else isinstance(packed.lm_head, PackedLinear)
    assert torch.equal(packed.transformer.wte.weight, model.transformer.wte.weight)
    with torch.no_grad():
        torch.testing.assert_close(packed(idx[:, :16])[0], model(idx[:, :16])[0], rtol=1e-4, atol=1e-5)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        coarse = copy.deepcopy(model)
        pack(coarse, CPU, torch.bfloat16, alone=True)
        assert isinstance(coarse.lm_head, PackedLinear)
    drawn = []
    for each in (model, packed):
        sample = Sample(idx[0].tolist(), (1,))
        for _ in generate(each, [sample], 40, Sampling(1.0)):
            pass
        drawn.append(sample.ids)
    assert drawn[0] == drawn[1]


def test_where_mkl_is_at_home():
    name = torch.cpu.get_capabilities().get('cpu_name', '') if hasattr(torch.cpu, 'get_capabilities') else ''
    if not ('Intel' in name or 'AMD' in name):
        pytest.skip('torch does not name the maker of this processor')
    assert packing.mkl_is_at_home() == (torch.backends.mkl.is_available() and 'Intel' in name)


@fbgemm
@pytest.mark.parametrize('bias', [True, False])
def test_int8_product(bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 48, bias=bias), make_inputs(256)
    with torch.no_grad():
        layer = Int8Linear(linear)
        y = layer(x)
        w_scale, x_scale = linear.weight.abs().amax(1) / 127, x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / layer.levels
        w, rows = (linear.weight / w_scale[:, None]).round().double(), (x / x_scale).round().double()
        naive = (rows @ w.t() * x_scale.double() * w_scale.double()).float() + (linear.bias if bias else 0)
        one_step = (x_scale * w_scale * 127).double()  # what rounding one input the other way makes, at most
        assert ((y - naive).abs() <= 3 * one_step + 1e-6).all() and ((y - naive).abs() > 0.01 * one_step + 1e-6).float().mean() < 0.2
        assert ((y - linear(x)).norm() / linear(x).norm()) < 0.02
        assert all(torch.equal(Int8Linear(linear)(x[i:i + 1]), y[i:i + 1]) for i in range(7)), 'a row depends on the others'


@fbgemm
@pytest.mark.parametrize('levels', [63, 127])
def test_int8_without_vnni(levels):
    """The worst case for sums of pairs in 16 bits: all at the largest. With 7-bit inputs it is exact on every processor."""
    program = ('import torch, packing; linear = torch.nn.Linear(64, 16, bias=False); torch.nn.init.ones_(linear.weight); '
               f'torch.cpu._is_vnni_supported = lambda: {levels == 127}; '
               'print((packing.Int8Linear(linear)(torch.ones(1, 64)) - 64).abs().max().item())')
    result = subprocess.run([sys.executable, '-c', program], env=environment(PYTHONPATH=str(REPO), FBGEMM_ENABLE_INSTRUCTIONS='AVX2'),
                            capture_output=True, text=True, check=True)
    assert (float(result.stdout) < 1e-3) == (levels == 63)


@pytest.mark.parametrize('dtype, quantize, tolerance', [
    pytest.param(torch.float32, '', 1e-4, marks=onednn), pytest.param(torch.bfloat16, '', 0.03, marks=onednn),
    pytest.param(torch.float32, 'int8', 0.1, marks=fbgemm)])
def test_a_packed_model(dtype, quantize, tolerance, monkeypatch):
    """The same logits up to the precision asked for, and texts that do not depend on what else is in the batch."""
    monkeypatch.setattr(packing, 'SMALLEST', 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=128, dropout=0.1)).eval()
    packed = copy.deepcopy(model)
    pack(packed, CPU, dtype, quantize)
    assert isinstance(packed.lm_head, Int8Linear if quantize else PackedLinear) and not list(packed.transformer.h.parameters())
    idx, prompts = torch.randint(64, (3, 20)), [torch.randint(64, (n,)).tolist() for n in (3, 40, 20)]
    with torch.no_grad():
        expected, loss = model(idx, idx)
        with autocast(CPU, dtype):
            got, got_loss = packed(idx, idx)
    assert (got - expected).norm() / expected.norm() < tolerance and abs(got_loss - loss) < tolerance
    batches = [Sample(prompt, (1, i)) for i, prompt in enumerate(prompts)], *([Sample(prompt, (1, i))] for i, prompt in enumerate(prompts))
    for batch in batches:
        with autocast(CPU, dtype):
            for _ in generate(packed, batch, 40, Sampling(1.0, top_k=20)):
                pass
    if dtype == torch.float32 and not quantize:  # coarser sums may tip a near-tie
        assert [sample.ids for sample in batches[0]] == [alone.ids for alone, in batches[1:]]


@pytest.mark.parametrize('options', [
    dict(), dict(bias=False, dropout=0.1), dict(mlp='swiglu', norm='rmsnorm', pos='rope', n_kv_head=2, tie_weights=False),
    dict(mlp='relu2', pos='alibi', qk_norm=True, logit_softcap=5.0), dict(mlp='gelu_tanh', pos='none', n_kv_head=1)])
@pytest.mark.parametrize('smallest, layout', [(0, 'packed'), (2**17, 'transposed'), (2**10, 'mixed'), (0, 'plain')])
def test_a_packed_model_is_the_same_model(options, smallest, layout, monkeypatch):
    """Every kind of layer, packed, transposed, some of each, and neither, reads and continues as before. Some of each is what several
    texts get where MKL is at home: there larger matrices are transposed than elsewhere."""
    monkeypatch.setattr(packing, 'SMALLEST', smallest)
    monkeypatch.setattr(packing, 'mkl_is_at_home', lambda: layout == 'mixed')
    if layout == 'plain':
        monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=64, **options)).eval()
    for parameter in model.parameters():  # biases and gains too
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.1)
    packed, idx = copy.deepcopy(model), torch.randint(64, (3, 16))
    packed_layers = []
    monkeypatch.setattr(packing, 'choose_copies', packed_layers.extend)
    pack(packed, CPU, torch.float32)
    if torch.backends.mkldnn.is_available():
        assert all(layer.packed.numel() >= packing.AT_HOME * smallest for layer in packed_layers)
        assert len(packed_layers) in {'packed': (9,), 'mixed': range(1, 9)}.get(layout, (0,))
    with torch.no_grad():
        torch.testing.assert_close(packed(idx, idx)[0], model(idx, idx)[0], rtol=1e-4, atol=1e-4)
    drawn = []
    for each in (model, packed):
        samples = [Sample(row[:n], (1, n)) for row, n in zip(idx.tolist(), (3, 16, 9))]
        for _ in generate(each, samples, 20, Sampling(1.0)):
            pass
        drawn.append([sample.ids for sample in samples])
    assert drawn[0] == drawn[1]


def test_what_cannot_be_packed():
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    for quantize, device, dtype, words in (('int4', 'cpu', torch.float32, 'unknown'), ('int8', 'cpu', torch.bfloat16, 'float32'),
                                           ('int8', 'cuda', torch.float32, 'x86 processors only')):
        with pytest.raises(UserError, match=words):
            pack(model, torch.device(device), dtype, quantize)
    assert isinstance(model.lm_head, torch.nn.Linear)
