"""The training loop: any stage, on whatever accelerate finds, resumable to the bit.

Contract: `train` is called by every process that `accelerate launch` starts. After every `save_every` steps, and when
the run is interrupted, its state is in RUN/step-NNNNNN; a run that goes on from there writes the same losses and the
same weights as one that was never stopped, because the data order and every random draw are functions of the seed, the
step and the process alone (on the same machine, libraries and number of processes; kernels of a GPU may differ in the
last bit). The components are published at the end, or not at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, send_to_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from runtime.errors import EnvironmentProblem, UsageError
from runtime.progress import Observer, Progress, ignore
from videolavit import checkpoints
from videolavit.training import states
from videolavit.training.average import Average
from videolavit.training.errors import TrainingError
from videolavit.training.interrupts import Interrupts
from videolavit.training.memory import keep_freed_memory
from videolavit.training.metrics import Metrics, Window
from videolavit.training.optimizers import optimizer_of
from videolavit.training.order import Batches, derived_seed
from videolavit.training.publishing import publish_stage, rounded
from videolavit.training.records import Notes, open_run
from videolavit.training.settings import TrainSettings, read_options
from videolavit.training.stage import Stage, StageContext, find_stage

# What transformers (newer and older releases) and diffusers call it.
CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did: the last row of the metrics, the last validation, and the components it published."""

    steps: int
    seconds: float
    metrics: dict[str, float]
    validation: dict[str, float]
    components: tuple[str, ...]


def train(
    settings: TrainSettings,
    checkpoint: Path,
    run: Path,
    *,
    where: str = "settings",
    resume: bool = False,
    force: bool = False,
    observer: Observer = ignore,
    note: Notes = lambda text: None,
) -> Outcome:
    """Train a stage and publish its components in `run` and in the folder `checkpoint`.

    `where` names the file of the settings in errors; `observer` and `note` are used on the main process only. Raises
    UsageError for settings, folders or a resume that make no sense, CheckpointError for weights that do not fit,
    EnvironmentProblem when the machine lacks what they need, TrainingError when a loss, gradient or weight is not
    finite, KeyboardInterrupt after the state was saved.
    """
    kind = find_stage(settings.stage)
    options = read_options(settings, kind.Options, where)
    if not (checkpoint / checkpoints.CONFIG).is_file():
        raise UsageError(
            f"{checkpoint}: not a checkpoint that can be trained; make one with `videolavit init` or `convert`"
        )
    source = checkpoints.load(checkpoint)
    accelerator = _accelerator(settings)
    main = accelerator.is_main_process
    if not main:
        observer, note = ignore, lambda text: None
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    open_run(run, settings, options, resume=resume, force=force, barrier=accelerator.wait_for_everyone, main=main)
    torch.manual_seed(settings.seed)  # heads that a stage adds begin the same everywhere
    context = StageContext(checkpoint=source, data=settings.data, seed=settings.seed, device=accelerator.device)
    stage = kind(context, options)
    trainer = _Trainer(stage, settings, accelerator, run, observer, note)
    trainer.resume()
    outcome = trainer.run()
    with trainer.averaged():
        weights = states.gathered(trainer.module) if trainer.sharded else {}
        if main:
            if trainer.sharded:  # the stage's own module holds shards: one that is whole takes its place
                stage = kind(replace(context, device=torch.device("cpu")), options)
                stage.module.load_state_dict(weights)
            publish_stage(stage, rounded(stage, settings.store), run, checkpoint)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return outcome


class _Trainer:
    """One run, from its state to its end."""

    def __init__(
        self,
        stage: Stage,
        settings: TrainSettings,
        accelerator: Accelerator,
        run: Path,
        observer: Observer,
        note: Notes,
    ) -> None:
        self.stage = stage
        self.settings = settings
        self.accelerator = accelerator
        self.folder = run
        self.observer = observer
        self.note = note
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and settings.optimizer == "muon":
            raise UsageError("optimizer 'muon': needs whole matrices, which FSDP's shards are not; set it to adamw")
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(stage)
        self.module, self.optimizer = accelerator.prepare(stage.module, optimizer_of(stage.module, settings))
        if self.sharded:
            stage.module = self.module
        _fill_moments(self.optimizer.optimizer)
        self.average = Average(self.module, settings.ema) if settings.ema else None
        self.position = states.Position(processes=accelerator.num_processes)
        self.generator = torch.Generator(device=accelerator.device)

    def averaged(self) -> AbstractContextManager[None]:
        """Within this context the module holds the weights that are published."""
        return nullcontext() if self.average is None else self.average.applied()

    def resume(self) -> None:
        """Go on from the last saved state, if there is one."""
        steps = states.saved_steps(self.folder)
        if not steps:
            return
        folder = states.folder_of(self.folder, steps[-1])
        position = states.read_position(folder)
        if self.average is not None:
            states.load_weights(folder, states.AVERAGE, self.module, sharded=self.sharded)
            self.average.restore(position.averaged)
        states.load_weights(folder, states.MODEL, self.module, sharded=self.sharded)
        states.load_optimizer(folder, self.module, self.optimizer.optimizer, sharded=self.sharded)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(position.scaler))
        if position.processes != self.position.processes:
            self.note(
                f"the run had {position.processes} processes and has {self.position.processes} now: "
                "no item is left out, but the steps are not those of an unbroken run"
            )
        self.position = position
        self.note(f"going on after step {position.step}")

    def run(self) -> Outcome:
        """Train to the last step; saves and raises KeyboardInterrupt when asked to stop."""
        settings, position = self.settings, self.position
        dataset = self.stage.dataset()
        self._announce(len(dataset))  # type: ignore[arg-type]
        batches = iter(self._loader(dataset))
        window = Window(position.window)
        seconds, started, mark = position.seconds, time.perf_counter(), time.perf_counter()
        per_step = settings.batch_size * settings.accumulation * self.accelerator.num_processes
        items, since = position.items, position.step
        row: dict[str, float] = {}
        figures: dict[str, float] = {}
        main = self.accelerator.is_main_process
        metrics = Metrics(self.folder, position.step, tensorboard=settings.tensorboard) if main else None
        with metrics or nullcontext(), Interrupts() as interrupts:
            for step in range(position.step, settings.steps):
                rate = learning_rate(settings, step)
                scalars, stopped = self._step(step, rate, batches, interrupts)
                # A process that is alone need not wait for the others to hear of it in the next step.
                stopped = stopped or (interrupts.pending and self.accelerator.num_processes == 1)
                window.add(scalars)
                done, items = step + 1, items + per_step
                last = done == settings.steps
                if done % settings.log_every == 0 or last:
                    now = time.perf_counter()
                    speed = (done - since) * per_step / (now - mark)
                    since, mark = done, now
                    clock = {"items_per_second": speed, "seconds": seconds + now - started}
                    row = {**window.take(), "learning_rate": rate, **clock}
                    if metrics is not None:
                        metrics.train(done, row)
                    self.observer(Progress("train", done, settings.steps))
                if settings.validate_every and (done % settings.validate_every == 0 or last):
                    figures = self._validate(done)
                    if figures and metrics is not None:
                        metrics.validation(done, figures)
                        listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                        self.note(f"step {done}: {listed}")
                if done % settings.save_every == 0 or last or stopped:
                    self.position = states.Position(
                        step=done,
                        items=items,
                        processes=self.accelerator.num_processes,
                        seconds=seconds + time.perf_counter() - started,
                        window=window.state(),
                        averaged=self.average.updates if self.average else 0,
                        scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
                    )
                    self._save()
                if stopped and not last:
                    self.note(f"stopped after step {done}; --resume goes on from there")
                    raise KeyboardInterrupt
        return Outcome(
            steps=self.position.step,
            seconds=self.position.seconds,
            metrics=row,
            validation=figures,
            components=self.stage.trains,
        )

    def _step(
        self, step: int, rate: float, batches: Iterator[dict[str, Any]], interrupts: Interrupts
    ) -> tuple[dict[str, float], bool]:
        """One optimiser step. Returns the means of what the module logs, and whether a process was asked to stop."""
        settings, accelerator = self.settings, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        for micro in range(settings.accumulation):
            self._seed(step, micro, accelerator.process_index)
            batch = send_to_device(next(batches), accelerator.device)
            with torch.no_grad():
                batch = self.stage.prepare(batch, self.generator)
            last = micro == settings.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.module):
                scalars = self.module(batch, self.generator, step)
                accelerator.backward(scalars["loss"] / settings.accumulation)
            for name, value in scalars.items():
                share = value.detach().float() / settings.accumulation
                sums[name] = sums[name] + share if name in sums else share
        means, stopped = self._agree(sums, interrupts.pending)
        if not math.isfinite(means["loss"]):
            raise self._diverged(step, "the loss", means["loss"])
        norm = float(accelerator.clip_grad_norm_(list(self.module.parameters()), settings.clip_norm or math.inf))
        if not math.isfinite(norm) and accelerator.scaler is None:  # the scaler leaves such a step out by itself
            raise self._diverged(step, "the gradient", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stage.after_step(step)
        if self.average is not None:
            self.average.update()
        return {"loss": means.pop("loss"), **means, "grad_norm": norm}, stopped

    def _agree(self, sums: dict[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Means over the processes, and whether one of them was asked to stop: all stop after the same step."""
        own = torch.stack([*(value.mean() for value in sums.values()), torch.tensor(float(stop)).to(self._device)])
        *means, stopped = self.accelerator.reduce(own, "mean").tolist()
        return dict(zip(sums, means, strict=True)), stopped > 0

    @property
    def _device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def _seed(self, *parts: object) -> None:
        """Everything drawn from here on is a function of the seed and `parts`."""
        seed = derived_seed(self.settings.seed, *parts)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout

    def _diverged(self, step: int, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"{self.stage.name}: step {step + 1}: {what} is {value}; nothing is published. Lower learning_rate, set "
            f"clip_norm or a longer warm-up; the states in {self.folder} are those before it"
        )

    @torch.no_grad()
    def _validate(self, done: int) -> dict[str, float]:
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        self._seed("validate")  # the same draws every time: the figures of two steps can be compared
        with self.averaged():
            figures = self.stage.validate(self.generator)
        for module, mode in modes:
            module.training = mode
        return {name: float(value) for name, value in figures.items()}

    def _save(self) -> None:
        average = self.average.applied() if self.average is not None else None
        states.save(
            self.folder,
            self.position,
            self.module,
            self.optimizer.optimizer,
            average,
            keep=self.settings.keep,
            main=self.accelerator.is_main_process,
        )
        self.accelerator.wait_for_everyone()

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        batches = Batches(
            len(dataset),
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            start=self.position.items,
            count=(self.settings.steps - self.position.step) * self.settings.accumulation,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.stage.collate,
            num_workers=self.settings.workers,
            pin_memory=self._device.type == "cuda",
        )

    def _announce(self, items: int) -> None:
        settings, processes = self.settings, self.accelerator.num_processes
        count = sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)
        factors = f"{settings.batch_size} items x {settings.accumulation} passes x {processes} processes"
        shards = " on this shard" if self.sharded else ""
        self.note(
            f"{self.stage.name}: {count:,} parameters{shards}, {items:,} items, {settings.steps:,} steps of {factors}, "
            f"on {self.accelerator.device}"
        )


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Rate of step `step`, counted from 0: a linear rise over the warm-up, then a cosine to the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * share))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * fall)


def enable_gradient_checkpointing(stage: Stage) -> None:
    """Ask every part of the module that can to compute its activations again. Raises UsageError when none can."""
    if not _enable_checkpointing(stage.module):
        raise UsageError(f"gradient_checkpointing: the stage {stage.name} has no part that can; set it to false")


def _enable_checkpointing(module: nn.Module) -> bool:
    """Ask `module`, or else the parts of it; one that is asked passes it on to its own parts."""
    for name in CHECKPOINTING:
        if callable(enable := getattr(module, name, None)):
            try:
                enable()
            except ValueError:  # the model's class says that it cannot
                return False
            return True
    asked = [_enable_checkpointing(child) for child in module.children()]  # all of them, whatever the first says
    return any(asked)


def _accelerator(settings: TrainSettings) -> Accelerator:
    # Parts that a step leaves out (an expert head, a dropped condition) are no error on many devices either.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(mixed_precision=settings.precision, kwargs_handlers=[unused])
    except ValueError as error:
        raise EnvironmentProblem(f"precision {settings.precision!r}: {' '.join(str(error).split())}") from error
    if settings.precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in float32
        raise EnvironmentProblem("precision 'fp16': needs a GPU, and none is found; set precision to no or bf16")
    return accelerator


def _fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state it would get with its first gradient, so that states are always complete."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
