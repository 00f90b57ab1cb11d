"""Adapter `textual-inversion`: only the embeddings of new tokens learn, all networks stay as they are.

Source: Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion".
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sdtune.adapters.base import TOKENS, Parameters
from sdtune.adapters.tokens import Token, TokenEmbedding, add_tokens, first_rows, save_embeddings, tokenizer_of
from sdtune.families.base import Family


class TextualInversion:
    """Every text encoder gets rows for the tokens.

    Args:
        tokens: what is learned.
    """

    writes_base = False

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = list(tokens)

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Add the tokens to all tokenizers and text encoders, whatever `networks` are; see `Adapter.attach`.

        Raises:
            UsageError: a token is a word already, or its initializer has too many tokens.
        """
        learning: Parameters = {}
        for name in family.text_encoders:
            network, tokenizer = family.modules[name], tokenizer_of(family, name)
            old = network.get_input_embeddings()
            rows = torch.cat([first_rows(token, tokenizer, old.weight, seed, name) for token in self.tokens])
            first = add_tokens(tokenizer, network, [(token.token, token.vectors) for token in self.tokens])
            embedding = TokenEmbedding(old, rows, first)
            network.set_input_embeddings(embedding)
            learning[name] = embedding.learned
        return {TOKENS: learning}

    def numbers(self, network: nn.Module) -> int:
        """See `Adapter.numbers`."""
        return 0

    def save(self, family: Family, folder: Path) -> None:
        """Write a file for each token, as other tools read it."""
        sizes = [token.vectors for token in self.tokens]
        rows = {name: family.modules[name].get_input_embeddings().learned.split(sizes) for name in family.text_encoders}
        found = {
            token.token: {name: some[number].detach().clone() for name, some in rows.items()}
            for number, token in enumerate(self.tokens)
        }
        save_embeddings(found, folder)
