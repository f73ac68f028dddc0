"""Where text comes from: files of several kinds, a data set of the Hugging Face hub, or documents in memory.

A source hands out units: pieces of about a megabyte, in a fixed order, each with the position at which reading goes on after it.
Reading from a position gives the same units as reading from the start, so that an interrupted preparation can go on from its last one.
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

from common.errors import UserError, leave_at_once, one_line, user_errors
from tokenizer import replace_surrogates

UNIT = 2**20  # characters or bytes in a unit, about
ROWS = 256  # of a table, read at once
LARGEST_ELEMENT = 2**28  # characters of an element of a JSON array: one that has no end must not fill the memory
JSON_SPACE = re.compile(r'[ \t\n\r]*')
TABLES = {
    '.jsonl': 'lines',
    '.ndjson': 'lines',
    '.json': 'array',
    '.csv': 'csv',
    '.parquet': 'parquet',
}  # by ending; all else is text
COMPRESSED = ('.gz', '.zst')
NOT_TEXT = (
    '.tsv',
    '.html',
    '.htm',
    '.xhtml',
    '.xml',
    '.svg',
    '.rtf',
    '.pdf',
    '.ps',
    '.doc',
    '.docx',
    '.odt',
    '.epub',
    '.mobi',
    '.ipynb',
    '.xlsx',
    '.arrow',
    '.feather',
    '.npy',
    '.zip',
    '.tar',
    '.bz2',
    '.xz',
    '.7z',
    '.rar',
)  # or not only text
OWN = re.compile(
    r'(train|val)(_\d+)?\.bin|meta\.json|preparing|.*\.part'
)  # what a preparation writes into its data set's folder


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
    where: str  # for errors: the file
    at: int = 0  # for errors: the byte of the file that the lines begin at
    pieces: list = field(default_factory=list)
    lines: bytes = b''


def pieces_of(unit, text_key):
    """Yield a unit's pieces. UserError if one of its JSON lines is not an object with a text under text_key, or a text."""
    yield from unit.pieces
    at = unit.at
    for line in io.BytesIO(unit.lines):
        if line.strip():
            where = f'{unit.where}, byte {at}'
            with user_errors(ValueError, RecursionError, where=f'{where}: this is no line of JSON: '):
                row = json.loads(line.decode())
            yield from json_pieces(row, text_key, where)
        at += len(line)


def json_pieces(value, text_key, where):
    """The piece for an object with a text under text_key, or for a bare text; none if it is empty. UserError for anything else."""
    text = value.get(text_key, value) if isinstance(value, dict) else value
    if not isinstance(text, (str, type(None))) or value is None:
        raise UserError(f'{where}: no JSON object with a text {text_key!r}; --text_key= names another field')
    return [Piece(replace_surrogates(text))] if text else []


def grouped(parts, where):
    """(pieces, position) … -> Units of about UNIT characters; pieces that come together stay together."""
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
    """The pieces of a text at this offset in all the text, which is for training before the cut, for validation from it on."""
    k = min(max(cut - offset, 0), len(text))
    pieces = [Piece(text[:k], ends and k == len(text), 'train'), Piece(text[k:], ends, 'val')]
    return [piece for piece in pieces if piece.text]


def check_fraction(val_fraction):
    """Raise UserError unless it is a share."""
    if not 0 < val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}: must be between 0 and 1')


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
        check_fraction(val_fraction)
        self.texts, self.single, self.val_fraction = texts, len(texts) == 1, val_fraction
        self.before = [0, *itertools.accumulate(map(len, texts))]  # characters before each
        self.total = self.before[-1]
        self.cut = val_begins(self.total, val_fraction)
        self.fingerprint = hashlib.sha256('\0'.join(texts).encode('utf-8', 'surrogatepass')).hexdigest()

    def check_unchanged(self):
        """Nothing to check: the texts are in memory."""

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start."""
        first = position['document'] if position else 0
        return grouped(
            (
                (
                    cut_in_two(self.texts[n], True, self.before[n], self.cut),
                    {'document': n + 1, 'progress': self.before[n + 1]},
                )
                for n in range(first, len(self.texts))
            ),
            'the text',
        )


class Files:
    """A file, or those below a folder in the order of their names. They are tables: JSON lines (.jsonl, .ndjson), JSON arrays (.json),
    .csv, .parquet; or whole texts, UTF-8: .txt files, or, if a folder has no tables, all that are text. All but .parquet may be compressed:
    .gz, .zst. What is not taken is told, but for hidden files, and, in the data set's own folder, what a preparation writes there.

    Documents go to training or validation one by one, by a hash of their text, or of a text file's name. Fewer text files than
    1 / val_fraction are one row of text, whose end is for validation.
    """

    def __init__(self, path, val_fraction, text_key='text', own=None):
        """own: the data set's own folder. UserError if there is no text in path, or it cannot be read."""
        check_fraction(val_fraction)
        self.root, self.val_fraction, self.text_key = path, val_fraction, text_key
        kinds, refused = {}, {}  # path -> kind, None if it has none; path -> why it is not taken
        for file in walk(path, own):
            try:
                kinds[file] = kind_of(file)
            except NotText as error:
                kinds[file], refused[file] = None, str(error)
        texts_only = not any(kinds.values())
        self.files, self.starts, self.sizes, characters = (
            [],
            [],
            [],
            0,
        )  # (path, kind); of the text files, characters before them; bytes
        self.fingerprint = []
        for file, kind in kinds.items():
            if kind is None:
                continue
            try:
                if not kind and not texts_only and ending_of(file) != '.txt':
                    raise NotText(
                        f'{file} is no .txt file, and beside tables only those are taken: give it that ending to have it read'
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
        told = (
            f'passed over {len(refused)} files, the first: {next(refused[file] for file in kinds if file in refused)}'
            if refused
            else ''
        )
        if not self.files:
            raise UserError(f'there is no text in {path}' + (told and f': {told}'))
        if told:
            print(told)
        self.parts, self.single = len(self.files), texts_only and len(self.files) == 1
        self.cut = val_begins(characters, val_fraction) if texts_only and len(self.files) * val_fraction < 1 else None
        self.before = [0, *itertools.accumulate(self.sizes)]  # bytes before each file
        self.total = self.before[-1]

    def check_unchanged(self):
        """Raise UserError if a file is not the one that it was when reading began."""
        for (file, _), (_, *seen) in zip(self.files, self.fingerprint):
            with user_errors(OSError, where=f'cannot read {file}: '):
                stat = os.stat(file)
            if [stat.st_size, stat.st_mtime_ns] != seen:
                raise UserError(f'{file} has changed while it was being read: run the same command again')

    def name(self, file):
        """What a file is called in the data set's own terms: its path below the folder."""
        return (
            os.path.relpath(file, self.root).replace(os.sep, '/')
            if os.path.isdir(self.root)
            else os.path.basename(file)
        )

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start; those of one part, a file, only if it is given."""
        position = position or {'file': part or 0, 'at': 0, 'progress': 0}
        end = len(self.files) if part is None else part + 1
        while position['file'] < end:
            n = position['file']
            kind = self.files[n][1]
            if not kind:  # text files in a row share units
                last = next((i for i in range(n, end) if self.files[i][1]), end)
                yield from grouped(self.text_pieces(position, last), self.files[n][0])
            else:
                last = n + 1
                yield from {'lines': self.line_units, 'parquet': self.table_units}.get(kind, self.row_units)(
                    n, position['at']
                )
            position = {'file': last, 'at': 0}

    def text_pieces(self, position, end):
        """Text files from a position on, long ones in pieces that are cut where no tokenizer joins what is before and behind. Where
        they are cut depends on what is before, not on where reading began."""
        for n in range(position['file'], end):
            path, at = self.files[n][0], position['at'] if n == position['file'] else 0
            with opened(path) as (raw, content), io.TextIOWrapper(content, encoding='utf-8-sig') as file:
                skip(file, at)
                text = file.read(UNIT)
                while text:
                    following = file.read(1)
                    k = safe_cut(text) if following else len(text)
                    ends, part = not following, text[:k]
                    pieces = (
                        cut_in_two(part, ends, self.starts[n] + at, self.cut)
                        if self.cut is not None
                        else [Piece(part, ends, key=self.name(path))]
                    )
                    at += k
                    yield pieces, {'file': n + ends, 'at': 0 if ends else at, 'progress': self.before[n] + raw.tell()}
                    text = text[k:] + following
                    text += file.read(UNIT - len(text))

    def line_units(self, n, at):
        """JSON lines from a byte on, as they are: parsing them is for the workers."""
        path, _ = self.files[n]
        with opened(path) as (raw, file):
            if file is raw:
                file.seek(at)
            else:  # there is no way to the place but through what is before it
                skip(file, at)
            while lines := file.read(UNIT) + file.readline():
                start, at = at, at + len(lines)
                if start == 0:
                    lines = lines.removeprefix(b'\xef\xbb\xbf')
                yield Unit({'file': n, 'at': at, 'progress': self.before[n] + raw.tell()}, path, start, lines=lines)

    def row_units(self, n, at):
        """The rows of a .csv file, or the elements of a JSON array, from one on; there is no way to it but through those before it."""
        path, kind = self.files[n]
        rows = csv_rows if kind == 'csv' else array_elements
        with opened(path) as (raw, content), io.TextIOWrapper(content, encoding='utf-8-sig', newline='') as file:
            yield from grouped(
                (
                    (
                        json_pieces(row, self.text_key, f'{path}, number {i + 1}'),
                        {'file': n, 'at': i + 1, 'progress': self.before[n] + raw.tell()},
                    )
                    for i, row in enumerate(rows(file, path, self.text_key))
                    if i >= at
                ),
                path,
            )

    def table_units(self, n, at):
        """The rows of a parquet file from a row on; no more than a page of each column is in memory."""
        path, row, size = self.files[n][0], 0, 0
        unit = Unit({}, path)
        with reading(path), open_parquet(path) as table:
            groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            first = next((i for i, end in enumerate(itertools.accumulate(groups)) if end > at), len(groups))
            row = sum(groups[:first])
            for batch in table.iter_batches(
                ROWS, row_groups=list(range(first, len(groups))), columns=[self.text_key], use_threads=False
            ):
                texts = batch.column(0).to_pylist()[max(0, at - row) :]
                row += len(batch)
                if row <= at:
                    continue
                pieces, n_bytes = row_pieces(texts, path, self.text_key)
                unit.pieces += pieces
                size += n_bytes
                if size >= UNIT or row == table.metadata.num_rows:
                    unit.position = {
                        'file': n,
                        'at': row,
                        'progress': self.before[n] + self.sizes[n] * row // table.metadata.num_rows,
                    }
                    yield unit
                    unit, size = Unit({}, path), 0


class Hub:
    """A data set of the Hugging Face hub, streamed: nothing is kept on disk, and no code of its authors is run. Documents go to training or
    validation one by one, by a hash of their text."""

    parts, single, cut = 1, False, None

    def __init__(self, name, val_fraction, config=None, revision=None, text_key='text', total=None):
        """total: bytes of text in it, about, to tell the time left by and to check the disk."""
        check_fraction(val_fraction)
        self.name, self.val_fraction, self.config, self.revision = name, val_fraction, config, revision
        self.text_key, self.total = text_key, total
        self.fingerprint = [name, config, revision]

    def check_unchanged(self):
        """Nothing to check: a commit does not change."""

    def units(self, position=None, part=None):
        """Yield the Units from a position on, by default from the start. The position holds the commit, so that what is uploaded in
        the meantime does not get in between."""
        print(f'streaming {self.name} from the Hugging Face hub ...', flush=True)
        with self.reaching():
            import datasets

            leave_at_once()  # a stream that was not read to its end keeps threads
            from huggingface_hub import HfApi

            datasets.utils.logging.set_verbosity(
                datasets.utils.logging.CRITICAL
            )  # one line in the end, not one a retry
            getLogger('huggingface_hub').setLevel('CRITICAL')
            datasets.utils.logging.disable_progress_bar()
            local = os.path.isdir(self.name)  # which the library takes first
            position = position or {
                'revision': None if local else HfApi().dataset_info(self.name, revision=self.revision).sha,
                'row': 0,
                'progress': 0,
            }
            rows = datasets.load_dataset(
                self.name,
                self.config,
                revision=position['revision'],
                split='train',
                streaming=True,
                columns=[self.text_key],
            )
            if 'state' in position:
                rows.load_state_dict(position['state'])
        row, progress, batches = position['row'], position['progress'], rows.iter(batch_size=ROWS)
        unit, size = Unit({}, self.name), 0
        while True:
            with self.reaching(f', after row {row}'):
                batch = next(batches, None)
            if batch:
                pieces, n_bytes = row_pieces(batch[self.text_key], self.name, self.text_key)
                unit.pieces += pieces
                row, size = row + len(batch[self.text_key]), size + n_bytes
            if unit.pieces and (size >= UNIT or not batch):
                progress += size
                unit.position = {
                    'revision': position['revision'],
                    'row': row,
                    'progress': progress,
                    'state': rows.state_dict(),
                }
                yield unit
                unit, size = Unit({}, self.name), 0
            if not batch:
                return

    @contextmanager
    def reaching(self, where=''):
        """A context in which what goes wrong between here and the hub is one line."""
        try:
            yield
        except ImportError as error:
            raise UserError(f'{self.name} needs the package datasets: pip install datasets') from error
        except Exception as error:  # hub, network, parquet: each library in between has errors of its own
            raise UserError(
                f'cannot load {self.name}{where} (is the network reachable? the same command goes on from here; --input= takes '
                f'local files): {type(error).__name__}: {one_line(str(error), 120)}'
            ) from error


def row_pieces(texts, where, text_key):
    """Texts of a table -> their pieces, and how many bytes they are. UserError if they are none."""
    wrong = next((text for text in texts if not isinstance(text, (str, type(None)))), None)
    if wrong is not None:
        raise UserError(
            f'{where}: its column {text_key!r} holds {type(wrong).__name__}, not text; --text_key= names another'
        )
    pieces = [Piece(replace_surrogates(text)) for text in texts if text]
    return pieces, sum(len(piece.text.encode()) for piece in pieces)


class NotText(UserError):
    """A file that holds something else."""


def ending_of(path):
    """How the name of a file ends, '.txt' for example, in lower case, without what says that it is compressed."""
    name = path.lower()
    return os.path.splitext(os.path.splitext(name)[0] if name.endswith(COMPRESSED) else name)[1]


def kind_of(path):
    """What a file is read as, by its name: 'lines' of JSON, an 'array' of JSON, 'csv', 'parquet', or '' for a text. NotText if none is."""
    ending = ending_of(path)
    if os.path.isdir(path):
        raise NotText(f'{path} is a link to a folder, which is not followed: move the folder itself there')
    if ending in NOT_TEXT:
        raise NotText(
            f'{path}: {ending} files are not read, make it a .txt, .jsonl, .csv or .parquet file (if it is renamed to '
            '.txt, it is read as it stands)'
        )
    if ending == '.parquet' and path.lower().endswith(COMPRESSED):
        raise NotText(f'{path}: decompress it first')
    kind = TABLES.get(ending, '')
    return kind_of_json(path) if kind == 'array' else kind


def kind_of_json(path):
    """What a .json file is read as, by how it begins: an 'array', or 'lines' that are a value each. NotText if it is neither."""
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
        raise NotText(f'{path} is neither an array of texts or objects nor one of them a line') from error
    return 'lines'


@contextmanager
def opened(path):
    """A file of bytes -> (the file as it is on the disk, what it holds when decompressed). What goes wrong with it is a UserError."""
    with reading(path), open(path, 'rb') as raw:
        if path.lower().endswith('.gz'):
            yield raw, gzip.GzipFile(fileobj=raw)
        elif path.lower().endswith('.zst'):
            yield raw, io.BufferedReader(ZstandardFile(raw))
        else:
            yield raw, raw


def csv_rows(file, path, text_key):
    """Yield the texts of a column of a .csv file, whose first line names the columns. UserError unless one has that name, and each row as
    many fields."""
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
                    f'{path}, line {rows.line_num}: {len(row)} fields, where the first line names {len(names)}; a text with a '
                    'comma, a quote or a line end in it must stand in quotes'
                )
            if any('\0' in field for field in row):
                raise UserError(f'{path}, line {rows.line_num}: holds a zero byte, so it is not text: mend the file')
            if row:
                yield row[names.index(text_key)]
    except csv.Error as error:
        raise UserError(f'{path}, line {rows.line_num}: not .csv: {error}') from error


def array_elements(file, path, text_key):
    """Yield the elements of a JSON array. No more than a UNIT and an element are in memory."""
    decode, text, at = json.JSONDecoder().raw_decode, '', 0

    def following():
        """The next character that is no space, '' at the end."""
        nonlocal text, at
        while True:
            at = JSON_SPACE.match(text, at).end()
            if at < len(text):
                return text[at]
            text, at = file.read(UNIT), 0
            if not text:
                return ''

    def element():
        """The value that begins here, which may go beyond what has been read."""
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
    with user_errors(ValueError, RecursionError, where=f'{path} is no array of JSON: '):
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
    """Yield the file, or the files below the folder, in the order of their names, without hidden ones; links to folders are yielded as if
    they were files. own: a folder in which what a preparation writes is left out."""
    if not os.path.isdir(path):
        if os.path.islink(path) and not os.path.exists(path):
            raise UserError(f'{path} is a link to something that is not there: mend it, or delete it')
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(
                f'{path} is neither a file nor a folder: it has to be read more than once, so write it to a file first'
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
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # os.walk does not follow them
        for name in sorted(name for name in names if not name.startswith('.') and not (is_own and OWN.fullmatch(name))):
            yield from walk(os.path.join(folder, name))
        yield from (os.path.join(folder, name) for name in links)


def skip(file, n):
    """Read n characters or bytes of a file, and forget them."""
    for start in range(0, n, UNIT):
        file.read(min(UNIT, n - start))


class ZstandardFile(io.RawIOBase):
    """What a .zst file holds, frame after frame. Unlike the library's own reader, it tells a file that was cut short from a whole one."""

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


class reading:
    """A context in which what goes wrong with a file is a UserError that names it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, (OSError, EOFError, UnicodeDecodeError, zlib.error)) or type(error).__name__ in (
            'ZstdError',
            'ArrowInvalid',
        ):
            raise UserError(
                f'cannot read {self.path}: {one_line(str(error), 150)}; it may have been cut short, or have changed'
            ) from error


def count_characters(path):
    """Characters in a text file, UTF-8 whatever the locale; a byte order mark does not count, a line end is one character. UserError if
    it cannot be read or is not text."""
    n = 0
    with opened(path) as (_, content), io.TextIOWrapper(content, encoding='utf-8-sig') as file:
        try:
            while text := file.read(UNIT):
                if '\0' in text:
                    raise NotText(
                        f'{path} holds zero bytes, the first after {n + text.index(chr(0))} characters, so it is not UTF-8 text: '
                        'convert it first, with iconv for instance, or delete them'
                    )
                n += len(text)
        except UnicodeDecodeError as error:
            raise NotText(
                f'{path} is not UTF-8 text (byte {first_bad_byte(path)}): convert it first, with iconv for instance'
            ) from error
    return n


def first_bad_byte(path):
    """Offset of the first byte of a file that is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder('utf-8')(), 0
    with opened(path) as (_, file):
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


def open_parquet(path):
    """A parquet file, read without what pyarrow would keep ahead. UserError if the package is missing, or it is none."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path} needs the package pyarrow: pip install datasets') from error
    with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)


def parquet_text_bytes(path, text_key):
    """Bytes of the text column of a parquet file, about, from its footer. UserError if it has none, or the file cannot be read."""
    with open_parquet(path) as table:
        columns = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
        if text_key not in columns:
            raise UserError(
                f'{path} has no column {text_key!r}: --text_key= may be one of {one_line(", ".join(columns), 200)}'
            )
        column = columns.index(text_key)
        return sum(
            table.metadata.row_group(i).column(column).total_uncompressed_size for i in range(table.num_row_groups)
        )
