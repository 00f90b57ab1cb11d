"""Adapter `textual-inversion`: only the embeddings of new tokens learn, all networks stay as they are.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion".
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sdtune.adapters.base import TOKENS, Parameters
from sdtune.adapters.tokens import (
    Token,
    TokenEmbedding,
    add_tokens,
    first_rows,
    read_rows,
    save_embeddings,
    token_files,
    tokenizer_of,
)
from sdtune.errors import UsageError
from sdtune.families.base import Family


class TextualInversion:
    """Every text encoder gets rows for the tokens.

    Args:
        tokens: what is learned.
        init_from: file or folder; the tokens that it has begin as they are there, not with their initializer.
    """

    writes_base = False

    def __init__(self, tokens: Sequence[Token], init_from: Path | None = None) -> None:
        self.tokens, self.init_from = list(tokens), init_from

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Add the tokens to all tokenizers and text encoders, whatever `networks` are; see `Adapter.attach`.

        Raises:
            UsageError: a token is a word already, or its initializer has too many tokens, or `init_from` has none of
                them, or one with another number of vectors. WeightsError: `init_from` is damaged, or of another model.
        """
        learning: Parameters = {}
        begun = self.begun(family)
        for name in family.text_encoders:
            network, tokenizer = family.modules[name], tokenizer_of(family, name)
            old = network.get_input_embeddings()
            rows = torch.cat(
                [
                    begun[token.token][name].to(old.weight.device, torch.float32)
                    if token.token in begun
                    else first_rows(token, tokenizer, old.weight, seed, name)
                    for token in self.tokens
                ]
            )
            first = add_tokens(tokenizer, network, [(token.token, token.vectors) for token in self.tokens])
            embedding = TokenEmbedding(old, rows, first)
            network.set_input_embeddings(embedding)
            learning[name] = embedding.learned
        return {TOKENS: learning}

    def begun(self, family: Family) -> dict[str, dict[str, Tensor]]:
        """The rows of the tokens that `init_from` has, for each text encoder."""
        found = dict(read_rows(family, file) for file in token_files(self.init_from)) if self.init_from else {}
        vectors = {token.token: token.vectors for token in self.tokens}
        if self.init_from and not found.keys() & vectors.keys():
            raise UsageError(
                f"adapter.init_from: '{self.init_from}' has no token {' or '.join(vectors)}; its tokens are: "
                f"{', '.join(found) or 'none'}. Call the token as it is called there, or begin with another file"
            )
        for token, encoders in found.items():
            there = len(next(iter(encoders.values())))
            if vectors.get(token, there) != there:
                raise UsageError(
                    f"adapter.init_from: '{token}' has {there} vectors in '{self.init_from}', and adapter.tokens asks "
                    f"for {vectors[token]}; set vectors: {there}, or begin with another file"
                )
        return found

    def numbers(self, network: nn.Module) -> int:
        """See `Adapter.numbers`. The denoiser reads all text encoders side by side: so wide are their embeddings."""
        width: int = network.config.cross_attention_dim  # type: ignore[union-attr,assignment]
        return width * sum(token.vectors for token in self.tokens)

    def save(self, family: Family, folder: Path) -> None:
        """Write a file for each token, as other tools read it."""
        sizes = [token.vectors for token in self.tokens]
        rows = {name: family.modules[name].get_input_embeddings().learned.split(sizes) for name in family.text_encoders}
        found = {
            token.token: {name: some[number].detach().clone() for name, some in rows.items()}
            for number, token in enumerate(self.tokens)
        }
        save_embeddings(found, folder)
