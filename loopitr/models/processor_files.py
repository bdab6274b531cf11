"""What a saved processor is made of: a folder that lacks a part is refused, where transformers would make one up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer_config.json"
IMAGES = ("processor_config.json", "preprocessor_config.json")
# Any one of these holds the words of a tokenizer; without one, transformers makes a tokenizer of its special tokens.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("sentencepiece.model", "spm.model", "source.spm", "bpe.codes", "bpe.vocab"),
)


def check_processor_files(folder: Path) -> None:
    """
    Raises:
        OSError: a file that has to be there is not.
        ValueError: one of them is not what its name says.
    """
    for what, names in (("tokenizer", (TOKENIZER,)), ("vocabulary", VOCABULARIES), ("image processor", IMAGES)):
        if not any((folder / name).is_file() for name in names):
            wanted = names[0] if len(names) == 1 else f"{names[0]} or {names[1]}"
            raise OSError(f"{folder} has no {what}: {wanted} is missing")
    for name in (TOKENIZER, *IMAGES, VOCABULARIES[0]):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: it is no JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, wanted an object")


def check_words(tokenizer: Any, source: str) -> None:
    """
    Raises:
        ValueError: the tokenizer knows no word, or cannot pad.
    """
    special = len(tokenizer.all_special_tokens)
    if len(tokenizer) <= special:
        raise ValueError(f"the tokenizer of {source} knows no words: it has {special} special tokens alone")
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {source} has no padding token")
