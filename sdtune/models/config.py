"""What our networks share with diffusers' models: configurations, and the name under which they are saved."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from sdtune.errors import WeightsError

# Keys that training scripts leave in a config.json and that change nothing (diffusers' EMAModel writes them).
BOOKKEEPING = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}


# (Two of the mixins declare config_name differently.)
class StockModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A network that diffusers' own class of the same name can replace, and that may replace it.

    Loading, saving, the Hub and LoRA files come from diffusers' mixins. A pipeline that holds one of ours is saved as
    a stock pipeline, and a configuration of which we would compute something else is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        # Pipelines write the library that a part came from into model_index.json and read it off the object. Ours
        # must be opened where sdtune is not installed. (The class keeps its real module, so pickling works.)
        self.__module__ = "diffusers.models"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers', which reads a config.json here, but unknown keys are refused and not dropped."""
        known = cls._get_init_keys(cls) | BOOKKEEPING | {"quantization_config"}
        unknown = {k: v for k, v in config_dict.items() if k not in known and not k.startswith("_")}
        refuse(cls.__name__, unknown)
        return super().extract_init_dict(config_dict, **kwargs)


def refuse(model: str, values: Mapping[str, Any]) -> None:
    """Raise WeightsError that names every key and value of `values`; nothing happens where there are none."""
    if values:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(values.items()))
        raise WeightsError(
            f"This {model} has a configuration that sdtune does not support: {listed}. "
            f"Supported are Stable Diffusion 1.x, 2.x, SDXL and smaller models of the same design; "
            f"set these keys to their defaults, or choose another base model."
        )


def unsupported(config: Mapping[str, Any], only: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """The entries of `config` whose value is not among those that `only` lists for their key.

    A list in `config` is judged by its members, and must not be nested.
    """

    def ok(value: Any, allowed: Collection[Any]) -> bool:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return all(member in allowed for member in value)
        return value in allowed

    return {key: config[key] for key, allowed in only.items() if not ok(config[key], allowed)}
