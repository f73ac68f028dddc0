"""Conversations in files, and windows of conversations: what prepare.py reads, packs and writes."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from common.errors import UserError, one_line, user_errors
from common.files import written_whole
from data.pipeline import remove_tokens
from data.sources import ROWS, NotText, array_elements, kind_of, open_parquet, opened, reading, walk
from tokenizer import replace_surrogates

ROLES = {  # as files call them
    'system': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
}
ROW_KEYS = ('messages', 'conversations', 'prompt', 'completion', 'system')
NOT_READ = ('tool_calls', 'function_call', 'reasoning_content', 'weight')  # of a message: would change what is learned


# --- in ---------------------------------------------------------------------------------------------------------------


def read_rows(path: str) -> Iterator[tuple[str, object]]:
    """Yield (where it is, for errors; the row) for the rows of a .jsonl, .json or .parquet file, or of those in a
    folder, in the order of their names. UserError for what cannot be read."""
    found = False
    for file in walk(path):
        try:
            kind = kind_of(file)
        except NotText:
            kind = ''
        if kind in ('lines', 'array', 'parquet'):
            found = True
            yield from {'lines': lines_of, 'array': elements_of, 'parquet': table_rows}[kind](file)
        elif file == path:
            raise UserError(f'{path}: conversations are read from .jsonl, .json and .parquet files, not from this')
    if not found:
        raise UserError(f'{path} holds no .jsonl, .json or .parquet file')


def lines_of(path):
    with opened(path) as (_, file):
        for n, line in enumerate(file, start=1):
            line = line.removeprefix(b'\xef\xbb\xbf') if n == 1 else line
            if line.strip():
                where = f'{path}, line {n}'
                with user_errors(ValueError, RecursionError, where=f'{where}: this is not a line of JSON: '):
                    row = json.loads(line.decode())
                yield where, row


def elements_of(path):
    with opened(path) as (_, content), io.TextIOWrapper(content, encoding='utf-8-sig', newline='') as file:
        for n, row in enumerate(array_elements(file, path, ''), start=1):
            yield f'{path}, number {n}', row


def table_rows(path):
    n = 0
    with reading(path), open_parquet(path) as table:
        names = [name for name in table.schema_arrow.names if name in ROW_KEYS]
        for batch in table.iter_batches(ROWS, columns=names, use_threads=False):
            for row in batch.to_pylist():
                n += 1
                yield f'{path}, row {n}', row


def messages_of(row: object) -> list[dict]:
    """The messages of a row, {'role': 'system' | 'user' | 'assistant', 'content': text} each. ValueError if it is other
    than {'messages': […]}, ShareGPT's {'conversations': […]} and {'prompt': …, 'completion': …}, texts or messages."""
    row = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else {}
    kinds = [key for key in ('messages', 'conversations', 'completion') if key in row]
    if not kinds or 'completion' in row and 'prompt' not in row:
        raise ValueError('no object with "messages", "conversations", or "prompt" and "completion"')
    if kinds[0] == 'completion':
        messages = as_messages(row['prompt'], 'user') + as_messages(row['completion'], 'assistant')
    else:
        messages = as_messages(row[kinds[0]])
    if row.get('system'):  # some ShareGPT files have it here
        messages = as_messages(row['system'], 'system') + messages
    if not messages:
        raise ValueError('a conversation without messages')
    return messages


def as_messages(value, role=None):
    """A list of messages as files have it, or a text, which is one message of this role -> messages."""
    if isinstance(value, str) and role:
        return [{'role': role, 'content': replace_surrogates(value)}]
    if not isinstance(value, list):
        raise ValueError(f'a list of messages was expected, not {one_line(repr(value), 60)}')
    return [as_message(n, message) for n, message in enumerate(value, start=1)]


def as_message(n, message):
    if not isinstance(message, dict):
        raise ValueError(f'message {n} is not an object with a role and a text, but {one_line(repr(message), 60)}')
    unread = [key for key in NOT_READ if message.get(key) is not None]
    if unread:
        raise ValueError(f'message {n} has {unread[0]!r}, which is not read here')
    role, content = message.get('role', message.get('from')), message.get('content', message.get('value'))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f'message {n} is by {one_line(repr(role), 60)}: it must be one of {", ".join(ROLES)}')
    if isinstance(content, list) and all(isinstance(p, dict) and p.get('type') == 'text' for p in content):
        content = ''.join(str(part.get('text', '')) for part in content)
    if not isinstance(content, str):
        raise ValueError(f'message {n} must hold a text, not {one_line(repr(content), 60)}')
    return {'role': ROLES[role], 'content': replace_surrogates(content)}


# --- out --------------------------------------------------------------------------------------------------------------


def pack(lengths: list[int], window: int) -> list[list[int]]:
    """Put conversations of these lengths, at most `window` each, into windows -> the numbers of those in each window.

    Best fit, the longest first: each goes where it leaves the least space. The same lengths give the same windows.
    """
    windows, with_space, spaces = [], [[] for _ in range(window)], 0  # spaces: bit s is set if with_space[s] has any
    for i in np.argsort(-np.array(lengths), kind='stable').tolist():
        fitting = spaces >> lengths[i]
        if fitting:
            space = lengths[i] + (fitting & -fitting).bit_length() - 1  # the smallest
            w = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            w, space = len(windows), window
            windows.append([])
        windows[w].append(i)
        space -= lengths[i]
        with_space[space].append(w)
        spaces |= 1 << space
    return windows


class Conversation(NamedTuple):
    """A conversation in tokens: ids, and which of them are learned, (T,) each; messages, of those kept as examples."""

    ids: np.ndarray
    learned: np.ndarray
    messages: list | None = None


def write(out_dir: str, splits: dict[str, list[Conversation]], window: int, padding: int, meta: dict) -> dict:
    """Write a data set of conversations, in place of an earlier one -> its meta.json, which adds sizes to `meta`.

    splits: the conversations of 'train' and 'val'. window: tokens per window, see pack(). padding: the id that fills
    windows up, and ends a split, as the target of its last token.
    All files are written before the earlier data set is deleted. The token files get their names last: without them
    training does not start. OSError as written_whole().
    """
    parts = '', '_mask', '_documents'
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    meta = {
        **meta,
        'window': window,
        'tokens': {},
        'conversations': {},
        'documents': {},
        'supervised': {},
        'padding': {},
        'examples': [],
    }
    with ExitStack() as stack:
        names = [f'{split}{part}.bin' for part in parts for split in splits]
        files = {name: stack.enter_context(written_whole(os.path.join(out_dir, name))) for name in names}
        for split, conversations in splits.items():
            tokens, mask, documents = (files[f'{split}{part}.bin'] for part in parts)
            windows = pack([len(conversation.ids) for conversation in conversations], window)
            for w, numbers in enumerate(windows):
                at = w * window
                for conversation in map(conversations.__getitem__, numbers):
                    if conversation.messages:
                        meta['examples'].append({'split': split, 'at': at, 'messages': conversation.messages})
                    documents.write(np.array(at, '<u8').tobytes())
                    tokens.write(conversation.ids.astype(dtype).tobytes())
                    mask.write(conversation.learned.astype('u1').tobytes())
                    at += len(conversation.ids)
                left = (w + 1) * window - at
                if left:  # padding is a document of its own
                    documents.write(np.array(at, '<u8').tobytes())
                    tokens.write(np.full(left, padding, dtype).tobytes())
                    mask.write(bytes(left))
            n = len(windows) * window
            documents.write(np.array(n, '<u8').tobytes())
            tokens.write(np.array(padding, dtype).tobytes())
            mask.write(bytes(1))
            meta['tokens'][split], meta['conversations'][split] = n + 1, len(conversations)
            meta['documents'][split] = documents.tell() // 8
            meta['supervised'][split] = sum(int(conversation.learned.sum()) for conversation in conversations)
            meta['padding'][split] = n + 1 - sum(len(conversation.ids) for conversation in conversations)
        files['meta.json'] = stack.enter_context(written_whole(os.path.join(out_dir, 'meta.json'), 'w'))
        json.dump(meta, files['meta.json'], indent=1)
        for file in files.values():
            file.flush()  # a full disk shows here
        remove_tokens(out_dir)
    return meta
