"""Signs of life: which rank has died or hangs, so that the others end and say so instead of waiting for it."""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from traceback import walk_stack
from typing import NamedTuple

import torch.distributed as dist

from common.errors import error_line, place_in_project

UNKNOWN = -1  # as a lost rank: one is looked for
SILENT = 3  # intervals without a new sign, after which a rank counts as silent where a collective has failed


class Sign(NamedTuple):
    """What a rank writes in the store about itself, again and again."""

    tick: int = 0  # counts its signs; it stands still when the process is stopped or dead
    entered: int = 0  # collectives of Ranks that its main thread has entered: at least one per iteration
    place: str = ''  # the line of this project where its main thread is
    lost: int | None = None  # the rank for whose sake it ends; its own if it ends with an error of its own


class Heartbeat(threading.Thread):
    """A thread that writes this rank's sign into the store and reads those of the others, which it watches.

    The process ends with one line and status 2 when another rank has given no sign for `limit` seconds, or when another
    rank has ended because this one hangs. A stopped process gives no signs, as all of its threads stop; a long
    computation does not matter, as this is a thread of its own. Time is counted in signs of this rank's own, so that
    whoever was stopped and continued, or slept as laptops do, does not accuse the others.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit: float, hosted_by_rank_0: bool):
        """Start the thread.

        store: over a connection that nobody else uses, as a call may wait there; it has a key `sign of N`, perhaps
            empty, for each rank. limit: seconds. hosted_by_rank_0: the store vanishes when rank 0 ends.
        """
        super().__init__(name='signs of life', daemon=True)
        self.store, self.rank, self.limit, self.hosted_by_rank_0 = store, rank, limit, hosted_by_rank_0
        self.keys = [f'sign of {other}' for other in range(world_size)]
        # each rank reads all signs, which is world_size ** 2 per interval: more ranks, longer intervals
        self.interval = min(max(0.5, world_size / 128), limit / 5)
        self.entered, self.lost, self.tick = 0, None, 0
        self.signs, self.heard = [Sign()] * world_size, [0] * world_size  # heard: our tick at each one's last new sign
        self.asked_at = None  # our tick when the main thread asked which rank is lost
        self.wake, self.answered = threading.Event(), threading.Event()
        self.ending = self.store_lost = False
        self.start()

    # --- for the main thread ---

    def lost_rank(self) -> str:
        """Which rank is lost, in words; '' if that cannot be told. For a collective that has failed; takes seconds."""
        if self.ending:  # stopped at the end of the run
            return ''
        self.lost, self.asked_at = UNKNOWN, self.tick
        self.wake.set()
        self.store_lost |= not self.answered.wait(25 * self.interval)
        if self.lost == UNKNOWN and (self.store_lost or not self.is_alive()):
            self.lost = self.blamed_by(0)  # the store is gone, and with it rank 0 or its machine
        return self.describe(self.lost) if self.lost != self.rank else ''

    def stop(self, failed: bool = False):
        """End the thread. failed: the process ends with an error, so that others should name this rank."""
        if not self.is_alive():
            return
        if failed and self.lost is None:
            self.lost = self.rank
        self.ending = True
        self.wake.set()
        self.join(2 * self.interval)
        if failed:
            self.linger()

    # --- the thread ---

    def run(self):
        try:
            while True:
                last = self.ending
                self.exchange()
                if last:
                    break
                self.judge()
                if self.hosted_by_rank_0 and self.rank and self.signs[0].lost not in (None, UNKNOWN):
                    break  # rank 0 ends, and the store with it: torch would write a long warning about that
                self.wake.wait(self.interval)
                self.wake.clear()
        except RuntimeError:  # dist.DistError among others
            self.store_lost = True  # collectives will fail too, then lost_rank says so
        self.answered.set()

    def exchange(self):
        """Write our sign and read all others."""
        self.tick += 1
        self.store.set(self.keys[self.rank], json.dumps(Sign(self.tick, self.entered, main_thread_place(), self.lost)))
        for rank, text in enumerate(self.store.multi_get(self.keys)):
            sign = Sign(*json.loads(text or '[]'))
            if sign.tick != self.signs[rank].tick:
                self.heard[rank] = self.tick
            self.signs[rank] = sign

    def judge(self):
        """End the process if another rank is lost, or answer the main thread."""
        if self.asked_at is not None:
            if self.lost == UNKNOWN:
                self.lost = self.find()
            if self.lost == UNKNOWN and self.tick - self.asked_at > 20:
                self.lost = self.rank  # all others live and come: it is this one that ends
            if self.lost != UNKNOWN:
                self.exchange()  # the others should know before this process ends
                self.answered.set()
            return
        for rank, sign in enumerate(self.signs):
            if sign.lost == self.rank != rank:
                self.end(self.rank, f'rank {rank} has waited for this one in vain and ended{main_thread_place()}')
        oldest = min(range(len(self.heard)), key=self.heard.__getitem__)
        if self.age(oldest) > self.limit:
            self.end(self.blamed_by(oldest), self.describe(self.blamed_by(oldest)))

    def find(self) -> int:
        """The lost rank, after a collective has failed, or UNKNOWN as yet.

        It is the one that another rank names. Else one whose signs have stopped. Else, after a while, the one whose
        main thread is furthest behind; of several, the last whose collective has not failed.
        """
        others = [rank for rank in range(len(self.signs)) if rank != self.rank]
        for rank in others:
            if self.signs[rank].lost not in (None, UNKNOWN, self.rank):
                return self.signs[rank].lost
        others = [rank for rank in others if self.signs[rank].lost is None]
        oldest = min(others, key=self.heard.__getitem__, default=None)
        if oldest is not None and self.tick - self.heard[oldest] >= SILENT:
            return oldest
        entered = min((self.signs[rank].entered for rank in others), default=0)
        behind = [rank for rank in others if self.signs[rank].entered == entered]
        return behind[0] if len(behind) == 1 and self.tick - self.asked_at > SILENT else UNKNOWN

    def age(self, rank: int) -> float:
        """Seconds since a rank's last new sign."""
        return (self.tick - self.heard[rank]) * self.interval

    def blamed_by(self, rank: int) -> int:
        """The rank that a rank which is no longer there has named, else that rank."""
        lost = self.signs[rank].lost
        return rank if lost in (None, UNKNOWN, self.rank) else lost

    def describe(self, rank: int) -> str:
        """What is known about a lost rank, in words."""
        if self.signs[rank].lost == rank:
            return f'rank {rank} has ended with an error of its own'
        if self.store_lost:
            return f'rank {rank} gives no sign of life: it was killed, or its machine cannot be reached'
        if self.tick - self.heard[rank] < SILENT:
            return f'rank {rank} hangs{self.signs[rank].place}'
        why = 'it was killed or stopped, or its machine cannot be reached'
        return f'rank {rank} gave no sign of life for {self.age(rank):.0f} s: {why}'

    def end(self, lost: int, text: str):
        """End the process for the sake of a lost rank, without the main thread: it may wait, and hold locks."""
        self.lost = lost
        self.exchange()
        with suppress(OSError):
            os.write(2, f'{error_line(text)}\n'.encode(errors='backslashreplace'))  # past the lock of sys.stderr
        self.linger()
        os._exit(2)

    def linger(self):
        """Keep a store that ends with this process until the other ranks have read our last sign, or have ended too."""
        if not self.hosted_by_rank_0 or self.rank:
            return
        until = time.monotonic() + 1.5 * self.interval
        with suppress(RuntimeError):
            while time.monotonic() < until and any(sign.lost is None for sign in self.signs[1:]):
                time.sleep(0.02)
                self.exchange()


def main_thread_place() -> str:
    """The line of this project where the main thread is, as common.errors.place_in_project gives it."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    return place_in_project(reversed(list(walk_stack(frame)))) if frame else ''
