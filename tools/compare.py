"""Which of two recipes reaches a validation loss sooner, and by how much.

python tools/compare.py                                 Shakespeare on a CPU: the plain recipe against the speedrun
python tools/compare.py --contender='config/mine.py --learning_rate=3e-3' --seeds=5
python tools/compare.py --baseline=config/train_shakespeare_char.py \\
    --contender=config/speedrun_shakespeare_char.py --target=1.47

Both train with the same seeds, taking turns, each run in a process of its own. The clock runs only in training: data,
forward, backward, optimizer. It stops for start-up, evaluation, saving and logging; a second figure adds compilation.
The loss is over the whole validation split.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys
import textwrap

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common.errors import UserError, one_line, user_errors
from common.figure import new_figure, save_figure
from common.tracking import FILE, read_metrics
from configurator import configure, require

baseline = 'config/train_shakespeare_char_cpu.py'  # arguments of train.py
contender = 'config/speedrun_shakespeare_char_cpu.py'  # arguments of train.py
target = 1.8987  # validation loss to reach; a run that does not reach it counts with its whole time
seeds = 3  # runs of each
first_seed = 1337  # the others follow
out_dir = 'out-speedrun'  # folder for the runs' folders
output = ''  # PNG of loss against time; '': speedrun.png in out_dir
config = configure(globals(), paths=('out_dir', 'output'))

require(config, 'seeds', 'at least 1', lambda v: v >= 1)
require(config, 'first_seed target', '0 or more', lambda v: v >= 0)
output = output or os.path.join(out_dir, 'speedrun.png')
if not output.endswith('.png'):
    raise UserError(f'--output={output}: must end in .png')
axes = new_figure('training time (s)', 'validation loss (nats per token)')  # fails now if matplotlib is missing
recipes = {}  # arguments of train.py
for name in ('baseline', 'contender'):
    with user_errors(ValueError, where=f'--{name}={config[name]}: '):
        recipes[name] = shlex.split(config[name])
with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
    os.makedirs(out_dir, exist_ok=True)


def train(name, seed):
    """Train once -> what came of it, a dict.

    curve: [(seconds, validation loss)]
    reached: whether it reached the target
    seconds, iters: training until the target, or until the end if it was not reached
    compilation: seconds
    end, loss: seconds of training in all, and the last validation loss
    """
    folder = os.path.join(out_dir, f'{name}-{seed}')
    arguments = [*recipes[name], f'--seed={seed}', f'--out_dir={folder}', '--eval_iters=0']
    result = subprocess.run(
        [sys.executable, os.path.join(ROOT, 'train.py'), *arguments], capture_output=True, text=True
    )
    recipe = shlex.join(recipes[name])
    if result.returncode:
        errors = result.stderr.strip().removeprefix('error: ')
        raise UserError(f'train.py {recipe} ended with status {result.returncode}: {one_line(errors[-400:])}')
    if 'done: ' not in result.stdout:
        raise UserError(f'train.py {recipe} trained nothing: leave out --eval_only=True and the like')
    evaluations = [r for r in read_metrics(os.path.join(folder, FILE)) if 'val/loss' in r]
    if evaluations[0]['val/loss'] <= target:
        raise UserError(f'--target={target}: {recipe} reaches it before its first iteration')
    hit = next((r for r in evaluations if r['val/loss'] <= target), evaluations[-1])
    compilation = re.search(r'compilation ([\d.]+)s', result.stdout)
    run = {
        'curve': [(r['seconds'], r['val/loss']) for r in evaluations],
        'reached': hit['val/loss'] <= target,
        'seconds': hit['seconds'],
        'iters': hit['iter'],
        'compilation': float(compilation.group(1)) if compilation else 0.0,
        'end': evaluations[-1]['seconds'],
        'loss': evaluations[-1]['val/loss'],
    }
    print(
        f'{name}, seed {seed}: {"" if run["reached"] else "not "}at {target} after {run["iters"]} iterations, '
        f'{run["seconds"]:.2f}s; {run["loss"]:.4f} at its end after {run["end"]:.2f}s; '
        f'compilation {run["compilation"]:.1f}s',
        flush=True,
    )
    return run


def spread(values, digits, unit=''):
    """'median (lowest to highest)', the unit after the median."""
    return f'{statistics.median(values):.{digits}f}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})'


# --- train ------------------------------------------------------------------------------------------------------------
runs = {name: [] for name in recipes}
for seed in range(first_seed, first_seed + seeds):
    for name in recipes:
        runs[name].append(train(name, seed))

# --- report -----------------------------------------------------------------------------------------------------------
for name, results in runs.items():
    reached = sum(run['reached'] for run in results)
    seconds, iters, end = ([run[key] for run in results] for key in ('seconds', 'iters', 'end'))
    compiled = [run['seconds'] + run['compilation'] for run in results]
    losses = [run['loss'] for run in results]
    print(
        f'{name}, {config[name]}: {reached} of {seeds} at {target}; '
        f'{spread(seconds, 2, "s")}, {spread(iters, 0, " iterations")}; with compilation {spread(compiled, 2, "s")}; '
        f'loss at the end {spread(losses, 4)} after {spread(end, 2, "s")}'
    )
pairs = list(zip(runs['baseline'], runs['contender']))
ratios = [b['seconds'] / a['seconds'] for a, b in pairs]
compiled_ratios = [(b['seconds'] + b['compilation']) / (a['seconds'] + a['compilation']) for a, b in pairs]
print(f'time of the contender over that of the baseline: {spread(ratios, 3)}')
print(f'time of the contender over that of the baseline with compilation: {spread(compiled_ratios, 3)}')

# --- plot -------------------------------------------------------------------------------------------------------------
for n, (name, results) in enumerate(runs.items()):
    for i, run in enumerate(results):
        label = None if i else f'{name}: {textwrap.shorten(config[name], 70)}'  # one label for all seeds
        axes.plot(*zip(*run['curve']), color=f'C{n}', alpha=0.7, marker='o', markersize=2, label=label)
axes.axhline(target, color='gray', linestyle='--', linewidth=0.8, label=f'{target}')
save_figure(axes, output, legend_size='small')
