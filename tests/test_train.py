"""Whole runs of train.py, as a user starts them: what is promised about stopping, resuming, ranks and reports."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    CHARS,
    REPO,
    TINY,
    copy_scripts,
    environment,
    metrics,
    run_forked,
    run_forked_ok,
    start,
    train_on_ranks,
    write_data,
)
from nanogpt_reference import ReferenceGPT

from common import device as devices
from common.device import named_peak_flops
from loading import load_checkpoint
from model import GPT, GPTConfig

DROPOUT = '--dropout=0.2'
MODERN = [
    '--pos=rope',
    '--norm=rmsnorm',
    '--mlp=swiglu',
    '--qk_norm=True',
    '--n_kv_head=1',
    '--zero_init=True',
    '--tie_weights=False',
    '--logit_softcap=20',
    '--optimizer=muon',
    '--muon_momentum=0.9',
    '--cooldown_iters=6',
    '--vocab_multiple=32',
]


def weights(folder, name='ckpt.pt'):
    return load_checkpoint(str(folder / name))['model']


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    'options',
    [
        ['--data_order=random'],
        ['--data_order=shuffle'],
        [*MODERN, '--gradient_accumulation_steps=4', '--batch_ramp_from=1', '--batch_ramp_iters=6'],
    ],
)
def test_resuming_is_bit_exact(workspace, options):
    """2N iterations at once, and N + resume + N, with dropout: the same weights, optimizer and records to the bit."""
    common = [*TINY, DROPOUT, *options]
    run_forked_ok('train.py', *common, '--out_dir=whole', cwd=workspace)
    run_forked_ok('train.py', *common, '--out_dir=parts', '--max_iters=4', cwd=workspace)
    output = run_forked_ok('train.py', *common, '--out_dir=parts', '--init_from=resume', cwd=workspace)
    assert 'after 4 iterations, with changed settings: max_iters 4 -> 8' in output
    assert identical(weights(workspace / 'whole'), weights(workspace / 'parts'))
    whole, parts = (
        torch.load(workspace / name / 'ckpt_optimizer_00000008.pt', weights_only=True)['optimizer']['state']
        for name in ('whole', 'parts')
    )
    for index, buffers in whole.items():
        assert all(torch.equal(buffer, parts[index][name]) for name, buffer in buffers.items())
    for a, b in zip(metrics(workspace / 'whole'), metrics(workspace / 'parts')):
        losses = [[(r['iter'], r.get('loss'), r.get('val/loss')) for r in records] for records in (a, b)]
        assert losses[0] == losses[1]
    assert 'nothing to do' in run_forked_ok('train.py', *common, '--out_dir=parts', '--init_from=resume', cwd=workspace)


def test_two_ranks(workspace):
    """1 and 2 ranks: the same losses, dropout included; 2 ranks resumed: the same bits."""
    common = [*TINY, DROPOUT, '--max_iters=20', '--lr_decay_iters=20', '--eval_interval=10']
    run_forked_ok('train.py', *common, '--out_dir=one', cwd=workspace)
    output = train_on_ranks(2, *common, '--out_dir=two', cwd=workspace)
    assert output.count('step 20:') == 1, 'one rank reports'
    for one, two in zip(metrics(workspace / 'one'), metrics(workspace / 'two')):
        for a, b in zip(one, two, strict=True):
            assert a.get('loss', 0) == pytest.approx(b.get('loss', 0), abs=1e-4)
            assert a.get('val/loss', 0) == pytest.approx(b.get('val/loss', 0), abs=1e-4)
    train_on_ranks(2, *common, '--out_dir=parts', '--max_iters=10', cwd=workspace)
    train_on_ranks(2, *common, '--out_dir=parts', '--init_from=resume', cwd=workspace)
    assert identical(weights(workspace / 'two'), weights(workspace / 'parts'))


def test_two_ranks_with_muon(workspace):
    """Each rank computes a share of Muon's directions, of a growing batch: the same losses and weights as one rank."""
    common = [
        *TINY,
        *MODERN,
        '--gradient_accumulation_steps=4',
        '--batch_ramp_from=2',
        '--batch_ramp_iters=6',
        '--n_layer=3',
    ]
    run_forked_ok('train.py', *common, '--out_dir=one', cwd=workspace)
    train_on_ranks(2, *common, '--out_dir=two', cwd=workspace)
    one, two = (metrics(workspace / name)[0] for name in ('one', 'two'))
    assert [r['loss'] for r in one] == pytest.approx([r['loss'] for r in two], abs=1e-4)
    one, two = (weights(workspace / name) for name in ('one', 'two'))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-4)


def test_exactly_max_iters_iterations_then_evaluation_and_save(workspace):
    run_forked_ok('train.py', *TINY, '--max_iters=7', '--log_interval=2', cwd=workspace)
    steps, evaluations = metrics(workspace / 'out')
    assert [r['iter'] for r in steps] == [0, 2, 4, 6] and [r['iter'] for r in evaluations] == [0, 4, 7]
    state = torch.load(workspace / 'out' / 'ckpt_optimizer_00000007.pt', weights_only=True)['optimizer']['state']
    assert all(buffers['step'] == 7 for buffers in state.values())
    checkpoint = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))
    assert checkpoint['iter_num'] == 7
    assert checkpoint['best_val_loss'] == pytest.approx(min(r['val/loss'] for r in evaluations), rel=1e-6)


def test_reports(workspace):
    output = run_forked_ok('train.py', *TINY, '--grad_clip=0.5', cwd=workspace)
    steps, _ = metrics(workspace / 'out')
    for record in steps:
        assert (
            record['mfu'] is None and record['tokens_per_s'] > 0 and record['left_s'] >= 0 and record['grad_norm'] > 0
        )
        assert record['clipped'] == float(record['grad_norm'] > 0.5)
    assert any(record['update_ratio'] > 1e-4 for record in steps)
    line = next(line for line in output.splitlines() if line.startswith('iter 3: '))
    assert f'loss {steps[3]["loss"]:.4f}, time ' in line and 'mfu unknown' in line and line.endswith(' left')
    time_line = next(line for line in output.splitlines() if line.startswith('time: '))
    assert all(name in time_line for name in ('forward', 'backward', 'optimizer', 'data', 'evaluation', 'saving'))


def test_logged_loss_is_the_mean_over_micro_batches(workspace):
    """The first iteration's, from the initial weights, against a separate computation; and of one large batch."""
    run_forked_ok(
        'train.py',
        *TINY,
        '--max_iters=1',
        '--gradient_accumulation_steps=4',
        '--batch_size=2',
        '--out_dir=a',
        cwd=workspace,
    )
    run_forked_ok(
        'train.py',
        *TINY,
        '--max_iters=1',
        '--gradient_accumulation_steps=1',
        '--batch_size=8',
        '--out_dir=b',
        cwd=workspace,
    )
    (a,), (b,) = (metrics(workspace / name)[0] for name in 'ab')
    assert a['loss'] == pytest.approx(b['loss'], abs=1e-5) and a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-4)


def test_evaluation_is_repeatable_and_changes_nothing(workspace):
    run_forked_ok('train.py', *TINY, '--out_dir=often', '--eval_interval=1', '--eval_iters=5', DROPOUT, cwd=workspace)
    run_forked_ok(
        'train.py', *TINY, '--out_dir=seldom', '--eval_interval=100', '--eval_iters=1', DROPOUT, cwd=workspace
    )
    assert identical(weights(workspace / 'often'), weights(workspace / 'seldom'))
    before = {path: path.read_bytes() for path in (workspace / 'often').iterdir()}
    arguments = [*TINY, '--out_dir=often', '--eval_iters=5', '--eval_only=True', '--init_from=resume']
    first, second = (run_forked_ok('train.py', *arguments, cwd=workspace).splitlines()[-1] for _ in range(2))
    assert first == second
    assert f'val loss {metrics(workspace / "often")[1][-1]["val/loss"]:.4f}' in first
    assert before == {path: path.read_bytes() for path in (workspace / 'often').iterdir()}
    line = run_forked_ok('train.py', *TINY, '--out_dir=nowhere', '--eval_only=True', '--eval_train=True', cwd=workspace)
    assert 'step 0: train loss' in line and ', val loss' in line
    assert not (workspace / 'nowhere').exists()


def test_best_and_latest(workspace):
    """A learning rate that ruins the model after a good start: ckpt_best.pt keeps the good one."""
    (workspace / 'ruin.py').write_text(
        'decay_lr = False\nlearning_rate = 0.5\neval_interval = 1\nmax_iters = 6\nalways_save_checkpoint = False\n'
    )
    run_forked_ok('train.py', *TINY, 'ruin.py', cwd=workspace)
    _, evaluations = metrics(workspace / 'out')
    best = min(evaluations, key=lambda r: r['val/loss'])
    assert best['iter'] < 6
    latest = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))
    assert latest['iter_num'] == 6 and latest['best_val_loss'] == pytest.approx(best['val/loss'], rel=1e-6)
    assert load_checkpoint(str(workspace / 'out' / 'ckpt_best.pt'))['iter_num'] == best['iter']


def test_target(workspace):
    """A run ends at the first evaluation that reaches the target. Losses and bits per byte are evaluate.py's."""
    arguments = [
        *TINY,
        '--max_iters=100',
        '--lr_decay_iters=100',
        '--eval_interval=5',
        '--eval_iters=0',
        '--vocab_multiple=64',
    ]
    output = run_forked_ok('train.py', *arguments, '--target_val_loss=3.1', cwd=workspace)
    evaluations = metrics(workspace / 'out')[1]
    assert evaluations[-1]['val/loss'] <= 3.1 < evaluations[-2]['val/loss'] and 'done: ' in output
    assert 0 <= evaluations[0]['seconds'] < evaluations[1]['seconds'] < evaluations[-1]['seconds']
    assert load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['model_args']['vocab_size'] == 64
    output = run_forked_ok('evaluate.py', '--out_dir=out', '--device=cpu', cwd=workspace)
    loss, bits = (float(re.search(words, output).group(1)) for words in (r'loss ([\d.]+)', r'([\d.]+) bits per byte'))
    assert loss == pytest.approx(evaluations[-1]['val/loss'], abs=2e-4)
    assert bits == pytest.approx(evaluations[-1]['val/bits_per_byte'], abs=2e-4)
    assert bits == pytest.approx(loss / math.log(2), abs=2e-4)  # one byte per character
    output = run_forked_ok(
        'sample.py',
        '--out_dir=out',
        '--device=cpu',
        '--num_samples=3',
        '--temperature=50',
        '--json=True',
        cwd=workspace,
    )
    assert all(max(json.loads(line)['token_ids']) < len(CHARS) for line in output.splitlines()), (
        'an id that only fills up was drawn'
    )


def test_early_stopping(workspace):
    arguments = [*TINY, '--learning_rate=0.0', '--min_lr=0.0', '--max_iters=50', '--eval_interval=2', '--patience=3']
    assert 'done: 6 iterations' in run_forked_ok('train.py', *arguments, cwd=workspace)
    assert [r['iter'] for r in metrics(workspace / 'out')[1]] == [0, 2, 4, 6]


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_tell_how_to_go_on(workspace, signum):
    common = [*TINY, DROPOUT, '--max_iters=100000', '--eval_interval=100000', '--decay_lr=False']
    process = start('train.py', *common, cwd=workspace)
    for line in process.stdout:
        if line.startswith('iter 20:'):
            process.send_signal(signum)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and not errors
    command = re.search(r'to continue: (.*)', output).group(1).split()
    assert command[0] == sys.executable and command[1].endswith('train.py') and command[-1] == '--init_from=resume'
    stopped = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['iter_num']
    assert stopped > 20
    run_forked_ok('train.py', *command[2:], f'--max_iters={stopped + 3}', cwd=workspace)
    run_forked_ok('train.py', *common, f'--max_iters={stopped + 3}', '--out_dir=whole', cwd=workspace)
    assert identical(weights(workspace / 'out'), weights(workspace / 'whole'))
    assert [r['iter'] for r in metrics(workspace / 'out')[0]] == list(range(stopped + 3))


@pytest.mark.slow
def test_killed_at_random_moments(workspace):
    """kill -9 of a run that saves after every iteration: at any moment the files load, and the run continues."""
    rng = random.Random(0)
    common = [*TINY, '--max_iters=1000000', '--eval_interval=1', '--eval_iters=1', '--decay_lr=False']
    iter_num, killed = 0, int(os.environ.get('SAMGPT_TEST_KILLS', 3))
    for n in range(killed):
        process = subprocess.Popen(
            [sys.executable, str(REPO / 'train.py'), *common, f'--init_from={"resume" if n else "scratch"}'],
            cwd=workspace,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f'iter {iter_num + 2}:'):
                break
        time.sleep(rng.random() / 2)
        process.kill()
        process.communicate()
        checkpoint = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))
        assert checkpoint['iter_num'] > iter_num, ''.join(lines)
        load_checkpoint(str(workspace / 'out' / 'ckpt_best.pt'))
        iter_num = checkpoint['iter_num']
    run_forked_ok('train.py', *common, '--init_from=resume', f'--max_iters={iter_num + 3}', cwd=workspace)
    run_forked_ok(
        'train.py', *common, '--out_dir=whole', f'--max_iters={iter_num + 3}', '--eval_interval=1000', cwd=workspace
    )
    assert identical(weights(workspace / 'out'), weights(workspace / 'whole'))
    assert [r['iter'] for r in metrics(workspace / 'out')[0]] == list(range(iter_num + 3))


def test_a_run_that_diverges_stops_and_its_checkpoint_is_sound(workspace):
    arguments = [*TINY, '--max_iters=100', '--eval_interval=2', '--decay_lr=False', '--max_skipped_iters=3']
    run_forked_ok('train.py', *arguments, '--max_iters=2', cwd=workspace)
    result = run_forked(
        'train.py',
        *arguments,
        '--init_from=resume',
        '--learning_rate=1e38',
        '--grad_clip=0',
        '--eval_interval=50',
        cwd=workspace,
    )
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    assert 'NaN or infinite in 3 iterations in a row' in result.stderr and '--learning_rate' in result.stderr
    checkpoint = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))
    assert checkpoint['iter_num'] == 2 and all(weight.isfinite().all() for weight in checkpoint['model'].values())


def test_a_new_run_does_not_overwrite_an_earlier_one(workspace):
    run_forked_ok('train.py', *TINY, cwd=workspace)
    before = weights(workspace / 'out')
    output = run_forked_ok('train.py', *TINY, '--seed=1', cwd=workspace)
    assert 'holds an earlier run, moved to out/previous-1' in output
    assert identical(before, weights(workspace / 'out' / 'previous-1')) and not identical(
        before, weights(workspace / 'out')
    )
    assert len(metrics(workspace / 'out')[1]) == len(metrics(workspace / 'out' / 'previous-1')[1]) == 3


@pytest.mark.slow
@pytest.mark.parametrize('compiler', ['works', 'is missing'])
def test_compilation_and_its_absence(quick_compiler, workspace, compiler):
    """Without a C++ compiler there is one line of warning, and the run is the eager one to the last bit."""
    without = {'CXX': '/nowhere/c++', 'PATH': '/nowhere', 'TORCHINDUCTOR_CACHE_DIR': str(workspace / 'cache')}
    arguments = [*TINY, '--n_layer=1', '--max_iters=3']
    result = run_forked(
        'train.py', *arguments, '--compile=True', cwd=workspace, **(without if compiler != 'works' else {})
    )
    assert result.returncode == 0, result.stderr
    run_forked_ok('train.py', *arguments, '--out_dir=eager', cwd=workspace)
    compiled, eager = metrics(workspace / 'out')[0], metrics(workspace / 'eager')[0]
    assert [r['loss'] for r in compiled] == pytest.approx([r['loss'] for r in eager], abs=1e-3)
    if compiler != 'works' or torch.__version__.startswith('2.6.'):  # which is wrong, and therefore not used
        assert result.stderr.startswith('warning: torch') and result.stderr.count('\n') == 1
        assert identical(weights(workspace / 'out'), weights(workspace / 'eager'))
    assert not any('_orig_mod' in key for key in torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)['model'])


@pytest.mark.parametrize(
    'calls, slower, outcome', [(1, False, 'not compiling'), (10**6, False, 'compiled'), (10**6, True, 'undone')]
)
def test_compiling_where_it_pays(calls, slower, outcome, monkeypatch, capsys):
    """--compile=auto compiles if enough calls are to come, and goes back if that made them slower."""
    layer = torch.nn.Linear(2, 2).eval()
    clock = iter(range(10**6))

    def compile_layer(self, **options):
        self._compiled_call_impl = object()

    def trial():  # takes one tick of the clock, and another one if compiling made it slower
        next(clock) if slower and layer._compiled_call_impl else None

    monkeypatch.setattr(torch.nn.Module, 'compile', compile_layer)
    monkeypatch.setattr(devices.time, 'perf_counter', lambda: next(clock))
    monkeypatch.setattr(devices, 'COMPILING', {'cpu': (100, 0.5)})
    compiled = devices.compile_or_stay_eager([layer], trial, torch.device('cpu'), calls)
    assert compiled == (outcome == 'compiled') == bool(layer._compiled_call_impl)
    said = capsys.readouterr().out
    assert ('not compiling the model' in said) == (outcome == 'not compiling')
    assert ('it takes 2.00 of the time' in said) == (outcome == 'undone')
    assert ('it takes 1.00 of the time' in said) == (outcome == 'compiled')


@pytest.mark.slow
def test_compiled_loss_in_pieces(quick_compiler, workspace):
    """A vocabulary whose logits do not fit into memory at once, in bfloat16, compiled, and on two ranks: no warning,
    the loss of one eager rank."""
    common = [*TINY, '--n_layer=1', '--max_iters=3', '--vocab_multiple=64', '--dtype=bfloat16']
    run_forked_ok('train.py', *common, '--out_dir=one', cwd=workspace)
    copy = copy_scripts(workspace / 'copy', [('model.py', 'MAX_LOGITS = 2**26', 'MAX_LOGITS = 64 * 10')])
    output = run_forked(copy / 'train.py', *common, '--out_dir=compiled', '--compile=True', cwd=workspace)
    assert output.returncode == 0 and 'compiling' in output.stdout and output.stderr == ''
    train_on_ranks(2, *common, '--out_dir=two', cwd=workspace, script=copy / 'train.py')
    one, *others = ([r['loss'] for r in metrics(workspace / name)[0]] for name in ('one', 'compiled', 'two'))
    assert all(losses == pytest.approx(one, abs=0.01) for losses in others)


def test_a_nanogpt_user_brings_everything(workspace):
    """A config file, bins without description beside a meta.pkl, and a ckpt.pt with the optimizer inside; the result
    opens as nanoGPT opens it."""
    import pickle

    data = workspace / 'data' / 'theirs'
    write_data(data)
    (data / 'meta.json').unlink()
    itos = dict(enumerate(CHARS))
    (data / 'meta.pkl').write_bytes(
        pickle.dumps({'vocab_size': len(CHARS), 'itos': itos, 'stoi': {c: i for i, c in itos.items()}})
    )
    (workspace / 'theirs.py').write_text(
        "import time\nout_dir = 'theirs'\ndataset = 'theirs'\nwandb_run_name = 'run-' + str(time.time())\n"
        'n_layer = 2\nn_head = 2\nn_embd = 32\nblock_size = 16\nbatch_size = 4\n'
        'gradient_accumulation_steps = 1\neval_iters = 2\neval_interval = 5\nmax_iters = 10\n'
        "learning_rate = 1\nlearning_rate = 1e-3\nbias = True\ndevice = 'cpu'\ncompile = False\n"
    )
    model_args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=True, vocab_size=len(CHARS), dropout=0.0)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**model_args))
    groups = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    optimizer = torch.optim.AdamW(
        [{'params': group, 'weight_decay': decay} for group, decay in zip(groups, (0.1, 0.0))], lr=1e-3
    )
    ids = torch.randint(len(CHARS), (2, 16))
    model(ids, ids)[1].backward()
    optimizer.step()
    (workspace / 'theirs').mkdir()
    torch.save(
        {
            'model': {'_orig_mod.' + name: weight for name, weight in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': model_args,
            'iter_num': 5,
            'best_val_loss': torch.tensor(9.0),
            'config': {'dataset': 'theirs'},
        },
        workspace / 'theirs' / 'ckpt.pt',
    )
    assert 'val loss' in run_forked_ok('train.py', 'theirs.py', '--init_from=resume', '--eval_only=True', cwd=workspace)
    sample = ['--out_dir=theirs', '--num_samples=1', '--max_new_tokens=8', '--start=abc', '--device=cpu']
    text = run_forked_ok('sample.py', *sample, cwd=workspace)
    assert text.startswith('abc') and set(text.split('\n---')[0]) <= set(CHARS)
    assert 'after 5 iterations' in run_forked_ok('train.py', 'theirs.py', '--init_from=resume', cwd=workspace)
    raw = torch.load(workspace / 'theirs' / 'ckpt.pt', weights_only=True)
    theirs = ReferenceGPT(**raw['model_args'])
    theirs.load_state_dict(raw['model'])
    assert theirs(ids).isfinite().all() and raw['iter_num'] == 10
    # without naming the shape again, as nanoGPT allows
    output = run_forked_ok(
        'train.py',
        '--init_from=resume',
        '--out_dir=theirs',
        '--dataset=theirs',
        '--device=cpu',
        '--compile=False',
        '--eval_only=True',
        '--eval_iters=2',
        cwd=workspace,
    )
    assert 'step 10: ' in output


def test_finetuning_a_pretrained_gpt2(workspace):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=len(CHARS), bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(workspace / 'hf')
    arguments = [
        '--init_from=hf',
        '--dataset=tiny',
        '--out_dir=out',
        '--device=cpu',
        '--compile=False',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--block_size=16',
        '--eval_iters=2',
        '--warmup_iters=0',
        '--decay_lr=False',
    ]
    assert 'step 0: val loss' in run_forked_ok('train.py', *arguments, '--eval_only=True', cwd=workspace)
    run_forked_ok('train.py', *arguments, '--max_iters=3', cwd=workspace)
    raw = torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)
    ReferenceGPT(**raw['model_args']).load_state_dict(raw['model'])
    assert raw['model_args']['block_size'] == 16 and raw['mlp'] == 'gelu_tanh'
    run_forked_ok('train.py', *arguments, '--init_from=resume', '--max_iters=5', cwd=workspace)
    result = run_forked('train.py', *arguments, '--block_size=32', cwd=workspace)
    assert result.returncode == 2 and '24 positions' in result.stderr


def test_ruined_weights_are_never_saved(workspace):
    """A signal right after an iteration whose finite gradient ruined the weights: the run ends without a save."""
    run_forked_ok('train.py', *TINY, '--max_iters=2', cwd=workspace)
    result = run_forked(
        'train.py',
        *TINY,
        '--init_from=resume',
        '--max_iters=3',
        '--eval_interval=3',
        '--learning_rate=1e39',
        '--decay_lr=False',
        '--grad_clip=0',
        cwd=workspace,
    )
    assert result.returncode == 2 and 'NaN or infinite' in result.stderr or 'validation loss is' in result.stderr
    assert load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['iter_num'] == 2


def test_a_final_evaluation_that_was_missed_is_made_up(workspace):
    """As when a signal came in its middle: everything is saved, the evaluation is not made."""
    run_forked_ok('train.py', *TINY, '--max_iters=7', cwd=workspace)
    path = workspace / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['evaluated_at'] == 7
    torch.save({**checkpoint, 'evaluated_at': 4}, path)
    before = metrics(workspace / 'out')
    output = run_forked_ok('train.py', *TINY, '--max_iters=7', '--init_from=resume', cwd=workspace)
    after = metrics(workspace / 'out')
    *kept, made_up = [r.pop('seconds') for r in after[1]]
    *earlier, missed = [r.pop('seconds') for r in before[1]]
    assert (
        kept == earlier and made_up >= missed
    )  # the clock goes on from the checkpoint's time, with what resuming took
    assert 'step 7: ' in output and after == before
    assert 'nothing to do' in run_forked_ok('train.py', *TINY, '--max_iters=7', '--init_from=resume', cwd=workspace)
    run_forked_ok('train.py', *TINY, '--max_iters=9', '--init_from=resume', cwd=workspace)
    assert [r['iter'] for r in metrics(workspace / 'out')[1]] == [0, 4, 7, 8, 9]


def test_interrupted_evaluation_prints_no_result(workspace):
    arguments = [*TINY, '--eval_only=True', '--eval_iters=100000', '--batch_size=1', '--block_size=1']
    process = start('train.py', *arguments, cwd=workspace)
    assert 'parameters' in process.stdout.readline()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and 'val loss' not in output


@pytest.mark.parametrize(
    'name, dtype, expected',
    [
        ('NVIDIA H100 80GB HBM3', torch.bfloat16, 989e12),
        ('NVIDIA H100 PCIe', torch.bfloat16, 756e12),
        ('NVIDIA H200', torch.float32, 494e12),
        ('NVIDIA A100-SXM4-80GB', torch.float16, 312e12),
        ('NVIDIA A10G', torch.bfloat16, 70e12),
        ('Tesla T4', torch.float16, 65e12),
        ('Tesla T4', torch.bfloat16, None),
        ('NVIDIA RTX A1000', torch.bfloat16, None),
        ('NVIDIA GeForce RTX 4090', torch.bfloat16, 165e12),
        ('NVIDIA GeForce RTX 4090 Laptop GPU', torch.bfloat16, None),
        ('NVIDIA GeForce RTX 3090 Ti', torch.bfloat16, None),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', torch.bfloat16, None),
        ('NVIDIA T400', torch.float16, None),
        ('Unknown', torch.float32, None),
    ],
)
def test_peak_flops_by_name(name, dtype, expected):
    assert named_peak_flops(name, dtype) == expected


def test_a_signal_during_divergence_saves_nothing_bad(workspace):
    """Weights ruined by the last step are not saved, even if a signal comes just then."""
    arguments = [*TINY, '--max_iters=1000', '--eval_interval=500', '--decay_lr=False', '--max_skipped_iters=300']
    run_forked_ok('train.py', *arguments, '--max_iters=2', cwd=workspace)
    ruin = [*arguments, '--init_from=resume', '--learning_rate=1e38', '--grad_clip=0']
    process = start('train.py', *ruin, cwd=workspace)
    for line in process.stdout:
        if line.startswith('iter 20:'):
            process.terminate()
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and 'NaN or infinite' in errors
    assert load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['iter_num'] == 2


# --- edited code ------------------------------------------------------------------------------------------------------

NEW_FIELD = [
    (
        'model.py',
        '    zero_init: bool = False',
        '    mlp_scale: float = 1.0  # what the MLP adds is multiplied by this\n    zero_init: bool = False',
    ),
    ('model.py', 'self.mlp = MLP(config)', 'self.mlp, self.mlp_scale = MLP(config), config.mlp_scale'),
    ('model.py', 'return x + self.mlp(self.ln_2(x))', 'return x + self.mlp_scale * self.mlp(self.ln_2(x))'),
]


def test_a_new_field_of_the_model_needs_no_other_file(workspace):
    """A field of GPTConfig with a default, and what it does: every script knows it, every checkpoint keeps it."""
    copy = copy_scripts(workspace / 'copy', NEW_FIELD)
    for name, arguments in (('plain', []), ('same', ['--mlp_scale=1']), ('scaled', ['--mlp_scale=-3'])):
        run_forked_ok(copy / 'train.py', *TINY, *arguments, f'--out_dir={name}', cwd=workspace)
    assert identical(weights(workspace / 'plain'), weights(workspace / 'same'))
    assert not identical(weights(workspace / 'plain'), weights(workspace / 'scaled'))
    saved = torch.load(workspace / 'scaled' / 'ckpt.pt', weights_only=True)
    assert saved['model_args']['mlp_scale'] == saved['config']['mlp_scale'] == -3
    assert 'mlp_scale' not in torch.load(workspace / 'plain' / 'ckpt.pt', weights_only=True)['model_args']
    resume = [*TINY, '--out_dir=scaled', '--init_from=resume', '--max_iters=9']
    assert 'mlp_scale' not in run_forked_ok(copy / 'train.py', *resume, cwd=workspace), 'it is no changed setting'
    result = run_forked(copy / 'train.py', *resume, '--mlp_scale=2', '--max_iters=10', cwd=workspace)
    assert result.returncode == 2 and '--mlp_scale=2.0: the run in scaled' in result.stderr
    sample = ['--device=cpu', '--num_samples=1', '--max_new_tokens=30', '--start=abc', '--temperature=0', '--json=True']
    texts = [
        run_forked_ok(copy / 'sample.py', *sample, f'--out_dir={name}', cwd=workspace)
        for name in ('plain', 'same', 'scaled')
    ]
    assert texts[0] == texts[1] != texts[2]
    assert 'over 992 tokens' in run_forked_ok(copy / 'evaluate.py', '--device=cpu', '--out_dir=scaled', cwd=workspace)
    bench = [
        '--device=cpu',
        '--compile=False',
        '--dataset=tiny',
        '--steps=1',
        '--warmup_steps=1',
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=16',
        '--batch_size=2',
    ]
    losses = [
        re.search(
            r'1/1: loss ([\d.]+)', run_forked_ok(copy / 'bench.py', *bench, f'--mlp_scale={scale}', cwd=workspace)
        )[1]
        for scale in (1, -50)
    ]
    assert losses[0] != losses[1]
    assert 'what the MLP adds is multiplied by this' in run_forked_ok(copy / 'train.py', '--help', cwd=workspace)


def test_an_optimizer_of_torchs_is_one_line(workspace):
    """SGD in the table: trained, saved, resumed to the last bit; and it does not take over AdamW's memory."""
    sgd = (
        "OPTIMIZERS = {'sgd': lambda named, config, ranks, dtype: "
        "torch.optim.SGD(named.values(), config['learning_rate'], momentum=0.9), "
    )
    copy = copy_scripts(workspace / 'copy', [('optim.py', 'OPTIMIZERS = {', sgd)])
    common = [*TINY, DROPOUT, '--optimizer=sgd', '--learning_rate=0.1']
    run_forked_ok(copy / 'train.py', *common, '--out_dir=whole', cwd=workspace)
    run_forked_ok(copy / 'train.py', *common, '--out_dir=parts', '--max_iters=4', cwd=workspace)
    run_forked_ok(copy / 'train.py', *common, '--out_dir=parts', '--init_from=resume', cwd=workspace)
    assert identical(weights(workspace / 'whole'), weights(workspace / 'parts'))
    losses = [r['loss'] for r in metrics(workspace / 'whole')[0]]
    assert losses[-1] < losses[0]
    rates = [r['lr'] for r in metrics(workspace / 'whole')[0]]
    assert max(rates) == pytest.approx(0.1) and rates[0] == pytest.approx(0.1 / 3)
    result = run_forked('train.py', *TINY, '--out_dir=whole', '--init_from=resume', '--max_iters=9', cwd=workspace)
    assert result.returncode == 2 and '--optimizer=adamw: the run in whole has the state of sgd' in result.stderr
    result = run_forked(copy / 'train.py', *TINY, '--optimizer=adam', cwd=workspace)
    assert "must be 'sgd' or 'adamw' or 'muon'" in result.stderr


def test_training_biases_alone(workspace):
    """No matrix is left to watch, and one of two groups is empty."""
    freeze = (
        'train.py',
        'raw_model = model  #',
        'for _p in model.parameters():\n    _p.requires_grad = _p.dim() < 2\nraw_model = model  #',
    )
    copy = copy_scripts(workspace / 'copy', [freeze])
    for arguments in (['--bias=True', '--max_iters=2'], ['--init_from=resume', '--optimizer=adamw']):
        run_forked_ok(copy / 'train.py', *TINY, *arguments, cwd=workspace)
    result = run_forked(
        copy / 'train.py', *TINY, '--bias=False', '--norm=rmsnorm', '--optimizer=muon', '--out_dir=m', cwd=workspace
    )
    assert result.returncode == 0, result.stderr
    nothing = ('train.py', 'raw_model = model  #', 'model.requires_grad_(False)\nraw_model = model  #')
    result = run_forked(
        copy_scripts(workspace / 'nothing', [nothing]) / 'train.py', *TINY, '--out_dir=n', cwd=workspace
    )
    assert result.returncode == 2 and 'there is nothing to train' in result.stderr


def test_a_field_that_is_a_tuple_is_resumed(workspace):
    field = ('model.py', '    zero_init: bool = False', '    tags: tuple = ()  # texts\n    zero_init: bool = False')
    copy = copy_scripts(workspace / 'copy', [field])
    for _ in range(2):
        run_forked_ok(copy / 'train.py', *TINY, '--tags=a', '--tags=b', '--init_from=auto', cwd=workspace)
    assert torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)['model_args']['tags'] == ('a', 'b')


def test_frozen_parameters_stay(workspace):
    freeze = (
        'train.py',
        'raw_model = model  #',
        "for _name, _p in model.named_parameters():\n    _p.requires_grad = 'h.1.' in _name\nraw_model = model  #",
    )
    copy = copy_scripts(workspace / 'copy', [freeze])
    for optimizer in ('adamw', 'muon'):
        run_forked_ok(
            copy / 'train.py',
            *TINY,
            f'--optimizer={optimizer}',
            '--max_iters=0',
            f'--out_dir={optimizer}',
            cwd=workspace,
        )
        before = weights(workspace / optimizer)
        for arguments in (['--max_iters=4'], ['--max_iters=8']):
            run_forked_ok(
                copy / 'train.py',
                *TINY,
                f'--optimizer={optimizer}',
                f'--out_dir={optimizer}',
                '--init_from=resume',
                *arguments,
                cwd=workspace,
            )
        after = weights(workspace / optimizer)
        assert {name.split('.')[2] for name in after if not torch.equal(before[name], after[name])} == {'1'}


# --- files from elsewhere, and runs that continue with other settings -------------------------------------------------


def test_another_text_has_another_best_loss(workspace):
    """Also under the name of the old one. What the old text's best was is told, but not compared with."""
    write_data(workspace / 'data' / 'other', chars=CHARS)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(len(CHARS), (5000,), generator=rng).numpy().astype('<u2')
    noise[:4000].tofile(workspace / 'data' / 'other' / 'train.bin')
    noise[4000:].tofile(workspace / 'data' / 'other' / 'val.bin')
    common = [*TINY, '--max_iters=40', '--decay_lr=False', '--eval_interval=20', '--always_save_checkpoint=False']
    run_forked_ok('train.py', *common, cwd=workspace)
    learned = load_checkpoint(str(workspace / 'out' / 'ckpt_best.pt'))['best_val_loss']
    shutil.copytree(workspace / 'out', workspace / 'again')
    output = run_forked_ok(
        'train.py', *common, '--dataset=other', '--init_from=resume', '--max_iters=60', cwd=workspace
    )
    assert 'is not the text that the run in out was trained on' in output
    best = load_checkpoint(str(workspace / 'out' / 'ckpt_best.pt'))
    assert best['config']['dataset'] == 'other' and best['best_val_loss'] > learned and best['iter_num'] >= 40
    shutil.copy(workspace / 'data' / 'other' / 'val.bin', workspace / 'data' / 'tiny' / 'val.bin')  # prepared anew
    output = run_forked_ok(
        'train.py', *common, '--out_dir=again', '--init_from=resume', '--max_iters=60', cwd=workspace
    )
    assert 'is not the text' in output and load_checkpoint(str(workspace / 'again' / 'ckpt_best.pt'))['iter_num'] >= 40
    output = run_forked_ok(
        'train.py',
        *common,
        '--out_dir=again',
        '--init_from=resume',
        '--max_iters=61',
        '--dataset=data/tiny/',
        cwd=workspace,
    )
    assert 'is not the text' not in output


def test_starting_from_a_run(workspace):
    """--init_from=FOLDER, or a checkpoint's file: a new run from its weights, with their shape."""
    run_forked_ok('train.py', *TINY, '--pos=rope', '--max_iters=0', '--out_dir=a', cwd=workspace)
    shapeless = [argument for argument in TINY if not argument.startswith('--n_')]
    output = run_forked_ok('train.py', *shapeless, '--init_from=a', '--max_iters=0', '--out_dir=b', cwd=workspace)
    assert 'done: 0 iterations' in output and identical(weights(workspace / 'a'), weights(workspace / 'b'))
    run_forked_ok('train.py', *shapeless, '--init_from=a/ckpt_best.pt', '--max_iters=4', '--out_dir=c', cwd=workspace)
    run_forked_ok('train.py', *TINY, '--init_from=a', '--max_iters=4', '--out_dir=d', '--seed=2', cwd=workspace)
    assert not identical(weights(workspace / 'c'), weights(workspace / 'd'))
    assert load_checkpoint(str(workspace / 'c' / 'ckpt.pt'))['model_args']['pos'] == 'rope'
    text = [
        run_forked_ok('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=9', *where, cwd=workspace)
        for where in (['--init_from=c'], ['--out_dir=c'], ['--init_from=c/ckpt.pt'])
    ]
    assert text[0] == text[1] == text[2]
    result = run_forked('train.py', *TINY, '--init_from=a', '--pos=alibi', cwd=workspace)
    assert result.returncode == 2 and '--pos=alibi: a has pos=rope' in result.stderr
    result = run_forked('train.py', *TINY, '--n_layer=3', '--init_from=a', '--max_iters=0', cwd=workspace)
    assert result.returncode == 0 and result.stderr.startswith('warning: --n_layer=3: a has n_layer=2, which it keeps')
    write_data(workspace / 'data' / 'other', chars=CHARS[::-1])
    result = run_forked('train.py', *shapeless, '--init_from=a', '--dataset=other', cwd=workspace)
    assert result.returncode == 2 and 'another tokenizer' in result.stderr


def test_a_run_holds_its_folder(workspace):
    """While one run writes to a folder, another is refused and the first loses nothing. A dead run holds nothing."""
    common = [*TINY, '--max_iters=1000000', '--eval_interval=20', '--decay_lr=False']
    command = [sys.executable, str(REPO / 'train.py'), *common]
    process = subprocess.Popen(command, cwd=workspace, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('iter 21:'):
            break
    for arguments in ([], ['--init_from=resume'], ['--init_from=auto'], ['--n_embd=64'], ['--init_from=out']):
        result = run_forked('train.py', *common, *arguments, cwd=workspace)
        assert result.returncode == 2 and '--out_dir=out: another run is writing there' in result.stderr, result.stderr
    assert run_forked('train.py', *common, '--init_from=resume', '--eval_only=True', cwd=workspace).returncode == 0
    process.kill()
    process.communicate()
    iter_num = load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['iter_num']
    assert iter_num >= 20 and not (workspace / 'out' / 'previous-1').exists() and (workspace / 'out' / '.lock').exists()
    output = run_forked_ok('train.py', *common, '--init_from=resume', f'--max_iters={iter_num + 1}', cwd=workspace)
    assert f'after {iter_num} iterations' in output and not (workspace / 'out' / '.lock').exists()


def test_auto_resumes_where_there_is_a_run(workspace):
    """The same command repeatedly, as a scheduler gives it: it starts, continues and ends, with the bits of one run."""
    common = [*TINY, DROPOUT, '--init_from=auto']
    run_forked_ok('train.py', *common, '--max_iters=3', cwd=workspace)
    assert 'after 3 iterations' in run_forked_ok('train.py', *common, cwd=workspace)
    assert 'nothing to do' in run_forked_ok('train.py', *common, cwd=workspace)
    run_forked_ok('train.py', *common, '--out_dir=whole', cwd=workspace)
    assert identical(weights(workspace / 'out'), weights(workspace / 'whole'))


@pytest.mark.slow
def test_restarted_by_torchrun(workspace):
    """A rank that dies once: torchrun starts all again, and they go on from the last save."""
    die = (
        'train.py',
        '    # forward and backward, over',
        "    import os\n    if iter_num == 6 and ranks.rank == 1 and not os.path.exists('died'):\n"
        "        open('died', 'w').close()\n"
        '        os._exit(9)\n\n    # forward and backward, over',
    )
    copy = copy_scripts(workspace / 'copy', [die])
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--max-restarts=2',
        str(copy / 'train.py'),
        *TINY,
        DROPOUT,
        '--init_from=auto',
    ]
    result = subprocess.run(command, cwd=workspace, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and (workspace / 'died').exists(), result.stderr
    assert 'after 4 iterations' in result.stdout and 'done: 8 iterations' in result.stdout
    train_on_ranks(2, *TINY, DROPOUT, '--out_dir=whole', cwd=workspace)
    assert identical(weights(workspace / 'out'), weights(workspace / 'whole'))


def test_targets_and_patience_say_so(workspace):
    """A loss of 0 is a loss like any other; a run that ends early says why."""
    (workspace / 'data' / 'one').mkdir()
    for split in ('train', 'val'):
        torch.zeros(1000, dtype=torch.int16).numpy().tofile(workspace / 'data' / 'one' / f'{split}.bin')
    (workspace / 'data' / 'one' / 'meta.json').write_text(
        json.dumps({'tokenizer': {'kind': 'char', 'chars': 'a'}, 'dtype': 'uint16'})
    )
    output = run_forked_ok('train.py', *TINY, '--dataset=one', cwd=workspace)
    assert 'val loss 0.0000' in output and 'done: 8 iterations' in output and 'stopped before' not in output
    output = run_forked_ok('train.py', *TINY, '--target_val_loss=9', '--out_dir=t', cwd=workspace)
    assert (
        'stopped before --max_iters=8: the validation loss is down to --target_val_loss=9.0' in output
        and 'done: 0 iterations' in output
    )
    output = run_forked_ok(
        'train.py',
        *TINY,
        '--learning_rate=0',
        '--min_lr=0',
        '--eval_interval=1',
        '--patience=2',
        '--out_dir=p',
        cwd=workspace,
    )
    assert 'stopped before --max_iters=8: no lower validation loss' in output and 'done: 2 iterations' in output


def test_settings_that_hardly_can_be_meant(workspace):
    for arguments, words in (
        (['--learning_rate=1e-4'], '--learning_rate=0.0001 is below --min_lr=0.001'),
        (['--warmup_iters=9'], 'warmup_iters=9 is longer than the run of max_iters=8'),
    ):
        result = run_forked('train.py', *TINY, *arguments, cwd=workspace)
        assert result.returncode == 0 and result.stderr.count('\n') == 1
        assert result.stderr.startswith('warning: ') and words in result.stderr
        assert run_forked('train.py', *TINY, *arguments, '--decay_lr=False', cwd=workspace).stderr == ''


def test_a_data_set_by_any_of_its_names(workspace):
    shutil.copytree(workspace / 'data' / 'tiny', workspace / 'data' / 'text' / 'small')
    common = [*TINY, '--max_iters=2']
    for n, name in enumerate(
        ('text/small', 'data/text/small', './data/text/small/', str(workspace / 'data' / 'text' / 'small'))
    ):
        run_forked_ok('train.py', *common, f'--dataset={name}', f'--out_dir={n}', cwd=workspace)
        assert identical(weights(workspace / '0'), weights(workspace / str(n)))
        assert 'tokens in windows' in run_forked_ok(
            'evaluate.py', '--device=cpu', f'--out_dir={n}', f'--dataset={name}', cwd=workspace
        )
    assert load_checkpoint(str(workspace / '1' / 'ckpt.pt'))['config']['dataset'] == 'text/small'


def test_home_is_not_a_folder_called_tilde(workspace):
    home = {'HOME': str(workspace / 'home')}
    run_forked_ok('train.py', *TINY, '--max_iters=1', '--out_dir=~/runs/a', cwd=workspace, **home)
    assert (workspace / 'home' / 'runs' / 'a' / 'ckpt.pt').exists() and not (workspace / '~').exists()
    (workspace / 'home' / 'p.txt').write_bytes(b'\xef\xbb\xbfabc')
    (workspace / 'home' / 'novel.txt').write_text('It was a dark and stormy night. ' * 50)
    copy = copy_scripts(workspace / 'copy')
    run_forked_ok(copy / 'data/text/prepare.py', '--input=~/novel.txt', '--workers=1', cwd=workspace, **home)
    assert (copy / 'data' / 'text' / 'novel' / 'train.bin').exists()
    text = run_forked_ok(
        'sample.py',
        '--device=cpu',
        '--init_from=~/runs/a',
        '--start=FILE:~/p.txt',
        '--num_samples=1',
        cwd=workspace,
        **home,
    )
    assert text.startswith('abc')


# --- the terminal goes away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'signum', [getattr(signal, name) for name in ('SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]
)
def test_nobody_reads_and_it_is_told_to_stop(workspace, signum):
    """`train.py | tee log` and Ctrl-C, which tee gets too; a closed terminal; a scheduler's warning: all is saved."""
    arguments = [*TINY, '--max_iters=100000', '--eval_interval=100000', '--decay_lr=False']
    process = subprocess.Popen(
        [sys.executable, str(REPO / 'train.py'), *arguments],
        cwd=workspace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # under nohup, tests ignore SIGHUP
    )
    for line in process.stdout:
        if line.startswith('iter 20:'):
            break
    process.stdout.close()
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    assert load_checkpoint(str(workspace / 'out' / 'ckpt.pt'))['iter_num'] > 20


def test_nohup_is_heeded():
    """A SIGHUP that is ignored stays ignored; the other signals are caught."""
    program = (
        'import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); '
        'from common.distributed import StopSignal; stop = StopSignal(); '
        'os.kill(os.getpid(), signal.SIGHUP); print(stop.received); '
        'os.kill(os.getpid(), signal.SIGUSR1); print(stop.received.name)'
    )
    result = subprocess.run(
        [sys.executable, '-c', program], env=environment(PYTHONPATH=str(REPO)), capture_output=True, text=True
    )
    assert result.stdout.split() == ['None', 'SIGUSR1'], result.stderr
