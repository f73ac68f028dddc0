"""Saving the state of a run so that a crash, a full disk or a lost rank loses nothing.

The files are described in common/checkpoint.py. Each is written under another name, flushed to the disk and renamed,
ckpt.pt or ckpt.json last.
"""

import errno
import json
import os
import re
import threading
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist

from common.checkpoint import (
    BEST,
    BEST_PARTS,
    KEPT,
    LATEST,
    LATEST_PARTS,
    STATE,
    has_run,
    link,
    load_data,
    read_record,
    remove,
)
from common.distributed import waiting_limit
from common.errors import UserError, one_line, warn
from common.files import flush_folder, replace, written_whole
from common.sharded import end_unless_main, host_copy, part, same_memory


class Saver:
    """Saves a run in out_dir, one save at a time."""

    def __init__(self, out_dir: str, ranks, sharded: bool, asynchronous=False, keep: int = 1, timeout=None, start=None):
        """Every rank makes one, at the same time.

        ranks: Ranks. sharded: save in parts, each rank its own. asynchronous: write while training goes on.
        keep: the last so many saves stay. timeout: seconds after which a rank that hangs in a save ends the job.
        start: the iteration from which the run continues; kept saves beyond it are of a future that it went back from.
        """
        self.out_dir, self.ranks, self.keep = out_dir, ranks, keep
        self.sharded, self.asynchronous = sharded, asynchronous
        self.thread = None  # that writes, while training goes on
        self.error = None  # why it failed, until that is told
        self.iter_num = None  # of ckpt.pt, if this process wrote it
        self.abandoned = set()  # names of saves beyond the start, to be removed when there is a new one
        with suppress(OSError):
            self.abandoned.update(name for name in self.kept() if start is not None and iteration_of(name) > start)
        self.group = None  # of the thread's messages, which must not mix with those of training
        if asynchronous and sharded and ranks.world_size > 1:
            self.group = dist.new_group(backend='gloo', timeout=waiting_limit(timeout) if timeout else None)

    def save(self, state: dict, optimizer: dict, is_best: bool):
        """Save a run: as ckpt.pt or ckpt.json and, with is_best, as ckpt_best too. Every rank calls it.

        state: {'model': {name: tensor}, 'iter_num': int, …}, plain data otherwise; complete on the main rank.
        optimizer: {'optimizer': state_dict, …}.
        UserError on the main rank if the disk is full or the folder is gone; other ranks then end quietly. The previous
        save is still complete. If asynchronous, the next save warns of it instead, and training goes on.
        """
        self.wait()
        self.report(fatal=False)
        if self.sharded:
            write = self.in_parts(state, optimizer, is_best)
        elif self.ranks.is_main:
            write = self.in_files(state, optimizer, is_best)
        else:
            return
        if self.asynchronous:
            self.thread = threading.Thread(target=self.attempt, args=(write,), name='save')
            self.thread.start()
        else:
            self.attempt(write)
            self.report(fatal=True)

    def finish(self):
        """Wait for a save that is under way. UserError if it failed, as in a save that is not asynchronous."""
        self.wait()
        self.report(fatal=True)

    def wait(self):
        if self.thread:
            self.thread.join()
            self.thread = None

    def attempt(self, write):
        """Call write() and keep its exception, for `report`."""
        try:
            write()
        except BaseException as error:
            self.error = error

    def report(self, fatal: bool):
        """Tell of a save that failed; if fatal, end all ranks, of which one prints why."""
        error, self.error = self.error, None
        if error is None:
            return
        if not isinstance(error, OSError if self.sharded else (OSError, RuntimeError)):
            raise error  # a bug, or a lost rank
        previous = 'the previous save is still complete' if has_run(self.out_dir) else 'there is no earlier save'
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = f'cannot save to {self.out_dir}, {previous}: {one_line(text)}'
        if not fatal:
            warn(f'{text}; training goes on, and the next save will try again')
        else:
            end_unless_main(self.ranks.rank)
            raise UserError(text) from error

    # --- one device and ddp: ckpt.pt ----------------------------------------------------------------------------------

    def in_files(self, state: dict, optimizer: dict, is_best: bool):
        """What writes a save as ckpt.pt: the optimizer's file, ckpt_best.pt, ckpt.pt; then it removes old files."""
        iter_num = state['iter_num']
        optimizer_file = f'ckpt_optimizer_{iter_num:08d}.pt'
        if self.asynchronous:
            state, optimizer = host_copy((state, optimizer))
        contents = {optimizer_file: optimizer}
        if is_best:
            contents[BEST] = state
        contents[LATEST] = {**state, 'optimizer_file': optimizer_file}

        def write():
            self.keep_previous()
            for name, content in contents.items():
                with written_whole(self.path(name)) as file:
                    save(content, file)
            self.iter_num = iter_num
            self.remove_if_there(LATEST_PARTS, *[BEST_PARTS] * is_best)
            self.tidy(self.keep - 1, optimizer_file)

        return write

    def keep_previous(self):
        """With `keep`, give the ckpt.pt that is about to go a second name, ckpt_00001000.pt.

        Not earlier: while two names share a file, `cp other.pt ckpt.pt` writes into both.
        """
        path = self.path(LATEST)
        if self.keep < 2 or not os.path.exists(path):
            return
        with suppress(UserError, KeyError, TypeError, ValueError):  # not a checkpoint of ours
            if self.iter_num is None:  # an earlier process wrote it
                self.iter_num = load_data(path, mmap=True)['iter_num']
            if os.path.exists(self.path(f'ckpt_optimizer_{self.iter_num:08d}.pt')):
                kept = f'ckpt_{self.iter_num:08d}.pt'
                self.remove_if_there(kept + '.part')
                link(path, self.path(kept + '.part'))
                replace(self.path(kept + '.part'), self.path(kept))

    # --- sharded: a folder and ckpt.json ------------------------------------------------------------------------------

    def in_parts(self, state: dict, optimizer: dict, is_best: bool):
        """What writes a save as a folder of parts, and then ckpt.json. A collective, as is what it returns."""
        from common.parts import write_parts

        names, weights = list(state['model']), list(state['model'].values())
        decided = [0.0] * (1 + len(names))
        if self.ranks.is_main:
            decided = [self.free_number(state['iter_num']), *same_memory(weights)]
        number, *first = map(int, self.ranks.sum(decided))  # the main rank decides for all
        folder = self.path(folder_name(state['iter_num'], number))
        tensors = {f'model.{names[i]}': weights[i] for i in sorted(set(first))}  # tied weights once
        plain = {}  # the optimizer's state without these tensors: counts of steps, which all ranks have
        for index, buffers in optimizer['optimizer'].get('state', {}).items():
            for name, value in buffers.items():
                if torch.is_tensor(value) and value.dim():
                    tensors[f'optimizer.{index}.{name}'] = value
                else:
                    plain.setdefault(index, {})[name] = part(value) if torch.is_tensor(value) else value
        content = {**state, **optimizer, 'model': {name: names[i] for name, i in zip(names, first)}}
        content['optimizer'] = {**optimizer['optimizer'], 'state': plain}
        copies = None
        if self.asynchronous:
            copies, content = host_copy((tensors, content))

        def write():
            try:
                write_parts(folder, tensors, partial(self.commit, folder, content, is_best), self.group, copies)
            except BaseException:
                if self.ranks.is_main:
                    self.discard(folder)
                raise
            if self.ranks.is_main:
                with suppress(OSError):  # what is not kept or removed now changes nothing about this save
                    self.keep_previous()
                self.remove_if_there(LATEST, *[BEST] * is_best)
                self.tidy(self.keep)

        return write

    def free_number(self, iter_num: int) -> int:
        """A number that no folder of this iteration has. First removes what saves that were cut short left behind."""
        with suppress(OSError):  # without a folder, writing will fail and say why
            for name in self.kept():
                if os.path.isdir(self.path(name)) and not os.path.exists(self.path(name, LATEST_PARTS)):
                    remove(self.path(name))
        number = 1
        while os.path.exists(self.path(folder_name(iter_num, number))):
            number += 1
        return number

    def commit(self, folder: str, content: dict, is_best: bool, sizes: dict[str, int]):
        """Write the rest of a save whose parts are on the disk: state.pt, and the files that say that it is there.

        sizes: of the parts. OSError if a part is not where this rank, the main one, can see it.
        """
        for name, size in sizes.items():
            path = os.path.join(folder, name)
            if not os.path.exists(path) or os.path.getsize(path) < size:
                raise OSError(f'{path}, the part of a rank, is not here; all nodes need a disk that they share')
        with written_whole(os.path.join(folder, STATE)) as file:
            save(content, file)
        files = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}
        record = {'folder': os.path.basename(folder), 'iter_num': content['iter_num'], 'files': files}
        flush_folder(self.out_dir)  # the folder itself
        paths = [os.path.join(folder, LATEST_PARTS), *[self.path(BEST_PARTS)] * is_best, self.path(LATEST_PARTS)]
        for path in paths:
            with written_whole(path, 'w') as file:
                json.dump(record, file)

    def discard(self, folder: str):
        """Remove the folder of a save that failed, unless it has become the best one."""
        with suppress(OSError, UserError):
            if os.path.basename(folder) not in self.in_use():
                remove(folder)

    # --- what earlier saves left --------------------------------------------------------------------------------------

    def path(self, *names: str) -> str:
        return os.path.join(self.out_dir, *names)

    def kept(self) -> list[str]:
        """Names of the folders and kept files of saves, complete or not, the oldest first.

        A copy of ckpt.pt that someone made under such a name is not among them: it has no file of the optimizer.
        """
        found = os.listdir(self.out_dir)
        names = [name for name in found if KEPT.fullmatch(name)]
        names = [name for name in names if not name.endswith('.pt') or optimizer_file_of(name) in found]
        commits = {name: self.path(name, LATEST_PARTS) for name in names}  # the time of a folder is that of its commit
        paths = {name: path if os.path.exists(path) else self.path(name) for name, path in commits.items()}
        return sorted(names, key=lambda name: (os.stat(paths[name]).st_mtime_ns, name))

    def in_use(self) -> set[str]:
        """Names of the folders that ckpt.json and ckpt_best.json refer to. UserError if one of these is broken."""
        paths = [self.path(name) for name in (LATEST_PARTS, BEST_PARTS) if os.path.exists(self.path(name))]
        return {read_record(path)[1]['folder'] for path in paths}

    def remove_if_there(self, *names: str):
        for name in names:
            if os.path.exists(self.path(name)):
                with suppress(OSError):
                    os.remove(self.path(name))

    def tidy(self, keep: int, optimizer_file: str = ''):
        """Remove folders and files of saves that are neither in use nor among the last `keep`.

        optimizer_file: the one in use. What cannot be removed, such as a file that is being read on Windows, stays for
        the next save. With a broken ckpt.json nothing is removed, as it may refer to anything.
        """
        with suppress(OSError, UserError):
            in_use, names = self.in_use(), self.kept()
            whole = [name for name in names if name.endswith('.pt') or os.path.exists(self.path(name, LATEST_PARTS))]
            newest = {iteration_of(name): name for name in whole if name not in self.abandoned}  # one of an iteration
            last = sorted(newest)[-keep:] if keep else []
            in_use.update([newest[iteration] for iteration in last], [optimizer_file])
            in_use.update([optimizer_file_of(name) for name in in_use if KEPT.fullmatch(name)])
            names += [name for name in os.listdir(self.out_dir) if name.startswith('ckpt_optimizer_')]
            for name in names:
                if name not in in_use:
                    with suppress(OSError):
                        remove(self.path(name))
            self.abandoned.clear()


def iteration_of(name: str) -> int:
    """The iteration in the name of a folder or of a kept file of a save."""
    return int(re.search(r'\d+', name)[0])


def optimizer_file_of(name: str) -> str:
    """The name of the optimizer's file that belongs to a kept file such as ckpt_00001000.pt."""
    return name.replace('ckpt_', 'ckpt_optimizer_')


def folder_name(iter_num: int, number: int = 1) -> str:
    return f'ckpt_{iter_num:08d}' + (f'-{number}' if number > 1 else '')


def save(content, file):
    """torch.save to an open file. Where a write fails for lack of space, torch raises an error that does not say so."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if 'unexpected pos' in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
