"""Which of two recipes reaches a validation loss sooner, and by how much.

python tools/compare.py                                 Shakespeare on a CPU: the plain recipe against the speedrun
python tools/compare.py --contender='config/mine.py --learning_rate=3e-3' --seeds=5
python tools/compare.py --command='cd ../nanoGPT && python train.py config/train_shakespeare_char.py' \\
    --contender=config/speedrun_shakespeare_char.py --target=1.47

What is timed is the whole command as it is shipped, from the start of its process to its end: imports, data,
compilation, training, evaluation, saving. With each seed, in turns, both run with an empty compiler cache, then again
with what that run left in it. Seconds of training alone (data, forward, backward, optimizer) are reported too. The loss
at the end is over the whole validation split, by evaluate.py, when the clock has stopped.

--command= takes the baseline's place: anything that prints lines like nanoGPT's, 'step 250: train loss 1.9012, val loss
2.0345'. Its loss at the end is that of its last line, over whatever it evaluates.
"""

import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common.errors import UserError, one_line, user_errors
from common.figure import new_figure, save_figure
from common.tracking import FILE, read_metrics
from configurator import configure, require

baseline = 'config/train_shakespeare_char_cpu.py'  # arguments of train.py
contender = 'config/speedrun_shakespeare_char_cpu.py'  # arguments of train.py
command = ''  # in the baseline's place: a shell command that prints nanoGPT's lines; {seed} in it stands for the seed
target = 1.8987  # validation loss to be at or below at the end
seeds = 3  # runs of each with a cold and with a warm cache
first_seed = 1337  # the others follow
out_dir = 'out-speedrun'  # folder for the runs' folders
output = ''  # PNG of loss against time; '': speedrun.png in out_dir
config = configure(globals(), paths=('out_dir', 'output'))

EVALUATION = re.compile(r'step (\d+): (?:train loss \S+, )?val loss ([\w.]+)')  # a line of train.py, ours and nanoGPT's

require(config, 'seeds', 'at least 1', lambda v: v >= 1)
require(config, 'first_seed target', '0 or more', lambda v: 0 <= v < math.inf)
output = output or os.path.join(out_dir, 'speedrun.png')
if not output.endswith('.png'):
    raise UserError(f'--output={output}: must end in .png')
xlabel = 'time since the start of the process (s); each curve ends with its process'
axes = new_figure(xlabel, 'validation loss (nats per token)')  # fails now if matplotlib is missing
recipes = {}  # arguments of train.py
for name in ('baseline', 'contender'):
    with user_errors(ValueError, where=f'--{name}={config[name]}: '):
        recipes[name] = shlex.split(config[name])
titles = {'baseline': (command or baseline).replace('|', r'\|'), 'contender': contender}
with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
    os.makedirs(out_dir, exist_ok=True)


class Run(NamedTuple):
    """What came of one process. Its curve's points are its evaluations."""

    seconds: float  # from the start to the end of the process
    curve: list  # [(seconds since its start, validation loss)]
    iters: int  # iterations until the last evaluation
    training: float  # seconds of training alone until then; nan if unknown
    loss: float  # at the end

    @property
    def reached(self):
        """Whether it ended at the target."""
        return self.loss <= target


# --- run --------------------------------------------------------------------------------------------------------------
def train(name, seed, cache):
    """Run the baseline or the contender once -> Run. cache: as in timed(). UserError if it fails."""
    folder = os.path.join(out_dir, f'{name}-{seed}')
    foreign = bool(command) and name == 'baseline'
    if foreign:
        process = command.replace('{seed}', str(seed))
    else:
        process = [
            sys.executable,
            os.path.join(ROOT, 'train.py'),
            *recipes[name],
            f'--seed={seed}',
            f'--out_dir={folder}',
        ]
    shown = process if foreign else f'train.py {shlex.join(recipes[name])}'

    seconds, lines = timed(process, cache, shown)
    evaluations = [(at, *found.groups()) for at, line in lines if (found := EVALUATION.match(line))]
    if not evaluations:
        raise UserError(f"{shown} printed no line such as 'step 250: train loss 1.9012, val loss 2.0345'")
    times, iters, losses = zip(*((at, int(iters), float(loss)) for at, iters, loss in evaluations))
    training, loss = math.nan, losses[-1]
    if not foreign:
        if not any(line.startswith('done: ') for _, line in lines):
            raise UserError(f'{shown} trained nothing: leave out --eval_only=True and the like')
        records = [record for record in read_metrics(os.path.join(folder, FILE)) if 'val/loss' in record]
        losses = [record['val/loss'] for record in records[-len(times) :]]  # with more digits
        training = records[-1]['seconds']
        evaluate = [sys.executable, os.path.join(ROOT, 'evaluate.py'), f'--out_dir={folder}']
        _, lines = timed(evaluate, cache, 'evaluate.py')
        loss = next(float(found.group(1)) for _, line in lines if (found := re.search(r': loss ([\d.]+),', line)))
    return Run(seconds, list(zip(times, losses)), iters[-1], training, loss)


def timed(process, cache, shown):
    """Run a process -> (its seconds, [(seconds since its start, line that it printed)]). UserError if it fails.

    process: its arguments, or a command of the shell; `shown` in an error. cache: a folder for what torch compiles.
    """
    temporary = os.path.dirname(cache)  # torch keeps compiled C++ headers there, whatever its cache
    caches = {'TORCHINDUCTOR_CACHE_DIR': cache, 'TRITON_CACHE_DIR': os.path.join(cache, 'triton'), 'TMPDIR': temporary}
    env = {**os.environ, **caches, 'PYTHONUNBUFFERED': '1'}  # lines arrive as they are printed
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True, 'errors': 'replace'}
    start = time.perf_counter()
    with subprocess.Popen(process, shell=isinstance(process, str), env=env, **pipes) as running:
        lines = [(time.perf_counter() - start, line.strip()) for line in running.stdout if line.strip()]
    seconds = time.perf_counter() - start
    if running.returncode:
        last = lines[-1][1].removeprefix('error: ') if lines else 'no word of why'
        raise UserError(f'{shown} ended with status {running.returncode}: {one_line(last[-400:])}')
    return seconds, lines


runs = {name: {'cold': [], 'warm': []} for name in recipes}
for seed in range(first_seed, first_seed + seeds):
    folder = os.path.abspath(os.path.join(out_dir, f'cache-{seed}'))
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    for state in ('cold', 'warm'):
        for name in recipes:
            cache, results = os.path.join(folder, name, 'compiled'), runs[name]
            os.makedirs(os.path.dirname(cache), exist_ok=True)
            compiles = state == 'cold' or any(files for _, _, files in os.walk(cache))
            run = train(name, seed, cache) if compiles else results['cold'][-1]
            results[state].append(run)
            training = '' if math.isnan(run.training) else f', {run.training:.2f}s of it training'
            print(
                f'{name}, seed {seed}, {state}{"" if compiles else " (compiles nothing: the same run)"}: '
                f'{run.seconds:.2f}s{training}; {"" if run.reached else "not "}at '
                f'{target} after {run.iters} iterations, {run.loss:.4f} at the end',
                flush=True,
            )
    shutil.rmtree(folder)

# --- report -----------------------------------------------------------------------------------------------------------
MEASURES = ('whole command, cold cache', 'whole command, warm cache', 'training alone')


def measures(name):
    """The seconds of each run -> a list for each of MEASURES."""
    cold, warm = runs[name]['cold'], runs[name]['warm']
    return [run.seconds for run in cold], [run.seconds for run in warm], [run.training for run in warm]


def spread(values, digits, unit=''):
    """'median (lowest to highest)', the unit after the median; 'unknown' if they are nan."""
    if any(map(math.isnan, values)):
        return 'unknown'
    return f'{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})'


ratios = [[b / a for a, b in zip(*pair)] for pair in zip(measures('baseline'), measures('contender'))]
for measure, values in zip(MEASURES, ratios):
    known = 'unknown' if math.isnan(values[0]) else ', '.join(f'{value:.3f}' for value in values)
    print(f'contender / baseline in each turn, {measure}: {known}')
print()
print('| | ' + ' | '.join(('runs at the target', 'iterations', 'validation loss at the end', *MEASURES)) + ' |')
print('| --- | --- | --- | --- | --- | --- | --- |')
for name, title in titles.items():
    warm = runs[name]['warm']
    reached = f'{sum(run.reached for run in warm)} of {seeds} at {target}'
    iters, losses = spread([run.iters for run in warm], 0), spread([run.loss for run in warm], 4)
    print(f'| `{title}` | {reached} | {iters} | {losses} | {" | ".join(spread(v, 1, " s") for v in measures(name))} |')
print(f'| contender / baseline, each turn | | | | {" | ".join(spread(values, 3) for values in ratios)} |')
print()

# --- plot -------------------------------------------------------------------------------------------------------------
for n, (name, results) in enumerate(runs.items()):
    for state, line in (('cold', ':'), ('warm', '-')):
        for i, run in enumerate(results[state]):
            label = None if i else f'{name}, {state} cache: {textwrap.shorten(titles[name], 70)}'  # one for all seeds
            times, losses = zip(*run.curve, (run.seconds, run.loss))
            axes.plot(times, losses, line, color=f'C{n}', alpha=0.7, marker='o', markersize=2, label=label)
axes.axhline(target, color='gray', linestyle='--', linewidth=0.8, label=f'{target}')
save_figure(axes, output, legend_size='small')
