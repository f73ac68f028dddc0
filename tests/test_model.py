"""The transformer against Hugging Face, against a naive float64 computation, and against its own properties."""
import math

import pytest
import torch
from conftest import SHARED  # noqa: F401  (puts the repository on the path)
from nanogpt_reference import ReferenceGPT

from checkpoint import load_pretrained
from model import GPT, GPTConfig

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


@pytest.mark.parametrize('bias', [True, False])
def test_equals_naive_float64(ids, bias):
    model = randomized(GPT(GPTConfig(**SHAPE, bias=bias)))
    reference = ReferenceGPT(**SHAPE, bias=bias, dropout=0.0)
    reference.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    expected = reference(ids)
    torch.testing.assert_close(model.double()(ids, ids)[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.float()(ids)[0].double(), expected[:, -1:], rtol=1e-3, atol=1e-3)


@pytest.fixture(params=['gelu_new', 'gelu'])
def hugging_face_gpt2(request, tmp_path):
    """A random GPT-2 of Hugging Face's in a folder -> (model, folder)."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=32, vocab_size=97, activation_function=request.param,
                        bos_token_id=0, eos_token_id=0)
    model = randomized(GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path)
    return model, str(tmp_path)


def test_equals_hugging_face(hugging_face_gpt2, ids):
    theirs, folder = hugging_face_gpt2
    ours, tokenizer = load_pretrained(folder)
    assert tokenizer is None
    torch.testing.assert_close(ours.eval()(ids, ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4)
    expected = theirs.generate(ids[:, :5], max_new_tokens=27, do_sample=False, eos_token_id=None, pad_token_id=0,
                               attention_mask=torch.ones(2, 5, dtype=torch.long))
    assert ours.generate(ids[:, :5], 27, temperature=0).tolist() == expected.tolist()


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


@pytest.mark.parametrize('wrong', [dict(n_embd=65), dict(n_layer=0), dict(dropout=1.0), dict(vocab_size=-1), dict(mlp='relu'),
                                   dict(n_head=2.0)])
def test_a_shape_that_is_none(wrong):
    with pytest.raises(ValueError):
        GPTConfig(**{**SHAPE, **wrong})
