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
        init_from: file or folder; the tokens that it has begin as they are there, not with their initializer, and each
            of them must be one of `tokens`.
    """

    writes_base = False

    def __init__(self, tokens: Sequence[Token], init_from: Path | None = None) -> None:
        self.tokens, self.init_from = list(tokens), init_from

    def attach(self, family: Family, networks: Sequence[str], seed: int) -> dict[str, Parameters]:
        """Add the tokens to all tokenizers and text encoders, whatever `networks` are; see `Adapter.attach`.

        Raises:
            UsageError: a token is a word already, or its initializer has too many tokens, or `init_from` has none of
                them, or others, or one with another number of vectors. WeightsError: `init_from` is damaged, or of
                another model.
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
        if self.init_from:
            self.check_begun({token: len(next(iter(encoders.values()))) for token, encoders in found.items()})
        return found

    def check_begun(self, found: dict[str, int]) -> None:
        """Raises UsageError unless the tokens of `init_from`, with so many vectors each, are all to learn as they are.

        Args:
            found: numbers of vectors.
        """
        begin, asked = f"adapter.init_from: '{self.init_from}'", {token.token: token.vectors for token in self.tokens}
        others = [token for token in found if token not in asked]
        if asked and len(others) == len(found):
            raise UsageError(
                f"{begin} has no token {' or '.join(asked)}; its tokens are: {', '.join(found) or 'none'}. Call the "
                "token as it is called there, or begin with another file"
            )
        if others:
            settings = [f"{{token: {token}, vectors: {count}}}" for token, count in found.items()]
            raise UsageError(
                f"{begin} has the token{'s' * (len(others) > 1)} {', '.join(others)}, and adapter.tokens names "
                f"{'others' if asked else 'none'}; let all learn on with 'adapter.tokens=[{', '.join(settings)}]', or "
                "name the one file in it to begin with: adapter.init_from=FILE"
            )
        for token, count in found.items():
            if asked[token] != count:
                raise UsageError(
                    f"adapter.init_from: '{token}' has {count} vectors in '{self.init_from}', and adapter.tokens asks "
                    f"for {asked[token]}; set vectors: {count}, or begin with another file"
                )

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
