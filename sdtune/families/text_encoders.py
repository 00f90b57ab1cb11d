"""The text encoders whose tokens a UNet can read: how each is given a caption, and which of its layers is read.

A new kind is one entry of `KINDS`. Source of the masks: BERT and T5 look at every token, padding too, so it has to be
hidden from them; CLIP looks back only, and the padding stands at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import WeightsError
from sdtune.families.loading import tokenize

LENGTH = 77  # tokens of a chunk, those around it included: what CLIP reads at once


@dataclass(frozen=True)
class Kind:
    """One architecture of transformers.

    Attributes:
        model_types: what its config.json calls itself, alone or as a part of a larger model.
        around: the tokenizer's special tokens before and after a text.
        layers: beginning of the names of its numbered layers.
        norm: name of the module that normalises the last layer's answer; None where every layer does that itself.
        masked: whether padding has to be hidden from it.
        unread: parts of the names of weights that its tokens' embeddings do not come from.
        dropouts: settings of its configuration that are set to 0, so that all chance in a run follows from its seed.
    """

    model_types: tuple[str, ...]
    around: tuple[str | None, str]
    layers: str
    norm: str | None
    masked: bool = False
    unread: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()


CLIP = Kind(("clip_text_model", "clip"), ("bos_token_id", "eos_token_id"), "encoder.layers.", "final_layer_norm")
KINDS = {
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "BertModel": Kind(
        ("bert",),
        ("cls_token_id", "sep_token_id"),
        "encoder.layer.",
        None,
        masked=True,
        unread=("pooler.",),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "T5EncoderModel": Kind(
        ("t5",),
        (None, "eos_token_id"),
        "encoder.block.",
        "encoder.final_layer_norm",
        masked=True,
        dropouts=("dropout_rate",),
    ),
}


def network_class(config: Mapping[str, Any], known: Sequence[str], key: str) -> Any:
    """The class of transformers that a text encoder's configuration asks for.

    Args:
        config: its config.json, or a recipe's settings with `_class_name`; one that says nothing is of the first.
        known: names of `KINDS` that are possible here. key: of the part, for the message.

    Raises:
        WeightsError: it asks for another.
    """
    import transformers

    own, model_type = config.get("_class_name"), config.get("model_type")
    if own is None and model_type is None:
        own = known[0]
    for name in known:
        if own == name or (own is None and model_type in KINDS[name].model_types):
            return getattr(transformers, name)
    raise WeightsError(f"{key}: got a text encoder of the kind {own or model_type}, expected {' or '.join(known)}")


def without_dropout(kind: Any) -> dict[str, float]:
    """Settings for a text encoder's class that make it answer the same each time, also while it learns."""
    return dict.fromkeys(KINDS[kind.__name__].dropouts, 0.0)


def kind_of(network: Any) -> Kind:
    """The kind of an opened text encoder."""
    return KINDS[type(network).__name__]


def length_of(network: Any) -> int:
    """How many tokens a text encoder is given at once, those around the text included."""
    positions = getattr(network.config, "max_position_embeddings", LENGTH)
    return min(LENGTH, positions) if kind_of(network).masked else positions


def fit(network: Any, tokenizer: Any) -> None:
    """Note in both how captions are read, so that stock diffusers reads them so from the folder that is saved.

    Raises:
        WeightsError: the tokenizer is another encoder's, whose numbers stand for other words.
    """
    missing = [name for name in filter(None, kind_of(network).around) if getattr(tokenizer, name) is None]
    if missing or len(tokenizer) > network.config.vocab_size:
        what = f"no {missing[0]}" if missing else f"{len(tokenizer)} tokens for {network.config.vocab_size} embeddings"
        raise WeightsError(
            f"the tokenizer is not that of this {type(network).__name__}: it has {what}; name the text encoder's own, "
            "often in the same folder: model.from_config.tokenizer=FOLDER"
        )
    if kind_of(network).masked:
        tokenizer.model_max_length = length_of(network)
        network.config.use_attention_mask = True


def read_text(network: Any, tokenizer: Any, captions: Sequence[str], max_tokens: int) -> list[Any]:
    """What a text encoder answers to captions: for each chunk of tokens all hidden states, (B, L, D) each."""
    kind = kind_of(network)
    rows = tokenize(tokenizer, captions, max_tokens, length_of(network), kind.around)
    answers = []
    for ids in torch.tensor(rows, device=network.device).unbind(1):  # (B, L)
        mask = (ids != tokenizer.pad_token_id).long() if kind.masked else None
        answers.append(network(ids, attention_mask=mask, output_hidden_states=True))
    return answers


def hidden_layer(network: Any, answer: Any, skip: int = 0) -> Tensor:
    """The last layer, or `skip` before it, normalised as the last is: (B, L, D)."""
    if not skip:
        return answer.last_hidden_state
    norm, hidden = kind_of(network).norm, answer.hidden_states[-1 - skip]
    return hidden if norm is None else attrgetter(norm)(getattr(network, "text_model", network))(hidden)


def unread(network: Any, skip: int) -> tuple[str, ...]:
    """Parts of the names of a text encoder's weights that `hidden_layer` never comes by."""
    kind, layers = kind_of(network), network.config.num_hidden_layers
    return (*kind.unread, *(f"{kind.layers}{i}." for i in range(layers - skip, layers)))
