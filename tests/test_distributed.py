"""Ranks that die, hang or do not divide the batch: the others end in time and say which one, or share the work anew."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    TINY,
    copy_scripts,
    environment,
    free_port,
    metrics,
    run_forked_ok,
    start_forked_ranks,
    train_on_ranks,
)

from common.checkpoint import latest
from common.distributed import Ranks, waiting_limit
from common.errors import UserError
from dataloader import Tokens, TrainBatches, check_global_batch
from loading import load_checkpoint

ENDLESS = [*TINY, '--max_iters=1000000', '--eval_interval=1000000', '--decay_lr=False']


# --- uneven shares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('order', ['random', 'shuffle'])
@pytest.mark.parametrize('world_size', [2, 3, 4, 5, 9])
def test_every_sequence_is_taken_once(tmp_path, order, world_size):
    """Also while the batch grows, and resumed; every rank makes as many passes, those too many on padding."""
    np.arange(1003, dtype='<u2').tofile(tmp_path / 'train.bin')
    tokens = Tokens(str(tmp_path), 'train', {}, 2000)

    def batches_of(rank, n_ranks, step=0):
        return TrainBatches(
            tokens, 10, 3, 6, 7, order, Ranks(rank, rank, n_ranks), torch.device('cpu'), step, ramp=(2, 5)
        )

    alone = batches_of(0, 1)
    wanted = [[alone.next()[0].tolist() for _ in range(alone.micro_batches_at(step))] for step in range(9)]
    for first in (0, 3, 6):
        ranks = [batches_of(rank, world_size, first) for rank in range(world_size)]
        for step in range(first, 9):
            rounds = -(-len(wanted[step]) // world_size)
            taken, padding = [], 0
            for _ in range(rounds):
                for rank in ranks:
                    x, y, *_ = rank.next()
                    assert x.shape == y.shape == (3, 10) and x.dtype == y.dtype == torch.int64
                    if (y == -1).all():
                        assert not x.any()
                        padding += 1
                    else:
                        taken.append(x.tolist())
            assert taken == wanted[step] and padding == rounds * world_size - len(taken)


def test_three_ranks_share_four_micro_batches(workspace):
    """The losses and weights of one rank; the batch grows from 2 to 4, so that one rank has nothing to do at first."""
    options = [
        '--gradient_accumulation_steps=4',
        '--batch_ramp_from=2',
        '--batch_ramp_iters=3',
        '--dropout=0.2',
        '--max_iters=6',
        '--lr_decay_iters=6',
    ]
    run_forked_ok('train.py', *TINY, *options, '--out_dir=one', cwd=workspace)
    train_on_ranks(3, *TINY, *options, '--out_dir=three', '--uneven=True', cwd=workspace)
    for one, three in zip(metrics(workspace / 'one')[0], metrics(workspace / 'three')[0], strict=True):
        assert three['loss'] == pytest.approx(one['loss'], abs=1e-5)
        assert three['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-4)
    one, three = (load_checkpoint(str(workspace / name / 'ckpt.pt'))['model'] for name in ('one', 'three'))
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, rtol=1e-4, atol=1e-4)  # Adam magnifies rounding


def test_uneven_shares_are_asked_for():
    config = {'gradient_accumulation_steps': 4, 'batch_ramp_from': 0, 'batch_ramp_iters': 0, 'uneven': False}
    config |= {'batch_size': 3, 'eval_only': False}
    check_global_batch(config, 2)
    with pytest.raises(UserError, match='cannot be divided among 3 ranks: use 3 or 6, or --uneven=True$'):
        check_global_batch(config, 3)
    for world_size in (3, 4, 7):
        check_global_batch({**config, 'uneven': True}, world_size)


# --- ranks that are lost ----------------------------------------------------------------------------------------------


def wait_for_iteration(out_dir, iter_num, seconds=60):
    """Wait until the log has this iteration."""
    deadline = time.monotonic() + seconds
    while not (out_dir / 'metrics.jsonl').exists() or not any(r['iter'] >= iter_num for r in metrics(out_dir)[0]):
        assert time.monotonic() < deadline, f'iteration {iter_num} was not reached'
        time.sleep(0.05)


def assert_named(rank, result, *words):
    """A rank has ended with one line that has all of these words."""
    assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
    assert result.stderr.startswith(f'error (rank {rank}): ' if rank else 'error: ')
    assert all(word in result.stderr for word in words), result.stderr


def test_limits():
    assert [waiting_limit(timeout).total_seconds() for timeout in (600, 60, 15)] == [560, 20, 5]


@pytest.mark.parametrize('signum', [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_gives_no_sign(workspace, signum):
    """A rank that is killed, or stopped with all of its threads: the others end, and each names it."""
    ranks = start_forked_ranks(3, 'train.py', *ENDLESS, '--uneven=True', '--timeout=12', cwd=workspace)
    wait_for_iteration(workspace / 'out', 1)
    os.kill(ranks[1].pid, signum)
    survivors = {rank: ranks[rank].result() for rank in (0, 2)}
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].result()
    for rank, result in survivors.items():
        assert_named(rank, result, 'rank 1 gave no sign of life for ')


def test_a_rank_that_never_comes(workspace):
    ranks = start_forked_ranks(3, 'train.py', *ENDLESS, '--uneven=True', '--timeout=12', cwd=workspace)
    os.kill(ranks[2].pid, signal.SIGSTOP)
    for rank in (0, 1):
        assert_named(rank, ranks[rank].result(), 'cannot connect the ranks: rank 2 did not connect in 4 s')
    os.kill(ranks[2].pid, signal.SIGKILL)
    ranks[2].result()


@pytest.mark.parametrize(
    'act, words',
    [
        ('time.sleep(1000)', 'rank 1 hangs [train.py:'),
        ("raise UserError('this is bad')", 'rank 1 has ended with an error of its own'),
    ],
    ids=['hangs', 'fails'],
)
def test_a_rank_that_does_not_come(workspace, act, words):
    """One that hangs, though its threads live on, ends too, and the others say where it is; one that fails says why."""
    before = "        watch.lap('forward')\n"
    edit = (
        'train.py',
        before,
        f'        import time\n        if iter_num == ranks.rank == 1:\n            {act}\n{before}',
    )
    copy = copy_scripts(workspace / 'copy', [edit])
    ranks = start_forked_ranks(3, copy / 'train.py', *ENDLESS, '--uneven=True', '--timeout=12', cwd=workspace)
    results = [rank.result() for rank in ranks]
    for rank in (0, 2):
        assert_named(rank, results[rank], words)
    assert_named(1, results[1], 'has waited for this one in vain' if 'sleep' in act else 'this is bad')


# --- nodes ------------------------------------------------------------------------------------------------------------


def start_node(cwd, port, nodes, *arguments, conf='', output=subprocess.PIPE, **extra):
    """Start torchrun's agent of one node with one rank; the nodes of a run share a port of this machine -> Popen."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nnodes={nodes}', '--nproc_per_node=1']
    command += ['--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=test', '--local_addr=127.0.0.1']
    command += [f'--rdzv_conf={conf}'] if conf else []
    command += ['--max-restarts=3' if ':' in nodes else '--max-restarts=0', str(REPO / 'train.py'), *arguments]
    streams = {'stdout': output, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(command, cwd=cwd, env=environment(**extra), start_new_session=True, **streams)


def kill_node(agent):
    """kill -9 of an agent and its ranks, as when a machine is lost."""
    ranks = subprocess.run(['pgrep', '-P', str(agent.pid)], capture_output=True, text=True).stdout.split()
    for pid in (agent.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    agent.communicate()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, 'record_event'), reason='torch 2.6 shards on GPUs only')
def test_a_signal_on_one_node(workspace):
    """Two torchruns, one run. SIGTERM to one: the ranks of both stop after the same step, saved; one device goes on."""
    port, arguments = free_port(), [*ENDLESS, '--parallel=fsdp']
    nodes = [start_node(workspace, port, '2', *arguments) for _ in range(2)]
    wait_for_iteration(workspace / 'out', 3)
    nodes[1].terminate()
    outputs = [node.communicate(timeout=60)[0] for node in nodes]
    assert sum('all saved; to continue: torchrun --nnodes=2 ' in output for output in outputs) == 1, outputs
    assert not any(line.startswith('error') for output in outputs for line in output.splitlines()), outputs
    stopped = load_checkpoint(str(workspace / 'out' / 'ckpt.json'))['iter_num']
    assert stopped > 3
    arguments = [*ENDLESS, f'--max_iters={stopped + 2}']
    assert f'after {stopped} iterations' in run_forked_ok('train.py', *arguments, '--init_from=resume', cwd=workspace)
    run_forked_ok('train.py', *arguments, '--out_dir=alone', cwd=workspace)
    together, alone = ([r['loss'] for r in metrics(workspace / name)[0]] for name in ('out', 'alone'))
    assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.skipif('SAMGPT_TEST_NODES' not in os.environ, reason='takes a minute: set SAMGPT_TEST_NODES=1')
@pytest.mark.slow
@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_nodes_go_and_come(workspace, parallel):
    """One of two nodes is lost, comes back, is told to stop: the run goes on, with the losses of an undisturbed one."""
    port = free_port()
    common = [*ENDLESS, '--eval_interval=10', '--eval_iters=1', '--timeout=30', f'--parallel={parallel}']
    output = open(workspace / 'output', 'a')  # a pipe would be full before somebody reads it
    extra = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}  # docs/distributed.md says why

    def start(is_host):
        conf = f'is_host={is_host},last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3'
        return start_node(workspace, port, '1:2', *common, '--init_from=auto', conf=conf, output=output, **extra)

    def last():
        return metrics(workspace / 'out')[0][-1]['iter']

    nodes = [start(1)]
    time.sleep(1)
    nodes.append(start(0))
    wait_for_iteration(workspace / 'out', 25)
    kill_node(nodes.pop())
    time.sleep(2)
    wait_for_iteration(workspace / 'out', last() + 20)  # one node
    nodes.append(start(0))
    time.sleep(15)
    wait_for_iteration(workspace / 'out', last() + 10)  # two
    nodes[1].terminate()
    time.sleep(2)
    wait_for_iteration(workspace / 'out', last() + 20)  # one
    nodes[0].terminate()
    for node in nodes:
        node.communicate(timeout=120)
    said = (workspace / 'output').read_text(encoding='utf-8')
    assert re.findall(r'(\d) x cpu', said) == list('2121'), said
    end = load_checkpoint(latest(str(workspace / 'out')))['iter_num']
    run_forked_ok('train.py', *common, '--out_dir=alone', f'--max_iters={end}', cwd=workspace)
    together, alone = ({r['iter']: r['loss'] for r in metrics(workspace / name)[0]} for name in ('out', 'alone'))
    assert together.keys() == alone.keys() == set(range(end))
    assert max(abs(together[n] - alone[n]) for n in alone) < 1e-4


@pytest.mark.skipif('SAMGPT_TEST_NODES' not in os.environ, reason='takes a while: set SAMGPT_TEST_NODES=1')
@pytest.mark.slow
def test_the_script_for_slurm(workspace):
    """docs/distributed.md's, with stand-ins for Slurm's commands: told to stop, it waits for the save and requeues."""
    text = (REPO / 'docs' / 'distributed.md').read_text(encoding='utf-8')
    script = text.split('```bash\n')[1].split('```')[0]
    assert len(script.splitlines()) == 15
    edits = {
        '--nproc_per_node=8': '--nproc_per_node=1 --local_addr=127.0.0.1',
        ':29500': f':{free_port()}',
        'config/train_gpt2.py': ' '.join([*ENDLESS, '"$@"']),
        'out_dir=out-gpt2': f'out_dir=out-{os.getpid()}',
    }
    for old, new in edits.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    copy_scripts(workspace)
    commands = {
        'job': script,
        'srun': '#!/bin/bash\nexec "$@"\n',
        'torchrun': f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n',
        'scontrol': '#!/bin/bash\nif [ $1 = show ]; then echo 127.0.0.1; else echo "scontrol $*"; fi\n',
    }
    for name, content in commands.items():
        (workspace / name).write_text(content, encoding='utf-8')
        (workspace / name).chmod(0o755)
    env = environment(PATH=f'{workspace}:{os.environ["PATH"]}', SLURM_NNODES='1', SLURM_JOB_ID='17')
    env['SLURM_JOB_NODELIST'] = 'here'
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    job = subprocess.Popen([workspace / 'job'], cwd=workspace, env=env, **streams)
    wait_for_iteration(workspace / f'out-{os.getpid()}', 3)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert 'iterations, all saved' in output and output.endswith('scontrol requeue 17\n'), output
    stopped = metrics(workspace / f'out-{os.getpid()}')[0][-1]['iter'] + 1
    again = subprocess.run([workspace / 'job', f'--max_iters={stopped + 2}'], cwd=workspace, env=env, **streams)
    assert again.returncode == 0 and f'done: {stopped + 2} iterations' in again.stdout, again.stdout
    assert f'after {stopped} iterations' in again.stdout and 'requeue' not in again.stdout
