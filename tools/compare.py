"""Which of two recipes is sooner at a validation loss, and by how much.

    python tools/compare.py                                                 the CPU recipe for Shakespeare against its speedrun
    python tools/compare.py --baseline=config/train_shakespeare_char.py --contender=config/speedrun_shakespeare_char.py --target=1.47
    python tools/compare.py --contender='config/mine.py --learning_rate=3e-3' --seeds=5

The two train in turns, with one seed after the other, each as a process of its own. The clock runs while they train: forward,
data, backward, optimizer; it stands while they start, compile, evaluate, save and log. Compilation is told apart, and counted in
a second figure. The loss is that of the whole validation split.
"""

import os
import re
import shlex
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.errors import UserError, one_line, user_errors
from common.tracking import FILE, read_metrics
from configurator import configure, require

baseline = 'config/train_shakespeare_char_cpu.py'  # arguments of train.py
contender = 'config/speedrun_shakespeare_char_cpu.py'  # arguments of train.py
target = 1.8987  # validation loss to reach; a run that does not reach it counts with all its time
seeds = 3  # runs of each
first_seed = 1337  # the others follow
out_dir = 'out-speedrun'  # folder of the runs' folders
output = ''  # PNG of loss against time; speedrun.png in out_dir unless given
config = configure(globals(), paths=('out_dir', 'output'))

require(config, lambda v: v >= 1, 'at least 1', 'seeds')
require(config, lambda v: v >= 0, '0 or more', 'first_seed', 'target')
output = output or os.path.join(out_dir, 'speedrun.png')
if not output.endswith('.png'):
    raise UserError(f'--output={output}: must end in .png')
try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError('the plot needs the package matplotlib: pip install matplotlib') from error


def train(name, seed):
    """Train once -> what came of it: curve [(seconds, loss)], seconds and updates to the target, compilation, last loss."""
    folder = os.path.join(out_dir, f'{name}-{seed}')
    script = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'train.py')
    arguments = shlex.join(recipes[name])
    command = [sys.executable, script, *recipes[name], f'--seed={seed}', f'--out_dir={folder}', '--eval_iters=0']
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        errors = result.stderr.strip().removeprefix('error: ')
        raise UserError(f'train.py {arguments} ended with status {result.returncode}: {one_line(errors[-400:])}')
    if 'done: ' not in result.stdout:
        raise UserError(f'train.py {arguments} trained nothing: leave out what keeps it from it')
    evaluations = [r for r in read_metrics(os.path.join(folder, FILE)) if 'val/loss' in r]
    if evaluations[0]['val/loss'] <= target:
        raise UserError(f'--target={target}: {arguments} is there before its first update')
    at = next((r for r in evaluations if r['val/loss'] <= target), evaluations[-1])
    compilation = re.search(r'compilation ([\d.]+)s', result.stdout)
    run = {
        'curve': [(r['seconds'], r['val/loss']) for r in evaluations],
        'reached': at['val/loss'] <= target,
        'seconds': at['seconds'],
        'iters': at['iter'],
        'compilation': float(compilation.group(1)) if compilation else 0.0,
        'end': evaluations[-1]['seconds'],
        'loss': evaluations[-1]['val/loss'],
    }
    print(
        f'{name}, seed {seed}: {"" if run["reached"] else "not "}at {target} after {run["iters"]} updates, {run["seconds"]:.2f}s; '
        f'{run["loss"]:.4f} at its end after {run["end"]:.2f}s; compilation {run["compilation"]:.1f}s',
        flush=True,
    )
    return run


def spread(values, digits):
    """'median (lowest to highest)'."""
    return f'{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'


with user_errors(OSError, where=f'cannot write to --out_dir={out_dir}: '):
    os.makedirs(out_dir, exist_ok=True)
recipes = {}  # arguments of train.py
for name in ('baseline', 'contender'):
    with user_errors(ValueError, where=f'--{name}={config[name]}: '):
        recipes[name] = shlex.split(config[name])
runs = {name: [] for name in recipes}
for seed in range(first_seed, first_seed + seeds):
    for name in recipes:
        runs[name].append(train(name, seed))

for name, its in runs.items():
    print(
        f'{name}, {config[name]}: {sum(run["reached"] for run in its)} of {seeds} at {target}; '
        f'{spread([run["seconds"] for run in its], 2)}s, {spread([run["iters"] for run in its], 0)} updates; '
        f'with compilation {spread([run["seconds"] + run["compilation"] for run in its], 2)}s; '
        f'loss at the end {spread([run["loss"] for run in its], 4)} after {spread([run["end"] for run in its], 2)}s'
    )
pairs = list(zip(runs['baseline'], runs['contender']))
for words, key in (
    ('', lambda run: run['seconds']),
    (' with compilation', lambda run: run['seconds'] + run['compilation']),
):
    print(f'time of the contender over that of the baseline{words}: {spread([key(b) / key(a) for a, b in pairs], 3)}')

figure = Figure(figsize=(8, 5), dpi=120)
FigureCanvasAgg(figure)
axes = figure.add_subplot()
for n, (name, its) in enumerate(runs.items()):
    for i, run in enumerate(its):
        axes.plot(
            *zip(*run['curve']),
            color=f'C{n}',
            alpha=0.7,
            marker='o',
            markersize=2,
            label=None if i else f'{name}: {config[name]}',
        )
axes.axhline(target, color='gray', linestyle='--', linewidth=0.8, label=f'{target}')
axes.set_xlabel('training time (s)')
axes.set_ylabel('validation loss (nats a token)')
axes.grid(alpha=0.3)
for text in axes.legend(fontsize='small').get_texts():
    text.set_parse_math(False)
figure.tight_layout()
with user_errors(OSError, ValueError, where=f'cannot write {output}: '):
    figure.savefig(output)
print(f'wrote {output}')
