"""`with_caft`: any `transformers.Trainer` class, plus auxiliary heads' loss (CAFT), masked training (MEAP) or both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from caft_plugin import checkpoint, resume
from caft_plugin.config import CAFTConfig, ConfigError, MEAPConfig, named, shown
from caft_plugin.heads import AttachedHeads, HiddenSubmodule, Reading, build_heads, find_trunk
from caft_plugin.loss import IGNORE, PLAN, count_targets, gamma, head_targets, head_weights
from caft_plugin.mask_token import FILE as MASK_TOKEN_FILE
from caft_plugin.mask_token import AddedMaskToken, choose_mask_token, placeholder_ids, row_norms, used_ids
from caft_plugin.meap import (
    EXAMPLE,
    MASKED,
    MAY_MASK,
    OVERLONG,
    Duplication,
    EpochOfMasks,
    MEAPCollator,
    nothing_to_mask,
    plain_labels,
)
from caft_plugin.precision import warn_of_slow_bf16

logger = logging.getLogger(__name__)

# Doors to frameworks whose trainers need more than this file, by the package that defines a trainer. `with_caft` asks
# the door what to put over such a class (`mixin_of`), and imports it then and not before.
DOORS = {"trl": "caft_plugin.trl"}

# What accelerate's ParallelismConfig can share out among processes besides rows and weights.
CUTTING = {"cp_size": "sequences", "sp_size": "sequences", "tp_size": "layers"}
# Keys that add parameters to the model, and which.
ADDS = {"caft": "the heads", "meap.mask_token": "the added vector"}


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a window. `targets` (num_heads, batch, length) are of its `labels`, None where it has none;
    `draws` says how often each head was drawn."""

    inputs: Any
    targets: Tensor | None
    draws: list[int]


class Sums:
    """What the losses of a window added up to, on this process, float64. Heads' losses are summed over their targets.

    The host may ask for a batch's loss more than once, or for that of its parts: `tokens` counts the next tokens of all
    that it asked for.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.next_token, self.aux, self.tokens = torch.zeros(3, dtype=torch.float64, device=device)
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)

    def add(self, next_token: Tensor, aux: Tensor, heads: Tensor, tokens: Tensor) -> None:
        self.next_token += next_token.detach().to(self.heads)
        self.aux += aux.detach().to(self.heads)
        self.heads += heads.to(self.heads)
        self.tokens += tokens.to(self.heads)


@dataclasses.dataclass
class Window:
    """One accumulation window, that is one optimisation step.

    Counts are over all processes, (num_heads,): `counts` of a head's targets, `drawn_counts` of those in micro-batches
    where the head was drawn; `next_tokens` counts the model's own targets, `own_tokens` those of this process.
    """

    gamma: float
    counts: Tensor
    next_tokens: Tensor
    own_tokens: Tensor
    drawn_counts: Tensor
    micro_batches: list[MicroBatch]
    sums: Sums
    steps_begun: int = 0

    @property
    def run(self) -> list[bool]:
        """The heads that run in some micro-batch."""
        draws = [micro_batch.draws for micro_batch in self.micro_batches]
        return [self.gamma != 0.0 and any(times) for times in zip(*draws, strict=True)]

    def begun(self, inputs: Any) -> tuple[Window, MicroBatch] | None:
        """What a `training_step` with `inputs` is about: the micro-batch that they are or whose labels they have; where
        the host has made other inputs of it, the next one; None where all had their turn."""
        self.steps_begun += 1
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        for micro_batch in self.micro_batches:
            theirs = micro_batch.inputs
            if theirs is inputs or (labels is not None and theirs.get("labels") is labels):
                return self, micro_batch
        in_turn = self.steps_begun - 1
        return (self, self.micro_batches[in_turn]) if in_turn < len(self.micro_batches) else None


class Tally:
    """What was summed since the last log, on this process. Heads' values are shares of the global means."""

    def __init__(self, num_heads: int, step: int, device: torch.device) -> None:
        self.since_step = step
        self.next_token = torch.zeros((), dtype=torch.float64, device=device)
        self.aux = torch.zeros_like(self.next_token)
        self.gamma = 0.0
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.steps_of_head = [0] * num_heads

    def add(self, window: Window) -> None:
        self.gamma += window.gamma
        for index, count in enumerate(window.drawn_counts.tolist()):
            self.steps_of_head[index] += window.gamma != 0.0 and count > 0
        # A batch that was asked for twice counts once.
        share = (window.own_tokens / window.sums.tokens.clamp(min=1)).clamp(max=1)
        share = torch.where(window.sums.tokens > 0, share, 1.0)
        self.next_token += window.sums.next_token * share
        self.aux += window.sums.aux * share
        self.heads += window.sums.heads * share / window.drawn_counts.clamp(min=1)


class MaskTally:
    """What was masked since the last log, on this process: tokens masked, tokens eligible, examples masked, examples
    too long."""

    BITS = (MASKED, MAY_MASK, EXAMPLE, OVERLONG)

    def __init__(self, step: int, device: torch.device) -> None:
        self.since_step = step
        self.counts = torch.zeros(len(self.BITS), dtype=torch.long, device=device)

    def add(self, plan: Tensor) -> None:
        self.counts += torch.stack([(plan & bit).bool().sum() for bit in self.BITS]).to(self.counts.device)


def with_caft(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` that adds the loss of auxiliary heads to the loss the class computes, masks its
    training examples, or both.

    It takes two arguments more than `trainer_class`: `caft`, a CAFTConfig, and `meap`, a MEAPConfig; each may be a dict
    of its keys, or None (the class then does what it did before). No training loop is touched: `compute_loss` calls the
    class's own and adds to it. Heads are saved beside the model, in `caft_heads/`; the model's own files stay as they
    were.

    Raises:
        ConfigError: on construction, when the settings or the model do not fit.
        TypeError: `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"with_caft takes a subclass of transformers.Trainer, got {trainer_class!r}")
    if issubclass(trainer_class, CAFTTrainerMixin):
        return trainer_class
    packages = [base.__module__.partition(".")[0] for base in trainer_class.__mro__]
    door = next((DOORS[package] for package in packages if package in DOORS), None)
    host: Any = trainer_class
    return _over(CAFTTrainerMixin if door is None else import_module(door).mixin_of(host), host)


@functools.cache
def _over(mixin: type, trainer_class: type) -> type[Trainer]:
    return type(f"CAFT{trainer_class.__name__}", (mixin, trainer_class), {"__doc__": trainer_class.__doc__})


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CAFTTrainerMixin(_Base):
    """The part of `with_caft` that is the same for every trainer class."""

    # Classes whose compute_loss takes of a model's output nothing but its loss, so that `fused_loss` may compute that.
    caft_reads_loss_alone: tuple[type, ...] = (Trainer,)

    def __init__(
        self, *args: Any, caft: CAFTConfig | dict | None = None, meap: MEAPConfig | dict | None = None, **kwargs: Any
    ) -> None:
        self.caft: AttachedHeads | None = None
        self.caft_config: CAFTConfig | None = None
        self._caft_window: Window | None = None
        self._caft_step: tuple[Window, MicroBatch] | None = None  # what training_step is about, while it runs
        self._caft_ran = False  # whether heads ran since training began
        self._caft_tally: Tally | None = None
        self._caft_fused = False
        self._caft_eval: Tensor | None = None  # sums, hits and counts of each head (3, num_heads)
        self.meap_config: MEAPConfig | None = None if meap is None else MEAPConfig.read(meap)
        self.mask_token: AddedMaskToken | None = None
        self._meap_collator: MEAPCollator | None = None
        self._meap_tally: MaskTally | None = None
        self._saving_checkpoint = False
        self._meap_data: Any = None  # the training set that masks are drawn in, in mode sft the doubled one
        self._meap_plain: Callable[[], Any] | None = None  # makes that set as it would have been without copies
        super().__init__(*args, **kwargs)
        if caft is not None:
            self.attach_caft(CAFTConfig.read(caft))
        if self.meap_config is not None:
            if self.meap_config.mode == "sft" and self._meap_data is None and self.train_dataset is not None:
                self._double()
            self.attach_meap(self.meap_config)

    def attach_caft(self, config: CAFTConfig) -> None:
        """Builds the heads, which will be on the model while it trains or is evaluated.

        At beta 0 no head is built: the run is the host's own.

        Raises:
            ConfigError: the model, the trainer's settings or the heads folder do not fit.
        """
        if config.beta == 0:
            self.caft_config = config
            logger.info("caft.beta is 0: no auxiliary heads are built, this is a plain run")
            return
        self._check_trainer()
        model: Any = self.model
        trunk = find_trunk(model)
        record = folder = None
        if config.heads is not None:
            folder = checkpoint.locate_heads(config.heads)
            record = checkpoint.read_record(folder)
            checkpoint.check_record(record, folder, config, trunk.model.config)
            warn_of_differences(config, record, trunk.model.config)
        config = checkpoint.resolve_wiring(config, record)
        self.caft_config = config
        heads = build_heads(model, trunk, config, seed=self.args.seed)
        if folder is not None:
            checkpoint.load_pretrained(folder, heads, trunk.layer_class)
        if self.optimizer is not None and any(p.requires_grad for p in heads.parameters()):
            raise ConfigError(
                "caft.train_heads: the trainer was given a finished optimizer (optimizers=...), which cannot hold "
                "the heads' parameters. Pass optimizer_cls_and_kwargs instead, or set train_heads: frozen."
            )
        self._caft_fused = config.fused_loss != "off" and self._may_fuse(config, trunk.model)
        self.caft = AttachedHeads(model, heads, trunk, config)
        self._start_afresh_with_each_loop()

    def _may_fuse(self, config: CAFTConfig, base: Any) -> bool:
        """Whether `fused_loss` can compute the next-token loss; where it cannot, `on` raises ConfigError."""
        why = self.why_not_fused(base, self.label_smoother is not None or self.compute_loss_func is not None)
        if why is None:
            return True
        if config.fused_loss == "on":
            raise ConfigError(not_fused(why))
        logger.warning("caft.fused_loss: auto leaves the next-token loss to the framework: %s", why)
        return False

    @classmethod
    def why_not_fused(cls, base: Any, takes_logits: bool) -> str | None:
        """Why `fused_loss` cannot compute the next-token loss of a model in this class, None where it can."""
        mro = cls.__mro__
        host = next(c for c in mro[mro.index(CAFTTrainerMixin) + 1 :] if "compute_loss" in vars(c))
        model, text_config = type(base).__name__, base.config.get_text_config()
        if host not in cls.caft_reads_loss_alone:
            return f"{host.__name__} computes its loss in a way of its own (TRL's does without logits by itself)"
        if takes_logits:
            return "label smoothing and compute_loss_func take all logits"
        if "logits_to_keep" not in inspect.signature(base.forward).parameters:
            return f"{model} cannot be asked for less than all logits (its forward has no logits_to_keep)"
        if base.loss_type not in (None, "ForCausalLM") or getattr(text_config, "output_router_logits", False):
            return f"{model} computes more than the next-token loss"
        return None

    @contextlib.contextmanager
    def _ours_on_model(self) -> Iterator[None]:
        """While this is open, heads and an added mask token are on the model. Those that are on it already stay."""
        parts = [part for part in (self.caft, self.mask_token) if part is not None and not part.attached]
        if not parts:
            yield
            return
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part)
            stack.enter_context(self._shown_to_accelerate([part.hidden for part in parts]))
            yield

    @contextlib.contextmanager
    def _shown_to_accelerate(self, parts: list[HiddenSubmodule]) -> Iterator[None]:
        """Where one process alone has read the weights, accelerate gives the others what the state dict holds while it
        prepares the model."""
        accelerator = self.accelerator
        prepare, own = accelerator.prepare, "prepare" in vars(accelerator)

        def prepare_with_ours(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for part in parts:
                    stack.enter_context(part.in_state_dict())
                return prepare(*args, **kwargs)

        accelerator.prepare = prepare_with_ours
        try:
            yield
        finally:
            if own:
                accelerator.prepare = prepare
            else:
                del accelerator.prepare

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        with self._ours_on_model():
            optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled:  # DeepSpeed's optimizers hold tensors of their own
            self._check_optimizer(optimizer)
        return optimizer

    def _check_optimizer(self, optimizer: Any) -> None:
        """Heads and an added vector that are to train must be among what the optimizer trains."""
        if isinstance(optimizer, LayerWiseDummyOptimizer):  # each parameter has an optimizer of its own
            return
        held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
        for block, part in (("caft", self.caft), ("meap", self.mask_token)):
            trained = [] if part is None else [p for p in part.hidden.module.parameters() if p.requires_grad]
            lacking = sum(id(parameter) not in held for parameter in trained)
            if lacking:
                raise ConfigError(
                    f"{block}: the optimizer {type(optimizer).__name__} of {self._host_name()} lacks {lacking} of the "
                    f"{len(trained)} tensors that {block} is to train. Let the trainer make its optimizer from all "
                    "parameters of the model that require gradients (optimizer_cls_and_kwargs takes a class and its "
                    "settings), or set caft.train_heads: frozen."
                )

    def _host_name(self) -> str:
        return type(self).__name__.removeprefix("CAFT")

    def _check_trainer(self, asks: str = "caft") -> None:
        """Raises ConfigError where the trainer's settings do not go with what `asks`, a key of ours, adds to the
        model."""
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"{asks}: one process drives {self.args.n_gpu} GPUs (nn.DataParallel), which is not supported. "
                "Start one process a GPU with `accelerate launch` or `torchrun`, or show it one GPU with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.model_init is not None:
            raise ConfigError(
                f"{asks}: model_init makes a new model at every train(), which would lose {ADDS[asks]}. Pass model=..."
            )
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None and deepspeed.zero_stage == 3:
            raise ConfigError(zero3("DeepSpeed's zero_optimization.stage: 3", asks))
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and fsdp.fsdp_version != 2:
            raise ConfigError(fsdp1(f"fsdp_config.version: {fsdp.fsdp_version}", asks))
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        sizes = {key: getattr(parallelism, key, None) or 1 for key in CUTTING}
        sizes["tp_size"] = max(sizes["tp_size"], self.get_tp_size())
        for key, size in sizes.items():
            if size > 1:
                raise ConfigError(cut_up(f"parallelism_config.{key}: {size}", CUTTING[key], asks))

    # -- masked training ---------------------------------------------------------------------------

    def attach_meap(self, config: MEAPConfig) -> None:
        """Chooses the mask token; from now on training batches are masked. In mode `sft` the training set has to be
        duplicated already.

        Raises:
            ConfigError: there is no tokenizer, or no mask token to be had, or masks are drawn already.
        """
        if self._meap_collator is not None:
            raise ConfigError("meap: this trainer draws masks already. Give `meap` once, to a trainer of its own.")
        self.meap_config = config
        model: Any = self.model
        embedding = model.get_input_embeddings()
        rows = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
        tokenizer = tokenizer_of(self.processing_class)
        used: frozenset[int] | None = frozenset()
        if self.train_dataset is not None and config.mask_token != "add":
            used = used_ids(self.train_dataset)
        placeholders = placeholder_ids(model.config)
        token = choose_mask_token(config.mask_token, tokenizer, rows, used, row_norms(embedding), placeholders)
        if self.args.process_index == 0:
            logger.warning("meap.mask_token: %s", token.words)  # a warning, because nothing less is shown by default
        if token.added:
            self._check_trainer("meap.mask_token")
            self.mask_token = AddedMaskToken(model, token)
            if self.optimizer is not None and self.mask_token.vector.requires_grad:
                self.detach_ours()
                raise ConfigError(
                    "meap.mask_token: got add, but the trainer was given a finished optimizer (optimizers=...), which "
                    "cannot hold the new vector. Pass optimizer_cls_and_kwargs instead, or name a token."
                )
        self._meap_collator = MEAPCollator(self.data_collator, config, token.id, self.args.seed, placeholders)
        self.add_callback(EpochOfMasks(self._meap_collator))
        self._start_afresh_with_each_loop()
        self._masked_from_now_on(self.train_dataset)

    def _double(self) -> None:
        """Puts the doubled training set in the place of the one that the class was given."""
        model: Any = self.model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        plain = self.train_dataset
        placeholders = placeholder_ids(model.config)
        self.train_dataset = self._duplicated(plain, self.processing_class, self.args, limit, placeholders)
        self._meap_plain = lambda: plain

    def _duplicated(
        self, dataset: Any, processing_class: Any, args: Any, max_length: int | None, placeholders: Iterable[int] = ()
    ) -> Any:
        assert self.meap_config is not None
        duplication = Duplication.of(self.meap_config, tokenizer_of(processing_class), max_length, placeholders)
        with args.main_process_first():
            return duplication.of_dataset(dataset)

    def _masked_from_now_on(self, dataset: Any) -> None:
        assert self.meap_config is not None and self._meap_collator is not None
        self._meap_data = dataset
        nothing = nothing_to_mask(dataset) if self.meap_config.mode == "sft" and dataset is not None else None
        if nothing is not None:
            self._meap_collator.masked = True  # so that it is said once
            if self.args.process_index == 0:
                logger.warning("meap: %s", nothing)

    def _take_other_data(self) -> None:
        """Takes a training set that was set after the trainer was made.

        Raises:
            ConfigError: it contains the mask token.
        """
        assert self.meap_config is not None and self._meap_collator is not None
        mask_id = self._meap_collator.mask_id
        if mask_id in (used_ids(self.train_dataset) or ()):
            raise ConfigError(
                f"meap.mask_token: got {self.meap_config.mask_token!r}, which chose id {mask_id} before there was this "
                "training set, which contains it. Give the set to the trainer when it is made, or name another token."
            )
        if self.meap_config.mode == "sft":
            self._double()
        self._masked_from_now_on(self.train_dataset)

    def _as_evaluated(self, dataset: Any) -> Any:
        """What stands for a data set in evaluation: for the doubled training set, that set without copies."""
        return dataset if self._meap_plain is None or dataset is not self._meap_data else self._meap_plain()

    def get_train_dataloader(self) -> Any:
        """The class's own, its collator wrapped; every other data loader keeps the collator that it has."""
        ours = self._meap_collator
        if ours is None or self.data_collator is ours:  # a class may ask for its data loader while it makes it
            return super().get_train_dataloader()
        if self.train_dataset is not None and self.train_dataset is not self._meap_data:
            self._take_other_data()
        ours.host = self.data_collator
        self.data_collator = ours
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = ours.host

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {key: self._as_evaluated(value) for key, value in kwargs.items()}
        return super().get_eval_dataloader(*map(self._as_evaluated, args), **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {key: self._as_evaluated(value) for key, value in kwargs.items()}
        return super().get_test_dataloader(*map(self._as_evaluated, args), **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Of rows out of the doubled training set, say a part of it, the labels as they were before."""
        if self.meap_config is not None and self.meap_config.mode == "sft":
            ids, labels = inputs.get("input_ids"), inputs.get("labels")
            if ids is not None and labels is not None and ids.shape == labels.shape:
                inputs["labels"] = plain_labels(ids, labels, self.meap_config.layout)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _check_masked(self, batches: list[Any]) -> None:
        """Stops a run whose data loader leaves the collator of masks out.

        Raises:
            ConfigError: a batch did not come from it.
        """
        if self._meap_collator is None:
            return
        for batch in batches:
            if PLAN not in batch:
                raise ConfigError(
                    f"meap: a training batch of {type(self).__name__} was not masked (it holds {shown(list(batch))}; a "
                    f"masked one holds {PLAN!r} too): its data loader collates rows with something else than the "
                    "trainer's data_collator, or drops keys. Let get_train_dataloader use self.data_collator as "
                    "collate_fn and keep every key, or take `meap` out."
                )
            if not self._meap_collator.masked:
                self._meap_collator.masked = bool((batch[PLAN] & MASKED).any())

    # -- the loss ----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._check_masked(samples)
        if self.caft is not None and samples:
            self._close_window()
            self._tally()  # which notes the step that it begins with
            self._caft_window = self._open_window(samples)
        return samples, num_items

    def _open_window(self, batches: list[dict[str, Any]]) -> Window:
        assert self.caft is not None and self.caft_config is not None
        num_heads, device = len(self.caft.heads), self.args.device
        found = torch.zeros(len(batches), num_heads + 1, dtype=torch.long, device=device)
        all_targets: list[Tensor | None] = []
        for of_batch, batch in zip(found, batches, strict=True):
            all_targets.append(head_targets(batch, num_heads) if self._has_targets(batch) else None)
            if all_targets[-1] is not None:
                of_batch[:-1] = count_targets(all_targets[-1])
                of_batch[-1] = next_tokens_in(batch)
        own_tokens = found[:, -1].sum()
        found = self._over_processes(found)
        counts = found[:, :-1]
        draws = self._draws(len(batches))
        drawn = counts * torch.tensor(draws, device=device).clamp(max=1)
        return Window(
            gamma(self.caft_config.schedule, self.state.global_step, self.state.max_steps),
            counts=counts.sum(0),
            next_tokens=found[:, -1].sum(),
            own_tokens=own_tokens,
            drawn_counts=drawn.sum(0),
            micro_batches=[MicroBatch(*of_batch) for of_batch in zip(batches, all_targets, draws, strict=True)],
            sums=Sums(num_heads, device),
        )

    def _window_of_its_own(self, inputs: dict[str, Any]) -> tuple[Window, MicroBatch]:
        """What a loss that is asked for by hand is about."""
        window = self._open_window([inputs])
        return window, window.micro_batches[0]

    def _close_window(self) -> None:
        if self._caft_window is not None:
            self._tally().add(self._caft_window)
            self._caft_window = None

    @staticmethod
    def _has_targets(batch: Any) -> bool:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        return isinstance(labels, Tensor) and labels.dim() == 2

    def _over_processes(self, tensor: Tensor) -> Tensor:
        """The sum of what all processes hold."""
        return self.accelerator.reduce(tensor, reduction="sum") if self.accelerator.num_processes > 1 else tensor

    def _draws(self, micro_batches: int) -> list[list[int]]:
        """How often each head is drawn for each micro-batch; the same on all processes and after a restart."""
        assert self.caft_config is not None
        config = self.caft_config
        if config.heads_per_step is None:
            return [[1] * config.num_heads] * micro_batches
        heads = range(config.num_heads)
        weights = [config.alpha**k for k in heads]
        draws = []
        for index in range(micro_batches):
            generator = random.Random(f"{self.args.seed} {self.state.global_step} {index}")
            drawn = generator.choices(heads, weights, k=config.heads_per_step)
            draws.append([drawn.count(head) for head in heads])
        return draws

    def _tally(self) -> Tally:
        assert self.caft is not None
        if self._caft_tally is None:
            self._caft_tally = Tally(len(self.caft.heads), self.state.global_step, self.args.device)
        return self._caft_tally

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        def host_loss() -> Any:
            return super(CAFTTrainerMixin, self).compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

        if self.caft is None or not (torch.is_grad_enabled() or self._has_targets(inputs)):
            self._take_plan(inputs)
            return host_loss()
        if not self._has_targets(inputs):
            raise ConfigError(
                f"caft: the batches of {self._host_name()} have no `labels` (batch, length), in which heads would find "
                f"the tokens ahead; they have {', '.join(map(str, inputs))}. Use a trainer of supervised fine-tuning "
                "or pretraining, such as Trainer or SFTTrainer, or take the `caft:` block out."
            )
        if not torch.is_grad_enabled():
            return self._evaluated(inputs, host_loss)

        window, micro_batch = self._caft_step or self._window_of_its_own(inputs)
        targets = micro_batch.targets
        if targets is None or micro_batch.inputs["labels"] is not inputs["labels"]:
            targets = head_targets(inputs, len(self.caft.heads))
        tokens = next_tokens_in(inputs)
        self._take_plan(inputs)
        reading = self._reading(targets, window, micro_batch)
        if self._caft_fused:
            reading.next_tokens = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
            reading.next_token_weight = self._next_token_weight(window, num_items_in_batch)
        with self._ours_on_model(), self.caft.reading(reading):
            result = host_loss()
        if reading.loss is None:
            raise RuntimeError(
                "caft: the trainer computed its loss without calling the model with gradients, so the auxiliary "
                "heads did not run. CAFT works with trainers whose compute_loss calls the model."
            )
        assert reading.sums is not None
        self._caft_ran = True
        loss = result[0] if return_outputs else result
        scale = self._scale(num_items_in_batch)
        aux = reading.loss.to(loss.device) * scale
        total = loss + aux

        steps = self._accumulation_divisor(num_items_in_batch)
        window.sums.add(loss.double() / steps, aux.double() / steps, reading.sums, tokens)
        return (total, *result[1:]) if return_outputs else total

    def _take_plan(self, inputs: dict[str, Any]) -> None:
        """Takes out of a batch what only MEAP's collator and this class know, and counts it."""
        plan = inputs.pop(PLAN, None)
        if plan is not None:
            if self._meap_tally is None:
                self._meap_tally = MaskTally(self.state.global_step, self.args.device)
            self._meap_tally.add(plan)

    def _reading(self, targets: Tensor, window: Window, micro_batch: MicroBatch) -> Reading:
        run = [window.gamma != 0.0 and count > 0 for count in micro_batch.draws]
        return Reading(targets, self._weights(window, micro_batch.draws), run, training=True)

    def _weights(self, window: Window, times: list[int]) -> Tensor:
        """The weight of each head's summed loss in the window's mean: beta gamma alpha^k / its targets. Of drawn heads
        beta gamma sum(alpha^j) / draws / its targets for each time, which is the same on average."""
        assert self.caft_config is not None
        config = self.caft_config
        weights = head_weights(config.beta, config.alpha, window.gamma, config.num_heads)
        if config.heads_per_step is not None:
            weights = [count * sum(weights) / config.heads_per_step for count in times]
        return torch.tensor(weights, device=window.counts.device) / window.counts.clamp(min=1)

    def _next_token_weight(self, window: Window, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Of a token in the loss that the model hands to the class: as the class would have it where it counts the
        window's tokens, else the share of the window's mean."""
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            return 1.0 / num_items_in_batch
        return self._scale(num_items_in_batch) / window.next_tokens.clamp(min=1)

    def _accumulation_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What `Trainer.training_step` will divide the loss by: the accumulation steps, or 1 where the host's
        loss is already a share of the whole window, or where the loss was asked for by hand."""
        if self._caft_step is None:
            return 1
        if (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None:
            return getattr(self, "current_gradient_accumulation_steps", 1)
        return 1

    def _scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """Undoes what happens to the loss later: the division by accumulation steps, and the mean of gradients
        over processes. A share of the window's global mean times this comes out as that mean."""
        return self._accumulation_divisor(num_items_in_batch) * self.accelerator.num_processes

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.caft is None:
            return super().training_step(model, inputs, *args, **kwargs)
        begun = None if self._caft_window is None else self._caft_window.begun(inputs)
        self._caft_step = begun or self._window_of_its_own(inputs)
        window, _ = self._caft_step
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self._caft_step = None
        if not self._caft_ran and self.accelerator.sync_gradients:
            raise ConfigError(
                f"caft: {self._host_name()} made its first step without computing its loss through compute_loss with "
                "gradients, so the heads did not run. Use a trainer whose training_step calls compute_loss, or "
                "take the `caft:` block out."
            )
        if self.accelerator.sync_gradients:
            # Joined to the graph for DDP's sake only: no gradient, not one of zeros, so that neither the
            # gradient norm nor the optimizer sees these heads.
            for layer, ran in zip(self.caft.heads.layers, window.run, strict=True):
                if not ran:
                    layer.zero_grad(set_to_none=True)
        return loss

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluated(self, inputs: Mapping[str, Any], host_loss: Any) -> Any:
        """The host's loss alone; the heads' own losses are summed beside it."""
        assert self.caft is not None
        if self._caft_eval is None:
            return host_loss()
        num_heads = len(self.caft.heads)
        targets = head_targets(inputs, num_heads)
        reading = Reading(targets, torch.zeros(num_heads), [True] * num_heads, training=False)
        with self.caft.reading(reading):
            result = host_loss()
        if reading.sums is not None and reading.hits is not None:
            figures = torch.stack([reading.sums, reading.hits, count_targets(targets).to(reading.sums)])
            self._caft_eval += figures.to(self._caft_eval)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.caft is None:
            return super().evaluation_loop(*args, **kwargs)
        shape = (3, len(self.caft.heads))
        self._caft_eval = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        try:
            with self._ours_on_model():
                output: Any = super().evaluation_loop(*args, **kwargs)
        finally:
            figures, self._caft_eval = self._caft_eval, None
        figures = self._over_processes(figures)
        output.metrics.update(self._evaluation_metrics(figures, kwargs.get("metric_key_prefix", "eval")))
        return output

    def _evaluation_metrics(self, figures: Tensor, prefix: str) -> dict[str, float]:
        """`figures`: summed loss, hits and targets of each head over the evaluation set (3, num_heads)."""
        return {
            f"{prefix}_caft/loss_head_{k}": total / count
            for k, (total, _, count) in enumerate(figures.T.tolist(), 1)
            if count
        }

    # -- logs --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._close_window()
            if self._caft_tally is not None:
                logs.update(self._caft_logs(self._caft_tally))
            if self._meap_tally is not None:
                logs.update(self._meap_logs(self._meap_tally))
            self._caft_tally = self._meap_tally = None
        super().log(logs, *args, **kwargs)

    def _caft_logs(self, tally: Tally) -> dict[str, float]:
        """Means over the steps since the last log and over all processes."""
        steps = max(self.state.global_step - tally.since_step, 1)
        processes = self.accelerator.num_processes
        shares = self._over_processes(torch.cat([tally.next_token[None], tally.aux[None], tally.heads]))
        next_token, aux, *heads = shares.tolist()
        logs = {"caft/next_token_loss": next_token / processes / steps}
        for index, (share, of_head) in enumerate(zip(heads, tally.steps_of_head, strict=True)):
            if of_head:
                logs[f"caft/loss_head_{index + 1}"] = share / of_head
        logs["caft/gamma"] = tally.gamma / steps
        logs["caft/aux_loss"] = aux / processes / steps
        return logs

    def _meap_logs(self, tally: MaskTally) -> dict[str, float]:
        """Over the steps since the last log and all processes: masked over eligible tokens, and examples a step."""
        steps = max(self.state.global_step - tally.since_step, 1)
        masked, eligible, examples, too_long = self._over_processes(tally.counts).tolist()
        logs = {"meap/masked_fraction": masked / eligible} if eligible else {}
        return {**logs, "meap/examples_masked": examples / steps, "meap/examples_too_long": too_long / steps}

    # -- saving and resuming -----------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.caft_config or self.meap_config:
            warn_of_slow_bf16(self.args, self.model)
            if resume_from_checkpoint:
                resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        try:
            with self._ours_on_model():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._caft_window = None

    def _start_afresh_with_each_loop(self) -> None:
        if not any(isinstance(callback, FreshSums) for callback in self.callback_handler.callbacks):
            self.add_callback(FreshSums(self))

    def start_afresh(self) -> None:
        """Forgets what was summed: a loop begins, be it the first, one after an interrupt, or one with smaller batches
        (auto_find_batch_size)."""
        self._caft_window = self._caft_tally = self._meap_tally = None
        self._caft_ran = False

    def newest_whole_checkpoint(self) -> str | None:
        """The newest checkpoint of the output folder that this run can resume from, None where there is none.
        Newer ones that are not whole, because the run was killed while it wrote them, are warned of."""
        newest, passed_over = resume.newest_whole(str(self.args.output_dir), self._checkpoint_parts())
        if self.is_world_process_zero():
            for problem in passed_over:
                logger.warning(
                    "resume_from_checkpoint: %s; it is passed over, and overwritten when training comes to that step",
                    problem,
                )
        return None if newest is None else str(newest)

    def _checkpoint_parts(self) -> resume.Parts:
        plain = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # these have files of their own
        return resume.Parts(weights=plain, optimizer=plain and not self.args.save_only_model)

    def _whole_checkpoint(self, asked: str | Literal[True]) -> str:
        """What to resume from, given what `train` was asked to.

        Raises:
            ConfigError: the checkpoint asked for is not whole, or none is.
        """
        if asked is True:
            whole = self.newest_whole_checkpoint()
            if whole is None:
                raise ConfigError(
                    f"resume_from_checkpoint: got True, but {self.args.output_dir} holds no whole checkpoint. Start "
                    "anew without it, or give the path of a checkpoint elsewhere."
                )
            return whole
        problem = resume.problem_of(Path(asked), self._checkpoint_parts())
        if problem is not None:
            newest, _ = resume.newest_whole(Path(asked).parent, self._checkpoint_parts())
            remedy = (
                f"give {newest}, the newest whole one there"
                if newest
                else "there is no whole one beside it: start anew"
            )
            raise ConfigError(
                f"resume_from_checkpoint: got {asked}, which {problem}. It takes a whole checkpoint: {remedy}."
            )
        return str(asked)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if (self.caft_config or self.meap_config) and self.args.should_save:
            # One that stands there already is overwritten file by file: until that is done it is not whole.
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (Path(self._get_output_dir(trial=trial)) / name / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self._saving_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_checkpoint = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.save_ours(output_dir or self.args.output_dir)

    def save_ours(self, output_dir: str | None) -> None:
        """Writes the heads, in `caft_heads/`, and an added mask token, in `caft_meap/`, into `output_dir`; a
        checkpoint's heads keep what exact resuming needs."""
        if output_dir is None:
            return
        if self.mask_token is not None:
            self.mask_token.save(Path(output_dir), write=self.args.should_save)
        if self.caft is None or self.caft_config is None:
            return
        checkpoint.save_heads(
            output_dir,
            self.caft.heads,
            self.caft.trunk,
            self.caft_config,
            resumable=self._saving_checkpoint,
            write=self.args.should_save,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 this saves the adapter once more: newer accelerate takes every frozen parameter out of the state
        dict, and so has to find the heads' there."""
        adapter_alone = self.is_fsdp_enabled and isinstance(self.model, PeftModel)
        with contextlib.ExitStack() as stack:
            for ours in (self.caft, self.mask_token):
                if ours is not None and adapter_alone:
                    stack.enter_context(ours.hidden.in_state_dict("frozen"))
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_ours(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_ours(self.state.best_model_checkpoint)

    def _load_ours(self, folder: str) -> None:
        if self.mask_token is not None:
            self.mask_token.load(Path(folder))
        elif self.meap_config is not None and (Path(folder) / MASK_TOKEN_FILE).exists():
            raise ConfigError(
                f"meap.mask_token: this run has {self.meap_config.mask_token}, but the checkpoint {folder} was made "
                "with add: its optimizer trains one vector more. Resume with mask_token: add, or start anew."
            )
        if self.caft is not None:
            assert self.caft_config is not None
            checkpoint.load_checkpoint(folder, self.caft.heads, self.caft_config)
        elif self.caft_config is not None and (Path(folder) / checkpoint.FOLDER).exists():
            raise ConfigError(
                f"caft.beta: this run has 0 and so no heads, but the checkpoint {folder} was made with heads. Resume "
                "with the beta it was made with, or start anew."
            )

    def detach_ours(self) -> None:
        """Takes heads and an added mask token off the model, for good."""
        for part in (self.caft, self.mask_token):
            if part is not None:
                part.detach()
        self.caft = self.mask_token = None


class FreshSums(TrainerCallback):
    """Whatever starts a training loop starts with empty sums."""

    def __init__(self, trainer: CAFTTrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.start_afresh()


def next_tokens_in(batch: Mapping[str, Any]) -> Tensor:
    """How many targets the model itself has in a batch with `labels` (batch, length)."""
    return (batch["labels"][:, 1:] != IGNORE).sum()


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer that a trainer was given, alone or inside of a processor.

    Raises:
        ConfigError: the trainer has none.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        raise ConfigError(
            "meap: the trainer has no tokenizer, which says what tokens are special. Pass processing_class=tokenizer."
        )
    return tokenizer


def not_fused(why: str) -> str:
    return f"caft.fused_loss: got on, but {why}. Use off, or auto for where it can."


def cut_up(got: str, what: str, asks: str = "caft") -> str:
    """Why processes may not share one model's sequences, layers or experts, as the setting `got` has it."""
    why = "targets k ahead would lie on another one" if what == "sequences" else "heads are whole layers"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tried there"
    return (
        f"{asks}: got {got}, but it takes 1: it does not work where processes share the {what} of one model "
        f"({why}). Leave the key out and share rows and weights among the processes, with DDP or FSDP2."
    )


def zero3(got: str, asks: str = "caft") -> str:
    """Why ZeRO-3, which the setting `got` asks for, cannot be used."""
    why = "heads are copies of a layer and use the unembedding, which ZeRO-3 has cut up"
    if asks != "caft":
        why = f"{ADDS[asks]} was never tried with ZeRO-3"
    return f"{asks}: got {got}, but it takes 0, 1 or 2: {why}. Use stage 2, or FSDP2, which works."


def fsdp1(got: str, asks: str = "caft") -> str:
    """Why FSDP1, which the setting `got` asks for, cannot be used."""
    return (
        f"{asks}: got {got}, which is FSDP1, but it takes FSDP2: FSDP1 hides {ADDS[asks]} in modules of its own. Set "
        'fsdp_version: 2 (Axolotl) or fsdp_config={"version": 2} (TrainingArguments), and the other keys of '
        "fsdp_config as FSDP2 has them."
    )


def warn_of_differences(config: CAFTConfig, record: checkpoint.HeadsRecord, model_config: Any) -> None:
    """Warns where pretrained heads meet another base model or wiring than they were made with."""
    base = model_config.name_or_path
    if base and record.base_model != base:
        logger.warning(
            "caft.heads: these heads were made with base model %s, this run uses %s", named(record.base_model), base
        )
    for key in ("head_input", "head_norm"):
        written, recorded = getattr(config, key), getattr(record, key)
        if written is not None and written != recorded:
            logger.warning(
                "caft.%s: got %s, but these heads were made with %s; leave the key out to follow the folder",
                key,
                written,
                recorded,
            )
