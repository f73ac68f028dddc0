"""Sources of text: files of several formats, a data set on the Hugging Face hub, or documents in memory.

A source yields units: about a megabyte of text each, in a fixed order, each with the position where reading continues.
From any position a source yields the same units as from the start, so an interrupted preparation can continue there.
"""

import codecs
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from typing import NamedTuple

from common.errors import UserError, one_line, user_errors
from tokenizer import replace_surrogates

UNIT = 2**20  # characters or bytes per unit, approximately
ROWS = 256  # of a table, read at a time
LARGEST_ELEMENT = 2**28  # characters of an element of a JSON array: one without an end must not fill the memory
JSON_SPACE = re.compile(r'[ \t\n\r]*')
# Formats by file name extension; everything else is text, except NOT_TEXT.
TABLES = {'.jsonl': 'lines', '.ndjson': 'lines', '.json': 'array', '.csv': 'csv', '.parquet': 'parquet'}
COMPRESSED = ('.gz', '.zst')
NOT_TEXT = (
    '.tsv .html .htm .xhtml .xml .svg .rtf .pdf .ps .doc .docx .odt .epub .mobi .ipynb .xlsx .arrow .feather .npy '
    '.zip .tar .bz2 .xz .7z .rar'
).split()
OWN = re.compile(r'(train|val)(_\d+)?\.bin|meta\.json|preparing|.*\.part')  # files that a preparation itself writes


class Piece(NamedTuple):
    """A document, or part of a long one."""

    text: str
    ends: bool = True  # does the document end here?
    split: str = ''  # 'train' or 'val'; '': decided by a hash of `key`
    key: str = ''  # the same for all pieces of a document; '': the text


@dataclass
class Unit:
    """A batch of text for one worker: pieces, or JSON lines that the worker has to parse first."""

    position: dict  # where reading continues after it, JSON; 'progress' in it counts the bytes of the source so far
    where: str  # the file, for error messages
    at: int = 0  # offset of the lines in the file in bytes, for error messages
    pieces: list = field(default_factory=list)
    lines: bytes = b''


def pieces_of(unit, text_key):
    """Yield the pieces of a unit. UserError for a JSON line that is neither an object with text_key nor a string."""
    yield from unit.pieces
    at = unit.at
    for line in io.BytesIO(unit.lines):
        if line.strip():
            where = f'{unit.where}, byte {at}'
            with user_errors(ValueError, RecursionError, where=f'{where}: this is not a line of JSON: '):
                row = json.loads(line.decode())
            yield from json_pieces(row, text_key, where)
        at += len(line)


def json_pieces(value, text_key, where):
    """The piece for an object with a text under text_key, or for a string; [] if it is empty. UserError otherwise."""
    text = value.get(text_key, value) if isinstance(value, dict) else value
    if not isinstance(text, (str, type(None))) or value is None:
        raise UserError(f'{where}: not a JSON object with a text {text_key!r}; --text_key= names another field')
    return [Piece(replace_surrogates(text))] if text else []


def grouped(parts, where):
    """Group (pieces, position) pairs into Units of about UNIT characters. Pieces of one pair stay together."""
    unit, size = Unit({}, where), 0
    for pieces, unit.position in parts:
        unit.pieces += pieces
        size += sum(len(piece.text) for piece in pieces)
        if size >= UNIT:
            yield unit
            unit, size = Unit({}, where), 0
    if unit.pieces:
        yield unit


def cut_in_two(text, ends, offset, cut):
    """Split a text at this offset of the whole: before the offset `cut` it is for training, after it for validation."""
    k = min(max(cut - offset, 0), len(text))
    pieces = [Piece(text[:k], ends and k == len(text), 'train'), Piece(text[k:], ends, 'val')]
    return [piece for piece in pieces if piece.text]


def check_fraction(val_fraction):
    """Raise UserError unless 0 < val_fraction < 1."""
    if not 0 < val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}: must be between 0 and 1')


def val_begins(characters, val_fraction):
    """The offset at which validation text begins, as in nanoGPT. UserError if one split would be empty."""
    cut = int((1 - val_fraction) * characters)
    if not 0 < cut < characters:
        raise UserError(f'{characters} characters are too few to split into training and validation text')
    return cut


class Documents:
    """Documents in memory. The last val_fraction of the text is for validation; the cut may go through a document."""

    text_key, parts = '', 1

    def __init__(self, texts: list[str], val_fraction: float):
        check_fraction(val_fraction)
        self.texts, self.single, self.val_fraction = texts, len(texts) == 1, val_fraction
        self.before = [0, *itertools.accumulate(map(len, texts))]  # characters before each text
        self.total = self.before[-1]
        self.cut = val_begins(self.total, val_fraction)
        self.fingerprint = hashlib.sha256('\0'.join(texts).encode('utf-8', 'surrogatepass')).hexdigest()

    def check_unchanged(self):
        """Texts in memory do not change."""

    def units(self, position=None, part=None):
        """Yield the Units after a position, by default all."""
        return grouped(self.documents(position['document'] if position else 0), 'the text')

    def documents(self, first):
        """Yield the pieces of each text and the position after it."""
        for n in range(first, len(self.texts)):
            pieces = cut_in_two(self.texts[n], True, self.before[n], self.cut)
            yield pieces, {'document': n + 1, 'progress': self.before[n + 1]}


class Files:
    """A file, or the files below a folder in the order of their names.

    Tables are JSON lines (.jsonl, .ndjson), JSON arrays (.json), .csv and .parquet. Everything else is read as one
    UTF-8 text per file; in a folder that has tables, only .txt files are. All but .parquet may be compressed: .gz,
    .zst. Prints how many files are skipped, not counting hidden files and what a preparation wrote into the data set's
    own folder.

    Each document goes to training or validation by a hash of its text, or of its name if it is a text file. Fewer text
    files than 1 / val_fraction are treated as one long text, and its end is for validation.
    """

    def __init__(self, path: str, val_fraction: float, text_key: str = 'text', own: str | None = None):
        """Find the files.

        path: a file or folder.
        val_fraction: share for validation.
        text_key: the JSON field or table column that holds the text.
        own: the data set's own folder.
        UserError if there is no text in path or it cannot be read.
        """
        check_fraction(val_fraction)
        self.root, self.val_fraction, self.text_key = path, val_fraction, text_key
        kinds, refused = {}, {}  # path -> format, None if it is refused; path -> the reason
        for file in walk(path, own):
            try:
                kinds[file] = kind_of(file)
            except NotText as error:
                kinds[file], refused[file] = None, str(error)
        texts_only = not any(kinds.values())
        self.files = []  # (path, format)
        self.starts = []  # characters in the text files before each file
        self.sizes = []  # bytes
        self.fingerprint = []  # name, size and time of each, to notice that one has changed
        characters = 0
        for file, kind in kinds.items():
            if kind is None:
                continue
            try:
                if not kind and not texts_only and ending_of(file) != '.txt':
                    raise NotText(
                        f'{file} is not a .txt file: in a folder with tables, no other texts are read; rename it'
                    )
                n = 1 if kind else count_characters(file)
            except NotText as error:
                refused[file] = str(error)
                continue
            with user_errors(OSError, where=f'cannot read {file}: '):
                stat = os.stat(file)
            if n:
                self.files.append((file, kind))
                self.starts.append(characters)
                self.sizes.append(parquet_text_bytes(file, text_key) if kind == 'parquet' else stat.st_size)
                self.fingerprint.append([self.name(file), stat.st_size, stat.st_mtime_ns])
                characters += n
        if path in refused:  # the only file
            raise NotText(refused[path])
        skipped = ''
        if refused:
            reason = next(refused[file] for file in kinds if file in refused)
            skipped = f'skipped {len(refused)} files, the first: {reason}'
        if not self.files:
            raise UserError(f'there is no text in {path}' + (skipped and f': {skipped}'))
        if skipped:
            print(skipped)
        self.parts, self.single = len(self.files), texts_only and len(self.files) == 1
        self.cut = val_begins(characters, val_fraction) if texts_only and len(self.files) * val_fraction < 1 else None
        self.before = [0, *itertools.accumulate(self.sizes)]  # bytes before each file
        self.total = self.before[-1]

    def check_unchanged(self):
        """Raise UserError if a file has changed since __init__."""
        for (file, _), (_, *seen) in zip(self.files, self.fingerprint):
            with user_errors(OSError, where=f'cannot read {file}: '):
                stat = os.stat(file)
            if [stat.st_size, stat.st_mtime_ns] != seen:
                raise UserError(f'{file} has changed while it was being read: run the same command again')

    def name(self, file):
        """The path of a file relative to the input folder, the same on every system."""
        if not os.path.isdir(self.root):
            return os.path.basename(file)
        return os.path.relpath(file, self.root).replace(os.sep, '/')

    def units(self, position=None, part=None):
        """Yield the Units after a position, by default all. part: of this file only, by its number."""
        position = position or {'file': part or 0, 'at': 0, 'progress': 0}
        end = len(self.files) if part is None else part + 1
        while position['file'] < end:
            n = position['file']
            kind = self.files[n][1]
            following = n + 1
            if kind == 'lines':
                yield from self.line_units(n, position['at'])
            elif kind == 'parquet':
                yield from self.parquet_units(n, position['at'])
            elif kind:
                yield from grouped(self.row_pieces(n, position['at']), self.files[n][0])
            else:  # consecutive text files share units
                following = next((i for i in range(n, end) if self.files[i][1]), end)
                yield from grouped(self.text_pieces(position, following), self.files[n][0])
            position = {'file': following, 'at': 0}

    def text_pieces(self, position, end):
        """Yield (pieces, position) of the text files from a position up to file `end`.

        A long text is cut where no tokenizer merges across, see safe_cut. The cuts depend only on the text before
        them, not on the position where reading started.
        """
        for n in range(position['file'], end):
            path, at = self.files[n][0], position['at'] if n == position['file'] else 0
            with opened(path) as (raw, content), io.TextIOWrapper(content, encoding='utf-8-sig') as file:
                skip(file, at)
                text = file.read(UNIT)
                while text:
                    following = file.read(1)
                    k = safe_cut(text) if following else len(text)
                    ends, part = not following, text[:k]
                    if self.cut is None:
                        pieces = [Piece(part, ends, key=self.name(path))]
                    else:
                        pieces = cut_in_two(part, ends, self.starts[n] + at, self.cut)
                    at += k
                    yield pieces, {'file': n + ends, 'at': 0 if ends else at, 'progress': self.before[n] + raw.tell()}
                    text = text[k:] + following
                    text += file.read(UNIT - len(text))

    def line_units(self, n, at):
        """Yield the Units of file n, JSON lines, starting at a byte. The workers parse them."""
        path, _ = self.files[n]
        with opened(path) as (raw, file):
            if file is raw:
                file.seek(at)
            else:  # compressed: reach the position by reading up to it
                skip(file, at)
            while lines := file.read(UNIT) + file.readline():
                start, at = at, at + len(lines)
                if start == 0:
                    lines = lines.removeprefix(b'\xef\xbb\xbf')
                yield Unit({'file': n, 'at': at, 'progress': self.before[n] + raw.tell()}, path, start, lines=lines)

    def row_pieces(self, n, at):
        """Yield (pieces, position) of file n, .csv or a JSON array, starting at a row. Skipped rows are parsed, too."""
        path, kind = self.files[n]
        rows = csv_rows if kind == 'csv' else array_elements
        with opened(path) as (raw, content), io.TextIOWrapper(content, encoding='utf-8-sig', newline='') as file:
            for i, row in enumerate(rows(file, path, self.text_key), start=1):
                if i > at:
                    position = {'file': n, 'at': i, 'progress': self.before[n] + raw.tell()}
                    yield json_pieces(row, self.text_key, f'{path}, number {i}'), position

    def parquet_units(self, n, at):
        """Yield the Units of file n, .parquet, starting at a row. Memory holds no more than a page of each column."""
        path, row, size = self.files[n][0], 0, 0
        unit = Unit({}, path)
        with reading(path), open_parquet(path) as table:
            groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            first = next((i for i, end in enumerate(itertools.accumulate(groups)) if end > at), len(groups))
            row = sum(groups[:first])
            row_groups = list(range(first, len(groups)))
            for batch in table.iter_batches(ROWS, row_groups, [self.text_key], use_threads=False):
                texts = batch.column(0).to_pylist()[max(0, at - row) :]
                row += len(batch)
                if row <= at:
                    continue
                pieces, n_bytes = column_pieces(texts, path, self.text_key)
                unit.pieces += pieces
                size += n_bytes
                if size >= UNIT or row == table.metadata.num_rows:
                    progress = self.before[n] + self.sizes[n] * row // table.metadata.num_rows
                    unit.position = {'file': n, 'at': row, 'progress': progress}
                    yield unit
                    unit, size = Unit({}, path), 0


class Hub:
    """A data set streamed from the Hugging Face hub: nothing is stored on disk, and no code of its authors runs.

    Each document goes to training or validation by a hash of its text.
    """

    parts, single, cut = 1, False, None

    def __init__(
        self,
        name: str,
        val_fraction: float,
        config: str | None = None,
        revision: str | None = None,
        text_key: str = 'text',
        total: int | None = None,
    ):
        """Describe the data set; units() connects.

        name: of the data set, 'owner/name'.
        val_fraction: share of the documents for validation.
        config: which configuration; None: the default.
        revision: which branch or commit; None: the newest.
        text_key: the column that holds the text.
        total: approximate bytes of text, for the progress bar and the check of the disk.
        """
        check_fraction(val_fraction)
        self.name, self.val_fraction, self.config, self.revision = name, val_fraction, config, revision
        self.text_key, self.total = text_key, total
        self.fingerprint = [name, config, revision]

    def check_unchanged(self):
        """A commit does not change."""

    def units(self, position=None, part=None):
        """Yield the Units after a position, by default all.

        The position holds the commit, so that reading continues in the same version of the data set.
        """
        print(f'streaming {self.name} from the Hugging Face hub ...', flush=True)
        with self.reaching():
            import datasets
            from huggingface_hub import HfApi

            logging = datasets.utils.logging
            logging.set_verbosity(logging.CRITICAL)  # no line per retry: the last error becomes ours
            logging.disable_progress_bar()
            getLogger('huggingface_hub').setLevel('CRITICAL')
            if not position:
                local = os.path.isdir(self.name)  # the library prefers a local folder of this name
                commit = None if local else HfApi().dataset_info(self.name, revision=self.revision).sha
                position = {'revision': commit, 'row': 0, 'progress': 0}
            revision, columns = position['revision'], [self.text_key]
            rows = datasets.load_dataset(
                self.name, self.config, revision=revision, split='train', streaming=True, columns=columns
            )
            if 'state' in position:
                rows.load_state_dict(position['state'])
        row, progress, batches = position['row'], position['progress'], rows.iter(batch_size=ROWS)
        unit, size = Unit({}, self.name), 0
        while True:
            with self.reaching(f', after row {row}'):
                batch = next(batches, None)
            if batch:
                pieces, n_bytes = column_pieces(batch[self.text_key], self.name, self.text_key)
                unit.pieces += pieces
                row, size = row + len(batch[self.text_key]), size + n_bytes
            if unit.pieces and (size >= UNIT or not batch):
                progress += size
                unit.position = {'revision': revision, 'row': row, 'progress': progress, 'state': rows.state_dict()}
                yield unit
                unit, size = Unit({}, self.name), 0
            if not batch:
                return

    @contextmanager
    def reaching(self, where=''):
        """Context manager: any error on the way to the hub becomes one UserError."""
        try:
            yield
        except ImportError as error:
            raise UserError(f'{self.name} needs the package datasets: pip install datasets') from error
        except Exception as error:  # hub, network, parquet: each library raises errors of its own
            raise UserError(
                f'cannot load {self.name}{where} (is the network reachable? the same command continues from here; '
                f'--input= takes local files): {type(error).__name__}: {one_line(str(error), 120)}'
            ) from error


def column_pieces(texts, where, text_key):
    """The texts in a column of a table -> their pieces, their size in bytes. UserError if one is not a text."""
    wrong = next((text for text in texts if not isinstance(text, (str, type(None)))), None)
    if wrong is not None:
        raise UserError(
            f'{where}: its column {text_key!r} holds {type(wrong).__name__}, not text; --text_key= names another'
        )
    pieces = [Piece(replace_surrogates(text)) for text in texts if text]
    return pieces, sum(len(piece.text.encode()) for piece in pieces)


class NotText(UserError):
    """A file cannot be read as text."""


def ending_of(path):
    """The file name extension in lower case, such as '.txt', without that of the compression."""
    name = path.lower()
    return os.path.splitext(os.path.splitext(name)[0] if name.endswith(COMPRESSED) else name)[1]


def kind_of(path):
    """The format of a file by its name: 'lines', 'array', 'csv', 'parquet', or '' for a text. NotText if it is none."""
    ending = ending_of(path)
    if os.path.isdir(path):
        raise NotText(f'{path} is a link to a folder, which is not followed: move the folder itself here')
    if ending in NOT_TEXT:
        raise NotText(
            f'{path}: {ending} files are not read, make it a .txt, .jsonl, .csv or .parquet file (renamed to .txt, '
            'it is read as it is)'
        )
    if ending == '.parquet' and path.lower().endswith(COMPRESSED):
        raise NotText(f'{path}: decompress it first')
    kind = TABLES.get(ending, '')
    return kind_of_json(path) if kind == 'array' else kind


def kind_of_json(path):
    """The format of a .json file by how it begins: 'array', or 'lines' with one value each. NotText if neither."""
    with opened(path) as (_, content), io.TextIOWrapper(content, encoding='utf-8-sig') as file:
        try:
            start = file.read(UNIT).lstrip()
        except UnicodeDecodeError as error:
            raise NotText(
                f'{path} is not UTF-8 text (byte {first_bad_byte(path)}): convert it first, with iconv for instance'
            ) from error
    if start.startswith('['):
        return 'array'
    line, ended, _ = start.partition('\n')
    try:
        if ended or len(line) < UNIT:
            json.loads(line or '{}')
    except (ValueError, RecursionError) as error:
        raise NotText(f'{path} is neither an array of texts or objects nor one of them per line') from error
    return 'lines'


@contextmanager
def opened(path):
    """Context manager: open a file -> (the raw file, its decompressed content), as bytes. Errors become UserErrors."""
    with reading(path), open(path, 'rb') as raw:
        if path.lower().endswith('.gz'):
            yield raw, gzip.GzipFile(fileobj=raw)
        elif path.lower().endswith('.zst'):
            yield raw, io.BufferedReader(ZstandardFile(raw))
        else:
            yield raw, raw


def csv_rows(file, path, text_key):
    """Yield the texts in a column of a .csv file whose first line names the columns.

    UserError unless exactly one column is called text_key and every row has as many fields as the first line.
    """
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(file, strict=True)
    try:
        names = next(rows, [])
        if names.count(text_key) != 1:
            raise UserError(
                f'{path}: its first line must name one column {text_key!r}: --text_key= may be one of '
                f'{one_line(", ".join(names), 200)}'
            )
        for row in rows:
            if row and len(row) != len(names):
                raise UserError(
                    f'{path}, line {rows.line_num}: {len(row)} fields, where the first line names {len(names)}; a text '
                    'that contains a comma, a quote or a line end must be quoted'
                )
            if any('\0' in field for field in row):
                raise UserError(f'{path}, line {rows.line_num}: holds a zero byte, so it is not text: fix the file')
            if row:
                yield row[names.index(text_key)]
    except csv.Error as error:
        raise UserError(f'{path}, line {rows.line_num}: not valid .csv: {error}') from error


def array_elements(file, path, text_key):
    """Yield the elements of a JSON array. Memory holds no more than one element and a UNIT of text."""
    decode, text, at = json.JSONDecoder().raw_decode, '', 0

    def following():
        """Skip white space -> the next character, '' at the end."""
        nonlocal text, at
        while True:
            at = JSON_SPACE.match(text, at).end()
            if at < len(text):
                return text[at]
            text, at = file.read(UNIT), 0
            if not text:
                return ''

    def element():
        """Parse the value that begins here, reading more text while it is incomplete."""
        nonlocal text, at
        while True:
            try:
                value, at = decode(text, at)
                return value
            except ValueError:
                more = file.read(max(UNIT, len(text) - at)) if len(text) - at < LARGEST_ELEMENT else ''
                if not more:
                    raise
                text, at = text[at:] + more, 0

    n, comma = 0, following()  # the bracket that kind_of_json saw
    with user_errors(ValueError, RecursionError, where=f'{path} is not a JSON array: '):
        while comma:
            at += 1
            if following() != ']' or n:
                yield element()
                n += 1
            comma = following() == ','
            if not comma and following() != ']':
                raise ValueError(f'after element {n} there is neither a comma nor the bracket that ends it')
        at += 1
        if following():
            raise ValueError('something follows the bracket that ends it')


def walk(path, own=None):
    """Yield a file, or the files below a folder in the order of their names, without hidden ones.

    Links to folders are yielded like files. own: a folder in which files that a preparation writes are left out.
    """
    if not os.path.isdir(path):
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(f'{path} is a broken link: fix it, or delete it')
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(
                f'{path} is neither a file nor a folder: it is read more than once, so save it to a file first'
            )
        yield path
        return

    def fail(error):
        raise UserError(f'cannot read {error.filename}: {error.strerror}')

    for folder, folders, names in os.walk(path, onerror=fail):
        is_own = own is not None and os.path.exists(own) and os.path.samefile(folder, own)
        folders[:] = sorted(
            name for name in folders if not name.startswith('.') and not (is_own and OWN.fullmatch(name))
        )
        links = [
            name for name in folders if os.path.islink(os.path.join(folder, name))
        ]  # which os.walk does not follow
        for name in sorted(name for name in names if not name.startswith('.') and not (is_own and OWN.fullmatch(name))):
            yield from walk(os.path.join(folder, name))
        yield from (os.path.join(folder, name) for name in links)


def skip(file, n):
    """Read and discard n characters or bytes."""
    for start in range(0, n, UNIT):
        file.read(min(UNIT, n - start))


class ZstandardFile(io.RawIOBase):
    """The decompressed content of a .zst file. Unlike the library's reader, it raises EOFError for a truncated file."""

    def __init__(self, raw):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f'{raw.name} needs the package zstandard: pip install zstandard') from error
        self.raw, self.new = raw, zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.frame, self.content = None, b''

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.content:
            compressed = (self.frame.unused_data if self.frame and self.frame.eof else b'') or self.raw.read(2**17)
            if not compressed:
                if self.frame and not self.frame.eof:
                    raise EOFError('it ends within a frame')
                return 0
            if not self.frame or self.frame.eof:
                self.frame = self.new()
            self.content = self.frame.decompress(compressed)
        n = min(len(buffer), len(self.content))
        buffer[:n], self.content = self.content[:n], self.content[n:]
        return n


@contextmanager
def reading(path):
    """Context manager: errors in reading a file become a UserError that names it."""
    try:
        yield
    except Exception as error:
        is_known = isinstance(error, (OSError, EOFError, UnicodeDecodeError, zlib.error))
        if not is_known and type(error).__name__ not in (
            'ZstdError',
            'ArrowInvalid',
        ):  # of packages that may be missing
            raise
        raise UserError(
            f'cannot read {path}: {one_line(str(error), 150)}; it may have been cut short, or have changed'
        ) from error


def count_characters(path):
    """Count the characters of a UTF-8 text file, without a byte order mark; a line end counts as one.

    NotText if it is not text, UserError if it cannot be read.
    """
    n = 0
    with opened(path) as (_, content), io.TextIOWrapper(content, encoding='utf-8-sig') as file:
        try:
            while text := file.read(UNIT):
                if '\0' in text:
                    raise NotText(
                        f'{path} holds zero bytes, the first after {n + text.index(chr(0))} characters, so it is not '
                        'UTF-8 text: convert it first, with iconv for instance, or delete them'
                    )
                n += len(text)
        except UnicodeDecodeError as error:
            raise NotText(
                f'{path} is not UTF-8 text (byte {first_bad_byte(path)}): convert it first, with iconv for instance'
            ) from error
    return n


def first_bad_byte(path):
    """Offset of the first byte that is not valid UTF-8."""
    decoder, before = codecs.getincrementaldecoder('utf-8')(), 0
    with opened(path) as (_, file):
        while content := file.read(UNIT):
            pending = len(decoder.getstate()[0])  # bytes of a character that began in the previous piece
            try:
                decoder.decode(content)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            before += len(content)
    return before


BEFORE_SPACE = re.compile(r'(?s).*\S(?=[ \n])')


def safe_cut(text):
    """Where to cut a text that continues: before the last space or line end that follows another character.

    GPT-2's pattern always ends a piece there, so both sides are encoded as they would be together. Without such a
    place the cut is at the end, and may split a token.
    """
    match = BEFORE_SPACE.match(text)
    return match.end() if match else len(text)


def open_parquet(path):
    """Open a parquet file without read-ahead. UserError if pyarrow is missing or the file is damaged."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path} needs the package pyarrow: pip install datasets') from error
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def parquet_text_bytes(path, text_key):
    """Approximate bytes of the text column of a parquet file, from its footer. UserError if there is no such column."""
    with open_parquet(path) as table:
        columns = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
        if text_key not in columns:
            raise UserError(
                f'{path} has no column {text_key!r}: --text_key= may be one of {one_line(", ".join(columns), 200)}'
            )
        column = columns.index(text_key)
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        return sum(group.column(column).total_uncompressed_size for group in groups)
