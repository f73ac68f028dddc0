"""Text that comes with Python, one id per character: the language manual and the docstrings of the standard library.

The files are parsed, never imported. The text differs a little between Python versions.
"""

import ast
import glob
import hashlib
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # not HERE/../..: data/ may be a link
from common.errors import UserError
from configurator import configure
from data.chat.python_docs import STDLIB, parse
from data.pipeline import write_dataset
from data.sources import Documents

configure(globals())
NOT_LIBRARY = 'test site-packages dist-packages idlelib lib2to3 pydoc_data'.split()  # folders to skip


def manual():
    """Yield the topics of the language reference that comes with pydoc, in alphabetical order."""
    for node in parse(os.path.join(STDLIB, 'pydoc_data', 'topics.py')).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (topics[name] for name in sorted(topics))


def docstrings():
    """Yield the docstrings in the top two levels of the standard library, in the order of their paths."""
    paths = glob.glob(os.path.join(STDLIB, '*.py')) + glob.glob(os.path.join(STDLIB, '[a-z]*', '*.py'))
    for path in sorted(paths):
        if os.path.basename(os.path.dirname(path)) in NOT_LIBRARY:
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ''


documents = [text.strip() + '\n' for text in (*manual(), *docstrings()) if text.isascii() and len(text) > 200]
if not documents:
    raise UserError(f'there is no Python text in {STDLIB}: this Python comes without its manual and its sources')
documents.sort(key=lambda text: hashlib.sha256(text.encode()).digest())  # shuffle: both splits get some of each kind
write_dataset(HERE, Documents(documents, val_fraction=0.1), 'char')
