"""Packed and 8-bit weights against the plain product and naive 8-bit arithmetic; a packed model computes what model.py
says, however a user has edited it; and oneDNN's products against torch's own."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import CHARS, REPO, copy_scripts, environment, run_forked, write_data
from torch.nn import functional as F

from common import cpu
from common.cpu import Int4Linear, Int8Linear, PackedLinear, PlainLinear, pack
from common.device import autocast
from common.errors import UserError
from generation import Sample, Sampling, generate
from model import GPT, MLP, GPTConfig

CPU = torch.device('cpu')


def has_onednn(dtype):
    """Does oneDNN multiply in this type on this processor?"""
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch comes without oneDNN')
fbgemm = pytest.mark.skipif(
    'fbgemm' not in torch.backends.quantized.supported_engines, reason='this torch comes without FBGEMM'
)


int4 = pytest.mark.skipif(
    not hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu'), reason='this torch has no 4-bit products on CPUs'
)


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
            torch.testing.assert_close(packed(x[i : i + 1, :1]), y[i : i + 1, :1], rtol=1e-5, atol=1e-6)


@fbgemm
@pytest.mark.parametrize('bias', [True, False])
def test_int8_product(bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 48, bias=bias), make_inputs(256)
    with torch.no_grad():
        layer = Int8Linear(linear)
        y = layer(x)
        w_scale, x_scale = (
            linear.weight.abs().amax(1) / 127,
            x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / layer.levels,
        )
        w, rows = (linear.weight / w_scale[:, None]).round().double(), x / x_scale
        rest = ((rows - rows.round()) * 2 * layer.levels).round().double() / (2 * layer.levels)
        rows = rows.round().double() + rest
        naive = (rows @ w.t() * x_scale.double() * w_scale.double()).float() + (linear.bias if bias else 0)
        one_step = (x_scale * w_scale * 127).double() / (2 * layer.levels)  # an input rounded the other way, at most
        assert ((y - naive).abs() <= 3 * one_step + 1e-6 + 1e-6 * naive.abs()).all()
        assert (y - linear(x)).norm() / linear(x).norm() < 0.01
        assert all(torch.equal(Int8Linear(linear)(x[i : i + 1]), y[i : i + 1]) for i in range(7)), (
            'a row depends on the others'
        )


@fbgemm
def test_int8_keeps_small_inputs_beside_a_large_one():
    """As in trained models, where a few channels are a hundred times the others."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(256, 48, bias=False), torch.randn(5, 256)
    linear.weight.data[:, 7] = 0  # so that the large input alone gives nothing
    x[:, 7] = 100
    with torch.no_grad():
        assert (Int8Linear(linear)(x) - linear(x)).norm() / linear(x).norm() < 0.02


@int4
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('n_in, n_out', [(32, 16), (256, 48), (40, 65), (5, 3)])
def test_int4_product(n_in, n_out, bias):
    """Against weights rounded group by group in another way, and products in float64."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(n_in, n_out, bias=bias), make_inputs(n_in)
    with torch.no_grad():
        y = Int4Linear(linear)(x)
        assert y.dtype == torch.float32 and y.shape == linear(x).shape
        rounded = linear.weight.double().clone()
        for row in rounded:
            for group in row.split(cpu.GROUP):
                padded = group if len(group) == cpu.GROUP else torch.cat((group, group.new_zeros(1)))
                least, step = padded.min(), (padded.max() - padded.min()) / 15
                group.copy_(((group - least) / step).round() * step + least)
        naive = F.linear(x.double(), rounded, linear.bias.double() if bias else None).float()
        size = x.norm(dim=-1, keepdim=True) * linear.weight.norm(dim=1)
        assert ((y - naive).abs() <= 0.03 * size + 1e-3).all()  # scales and inputs are in bfloat16
        assert (y - linear(x)).norm() / linear(x).norm() < 0.12
        assert torch.equal(Int4Linear(linear)(x[2:3]), y[2:3]), 'a row depends on the others'


@fbgemm
@pytest.mark.parametrize('levels', [63, 127])
def test_int8_without_vnni(levels):
    """The worst case for sums of pairs in 16 bits. With 7-bit inputs it is exact on every processor."""
    program = (
        'import torch; from common import cpu; linear = torch.nn.Linear(64, 16, bias=False); '
        'torch.nn.init.ones_(linear.weight); '
        f'torch.cpu._is_vnni_supported = lambda: {levels == 127}; '
        'print((cpu.Int8Linear(linear)(torch.ones(1, 64)) - 64).abs().max().item())'
    )
    result = subprocess.run(
        [sys.executable, '-c', program],
        env=environment(PYTHONPATH=str(REPO), FBGEMM_ENABLE_INSTRUCTIONS='AVX2'),
        capture_output=True,
        text=True,
        check=True,
    )
    assert (float(result.stdout) < 1e-3) == (levels == 63)


@pytest.mark.parametrize(
    'dtype, quantize, tolerance',
    [
        (torch.float32, '', 1e-4),
        (torch.bfloat16, '', 0.03),
        pytest.param(torch.float32, 'int8', 0.1, marks=fbgemm),
        pytest.param(torch.float32, 'int4', 0.5, marks=int4),
    ],
)
def test_a_packed_model(dtype, quantize, tolerance, monkeypatch, capsys):
    """The same logits up to the precision asked for, and samples that do not depend on the rest of the batch."""
    monkeypatch.setattr(cpu, 'MIN_PACKED_WEIGHTS', 0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=128, dropout=0.1)).eval()
    packed = copy.deepcopy(model)
    pack(packed, CPU, dtype, quantize)
    layout = PackedLinear if has_onednn(dtype) else PlainLinear
    layout = {'int8': Int8Linear, 'int4': Int4Linear}.get(quantize, layout)
    assert type(packed.lm_head) is layout and not capsys.readouterr().err
    idx, prompts = torch.randint(64, (3, 20)), [torch.randint(64, (n,)).tolist() for n in (3, 40, 20)]
    with torch.no_grad():
        expected, loss = model(idx, idx)
        with autocast(CPU, dtype):
            got, got_loss = packed(idx, idx)
    assert (got - expected).norm() / expected.norm() < tolerance and abs(got_loss - loss) < tolerance
    batches = (
        [Sample(prompt, (1, i)) for i, prompt in enumerate(prompts)],
        *([Sample(prompt, (1, i))] for i, prompt in enumerate(prompts)),
    )
    for batch in batches:
        with autocast(CPU, dtype):
            for _ in generate(packed, batch, 40, Sampling(1.0, top_k=20)):
                pass
    if dtype == torch.float32 and not quantize:  # coarser sums may tip a near-tie
        assert [sample.ids for sample in batches[0]] == [alone.ids for (alone,) in batches[1:]]


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(bias=False, dropout=0.1),
        dict(mlp='swiglu', norm='rmsnorm', pos='rope', n_kv_head=2, tie_weights=False),
        dict(mlp='relu2', pos='alibi', qk_norm=True, logit_softcap=5.0),
        dict(mlp='gelu_tanh', pos='none', n_kv_head=1),
    ],
)
@pytest.mark.parametrize('smallest', [0, 64 * 64 + 1, math.inf])
def test_a_packed_model_is_the_same_model(options, smallest, monkeypatch, capsys):
    """Every kind of layer, with all, some or none of the products by oneDNN, computes and generates the same."""
    monkeypatch.setattr(cpu, 'MIN_PACKED_WEIGHTS', smallest)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=64, **options)).eval()
    for parameter in model.parameters():  # biases and gains too
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.1)
    packed, idx = copy.deepcopy(model), torch.randint(64, (3, 16))
    pack(packed, CPU, torch.float32)
    kinds = [type(layer) for layer in packed.modules() if isinstance(layer, (PackedLinear, PlainLinear))]
    assert len(kinds) == 9 and not any(isinstance(layer, torch.nn.Linear) for layer in packed.modules())
    if torch.backends.mkldnn.is_available():
        assert kinds.count(PackedLinear) in {0: (9,), math.inf: (0,)}.get(smallest, range(4, 9))
    with torch.no_grad():
        torch.testing.assert_close(packed(idx, idx)[0], model(idx, idx)[0], rtol=1e-4, atol=1e-4)
    generated = []
    for each in (model, packed):
        samples = [Sample(row[:n], (1, n)) for row, n in zip(idx.tolist(), (3, 16, 9))]
        for _ in generate(each, samples, 20, Sampling(1.0)):
            pass
        generated.append([sample.ids for sample in samples])
    assert generated[0] == generated[1]
    assert not capsys.readouterr().err


@pytest.mark.parametrize('options', [dict(block_size=1), dict(vocab_size=1), dict(zero_init=True)], ids=str)
@pytest.mark.parametrize('quantize', ['', pytest.param('int8', marks=fbgemm), pytest.param('int4', marks=int4)])
def test_the_smallest_models_are_packed(options, quantize, capsys):
    model = GPT(GPTConfig(**{**dict(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=2), **options}))
    pack(model, CPU, torch.float32, quantize)
    assert not isinstance(model.lm_head, torch.nn.Linear) and not capsys.readouterr().err


@pytest.mark.parametrize('quantize', ['', pytest.param('int8', marks=fbgemm), pytest.param('int4', marks=int4)])
@pytest.mark.parametrize('value', [math.nan, math.inf, 1e38])
def test_broken_weights_are_no_edit(value, quantize, capsys):
    """Such a model is packed; its NaN logits are generation's error."""
    model = tiny()
    torch.nn.init.constant_(model.transformer.ln_f.weight, value)
    pack(model, CPU, torch.float32, quantize)
    assert not isinstance(model.lm_head, torch.nn.Linear) and not capsys.readouterr().err


# --- models that somebody changed -------------------------------------------------------------------------------------

IDX = torch.arange(24).view(2, 12)


def tiny():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.1)
    return model


class Adapted(torch.nn.Linear):
    """A linear layer with a low-rank term."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.down, self.up = (
            torch.nn.Parameter(torch.randn(shape) / 4) for shape in ((4, self.in_features), (self.out_features, 4))
        )

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def double(module, args, output):
    return 2 * output


def doubled(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    'subclass': lambda mlp: setattr(mlp, 'c_fc', Adapted(mlp.c_fc)),
    'hook': lambda mlp: mlp.c_fc.register_forward_hook(double),
    'hook before': lambda mlp: mlp.c_fc.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    'parametrization': lambda mlp: torch.nn.utils.parametrize.register_parametrization(mlp.c_fc, 'weight', Double()),
    'own forward': lambda mlp: doubled(mlp.c_fc),
    'sequence': lambda mlp: setattr(mlp, 'c_fc', torch.nn.Sequential(mlp.c_fc, torch.nn.Linear(128, 128))),
}


@pytest.mark.parametrize('quantize', ['', pytest.param('int8', marks=fbgemm), pytest.param('int4', marks=int4)])
@pytest.mark.parametrize('change', CHANGES)
def test_changed_layers_stay(change, quantize, capsys):
    """Layers that are not plain stay in place and run; all others are packed."""
    model = tiny()
    with torch.no_grad():
        before = model(IDX, IDX)[0]
        CHANGES[change](model.transformer.h[0].mlp)
        expected, layer = model(IDX, IDX)[0], model.transformer.h[0].mlp.c_fc
        assert (expected - before).norm() > 0.1 * before.norm()
        pack(model, CPU, torch.float32, quantize)
        tolerance = {'': 1e-5, 'int8': 0.05, 'int4': 0.3}[quantize]
        assert (model(IDX, IDX)[0] - expected).norm() < tolerance * expected.norm()
    assert model.transformer.h[0].mlp.c_fc is layer and not isinstance(model.transformer.h[1].mlp.c_fc, torch.nn.Linear)
    assert not capsys.readouterr().err


def test_a_shared_layer_is_packed_once():
    model = tiny()
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    model.transformer.h[1].attn.c_attn = model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        expected = model(IDX, IDX)[0]
        pack(model, CPU, torch.float32)
        torch.testing.assert_close(model(IDX, IDX)[0], expected, rtol=1e-4, atol=1e-4)
    assert model.transformer.h[1].attn.c_attn is model.transformer.h[0].attn.c_attn
    assert not isinstance(model.transformer.h[1].attn.c_attn, torch.nn.Linear)


def test_a_layer_that_is_called_with_a_keyword(capsys):
    model = tiny()
    mlp = model.transformer.h[0].mlp
    mlp.forward = lambda x: mlp.c_proj(input=F.gelu(mlp.c_fc(input=x)))
    with torch.no_grad():
        expected = model(IDX, IDX)[0]
        pack(model, CPU, torch.float32)
        torch.testing.assert_close(model(IDX, IDX)[0], expected, rtol=1e-4, atol=1e-4)
    assert not isinstance(mlp.c_fc, torch.nn.Linear) and not capsys.readouterr().err


def reads_weight(self, x):
    return self.c_proj(F.gelu(F.linear(x, self.c_fc.weight, self.c_fc.bias)))


def reads_features(self, x):
    return self.c_proj(F.gelu(self.c_fc(x))) * (self.c_fc.out_features / 128)


def asks_for_the_type(self, x):
    return self.c_proj(F.gelu(self.c_fc(x))) * (1 if isinstance(self.c_fc, torch.nn.Linear) else 0.99)


def norm_if_any(self, x):
    return self.c_proj(F.gelu(self.c_fc(x))) * (1 + getattr(self.c_fc, 'weight', x.new_zeros(1)).norm() / 500)


@pytest.mark.parametrize(
    'dtype, quantize',
    [
        (torch.float32, ''),
        (torch.bfloat16, ''),
        pytest.param(torch.float32, 'int8', marks=fbgemm),
        pytest.param(torch.float32, 'int4', marks=int4),
    ],
)
@pytest.mark.parametrize('forward', [reads_weight, reads_features, asks_for_the_type, norm_if_any])
def test_code_behind_a_layers_back(forward, dtype, quantize, monkeypatch, capsys):
    """Even a difference of a hundredth, which 8 bits would hide, is found: the model stays, and a line says so."""
    model = tiny()
    monkeypatch.setattr(MLP, 'forward', forward)
    before, weights = dict(model.named_modules()), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(IDX, IDX)[0]
        pack(model, CPU, dtype, quantize)
        assert torch.equal(model(IDX, IDX)[0], expected)
    assert dict(model.named_modules()) == before
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    warning = capsys.readouterr().err
    assert warning.startswith('warning: the weights stay as they are') and warning.count('\n') == 1


def test_a_loss_that_reads_a_weight(monkeypatch, capsys):
    """evaluate.py meets it too, but pack comes first."""
    plain = GPT.summed_loss
    monkeypatch.setattr(GPT, 'summed_loss', lambda self, *args: plain(self, *args) + self.lm_head.weight.square().sum())
    model = tiny()
    pack(model, CPU, torch.float32)
    assert type(model.lm_head) is torch.nn.Linear and "no attribute 'weight'" in capsys.readouterr().err


def test_a_library_that_multiplies_wrongly(monkeypatch, capsys):
    """Each packed layer is compared with the one that it replaces."""
    monkeypatch.setattr(cpu.PlainLinear, 'forward', lambda self, x: 1.01 * F.linear(x, self.matrix, self.vector))
    model = tiny()
    pack(model, CPU, torch.float32)
    assert type(model.lm_head) is torch.nn.Linear and 'PlainLinear is off by' in capsys.readouterr().err


def test_the_check_leaves_random_numbers_alone():
    model, state = tiny(), torch.random.get_rng_state()
    pack(model, CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the scripts, on an edited copy of the repository ---------------------------------------------------------------

EDITS = {
    'halved': [('x + self.mlp(self.ln_2(x))', 'x + 0.5 * self.mlp(self.ln_2(x))')],
    'adapter': [
        (
            'class MLP(nn.Module)',
            'class Adapted(nn.Linear):\n    def forward(self, x):\n        return super().forward(x) + '
            'super().forward(x.flip(-1)) / 4\n\n\nclass MLP(nn.Module)',
        ),
        ('self.c_fc = nn.Linear', 'self.c_fc = Adapted'),
    ],
    'norm': [('self.mlp(self.ln_2(x))', 'self.mlp(torch.tanh(self.ln_2(x)))')],
    'scaled head': [('logits, cap = self.lm_head(x)', 'logits, cap = 3 * self.lm_head(x)')],
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with the data set data/tiny and a checkpoint in out/."""
    folder = tmp_path_factory.mktemp('trained')
    write_data(folder / 'data' / 'tiny')
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=len(CHARS), bias=True, dropout=0.0)
    model = GPT(GPTConfig(**args))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0, 0.1)
    (folder / 'out').mkdir()
    torch.save(
        {
            'model': model.state_dict(),
            'model_args': args,
            'iter_num': 1,
            'config': {'dataset': 'tiny'},
            'tokenizer': {'kind': 'char', 'chars': CHARS},
        },
        folder / 'out' / 'ckpt.pt',
    )
    return folder


def edited_copy(folder, edits=(), packed=True):
    """A copy of the scripts with an edited model.py; packed=False: and with a pack() that leaves the model as it is."""
    copy_scripts(folder, [('model.py', old, new) for old, new in edits])
    if not packed:
        with open(folder / 'common' / 'cpu.py', 'a', encoding='utf-8') as file:
            file.write('\n\ndef pack(model, *args):\n    model.eval()\n')
    return folder


def outputs(folder, workspace):
    """Run the copies of sample.py and evaluate.py in a workspace -> (a sample, the line of the loss, warnings)."""
    results = [
        run_forked(folder / script, '--device=cpu', *arguments, cwd=workspace)
        for script, *arguments in (
            ('sample.py', '--start=abc', '--temperature=0', '--json=True', '--num_samples=1', '--max_new_tokens=20'),
            ('evaluate.py', '--eval_iters=2'),
        )
    ]
    assert all(result.returncode == 0 for result in results), results
    return json.loads(results[0].stdout), results[1].stdout, [result.stderr for result in results]


@pytest.fixture(scope='module')
def unedited(trained, tmp_path_factory):
    return outputs(edited_copy(tmp_path_factory.mktemp('copies') / 'unedited'), trained)


@pytest.mark.parametrize('edit', EDITS)
def test_the_code_that_is_edited_is_the_code_that_runs(edit, trained, unedited, tmp_path):
    """sample.py and evaluate.py, packed, print what the edited model.py gives when nothing is packed."""
    (sample, loss, warnings), (expected, expected_loss, _) = (
        outputs(edited_copy(tmp_path / str(packed), EDITS[edit], packed), trained) for packed in (True, False)
    )
    assert sample.pop('log_probs') == pytest.approx(expected.pop('log_probs'), abs=1e-4) and sample == expected
    assert loss == expected_loss != unedited[1] and warnings == ['', '']


def test_a_script_says_in_one_line_that_it_goes_on_unpacked(trained, tmp_path):
    edit = [('x = self.c_fc(x)', 'x = F.linear(x, 0.5 * self.c_fc.weight)')]
    (sample, loss, warnings), (expected, expected_loss, _) = (
        outputs(edited_copy(tmp_path / str(packed), edit, packed), trained) for packed in (True, False)
    )
    assert (sample, loss) == (expected, expected_loss)
    assert all(warning.startswith('warning: the weights stay') and warning.count('\n') == 1 for warning in warnings)


def test_what_cannot_be_packed():
    model = GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    for quantize, device, dtype, words in (
        ('int5', 'cpu', torch.float32, 'unknown'),
        ('int4', 'cpu', torch.bfloat16, 'float32'),
        ('int4', 'cuda', torch.float32, 'on CPUs only'),
        ('int8', 'cpu', torch.bfloat16, 'float32'),
        ('int8', 'cuda', torch.float32, 'x86 processors only'),
    ):
        with pytest.raises(UserError, match=words):
            pack(model, torch.device(device), dtype, quantize)
    assert isinstance(model.lm_head, torch.nn.Linear)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def onednn():
    """As train.py computes on a CPU; afterwards as torch does by itself."""
    with cpu.torch_products():
        cpu.use_onednn_products(CPU, 64)
        yield
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize('shape', [(768, 128, 384), (5, 33, 7), (1, 64, 64), (300, 1000, 65)])
def test_products_are_float32(onednn, shape):
    """In every layout as exact as torch's own, not rounded to bfloat16."""
    torch.manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(n, k)
    expected = a.double() @ b.double().T
    at, bt = a.T.contiguous().T, b.T.contiguous()
    for product in (F.linear(a, b), a @ bt, at @ b.T, at @ bt, torch.bmm(a[None], bt[None])[0]):
        torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-5 * k**0.5)


@pytest.mark.parametrize('block_size', [64, 1024])
def test_torch_products_restores(block_size):
    """Fused attention is off only where oneDNN multiplies and the context is short."""
    with cpu.torch_products():
        takes_effect = cpu.use_onednn_products(CPU, block_size)
        assert torch.backends.cuda.flash_sdp_enabled() == (not takes_effect or block_size == 1024)
        with cpu.torch_products():
            assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() == (not takes_effect or block_size == 1024)
    assert torch.backends.cuda.flash_sdp_enabled()
