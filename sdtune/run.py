"""One run, from a recipe to its folder: builds the parts, drives the loop, and does what is due between two steps."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtune import building, checkpoint, distributed
from sdtune.config import Recipe, dump, load
from sdtune.data.batches import batches, collate
from sdtune.data.dataset import TrainingSet, held_out, validation_examples
from sdtune.data.sources import Source
from sdtune.errors import RunError
from sdtune.run_folder import RunFolder
from sdtune.tasks import AutoencodingTask, TrainStep
from sdtune.train import Ema, StepInfo, lr_factor, make_accelerator, make_optimizer, prepare, train


class Run:
    """A recipe made ready. Iterate over `steps()`, then call `finish()`; or call `complete()` for both.

    Args:
        recipe: validated settings.
        resume: go on from the last checkpoint of `output.dir`.

    Raises:
        SdtuneError: bad data, weights or run folder. The folder is made when data and weights are found good.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False) -> None:
        self.recipe = recipe
        self.folder = RunFolder(recipe.output.dir)
        self.folder.latest() if resume else self.folder.check_free()
        self.accelerator = make_accelerator(recipe.train.precision, recipe.output.trackers, str(self.folder.path))
        self.height, self.width = building.picture_size(recipe)
        drawn = [settings for settings in recipe.data if settings.generate]
        sources = [building.make_source(settings) for settings in recipe.data if not settings.generate]
        self.family = building.make_family(recipe)
        self.place()
        distributed.barrier()
        if distributed.is_main() and not resume:
            self.folder.start(dump(recipe))
        for settings in drawn:
            if distributed.is_main():
                with self.accelerator.autocast():
                    building.draw_class_pictures(recipe, settings, self.family)
            distributed.barrier()
            sources.append(building.make_source(settings))
        self.make_data(sources)
        self.make_learning()
        self.step = self.restore() if resume else 0

    # --- getting ready ----------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Networks to their device; on a GPU frozen ones in half precision, but for the VAE in fp16."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.train.precision)
        for name, network in self.family.modules.items():
            network.to(self.accelerator.device)
            if half and self.accelerator.device.type == "cuda" and not (name == "vae" and half is torch.float16):
                network.to(half)

    def make_data(self, sources: list[Source]) -> None:
        """The training set and the held-out batches."""
        recipe, images = self.recipe, self.recipe.images
        training, validation = held_out(sources, recipe.validation.fraction, recipe.train.seed)
        self.training = TrainingSet(
            training,
            height=self.height,
            width=self.width,
            crop=images.crop,
            flip=images.flip,
            caption_dropout=images.caption_dropout,
            seed=recipe.train.seed,
            background=images.background,
        )
        self.sources = training
        examples = validation_examples([validation], self.height, self.width, recipe.validation.count)
        size = recipe.train.batch_size
        self.held_out = [collate([[e] for e in examples[i : i + size]]) for i in range(0, len(examples), size)]

    def make_learning(self) -> None:
        """Attach the adapter, join family and objective in a task, and prepare all for the device."""
        recipe, settings = self.recipe, self.recipe.optimizer
        self.adapter = building.make_adapter(recipe)
        networks = building.learning_networks(recipe, self.family)
        learning = self.adapter.attach(self.family, networks, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            building.save_memory([self.family.modules[name] for name in networks])
        self.parameters = {f"{name}.{key}": p for name, some in learning.items() for key, p in some.items()}
        text_lr = settings.lr if settings.text_encoder_lr is None else settings.text_encoder_lr
        optimizer = make_optimizer(
            [(list(some.values()), settings.lr if name in ("vae", self.family.denoiser) else text_lr)
             for name, some in learning.items()],
            weight_decay=settings.weight_decay,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
        )
        self.task = building.make_task(recipe, self.family)
        self.module, self.optimizer = prepare(self.accelerator, TrainStep(self.task), optimizer)
        self.ema = None if recipe.train.ema is None else Ema(self.parameters, recipe.train.ema)

    def restore(self) -> int:
        """Put the last checkpoint back; returns its step."""
        step = checkpoint.restore(
            self.folder.latest(),
            parameters=self.parameters,
            optimizer=self.optimizer.optimizer,
            averages=None if self.ema is None else self.ema.average,
            scaler=self.accelerator.scaler,
        )
        if step >= self.recipe.train.steps:
            raise RunError(
                f"'{self.folder.path}' has done its {step} steps already; to train longer add train.steps=NUMBER, "
                f"to draw with it: sdtune sample {self.folder.path} --prompt TEXT"
            )
        if distributed.is_main():
            self.folder.rewind(step)
        return step

    # --- training ---------------------------------------------------------------------------------------------------

    def complete(self) -> Path:
        """Train to the end and write `final/`; returns the run folder."""
        for _ in self.steps():
            pass
        self.finish()
        return self.folder.path

    def steps(self) -> Iterator[StepInfo]:
        """Train; yields after each step, when its measuring, drawing and saving is done."""
        recipe = self.recipe
        if self.step == 0:
            self.measure()
            self.draw_samples()
        for info in self.loop():
            self.step = info.step
            last = info.step == recipe.train.steps
            self.log(info)
            if last or due(info.step, recipe.validation.every):
                self.measure()
            if recipe.validation.samples and (last or due(info.step, recipe.validation.samples.every)):
                self.draw_samples()
            if due(info.step, recipe.output.checkpoint_every):
                self.save_checkpoint()
            yield info

    def loop(self) -> Iterator[StepInfo]:
        """The loop of `train.py` over this run's parts."""
        recipe, settings = self.recipe, self.recipe.optimizer
        local = batches(
            self.training,
            start=self.step,
            batch_size=recipe.train.batch_size,
            accumulate=recipe.train.accumulate,
            rank=distributed.rank(),
            world=distributed.world(),
            workers=recipe.train.workers,
        )
        return train(
            self.module,
            self.optimizer,
            local,
            lambda batch: self.task.draw(batch, recipe.train.seed),
            self.accelerator,
            start=self.step,
            steps=recipe.train.steps,
            accumulate=recipe.train.accumulate,
            factor=lambda step: lr_factor(settings.schedule, step, settings.warmup, recipe.train.steps),
            clip=settings.clip,
            ema=self.ema,
        )

    def finish(self) -> None:
        """Write `final/`, from the averaged weights where there are some."""
        with self.averaged():
            if isinstance(self.task, AutoencodingTask) and self.scale_is_open():
                examples = validation_examples(self.sources, self.height, self.width, 512)
                self.task.set_scaling_factor([collate([[e]]).to(self.accelerator.device) for e in examples])
            if distributed.is_main():
                with checkpoint.written_aside(self.folder.final) as aside:
                    self.save_weights(aside)
        if self.accelerator.trackers:
            self.accelerator.end_training()
        distributed.barrier()

    def scale_is_open(self) -> bool:
        """Whether a VAE from scratch was given no scaling factor."""
        part = (self.recipe.model.from_config or {}).get("vae")
        return isinstance(part, dict) and "scaling_factor" not in part

    # --- between two steps ------------------------------------------------------------------------------------------

    def log(self, info: StepInfo) -> None:
        """A line in metrics.jsonl and in every tracker."""
        if info.step % self.recipe.output.log_every and info.step != 1:
            return
        values = asdict(info)
        values["samples_per_second"] = round(info.samples / info.seconds, 3)
        values["seconds"] = round(info.seconds, 4)
        self.record(values)

    def record(self, values: dict[str, Any]) -> None:
        """Log values that hold "step"."""
        if distributed.is_main():
            self.folder.log(values)
        if self.recipe.output.trackers:
            if not self.accelerator.trackers:  # opened late: their libraries take seconds to import
                self.accelerator.init_trackers("logs")
            self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

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
        self.record({"step": self.step, "val_loss": torch.cat(losses).mean().item()})

    def draw_samples(self) -> None:
        """Pictures of the recipe's prompts, from the same initial noise at every call."""
        settings = self.recipe.validation.samples
        if settings and distributed.is_main():
            from sdtune.sample import draw_pictures

            seeds = [settings.seed + i for i in range(len(settings.prompts))]
            facts = {"prompts": settings.prompts, "seeds": seeds, "steps": settings.steps, "guidance": settings.guidance}
            size = {"height": self.height, "width": self.width}
            with self.averaged(), self.accelerator.autocast():
                options = {"steps": settings.steps, "guidance": settings.guidance}
                pictures = list(draw_pictures(self.family, settings.prompts, seeds, **size, **options))
            self.folder.save_samples(self.step, pictures, facts)
        distributed.barrier()

    def save_checkpoint(self) -> None:
        """Write all that `restore` needs, and the weights as other tools read them."""
        if distributed.is_main():
            checkpoint.save(
                self.folder.checkpoint(self.step),
                step=self.step,
                parameters=self.parameters,
                optimizer=self.optimizer.optimizer,
                averages=None if self.ema is None else self.ema.average,
                scaler=self.accelerator.scaler,
                save_weights=self.save_averaged,
            )
            checkpoint.forget_old(self.folder.path, self.recipe.output.keep_last)
        distributed.barrier()

    def save_averaged(self, folder: Path) -> None:
        """Write the averaged weights where there are some."""
        with self.averaged():
            self.save_weights(folder)

    def save_weights(self, folder: Path) -> None:
        """Write the weights as they are now, and a note of what they belong to."""
        self.adapter.save(self.family, folder)
        model = self.recipe.model
        facts = {"adapter": self.recipe.adapter.kind, "family": model.family, "base": model.base, "step": self.step}
        checkpoint.write_json(folder / "sdtune.json", facts)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the EMA's weights, if there is one."""
        if self.ema is None or self.step == 0:
            yield
            return
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


@contextlib.contextmanager
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
    settings = load(recipe, overrides)
    run = Run(settings, resume=resume)
    info = show_progress(run)
    run.finish()
    if distributed.is_main():
        print(f"done: {run.folder.path} (weights in {run.folder.final})", file=sys.stderr)
        if as_json:
            result = {"run": str(run.folder.path), "steps": run.step, "loss": info.loss if info else None}
            print(json.dumps(result))
    return 0


def show_progress(run: Run) -> StepInfo | None:
    """Train under a progress bar with loss, learning rate, rate and time left; an interrupted run keeps its work."""
    from tqdm import tqdm

    info = None
    total = run.recipe.train.steps
    with tqdm(total=total, initial=run.step, unit="step", disable=not distributed.is_main(), mininterval=0.5) as bar:
        try:
            for info in run.steps():
                bar.set_postfix(loss=f"{info.loss:.4f}", lr=f"{info.lr:.1e}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            if run.step:
                run.save_checkpoint()
                bar.write(f"interrupted after step {run.step}; go on with the same command and --resume", file=sys.stderr)
            raise
    return info
