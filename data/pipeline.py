"""From text to token files: download, read, split, encode, write. Every data set's prepare.py is a few calls of these."""
import hashlib
import json
import os
import time

import numpy as np
from tqdm import tqdm

from configurator import UserError, one_line, user_errors
from tokenizer import CharTokenizer, load_gpt2

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(url, path, sha256, tries=3, timeout=10):
    """Fetch url to path unless it is there already, with a progress bar; the file appears only once it is whole and its
    SHA-256 is right. timeout: seconds of silence that end a try. Raises UserError when every try has failed."""
    if os.path.exists(path):
        if file_sha256(path) == sha256:
            return
        raise UserError(f'{path} is there already and is not what {url} holds: move it away, or give it as --input={path}')
    try:
        import requests
    except ImportError as error:
        raise UserError('downloading needs the package requests: pip install requests, or give --input=FILE') from error
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


def read_text(path):
    """The text of a UTF-8 file, whatever the locale; line ends become '\\n', a byte order mark goes. UserError if it
    cannot be read or is not UTF-8."""
    with user_errors(OSError, where=f'cannot read {path}: '), open(path, encoding='utf-8-sig') as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not UTF-8 text (byte {error.start}): convert it first, with iconv for instance') from error
    if '\0' in text:
        raise UserError(f'{path} holds zero bytes, so it is not text')
    return text


def read_documents(path):
    """The texts of a file, or of every file below a folder, in the order of their names -> list. Hidden files and files
    that are not text are passed over in a folder, and counted. UserError if no text is found."""
    if not os.path.isdir(path):
        documents, passed = [read_text(path)], 0
    else:
        documents, passed = [], 0
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith('.'))
            for name in sorted(name for name in files if not name.startswith('.')):
                try:
                    documents.append(read_text(os.path.join(folder, name)))
                except UserError:
                    passed += 1
    documents = [text for text in documents if text]
    if not documents:
        raise UserError(f'there is no text in {path}')
    if passed:
        print(f'passed over {passed} files that are not UTF-8 text')
    return documents


def split_documents(documents, val_fraction):
    """Cut the row of documents at int((1 - val_fraction) * characters) -> (train, val), lists of texts. The cut may go
    through a document."""
    cut = int((1 - val_fraction) * sum(map(len, documents)))
    train, val = [], []
    for text in documents:
        if text[:cut]:
            train.append(text[:cut])
        if text[cut:]:
            val.append(text[cut:])
        cut = max(0, cut - len(text))
    return train, val


def write_dataset(out_dir, documents, kind, val_fraction=0.1):
    """Split, encode and write a data set: train.bin, val.bin and meta.json. The same documents give the same bytes.

    kind: 'char', documents joined by a line end, or 'gpt2', each followed by the end-of-text token unless it is the only one.
    meta.json, which tells the sizes, is replaced last: files of two preparations never pass for one data set.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f'--val_fraction={val_fraction}: must be between 0 and 1')
    splits = dict(zip(('train', 'val'), split_documents(documents, val_fraction)))
    if not all(splits.values()):
        raise UserError(f'{sum(map(len, documents))} characters are too few to split into training and validation text')
    if kind == 'char':
        tokenizer = CharTokenizer.train('\n'.join(documents))
        ids = {split: tokenizer.encode('\n'.join(texts)) for split, texts in splits.items()}
    elif kind == 'gpt2':
        tokenizer = load_gpt2()
        ids = {split: encode_gpt2(tokenizer, texts, split, end_of_text=len(documents) > 1) for split, texts in splits.items()}
    else:
        raise UserError(f"--tokenizer={kind}: must be 'char' or 'gpt2'")
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
    meta = {'tokenizer': tokenizer.spec(), 'vocab_size': tokenizer.vocab_size, 'dtype': dtype.name,
            'tokens': {split: len(row) for split, row in ids.items()}}
    description = json.dumps(meta, indent=1) + '\n'
    with user_errors(OSError, where=f'cannot write to {out_dir}: '):
        os.makedirs(out_dir, exist_ok=True)
        for split, row in ids.items():
            write_file(os.path.join(out_dir, f'{split}.bin'), row.astype(dtype).tobytes())
        write_file(os.path.join(out_dir, 'meta.json'), description.encode())
    print(f'{os.path.relpath(out_dir)}: {meta["tokens"]["train"]:,} train and {meta["tokens"]["val"]:,} val tokens, '
          f'vocabulary of {tokenizer.vocab_size:,}')


def encode_gpt2(tokenizer, texts, split, end_of_text):
    """Texts to one row of GPT-2 ids, with the end-of-text token after each if wanted."""
    rows = []
    for text in tqdm(texts, desc=f'encoding {split}', unit='document', disable=len(texts) == 1):
        rows.append(tokenizer.encode(text))
        if end_of_text:
            rows.append([tokenizer.end_of_text])
    return np.concatenate(rows)


def write_file(path, content):
    """Write bytes to path so that it is never seen half written."""
    with open(path + '.part', 'wb') as file:
        file.write(content)
    os.replace(path + '.part', path)
