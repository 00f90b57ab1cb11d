"""The lines of Python with which somebody else loads what a run made, with diffusers alone where that knows it."""

from sdtune.config import Recipe
from sdtune.config.shipped import TINY
from sdtune.families import OURS_ALONE

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING = "learned_embeds"
PEFT_FOLDERS = ("lokr", "loha")  # kinds that are written in peft's own format


def loading_code(recipe: Recipe, repo: str, prompt: str, *, inpaints: bool = False) -> str:
    """A script that draws a picture, picture.png, with what stands in a repository of the Hub.

    Args:
        recipe: of the run. repo: user/name. prompt: what to draw.
        inpaints: whether the model is one for inpainting; the script then reads photo.png and mask.png.
    """
    if recipe.task == "autoencoding":
        return vae_code(repo)
    if recipe.model.family in OURS_ALONE:
        return own_code(repo)
    name = "AutoPipelineForInpainting" if inpaints else "AutoPipelineForText2Image"
    single = (recipe.model.base or "").endswith((".safetensors", ".ckpt"))
    if single and recipe.adapter.kind != "full":
        kind = "StableDiffusionXL" if recipe.model.family == "sdxl" else "StableDiffusion"
        name = f"{kind}{'Inpaint' if inpaints else ''}Pipeline"
    needed = {name: True, "AutoencoderKL": other_vae(recipe), "DDIMScheduler": needs_ddim(recipe)}
    names = [one for one, is_needed in needed.items() if is_needed]
    lines = ["import torch", f"from diffusers import {', '.join(sorted(names))}"]
    if inpaints:
        lines.append("from diffusers.utils import load_image")
    two_tables = recipe.model.family == "sdxl" and bool(recipe.adapter.tokens)
    if two_tables:
        lines.append("from huggingface_hub import hf_hub_download")
    if recipe.adapter.kind in PEFT_FOLDERS:
        lines.append("from peft import PeftModel")
    if two_tables:
        lines.append("from safetensors.torch import load_file")
    if recipe.adapter.kind != "full" and recipe.model.base == TINY:
        lines.append("from sdtune.config import resolve_asset")
    lines += [
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.float16 if device == "cuda" else torch.float32',
        *pipeline_lines(recipe, repo, name, single),
        "pipeline.to(device)",
        "",
        *drawing_lines(recipe, prompt, inpaints),
        'picture.save("picture.png")',
    ]
    return "\n".join(lines)


def pipeline_lines(recipe: Recipe, repo: str, name: str, single: bool) -> list[str]:
    """From a repository, and the base that it needs, to `pipeline`."""
    model = recipe.model
    if recipe.adapter.kind == "full":
        return [f"pipeline = {name}.from_pretrained({repo!r}, torch_dtype=dtype)".replace("'", '"')]
    options = ["torch_dtype=dtype"]
    lines = []
    if other_vae(recipe):
        lines.append(f'vae = AutoencoderKL.from_pretrained("{model.vae}", torch_dtype=dtype)')
        options.append("vae=vae")
    options += [f'{key}="{value}"' for key in ("variant", "revision") if (value := getattr(model, key)) is not None]
    base = f'resolve_asset("{TINY}")' if model.base == TINY else f'"{model.base}"'
    load = "from_single_file" if single else "from_pretrained"
    lines.append(f"pipeline = {name}.{load}({base}, {', '.join(options)})")
    if recipe.adapter.kind in PEFT_FOLDERS:
        networks = ["unet", *text_encoders(recipe)]
        for part in networks:
            lines.append(f'adapter = PeftModel.from_pretrained(pipeline.{part}, "{repo}", subfolder="{part}")')
            lines.append(f"pipeline.{part} = adapter.merge_and_unload()")
    elif recipe.adapter.kind != "textual-inversion":
        lines.append(f'pipeline.load_lora_weights("{repo}", weight_name="{LORA_FILE}")')
    return lines + token_lines(recipe, repo) + sampler_lines(recipe)


def token_lines(recipe: Recipe, repo: str) -> list[str]:
    """Let the pipeline know the tokens that were learned."""
    tokens, lines = recipe.adapter.tokens or [], []
    for number, learned in enumerate(tokens, 1):
        file = f"{EMBEDDING}{f'-{number}' if len(tokens) > 1 else ''}.safetensors"
        token = f'token="{learned.token}"'
        if recipe.model.family != "sdxl":
            lines.append(f'pipeline.load_textual_inversion("{repo}", weight_name="{file}", {token})')
            continue
        lines.append(f'rows = load_file(hf_hub_download("{repo}", "{file}"))')
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
            lines.append(f'pipeline.load_textual_inversion(rows["{key}"], {token}, {parts})')
    return lines


def drawing_lines(recipe: Recipe, prompt: str, inpaints: bool) -> list[str]:
    """From `pipeline` to `picture`, of the size that was trained."""
    size = recipe.images.resolution
    height, width = (size, size) if isinstance(size, int) else size
    samples = recipe.validation.samples
    steps, guidance = (samples.steps, samples.guidance) if samples else (25, 7.5)
    options = [f"height={height}, width={width}, num_inference_steps={steps}, guidance_scale={guidance:g}"]
    if recipe.model.clip_skip:
        options.append(f"clip_skip={recipe.model.clip_skip}")
    if inpaints:
        options.insert(0, 'image=load_image("photo.png"), mask_image=load_image("mask.png")')
    words = prompt.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return [
        f'prompt = "{words}"',
        f"picture = pipeline(prompt, {', '.join(options)}).images[0]",
    ]


def needs_ddim(recipe: Recipe) -> bool:
    """Whether the base's own kind of sampler may not draw with what was learned; as `families.schedulers` has it."""
    objective = recipe.objective
    return recipe.adapter.kind != "full" and (objective.zero_terminal_snr or objective.prediction == "sample")


def sampler_lines(recipe: Recipe) -> list[str]:
    """Let the pipeline sample as was trained. (A whole model has its sampler in its folder.)"""
    objective, options = recipe.objective, []
    if objective.prediction != "auto":
        options.append(f'prediction_type="{objective.prediction}"')
    if objective.zero_terminal_snr:
        options.append("rescale_betas_zero_snr=True")
    if not options:
        return []
    if needs_ddim(recipe):
        options += ['timestep_spacing="trailing"', "clip_sample=False", "set_alpha_to_one=False"]
    sampler = "DDIMScheduler" if needs_ddim(recipe) else "pipeline.scheduler"
    return [f"pipeline.scheduler = {sampler}.from_config(pipeline.scheduler.config, {', '.join(options)})"]


def text_encoders(recipe: Recipe) -> list[str]:
    """Names of the text encoders that learned."""
    if not recipe.adapter.text_encoder:
        return []
    return ["text_encoder", "text_encoder_2"] if recipe.model.family == "sdxl" else ["text_encoder"]


def other_vae(recipe: Recipe) -> bool:
    """Whether a pipeline needs a VAE that is not its base's. (A whole model has it in its folder.)"""
    return recipe.model.vae is not None and recipe.adapter.kind != "full"


def own_code(repo: str) -> str:
    """Draw a picture with sdtune, for a model that stock diffusers has no pipeline for."""
    return f"""import torch
from sdtune.opening import open_model
from sdtune.sample import draw_pictures

family = open_model("{repo}", device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
prompt = family.classes[0] if family.classes else ""
height, width = family.picture_size()
(picture,) = draw_pictures(family, [prompt], [0], height=height, width=width, steps=50, guidance=3.0)
picture.save("picture.png")"""


def vae_code(repo: str) -> str:
    """Encode and decode a picture."""
    return f"""import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image

vae = AutoencoderKL.from_pretrained("{repo}")
processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))
with torch.no_grad():
    latents = vae.encode(processor.preprocess(load_image("photo.png"))).latent_dist.mean
    picture = processor.postprocess(vae.decode(latents).sample)[0]
picture.save("picture.png")

# in a pipeline: DiffusionPipeline.from_pretrained(BASE, vae=vae)"""
