"""peft's own format: for each network a folder with adapter_config.json and adapter_model.safetensors.

    final/unet/             PeftModel.from_pretrained(pipe.unet, "final/unet")
    final/text_encoder/     pipe.text_encoder.load_adapter("final/text_encoder")

It holds what diffusers' LoRA files cannot: LoKr and LoHa. Keys are the network's after `base_model.model.`, those of
text encoders as before transformers 5, which every version's `load_adapter` knows.
"""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from sdtune.adapters.lora_files import PEFT_NAME
from sdtune.families.base import Family
from sdtune.families.saving import historical_key


def save(family: Family, networks: Sequence[str], folder: Path) -> None:
    """Write the adapter `default` of each network into a folder of the network's name."""
    from peft import get_peft_model_state_dict

    for name in networks:
        network, place = family.modules[name], folder / name
        place.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(network)
        if name in family.text_encoders:
            state = {historical_key(key): tensor for key, tensor in state.items()}
        tensors = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, place / PEFT_NAME, metadata={"format": "pt"})
        network.peft_config["default"].save_pretrained(place)
