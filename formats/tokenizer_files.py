"""Tokenizers in other people's files, Hugging Face's format: in and out.

In: read_tokenizer, from a tokenizer.json or GPT-2's vocab.json and merges.txt, and what the files beside them say.
Out: write_tokenizer, files that transformers' AutoTokenizer opens.
tokenizer.json is the format of the tokenizers library, the files beside it are those of transformers' save_pretrained.
Files that are read are not trusted: their size is checked first, and they are read as data; chat.py runs templates.
"""

import json
import math
import os
import stat

from common.byte_bpe import byte_characters
from common.errors import UserError, user_errors
from common.files import written_whole
from tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    SPECIAL_TOKENS,
    HuggingFaceTokenizer,
    check_spec,
    import_tokenizers,
    load_gpt2,
    load_tokenizer,
    replace_surrogates,
)

MAX_TOKENIZER = 100_000_000  # bytes of a tokenizer.json; those of 2026 have up to 40 MB
MAX_SETTINGS = 10_000_000  # bytes of the files beside it; they have up to 1 MB


# --- in ---------------------------------------------------------------------------------------------------------------


def read_tokenizer(path: str) -> dict | None:
    """Read the tokenizer of a Hugging Face model -> its spec, or None if there is none.

    path: a tokenizer.json, or a folder with one or with the vocab.json and merges.txt of GPT-2's format.
    The files beside it name the token that ends a text (see named_end_of_text), other special tokens and the chat
    template. UserError if a file is damaged, too large or in another format.
    """
    file = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    folder = os.path.dirname(file)
    vocabulary, merges = os.path.join(folder, 'vocab.json'), os.path.join(folder, 'merges.txt')
    if os.path.exists(file):
        with user_errors(OSError, ValueError, where=f'cannot read {file}: '):
            spec = {'kind': 'tokenizers', 'json': read_text(file, MAX_TOKENIZER)}
            library = HuggingFaceTokenizer(spec).tokenizer
    elif os.path.exists(vocabulary) and os.path.exists(merges):
        with user_errors(OSError, ValueError, where=f'cannot read {vocabulary} and {merges}: '):
            spec = {'kind': 'tokenizers', 'json': from_vocabulary_and_merges(folder, vocabulary, merges)}
            library = HuggingFaceTokenizer(spec).tokenizer
    else:
        return None
    said = {
        'end_of_text': named_end_of_text(folder, library),
        'chat_template': chat_template(folder),
        'special_tokens': named_tokens(folder, library),
    }
    with user_errors(ValueError, where=f'cannot use the tokenizer in {folder or "."}: '):
        return check_spec({**spec, **{key: value for key, value in said.items() if value}})


def from_vocabulary_and_merges(folder, vocabulary, merges):
    """Convert vocab.json and merges.txt of GPT-2's format -> the content of a tokenizer.json.

    Adds the special tokens named in the files beside them. ValueError if they are damaged or of another format.
    """
    settings = read_object(folder, 'tokenizer_config.json')
    kind = settings.get('tokenizer_class')
    if kind not in (None, 'GPT2Tokenizer', 'GPT2TokenizerFast'):  # others split text in ways that these files lack
        raise ValueError(
            f'they are those of a {kind}, which only a tokenizer.json describes completely: save one with transformers'
        )
    check_file(vocabulary, MAX_TOKENIZER)
    check_file(merges, MAX_TOKENIZER)
    try:
        tokenizer = import_tokenizers('this tokenizer').ByteLevelBPETokenizer(
            vocabulary, merges, add_prefix_space=settings.get('add_prefix_space') is True
        )
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error
    added = read_object(folder, 'added_tokens.json')
    for id, token in dict(settings.get('added_tokens_decoder') or {}).items():
        added[str(token.get('content') if isinstance(token, dict) else token)] = int(id)
    if not all(type(id) is int for id in added.values()):
        raise ValueError('added_tokens.json beside them does not map tokens to ids')
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])  # otherwise it would be split like text
    for token in sorted(added, key=added.get):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != added[token]:  # the library gives a new token the next id
            raise ValueError(
                f'the token {token!r} cannot have the id {added[token]} that the files beside them give it'
            )
    return tokenizer.to_str()


def named_end_of_text(folder, tokenizer):
    """The token that ends a text according to the files in a model's folder, None if they name none.

    It is the first eos token of tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json
    that the tokenizer (of the tokenizers library) has.
    """
    named = named_tokens(folder, tokenizer)
    if 'eos_token' in named:
        return named['eos_token']
    special = tokenizer.get_added_tokens_decoder()
    for name in ('generation_config.json', 'config.json'):
        ids = read_object(folder, name).get('eos_token_id')
        # Some files hold GPT-2's id by default, which here may be any word: only the id of a special token counts.
        for id in ids if isinstance(ids, list) else [ids]:
            if type(id) is int and id in special and special[id].special:
                return special[id].content
    return None


def named_tokens(folder, tokenizer):
    """The special tokens that the files in a model's folder name -> {'bos_token': text, …}, see SPECIAL_TOKENS. Only
    those that the tokenizer (of the tokenizers library) has."""
    named = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):  # the latter overrides the former
        content = read_object(folder, name)
        for role in SPECIAL_TOKENS:
            token = content.get(role)
            token = token.get('content') if isinstance(token, dict) else token
            if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
                named[role] = token
    return named


def chat_template(folder):
    """The chat template in a model's folder, in Jinja, None if there is none.

    It is a file of its own in newer folders, a setting in others; of several, each with a name, it is 'default'.
    """
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.exists(path):
        with user_errors(OSError, ValueError, where=f'cannot read {path}: '):
            return read_text(path, MAX_SETTINGS)
    for name in ('chat_template.json', 'tokenizer_config.json'):
        template = read_object(folder, name).get('chat_template')
        if isinstance(template, list):
            default = [e for e in template if isinstance(e, dict) and e.get('name') == 'default']
            template = default[0].get('template') if default else None
        if template:
            return template
    return None


def read_object(folder, name):
    """Read a JSON file that holds an object -> dict, {} if there is no such file. UserError for anything else."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with user_errors(OSError, ValueError, RecursionError, where=f'cannot read {path}: '):
        content = json.loads(read_text(path, MAX_SETTINGS))
        if not isinstance(content, dict):
            raise ValueError('it holds no JSON object')
        return content


def read_text(path, most):
    """Read a UTF-8 file of at most `most` bytes. ValueError for anything else."""
    check_file(path, most)
    with open(path, encoding='utf-8') as file:
        return file.read()


def check_file(path, most):
    """Raise ValueError unless a path is a plain file of at most `most` bytes: reading another might never end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError('it is not a plain file')
    if status.st_size > most:
        raise ValueError(f'it has {status.st_size:,} bytes, more than the {most:,} that such a file may have')


# --- out --------------------------------------------------------------------------------------------------------------


def write_tokenizer(spec: dict, folder: str, block_size: int) -> dict:
    """Write a tokenizer into a folder, as files that transformers' AutoTokenizer opens: the same ids, the same text.

    spec: valid, of any kind. folder: an existing one. block_size: the most tokens that the model takes.
    Returns the ids for a model's config.json: {'bos_token_id', 'eos_token_id', 'pad_token_id'}, None where there is
    none; the eos token is the one that ends a text here. UserError if the tokenizers library cannot hold the
    vocabulary, or is missing, or a file cannot be written.

    Where config.json has the model_type 'qwen2', AutoTokenizer of transformers 5 takes only the vocabulary, merges and
    added tokens from these files, and splits text as Qwen2 does: right for Qwen2's tokenizer, wrong for any other.
    """
    library = to_library(spec)
    named = {**spec.get('special_tokens', {}), 'eos_token': spec.get('end_of_text', END_OF_TEXT)}
    tokens = {role: token for role, token in named.items() if library.token_to_id(token) is not None}
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'clean_up_tokenization_spaces': False,  # else decoding would delete spaces, as before a full stop
        **tokens,
    }
    files = {'tokenizer.json': library.to_str(pretty=True) + '\n', 'special_tokens_map.json': to_json(tokens)}
    if spec.get('chat_template'):
        config['chat_template'] = files['chat_template.jinja'] = spec['chat_template']
    files['tokenizer_config.json'] = to_json(config)
    for name, content in files.items():
        path = os.path.join(folder, name)
        with user_errors(OSError, where=f'cannot write {path}: '), written_whole(path, 'w') as file:
            file.write(content)
    ids = {role: library.token_to_id(token) for role, token in tokens.items()}
    return {f'{role}_id': ids.get(role) for role in ('bos_token', 'eos_token', 'pad_token')}


def to_library(spec):
    """The tokenizers.Tokenizer that gives the ids of a spec; the end of text is a special token of it."""
    tokenizers = import_tokenizers("transformers' tokenizer files")
    if spec['kind'] == 'char':
        return characters_to_library(spec['chars'])
    if spec['kind'] in ('bpe', 'tokenizers'):
        load_tokenizer(spec)  # raises ValueError if it is damaged
        library = tokenizers.Tokenizer.from_str(spec['json'])
        end_of_text = spec.get('end_of_text', END_OF_TEXT)
        known = [token.content for token in library.get_added_tokens_decoder().values()]
        if library.token_to_id(end_of_text) is not None and end_of_text not in known:
            library.add_special_tokens([end_of_text])  # keeps its id
        return library
    ranks = {bytes((byte,)): byte for byte in range(256)} if spec['kind'] == 'byte' else gpt2_ranks()
    char = byte_characters()
    spelled = {token: ''.join(char[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: len(ranks)}
    merges = [tuple(spelled[part] for part in last_merge(token, ranks)) for token in ranks if len(token) > 1]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return library


def characters_to_library(chars):
    """The tokenizers.Tokenizer that gives each of these characters its place as the id.

    Its words are single characters. It has no token for unknown ones, so that the library raises an exception for them,
    as our encode does. Decoding fuses the characters; without a decoder, the library would put spaces between them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if chars != replace_surrogates(chars):
        raise UserError(
            'the vocabulary has half a character (a lone surrogate), which the tokenizers library cannot hold'
        )
    library = Tokenizer(models.WordLevel({char: id for id, char in enumerate(chars)}, unk_token='<unk>'))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    library.decoder = decoders.Fuse()
    return library


def gpt2_ranks():
    """GPT-2's tokens without the end of text, in the order of their merges -> {bytes: id}."""
    bpe = load_gpt2().bpe
    return {bpe.decode_single_token_bytes(id): id for id in range(GPT2_VOCAB_SIZE - 1)}


def last_merge(token, ranks):
    """The two tokens whose merge makes a longer token: merge its bytes by lower ranks until two parts are left."""
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        first = merged.index(min(merged))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def to_json(content):
    return json.dumps(content, indent=2, ensure_ascii=False) + '\n'
