"""The transformer against a naive float64 computation, and its own properties; Hugging Face's: test_pretrained.py."""

import math

import pytest
import torch
from conftest import SHARED  # noqa: F401  (puts the repository on the path)
from nanogpt_reference import ReferenceGPT

import model as model_module
from generation import KVCache
from model import GPT, GPTConfig, attention_mask

SHAPE = dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=97)


def randomized(model):
    """Weights large enough that a mistake shows, biases and gains included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
    return model.eval()


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(97, (2, 32))


OPTIONS = [
    dict(bias=True),
    dict(bias=False),
    dict(mlp='gelu_tanh'),
    dict(mlp='relu2'),
    dict(mlp='swiglu'),
    dict(pos='rope'),
    dict(pos='alibi'),
    dict(pos='none'),
    dict(norm='rmsnorm'),
    dict(qk_norm=True),
    dict(n_kv_head=2),
    dict(n_kv_head=1),
    dict(head_size=24),
    dict(mlp_width=40),
    dict(mlp='swiglu', mlp_width=40, head_size=6, n_kv_head=2),
    dict(bias=False, qkv_bias=True),
    dict(norm_eps=0.1),
    dict(norm='rmsnorm', norm_eps=0.1, qk_norm=True),
    dict(pos='rope', qk_norm=True, qk_gain=True),
    dict(pos='rope', rope_base=500.0),
    dict(pos='rope', rope_scaling='4,1,3,24'),
    dict(tie_weights=False),
    dict(logit_softcap=3.0),
    dict(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, bias=False, zero_init=True),
    dict(pos='alibi', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=2, tie_weights=False, logit_softcap=5.0),
]


@pytest.fixture(params=[True, False], ids=['fused', 'products'])
def fused_attention(request):
    """Attention by torch's fused kernel, or by batched products, as for short contexts on some CPUs."""
    torch.backends.cuda.enable_flash_sdp(request.param)
    yield
    torch.backends.cuda.enable_flash_sdp(True)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_equals_naive_float64(ids, options, fused_attention):
    options = {'bias': True, **options}
    model = randomized(GPT(GPTConfig(**SHAPE, **options)))
    reference = ReferenceGPT(**SHAPE, **options, dropout=0.0)
    reference.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    expected = reference(ids)
    torch.testing.assert_close(model.double()(ids, ids)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(ids)[0], expected[:, -1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.float()(ids)[0].double(), expected[:, -1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('n_head', [1, 2, 6, 8, 12])
def test_alibi_equals_hugging_face_bloom(n_head):
    """The same slopes, for any number of heads; Bloom's biases differ by a constant per head."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 10), n_head, torch.float64).view(n_head, 1, 10)
    config = GPTConfig(pos='alibi', n_head=n_head, n_embd=8 * n_head)
    ours = attention_mask(config, torch.arange(10), 10, torch.float64)
    seen = torch.ones(10, 10, dtype=torch.bool).tril()
    assert (ours[:, ~seen] == -math.inf).all()
    # theirs passes through bfloat16
    torch.testing.assert_close(ours[:, -1:], theirs - theirs[:, :, -1:], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize('softcap', [0.0, 4.0])
def test_loss_without_logits(ids, softcap, monkeypatch):
    """The loss computed in chunks, and its gradients, are those of the whole."""
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 97 * 10)  # 64 rows in chunks of 10
    model = randomized(GPT(GPTConfig(**SHAPE, logit_softcap=softcap))).double()
    targets = ids.roll(-1, 1)
    targets[0, 5:] = -1
    gradients = []
    for with_logits in (True, False):
        logits, loss = model(ids, targets, with_logits=with_logits)
        assert (logits is None) == (not with_logits)
        (3 * loss).backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets, with_logits=False)[1], gradients[0][0], check_dtype=False)


class ScaledHead(torch.nn.Linear):
    """A user's own head: it computes more than its weight says, and has a parameter of its own."""

    def __init__(self, head):
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight, self.scale = head.weight, torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.parametrize('edit', ['subclass', 'hook', 'logits', 'frozen head', 'frozen body'])
def test_loss_without_logits_is_the_loss_of_the_model_as_edited(ids, edit, monkeypatch):
    """The model's own logits() computes every chunk, each once and a few rows at a time, and no gradient is lost."""
    model, rows = randomized(GPT(GPTConfig(**SHAPE))), []
    if edit == 'subclass':
        model.lm_head = ScaledHead(model.lm_head)
    elif edit == 'hook':
        model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
    elif edit == 'logits':
        plain = model.logits
        monkeypatch.setattr(
            model, 'logits', lambda x: plain(x) * (x @ model.transformer.wpe.weight.T).mean(-1, keepdim=True)
        )
    elif edit == 'frozen head':
        model.lm_head.weight.requires_grad_(False)
    else:
        model.transformer.requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // 97))
    results = []
    for at_once in (2**26, 97 * 10):
        monkeypatch.setattr(model_module, 'MAX_LOGITS', at_once)
        loss = model.double()(ids, ids.roll(-1, 1), with_logits=False)[1]
        loss.backward()
        results.append(
            {'loss': loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
        )
        model.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    assert rows == [64, 10, 10, 10, 10, 10, 10, 4]
    assert ('lm_head.scale' in results[1]) == (edit == 'subclass')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_loss_without_logits_in_half_precision(ids, dtype, monkeypatch):
    """Under autocast, with many targets and a scaled loss, as close to float32 as the loss of the whole is."""
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 97 * 300)
    model = GPT(GPTConfig(**SHAPE))
    ids = ids.repeat(50, 1)  # 3,200 targets
    ids = (ids + torch.arange(100)[:, None]) % 97

    def gradient(dtype, with_logits):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = model(ids, ids.roll(-1, 1), with_logits=with_logits)[1]
        (loss * 2**14).backward()
        result = model.lm_head.weight.grad.clone()
        model.zero_grad()
        return result

    exact = gradient(torch.float32, True)
    error, usual = (torch.dist(gradient(dtype, with_logits), exact) / exact.norm() for with_logits in (False, True))
    assert error < 2 * usual + 1e-3 and error < 0.05


def test_no_targets_at_all(ids, monkeypatch):
    monkeypatch.setattr(model_module, 'MAX_LOGITS', 0)
    model = GPT(GPTConfig(**SHAPE))
    loss = model(ids, torch.full_like(ids, -1), with_logits=False)[1]
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters())


def test_a_position_sees_no_later_one(ids):
    model = randomized(GPT(GPTConfig(**SHAPE)))
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    before, after = model(ids, ids)[0], model(changed, ids)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


def test_loss_is_the_mean_over_targets(ids):
    model = randomized(GPT(GPTConfig(**SHAPE)))
    targets = ids.roll(-1, 1)
    targets[0, 5:] = -1
    logits, loss = model(ids, targets)
    log_p = logits.double().log_softmax(-1)
    picked = [-log_p[b, t, targets[b, t]] for b in range(2) for t in range(32) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(sum(picked).item() / len(picked), rel=1e-5)


def test_initial_weights_and_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, block_size=64, vocab_size=512))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            expected = 0.02 / math.sqrt(16) if name.endswith('c_proj.weight') else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert (parameter == (0.0 if name.endswith('bias') else 1.0)).all(), name
    ids = torch.randint(512, (4, 64))
    assert model(ids, ids.roll(-1, 1))[1].item() == pytest.approx(math.log(512), abs=0.2)
    assert model.transformer.wte.weight is model.lm_head.weight
    model = GPT(
        GPTConfig(
            n_layer=2,
            n_head=4,
            n_embd=64,
            block_size=64,
            vocab_size=512,
            zero_init=True,
            tie_weights=False,
            norm='rmsnorm',
        )
    )
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith('c_proj.weight'))
    assert (
        model.transformer.wte.weight is not model.lm_head.weight
        and model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    )


def test_initialisation_knows_every_parameter():
    """A parameter that somebody adds and forgets there is found out."""
    model = GPT(GPTConfig(**SHAPE))
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match='extra'):
        model.init_weights()


def test_parameter_count_and_flops_of_gpt2():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    model.tie_weights()
    assert model.num_params(non_embedding=False) == 124_439_808  # as published
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 12 * 768 * 1024


def test_cropping_keeps_the_function(ids):
    model = randomized(GPT(GPTConfig(**SHAPE)))
    before = model(ids[:, :10])[0]
    model.crop_block_size(10)
    assert torch.equal(model(ids[:, :10])[0], before)
    with pytest.raises(ValueError, match='block_size'):
        model(ids)
    with pytest.raises(ValueError, match='only be cropped'):
        model.crop_block_size(11)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(n_embd=65),
        dict(n_layer=0),
        dict(dropout=1.0),
        dict(vocab_size=-1),
        dict(mlp='relu'),
        dict(n_head=2.0),
        dict(pos='sinus'),
        dict(norm='none'),
        dict(n_kv_head=3),
        dict(n_kv_head=-1),
        dict(pos='rope', n_embd=12),
        dict(pos='rope', head_size=7),
        dict(pos='rope', rope_base=0.5),
        dict(pos='rope', rope_scaling='8,1,4'),
        dict(pos='rope', rope_scaling='8,4,1,8192'),
        dict(pos='rope', rope_scaling='nan,1,4,8192'),
        dict(head_size=-1),
        dict(mlp_width=2.5),
        dict(qk_gain=True),
        dict(norm_eps=-1e-5),
        dict(norm_eps=math.nan),
        dict(logit_softcap=-1.0),
        dict(logit_softcap=math.nan),
    ],
)
def test_a_shape_that_is_none(wrong):
    with pytest.raises(ValueError):
        GPTConfig(**{**SHAPE, **wrong})


PACKED = [
    dict(),
    dict(pos='rope', n_kv_head=2),
    dict(pos='alibi'),
    dict(pos='none', qk_norm=True, logit_softcap=4.0),
    dict(pos='rope', rope_scaling='4,1,3,24', norm='rmsnorm', mlp='swiglu', tie_weights=False),
]


@torch.no_grad()
@pytest.mark.parametrize('options', PACKED, ids=str)
def test_documents_in_a_sequence_do_not_see_each_other(ids, options):
    """Each is computed as if it were alone: at once, and in pieces through the cache."""
    model = randomized(GPT(GPTConfig(**SHAPE, **options))).double()
    begins = [[0, 5, 6, 20], [0, 31]]
    starts, alone = torch.zeros_like(ids), torch.empty(*ids.shape, 97, dtype=torch.double)
    for row, row_starts, row_alone, at in zip(ids, starts, alone, begins):
        for first, end in zip(at, [*at[1:], 32]):
            row_starts[first:end] = first
            row_alone[first:end] = model.logits(model.hidden(row[None, first:end]))[0]
    packed, loss = model(ids, ids, starts)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(alone.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5, check_dtype=False)
    assert not torch.allclose(model(ids, ids)[0], alone, atol=0.1)
    cache, pieces = KVCache(model.config, 2, 32, dtype=torch.double), []
    for first, end in ((0, 7), (7, 8), (8, 25), (25, 32)):
        cache.extend(end - first)
        pieces.append(model.logits(model.hidden(ids[:, first:end], starts[:, first:end], cache)))
    torch.testing.assert_close(torch.cat(pieces, 1), alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('options', [dict(), dict(pos='rope', n_kv_head=2)], ids=str)
def test_flex_attention_computes_the_same(ids, options, monkeypatch):
    """What runs on CUDA, here uncompiled."""
    model = randomized(GPT(GPTConfig(**SHAPE, **options)))
    starts = torch.arange(32).expand(2, 32) // 9 * 9
    expected = model.hidden(ids, starts)
    used = []
    monkeypatch.setattr(model_module, 'flex_pays', lambda starts: used.append(starts) or True)
    torch.testing.assert_close(model.hidden(ids, starts), expected, rtol=1e-4, atol=1e-4)
    assert used
