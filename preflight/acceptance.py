"""What a new device must show, as one table: bench.py --mode=accept.

Each check is a function in CHECKS. It runs the scripts themselves, or a probe of probes.py, in child processes, so what
fails, hangs or needs more memory than there is ends that check alone. accept.json and accept.md are written anew after
each check. On a CPU everything runs with small numbers, which show that the checks work, and nothing of its speed.
"""

import bisect
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from common.checkpoint import LATEST, load_data
from common.children import ChildFailed, Ended, NoMemory, OutOfTime, run_script
from common.errors import ROOT, UserError, one_line, say, user_errors
from common.files import written_whole
from common.tracking import FILE, read_metrics
from preflight.probes import ENTROPY, chain, fields_left_out

GIB = 2**30

# How far losses over 20 steps may be apart. On a CPU the worst option was off by 5e-6, 6e-3 and 1.4e-3. Two different
# options are 2e-2 apart and more, but for the two kinds of GELU, 5e-4, and the gains of queries and keys, 5e-3.
TOLERANCES = {'float32': 1e-4, 'bfloat16': 2e-2, 'float16': 5e-3}
# Runs of train.py in float32: losses, and weights relative to their norm. A CPU is exact. CUDA adds in an order of its
# own; on a CPU another order moved the weights of 100 steps by 4e-7. A run resumed without its optimizer's state was
# 0.19 off.
RUN_TOLERANCE = {'cpu': 0.0, 'cuda': 2e-3, 'mps': 2e-3}
SIGMAS = 6  # a mean of random numbers is this far off once in 500 million times
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)  # tried for the largest that fits


class Sizes(NamedTuple):
    """How much the checks do."""

    model: tuple  # arguments of bench.py: the model whose speed is measured
    name: str  # that model, in words
    batch_size: int  # of its training step; halved until it fits
    batch_sizes: tuple  # ascending, to find the largest that fits
    decode: tuple  # arguments of bench.py --mode=decode
    chunked: dict  # arguments of probes.chunked
    recipe: tuple  # arguments of train.py
    target: float  # validation loss that the recipe must reach


RECIPE = os.path.join(ROOT, 'config', 'speedrun_shakespeare_char.py')
FULL = Sizes(
    model=(),
    name='GPT-2 124M, block 1024',
    batch_size=16,
    batch_sizes=BATCH_SIZES,
    decode=('--prompt_tokens=64', '--max_new_tokens=100', '--rounds=3'),
    chunked={'rows': 8192, 'width': 768, 'vocab_size': 50304},
    recipe=(RECIPE,),
    target=1.47,
)
SMALL_MODEL = ('--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=64', '--vocab_size=512')
SMALL = Sizes(
    model=SMALL_MODEL,
    name='a small model, block 64',
    batch_size=4,
    batch_sizes=BATCH_SIZES[:3],
    decode=('--prompt_tokens=8', '--max_new_tokens=20', '--rounds=2'),
    chunked={'rows': 512, 'width': 64, 'vocab_size': 4096},
    recipe=(RECIPE, '--dataset=chain', '--vocab_multiple=1', '--dropout=0', '--batch_size=16', '--block_size=32')
    + ('--n_layer=2', '--n_head=2', '--n_embd=64', '--max_iters=150', '--lr_decay_iters=150', '--cooldown_iters=120'),
    target=ENTROPY + 0.05,
)


# --- what a check may raise, beside the failures of its children ------------------------------------------------------


class Unavailable(Exception):
    """The check needs what does not exist here; the message says what."""


def require_that(holds: bool, otherwise: str):
    """Fail the check, with this line, unless something holds."""
    if not holds:
        raise AssertionError(otherwise)


# --- how a check runs something ---------------------------------------------------------------------------------------


@dataclass
class Acceptance:
    """The device, and how to run something on it. Children run in `folder`, which is removed at the end."""

    folder: str
    compile: bool = False
    device: dict = field(default_factory=dict)  # of probes.describe
    sizes: Sizes = SMALL
    end: float = math.inf  # of the whole, by time.monotonic()
    deadline: float = math.inf  # of the check under way
    patience: float = 1.0  # times the usual seconds of a check

    def run(self, script: str, *arguments: str, cwd: str = '', interrupt: Callable | None = None) -> Ended:
        """Run a script of the repository, by default in `folder`. OutOfTime at the deadline.

        interrupt: once this returns True, the script gets a SIGTERM.
        """
        log = os.path.join(self.folder, 'output.txt')
        folder = cwd or self.folder
        return run_script(script, arguments, folder, log, self.deadline, self.environment(), interrupt)

    def environment(self) -> dict:
        """The environment of the children. On a CPU they use one thread, unless it says otherwise: models as small as
        these gain nothing by more, and lose much where other programs are running."""
        return {**({} if self.sizes is FULL else {'OMP_NUM_THREADS': '1'}), **os.environ}

    def run_well(self, script: str, *arguments: str, cwd: str = '') -> str:
        """run() of a script that must succeed -> what it printed. ChildFailed, or NoMemory, if it does not."""
        return self.run(script, *arguments, cwd=cwd).succeeded()

    def probe(self, name: str, **arguments):
        """What a function of probes.PROBES returns. It stays in a file, see result_of."""
        path = self.result_of(name, arguments.get('dtype'))
        self.run_well('preflight/probes.py', name, json.dumps(arguments), path)
        return read_json(path)

    def result_of(self, name: str, dtype: str | None = None) -> str:
        """The file of what a probe returned, if it has run."""
        return os.path.join(self.folder, f'{name}-{dtype}.json')

    def bench(self, *arguments: str) -> dict:
        """The figures of bench.py, see its --json_file=, on random ids."""
        path = os.path.join(self.folder, 'figures.json')
        device = f'--device={self.device["device"]}'
        self.run_well('bench.py', *arguments, device, '--real_data=False', '--breakdown=False', f'--json_file={path}')
        return read_json(path)

    def training(self, name: str, *arguments: str) -> list[str]:
        """Arguments of train.py for a run of a second or two on chain()."""
        shape = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4']
        steps = ['--gradient_accumulation_steps=2', '--eval_iters=2', '--eval_interval=50', '--warmup_iters=5']
        precision = [f'--device={self.device["device"]}', '--dtype=float32', '--compile=False']
        return ['--dataset=chain', f'--out_dir={name}', '--learning_rate=1e-2', *shape, *steps, *precision, *arguments]

    def losses_of(self, name: str) -> list[float]:
        """The losses that a run of train.py has logged so far."""
        path = os.path.join(self.folder, name, FILE)
        records = read_metrics(path) if os.path.exists(path) else []
        return [record['loss'] for record in records if 'loss' in record]

    def weights_of(self, name: str) -> torch.Tensor:
        """All weights that a run of train.py has saved last, in one vector, float64."""
        saved = load_data(os.path.join(self.folder, name, LATEST))['model']
        return torch.cat([weight.flatten().double() for weight in saved.values()])


def read_json(path):
    """The content of a JSON file."""
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def write_chain(folder: str, n_train: int = 20000, n_val: int = 4000):
    """Write probes.chain as a data set for train.py."""
    chars = '\n .abcdefghijklmnopqrstuvwxyz'
    os.makedirs(folder)
    ids = chain(n_train + n_val, len(chars)).astype('<u2')
    ids[:n_train].tofile(os.path.join(folder, 'train.bin'))
    ids[n_train:].tofile(os.path.join(folder, 'val.bin'))
    meta = {'tokenizer': {'kind': 'char', 'chars': chars}, 'vocab_size': len(chars), 'dtype': 'uint16'}
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as file:
        json.dump({**meta, 'tokens': {'train': n_train, 'val': n_val}}, file)


# --- the checks: each fills in figures, and returns True; or None, if there is nothing that could be wrong ------------


def losses_float32(a: Acceptance, figures: dict):
    """Losses of every option over 20 steps in float32, against the CPU's in float64."""
    return compare_options(a, figures, 'losses', 'float32')


def losses_bfloat16(a: Acceptance, figures: dict):
    """Losses of every option over 20 steps in bfloat16, against float32's on the device."""
    if not a.device['bfloat16']:
        raise Unavailable('the device has no bfloat16')
    return compare_options(a, figures, 'losses', 'bfloat16', float32=a.result_of('losses', 'float32'))


def losses_float16(a: Acceptance, figures: dict):
    """Losses of every option over 20 steps in float16 with a scaler, against float32's on the device."""
    if a.device['type'] == 'mps':
        raise Unavailable('train.py has float16 on CUDA only')
    return compare_options(a, figures, 'losses', 'float16', float32=a.result_of('losses', 'float32'))


def compare_options(a, figures, probe, dtype, **arguments):
    """Compare the losses of a probe with those that it expects, option by option."""
    results, tolerance = a.probe(probe, device=a.device['device'], dtype=dtype, **arguments), TOLERANCES[dtype]
    require_that(bool(results), 'no option was compared')
    differences = {name: result.get('error') or difference(**result) for name, result in results.items()}
    wrong = {name: gap for name, gap in differences.items() if isinstance(gap, str) or not gap <= tolerance}
    numbers = {name: gap for name, gap in differences.items() if not isinstance(gap, str)}
    figures.update(options=len(differences), tolerance=tolerance, dtype=dtype)
    if numbers:
        figures['worst'] = max(numbers, key=lambda name: (math.isnan(numbers[name]), numbers[name]))
        figures['worst_difference'] = numbers[figures['worst']]
    figures['differences'] = differences
    if fields_left_out():
        figures['without_values_in_probes_py'] = ', '.join(fields_left_out())
    reasons = [f'{name}: {gap if isinstance(gap, str) else f"off by {gap:.2g}"}' for name, gap in wrong.items()]
    require_that(not wrong, f'{len(wrong)} of {len(differences)} options are wrong: {"; ".join(reasons)}')
    return True


def difference(losses: list, expected: list) -> float:
    """The largest difference of two lists of as many losses, nan if any is not finite."""
    require_that(len(losses) == len(expected) > 0, f'{len(losses)} losses where {len(expected)} were expected')
    gaps = np.abs(np.subtract(losses, expected, dtype=np.float64))
    return float(gaps.max()) if np.isfinite(gaps).all() else math.nan


def resume(a: Acceptance, figures: dict):
    """train.py stopped by SIGTERM and resumed, with dropout, ends with the weights of an undisturbed run."""
    if sys.platform == 'win32':
        raise Unavailable('Windows has no SIGTERM')
    lengths = ['--max_iters=60', '--lr_decay_iters=60', '--dropout=0.1']
    a.run_well('train.py', *a.training('whole', *lengths))
    parts = a.training('parts', *lengths)
    ended = a.run('train.py', *parts, interrupt=lambda: len(a.losses_of('parts')) >= 20)
    figures.update(iterations=len(a.losses_of('whole')), stopped_after=len(a.losses_of('parts')))
    stopped = ended.status == 128 + signal.SIGTERM and 'all saved' in ended.output
    require_that(stopped, f'SIGTERM did not stop it (status {ended.status}): {ended.last_line()}')
    a.run_well('train.py', *parts, '--init_from=resume')
    whole, resumed = a.weights_of('whole'), a.weights_of('parts')
    figures['difference'] = ((whole - resumed).norm() / whole.norm()).item()
    figures.update(equal_to_the_bit=torch.equal(whole, resumed), tolerance=RUN_TOLERANCE[a.device['type']])
    require_that(figures['difference'] <= figures['tolerance'], 'the weights at the end are others')
    return True


def step(a: Acceptance, figures: dict):
    """A training step of GPT-2 124M at block 1024: its speed and memory. Its loss must fall."""
    arguments = (*a.sizes.model, '--steps=20', '--max_seconds=15', f'--compile={a.compile}')
    measured = until_it_fits(lambda n: a.bench(*arguments, f'--batch_size={n}'), a.sizes.batch_size)
    figures.update(model=a.sizes.name, **speed(measured))
    figures.update(
        {key: measured[key] for key in ('parameters', 'dtype', 'compiled', 'compile_seconds') if key in measured}
    )
    require_that(measured['compiled'] == a.compile, 'torch.compile did not work')
    require_that(measured['losses'][-1] < measured['losses'][0], 'the loss did not fall')
    return True


def compiled_losses(a: Acceptance, figures: dict):
    """Losses of compiled models against the same as written; with documents, by flex attention on CUDA."""
    require_compiler(a)
    return compare_options(a, figures, 'compiled', a.device['dtype'])


def recipe(a: Acceptance, figures: dict):
    """The character recipe of 10.65M parameters reaches a validation loss of 1.47."""
    arguments, cwd = list(a.sizes.recipe), a.folder
    if a.sizes is FULL:
        cwd = os.getcwd()  # where the data is
        if not os.path.exists(os.path.join('data', 'shakespeare_char', 'train.bin')):
            raise Unavailable('data/shakespeare_char: python data/shakespeare_char/prepare.py')
    out_dir = os.path.join(a.folder, 'recipe')
    device = f'--device={a.device["device"]}'
    start = time.monotonic()
    a.run_well('train.py', *arguments, device, f'--target_val_loss={a.sizes.target}', f'--out_dir={out_dir}', cwd=cwd)
    records = [record for record in read_metrics(os.path.join(out_dir, FILE)) if 'val/loss' in record]
    best = min(records, key=lambda record: record['val/loss'])
    figures.update(target=a.sizes.target, validation_loss=best['val/loss'], iterations=best['iter'])
    figures.update(seconds_of_training=best['seconds'], seconds_in_all=time.monotonic() - start)
    require_that(best['val/loss'] <= a.sizes.target, f'the lowest validation loss is {best["val/loss"]:.4f}')
    return True


def chunked_loss(a: Acceptance, figures: dict):
    """The loss in chunks, and its gradients, against the loss whole, in float32; and what memory that saves."""
    sizes = dict(a.sizes.chunked)
    rows = sizes.pop('rows')
    result = until_it_fits(lambda n: a.probe('chunked', device=a.device['device'], rows=n, **sizes), rows)
    chunks, whole = result['chunked'], result['whole']
    off = abs(chunks['loss'] - whole['loss']) / abs(whole['loss'])
    figures.update(relative_loss_difference=off, relative_gradient_difference=result['difference'] / whole['gradient'])
    if whole['peak']:
        figures.update(peak_gib=chunks['peak'] / GIB, whole_peak_gib=whole['peak'] / GIB)
    figures['tolerance'] = 1e-4  # of float32's 1e-7, for sums over thousands of rows in another order
    worst = max(off, figures['relative_gradient_difference'])
    require_that(worst <= figures['tolerance'], f'chunked and whole are {worst:.2g} apart')
    return True


def dropout(a: Acceptance, figures: dict):
    """Dropout by its mean, in layers and in attention, and that a seed makes it repeatable."""
    dtype = a.device['dtype']
    result = a.probe('dropout', device=a.device['device'], dtype=dtype)
    rounding = 0.0 if dtype == 'float32' else 2**-8  # fused kernels for low precision take 8 random bits per weight
    sigmas = {m['of']: max(0.0, abs(m['mean'] - m['expected']) - rounding) / m['sigma'] for m in result['means']}
    figures.update(sigmas, unit='standard deviations off')
    figures['repeated_difference'] = difference(result['losses'], result['repeated'])
    require_that(max(sigmas.values()) <= SIGMAS, f'a mean is {max(sigmas.values()):.1f} standard deviations off')
    require_that(result['scale'] <= 1e-5, f'a factor is off by {result["scale"]:.2g}')
    require_that(figures['repeated_difference'] <= TOLERANCES[dtype], 'the same seed gives other losses')
    return True


def fsdp(a: Acceptance, figures: dict):
    """train.py --parallel=fsdp on one device has the losses of a plain run."""
    lengths = ['--max_iters=20', '--lr_decay_iters=20']
    a.run_well('train.py', *a.training('plain', *lengths))
    ended = a.run('train.py', *a.training('sharded', *lengths, '--parallel=fsdp'))
    if ended.status == 2 and ended.last_line().startswith('--parallel=fsdp: '):  # torch 2.6 on a CPU, and MPS
        raise Unavailable(ended.last_line())
    require_that(ended.status == 0, f'train.py ended with status {ended.status}: {ended.last_line()}')
    figures['difference'] = difference(a.losses_of('sharded'), a.losses_of('plain'))
    figures['tolerance'] = RUN_TOLERANCE[a.device['type']] or TOLERANCES['float32']  # its products have other shapes
    require_that(figures['difference'] <= figures['tolerance'], f'losses are {figures["difference"]:.2g} apart')
    return True


def decoding(a: Acceptance, figures: dict):
    """Tokens per second of 1, 10 and 64 samples at once, as written and compiled."""
    tokens = {}
    for compiled in (False, True) if a.compile else (False,):
        for n in (10, 64):
            measured = decode(a, n, f'--compile={compiled}')
            name = 'compiled, batch' if compiled else 'batch'
            figures.update({f'{name} {size}': measured[f'batch_{size}']['tokens_per_s'] for size in (1, n)})
            tokens[compiled, n] = measured[f'batch_{n}']['ids']
            require_that(measured.get('compiled', False) == compiled, 'torch.compile did not work')
        figures['unit'] = f'tokens/s, {measured["dtype"]}, {a.sizes.name}'
    for n in (10, 64) if a.compile else ():
        pairs = zip(tokens[False, n], tokens[True, n])
        figures[f'same tokens, batch {n}'] = next((i for i, (x, y) in enumerate(pairs) if x != y), len(tokens[True, n]))


def int8(a: Acceptance, figures: dict):
    """Tokens per second with 8-bit weights."""
    try:
        measured = decode(a, 10, '--quantize=int8', '--dtype=float32')
    except ChildFailed as error:
        if '--quantize=int8: runs on' in str(error):
            raise Unavailable(str(error).partition(': ')[2]) from error
        raise
    figures.update({f'batch {n}': measured[f'batch_{n}']['tokens_per_s'] for n in (1, 10)}, unit='tokens/s')


def decode(a, n, *arguments):
    """bench.py's figures of decoding n samples at once, and one."""
    return a.bench('--mode=decode', *a.sizes.model, *a.sizes.decode, f'--num_samples={n}', *arguments)


def compile_gain(a: Acceptance, figures: dict):
    """What torch.compile brings to a training step of GPT-2 124M, in turns with the step as written."""
    require_compiler(a)
    arguments = (*a.sizes.model, '--steps=20', '--max_seconds=20', '--compile=True', '--baseline=eager')
    measured = until_it_fits(lambda n: a.bench(*arguments, f'--batch_size={n}'), a.sizes.batch_size)
    figures.update(model=a.sizes.name, time_over_eager=measured['time_over_baseline'], **speed(measured))
    require_that(measured['compiled'], 'torch.compile did not work')


def largest_batch(a: Acceptance, figures: dict):
    """The largest batch of GPT-2 124M at block 1024 that fits, as written, in child processes."""
    fitting = figures.setdefault('fit', {})

    def fits(n):
        arguments = ('--steps=2', '--warmup_steps=1', '--compile=False', f'--batch_size={n}')
        try:
            measured = a.bench(*a.sizes.model, *arguments)
        except NoMemory:
            return False
        figures.update(model=a.sizes.name, **speed(measured))
        fitting[n] = figures['peak_gib']
        figures['largest_so_far'] = max(fitting)
        return True

    figures['tried'] = list(a.sizes.batch_sizes)
    figures['largest'] = largest_that(fits, a.sizes.batch_sizes)
    figures['all_fit'] = figures['largest'] == a.sizes.batch_sizes[-1]
    require_that(figures['largest'] is not None, 'not even one sequence fits')


def require_compiler(a):
    """Unavailable where nothing is to be compiled."""
    if not a.compile:
        raise Unavailable(f'on {a.device["type"]} only with --compile=True, as that takes minutes')


def speed(measured: dict) -> dict:
    """The figures of a training step by bench.py that belong into a table."""
    figures = {key: measured[key] for key in ('batch_size', 'seconds_per_step', 'tokens_per_s')}
    return {**figures, 'mfu': measured['share_of_peak'], 'peak_gib': (measured['peak_memory'] or math.nan) / GIB}


def until_it_fits(attempt: Callable[[int], dict], n: int) -> dict:
    """attempt(n), or with half of n, and so on, as long as the memory does not suffice. NoMemory if 1 is too much."""
    while True:
        try:
            return attempt(n)
        except NoMemory:
            if n == 1:
                raise
        n //= 2


def largest_that(fits: Callable[[int], bool], sizes: Iterable[int]) -> int | None:
    """The largest of ascending sizes that fits, None if none does, by bisection: what is larger than one that does not
    fit does not fit either."""
    sizes = list(sizes)
    n = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))  # as many fit
    return sizes[n - 1] if n else None


class Check(NamedTuple):
    """A check, and the seconds that it may take of USUAL_MINUTES; of more or less, it gets its share."""

    function: Callable[[Acceptance, dict], bool | None]
    seconds: float

    @property
    def name(self) -> str:
        """By which --checks= knows it."""
        return self.function.__name__


CHECKS = [  # the most important first: what does not fit into the time is left out
    Check(losses_float32, 90),
    Check(losses_bfloat16, 90),
    Check(losses_float16, 90),
    Check(resume, 90),
    Check(step, 150),
    Check(compiled_losses, 150),
    Check(recipe, 150),
    Check(chunked_loss, 60),
    Check(dropout, 60),
    Check(fsdp, 60),
    Check(decoding, 180),
    Check(compile_gain, 120),
    Check(largest_batch, 150),
    Check(int8, 45),
]
USUAL_MINUTES = 8.5
NO_TIME = 'skipped: no time left'


# --- run and report ---------------------------------------------------------------------------------------------------


@contextmanager
def temporary_folder():
    """A new folder, removed at the end of the block. tempfile.TemporaryDirectory would be removed at the end of a
    process that was forked within the block, too."""
    folder = tempfile.mkdtemp(prefix='samgpt-accept-')
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def accept(device: str, compile: str, minutes: float, report_dir: str, names: str = '') -> int:
    """Run the checks on a device, print a line each, and write report_dir/accept.json and accept.md -> exit status: 0
    if none failed or was left out for lack of time, else 1.

    device: as for --device=. compile: 'True', 'False', or 'auto', on CUDA. minutes: for everything. names: of checks,
    comma-separated; '': all. UserError for a device or check that does not exist, and a folder that cannot be written.
    """
    if os.environ.get('WORLD_SIZE', '1') != '1':
        raise UserError('--mode=accept: is for one device; start it by python, not by torchrun')
    checks = chosen(names)
    end = time.monotonic() + 60 * minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child outlives this process
    with user_errors(OSError, where=f'cannot write to --report_dir={report_dir}: '):
        os.makedirs(report_dir, exist_ok=True)
    with temporary_folder() as folder:
        a = Acceptance(folder, end=end, deadline=end, patience=minutes / USUAL_MINUTES)
        try:
            a.device = a.probe('describe', device=device)
        except ChildFailed as error:
            raise UserError(str(error).partition(': ')[2]) from None
        except OutOfTime:
            raise UserError(f'--minutes={minutes}: too few to ask the device for its name; give more') from None
        on_cuda = a.device['type'] == 'cuda'
        a.compile, a.sizes = compile == 'True' or compile == 'auto' and on_cuda, FULL if on_cuda else SMALL
        write_chain(os.path.join(folder, 'data', 'chain'))
        report = {
            'command': shlex.join(['python', *sys.argv]),
            'date': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime()),
        }
        report.update(machine=a.device, small=a.sizes is SMALL, minutes=minutes, checks=[])
        say(f'{a.device["name"]}, {a.device["type"]}, torch {a.device["torch"]}; {len(checks)} checks')
        for n, check in enumerate(checks, 1):
            record = run_check(check, a)
            report['checks'].append(record)
            write_report(report, report_dir)
            say(f'{n}/{len(checks)} {record["name"]}: {verdict(record)} ({record["seconds"]:.1f}s)  {in_words(record)}')
    bad = [record['name'] for record in report['checks'] if record['passed'] is False or record['error'] == NO_TIME]
    say(f'{"all well" if not bad else "not accepted: " + ", ".join(bad)}; see {os.path.join(report_dir, "accept.md")}')
    return 1 if bad else 0


def chosen(names: str) -> list[Check]:
    """The checks of these names, comma-separated, in the order of CHECKS; '': all. UserError for an unknown one."""
    wanted = {name.strip() for name in names.split(',') if name.strip()}
    known = [check.name for check in CHECKS]
    if wanted - set(known):
        raise UserError(f'--checks={names}: there is no {min(wanted - set(known))}; choose among {", ".join(known)}')
    return [check for check in CHECKS if not wanted or check.name in wanted]


def run_check(check: Check, a: Acceptance) -> dict:
    """Run a check, whatever happens in it -> {'name', 'what', 'passed': True, False, or None for figures alone,
    'figures', 'seconds', 'error': a line or None}."""
    start, passed, error, figures = time.monotonic(), None, None, {}
    a.deadline = min(a.end, start + a.patience * check.seconds)
    try:
        if start >= a.end:
            raise OutOfTime
        passed = check.function(a, figures)
    except Unavailable as reason:
        error = f'not available: {reason}'
    except OutOfTime as last:
        passed = None if a.deadline == a.end else False
        error = NO_TIME if passed is None else f'took more than {a.patience * check.seconds:.0f} s, in: {last}'
    except AssertionError as reason:
        passed, error = False, str(reason)
    except Exception as reason:  # of any kind: the other checks are still to come
        passed, error = False, str(reason) if isinstance(reason, ChildFailed) else f'{type(reason).__name__}: {reason}'
    seconds, what = time.monotonic() - start, one_line(check.function.__doc__)
    error = error and one_line(error, 400)
    return {'name': check.name, 'what': what, 'passed': passed, 'figures': figures, 'seconds': seconds, 'error': error}


def verdict(record: dict) -> str:
    """A record's result in a word or two."""
    if record['passed'] is None:
        return 'measured' if record['error'] is None else record['error'].partition(':')[0]
    return 'passed' if record['passed'] else 'FAILED'


def in_words(record: dict) -> str:
    """A record's error, and its figures but for those that are lists and tables, on one line."""
    flat = {key: value for key, value in record['figures'].items() if not isinstance(value, (dict, list))}
    figures = [f'{key.replace("_", " ")} {f"{x:.4g}" if isinstance(x, float) else x}' for key, x in flat.items()]
    return '. '.join(part for part in (record['error'], ', '.join(figures)) if part)


def write_report(report: dict, folder: str):
    """Write accept.json and accept.md. UserError if they cannot be written."""
    table = ['| check | result | seconds | figures |', '| --- | --- | --- | --- |']
    for record in report['checks']:
        cells = (record['what'], verdict(record), f'{record["seconds"]:.0f}', in_words(record))
        table.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')
    machine = {key: value for key, value in report['machine'].items() if value is not None}
    if 'memory' in machine:
        machine['memory'] = f'{machine["memory"] / GIB:.1f} GiB'
    facts = ', '.join(f'{key} {value}' for key, value in machine.items())
    text = [f'# {machine["name"]}', '', f'    {report["command"]}', '', f'{report["date"]}: {facts}.', '', *table, '']
    if report['small']:
        text += [
            'With small models in place of those named: this shows that the checks work, and nothing of the speed.',
            '',
        ]
    with user_errors(OSError, where=f'cannot write to --report_dir={folder}: '):
        with written_whole(os.path.join(folder, 'accept.json'), 'w') as file:
            json.dump(without_nan(report), file, indent=1)
        with written_whole(os.path.join(folder, 'accept.md'), 'w') as file:
            file.write('\n'.join(text))


def without_nan(value):
    """The value with None for each number that is NaN or infinite, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
