"""Models split over ranks: whatever the split, a run is that of one device, and continues under any other."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    REPO,
    TINY,
    Forked,
    copy_scripts,
    environment,
    metrics,
    run_forked,
    run_forked_ok,
    run_forked_ranks,
    train_on_ranks,
)

from common.checkpoint import load_data, read_whole
from loading import load_checkpoint
from model import GPT, GPTConfig
from parallel import checkpoint_activations

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, 'record_event'), reason='torch 2.6 shards on GPUs only')

# dropout, a vocabulary that the ranks do not divide, more micro-batches than ranks
RUN = ['--dropout=0.1', '--gradient_accumulation_steps=4', '--batch_size=2', '--eval_interval=10']
ADAMW = ['--gradient_accumulation_steps=8', '--batch_size=1', '--optimizer=adamw']
MUON = [
    '--gradient_accumulation_steps=8',
    '--batch_size=1',
    '--optimizer=muon',
    '--tie_weights=False',
    '--pos=rope',
    '--n_kv_head=1',
    '--mlp=swiglu',
    '--norm=rmsnorm',
]
FSDP, HSDP = '--parallel=fsdp', ['--parallel=hsdp', '--shard_ranks=2']
FULL, SELECTIVE = '--activation_checkpointing=full', '--activation_checkpointing=selective'


def train(folder, out_dir, world_size, *arguments):
    arguments = [*TINY, *RUN, f'--out_dir={out_dir}', *arguments]
    if world_size == 1:
        return run_forked_ok('train.py', *arguments, cwd=folder)
    return train_on_ranks(world_size, *arguments, cwd=folder)


def losses(folder, out_dir):
    """The losses of a run: of each iteration, then of each evaluation."""
    iterations, evaluations = metrics(folder / out_dir)
    return [r['loss'] for r in iterations] + [r['val/loss'] for r in evaluations]


def weights(folder, name='ckpt.json'):
    return read_whole(load_checkpoint(str(folder / name)))['model']


# --- losses -----------------------------------------------------------------------------------------------------------

ITERATIONS = 5
SPLITS = [  # choices, ranks, split
    (ADAMW, 1, [SELECTIVE]),
    (ADAMW, 1, [FSDP, '--cpu_offload=True']),
    (ADAMW, 2, [FULL]),
    (ADAMW, 4, [FSDP, FULL]),
    (MUON, 1, [FULL]),
    (MUON, 2, [FSDP, SELECTIVE]),
    (MUON, 4, HSDP),
]
if os.environ.get('SAMGPT_TEST_SPLITS'):  # all of them: minutes
    ITERATIONS = 30
    SPLITS = [
        ([*choices, *tied], ranks, [*split, *kept])
        for choices in (ADAMW, MUON)
        for tied in (['--tie_weights=True'], ['--tie_weights=False'])
        for kept in ([], [SELECTIVE], [FULL])
        for ranks, split in ((1, []), (2, []), (1, [FSDP]), (2, [FSDP]), (4, [FSDP]), (4, HSDP))
    ]


def test_losses_are_those_of_one_device(workspace):
    expected = {}
    for n, (choices, ranks, split) in enumerate(SPLITS):
        key = '_'.join(choices)
        if key not in expected:
            train(workspace, key, 1, *choices, f'--max_iters={ITERATIONS}')
            expected[key] = losses(workspace, key)
            assert expected[key][ITERATIONS - 1] < expected[key][0] - 0.3
        train(workspace, f'split{n}', ranks, *choices, *split, f'--max_iters={ITERATIONS}')
        assert losses(workspace, f'split{n}') == pytest.approx(expected[key], abs=1e-4), (choices, ranks, split)


def test_initial_weights_are_those_of_one_device(workspace):
    train(workspace, 'one', 1, '--max_iters=0')
    train(workspace, 'sharded', 2, FSDP, '--max_iters=0')
    one, sharded = weights(workspace / 'one', 'ckpt.pt'), weights(workspace / 'sharded')
    assert one.keys() == sharded.keys() and all(torch.equal(one[name], sharded[name]) for name in one)


def test_edits_hold_under_sharding(workspace):
    """A buffer, a tensor and a parameter outside the layers that somebody adds, and a loss in chunks."""
    edits = [
        ('model.py', 'MAX_LOGITS = 2**26', 'MAX_LOGITS = 2**8'),
        (
            'model.py',
            '        self.tie_weights()\n        self.init_weights()',
            "        self.register_buffer('scale', torch.full((1,), 1.5))\n        self.shift = torch.full((1,), 0.1)\n"
            '        self.gain = nn.Parameter(torch.ones(config.n_embd))\n'
            '        self.tie_weights()\n        self.init_weights()',
        ),
        ('model.py', "'q_norm.weight', 'k_norm.weight')", "'q_norm.weight', 'k_norm.weight', 'gain')"),
        (
            'model.py',
            'return self.transformer.ln_f(x)',
            'return self.transformer.ln_f(x) * self.scale * self.gain + self.shift',
        ),
    ]
    script = copy_scripts(workspace / 'copy', edits) / 'train.py'
    run = [*TINY, *RUN, '--max_iters=4', '--tie_weights=False']
    run_forked_ok(script, *run, '--out_dir=one', cwd=workspace)
    train_on_ranks(2, *run, '--out_dir=sharded', FSDP, cwd=workspace, script=script)
    assert losses(workspace, 'sharded') == pytest.approx(losses(workspace, 'one'), abs=1e-4)
    train_on_ranks(
        2, *run, '--out_dir=sharded', FSDP, '--init_from=resume', '--max_iters=6', cwd=workspace, script=script
    )
    run_forked_ok(script, *run, '--out_dir=one', '--init_from=resume', '--max_iters=6', cwd=workspace)
    assert losses(workspace, 'sharded') == pytest.approx(losses(workspace, 'one'), abs=1e-4)
    saved = weights(workspace / 'sharded')
    assert saved['scale'].item() == 1.5 and not torch.equal(saved['gain'], torch.ones(32))


# --- saves ------------------------------------------------------------------------------------------------------------


def test_one_curve_through_all_splits(workspace):
    """1 -> 4 -> 2 -> 1 ranks, ddp -> fsdp -> hsdp -> one device, stopped at each arrow: as if never stopped."""
    data = ['--data_order=shuffle', *MUON]
    path = ((1, []), (4, [FSDP, '--async_save=True']), (2, []), (4, HSDP), (1, []))
    train(workspace, 'whole', 1, *data, f'--max_iters={2 * len(path)}')
    for n, (ranks, split) in enumerate(path):
        output = train(workspace, 'run', ranks, *data, *split, '--init_from=auto', f'--max_iters={2 * n + 2}')
        assert n == 0 or f'after {2 * n} iterations' in output
        assert (workspace / 'run' / 'ckpt.json').exists() == any('sdp' in argument for argument in split)
        assert (workspace / 'run' / 'ckpt.pt').exists() != (workspace / 'run' / 'ckpt.json').exists()
    whole, run = (metrics(workspace / name) for name in ('whole', 'run'))
    assert [r['iter'] for r in run[0]] == list(range(2 * len(path)))
    assert [r['loss'] for r in run[0]] == pytest.approx([r['loss'] for r in whole[0]], abs=1e-4)
    assert run[1][-1]['val/loss'] == pytest.approx(whole[1][-1]['val/loss'], abs=1e-4)


def test_resuming_shards_is_bit_exact(workspace):
    split = [FSDP, SELECTIVE, '--optimizer=muon', '--eval_interval=2']
    train(workspace, 'whole', 2, *split, '--max_iters=6')
    train(workspace, 'run', 2, *split, '--max_iters=4')
    output = train(workspace, 'run', 2, *split, '--max_iters=6', '--init_from=resume')
    assert 'after 4 iterations' in output
    whole, run = weights(workspace / 'whole'), weights(workspace / 'run')
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    assert losses(workspace, 'whole') == losses(workspace, 'run')
    states = [load_data(str(workspace / name / 'ckpt.json')) for name in ('whole', 'run')]
    for name, shape in states[0]['parts'].shapes().items():
        if name.startswith('optimizer.'):
            a, b = torch.empty(shape.shape), torch.empty(shape.shape)
            states[0]['parts'].read({name: a})
            states[1]['parts'].read({name: b})
            assert torch.equal(a, b), name


def test_the_best_sharded_save_stays_the_best(workspace):
    """A resumed run whose loss rises does not replace it."""
    often = [FSDP, '--eval_interval=2']
    train(workspace, 'out', 2, *often, '--max_iters=2')
    best = (workspace / 'out' / 'ckpt_best.json').read_text()
    worse = ['--init_from=resume', '--max_iters=4', '--learning_rate=3', '--decay_lr=False']
    output = train(workspace, 'out', 2, *often, *worse)
    assert (workspace / 'out' / 'ckpt_best.json').read_text() == best and 'after 2; saved' in output
    assert sorted(path.name for path in (workspace / 'out').glob('ckpt_0*')) == ['ckpt_00000002', 'ckpt_00000004']


def test_what_reads_a_sharded_save(workspace):
    """sample.py, evaluate.py, a run that starts from its weights, samples while training, --eval_only."""
    output = train(workspace, 'out', 2, FSDP, '--max_iters=2', '--eval_interval=2', '--sample_interval=2')
    assert output.count('step 2, a sample:') == 3  # each told once
    assert run_forked_ok('sample.py', '--num_samples=1', '--device=cpu', '--max_new_tokens=20', cwd=workspace)
    best = run_forked_ok('sample.py', '--num_samples=1', '--device=cpu', '--ckpt=ckpt_best.pt', cwd=workspace)
    assert best
    loss = metrics(workspace / 'out')[1][-1]['val/loss']
    printed = train(workspace, 'out', 2, FSDP, '--init_from=resume', '--eval_only=True')
    assert f'val loss {loss:.4f}' in printed
    evaluated = run_forked_ok('evaluate.py', '--device=cpu', cwd=workspace)
    assert 'data/tiny, val: loss' in evaluated
    printed = train(workspace, 'other', 1, '--init_from=out', '--eval_only=True')
    assert f'val loss {loss:.4f}' in printed


def test_samples_while_training_are_those_of_one_device(workspace):
    texts = []
    for ranks, split in ((1, []), (2, [FSDP]), (2, [])):
        output = train(workspace, 'out', ranks, *split, '--max_iters=4', '--sample_interval=4', '--learning_rate=0')
        texts.append(output.partition('a sample:')[2].partition('step 4: val')[0])
    assert texts[0] and texts[1] == texts[2] == texts[0]


# --- compilation and mistakes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_layers(quick_compiler, workspace):
    """The trial that compiles leaves no gradients behind, not even those that hsdp keeps for a later exchange."""
    split = ['--parallel=hsdp', '--shard_ranks=1', '--max_iters=3', '--dropout=0']
    train(workspace, 'eager', 2, *split)
    output = train(workspace, 'compiled', 2, *split, FULL, '--compile=True')
    assert 'compiling' in output and 'does not work' not in output
    assert losses(workspace, 'compiled') == pytest.approx(losses(workspace, 'eager'), abs=1e-4)


def test_selective_recomputes_the_same_dropout_masks():
    """Also where attention draws its mask inside a kernel whose result might be kept, as on CUDA."""
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=0.3)
    gradients = []
    for mode in ('none', 'selective', 'full'):
        torch.manual_seed(0)
        model = GPT(config)
        checkpoint_activations(model, mode)
        torch.manual_seed(1)
        model(torch.arange(8)[None], torch.arange(8)[None])[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other))


def test_one_process_tells_its_mistakes(workspace):
    result = run_forked('train.py', *TINY, FSDP, '--dataset=nowhere', cwd=workspace)
    assert result.returncode == 2 and result.stderr.startswith('error: there is no data set data/nowhere')


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--parallel=tp'], "must be 'ddp' or 'fsdp' or 'hsdp'"),
        (['--activation_checkpointing=some'], "must be 'none' or 'selective' or 'full'"),
        (['--shard_ranks=2'], 'belongs to --parallel=hsdp'),
        (['--parallel=hsdp', '--shard_ranks=2'], 'must divide the number of ranks, 1'),
        (['--cpu_offload=True'], 'needs --parallel=fsdp'),
        ([FSDP, '--cpu_offload=True', '--sample_interval=2'], 'not with --cpu_offload=True'),
        (['--keep_saves=0'], 'at least 1'),
        (['--timeout=1'], 'at least 5'),
    ],
)
def test_settings_that_do_not_fit(workspace, arguments, words):
    result = run_forked('train.py', *TINY, *arguments, cwd=workspace)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1, result.stderr


def test_a_signal_during_the_evaluation_of_a_sharded_model(workspace):
    """All ranks leave the evaluation together: a model in parts is computed by all of them."""
    results = run_forked_ranks(2, 'train.py', *TINY, FSDP, '--eval_only=True', '--eval_iters=3', cwd=workspace)
    assert [result.returncode for result in results] == [0, 0], results


# --- crashes ----------------------------------------------------------------------------------------------------------

ENDLESS = [FSDP, '--async_save=True', '--eval_interval=1', '--eval_iters=1', '--decay_lr=False']


def kill_a_rank(folder, pids, rng, since: int):
    """Wait until the run in a folder has gone on for two iterations, then kill -9 one of its ranks at a random moment
    -> the last iteration in the log."""
    deadline = time.monotonic() + 120
    while (last := last_iteration(folder)) < since + 2:
        assert time.monotonic() < deadline, f'no iteration after {since}'
        time.sleep(0.05)
    time.sleep(rng.random())
    os.kill(rng.choice(pids()), signal.SIGKILL)
    return last


def last_iteration(folder):
    try:
        return max((r['iter'] for r in metrics(folder)[0]), default=-1)
    except (OSError, ValueError):  # not there yet, or a line is being written
        return -1


def assert_as_if_never_killed(workspace, ranks, iterations):
    """Continue the killed run to the end: its weights are those of a run that nothing disturbed, bit for bit."""
    train(workspace, 'out', ranks, *ENDLESS, f'--max_iters={iterations}', '--init_from=auto')
    train(workspace, 'whole', ranks, *ENDLESS, f'--max_iters={iterations}', '--eval_interval=1000')
    whole, run = weights(workspace / 'whole'), weights(workspace / 'out')
    assert all(torch.equal(whole[name], run[name]) for name in whole)
    assert [r['iter'] for r in metrics(workspace / 'out')[0]] == list(range(iterations))


def test_a_sharded_run_killed_at_random_moments(workspace):
    """kill -9 of a rank: whatever the others were doing, some whole save is there, and the run continues from it."""
    rng, iter_num = random.Random(0), 0
    for _ in range(int(os.environ.get('SAMGPT_TEST_KILLS', 1))):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(2):
            env = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            arguments = [*TINY, *RUN, *ENDLESS, '--out_dir=out', '--max_iters=1000000', '--init_from=auto']
            env = {key: str(value) for key, value in env.items()}
            ranks.append(Forked('train.py', *arguments, cwd=workspace, name=f'.{rank}', **env))
        kill_a_rank(workspace / 'out', lambda: [rank.pid for rank in ranks], rng, iter_num)  # noqa: B023
        results = [rank.result() for rank in ranks]
        assert {result.returncode for result in results} == {-9, 2}, results
        checkpoint = load_data(str(workspace / 'out' / 'ckpt.json'))
        assert checkpoint['iter_num'] >= iter_num
        iter_num = checkpoint['iter_num']
    assert_as_if_never_killed(workspace, 2, iter_num + 3)


@pytest.mark.skipif('SAMGPT_TEST_KILLS' not in os.environ, reason='takes minutes: set SAMGPT_TEST_KILLS=20')
def test_a_sharded_run_killed_under_torchrun(workspace):
    """Four ranks, one of them killed now and then; torchrun starts them again."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4']
    command += [
        '--max-restarts=1000',
        str(REPO / 'train.py'),
        *TINY,
        *RUN,
        *ENDLESS,
        '--out_dir=out',
        '--max_iters=1000000',
    ]
    command += ['--init_from=auto', '--timeout=60']
    log = open(workspace / 'log', 'w')
    agent = subprocess.Popen(command, cwd=workspace, env=environment(), stdout=log, stderr=log)
    try:
        rng, last = random.Random(1), -1

        def ranks():
            """Their process ids; torchrun may be starting them just now."""
            while not (found := subprocess.run(['pgrep', '-P', str(agent.pid)], capture_output=True).stdout.split()):
                time.sleep(0.1)
            return list(map(int, found))

        for _ in range(int(os.environ['SAMGPT_TEST_KILLS'])):
            last = kill_a_rank(workspace / 'out', ranks, rng, last)
            time.sleep(1)  # until the others have noticed
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait(timeout=60)
    log = (workspace / 'log').read_text()
    assert 'gave no sign of life' in log or 'ended with an error' in log
    iterations = load_data(str(workspace / 'out' / 'ckpt.json'))['iter_num'] + 3
    assert_as_if_never_killed(workspace, 4, iterations)


def test_saves_that_fail_or_are_damaged(workspace):
    """One line, exit status 2, and the save before it still resumes."""
    keep = [FSDP, '--keep_saves=2', '--eval_interval=4']
    train(workspace, 'out', 2, *keep, '--max_iters=8')
    out, more = workspace / 'out', [*TINY, *RUN, *keep, '--out_dir=out', '--init_from=resume', '--max_iters=12']
    assert {path.name for path in out.glob('ckpt_0*')} == {'ckpt_00000004', 'ckpt_00000008'}

    # while saving, after iteration 12: a full disk; a folder that is no longer there
    full = 'import resource\n    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n'
    full += '    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
    gone = "import os as o\n    o.rename('out', 'gone') if ranks.is_main else None\n"
    for n, edit in enumerate((full, gone)):
        copy = copy_scripts(workspace / f'copy{n}', [('train.py', '    saver.save(', f'    {edit}    saver.save(')])
        results = run_forked_ranks(2, copy / 'train.py', *more, cwd=workspace)
        errors = [line for result in results for line in result.stderr.splitlines()]
        assert [result.returncode for result in results] == [2, 2] and len(errors) == 1, results
        assert errors[0].startswith('error: cannot save to out, ')
    (workspace / 'gone').rename(out)

    # a part that was cut short, or is missing
    part = out / 'ckpt_00000008' / '__1_0.distcp'
    content = part.read_bytes()
    for words in ('was cut short', 'is missing'):
        part.write_bytes(content[:-100]) if 'cut' in words else part.unlink()
        results = run_forked_ranks(2, 'train.py', *more, cwd=workspace)
        assert all(r.returncode == 2 and r.stderr.count('\n') == 1 and words in r.stderr for r in results), results
    shutil.copy(out / 'ckpt_00000004' / 'ckpt.json', out / 'ckpt.json')  # back to the save before
    assert 'after 4 iterations' in train(workspace, 'out', 2, *keep, '--init_from=resume', '--max_iters=6')
    assert {path.name for path in out.glob('ckpt_0*')} == {'ckpt_00000004', 'ckpt_00000006'}  # not the one given up
    best = ['--eval_only=True', f'--init_from={out}/ckpt_best.pt']
    assert 'val loss' in train(workspace, 'other', 1, *best)
