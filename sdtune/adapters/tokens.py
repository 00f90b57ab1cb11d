"""New tokens: tokenizers know them, text encoders have rows for them, and files keep these rows.

A token of several vectors stands in the tokenizer as several, `<cat>`, `<cat>_1`, `<cat>_2`; wherever the first is
written, the others follow by themselves (`families.loading.token_ids`). diffusers has it so too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sdtune.diffusion import draws
from sdtune.errors import UsageError, WeightsError
from sdtune.families.base import Family

NAME = "learned_embeds"  # with .safetensors it is what diffusers looks for in a folder
TWO_ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # keys of SDXL's files, as other tools have them


@dataclass(frozen=True)
class Token:
    """A token to learn.

    Attributes:
        token: how it is written in captions, such as `<cat>`.
        initializer: text whose embeddings its vectors begin with; None draws them like the embeddings there are.
        vectors: how many it has.
    """

    token: str
    initializer: str | None = None
    vectors: int = 1


class TokenEmbedding(nn.Module):
    """The embedding of a tokenizer that has new tokens: the old rows as they are, the new ones a parameter apart.

    So neither weight decay nor an average can come near the old rows, and they are not copied.

    Args:
        embedding: the old rows, (V, D). learned: the new rows, (n, D). first: id of the first new token.
    """

    def __init__(self, embedding: nn.Embedding, learned: Tensor, first: int) -> None:
        super().__init__()
        self.weight, self.learned, self.first = embedding.weight, nn.Parameter(learned), first

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, L, D) of ids (B, L)."""
        new = ids - self.first
        old = F.embedding(ids.masked_fill(new >= 0, 0), self.weight)  # (B, L, D)
        rows = F.embedding(new.clamp(min=0), self.learned).to(old.dtype)  # (B, L, D)
        return torch.where((new >= 0)[..., None], rows, old)


def tokenizer_of(family: Family, encoder: str) -> Any:
    """The tokenizer of a text encoder."""
    return family.tokenizers[encoder.replace("text_encoder", "tokenizer")]


def add_tokens(tokenizer: Any, encoder: Any, tokens: Sequence[tuple[str, int]]) -> int:
    """Teach a tokenizer new words.

    Args:
        encoder: the text encoder that reads its ids.
        tokens: pairs of (token, number of vectors).

    Returns:
        The id of the first new token; the others follow it.

    Raises:
        UsageError: one of them is a word already.
    """
    first, words = len(tokenizer), tokenizer.get_vocab()
    for token, vectors in tokens:
        if token in words or f"{token}</w>" in words:
            raise UsageError(
                f"the token '{token}' is a word that this model knows already; take one that it does not, such as "
                f"'<{token.strip('<>')}-new>'"
            )
        tokenizer.add_tokens(names(token, vectors))
    for part in encoder.modules():
        # With this number from before 2023 the pooled embedding is looked for at the largest id, now a new token's.
        if getattr(part, "eos_token_id", None) == 2 != tokenizer.eos_token_id:
            part.eos_token_id = tokenizer.eos_token_id
            encoder.config.eos_token_id = tokenizer.eos_token_id
    return first


def names(token: str, vectors: int) -> list[str]:
    """What the vectors of a token are called."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def first_rows(token: Token, tokenizer: Any, weight: Tensor, seed: int, encoder: str) -> Tensor:
    """What a token's vectors begin with, (vectors, D), float32.

    Args:
        weight: the embeddings of the words there are, (V, D).

    Raises:
        UsageError: the initializer has more tokens than there are vectors, or none.
    """
    if token.initializer is None:
        noise = draws.normal((token.vectors, weight.shape[1]), seed, f"token {token.token} of {encoder}")
        return weight.float().mean(0) + weight.float().std(0) * noise.to(weight.device)
    ids = tokenizer(token.initializer, add_special_tokens=False)["input_ids"]
    if not ids or len(ids) > token.vectors:
        parts = ", ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise UsageError(
            f"adapter.tokens: '{token.initializer}', with which '{token.token}' begins, is {len(ids)} tokens for this "
            f"model ({parts}), and '{token.token}' has room for {token.vectors}; name a word that is one token, or "
            f"set vectors: {max(1, len(ids))}"
        )
    return weight[[ids[number % len(ids)] for number in range(token.vectors)]].float()


def learned_words(family: Family) -> list[str]:
    """The new tokens that a model knows, each as captions have it: `<cat>`, and not `<cat>_1`."""
    words = {
        word: None
        for tokenizer in family.tokenizers.values()
        for word in tokenizer.get_added_vocab()
        if word not in tokenizer.all_special_tokens
    }
    return [word for word in words if re.sub(r"_\d+$", "", word) not in words.keys() - {word}]


def strange_words(family: Family, prompts: Sequence[str]) -> list[str]:
    """What looks like a new token in prompts, `<dog>`, and is none that the model knows."""
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"<[^<>\s]+>", prompt))
    return [word for word in words if any(_reads_letters(each, word) for each in family.tokenizers.values())]


def _reads_letters(tokenizer: Any, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return set(ids).isdisjoint(tokenizer.get_added_vocab().values())


# --- files ------------------------------------------------------------------------------------------------------------


def save_embeddings(rows: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Write a file for each token, as diffusers' `load_textual_inversion`, A1111 and ComfyUI read it.

    Args:
        rows: for each token the rows (vectors, D) of each text encoder.
        folder: gets learned_embeds.safetensors, or of several tokens learned_embeds-1.safetensors and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (token, encoders) in enumerate(rows.items(), 1):
        one = len(encoders) == 1
        tensors = {token if one else TWO_ENCODERS[name]: tensor.contiguous() for name, tensor in encoders.items()}
        name = NAME if len(rows) == 1 else f"{NAME}-{number}"
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt", "token": token})


def embedding_files(folder: Path) -> list[Path]:
    """The files that `save_embeddings` wrote into a folder."""
    return sorted(folder.glob(f"{NAME}*.safetensors"))


def is_embedding(file: Path) -> bool:
    """Whether a file holds the rows of a token. Raises WeightsError when it is damaged."""
    keys = read_embedding(file)[1].keys()
    return len(keys) == 1 or keys == set(TWO_ENCODERS.values())


def token_files(place: Path) -> list[Path]:
    """The files of tokens that a path means: itself, or those in a folder; none if it is something else."""
    if place.is_dir():
        return embedding_files(place)
    return [place] if is_embedding(place) else []


def read_embedding(file: Path) -> tuple[str, dict[str, Tensor]]:
    """The token and the tensors of a file. Raises WeightsError when it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)
            noted = (opened.metadata() or {}).get("token")
    except (OSError, SafetensorError) as fault:
        raise WeightsError(f"'{file}' cannot be read as safetensors ({fault}); fetch it again") from fault
    key = next(iter(tensors), "")
    nameless = len(tensors) != 1 or key == "emb_params"  # then other tools go by the name of the file
    return noted or (file.stem if nameless else key), tensors


def read_rows(family: Family, file: Path) -> tuple[str, dict[str, Tensor]]:
    """The token of a file, and its rows (vectors, D) for each text encoder of the family.

    Raises:
        WeightsError: the file is damaged, or of another model.
    """
    token, tensors = read_embedding(file)
    encoders, found = family.text_encoders, dict[str, Tensor]()
    keys = TWO_ENCODERS if len(encoders) > 1 else dict.fromkeys(encoders, next(iter(tensors), ""))
    for name in encoders:
        rows, width = tensors.get(keys[name]), family.modules[name].get_input_embeddings().weight.shape[1]
        if rows is None or rows.shape[-1] != width:
            widths = ", ".join(str(tensor.shape[-1]) for tensor in tensors.values())
            expected = ", ".join(str(family.modules[one].get_input_embeddings().weight.shape[1]) for one in encoders)
            raise WeightsError(
                f"'{file}' is refused: the embeddings of '{token}' have width {widths}, this model's text encoders "
                f"have {expected}; name a base of the kind it was made for"
            )
        found[name] = rows.reshape(-1, width)
    return token, found


@torch.no_grad()
def load_embedding(family: Family, file: Path) -> None:
    """Let a model know the token of a file.

    Args:
        family: its tokenizers and text encoders are changed in place; the new rows stand in the embedding itself.

    Raises:
        WeightsError: the file is damaged, or of another model. UsageError: the token is a word already.
    """
    token, encoders = read_rows(family, file)
    if any(token in tokenizer.get_added_vocab() for tokenizer in family.tokenizers.values()):
        raise UsageError(f"'{file}' holds the token '{token}', a word that this model has learned before; leave it out")
    for name, rows in encoders.items():
        network = family.modules[name]
        weight = network.get_input_embeddings().weight
        first = add_tokens(tokenizer_of(family, name), network, [(token, len(rows))])
        whole = torch.cat([weight[:first], rows.to(weight)])
        network.set_input_embeddings(nn.Embedding.from_pretrained(whole))
        network.config.vocab_size = len(whole)
