"""Check a run before it starts: is the data sound, does the model learn, can a save be resumed, does the disk suffice?

python check.py config/train_shakespeare_char_cpu.py --batch_size=32      what train.py would be given
torchrun --standalone --nproc_per_node=2 check.py config/train_gpt2.py    also on several ranks

One line for each check: ok, warning, or error and what to do. Exit status 2 if there is an error. It runs train.py up
to its loop and then looks at small batches; it writes to a folder of its own, which it removes.
"""

import atexit
import io
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from json import dumps

from common.distributed import end, find_ranks
from common.errors import UserError, leave, say, user_errors
from common.files import remove_locks
from common.tracking import chosen_trackers
from configurator import configure, require
from model import GPTConfig
from preflight.checks import (
    Batch,
    check_by_heart,
    check_causality,
    check_clocks,
    check_disk,
    check_epochs,
    check_first_loss,
    check_gradients,
    check_learning_rate,
    check_links,
    check_loss,
    check_optimizer_groups,
    check_save,
    check_schedule,
    check_targets,
    check_weights,
    folder_beside,
    link_saves,
    set_up,
    try_steps,
)
from preflight.datachecks import (
    Finding,
    check_documents,
    check_ids,
    check_leak,
    check_splits,
    check_tokenizer,
    count_ids,
)

json = False  # print one JSON object in place of lines
max_tokens = 2**26  # tokens of each split to look at; a larger one is looked at in evenly spaced pieces
max_passages = 2**16  # passages of val to look for in train
PATHS = ('out_dir', 'init_from', 'eval_tasks_path')
config = configure(globals(), fields=GPTConfig, recipe='train.py', recipe_flags=True, paths=PATHS)
require(config, 'max_tokens max_passages', 'at least 1000', lambda v: v >= 1000)
recipe = config.recipe
if not recipe['eval_only']:
    chosen_trackers(recipe)  # a missing package is an error; none of them is started
findings, ranks = [], find_ranks()


def report(*found: Finding):
    """Keep findings, and print each as a line."""
    findings.extend(found)
    for finding in found if not json else ():
        say(f'{finding.level:8} {finding.check:14} {": ".join(filter(None, finding[2:]))}')


class Warnings(io.TextIOBase):
    """A stream that keeps lines of warnings, and passes all others on to standard error."""

    def __init__(self):
        self.kept, self.line, self.target = [], '', sys.stderr

    def write(self, text):
        *lines, self.line = (self.line + text).split('\n')
        for line in lines:
            if line.startswith('warning: '):
                self.kept.append(line.removeprefix('warning: '))
            else:
                print(line.replace(folder, out_dir), file=self.target, flush=True)
        return len(text)


def clean_up():
    """Remove the check's own folder."""
    if ranks.is_main:
        remove_locks()  # Windows removes no open files
        shutil.rmtree(folder, ignore_errors=True)


def finish():
    """Print the JSON object, and end with the status that the findings ask for."""
    errors = ranks.gather(sum(finding.level == 'error' for finding in findings))[0]  # the main rank has all
    clean_up()
    warnings = sum(finding.level == 'warning' for finding in findings)
    if json:
        say(dumps({'errors': errors, 'warnings': warnings, 'findings': [f._asdict() for f in findings]}, indent=1))
    else:
        say(f'{len(findings)} checks: {errors} errors, {warnings} warnings')
    end(ranks, 2 if errors else 0)


# --- train.py up to its loop, in a folder beside out_dir --------------------------------------------------------------
out_dir, folder = recipe['out_dir'], folder_beside(recipe['out_dir'])
if ranks.is_main:
    with user_errors(OSError, where=f'cannot make {folder} (remove it, if a check that was killed has left it): '):
        os.mkdir(folder)
    atexit.register(clean_up)
    signal.signal(signal.SIGTERM, lambda *_: leave(128 + signal.SIGTERM))  # else that would not be called
    if recipe['init_from'] in ('resume', 'auto'):
        link_saves(out_dir, folder)
changes = {'out_dir': folder, 'keep_saves': 1, 'trackers': (), 'wandb_log': False, 'compile': 'False'}
if recipe['eval_only']:
    changes |= {'eval_only': False, 'uneven': True}  # else train.py would evaluate, and end
heard = Warnings()
try:
    with redirect_stdout(heard), redirect_stderr(heard):
        run = set_up(recipe, **changes)
except UserError as error:
    if ranks.world_size > 1:
        raise  # the other ranks wait
    report(Finding('settings', 'error', str(error).replace(folder, out_dir)))
    finish()
report(*(Finding('settings', 'warning', text) for text in heard.kept))

# --- the data: one rank looks at it -----------------------------------------------------------------------------------
if ranks.is_main:
    counts = {split: count_ids(tokens, run.n_ids, max_tokens) for split, tokens in run.splits.items()}
    report(check_ids(counts), check_splits(counts), check_tokenizer(run.data, run.splits, counts))
    report(check_leak(run.splits['train'], run.splits['val'], max_passages, max_tokens))
    report(check_documents(run.data, run.splits, max_tokens))

# --- the run: all ranks, together -------------------------------------------------------------------------------------
batches = [Batch(run.x, run.y, run.starts), *(Batch(*run.batches.next()[:3]) for _ in range(2))]
training = not recipe['eval_only']
if training:
    report(check_schedule(run), check_epochs(run))
report(check_targets(run, batches), check_weights(run))
if findings[-1].level == 'error':
    finish()
report(check_first_loss(run, batches[0]))
if training:
    trial = try_steps(run, batches)
    report(check_gradients(run, trial), check_optimizer_groups(run, trial), check_learning_rate(run, trial))
    if not trial.unused:
        report(check_by_heart(run, batches[0]))
    report(check_links(run))
report(check_loss(run, batches[0]), check_causality(run, batches[0]))  # of a model that has learned something
if training:
    report(check_clocks(run, folder))
    resume = partial(set_up, recipe, **{**changes, 'init_from': 'resume'})
    try:
        with redirect_stdout(io.StringIO()) as again, redirect_stderr(again):  # train.py repeats what it said
            saved, size = check_save(run, resume, folder)
        report(saved)
        if ranks.is_main:
            report(check_disk(recipe, out_dir, folder, size))
    except UserError as error:
        if ranks.world_size > 1:
            raise
        report(Finding('save', 'error', str(error).replace(folder, out_dir)))
finish()
