"""A real `transformers.Trainer` over the batches of a run, stopped before its first step, and observed in each."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import methodcaller
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tpcheck.backends.interface import STEPS_TAKEN, StepObserver, TrainingOptions
from tpcheck.backends.optimizer import make_optimizer, named_optimizer, optimizer_class
from tpcheck.backends.trainer_loop.paused import PausedRun
from tpcheck.core.environment import WORLD_FOLDER_VARIABLE
from tpcheck.core.errors import UsageError

RESUMED = "Trainer, resume_from_checkpoint"
RESUMED_WITH_WEIGHTS = "Trainer, from_pretrained and resume_from_checkpoint"
"""The model that the Trainer is given has the saved weights already, and the Trainer loads the rest."""
_BACKWARD, _OPTIMIZING = methodcaller("backward"), methodcaller("optimizing")  # contexts of an observer
LOGGED = ("loss", "grad_norm", "learning_rate")
"""What the Trainer logs of a step."""


class Samples(Dataset[dict[str, torch.Tensor]]):
    """The samples of micro-batches, in the order in which accelerate deals batches out to the DP ranks.

    Raises:
        UsageError: A batch has an entry without one row for each sample, or another number of samples than the first.
    """

    def __init__(self, micro_batches: Sequence[Mapping[str, Any]], size: int) -> None:
        self._samples: list[dict[str, torch.Tensor]] = []
        for batch in micro_batches:
            for name, value in batch.items():
                if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != size:
                    accepted = (
                        f"a tensor with one row for each of {size} samples, as the Trainer's data loader has them"
                    )
                    raise UsageError(f"batch[{name!r}]", _shape(value), accepted)
            self._samples += [{name: value[row].cpu() for name, value in batch.items()} for row in range(size)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._samples[index]


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def training_arguments(options: TrainingOptions, folder: str, **more: Any) -> TrainingArguments:
    """Return the arguments by which the Trainer trains as `options` say; everything else is the Trainer's default."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        max_grad_norm=options.max_grad_norm,
        train_sampling_strategy="sequential",  # the batches of the run, in their order
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        **{**named_arguments(options), **more},
    )


def named_arguments(options: TrainingOptions) -> dict[str, Any]:
    """Return the rates of an optimizer that has a name, as arguments of the Trainer."""
    named = named_optimizer(options)
    if named is None:
        return {}
    params = named[1]
    arguments = {"learning_rate": params["lr"], "weight_decay": params.get("weight_decay", 0.0)}
    if "betas" in params:
        arguments |= {"adam_beta1": params["betas"][0], "adam_beta2": params["betas"][1]}
    return arguments | ({"adam_epsilon": params["eps"]} if "eps" in params else {})


class TrainerLoop:
    """A Trainer whose `train` has stopped where it begins: its model is sharded, and no step is taken.

    Args:
        model: What the Trainer is given.
        options: How to train, with the batches.
        more: Further arguments of `TrainingArguments`.
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, **more: Any) -> None:
        self._observer: StepObserver | None = None
        self.options = options
        folder = options.checkpoints
        if folder is None:
            within = os.environ.get(WORLD_FOLDER_VARIABLE)  # ranks end without finalizers
            folder = tempfile.mkdtemp(prefix="tpcheck-trainer-", dir=within)
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if options.loss == "mean":
            # By which a model asks for no count of labels. The Trainer counts them for any model that takes keywords.
            model.accepts_loss_kwargs = False  # type: ignore[assignment]
        self.trainer = _trainer(model, options, training_arguments(options, folder, **more), self)
        self._run = PausedRun(self._train)
        self._run.start()

    def end_with(self, owner: object) -> None:
        """End the training where it has stopped when `owner` is gone."""
        weakref.finalize(owner, self._run.cancel)

    def train(self, observer: StepObserver) -> None:
        """Take all steps, and evaluate."""
        self._observer = observer
        self._run.resume()

    def counters(self) -> Mapping[str, Any]:
        """Return what the Trainer counts; its steps choose the next batch."""
        schedule = self.trainer.lr_scheduler
        return {STEPS_TAKEN: self.trainer.state.global_step, "steps of the schedule": schedule.last_epoch}

    @property
    def observer(self) -> StepObserver:
        assert self._observer is not None
        return self._observer

    def pause(self) -> None:
        """Stop until `train` is called. Called by the Trainer."""
        self._run.pause()

    def observe_passes(self) -> None:
        """Tell of backward passes and optimizer steps; DeepSpeed's engine steps inside the Trainer's last pass."""
        accelerator, engine, optimizer = self.trainer.accelerator, self.trainer.deepspeed, self.trainer.optimizer
        if engine is None:
            accelerator.backward = self._observed(accelerator.backward, _BACKWARD)
            optimizer.step = self._observed(optimizer.step, _OPTIMIZING)
            return
        engine.backward = self._observed(engine.backward, _BACKWARD)
        step = self._observed(engine.step, _OPTIMIZING)

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.observer.gradients_are_ready()
            return step(*args, **kwargs)

        engine.step = stepping

    def _observed(self, function: Callable[..., Any], context: Callable[[StepObserver], Any]) -> Callable[..., Any]:
        def observed(*args: Any, **kwargs: Any) -> Any:
            with context(self.observer):
                return function(*args, **kwargs)

        return observed

    def _train(self) -> None:
        self.trainer.train(resume_from_checkpoint=bool(self.options.resume))  # True: the last one in its folder
        evaluated = self.trainer.evaluate()
        self.observer.logged({"eval_loss": evaluated["eval_loss"]})


def _optimizer_arguments(model: nn.Module, options: TrainingOptions) -> dict[str, Any]:
    """Return how the Trainer gets its optimizer: a class with options, or one that is made already.

    A class leaves to the Trainer which parameters decay, and which share a group.
    """
    named = named_optimizer(options)
    if named is None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return {"optimizers": (make_optimizer(options, parameters), None)}
    name, params = named
    return {"optimizer_cls_and_kwargs": (optimizer_class(name), params)}


def _trainer(model: nn.Module, options: TrainingOptions, arguments: TrainingArguments, loop: TrainerLoop) -> Trainer:
    def in_order(steps: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Batch number n goes to DP rank n modulo their number."""
        return [of_rank[number] for step in steps for number in range(options.accumulate) for of_rank in step]

    trainer = _ObservedTrainer(
        model,
        arguments,
        train_dataset=Samples(in_order(options.batches), options.batch_size),
        eval_dataset=Samples(in_order(options.batches[-1:]), options.batch_size),
        callbacks=[_Observer(loop)],
        **_optimizer_arguments(model, options),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.loop = loop
    return trainer


class _ObservedTrainer(Trainer):  # type: ignore[misc]
    """Tells of each forward and backward pass of a step; changes nothing."""

    loop: TrainerLoop
    _is_in_step = False

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._is_in_step = True
        try:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        finally:
            self._is_in_step = False
        self.loop.observer.add_loss(loss)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:  # whose engine has stepped by now
            self.loop.observer.gradients_are_ready()
        return loss

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.loop.options.resume != RESUMED_WITH_WEIGHTS:
            super()._load_from_checkpoint(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with self.loop.observer.forward(inputs) if self._is_in_step else nullcontext():
            return super().compute_loss(model, inputs, *args, **kwargs)


class _Observer(TrainerCallback):  # type: ignore[misc]
    """Stops the training where it begins, tells of what follows a step, and lets the Trainer save."""

    def __init__(self, loop: TrainerLoop) -> None:
        self._loop = loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loop.observe_passes()
        self._loop.pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loop.observer.stepped()
        if state.global_step == self._loop.options.save_after:
            # As by save_strategy="steps", which the Trainer refuses for models sharded at loading.
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        if "loss" in logs:  # of a step, not of the whole training or an evaluation
            self._loop.observer.logged({name: logs[name] for name in LOGGED if name in logs})
