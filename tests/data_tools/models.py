"""Small image-to-text models with random weights, saved as a person would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZE = 32  # pixels
WORDS = [
    *("a", "an", "the", "picture", "of", "dog", "cat", "red", "blue", "house", "on"),
    *("and", "with", "two", "tree", "sea", "boat", "near", "small", "sky"),
]
PICTURES = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VISION = {
    "image_size": SIZE,
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert_tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return BertTokenizer(vocab=str(folder / "vocab.txt"), **options)


def loud(model: Any) -> Any:
    """Weights large enough that pictures differ, the same for each call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35, generator=generator)
    return model.eval()


def make_blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    tokenizer = bert_tokenizer(folder, bos_token="[DEC]")
    text = TEXT | {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "max_position_embeddings": 24,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": 0,
    }
    model = loud(BlipForConditionalGeneration(BlipConfig(vision_config=VISION, text_config=text)))
    words = model.text_decoder.cls.predictions
    for bias in (words.bias, words.decoder.bias):
        bias.data[:6] = -100  # never ends by itself: an empty caption is a rejected picture
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(**PICTURES), tokenizer).save_pretrained(folder)
    return folder


def make_blip2(folder: Path) -> Path:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    tokenizer = bert_tokenizer(folder, bos_token="[CLS]", eos_token="[SEP]")
    processor = Blip2Processor(BlipImageProcessorPil(**PICTURES), tokenizer, num_query_tokens=4)
    text = {
        "model_type": "opt",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 40,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": 0,
    }
    qformer = TEXT | {"encoder_hidden_size": 32, "vocab_size": len(tokenizer)}
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    loud(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_git(folder: Path) -> Path:
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = bert_tokenizer(folder)
    config = GitConfig(
        vision_config=VISION,
        **TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=0,
    )
    loud(GitForCausalLM(config)).save_pretrained(folder)
    pictures = PICTURES | {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    GitProcessor(CLIPImageProcessorPil(**pictures), tokenizer).save_pretrained(folder)
    return folder


def make_vit_gpt2(folder: Path) -> Path:
    """As nlpconnect/vit-gpt2-image-captioning: a tokenizer and a picture preparation, no processor, no pad token."""
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    tokenizer = bert_tokenizer(folder, bos_token="[CLS]", eos_token="[SEP]", pad_token=None)
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=40,
        add_cross_attention=True,
        is_decoder=True,
        **ends,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), decoder, decoder_start_token_id=tokenizer.cls_token_id, **ends
    )
    model = loud(VisionEncoderDecoderModel(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(**PICTURES).save_pretrained(folder)
    return folder


def make_llava(folder: Path) -> Path:
    """A model that chats: its processor has a chat template."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = bert_tokenizer(folder, bos_token="[CLS]", eos_token="[SEP]")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer), max_position_embeddings=64, **ends)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=image, vision_feature_layer=-1
    )
    loud(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else ' ' + c['text'] }}{% endfor %}{% endfor %}"
    )
    pictures = PICTURES | {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    LlavaProcessor(
        CLIPImageProcessorPil(**pictures),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "blip": make_blip,
    "blip-2": make_blip2,
    "git": make_git,
    "vit-gpt2": make_vit_gpt2,
    "llava": make_llava,
}
