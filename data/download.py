"""Download the file that a data set is made from, once, and check it."""

import hashlib
import os
import time

from common.errors import UserError, one_line
from common.files import written_whole

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def download(url: str, path: str, sha256: str, tries: int = 3, timeout: float = 10):
    """Download url to path, unless the file is there already, with a progress bar.

    url: where to download from.
    path: where to store it; the file appears only when it is complete and its checksum is right.
    sha256: of its content, hexadecimal.
    tries: attempts before giving up with a UserError.
    timeout: seconds without any data after which an attempt ends.
    """
    if os.path.exists(path):
        if file_sha256(path) == sha256:
            return
        raise UserError(
            f'{path} is there already, but it is not the file at {url}: move it away, or use it with --input={path}'
        )
    try:
        import requests
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(f'downloading needs {error.name}: pip install {error.name}, or give --input=FILE') from error
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
                        raise OSError('the checksum of the downloaded file is wrong')
            return
        except (requests.RequestException, OSError) as error:
            problem = error
            if attempt < tries - 1:
                time.sleep(attempt + 1)
    raise UserError(
        f'cannot download {url}: {one_line(str(problem), 120)}; try again, or use a local copy with --input=FILE'
    )


def file_sha256(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()
