"""One run, from a recipe to its folder: builds the parts, drives the loop, and does what is due between two steps."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune import building, caching, checkpoint, distributed
from sdtune.config import DataSource, Recipe, Samples, dump, load
from sdtune.config.checks import doubtful
from sdtune.config.memory_checks import needs_bitsandbytes
from sdtune.data.batches import batches
from sdtune.data.buckets import Bucket, bucket_table, table_lines
from sdtune.data.dataset import evenly, frame_of, held_out
from sdtune.data.examples import Known
from sdtune.data.picture import Picture
from sdtune.data.sources import Source, fingerprint
from sdtune.data.survey import survey
from sdtune.errors import DataError, RunError, SdtuneError
from sdtune.libraries import prepare as prepare_libraries
from sdtune.logbook import Logbook
from sdtune.optimizers import averaged, make_optimizer
from sdtune.resuming import check_folder
from sdtune.run_folder import NOTES, RunFolder
from sdtune.tasks import AutoencodingTask, DenoisingTask, TrainStep
from sdtune.train import Ema, StepInfo, lr_factor, make_accelerator, prepare, train
from sdtune.writing import write_json, written_aside


class Run:
    """A recipe made ready. Iterate over `steps()`, then call `finish()`; or call `complete()` for both.

    Args:
        recipe: validated settings.
        resume: go on from the last checkpoint of `output.dir`, or from its start where there is none yet.

    Raises:
        SdtuneError: bad data, weights or run folder. The folder is made when all else was found good.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False) -> None:
        self.recipe, self.step = recipe, 0
        self.folder = RunFolder(recipe.output.dir)
        check_folder(recipe, resume=resume)
        self.accelerator = make_accelerator(recipe.train.precision, recipe.output.trackers, self.folder.path)
        self.logbook = Logbook(self.folder, self.accelerator, recipe.output.log_every)
        self.height, self.width = building.picture_size(recipe)
        sources = [building.make_source(recipe, settings) for settings in recipe.data if not settings.generate]
        sources = survey(sources, building.reads_masks(recipe))
        self.family = building.make_family(recipe)
        building.check_size(self.family, self.height, self.width)
        self.buckets = building.make_buckets(recipe, self.family.factor)
        self.make_learning()
        drawn = [settings for settings in recipe.data if settings.generate]
        early = bool(drawn) and not resume  # drawing takes long; a run that is stopped there can be resumed
        if early:
            self.start()
        try:
            self.make_data(sources + [self.class_source(settings) for settings in drawn])
        except SdtuneError:
            if early and distributed.is_main():
                self.folder.remove()
            raise
        if resume:
            self.restore()
        if not early:
            self.start()
        if self.buckets is not None and distributed.is_main():
            self.folder.save_buckets(self.bucket_table())
            print("\n".join(table_lines(self.bucket_table())), file=sys.stderr)

    # --- getting ready ----------------------------------------------------------------------------------------------

    def same(self) -> dict[str, Any]:
        """What must be the same on resume, for the order of the samples follows from it."""
        settings = self.recipe.train
        facts = {
            "samples a step (train.batch_size x train.accumulate x processes)": (
                settings.batch_size * settings.accumulate * distributed.world()
            ),
            "pictures and captions": fingerprint(self.sources),
        }
        if self.buckets is not None:
            sizes = [f"{each.pictures} of {each.width} x {each.height}" for each in self.bucket_table()]
            facts["pictures of each size"] = ", ".join(sizes)
        return facts

    def bucket_table(self) -> list[Bucket]:
        """The sizes that the instance pictures are trained in."""
        assert self.buckets is not None
        pictures = [picture for source in self.sources if source.role == "instance" for picture in source.pictures]
        return bucket_table(self.buckets, [picture.size for picture in pictures if picture.size is not None])

    def start(self) -> None:
        """Make the run folder."""
        distributed.barrier()  # every process has looked at the folder before it is made
        if distributed.is_main():
            self.folder.start(dump(self.recipe), self.step)

    def class_source(self, settings: DataSource) -> Source:
        """Class pictures, drawn where they are missing by what the run begins with: the base, or adapter.init_from."""
        from sdtune.class_pictures import draw_class_pictures

        if distributed.is_main():
            with self.accelerator.autocast():
                draw_class_pictures(self.recipe, settings, self.family)
        distributed.barrier()
        (source,) = survey([building.make_source(self.recipe, settings)], building.reads_masks(self.recipe))
        return source

    def make_data(self, sources: list[Source]) -> None:
        """The training set and the held-out batches."""
        settings = self.recipe.validation
        building.check_masks(self.recipe, sources)
        for note in building.unused_masks(self.recipe, sources) if distributed.is_main() else ():
            print(f"{note.level}: {note.count} {note.what}; {note.do}", file=sys.stderr)
        building.check_tokens(self.recipe, sources)
        building.check_classes(self.family, sources)
        self.sources, self.validation = held_out(sources, settings.fraction, self.recipe.train.seed)
        measured = replace(self.validation, pictures=evenly([self.validation], settings.count))
        known = caching.known_views(self.recipe, self.stores, [*self.sources, measured])
        self.training = building.make_training_set(self.recipe, self.sources, self.buckets, distributed.world(), known)
        self.fill_cache(known, measured.pictures)
        size = self.recipe.train.batch_size
        self.held_out = building.make_held_out(self.recipe, [measured], settings.count, size, self.buckets, known)

    def fill_cache(self, known: Known, measured: Sequence[Picture]) -> None:
        """Encode what `train.cache_dir` lacks of the pictures that are learned and those that are measured."""
        if self.stores is None or not isinstance(self.task, DenoisingTask):
            return
        views = list(self.training.views())
        views += [(picture, frame_of(picture, self.height, self.width, self.buckets), False) for picture in measured]
        captions = [*self.training.captions(self.recipe.train.steps), *(picture.captions[0] for picture in measured)]
        with self.accelerator.autocast():
            caching.fill_stores(self.stores, known, self.task, views, captions)
        if self.family.autoencoder is not None:  # its work is done but for samples, for which it comes back
            self.family.modules[self.family.autoencoder].to("cpu")

    def make_learning(self) -> None:
        """Attach the adapter, join family and objective in a task, and prepare all for the device."""
        recipe, settings = self.recipe, self.recipe.optimizer
        self.adapter = building.make_adapter(recipe)
        networks, device = building.learning_networks(recipe, self.family), self.accelerator.device
        building.choose_attention(recipe, self.family, device)
        building.quantize_frozen(recipe, self.family, device)
        self.learning = learning = self.adapter.attach(self.family, networks, recipe.train.seed)
        building.place(self.family, device, building.frozen_dtype(device, recipe.train.precision, self.adapter))
        if recipe.train.gradient_checkpointing:
            through = building.gradient_networks(recipe, self.family)
            building.save_memory([self.family.modules[name] for name in through])
        if recipe.train.compile:
            building.compile_denoiser(self.family)
        self.parameters = {f"{name}.{key}": p for name, some in learning.items() for key, p in some.items()}
        rates = building.learning_rates(recipe, self.family, learning)
        optimizer = make_optimizer(
            settings.name,
            [(list(some.values()), rates[name]) for name, some in learning.items()],
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
        self.stores = caching.open_stores(recipe, self.family)
        self.task = building.make_task(recipe, self.family, self.stores)
        self.module, self.optimizer = prepare(self.accelerator, TrainStep(self.task), optimizer)
        self.ema = None if recipe.train.ema is None else Ema(self.parameters, recipe.train.ema)

    def restore(self) -> None:
        """Put the last checkpoint back, if there is one."""
        latest = self.folder.latest()
        if latest is None:
            return
        self.step = checkpoint.restore(
            latest,
            same=self.same(),
            parameters=self.parameters,
            optimizer=self.optimizer.optimizer,
            averages=None if self.ema is None else self.ema.average,
            scaler=self.accelerator.scaler,
        )
        if self.step > self.recipe.train.steps or self.step == self.recipe.train.steps and not self.folder.unfinished():
            raise RunError(
                f"'{self.folder.path}' has done {self.step} steps already; to train longer add train.steps=NUMBER, "
                f"to draw with it: sdtune sample {self.folder.path} --prompt TEXT"
            )

    # --- training ---------------------------------------------------------------------------------------------------

    def complete(self) -> Path:
        """Train to the end and write `final/`; returns the run folder."""
        for _ in self.steps():
            pass
        self.finish()
        return self.folder.path

    def steps(self) -> Iterator[StepInfo]:
        """Train; yields after each step, when its measuring, drawing and saving is done.

        Raises:
            TrainingError: the loss is not finite. RunError: the disk is full.
            DataError: a picture cannot be read; what was learned before it is kept in a checkpoint.
        """
        recipe = self.recipe
        if self.step == 0:
            self.measure()
            self.draw_samples()
        try:
            for info in self.loop():
                self.step = info.step
                last = info.step == recipe.train.steps
                self.logbook.step(info)
                if last or due(info.step, recipe.validation.every):
                    self.measure()
                if recipe.validation.samples and (last or due(info.step, recipe.validation.samples.every)):
                    self.draw_samples()
                every = recipe.output.checkpoint_every
                if due(info.step, every) or (last and self.has_checkpoints()):
                    self.save_checkpoint()
                yield info
        except DataError as fault:
            self.keep()
            message = str(fault).rstrip(".")
            raise DataError(
                f"{message}. The run stopped after step {self.step}; when that is mended, go on with the same command "
                "and --resume"
            ) from fault

    def loop(self) -> Iterator[StepInfo]:
        """The loop of `train.py` over this run's parts."""
        recipe, settings = self.recipe, self.recipe.optimizer
        local = batches(
            self.training,
            start=self.step,
            stop=recipe.train.steps,
            batch_size=recipe.train.batch_size,
            accumulate=recipe.train.accumulate,
            rank=distributed.rank(),
            world=distributed.world(),
            workers=recipe.train.workers,
        )
        for first, stop in building.phases(recipe):
            if self.step >= stop:
                continue
            self.begin_phase(first)
            yield from train(
                self.module,
                self.optimizer,
                local,
                lambda batch: self.task.draw(batch, recipe.train.seed),
                self.accelerator,
                start=max(first, self.step),
                steps=stop,
                accumulate=recipe.train.accumulate,
                factor=lambda step: lr_factor(settings.schedule, step, settings.warmup, recipe.train.steps),
                clip=settings.clip,
                ema=self.ema,
            )

    def begin_phase(self, step: int) -> None:
        """Let learn whose turn it is from `step` on; the others get no gradient, and the optimizer passes over them."""
        changed = False
        for name, parameters in self.learning.items():
            learns = building.learns_at(self.recipe, self.family, name, step)
            changed |= any(parameter.requires_grad != learns for parameter in parameters.values())
            for parameter in parameters.values():
                parameter.requires_grad_(learns)
        if changed:
            self.module, self.optimizer = prepare(self.accelerator, TrainStep(self.task), self.optimizer)

    def finish(self) -> None:
        """Write `final/`, from the averaged weights where there are some, and the report."""
        from sdtune.report import write_report

        if isinstance(self.task, AutoencodingTask) and self.scale_is_open():
            examples = building.make_held_out(self.recipe, self.sources, 512, 1, self.buckets)
            with self.averaged():
                self.task.set_scaling_factor([batch.to(self.accelerator.device) for batch in examples])
        if distributed.is_main():
            with written_aside(self.folder.final) as aside:
                self.save_weights(aside)
            write_report(self.folder)
        self.logbook.close()
        distributed.barrier()

    def scale_is_open(self) -> bool:
        """Whether a VAE from scratch was given no scaling factor."""
        part = (self.recipe.model.from_config or {}).get("vae")
        return isinstance(part, dict) and "scaling_factor" not in part

    # --- between two steps ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> None:
        """The held-out loss, with noise and timesteps that are the same at every call."""
        if not self.held_out:
            return
        module: nn.Module = self.accelerator.unwrap_model(self.module)
        total, device = sum(batch.instances for batch in self.held_out), self.accelerator.device
        with self.averaged(), evaluation(module):
            losses = [
                module(batch.to(device), self.task.draw_fixed(batch, self.recipe.train.seed, total).to(device))
                for batch in self.held_out
            ]
        self.logbook.write({"step": self.step, "val_loss": torch.cat(losses).mean().item()})

    def draw_samples(self) -> None:
        """Pictures of the recipe's prompts, from the same initial noise at every call; of a VAE reconstructions."""
        settings = self.recipe.validation.samples
        if settings and distributed.is_main():
            sources = [self.validation] if self.held_out else self.sources
            with self.averaged(), self.accelerator.autocast(), building.decoding(self.family, self.accelerator.device):
                if isinstance(self.task, AutoencodingTask):
                    self.draw_reconstructions(settings, sources)
                else:
                    self.draw_prompts(settings, sources)
        distributed.barrier()

    def draw_prompts(self, settings: Samples, sources: Sequence[Source]) -> None:
        """A picture of each prompt, in inpainting runs painted into one of `sources`."""
        from sdtune.sample import draw_pictures

        seeds = [settings.seed + i for i in range(len(settings.prompts))]
        options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance}
        options |= {"sampler": settings.sampler} if settings.sampler else {}
        size: dict[str, Any] = {"height": self.height, "width": self.width}
        shown = building.make_shown(self.recipe, sources, len(seeds)) if self.family.inpaints else None
        pictures = list(draw_pictures(self.family, settings.prompts, seeds, **size, **options, shown=shown))
        self.folder.save_samples(self.step, pictures, {"prompts": settings.prompts, "seeds": seeds, **options})

    def draw_reconstructions(self, settings: Samples, sources: Sequence[Source]) -> None:
        """Pictures of `sources` beside what the VAE makes of them, and the mean of how near they are."""
        from sdtune.reconstructions import reconstructions
        from sdtune.sample import evaluating

        shown = building.make_held_out(self.recipe, sources, settings.count, 1, self.buckets)
        with evaluating(self.family):
            pixels = (batch.pixels[0] for batch in shown if batch.pixels is not None)
            pictures, nearness = zip(*reconstructions(self.family, pixels), strict=True)
        names = [batch.captions[0] or f"picture {number}" for number, batch in enumerate(shown, 1)]
        self.folder.save_samples(self.step, pictures, {"prompts": names, "psnr": nearness})
        self.logbook.write({"step": self.step, "psnr": sum(nearness) / len(nearness)})

    def save_checkpoint(self) -> None:
        """Write all that `restore` needs, and the weights as other tools read them."""
        if distributed.is_main():
            checkpoint.save(
                self.folder.checkpoint(self.step),
                step=self.step,
                same=self.same(),
                parameters=self.parameters,
                optimizer=self.optimizer.optimizer,
                averages=None if self.ema is None else self.ema.average,
                scaler=self.accelerator.scaler,
                save_weights=self.save_weights,
            )
            checkpoint.forget_old(self.folder.path, self.recipe.output.keep_last)
        distributed.barrier()

    def has_checkpoints(self) -> bool:
        """Whether checkpoints are asked for, or one was left when the run was stopped: it can be made longer then."""
        return self.recipe.output.checkpoint_every is not None or self.folder.latest() is not None

    def keep(self) -> None:
        """A checkpoint out of turn, before the run stops early; several processes cannot wait for each other here."""
        there = self.folder.checkpoint(self.step).exists()
        if self.step and not there and distributed.world() == 1:
            self.save_checkpoint()

    def save_weights(self, folder: Path) -> None:
        """Write the weights, averaged where there is an EMA, and a note of what they belong to."""
        with self.averaged():
            self.adapter.save(self.family, folder)
        inpaints = isinstance(self.task, DenoisingTask) and self.family.inpaints
        notes = building.facts(self.recipe) | {"step": self.step, "inpaints": inpaints}
        write_json(folder / NOTES, notes)

    def averaged(self) -> AbstractContextManager[None]:
        """Within: the EMA's weights, if there is one, or those that the optimizer averages."""
        if self.ema is None:
            return averaged(self.optimizer.optimizer)
        return nullcontext() if self.step == 0 else self.ema.applied()


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode; afterwards each part as it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def command(recipe: str, overrides: list[str], resume: bool = False, as_json: bool = False) -> int:
    """`sdtune train`: run a recipe with a progress bar; returns the exit code.

    Args:
        recipe: YAML file or name of a shipped recipe. overrides: key=value each.
        resume: go on from the last checkpoint. as_json: end with one JSON object on stdout.
    """
    from sdtune.progress import show_progress

    settings = load(recipe, overrides)
    if distributed.is_main():
        for key, what in doubtful(settings):
            print(f"warning: {key} {what}", file=sys.stderr)
    prepare_libraries(eight_bits=needs_bitsandbytes(settings))
    run = Run(settings, resume=resume)
    info = show_progress(run)
    run.finish()
    if distributed.is_main():
        print(f"done: {run.folder.path} (weights in {run.folder.final})", file=sys.stderr)
        result = {"run": str(run.folder.path), "steps": run.step, "loss": info.loss if info else None}
        try:
            if settings.output.push_to_hub is not None:
                from sdtune.hub import push_after_training

                result["url"] = None
                repo, private = settings.output.push_to_hub, settings.output.private
                result["url"] = push_after_training(run.folder.path, repo, private=private)
        finally:  # a push that fails takes nothing away
            if as_json:
                print(json.dumps(result))
    return 0
