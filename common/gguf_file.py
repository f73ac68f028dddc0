"""GGUF files, llama.cpp's format: a header of metadata and the names of tensors, then the tensors, often quantized.

Anyone may have written a file, so every count, length and offset in it is compared with the size of the file before
anything is allocated. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian. The package gguf knows how the quantized types are stored.
"""

import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError, one_line, user_errors

NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}  # type: code
STRING, ARRAY = 8, 9  # the other types of values
MAX_ITEMS = 10**7  # of an array: more than any vocabulary or list of merges has
MAX_DIMS = 4  # GGML_MAX_DIMS
CHUNK = 2**18  # numbers that are dequantized at a time, so that hardly more memory is needed than for the result


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor is in its file."""

    shape: tuple[int, ...]  # as in torch, the rows first; the file has them in the reverse order
    type: int  # a gguf.GGMLQuantizationType
    offset: int  # from the start of the file, in bytes
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """The header of a file."""

    path: str
    metadata: dict  # by key: a number, a text, a list of texts or a numpy array of numbers
    tensors: dict[str, GGUFTensor]


def import_gguf(what):
    """Import the package gguf; UserError says what needs it if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f'{what} needs the package gguf: pip install gguf') from error
    return gguf


def quoted(text) -> str:
    """A text out of a file, for a message: escaped and short."""
    return one_line(repr(text), 80)


# --- the header -------------------------------------------------------------------------------------------------------


def read_gguf(path: str) -> GGUFFile:
    """Read the header of a GGUF file. UserError if it cannot be read or contradicts itself, or gguf is missing."""
    sizes = import_gguf(path).GGML_QUANT_SIZES
    with user_errors(OSError, where=f'cannot read {path}: '), open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size < 24:  # an empty file cannot be mapped
            raise UserError(f'{path} is not a sound GGUF file: it is too short')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            with user_errors(ValueError, where=f'{path} is not a sound GGUF file: '):
                cursor = Cursor(buffer)
                metadata, infos = read_header(cursor)
                alignment = metadata.get('general.alignment', 32)
                if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
                    raise ValueError(f'general.alignment is {quoted(alignment)}, not a power of two')
                start = -(-cursor.position // alignment) * alignment  # of the tensors
                tensors = {name: locate(name, *info, start, alignment, sizes) for name, info in infos.items()}
                check_places(tensors, len(buffer))
    return GGUFFile(path, metadata, tensors)


class Cursor:
    """Reads a buffer from its start to its end. ValueError where the buffer ends too early."""

    def __init__(self, buffer):
        self.buffer, self.position, self.end = buffer, 0, len(buffer)

    def skip(self, nbytes):
        """Advance -> the position before."""
        if nbytes > self.end - self.position:
            raise ValueError(f'it ends too early: {nbytes} bytes at {self.position} exceed its {self.end}')
        start, self.position = self.position, self.position + nbytes
        return start

    def number(self, code):
        """A number of a code of the module struct."""
        return struct.unpack_from('<' + code, self.buffer, self.skip(struct.calcsize('<' + code)))[0]

    def count(self, what, least):
        """How many items follow; the rest of the buffer must be able to hold that many, of at least `least` bytes."""
        n = self.number('Q')
        if n * least > self.end - self.position:
            raise ValueError(f'{n} {what} do not fit into its {self.end} bytes')
        return n

    def text(self):
        """A length and as many bytes of UTF-8."""
        start = self.skip(self.number('Q'))
        return str(self.buffer[start : self.position], 'utf-8')

    def value(self, kind):
        """A value of a GGUF type."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f'{kind} is not a type of values')
        kind = self.number('I')
        if kind == STRING:
            n = self.count('texts', 8)
        elif kind in NUMBERS:
            n = self.count('numbers', struct.calcsize('<' + NUMBERS[kind]))
        else:
            raise ValueError(f'an array of values of type {kind}, neither numbers nor texts')
        if n > MAX_ITEMS:
            raise ValueError(f'an array of {n} values, more than {MAX_ITEMS}')
        if kind == STRING:
            return [self.text() for _ in range(n)]
        dtype = np.dtype('<' + NUMBERS[kind])
        return np.frombuffer(self.buffer, dtype, n, self.skip(n * dtype.itemsize)).copy()


def read_header(cursor):
    """Cursor at the start of a file -> the metadata, {tensor name: (dims, type, offset)}."""
    if cursor.buffer[cursor.skip(4) : 4] != b'GGUF':
        raise ValueError("it does not start with 'GGUF'")
    version = cursor.number('I')
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big') in (2, 3)
        raise ValueError('it is big-endian' if swapped else f'version {version}, only 2 and 3 can be read')
    n_tensors = cursor.count('tensors', 32)  # name, number of dimensions, one dimension, type, offset
    n_values = cursor.count('metadata values', 13)  # key, type, a byte
    metadata, infos = {}, {}
    for _ in range(n_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f'it has the key {quoted(key)} twice')
        metadata[key] = cursor.value(cursor.number('I'))
    for _ in range(n_tensors):
        name = cursor.text()
        if name in infos:
            raise ValueError(f'it has the tensor {quoted(name)} twice')
        n_dims = cursor.number('I')
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f'the tensor {quoted(name)} has {n_dims} dimensions')
        dims = [cursor.number('Q') for _ in range(n_dims)]
        infos[name] = dims, cursor.number('I'), cursor.number('Q')
    return metadata, infos


def locate(name, dims, kind, offset, start, alignment, sizes):
    """Description of a tensor, and the start of all tensors -> GGUFTensor. ValueError if it makes no sense."""
    if kind not in sizes:
        raise ValueError(f'the tensor {quoted(name)} is of an unknown type, {kind}')
    block, block_bytes = sizes[kind]  # numbers and bytes of a block
    n = 1
    for size in dims:
        n *= size  # a Python integer, which cannot overflow
    if not n or dims[0] % block:
        raise ValueError(f'the tensor {quoted(name)} has rows of {dims[0]}, its type has blocks of {block}')
    if offset % alignment:
        raise ValueError(f'the tensor {quoted(name)} is at {offset}, not a multiple of {alignment}')
    return GGUFTensor(tuple(reversed(dims)), kind, start + offset, n // block * block_bytes)


def check_places(tensors, size):
    """ValueError if tensors overlap or exceed a file of `size` bytes."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f'the tensor {quoted(name)} overlaps the one before it')
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(f'the tensor {quoted(name)} ends at {end}, the file at {size}')


# --- tensors ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_tensor(file: GGUFFile, name: str, out: torch.Tensor):
    """Dequantize a tensor of a file into `out`, contiguous, of the same shape and any floating-point dtype, CHUNK
    numbers at a time. UserError if gguf cannot dequantize its type, or some of it is NaN or infinite."""
    gguf, tensor = import_gguf(file.path), file.tensors[name]
    kind, where = gguf.GGMLQuantizationType(tensor.type), f'{file.path}: the tensor {quoted(name)}'
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = out.view(-1, tensor.shape[-1])
    row_bytes, step = tensor.shape[-1] // block * block_bytes, max(1, CHUNK // tensor.shape[-1])
    with user_errors(OSError, where=f'cannot read {file.path}: '), open(file.path, 'rb') as opened:
        opened.seek(tensor.offset)
        for part in rows.split(step):
            data = np.fromfile(opened, np.uint8, len(part) * row_bytes)
            if data.size < len(part) * row_bytes:
                raise UserError(f'{where} ends too early')
            try:
                values = gguf.quants.dequantize(data.reshape(len(part), row_bytes), kind)
            except NotImplementedError as error:
                raise UserError(f'{where} is of type {kind.name}, which gguf cannot dequantize') from error
            if not np.isfinite(values).all():
                raise UserError(f'{where}: some of it is NaN or infinite; use another file')
            part.copy_(torch.from_numpy(values).view_as(part))
