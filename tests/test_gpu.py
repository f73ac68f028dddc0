"""Tests that need a CUDA device: ./test.sh -m gpu. On a machine without one they are skipped."""

import pytest
import torch
from conftest import TINY, metrics, run_ok

from common.device import autocast
from model import GPT, GPTConfig
from optim import OPTIMIZERS, make_optimizer, step_unless

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device here')]
LONG = ['--max_iters=20', '--lr_decay_iters=20', '--dropout=0']
MODERN = '--pos=rope --norm=rmsnorm --mlp=swiglu --qk_norm=True --qk_gain=True --n_kv_head=1 --optimizer=muon'.split()


@pytest.mark.parametrize('dtype, tolerance', [('float32', 2e-3), ('bfloat16', 3e-2), ('float16', 3e-2)])
@pytest.mark.parametrize('options', [[], MODERN])
def test_losses_are_those_of_the_cpu(workspace, dtype, tolerance, options):
    run_ok('train.py', *TINY, *LONG, *options, '--out_dir=cpu', cwd=workspace)
    run_ok('train.py', *TINY, *LONG, *options, '--out_dir=cuda', '--device=cuda', f'--dtype={dtype}', cwd=workspace)
    cpu, cuda = ([r['loss'] for r in metrics(workspace / name)[0]] for name in ('cpu', 'cuda'))
    assert len(cuda) == 20 and cuda == pytest.approx(cpu, abs=tolerance)


def test_a_run_is_resumed(workspace):
    run_ok('train.py', *TINY, '--device=cuda', '--out_dir=whole', cwd=workspace)
    run_ok('train.py', *TINY, '--device=cuda', '--out_dir=parts', '--max_iters=4', cwd=workspace)
    run_ok('train.py', *TINY, '--device=cuda', '--out_dir=parts', '--init_from=resume', cwd=workspace)
    whole, parts = ([r['loss'] for r in metrics(workspace / name)[0]] for name in ('whole', 'parts'))
    assert whole == pytest.approx(parts, abs=1e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('split', ['--parallel=fsdp', '--parallel=fsdp --cpu_offload=True', '', '--compile=True'])
@pytest.mark.parametrize('kept', ['none', 'selective', 'full'])
def test_sharded_and_checkpointed(workspace, dtype, split, kept):
    """On one GPU, with dropout, saved in a thread, resumed: the losses of a plain run."""
    dropout = '--dropout=0' if 'compile' in split else '--dropout=0.1'  # compiled code makes other masks
    run = [*TINY, '--device=cuda', f'--dtype={dtype}', dropout]
    run_ok('train.py', *run, '--out_dir=plain', cwd=workspace)
    run += [*split.split(), f'--activation_checkpointing={kept}', '--async_save=True', '--init_from=auto']
    for iterations in (4, 8):
        run_ok('train.py', *run, f'--max_iters={iterations}', cwd=workspace)
    plain, other = ([r['loss'] for r in metrics(workspace / name)[0]] for name in ('plain', 'out'))
    assert other == pytest.approx(plain, abs=1e-3 if dtype == 'float32' else 3e-2)


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_a_skipped_step_changes_nothing(kind):
    """A NaN or infinite gradient leaves no trace, though the host does not wait to learn of it."""
    settings = dict(optimizer=kind, learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95)
    settings.update(muon_learning_rate=0.02, muon_momentum=0.95)
    models = [GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(model, settings) for model in models]
    for gradient in (0.1, float('nan'), -0.2, float('inf')):
        for model, optimizer in zip(models, optimizers):
            for i, p in enumerate(model.parameters()):
                p.grad = gradient * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).cuda()
            finite = abs(gradient) in (0.1, 0.2)
            if finite or model is models[0]:
                step_unless(torch.tensor(not finite, device='cuda'), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_cache_changes_no_token(dtype):
    """Each generated token is the most likely one, or almost, by the logits computed without a cache."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=40)).cuda().eval()
    idx = torch.randint(40, (2, 5), device='cuda')
    with autocast(torch.device('cuda'), dtype), torch.no_grad():
        out = model.generate(idx, 20, temperature=0)
        for n in range(5, 25):
            logits = model(out[:, :n])[0][:, -1]
            chosen = logits.gather(1, out[:, n : n + 1]).squeeze(1)
            assert (logits.max(dim=1).values - chosen < (1e-4 if dtype == torch.float32 else 0.05)).all()
