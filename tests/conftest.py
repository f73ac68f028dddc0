"""What the tests share: running the scripts as a user does, and tiny data sets to run them on."""

import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', WANDB_MODE='offline'
)  # two test processes share two cores; no network

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / 'shared'  # texts and vocabularies that some machines have
sys.path.insert(0, str(REPO))
torch.set_num_threads(1)
for _module in ('common.cpu', 'common.distributed', 'common.tracking', 'generation', 'loading', 'optim'):
    importlib.import_module(_module)  # once, for all forks

# A model and a run that take a second or two
TINY = [
    '--dataset=tiny',
    '--out_dir=out',
    '--device=cpu',
    '--compile=False',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=2',
    '--eval_iters=2',
    '--eval_interval=4',
    '--max_iters=8',
    '--warmup_iters=2',
    '--lr_decay_iters=8',
    '--learning_rate=1e-2',
    '--min_lr=1e-3',
]
CHARS = '\n abcdefghijklmnopqrstuvwxyz.'


def environment(**extra):
    """This process's environment, without what a torchrun around it may have left."""
    clean = {key: value for key, value in os.environ.items() if key not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    return {**clean, **extra}


def run(script, *arguments, cwd, timeout=120, **extra):
    """Run a script of the repository in a folder, as its own process -> CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, str(REPO / script), *map(str, arguments)],
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


class Forked:
    """A script in a fork of this process, which has imported torch already: a tenth of the time, for the many cases that end before any
    work is done. What the interpreter does with an uncaught exception is done here by the same hook. A script that is a copy, outside of
    the repository, imports the modules beside it."""

    def __init__(self, script, *arguments, cwd, name='', **extra):
        self.arguments = arguments
        self.files = [
            open(Path(cwd).parent / f'{Path(cwd).name}{name}.{stream}', 'w+', encoding='utf-8')
            for stream in ('out', 'err')
        ]
        self.pid, self.status = os.fork(), None
        if self.pid:
            return
        status = 1
        try:
            for target, file in zip((1, 2), self.files):
                os.dup2(file.fileno(), target)
            sys.stdout, sys.stderr = open(1, 'w', encoding='utf-8'), open(2, 'w', encoding='utf-8')
            os.chdir(cwd)
            os.environ.update(extra)
            script = REPO / script
            if REPO not in script.parents:
                for name, module in list(sys.modules.items()):
                    if Path(getattr(module, '__file__', None) or '/').parent in (REPO, REPO / 'common', REPO / 'data'):
                        del sys.modules[name]
                sys.path[:] = [str(script.parent), *(path for path in sys.path if path != str(REPO))]
            sys.argv = [str(script), *map(str, arguments)]
            try:
                runpy.run_path(str(script), run_name='__main__')
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                try:
                    sys.excepthook(*sys.exc_info())
                except SystemExit as end:
                    status = end.code
            sys.stdout.flush()
            sys.stderr.flush()
            if 'common.files' in sys.modules:
                sys.modules['common.files'].remove_locks()  # as at the end of an interpreter
        finally:
            os._exit(status)

    def poll(self, wait=False):
        """The exit status, None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def result(self):
        """Wait for the end -> CompletedProcess."""
        status, texts = self.poll(wait=True), []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
            os.remove(file.name)
        return subprocess.CompletedProcess(self.arguments, status, *texts)


def run_forked(script, *arguments, cwd, **extra):
    """Like run, in a fork of this process; see Forked."""
    return Forked(script, *arguments, cwd=cwd, **extra).result()


def run_forked_ranks(world_size, script, *arguments, cwd):
    """Several ranks of a script, as torchrun starts them; when one fails the others are killed -> CompletedProcess of each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    ranks = [
        Forked(
            script,
            *arguments,
            cwd=cwd,
            name=f'.{rank}',
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
        )
        for rank in range(world_size)
    ]
    failed_at = None
    while None in (statuses := [rank.poll() for rank in ranks]):
        if any(statuses) and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > 1:
            for rank in ranks:
                if rank.poll() is None:
                    os.kill(rank.pid, signal.SIGKILL)
        time.sleep(0.01)
    return [rank.result() for rank in ranks]


def run_ok(script, *arguments, **keywords):
    """Like run, and the script must succeed -> its standard output."""
    result = run(script, *arguments, **keywords)
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result.stdout


def run_forked_ok(script, *arguments, **keywords):
    """Like run_forked, and the script must succeed -> its standard output."""
    result = run_forked(script, *arguments, **keywords)
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result.stdout


def train_on_ranks(world_size, *arguments, cwd, script='train.py'):
    """Train on several ranks of this machine, which all must succeed -> what they printed."""
    results = run_forked_ranks(world_size, script, *arguments, cwd=cwd)
    output = ''.join(result.stdout + result.stderr for result in results)
    assert not any(result.returncode for result in results), output
    return output


def copy_scripts(target, edits=()):
    """The repository's scripts, copied to a folder. edits: (file name, old, new) to be replaced in them, each once -> the folder."""
    for path in (
        *REPO.glob('*.py'),
        *(path for name in ('common', 'data', 'tools') for path in (REPO / name).rglob('*.py')),
    ):
        copy = target / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name, old, new in edits:
        text = (target / name).read_text(encoding='utf-8')
        assert text.count(old) == 1, f'{name}: {old!r} stands there {text.count(old)} times'
        (target / name).write_text(text.replace(old, new), encoding='utf-8')
    return target


def write_data(folder, n_train=4000, n_val=1000, chars=CHARS):
    """A data set with some order in it: characters that mostly follow one another in the alphabet."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 2, 5], size=n_train + n_val, p=[0.7, 0.2, 0.1])
    ids = (np.cumsum(steps) % len(chars)).astype('<u2')
    ids[:n_train].tofile(folder / 'train.bin')
    ids[n_train:].tofile(folder / 'val.bin')
    meta = {
        'tokenizer': {'kind': 'char', 'chars': chars},
        'vocab_size': len(chars),
        'dtype': 'uint16',
        'tokens': {'train': n_train, 'val': n_val},
    }
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def metrics(out_dir):
    """The records of a run -> (updates, evaluations)."""
    records = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    return [r for r in records if 'loss' in r], [r for r in records if 'val/loss' in r]


@pytest.fixture
def workspace(tmp_path):
    """A folder to run scripts in, with the data set data/tiny."""
    write_data(tmp_path / 'data' / 'tiny')
    return tmp_path


@pytest.fixture
def gpt2_vocabulary(monkeypatch):
    """The GPT-2 tokenizer, where its vocabulary can be had; else the test is skipped."""
    if 'TIKTOKEN_CACHE_DIR' not in os.environ:
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
        if not (SHARED / 'tiktoken_cache').exists():
            pytest.skip('no copy of the GPT-2 vocabulary here, set TIKTOKEN_CACHE_DIR')
    from tokenizer import load_gpt2

    return load_gpt2()
