"""What our networks share with diffusers' models: configurations, files, and the name under which they are saved."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from sdtune.errors import WeightsError

T = TypeVar("T")

# Keys in a config.json that change nothing: training scripts leave them (diffusers' EMAModel), or diffusers reads them.
BOOKKEEPING = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "quantization_config",
    "update_after_step",
    "use_ema_warmup",
}


# (Two of the mixins declare config_name differently.)
class StockModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A network that diffusers' own class of the same name can replace, and that may replace it.

    Loading, saving, the Hub and LoRA files come from diffusers' mixins. A pipeline that holds one of ours is saved as
    a stock pipeline, and a configuration of which we would compute something else is refused.
    """

    SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]]  # for the keys where not every value is: those that are
    WHOLE: ClassVar[tuple[str, ...]]  # keys of numbers from 1 up
    PER_LEVEL: ClassVar[tuple[str, ...]]  # keys that may hold, or must, as many values as block_out_channels

    def __init__(self) -> None:
        super().__init__()
        # Pipelines write the library that a part came from into model_index.json and read it off the object. Ours
        # must be opened where sdtune is not installed. (The class keeps its real module, so pickling works.)
        self.__module__ = "diffusers.models"
        self.check(self.config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', but strict: every tensor of the file must have its place here, and the reverse.

        Pickled weights are opened only with `use_safetensors=False`.

        Raises:
            WeightsError: an unsupported configuration, before any weights are looked for; missing or unknown tensors.
            OSError: no such folder, file or Hub id.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = [
            f"{len(info[key])} {what}, the first {sorted(info[key])[0]}"
            for key, what in (("missing_keys", "tensors are missing"), ("unexpected_keys", "tensors have no place"))
            if info[key]
        ]
        if faults:
            raise WeightsError(
                f"{pretrained_model_name_or_path}: the weights do not belong to this {cls.__name__}: "
                f"{'; '.join(faults)}. Its config.json and its weights file must come from the same model."
            )
        return (model, info) if wants_info else model

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'; what is loaded is checked here, before any weights are."""
        loaded = super().load_config(*args, **kwargs)
        cls.check(loaded[0] if isinstance(loaded, tuple) else loaded, overrides=kwargs)
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers', which would drop unknown keys of `from_config`'s dictionary with a warning."""
        cls.check(config_dict, overrides=kwargs)
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def check(cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> None:
        """Refuse a configuration of which this class would not compute what diffusers does.

        Args:
            config: as in config.json; missing keys have their defaults, keys with a leading underscore are free.
            overrides: take the place of the same keys in `config`; other keys in it are free.

        Raises:
            WeightsError: names every such key and its value.
        """
        kind = config.get("_class_name", cls.__name__)
        if kind != cls.__name__:
            raise WeightsError(
                f"The configuration is that of a {kind}, but a {cls.__name__} was to be loaded. "
                f"Give the folder of the {cls.__name__}, or the whole pipeline's with subfolder='unet' or 'vae'."
            )
        defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in BOOKKEEPING}
        whole = defaults | given | {key: value for key, value in (overrides or {}).items() if key in defaults}
        wrong = {key for key in whole if key not in defaults} | cls.faults(whole)
        if wrong:
            listed = ", ".join(f"{key}={whole[key]!r}" for key in sorted(wrong))
            raise WeightsError(
                f"This {cls.__name__} has a configuration that sdtune does not support: {listed}. Supported are "
                f"those of Stable Diffusion 1.x, 2.x and SDXL, and smaller models of the same design: "
                f"correct these keys, or choose another base model."
            )

    @classmethod
    def faults(cls, config: Mapping[str, Any]) -> set[str]:
        """The keys of the complete `config` whose values are not supported, or do not fit to the others."""
        levels = config["block_out_channels"]
        wrong = {key for key, values in cls.SUPPORTED.items() if any(one not in values for one in each(config[key]))}
        wrong |= {key for key in cls.WHOLE if not all(type(one) is int and one > 0 for one in each(config[key]))}
        wrong |= {key for key in cls.PER_LEVEL if is_list(config[key]) and len(config[key]) != len(levels)}
        if not wrong & {"block_out_channels", "norm_num_groups"} and any(c % config["norm_num_groups"] for c in levels):
            wrong.add("norm_num_groups")
        return wrong


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def each(value: T | Sequence[T], count: int = 1) -> list[T]:
    """The members of a list; of anything else, `count` times the thing itself."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
