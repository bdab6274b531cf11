"""Checks of a saved processor's files: for a missing file, transformers would silently make up a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loopitr.reading import read_object

TOKENIZER = "tokenizer_config.json"
IMAGES = ("processor_config.json", "preprocessor_config.json")
# A tokenizer has one of these. Without any, transformers makes a tokenizer that has only special tokens.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("sentencepiece.model", "spm.model", "source.spm", "bpe.codes", "bpe.vocab"),
)


def check_processor_files(folder: Path) -> None:
    """Check that the files of a processor in `folder` are complete and readable.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not a JSON object, or gives two tokens the same id.
    """
    for kind, names in (("tokenizer", (TOKENIZER,)), ("vocabulary", VOCABULARIES), ("image processor", IMAGES)):
        if not any((folder / name).is_file() for name in names):
            wanted = names[0] if len(names) == 1 else f"{names[0]} or {names[1]}"
            raise OSError(f"{folder} has no {kind}: {wanted} is missing")
    for name in (TOKENIZER, *IMAGES, VOCABULARIES[0]):
        if (folder / name).is_file():
            model = read_object(folder / name).get("model")
            words = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(words, dict):  # Of two words with one id, some versions of transformers keep only one.
                _check_ids({word: number for word, number in words.items() if isinstance(number, int)}, str(folder))


def check_vocabulary(tokenizer: Any, source: str) -> None:
    """
    Raises:
        ValueError: the tokenizer gives two tokens the same id, so that the model cannot tell them apart.
    """
    _check_ids(tokenizer.get_vocab(), source)


def _check_ids(words: dict[str, int], source: str) -> None:
    names: dict[int, str] = {}
    for name, number in words.items():
        if number in names:
            raise ValueError(f"the tokenizer of {source} gives {names[number]!r} and {name!r} the same id {number}")
        names[number] = name


def check_words(tokenizer: Any, source: str) -> None:
    """Check that a tokenizer has words, a padding token, room for a word in its maximum length, and distinct ids.

    Raises:
        ValueError: it lacks one of them.
    """
    check_vocabulary(tokenizer, source)
    special = len(tokenizer.all_special_tokens)
    if len(tokenizer) <= special:
        raise ValueError(f"the tokenizer of {source} knows no words: it has only {special} special tokens")
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no padding token")
    limit, least = tokenizer.model_max_length, tokenizer.num_special_tokens_to_add() + 1
    if not (isinstance(limit, int) and limit >= least) and limit != float("inf"):
        raise ValueError(f"the tokenizer of {source} has model_max_length {limit!r}, wanted at least {least}")
