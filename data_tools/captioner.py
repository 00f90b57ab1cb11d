"""An image-to-text model of transformers that writes captions: BLIP, BLIP-2, GIT, ViT-GPT2, and models that chat.

    captioner = Captioner(Settings(model="tiny"), device)
    prepared = captioner.prepare(picture)                   # in any thread
    captioner.write([prepared], ["rex.jpg"], size=8)        # [["a dog on a beach"]]

What is written about a picture depends on the settings and on the picture and its name, not on those that share its
batch: batches are filled up to one size, for processors round differently at different sizes, and the random numbers of
sampling come from the seed and the picture's name.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_tools.caption_settings import DEFAULT_MODEL, TOP_P, Settings
from sdtune.config.shipped import resolve_asset
from sdtune.errors import HubError, SdtuneError, UsageError, WeightsError
from sdtune.hub_access import hub_fault, looks_like_hub_id

TINY = "tiny"  # the captioner that comes with sdtune
QUESTION = "Describe this picture in one short sentence."  # to a model that chats, when there is no prompt
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Inputs = dict[str, Tensor]


class Captioner:
    """A model on its device, and how pictures and words go in and captions come out.

    Args:
        settings: which model, and how it writes.
        device: where it runs.

    Raises:
        HubError: the model is neither here nor to be had.
        WeightsError: it is here, but damaged, pickled or no image-to-text model.
        UsageError: the prompt is longer than the model can read.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.dtype = DTYPES[precision_on(device, settings.precision)]
        place = resolve_model(settings.model)
        self.model, self.pictures, self.tokenizer = _open(place, settings, self.dtype)
        self.model.to(device).eval()
        self._words = self._prompt()
        self._most_tokens = self._token_limit()
        self._try()

    def prepare(self, picture: Image.Image) -> Inputs:
        """What the model takes of one picture, on the CPU; all tensors have a first dimension of 1 or of its patches.

        Args:
            picture: RGB.
        """
        picture = picture if min(picture.size) > 3 else picture.resize([max(4, side) for side in picture.size])
        if isinstance(self._words, dict):
            inputs = {**self.pictures(images=[picture], return_tensors="pt"), **self._words}
        else:
            text = {"text": [self._words]} if self._words else {}
            inputs = dict(self.pictures(images=[picture], return_tensors="pt", **text))
        return {name: value for name, value in inputs.items() if name != "token_type_ids"}

    @torch.no_grad()
    def write(self, prepared: Sequence[Inputs], names: Sequence[str], size: int) -> list[list[str]]:
        """Captions of each picture, without the words around them; at most `settings.captions`, all different.

        Args:
            prepared: of each picture what `prepare` made.
            names: of the pictures: they decide, with the seed, what sampling draws.
            size: pictures in a full batch; a smaller one is filled up with its last picture.
        """
        shapes = [{name: value.shape for name, value in inputs.items()} for inputs in prepared]
        if any(shape != shapes[0] for shape in shapes):  # a model whose input grows with the picture
            return [self.write([inputs], [name], 1)[0] for inputs, name in zip(prepared, names, strict=True)]
        fill = max(0, size - len(prepared))
        rows = [*prepared, *[prepared[-1]] * fill]
        batch = {key: self._move(torch.cat([inputs[key] for inputs in rows])) for key in rows[0]}
        filled = [*names, *[names[-1]] * fill]
        wanted = self.settings.captions
        if self.settings.sample:
            texts = [self._generate(batch, self._sampling(filled, number)) for number in range(wanted)]
            found = [list(row) for row in zip(*texts, strict=True)]
        else:
            texts = [self._generate(batch, {"num_beams": self.settings.beams, "num_return_sequences": wanted})]
            found = [texts[0][start : start + wanted] for start in range(0, len(filled) * wanted, wanted)]
        return [list(dict.fromkeys(row)) for row in found[: len(names)]]

    def _move(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def _generate(self, batch: Inputs, how: dict[str, Any]) -> list[str]:
        # BLIP puts its own token into the ids it is given, and repeats them so: a copy, compared afterwards.
        inputs = {name: value.clone() if "ids" in name else value for name, value in batch.items()}
        out = self.model.generate(**inputs, **how, do_sample=False, max_new_tokens=self._most_tokens)  # (N, L)
        ids = next((inputs[name] for name in ("input_ids", "decoder_input_ids") if name in inputs), None)
        if ids is not None:
            out = out[:, _repeated(ids[0], out[0]) :]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    def _sampling(self, names: Sequence[str], number: int) -> dict[str, Any]:
        """Options for `generate` that draw caption `number` of each picture at random."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        steps: list[Any] = []
        if self.settings.temperature not in (None, 1.0):
            steps.append(TemperatureLogitsWarper(self.settings.temperature))
        if (top_p := self.settings.top_p or TOP_P) < 1:
            steps.append(TopPLogitsWarper(top_p))
        steps.append(RowNoise([generator_of(self.settings.seed, name, number) for name in names]))
        return {"logits_processor": LogitsProcessorList(steps), "num_beams": 1}

    def _prompt(self) -> str | Inputs:
        """The prompt as the model wants it: text for its processor, or ids that go in beside the picture."""
        prompt, kind = self.settings.prompt, self.model.config.model_type
        if getattr(self.pictures, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
            return self.pictures.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if not prompt or kind not in ("git", "vision-encoder-decoder"):
            return prompt
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if kind == "git":
            return {"input_ids": torch.tensor([[self.tokenizer.cls_token_id, *ids]])}
        return {"decoder_input_ids": torch.tensor([[self.model.config.decoder_start_token_id, *ids]])}

    def _token_limit(self) -> int:
        """New tokens that are wanted and that the model has positions for."""
        text = self.model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        length = len(self.tokenizer(self.settings.prompt)["input_ids"]) if self.settings.prompt else 1
        length += getattr(self.model.config, "num_query_tokens", 0)  # BLIP-2 reads the picture as so many words
        if positions is not None and positions <= length:
            raise UsageError(
                f"--prompt has {length} tokens, and '{self.settings.model}' reads and writes {positions} in all; "
                "expected a few words"
            )
        return self.settings.max_tokens if positions is None else min(self.settings.max_tokens, positions - length)

    def _try(self) -> None:
        """One blank picture: what fails with it fails with all."""
        try:
            self.prepare(Image.new("RGB", (64, 64)))
        except Exception as error:  # every processor has its own kinds
            raise WeightsError(
                f"'{self.settings.model}' (a {self.model.config.model_type} model) does not take a picture"
                f"{' and this prompt' if self.settings.prompt else ' alone'}: {_line(error)}. Expected a captioner "
                "such as BLIP, BLIP-2, GIT or ViT-GPT2; some models need a --prompt"
            ) from error


class RowNoise:
    """Makes the best token a random one, with a generator for each row.

    Scores plus Gumbel noise have their largest value at token i with the probability softmax(scores)[i].
    Source: Maddison et al. 2014, "A* Sampling", section 2.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape (B, V) -> noisy scores of shape (B, V)."""
        exponential = [torch.empty(scores.shape[1]).exponential_(generator=one) for one in self.generators]
        return scores - torch.stack(exponential).log().to(scores)


def precision_on(device: torch.device, precision: str) -> str:
    """`auto` in plain words: bf16 on a GPU that knows it, fp16 on another, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def choose_device() -> torch.device:
    """The GPU of this process where there is one, and the launcher was not told to use the CPU."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_model(name: str) -> str:
    """The path behind `tiny`, the captioner that comes with sdtune; any other name unchanged."""
    return resolve_asset("assets:tiny-blip") if name == TINY else name


def generator_of(seed: int, name: str, number: int) -> torch.Generator:
    """The random numbers of caption `number` of a picture: always the same for the three."""
    digest = hashlib.blake2b(repr((seed, "caption", name, number)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _repeated(given: Tensor, out: Tensor) -> int:
    """How many tokens at the head of `out` (L,) only repeat those that the model was given (P,)."""
    both = min(len(given), len(out))
    return int((given[:both] == out[:both]).long().cumprod(0).sum())


def _open(place: str, settings: Settings, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(model, what prepares pictures, tokenizer) of a folder or hub id."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    loader: Any = AutoModelForImageTextToText  # its types do not know output_loading_info
    local = Path(place).is_dir()
    if not local and (fault := hub_fault(place)):
        raise _not_there(settings.model, fault)
    which = {} if local else {"revision": settings.revision}
    safe = {} if settings.allow_pickle else {"use_safetensors": True}
    try:
        model, report = loader.from_pretrained(place, dtype=dtype, output_loading_info=True, **safe, **which)
        _refuse_missing(settings.model, report["missing_keys"])
        processor = AutoProcessor.from_pretrained(place, **which)
        if not hasattr(processor, "tokenizer"):  # ViT-GPT2 has the two parts, and nothing that joins them
            return model, AutoImageProcessor.from_pretrained(place, **which), _ending(
                model, AutoTokenizer.from_pretrained(place, **which)
            )
        return model, processor, processor.tokenizer
    except SdtuneError:
        raise
    except Exception as error:  # transformers, safetensors, json and the Hub have their own kinds
        pickled = "safetensors" in str(error) and not settings.allow_pickle
        if not local and isinstance(error, OSError) and not pickled:
            raise _not_there(settings.model, _line(error)) from error
        raise WeightsError(
            f"'{settings.model}' cannot be opened as an image-to-text model: {_line(error)}. "
            + (
                "If its weights are only there as a pickle (pytorch_model.bin) and you trust them, add --allow-pickle"
                if pickled
                else "Expected a folder or hub id of a captioner such as BLIP, BLIP-2, GIT or ViT-GPT2, or tiny"
            )
        ) from error


def _refuse_missing(model: str, names: Iterable[str]) -> None:
    """Raises WeightsError when tensors would be random. Poolers and position numbers take no part in captions."""
    missing = sorted(name for name in names if "pooler" not in name and not name.endswith("position_ids"))
    if missing:
        raise WeightsError(
            f"'{model}' has not all weights of a captioner: {len(missing)} tensors are missing, such as {missing[0]}. "
            "It was made for another task, or its download is incomplete: fetch it anew, or give another --model"
        )


def _ending(model: Any, tokenizer: Any) -> Any:
    """The tokenizer; GPT-2 has no token to fill up with, and takes the one that ends a text."""
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return tokenizer


def _not_there(model: str, fault: str) -> HubError:
    from huggingface_hub import constants

    if model == TINY:
        return HubError("the captioner 'tiny' is missing from this installation; install sdtune again")
    if not looks_like_hub_id(model):
        close = f"did you mean {TINY}?" if get_close_matches(model, [TINY]) else "the Hub has ids such as user/name."
        return HubError(
            f"the captioner '{model}' is not here: there is no such folder in {Path.cwd()}; {close} Expected a folder "
            f"or hub id of a captioner, such as {DEFAULT_MODEL}, or --model tiny, which comes with sdtune"
        )
    return HubError(
        f"the captioner '{model}' is not here: there is no such folder in {Path.cwd()}, it is not in the cache "
        f"{constants.HF_HUB_CACHE}, and the Hub could not be asked ({fault}). On a machine with network: "
        f"`hf download {model}`, then copy the folder that it names here and give it with --model FOLDER. "
        "Without network: --model tiny, which comes with sdtune and knows simple drawings"
    )


def commit_of(model: str, revision: str | None) -> str | None:
    """Commit of a model of the Hub that is in the cache; none for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(resolve_model(model)).is_dir():
        return None
    file = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None  # .../snapshots/COMMIT/config.json


def _line(error: Exception) -> str:
    """An error's first sentence or two, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
