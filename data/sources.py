"""Where text comes from: files of several kinds, a data set of the Hugging Face hub, or documents in memory.

A source hands out units: pieces of about a megabyte, in a fixed order, each with the position at which reading goes on after it.
Reading from a position gives the same units as reading from the start, so that an interrupted preparation can go on from its last one.
"""
import codecs
import gzip
import hashlib
import io
import json
import os
import re
import time
import zlib
from dataclasses import dataclass, field
from logging import getLogger
from typing import NamedTuple

from configurator import UserError, one_line, user_errors
from tokenizer import replace_surrogates

UNIT = 2**20  # characters or bytes in a unit, about; the longest document must fit into memory, but only JSON lines and parquet have such
ROWS = 256  # of a table, read at once
SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


class Piece(NamedTuple):
    """A document, or a part of a long one."""
    text: str
    ends: bool = True  # does the document end here?
    split: str = ''  # 'train', 'val'; '': by the hash of the key
    key: str = ''  # what the split of a whole document is decided by; '': its text


@dataclass
class Unit:
    """What a worker encodes at once: pieces, or JSON lines that it has to parse first."""
    position: dict  # where the source goes on after it, as plain JSON; 'progress' in it: bytes of the source's total until there
    where: str  # for errors: file and byte
    pieces: list = field(default_factory=list)
    lines: bytes = b''


def pieces_of(unit, text_key):
    """Yield a unit's pieces. UserError if one of its JSON lines is not an object with a text under text_key."""
    yield from unit.pieces
    offset = 0
    for line in io.BytesIO(unit.lines):
        if line.strip():
            with user_errors(ValueError, RecursionError, where=f'{unit.where} + {offset} is no JSON line: '):
                row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
                raise UserError(f'{unit.where} + {offset} is no JSON object with a text {text_key!r}: --text_key= names another field')
            yield Piece(replace_surrogates(row[text_key]))
        offset += len(line)


def grouped(pieces, where):
    """(piece, position) … -> Units of about UNIT characters."""
    unit, size = Unit({}, where), 0
    for piece, unit.position in pieces:
        unit.pieces.append(piece)
        size += len(piece.text)
        if size >= UNIT:
            yield unit
            unit, size = Unit({}, where), 0
    if unit.pieces:
        yield unit


def cut_in_two(text, ends, offset, cut):
    """The pieces of a text at this offset in all the text, which is for training before the cut, for validation from it on."""
    k = min(max(cut - offset, 0), len(text))
    if k:
        yield Piece(text[:k], ends and k == len(text), 'train')
    if k < len(text):
        yield Piece(text[k:], ends, 'val')


def val_begins(characters, val_fraction):
    """Where validation begins in so many characters of text, as in nanoGPT: at int((1 - val_fraction) * characters)."""
    cut = int((1 - val_fraction) * characters)
    if not 0 < cut < characters:
        raise UserError(f'{characters} characters are too few to split into training and validation text')
    return cut


class Documents:
    """Texts in memory. The last val_fraction of them is for validation; the cut may go through one."""
    text_key, parts = '', 1

    def __init__(self, texts, val_fraction):
        self.texts, self.single = texts, len(texts) == 1
        self.total = sum(map(len, texts))
        self.cut = val_begins(self.total, val_fraction)
        self.fingerprint = [hashlib.sha256('\0'.join(texts).encode('utf-8', 'surrogatepass')).hexdigest(), val_fraction]

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start."""
        return grouped(self.pieces(position or {'document': 0, 'progress': 0}), 'the text')

    def pieces(self, position):
        offset = position['progress']
        for n, text in enumerate(self.texts[position['document']:], position['document']):
            for piece in cut_in_two(text, True, offset, self.cut):
                yield piece, {'document': n + (piece.split == 'val' or piece.ends), 'progress': offset + len(text)}
            offset += len(text)


class Files:
    """A file, or those below a folder in the order of their names: JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), tables (.parquet), and
    for the rest whole texts, UTF-8. Hidden files, and in a folder files that are not text, are passed over.

    Documents go to training or validation one by one, by a hash of their text, or of a text file's name. Fewer text files than
    1 / val_fraction are one row of text, whose end is for validation.
    """

    def __init__(self, path, val_fraction, text_key='text'):
        """UserError if there is no text in path, or it cannot be read."""
        self.text_key = text_key
        paths, passed = [path], 0
        if os.path.isdir(path):
            paths = []
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith('.'))
                paths += [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.')]
        self.files, self.starts, characters = [], [], 0  # (path, kind); of the text files, characters before them
        for file in paths:
            kind = next((kind for kind in ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet') if file.endswith(kind)), '')
            try:
                n = 1 if kind else count_characters(file)
            except UserError:
                if file == path:
                    raise
                passed += 1
                continue
            if n:
                self.files.append((file, kind))
                self.starts.append(characters)
                characters += n
        if passed:
            print(f'passed over {passed} files that are not UTF-8 text')
        if not self.files:
            raise UserError(f'there is no text in {path}')
        texts_only = not any(kind for _, kind in self.files)
        self.parts, self.single = len(self.files), texts_only and len(self.files) == 1
        self.cut = val_begins(characters, val_fraction) if texts_only and len(self.files) * val_fraction < 1 else None
        with user_errors(OSError, where='cannot read the input: '):
            stats = [os.stat(file) for file, _ in self.files]
        self.sizes = [parquet_text_bytes(file, text_key) if kind == '.parquet' else stat.st_size
                      for (file, kind), stat in zip(self.files, stats)]
        self.total = sum(self.sizes)
        self.root = path
        self.fingerprint = [[self.name(file), stat.st_size, stat.st_mtime_ns] for (file, _), stat in zip(self.files, stats)]

    def name(self, file):
        """What a file is called in the data set's own terms: its path below the folder."""
        return os.path.relpath(file, self.root).replace(os.sep, '/') if os.path.isdir(self.root) else os.path.basename(file)

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start; those of one part, a file, only if it is given."""
        position = position or {'file': part or 0, 'at': 0, 'progress': 0}
        end = len(self.files) if part is None else part + 1
        while position['file'] < end:
            n = position['file']
            if self.files[n][1] == '':  # text files in a row share units
                last = next((i for i in range(n, end) if self.files[i][1]), end)
                yield from grouped(self.text_pieces(position, last), self.files[n][0])
            else:
                read, last = self.table_units if self.files[n][1] == '.parquet' else self.line_units, n + 1
                yield from read(n, position)
            position = {'file': last, 'at': 0, 'progress': sum(self.sizes[:last])}

    def text_pieces(self, position, end):
        """Text files from a position on, long ones in pieces that are cut where no tokenizer joins what is before and behind."""
        for n in range(position['file'], end):
            path, at = self.files[n][0], position['at'] if n == position['file'] else 0
            with reading(path), open(path, 'rb') as raw, io.TextIOWrapper(raw, encoding='utf-8-sig') as file:
                for start in range(0, at, UNIT):
                    file.read(min(UNIT, at - start))
                text = file.read(UNIT)
                while text:
                    following = file.read(1)  # is this the end?
                    k = safe_cut(text) if following else len(text)
                    progress = sum(self.sizes[:n]) + raw.tell()
                    for piece in self.split(n, text[:k], at, not following):
                        yield piece, ({'file': n, 'at': at + len(piece.text), 'progress': progress} if following or not piece.ends
                                      else {'file': n + 1, 'at': 0, 'progress': progress})
                        at += len(piece.text)
                    text = text[k:] + following
                    text += file.read(UNIT - len(text))

    def split(self, n, text, at, ends):
        """The pieces of a text from file n, `at` characters into it."""
        if self.cut is not None:
            return cut_in_two(text, ends, self.starts[n] + at, self.cut)
        return [Piece(text, ends, key=self.name(self.files[n][0]))]

    def line_units(self, n, position):
        """JSON lines, as they are: parsing them is for the workers."""
        (path, kind), at, before = self.files[n], position['at'], sum(self.sizes[:n])
        with reading(path), open(path, 'rb') as raw:
            file = raw
            if kind == '.jsonl.gz':
                file = gzip.GzipFile(fileobj=raw)
            elif kind == '.jsonl.zst':
                try:
                    import zstandard
                except ImportError as error:
                    raise UserError(f'{path} needs the package zstandard: pip install zstandard') from error
                file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
            if file is raw:
                file.seek(at)
            else:  # there is no way to the place but through what is before it
                for start in range(0, at, UNIT):
                    file.read(min(UNIT, at - start))
            while lines := file.read(UNIT) + file.readline():
                where, at = f'{path}, byte {at}', at + len(lines)
                lines = lines.removeprefix(b'\xef\xbb\xbf') if at == len(lines) else lines
                yield Unit({'file': n, 'at': at, 'progress': before + raw.tell()}, where, lines=lines)

    def table_units(self, n, position):
        """The rows of a parquet file, through the same library that streams from the hub."""
        path = self.files[n][0]
        rows = load_rows(path, 'parquet', data_files=[path], columns=[self.text_key])
        return row_units(rows, self.text_key, path, {**position, 'file': n})


class Hub:
    """A data set of the Hugging Face hub, streamed: nothing is kept on disk, and no code of its authors is run."""
    parts, single = 1, False

    def __init__(self, name, config=None, revision=None, text_key='text', total=None):
        """total: bytes of text in it, about, to tell the time left by and to check the disk."""
        self.name, self.config, self.revision, self.text_key, self.total = name, config, revision, text_key, total
        self.fingerprint = [name, config, revision]

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start."""
        print(f'streaming {self.name} from the Hugging Face hub ...', flush=True)
        rows = load_rows(self.name, self.name, name=self.config, revision=self.revision, columns=[self.text_key])
        return row_units(rows, self.text_key, self.name, position or {'progress': 0})


def load_rows(where, *arguments, **keywords):
    """load_dataset(…) of Hugging Face's datasets as a stream of rows. UserError if it cannot be had."""
    try:
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as error:
        raise UserError(f'{where} needs the package datasets: pip install datasets') from error
    set_verbosity_error()
    disable_progress_bar()
    getLogger('huggingface_hub').setLevel('CRITICAL')  # one line in the end, not one a retry
    try:
        return load_dataset(*arguments, split='train', streaming=True, **keywords)
    except Exception as error:  # hub, network, parquet: each library in between has errors of its own
        hint = 'check the file' if os.path.exists(where) else 'is the network reachable? --input= takes local files'
        raise UserError(f'cannot load {where} ({hint}): {one_line(str(error), 150)}') from error


def row_units(rows, text_key, where, position):
    """Units of an IterableDataset's texts from a position on."""
    progress, row = position['progress'], 0
    if 'state' in position:
        rows.load_state_dict(position['state'])
        row = position['row']
    batches = rows.iter(batch_size=ROWS)
    unit, size = Unit({}, ''), 0
    while True:
        try:
            texts = next(batches)[text_key]
        except StopIteration:
            break
        except Exception as error:  # as above, and in the middle of it
            raise UserError(f'{where}, after row {row}: {type(error).__name__}: {one_line(str(error), 150)}; '
                            'the same command goes on from there, --text_key= names the column') from error
        for text in texts:
            if not isinstance(text, (str, type(None))):
                raise UserError(f'{where}: its column {text_key!r} holds {type(text).__name__}, not text; --text_key= names another')
        unit.pieces += [Piece(replace_surrogates(text)) for text in texts if text]
        row += len(texts)
        size += sum(len(text or '') for text in texts)
        if size >= UNIT:
            progress += size
            unit.position = {**position, 'state': rows.state_dict(), 'row': row, 'progress': progress}
            yield unit
            unit, size = Unit({}, ''), 0
    if unit.pieces:
        unit.position = {**position, 'state': rows.state_dict(), 'row': row, 'progress': progress + size}
        yield unit


class reading:
    """A context in which what goes wrong with a file is a UserError that names it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (OSError, EOFError, UnicodeDecodeError, zlib.error)) or type(error).__name__ == 'ZstdError':
            raise UserError(f'cannot read {self.path}: {one_line(str(error), 150)}; it may have been cut short, or have changed') from error


def count_characters(path):
    """Characters in a text file, UTF-8 whatever the locale; a byte order mark does not count, a line end is one character. UserError if
    it cannot be read or is not text."""
    n = 0
    with user_errors(OSError, where=f'cannot read {path}: '), open(path, encoding='utf-8-sig') as file:
        try:
            while text := file.read(UNIT):
                n += len(text)
                if '\0' in text:
                    raise UserError(f'{path} holds zero bytes, so it is not text')
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not UTF-8 text (byte {first_bad_byte(path)}): convert it first, with iconv for instance') from error
    return n


def first_bad_byte(path):
    """Offset of the first byte of a file that is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder('utf-8')(), 0
    with open(path, 'rb') as file:
        while content := file.read(UNIT):
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the last piece
            try:
                decoder.decode(content)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            before += len(content)
    return before


BEFORE_SPACE = re.compile(r'(?s).*\S(?=[ \n])')


def safe_cut(text):
    """Where to cut a text that goes on: before the last space or line end that follows something else. There, GPT-2's pattern always
    ends a piece, and what it does before and behind does not depend on the other side. Without such a place, a cut at the end may
    split a token."""
    match = BEFORE_SPACE.match(text)
    return match.end() if match else len(text)


def parquet_text_bytes(path, text_key):
    """Bytes of the text column of a parquet file, from its footer. UserError if it has none, or the file cannot be read."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path} needs the package datasets: pip install datasets') from error
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        metadata = pyarrow.parquet.read_metadata(path)
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    if text_key not in columns:
        raise UserError(f'{path} has no column {text_key!r}: --text_key= may be one of {one_line(", ".join(columns), 200)}')
    column = columns.index(text_key)
    return sum(metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups))


def download(url, path, sha256, tries=3, timeout=10):
    """Fetch url to path unless it is there already, with a progress bar; the file appears only once it is whole and its
    SHA-256 is right. timeout: seconds of silence that end a try. Raises UserError when every try has failed."""
    if os.path.exists(path):
        if file_sha256(path) == sha256:
            return
        raise UserError(f'{path} is there already and is not what {url} holds: move it away, or give it as --input={path}')
    try:
        import requests
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(f'downloading needs the package {error.name}: pip install {error.name}, or give --input=FILE') from error
    part = path + '.part'
    for attempt in range(tries):
        try:
            with requests.get(url, stream=True, timeout=timeout) as response:
                response.raise_for_status()
                size = int(response.headers.get('content-length', 0)) or None
                with open(part, 'wb') as file, tqdm(total=size, unit='B', unit_scale=True, desc=os.path.basename(path)) as bar:
                    for chunk in response.iter_content(2**16):
                        file.write(chunk)
                        bar.update(len(chunk))
            if file_sha256(part) != sha256:
                raise OSError('what arrived has another checksum than expected')
            os.replace(part, path)
            return
        except (requests.RequestException, OSError) as error:
            problem = error
            if attempt < tries - 1:
                time.sleep(attempt + 1)
    if os.path.exists(part):
        os.remove(part)
    raise UserError(f'cannot download {url}: {one_line(str(problem), 120)}; try again, or give the text with --input=FILE')


def file_sha256(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()
