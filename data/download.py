"""Fetching a file that a data set is made from, once, and checking that it is the right one."""

import hashlib
import os
import time

from common.errors import UserError, one_line
from common.files import written_whole

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(url, path, sha256, tries=3, timeout=10):
    """Fetch url to path unless it is there already, with a progress bar; the file appears only once it is whole and its
    SHA-256 is right. timeout: seconds of silence that end a try. Raises UserError when every try has failed."""
    if os.path.exists(path):
        if file_sha256(path) == sha256:
            return
        raise UserError(
            f'{path} is there already and is not what {url} holds: move it away, or give it as --input={path}'
        )
    try:
        import requests
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(
            f'downloading needs the package {error.name}: pip install {error.name}, or give --input=FILE'
        ) from error
    for attempt in range(tries):
        try:
            with requests.get(url, stream=True, timeout=timeout) as response:
                response.raise_for_status()
                size = int(response.headers.get('content-length', 0)) or None
                digest, bar = hashlib.sha256(), tqdm(total=size, unit='B', unit_scale=True, desc=os.path.basename(path))
                with written_whole(path) as file, bar:
                    for chunk in response.iter_content(2**16):
                        file.write(chunk)
                        digest.update(chunk)
                        bar.update(len(chunk))
                    if digest.hexdigest() != sha256:
                        raise OSError('what arrived has another checksum than expected')
            return
        except (requests.RequestException, OSError) as error:
            problem = error
            if attempt < tries - 1:
                time.sleep(attempt + 1)
    raise UserError(
        f'cannot download {url}: {one_line(str(problem), 120)}; try again, or give the text with --input=FILE'
    )


def file_sha256(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()
