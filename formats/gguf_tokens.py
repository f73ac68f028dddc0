"""Tokenizers in GGUF files: their metadata to the spec of a tokenizer (see tokenizer.py), and back.

llama.cpp knows no tokenizer.json. It has lists of tokens, of their types, of merges or scores, and a name for the way
in which text is split first, tokenizer.ggml.pre. What it computes from them: its src/llama-vocab.cpp.
"""

import json
from itertools import groupby

import numpy as np

from common.errors import UserError, user_errors
from common.gguf_file import GGUFFile, quoted, read_gguf
from formats.tokenizer_files import to_library
from tokenizer import END_OF_TEXT, HuggingFaceTokenizer, check_spec, is_byte_level, load_tokenizer, text_vocab_size

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = '▁'  # how SentencePiece writes a space, U+2581
SPECIAL = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}  # ours: GGUF's name
MAX_LENGTH = 1000  # characters of a token: far more than any has, few enough to try all ways to cut one in two
NO_MERGES = ['']  # gguf writes no empty list; llama.cpp, which wants one, takes this for a merge of two empty texts


# --- how text is split ------------------------------------------------------------------------------------------------


def split_at(pattern):
    """The pre-tokenizer that cuts out what a regular expression matches."""
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS = (  # to be filled with the number of digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
GPT2 = [{**BYTES, 'use_regex': True}]
SMOLLM = [{'type': 'Digits', 'individual_digits': True}, *GPT2]
LLAMA3 = [split_at(WORDS % '{1,3}'), BYTES]
QWEN2 = [split_at(WORDS % ''), BYTES]
# llama.cpp's own, of files whose converter did not know the tokenizer
DEFAULT = [*map(split_at, (r'[\p{P}\$\+<=>\^~\|]+', GPT2_WORDS, r'\p{N}+', '[0-9][0-9][0-9]')), BYTES]
SPLITS = {  # by tokenizer.ggml.pre: the pre-tokenizers, and does a piece that is a token stay whole (ignore_merges)?
    'gpt-2': (GPT2, False),
    'phi-2': (GPT2, False),
    'smollm': (SMOLLM, False),
    'starcoder': (SMOLLM, False),
    'llama-bpe': (LLAMA3, True),
    'llama3': (LLAMA3, True),
    'llama-v3': (LLAMA3, True),
    'smaug-bpe': (LLAMA3, False),
    'qwen2': (QWEN2, False),
    'default': (DEFAULT, False),
}
NORMALIZED = ('qwen2',)  # the original models normalize text to NFC; llama.cpp does not
PREPENDS_BOS = ('llama-bpe', 'llama3', 'llama-v3')  # unless told otherwise


def parts_of(description, key):
    """A pre-tokenizer, normalizer or post-processor as a list of its parts."""
    if description is None:
        return []
    return description[key] if description['type'] == 'Sequence' else [description]


def essence(parts):
    """Parts of a pre-tokenizer without what ids do not depend on."""
    return [{'use_regex': True, **part, 'trim_offsets': 0} if 'ByteLevel' in part.values() else part for part in parts]


# --- in ---------------------------------------------------------------------------------------------------------------


def gguf_tokenizer(path: str) -> dict | None:
    """The tokenizer of a GGUF file -> its spec, None if the file has none.

    'end_of_text' is the file's eos token: what generation ends at, and what data preparation puts between texts. For
    SmolLM2-Instruct, whose eos is '<|im_end|>', it is that, though the vocabulary has '<|endoftext|>': so says the
    tokenizer_config.json of the original, from which llama.cpp's converter has it. UserError naming what stands in the
    way if the file is damaged, or its tokenizer is another than byte-level BPE split in one of SPLITS, SentencePiece's
    BPE, or characters.
    """
    file = read_gguf(path)
    metadata, where = file.metadata, f'{path}: the tokenizer '
    model = metadata.get('tokenizer.ggml.model', 'none')
    if not isinstance(model, str) or model in ('none', 'no_vocab'):
        return None
    if model not in ('gpt2', 'llama', 'rwkv'):
        raise UserError(f'{where}is of the kind {quoted(model)}, only gpt2, llama and rwkv (characters) can be read')
    with user_errors(ValueError, where=where):
        for key in ('add_sep_token', 'remove_extra_whitespaces', 'precompiled_charsmap', 'normalizer.lowercase'):
            value = metadata.get(f'tokenizer.ggml.{key}', False)
            if value is not False:
                raise ValueError(f'has tokenizer.ggml.{key}, which cannot be read')
        tokens, types = token_list(file)
        if model == 'rwkv':
            return characters_spec(tokens, types)
        names = {token: id for id, token in enumerate(tokens) if token and types[id] != UNUSED}
        if len(names) < sum(bool(token) and kind != UNUSED for token, kind in zip(tokens, types)):
            raise ValueError('has a token twice')
        special = special_ids(metadata, model, len(tokens))
        description = bpe(file, names) if model == 'gpt2' else sentencepiece(file, names, tokens, types, special)
        description['added_tokens'] = added_tokens(tokens, types)
        description['post_processor'] = post_processor(metadata, model, tokens, special)
        spec = {'kind': 'tokenizers', 'json': json.dumps(description, ensure_ascii=False)}
        if 'eos' in special:
            spec['end_of_text'] = tokens[special['eos']]
        HuggingFaceTokenizer(spec)  # raises ValueError if it is none
        if isinstance(metadata.get('tokenizer.chat_template'), str):
            spec['chat_template'] = metadata['tokenizer.chat_template']
        by_name = {name: tokens[special[theirs]] for name, theirs in SPECIAL.items() if theirs in special}
        return {**spec, 'special_tokens': by_name} if by_name else spec


def n_tokens(file: GGUFFile) -> int:
    """The number of tokens in a file, 0 if it has no tokenizer."""
    tokens = file.metadata.get('tokenizer.ggml.tokens')
    return len(tokens) if isinstance(tokens, list) else 0


def token_list(file):
    """The tokens of a file -> texts, types. ValueError if they are damaged."""
    tokens = file.metadata.get('tokenizer.ggml.tokens')
    if not isinstance(tokens, list) or not tokens:
        raise ValueError('has no tokenizer.ggml.tokens')
    longest = max(map(len, tokens))
    if longest > MAX_LENGTH:
        raise ValueError(f'has a token of {longest} characters')
    types = numbers_of(file, 'token_type', len(tokens))
    types = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    return tokens, types


def numbers_of(file, key, n):
    """An array of n numbers in a tokenizer's metadata, None if there is none. ValueError if it is anything else."""
    values = file.metadata.get(f'tokenizer.ggml.{key}')
    if values is not None and not (isinstance(values, np.ndarray) and len(values) == n):
        raise ValueError(f'has a tokenizer.ggml.{key} that does not fit its {n} tokens')
    return values


def special_ids(metadata, model, n):
    """Metadata -> {name of a special token: id}, with llama.cpp's defaults for SentencePiece."""
    found = dict(zip(('unknown', 'bos', 'eos'), range(3))) if model == 'llama' else {}
    for name in SPECIAL.values():
        id = metadata.get(f'tokenizer.ggml.{name}_token_id')
        if id is not None and (type(id) is not int or not 0 <= id < n):
            raise ValueError(f'has tokenizer.ggml.{name}_token_id = {quoted(id)}, but {n} tokens')
        if id is not None:
            found[name] = id
    return {name: id for name, id in found.items() if id < n}


def bpe(file, names):
    """A byte-level BPE -> the content of its tokenizer.json as a dict, without added tokens and post-processor."""
    pre, merges = file.metadata.get('tokenizer.ggml.pre'), file.metadata.get('tokenizer.ggml.merges')
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ValueError(f'has tokenizer.ggml.pre = {quoted(pre)}, only {", ".join(SPLITS)} can be read')
    if file.metadata.get('tokenizer.ggml.add_space_prefix', False) is not False:
        raise ValueError('has tokenizer.ggml.add_space_prefix, which cannot be read with merges of bytes')
    if not isinstance(merges, list):
        raise ValueError('has no tokenizer.ggml.merges')
    split, ignore_merges = SPLITS[pre]
    pairs = [[merge[: (cut := merge.find(' ', 1))], merge[cut + 1 :]] for merge in merges if merge]
    return {
        'version': '1.0',
        'normalizer': {'type': 'NFC'} if pre in NORMALIZED else None,
        'pre_tokenizer': split[0] if len(split) == 1 else {'type': 'Sequence', 'pretokenizers': split},
        'decoder': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True},
        'model': {'type': 'BPE', 'ignore_merges': ignore_merges, 'vocab': names, 'merges': pairs},
    }


def sentencepiece(file, names, tokens, types, special):
    """SentencePiece's BPE -> the content of its tokenizer.json as a dict, without added tokens and post-processor.

    The list of merges follows from the scores, as in transformers (convert_slow_tokenizer.py, generate_merges): merges
    of a higher score come first.
    """
    scores = numbers_of(file, 'scores', len(tokens))
    if scores is None or not np.isfinite(scores).all():
        raise ValueError('has no tokenizer.ggml.scores')
    prefix = file.metadata.get('tokenizer.ggml.add_space_prefix', True)
    by_token = {token: float(scores[id]) for token, id in names.items() if types[id] == NORMAL}
    escape = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
    unescape = {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}
    decoders = [unescape, {'type': 'ByteFallback'}, {'type': 'Fuse'}]
    if prefix:
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return {
        'version': '1.0',
        'normalizer': {
            'type': 'Sequence',
            'normalizers': [{'type': 'Prepend', 'prepend': SPACE}, escape] if prefix else [escape],
        },
        'pre_tokenizer': None,
        'decoder': {'type': 'Sequence', 'decoders': decoders},
        'model': {
            'type': 'BPE',
            'unk_token': tokens[special['unknown']],
            'fuse_unk': True,
            'byte_fallback': True,
            'vocab': names,
            'merges': [
                pair for token in sorted(by_token, key=by_token.get, reverse=True) for pair in cuts(token, names)
            ],
        },
    }


def cuts(token, names):
    """All ways to merge a token out of two others."""
    pairs = [[token[:cut], token[cut:]] for cut in range(1, len(token))]
    return [pair for pair in pairs if pair[0] in names and pair[1] in names]


def added_tokens(tokens, types):
    """The list of added tokens of a tokenizer.json: control tokens, which are special, and user-defined ones."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return [
        {'id': id, 'content': token, **flags, 'special': kind != USER_DEFINED}
        for id, (token, kind) in enumerate(zip(tokens, types))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]


def post_processor(metadata, model, tokens, special):
    """The post-processor of a tokenizer.json, which adds tokens before and after a text, or None."""
    added = {}
    prepends = model == 'llama' or metadata.get('tokenizer.ggml.pre') in PREPENDS_BOS
    for name, default in (('bos', prepends), ('eos', False)):
        if metadata.get(f'tokenizer.ggml.add_{name}_token', default):
            if name not in special:
                raise ValueError(f'adds a token {name} that it does not name')
            added[name] = tokens[special[name]]
    if not added:
        return None

    def pieces(sequence, n):
        wrapped = {name: [{'SpecialToken': {'id': token, 'type_id': n}}] for name, token in added.items()}
        return [*wrapped.get('bos', []), {'Sequence': {'id': sequence, 'type_id': n}}, *wrapped.get('eos', [])]

    return {
        'type': 'TemplateProcessing',
        'single': pieces('A', 0),
        'pair': pieces('A', 0) + pieces('B', 1),
        'special_tokens': {
            token: {'id': token, 'ids': [special[name]], 'tokens': [token]} for name, token in added.items()
        },
    }


def characters_spec(tokens, types):
    """The spec of a character tokenizer, as characters() writes it."""
    chars = [unescaped(token) for token, kind in zip(tokens, types) if kind != UNUSED]
    if not all(len(char) == 1 for char in chars):
        raise ValueError('is of the kind rwkv with tokens of several characters, which cannot be read')
    return check_spec({'kind': 'char', 'chars': ''.join(chars)})


# --- out --------------------------------------------------------------------------------------------------------------


def vocabulary_metadata(spec: dict | None, available: int) -> tuple[int, dict, list[str]]:
    """The spec of a tokenizer -> how many rows of the embedding to write, metadata, lines about what llama.cpp does
    otherwise.

    available: rows that the model has; as many are written as there are tokens. UserError if that does not fit, or
    llama.cpp has no such tokenizer.
    """
    if spec is None:
        return available, {'tokenizer.ggml.model': 'no_vocab'}, []
    with user_errors(ValueError, where='the tokenizer: '):
        size = text_vocab_size(check_spec(spec))
        writers = {'char': characters, 'byte': by_library, 'gpt2': by_library}
        tokens, types, metadata, notes = writers.get(spec['kind'], from_json)(spec)
        rows = min(len(tokens), available)
        if rows < size:
            raise ValueError(f'has {size} tokens, more than the {rows} rows of the embedding')
        metadata.update(special_metadata(spec, tokens[:rows], notes), tokens=tokens[:rows], token_type=types[:rows])
        if 'scores' in metadata:
            metadata['scores'] = metadata['scores'][:rows]
        metadata = {f'tokenizer.ggml.{key}': value for key, value in metadata.items()}
        metadata['tokenizer.chat_template'] = spec.get('chat_template', '')
    return rows, metadata, notes


def special_metadata(spec, tokens, notes):
    """Ids of the special tokens of a spec, by GGUF's names.

    Where none is named, llama.cpp takes token 11 of a BPE or 2 of SentencePiece for the end of a text.
    """
    if spec['kind'] == 'char':
        return {}  # the one kind for which llama.cpp has no such defaults
    named = dict(spec.get('special_tokens', {}))
    named['eos_token'] = spec.get('end_of_text') or named.get('eos_token') or END_OF_TEXT
    ids = {token: id for id, token in enumerate(tokens)}
    if named['eos_token'] not in ids:
        notes.append('the tokenizer names no end of text, so llama.cpp takes another token for it')
        del named['eos_token']
    named.setdefault('bos_token', named.get('eos_token'))
    missing = [token for token in named.values() if token is not None and token not in ids]
    if missing:
        raise ValueError(f'has no token {quoted(missing[0])}, which it names as a special one')
    return {
        f'{SPECIAL[name]}_token_id': ids[token]
        for name, token in named.items()
        if token is not None and name in SPECIAL
    }


def characters(spec):
    """A character tokenizer -> tokens, types, metadata, notes; so do the functions below.

    It is written as the kind rwkv: the longest token that matches, here one character. It is the only kind without an
    end of text, as which the others take a character if the vocabulary has no special token. A character that the
    vocabulary lacks is -1 to llama.cpp, whose search never ends if its first byte is that of a known one.
    """
    chars, notes = spec['chars'], []
    surrogate = next((char for char in chars if '\ud800' <= char <= '\udfff'), None)
    if surrogate:
        raise ValueError(f'has the character {surrogate!r}, which UTF-8 does not')
    if not chars.isascii():
        notes.append(
            'llama.cpp runs out of memory on a prompt with an accented letter or the like that the vocabulary lacks'
        )
    metadata = {'model': 'rwkv', 'add_bos_token': False, 'add_eos_token': False}
    return [escaped(char) for char in chars], [NORMAL] * len(chars), metadata, notes


def escaped(char):
    """A character as the kind rwkv writes it: '\\n' as a backslash and an n."""
    if char == '\\':
        return r'\\'
    return f'\\x{ord(char):02x}' if ord(char) < 32 else char


def unescaped(token):
    """The inverse of escaped."""
    if token == r'\\':
        return '\\'
    is_code = len(token) == 4 and token.startswith(r'\x') and set(token[2:]) <= set('0123456789abcdef')
    return chr(int(token[2:], 16)) if is_code else token


def byte_level(pre, merges):
    """Metadata of a byte-level BPE that adds no tokens to a text."""
    return {'model': 'gpt2', 'pre': pre, 'merges': merges or NO_MERGES, 'add_bos_token': False, 'add_eos_token': False}


def by_library(spec):
    """UTF-8 bytes, or GPT-2's vocabulary, as a tokenizer.json has them."""
    return from_json({**spec, 'kind': 'tokenizers', 'json': to_library(spec).to_str()})


def from_json(spec):
    """A tokenizer.json. ValueError names what llama.cpp does not compute."""
    load_tokenizer(spec)  # ValueError if it is damaged
    description = json.loads(spec['json'])
    model = description['model']
    if model.get('type') != 'BPE':
        raise ValueError(f'is of the type {model.get("type")}: llama.cpp gets only BPE from here')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise ValueError(f'has {key}={model[key]!r}, which llama.cpp does not compute')
    names, added = dict(model['vocab']), description.get('added_tokens') or []
    for token in added:
        for key in ('single_word', 'lstrip', 'rstrip'):
            if token.get(key):
                raise ValueError(
                    f'has the token {quoted(token["content"])} with {key}, which llama.cpp does not compute'
                )
        names[token['content']] = token['id']
    n = max(names.values()) + 1
    tokens, types = [f'[PAD{id}]' for id in range(n)], [UNUSED] * n
    for token, id in names.items():
        tokens[id], types[id] = token, NORMAL
    for token in added:
        types[token['id']] = CONTROL if token['special'] else USER_DEFINED
    merges = [pair.split(' ', 1) if isinstance(pair, str) else pair for pair in model['merges']]
    write = byte_level_json if is_byte_level(description) else sentencepiece_json
    metadata, notes = write(description, tokens, types, merges)
    metadata.update(added_around(description, spec))
    return tokens, types, metadata, notes


def byte_level_json(description, tokens, types, merges):
    """Metadata and notes of a tokenizer.json whose tokens are bytes."""
    split = essence(parts_of(description.get('pre_tokenizer'), 'pretokenizers'))
    ignore_merges = bool(description['model'].get('ignore_merges'))
    pre = next((name for name, (s, whole) in SPLITS.items() if essence(s) == split and whole == ignore_merges), None)
    if pre is None:
        raise ValueError(
            f'splits text as none of those that llama.cpp gets from here, {", ".join(SPLITS)}: {quoted(split)}, '
            f'ignore_merges={ignore_merges}'
        )
    normalizers, notes = parts_of(description.get('normalizer'), 'normalizers'), []
    if normalizers not in ([], [{'type': 'NFC'}]):
        raise ValueError(f'has the normalizer {quoted(normalizers)}, which llama.cpp does not compute')
    if normalizers:
        notes.append('llama.cpp does not normalize text to NFC: text in another form gets other tokens there')
    return byte_level(pre, [' '.join(pair) for pair in merges]), notes


def sentencepiece_json(description, tokens, types, merges):
    """Metadata and notes of a tokenizer.json of SentencePiece's BPE with byte fallback, as Llama 2 has."""
    model = description['model']
    escape = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
    normalizers = parts_of(description.get('normalizer'), 'normalizers')
    prefix = normalizers == [{'type': 'Prepend', 'prepend': SPACE}, escape]
    if not model.get('byte_fallback') or not prefix and normalizers != [escape] or description.get('pre_tokenizer'):
        raise ValueError("is neither a byte-level BPE nor one of Llama 2's form: llama.cpp gets only these from here")
    for id, token in enumerate(tokens):
        if token == model.get('unk_token'):
            types[id] = UNKNOWN
        elif len(token) == 6 and token.startswith('<0x') and types[id] == NORMAL:
            types[id] = BYTE
    scores = scores_of(merges, tokens, types)
    return {'model': 'llama', 'pre': 'default', 'scores': scores, 'add_space_prefix': prefix}, []


def scores_of(merges, tokens, types):
    """The scores of SentencePiece's tokens, from which its merges follow: those of an earlier merge are higher.

    llama.cpp merges all neighbours that make a token, in the order of scores. ValueError if the merges are others.
    """
    ids = {token: id for id, token in enumerate(tokens) if types[id] == NORMAL}
    made = [(token, sorted(map(list, pairs))) for token, pairs in groupby(merges, key=''.join)]
    expected = {token: sorted(cuts(token, ids)) for token in ids}
    if len(dict(made)) < len(made) or dict(made) != {token: pairs for token, pairs in expected.items() if pairs}:
        raise ValueError('has merges that do not follow from scores of its tokens, as llama.cpp needs it')
    scores = [0.0] * len(tokens)
    for rank, (token, _) in enumerate(made):
        scores[ids[token]] = -1.0 - rank
    return scores


def added_around(description, spec):
    """Metadata that say whether bos and eos are added to a text. ValueError if other tokens are."""
    named = spec.get('special_tokens', {})
    processors = parts_of(description.get('post_processor'), 'processors')
    added = {'add_bos_token': False, 'add_eos_token': False}
    for processor in processors:
        if processor['type'] == 'ByteLevel':  # changes nothing in the ids
            continue
        pieces = [piece.get('SpecialToken', {}).get('id') for piece in processor.get('single') or [{}]]
        text = pieces.index(None)
        for key, there, name in (
            ('add_bos_token', pieces[:text], 'bos_token'),
            ('add_eos_token', pieces[text + 1 :], 'eos_token'),
        ):
            if there not in ([], [named.get(name)]) or processor['type'] != 'TemplateProcessing':
                raise ValueError(f'adds tokens to a text by {quoted(processor)}, other than bos and eos')
            added[key] = added[key] or bool(there)
    return added
