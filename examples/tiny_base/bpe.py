"""A small byte-level BPE in the format of CLIP's tokenizer, learned from the emoji names."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CONTEXT = 32  # tokens of a prompt, start and end counted: the longest name has 10, and CLIP's 77 would only cost time
# CLIP's own pattern: contractions, runs of letters, single digits, runs of anything else.
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """The `count` most useful merges for `texts`, in the order in which they were learned."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + count, initial_alphabet=letters, end_of_word_suffix=WORD_END, show_progress=False,
        special_tokens=[letter + WORD_END for letter in letters],  # fixes their ids, by which ties are broken
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return merges[:count]


def write_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> None:
    """Write a folder that `transformers.CLIPTokenizer.from_pretrained` opens.

    The vocabulary is laid out as CLIP's: 256 bytes, the same 256 at the end of a word, the merges, start, end. So any
    text can be written, and the ids of start and end are `vocab_size - 2` and `vocab_size - 1`.
    """
    merges = learn_merges(texts, vocab_size - 512 - 2)
    if len(merges) != vocab_size - 514:
        raise ValueError(f"the texts give {len(merges)} merges, expected {vocab_size - 514}; take a smaller vocab_size")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in merges), START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        **special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "add_prefix_space": False,
        "errors": "replace", "model_max_length": CONTEXT,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
