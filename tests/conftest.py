"""What the tests share: running the scripts as a user does, and tiny data sets to run them on."""

import importlib
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS='1',  # two test processes share two cores
    TORCHINDUCTOR_COMPILE_THREADS='1',  # the same; and no worker processes, which each import torch first
    HF_HUB_OFFLINE='1',  # no network
    HF_DEACTIVATE_ASYNC_LOAD='1',  # transformers loads in one thread: in a fork, torch's pool does not know others
    WANDB_MODE='offline',
)

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / 'shared'  # texts and vocabularies that some machines have
sys.path.insert(0, str(REPO))
torch.set_num_threads(1)
for _module in ('common.cpu', 'common.distributed', 'common.tracking', 'generation', 'loading', 'optim'):
    importlib.import_module(_module)  # once, for all forks
for _module in ('torch.distributed.fsdp', 'torch.distributed.checkpoint', 'torch._dynamo', 'torch._inductor.utils'):
    importlib.import_module(_module)  # the same, for those of several ranks

# a training run of a second or two
TINY = """
    --dataset=tiny --out_dir=out --device=cpu --compile=False
    --n_layer=2 --n_head=2 --n_embd=32 --block_size=16
    --batch_size=4 --gradient_accumulation_steps=2 --eval_iters=2 --eval_interval=4
    --max_iters=8 --warmup_iters=2 --lr_decay_iters=8 --learning_rate=1e-2 --min_lr=1e-3
""".split()
CHARS = '\n abcdefghijklmnopqrstuvwxyz.'


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, without the variables that torchrun sets, and with some more."""
    clean = {key: value for key, value in os.environ.items() if key not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    return {**clean, **extra}


def run(script, *arguments, cwd, timeout=120, **extra: str) -> subprocess.CompletedProcess:
    """Run a script of the repository in a folder, in a process of its own -> CompletedProcess with text output.

    extra: environment variables.
    """
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    env = environment(**extra)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def start(script, *arguments, cwd, **options):
    """Start a script of the repository in a folder, as its own process -> Popen with text pipes for its output."""
    command = [sys.executable, str(REPO / script), *map(str, arguments)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, cwd=cwd, env=environment(), **pipes, **options)


def talk_and_interrupt(script, *arguments, cwd) -> str:
    """Type a line at the prompt of a script that generates endlessly, press Ctrl-C during the answer; both twice -> its
    standard error. The script must go on after Ctrl-C, and end well with its input."""
    with start(script, *arguments, cwd=cwd, stdin=subprocess.PIPE) as child:
        output = child.stdout.fileno()
        for _ in range(2):
            child.stdin.write('abc\n')
            child.stdin.flush()
            while b'> ' not in os.read(output, 100000):
                pass
            assert os.read(output, 10)
            child.send_signal(signal.SIGINT)
        child.stdin.close()
        while os.read(output, 100000):
            pass
        assert child.wait(timeout=30) == 0
        return child.stderr.read()


class Forked:
    """A script that runs in a fork of this process.

    torch is imported already, so this takes a tenth of a process's time. Uncaught exceptions go to sys.excepthook, as
    in the interpreter. A script outside the repository, a copy, imports the modules beside it.
    """

    def __init__(self, script, *arguments, cwd, name='', **extra):
        """name: tells apart scripts that run in the same folder at the same time. extra: environment variables."""
        self.arguments, self.status = arguments, None
        cwd = Path(cwd)
        self.files = [
            open(cwd.parent / f'{cwd.name}{name}.{stream}', 'w+', encoding='utf-8') for stream in ('out', 'err')
        ]
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            for target, file in zip((1, 2), self.files):
                os.dup2(file.fileno(), target)
            sys.stdout, sys.stderr = (open(n, 'w', encoding='utf-8', closefd=False) for n in (1, 2))
            os.chdir(cwd)
            os.environ.update(extra)
            script = REPO / script
            if REPO not in script.parents:
                self.forget_repository()
                sys.path.insert(0, str(script.parent))
            sys.argv = [str(script), *map(str, arguments)]
            status = self.run(script)
            sys.stdout.flush()
            sys.stderr.flush()
            if 'common.files' in sys.modules:
                sys.modules['common.files'].remove_locks()  # as the interpreter does when it ends
        finally:
            os._exit(status)

    @staticmethod
    def forget_repository():
        """Undo the import of the repository's modules."""
        for name, module in list(sys.modules.items()):
            folder = Path(getattr(module, '__file__', None) or '/').parent
            if folder in (REPO, *(REPO / name for name in ('common', 'data', 'data/chat', 'formats', 'preflight'))):
                del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path != str(REPO)]

    @staticmethod
    def run(script):
        """Run the script in this process -> its exit status."""
        try:
            runpy.run_path(str(script), run_name='__main__')
            return 0
        except SystemExit as end:
            return end.code or 0
        except BaseException:
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as end:
                return end.code
            return 1

    def poll(self, wait=False):
        """The exit status, None while the script runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def result(self):
        """Wait until the script ends -> CompletedProcess."""
        status, texts = self.poll(wait=True), []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
            os.remove(file.name)
        return subprocess.CompletedProcess(self.arguments, status, *texts)


def run_forked(script, *arguments, cwd, **extra: str) -> subprocess.CompletedProcess:
    """Like run, but in a fork of this process, see Forked."""
    return Forked(script, *arguments, cwd=cwd, **extra).result()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def start_forked_ranks(world_size: int, script, *arguments, cwd) -> list[Forked]:
    """Start several ranks of a script with the variables that torchrun sets; rank 0 hosts their store."""
    port, ranks = free_port(), []
    for rank in range(world_size):
        env = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': world_size, 'LOCAL_WORLD_SIZE': world_size}
        env.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        env = {key: str(value) for key, value in env.items()}
        ranks.append(Forked(script, *arguments, cwd=cwd, name=f'.{rank}', **env))
    return ranks


def run_forked_ranks(world_size: int, script, *arguments, cwd) -> list[subprocess.CompletedProcess]:
    """Run several ranks of a script, as torchrun does; when one fails, the others are killed -> CompletedProcesses."""
    ranks = start_forked_ranks(world_size, script, *arguments, cwd=cwd)
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


def run_ok(script, *arguments, **keywords) -> str:
    """Like run, but the script must succeed -> its standard output."""
    result = run(script, *arguments, **keywords)
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result.stdout


def run_forked_ok(script, *arguments, **keywords) -> str:
    """Like run_forked, but the script must succeed -> its standard output."""
    result = run_forked(script, *arguments, **keywords)
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result.stdout


def train_on_ranks(world_size: int, *arguments, cwd, script='train.py') -> str:
    """Train on several ranks, which must all succeed -> what they printed."""
    results = run_forked_ranks(world_size, script, *arguments, cwd=cwd)
    output = ''.join(result.stdout + result.stderr for result in results)
    assert not any(result.returncode for result in results), output
    return output


def copy_scripts(target: Path, edits=()) -> Path:
    """Copy the repository's scripts to a folder -> the folder.

    edits: (file name, old text, new text) to replace in the copies; the old text must occur once.
    """
    paths = [*REPO.glob('*.py')]
    for name in ('common', 'data', 'formats', 'preflight', 'tools'):
        paths += (REPO / name).rglob('*.py')
    for path in paths:
        copy = target / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for name, old, new in edits:
        text = (target / name).read_text(encoding='utf-8')
        assert text.count(old) == 1, f'{name}: {old!r} occurs {text.count(old)} times'
        (target / name).write_text(text.replace(old, new), encoding='utf-8')
    return target


def write_data(folder: Path, n_train=4000, n_val=1000, chars=CHARS) -> None:
    """Write a data set with something to learn: most characters are followed by the next one of the alphabet."""
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


def metrics(out_dir: Path) -> tuple[list[dict], list[dict]]:
    """The records of a run -> (iterations, evaluations)."""
    records = [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    return [r for r in records if 'loss' in r], [r for r in records if 'val/loss' in r]


@pytest.fixture
def workspace(tmp_path):
    """A folder to run scripts in, with the data set data/tiny."""
    write_data(tmp_path / 'data' / 'tiny')
    return tmp_path


@pytest.fixture
def forked_runs(monkeypatch):
    """Let subprocess.Popen, called by a script, run other scripts in forks rather than in processes of their own."""
    popen = subprocess.Popen

    class ForkedPopen:
        """What tools/compare.py uses of a Popen whose standard error goes where its standard output goes."""

        def __init__(self, command):
            _, script, *arguments = command
            result = Forked(script, *arguments, cwd=os.getcwd(), name='.inner').result()
            self.returncode, self.stdout = result.returncode, io.StringIO(result.stdout + result.stderr)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def start(command, **options):
        return ForkedPopen(command) if command[0] == sys.executable else popen(command, **options)

    monkeypatch.setattr(subprocess, 'Popen', start)


@pytest.fixture
def quick_compiler():
    """torch.compile, quicker for forked scripts: imported once, here, and its kernels use no vector instructions."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecations in torch itself
        import torch._inductor.compile_fx  # noqa: F401
    with torch._inductor.config.patch({'cpp.vec_isa_ok': False}):
        yield


@pytest.fixture
def gpt2_vocabulary(monkeypatch):
    """The GPT-2 tokenizer. Without a copy of its vocabulary, the test is skipped."""
    if 'TIKTOKEN_CACHE_DIR' not in os.environ:
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken_cache'))
        if not (SHARED / 'tiktoken_cache').exists():
            pytest.skip('no copy of the GPT-2 vocabulary here, set TIKTOKEN_CACHE_DIR')
    from tokenizer import load_gpt2

    return load_gpt2()
