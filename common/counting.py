"""What a program allocates, computes and moves, counted operation by operation on tensors that have no memory.

    with counting() as count:
        model = Model()                    # shapes alone: 70 billion parameters take milliseconds
        count.cut()
        loss = model(x)
        forward = count.cut()              # a Stretch: memory at its start, peak and end, and the work in between

The program itself runs, its own code with autograd's and the optimizer's, so nothing about it has to be known here.
What a kernel takes for itself while it runs (the scratch space of a product) is not seen.
"""

import math
import re
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# parts of the names of operations that take longer than reading and writing does, on a CPU
FUNCTIONS = re.compile('gelu|silu|softmax|norm|exp|tanh|sigmoid|erf')


class Work(NamedTuple):
    """One operation.

    kind: 'product', 'attention', or 'stream', which does little with every number that it reads and writes; 'fused' is
        all the streams between two of the others once more, as one operation: it reads what came from outside, and
        writes what is still there at its end.
    dtype: of its numbers, such as 'bfloat16'.
    flops: of a product or of attention, there of the keys that a query sees, see Machine.attention_flops. Of a stream:
        how many numbers it computes by a function such as exp; other arithmetic costs nothing beside the bytes.
    nbytes: read and written.
    size: the smallest dimension of a product, the keys of attention; of a stream, the bytes of new tensors.
    """

    kind: str
    dtype: str
    flops: float
    nbytes: int
    size: int


class Stretch(NamedTuple):
    """A stretch of the program: bytes of all tensors at its start, at most, and at its end; {Work: how often}."""

    start: float
    peak: float
    end: float
    work: Counter

    @property
    def kept(self) -> float:
        """Bytes that it leaves behind, or frees if negative."""
        return self.end - self.start


class Count(TorchDispatchMode):
    """Counts operations while it is active. live, peak: bytes of all tensors now, and at most since the last cut."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.start = 0
        self.work, self.storages = Counter(), {}  # number of a storage -> its bytes
        self.read, self.written = set(), set()  # storages of the streams since the last other operation

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        read, written = list(tensors_in((args, kwargs))), list(tensors_in(result))
        new = [tensor for tensor in written if self.register(tensor.untyped_storage())]
        changed = [tensor for tensor in read if any(tensor is other for other in written)]
        if new or changed or operation._schema.is_mutable:
            work = work_of(operation, args, kwargs, read, written, new)
            self.work[work] += 1
            if work.kind == 'stream':
                self.read |= {id(tensor.untyped_storage()) for tensor in read} - self.written
                self.written |= {id(tensor.untyped_storage()) for tensor in written}
            else:
                self.fuse()
        return result

    def fuse(self):
        """Count the streams since the last other operation as one."""
        nbytes = sum(self.storages.get(number, 0) for group in (self.read, self.written) for number in group)
        if nbytes:
            self.work[Work('fused', '', 0, nbytes, 0)] += 1
        self.read, self.written = set(), set()

    def register(self, storage) -> bool:
        """Count the memory of a tensor until it is freed -> True if it is new."""
        number, nbytes = id(storage), storage.nbytes()
        if number in self.storages:
            return False
        self.storages[number] = nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, number, nbytes)
        return True

    def forget(self, number: int, nbytes: int):
        """Stop counting what was freed."""
        del self.storages[number]
        self.live -= nbytes

    def cut(self) -> Stretch:
        """End a stretch, begin the next -> the one that has ended."""
        self.fuse()
        stretch = Stretch(self.start, self.peak, self.live, self.work)
        self.start = self.peak = self.live
        self.work = Counter()
        return stretch


@contextmanager
def counting():
    """A context in which tensors have no memory, and what is done to them is counted -> a Count."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Count() as count:
        yield count


def tensors_in(values):
    """The tensors in nested tuples, lists and dicts."""
    if torch.is_tensor(values):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def work_of(operation, args, kwargs, read: list, written: list, new: list) -> Work:
    """What an operation of ATen does. read: tensors among its arguments. written: those that it returns, of which `new`
    have memory of their own."""
    name = operation.name().removeprefix('aten::').split('.')[0]
    nbytes = sum(tensor.nbytes for tensor in (*read, *written))
    if not written:  # optimizers' kernels return nothing: what they change counts twice, gradients alone once
        nbytes = sum(nbytes_changed(value, argument) for value, argument in zip(args, operation._schema.arguments))
    dtype = str(max((*written, *read), key=lambda tensor: tensor.numel()).dtype).removeprefix('torch.')
    if name.startswith('_scaled_dot_product'):
        backward = name.endswith('backward')
        attended = [tensor for tensor in read if tensor.dim() == 4]  # the backward pass has a gradient first
        q, k = attended[backward : backward + 2]  # (B, nh, T, hs), (B, nkv, S, hs)
        causal = any(value is True for value in (*args, kwargs.get('is_causal')))
        flops = (10 if backward else 4) * q.numel() * k.size(-2) / (2 if causal else 1)
        return Work('attention', dtype, flops, nbytes, k.size(-2))
    if name in ('mm', 'addmm', 'bmm', 'baddbmm'):
        a, b = [tensor for tensor in read if tensor.dim() >= 2][-2:]
        sizes = (*a.shape[-2:], b.size(-1))
        batch = a.size(0) if a.dim() == 3 else 1
        return Work('product', dtype, 2 * batch * math.prod(sizes), nbytes, min(sizes))
    function = FUNCTIONS.search(name)
    computed = max((tensor.numel() for tensor in written), default=0) if function else 0
    return Work('stream', dtype, computed, nbytes, sum(tensor.nbytes for tensor in new))


def nbytes_changed(value, argument) -> int:
    """Bytes that an argument's tensors are read, and written where the operation's schema says so."""
    nbytes = sum(tensor.nbytes for tensor in tensors_in(value))
    return nbytes * (2 if argument.alias_info is not None and argument.alias_info.is_write else 1)
