"""Initial noise optimisation: the first noise of a picture is moved until the prompt's subjects find a place in it.

Noise from which a model forgets one of two subjects, or mixes them, shows it in the attention of the very first step:
a subject that nothing looks at, or two that sit on the same spot. The noise is drawn from N(mean, deviation^2), which
begins as N(0, 1) and is moved down the gradient of these two scores, held near where it began.

Source: Guo et al. 2024, "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization". The maps are
prepared as in Chefer et al. 2023, "Attend-and-Excite", as there.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtune.diffusion import draws
from sdtune.errors import UsageError
from sdtune.families.base import Family
from sdtune.families.loading import token_ids
from sdtune.families.text_encoders import kind_of, length_of
from sdtune.models.attention import recorded_maps

# Between subjects: articles, conjunctions, prepositions and the like.
BETWEEN = frozenset(
    ("a", "an", "the", "and", "or", "with", "without", "in", "on", "at", "by", "near", "next", "beside", "behind")
    + ("under", "over", "above", "below", "between", "from", "to", "into", "onto", "for", "as", "is", "are", "its")
    + ("his", "her", "their", "my", "your", "one", "two", "three")
)
PIXELS = 512 * 512  # about as many are optimised at a time, in up to 16 pictures
POSITIONS = 256  # of a map at least, where there are so many: 16 x 16, as the authors read them for 64 x 64 latents


@dataclass(frozen=True)
class Settings:
    """The paper's numbers; the weight of the divergence, of which it says nothing, is ours.

    Attributes:
        rounds: how many noises are tried. steps: of optimisation, of each. rate: of Adam.
        response: what the cross-attention response score has to fall below.
        conflict: what the self-attention conflict score has to fall below.
        divergence: weight of the mean Kullback-Leibler divergence from N(0, 1).
    """

    rounds: int = 5
    steps: int = 10
    rate: float = 1e-2
    response: float = 0.2
    conflict: float = 0.3
    divergence: float = 500.0


@dataclass(frozen=True)
class Found:
    """The noise of one picture, (C, h, w), its scores, those of the seed's own noise, and whether it met both bars."""

    noise: Tensor
    response: float
    conflict: float
    before: tuple[float, float]
    reached: bool = False


def check_options(asked: bool, subjects: str | None, begins_with_picture: bool) -> None:
    """What can be told before a model is opened. Raises UsageError."""
    if asked and begins_with_picture:
        raise UsageError("--init-noise-optimization: with --init-image a picture is not made of noise alone")
    if subjects is not None and not asked:
        raise UsageError("--subjects: is read with --init-noise-optimization only; add that or remove it")


def first_noise(
    family: Family,
    sampler: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int,
    subjects: str | None,
) -> Tensor:
    """What `draw_pictures` takes as its noise, (N, C, h, w); how far the scores came is told on stderr.

    Args:
        sampler: with which they will be drawn, in so many `steps`. subjects: parted by commas; None finds them.

    Raises:
        UsageError: as `Scorer`.
    """
    check_family(family)
    sampler.set_timesteps(steps)
    names = None if subjects is None else [name.strip() for name in subjects.split(",")]
    found = optimised_noise(family, prompts, seeds, height, width, int(sampler.timesteps[0]), subjects=names)
    reached = sum(each.reached for each in found)
    response, conflict = (sum(getattr(each, name) for each in found) / len(found) for name in ("response", "conflict"))
    told = f"response {response:.2f}, conflict {conflict:.2f} on average"
    print(f"initial noise: {reached} of {len(found)} met both bars ({told})", file=sys.stderr)
    return torch.stack([each.noise for each in found])


def subjects_in(prompt: str) -> list[str]:
    """What a prompt names: its runs of words between commas, articles, conjunctions, prepositions and the like.

    What stands before "of" is left out: it says what kind of picture it is. "a photo of a red apple and a dog": red
    apple, dog.
    """
    found: list[str] = []
    for part in re.split(r"[,.;:!?]", prompt.lower()):
        words: list[str] = []
        for word in [*part.split(), "and"]:
            if word not in BETWEEN and word != "of":
                words.append(word)
            elif words:
                found += [] if word == "of" else [" ".join(words)]
                words = []
    return list(dict.fromkeys(found))


def token_positions(family: Family, prompt: str, subject: str) -> list[int]:
    """Where a subject's tokens stand in the prompt's embeddings, counted over all its chunks.

    Raises:
        UsageError: the prompt does not have these words.
    """
    encoder = family.modules[family.text_encoders[0]]
    name = family.text_encoders[0].replace("text_encoder", "tokenizer")
    before, width = tokens_before(family), length_of(encoder)  # of a chunk
    inside = width - before - 1  # one token is behind
    words = r"\s+".join(map(re.escape, subject.split()))
    if found := re.search(rf"(?<!\w){words}(?!\w)", prompt, re.IGNORECASE) if words else None:  # not within a word
        parts = [prompt[: found.start()].rstrip(), prompt[: found.end()]]
        begin, end = map(len, token_ids(family.tokenizers[name], parts))
        if end > (read := max(1, family.max_tokens // 75) * inside):
            raise UsageError(
                f"--subjects: '{subject}' ends at token {end} of the prompt, of which {read} are read; put it further "
                "ahead, or shorten the prompt"
            )
        return [i // inside * width + before + i % inside for i in range(begin, end)]
    raise UsageError(f"--subjects: '{subject}' is not in the prompt '{prompt}'; expected words as they stand there")


def tokens_before(family: Family) -> int:
    """How many tokens stand before the first word of a chunk: 1, or none (T5)."""
    return int(kind_of(family.modules[family.text_encoders[0]]).around[0] is not None)


def scores(
    cross: Tensor, itself: Tensor, size: tuple[int, int], subjects: Sequence[Sequence[int]], words: range
) -> tuple[Tensor, Tensor]:
    """The cross-attention response score and the self-attention conflict score of one picture; lower is better.

    Args:
        cross: attention of positions to the text, (N, M), N = h * w. itself: to each other, (N, N).
        size: (h, w). subjects: the positions of each one's tokens in the text. words: the positions that vie for
            attention.

    Returns:
        How far the most neglected subject is from having a position's whole attention, in [0, 1], and how much the
        attention of the places of the subjects overlaps, mean over the pairs, in [0, 0.5].
    """
    sharp = (100 * cross[:, words.start : words.stop]).softmax(-1)  # (N, words), as sharp as the authors make it
    maps = [smooth(sharp[:, [i - words.start for i in tokens]].sum(-1), size) for tokens in subjects]  # (N,) each
    response = torch.stack([1 - each.max() for each in maps]).max()
    places = [smooth(itself[int(each.argmax())], size) for each in maps]  # (N,) each: what the subject's place looks at
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    overlaps = [torch.minimum(a, b).sum() / (a + b).sum() for a, b in pairs]
    return response, torch.stack(overlaps).mean() if overlaps else response.new_zeros(())


def smooth(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map, (N,) with N = h * w, under a Gaussian of 3 x 3 and deviation 0.5."""
    line = torch.exp(-torch.tensor([-1.0, 0.0, 1.0], device=values.device) ** 2 / (2 * 0.5**2))
    kernel = torch.outer(line, line) / line.sum() ** 2  # (3, 3)
    padded = F.pad(values.view(1, 1, *size), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel[None, None]).flatten()


def map_level(sides: tuple[int, int], levels: Iterable[int]) -> tuple[int, tuple[int, int]]:
    """Which level of a UNet is read, 0 being the finest, and its (h, w): the coarsest with `POSITIONS`, or the finest.

    Args:
        sides: of the latents. levels: those that have attention to words.
    """
    sizes = {i: (-(-sides[0] // 2**i), -(-sides[1] // 2**i)) for i in levels}
    large = [i for i, (h, w) in sizes.items() if h * w >= POSITIONS]
    level = max(large) if large else min(sizes)
    return level, sizes[level]


def level_of(name: str, levels: int) -> int:
    """The level of an attention layer of a UNet, by its name; 0 is the finest."""
    block, _, rest = name.partition(".")
    if block == "mid_block":
        return levels - 1
    number = int(rest.partition(".")[0])
    return number if block == "down_blocks" else levels - 1 - number


def check_family(family: Family) -> None:
    """Raises UsageError for a model that is no plain one of text to image with words as its prompts."""
    if not family.text_encoders or family.inpaints:
        raise UsageError(
            "--init-noise-optimization reads how much a picture attends to each word of its prompt; expected a model "
            "of text to image, such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )


class Scorer:
    """The scores of pictures' first noise.

    Args:
        family: the model. prompts: one a picture.
        subjects: of each prompt; None finds them (`subjects_in`).
        height, width: of the pictures, in pixels.
        t: the timestep at which sampling begins.
        words_only: leave the end and the padding out of what vies for attention; the authors leave them in.

    Raises:
        UsageError: the model has no attention to words, or a prompt names nothing.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[str],
        subjects: Sequence[str] | None,
        height: int,
        width: int,
        t: int,
        words_only: bool = False,
    ) -> None:
        check_family(family)
        self.family, self.t = family, t
        self.unet = family.modules[family.denoiser]
        self.levels = len(self.unet.config.block_out_channels)
        layers = [name for name, _ in self.unet.named_modules() if name.endswith("attn2")]
        if not layers:
            raise UsageError(
                "--init-noise-optimization: this UNet has no attention to words, which it reads; draw without it"
            )
        attending = {level_of(name, self.levels) for name in layers}
        self.level, self.size = map_level(family.latent_shape(height, width)[1:], attending)
        self.subjects = []
        for prompt in prompts:
            names = subjects if subjects is not None else subjects_in(prompt)
            if not names:
                what = f"no subject found in '{prompt}'"
                raise UsageError(f"--init-noise-optimization: {what}; name some with --subjects")
            self.subjects.append([token_positions(family, prompt, name) for name in names])
        sizes = [[height, width, 0, 0, height, width]] * len(prompts)
        with torch.no_grad():
            self.conditioning = family.with_sizes(family.encode_text(list(prompts)), sizes)
        first, last = tokens_before(family), self.conditioning.text.shape[1] - 1
        self.words = [range(first, last)] * len(prompts)
        if words_only:
            lengths = map(len, token_ids(next(iter(family.tokenizers.values())), list(prompts)))
            self.words = [range(first, min(last, first + length)) for length in lengths]

    def read(self, name: str) -> bool:
        """Whether an attention layer's maps are read."""
        return level_of(name, self.levels) == self.level

    def __call__(self, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both scores of each picture, with their gradients, of its noise (B, C, h, w)."""
        with recorded_maps(self.unet, self.read) as maps:
            t = torch.full((len(noise),), self.t, device=noise.device)
            self.family.predict(noise.to(self.unet.dtype), t, self.conditioning)
        kinds = [
            torch.cat([each.float() for name, each in maps.items() if name.endswith(kind)], dim=1).mean(1)
            for kind in ("attn2", "attn1")
        ]  # (B, N, M) and (B, N, N), means over heads and layers
        pictures = zip(*kinds, self.subjects, self.words, strict=True)
        return [scores(cross, itself, self.size, tokens, words) for cross, itself, tokens, words in pictures]


def optimised_noise(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    t: int,
    *,
    subjects: Sequence[str] | None = None,
    words_only: bool = False,
    settings: Settings | None = None,
) -> list[Found]:
    """The first noise of pictures, optimised until both scores are below their bars, or the best of all rounds.

    Args:
        seeds: one a picture. Others: as `Scorer` has them.

    Returns:
        For each picture what was found. It depends on its own prompt and seed alone.

    Raises:
        UsageError: as `Scorer`.
    """
    size, shape, found = max(1, min(16, PIXELS // (height * width))), family.latent_shape(height, width), list[Found]()
    for start in range(0, len(prompts), size):
        some = slice(start, start + size)
        scorer = Scorer(family, prompts[some], subjects, height, width, t, words_only)
        found += search(scorer, seeds[some], shape, settings or Settings())
    return found


def search(scorer: Scorer, seeds: Sequence[int], shape: Sequence[int], settings: Settings) -> list[Found]:
    """Rounds of `optimise` for the scorer's pictures, until each has met both bars."""
    device, best = scorer.unet.device, list[Found | None]([None] * len(seeds))
    for number in range(settings.rounds):
        rounds = () if number == 0 else (number,)  # the first noise is the one that is drawn without optimisation
        eps = torch.stack([draws.normal(shape, seed, "initial sample noise", *rounds) for seed in seeds]).to(device)
        best = optimise(scorer, eps, best, settings)
        if all(each is not None and each.reached for each in best):
            break
    return [each for each in best if each is not None]


def optimise(scorer: Scorer, eps: Tensor, best: list[Found | None], settings: Settings) -> list[Found | None]:
    """One round: steps on mean and deviation of noise `eps`, (B, C, h, w) each; the best so far of each picture."""
    mean = torch.zeros_like(eps, requires_grad=True)
    log_variance = torch.zeros_like(eps, requires_grad=True)
    adam, best = torch.optim.Adam([mean, log_variance], lr=settings.rate), list(best)
    for step in range(settings.steps + 1):  # the last look follows the last step
        with torch.enable_grad():
            noise = mean + (log_variance / 2).exp() * eps
            found = scorer(noise)
            joint = torch.stack([response + conflict for response, conflict in found]).sum()
            apart = (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).mean(1) / 2  # (B,)
            loss = joint + settings.divergence * apart.sum()
        for i, (response, conflict) in enumerate(found):
            best[i] = better(best[i], noise[i].detach(), response.item(), conflict.item(), settings)
        if step == settings.steps or all(each is not None and each.reached for each in best):
            break
        mean.grad, log_variance.grad = torch.autograd.grad(loss, [mean, log_variance])
        adam.step()
    return best


def better(old: Found | None, noise: Tensor, response: float, conflict: float, settings: Settings) -> Found:
    """The old one, or a new one that is better; one that met both bars stays."""
    reached = response < settings.response and conflict < settings.conflict
    new = Found(noise, response, conflict, (response, conflict), reached)
    if old is None:
        return new
    if old.reached or not reached and response + conflict >= old.response + old.conflict:
        return old
    return replace(new, before=old.before)
