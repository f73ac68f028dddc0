"""Tiny Shakespeare, one id per character: 1,003,854 train and 111,540 val tokens, a vocabulary of 65."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # not HERE/../..: data/ may be a link
from configurator import configure
from data.download import SHAKESPEARE_SHA256, SHAKESPEARE_URL, download
from data.pipeline import write_dataset
from data.sources import Files

input = ''  # local copy of the text; '': download it
configure(globals(), paths=('input',))

path = input or os.path.join(HERE, 'input.txt')
if not input:
    download(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
write_dataset(HERE, Files(path, val_fraction=0.1), 'char')
