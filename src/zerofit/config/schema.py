"""The whole configuration of a run: wishes, frozen. What becomes of them stands in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from .durations import parse_duration
from .images import ImageDataConfig
from .models import ModelConfig, Section
from .optimizers import OptimizerConfig, why_not
from .stages import check_stages, schedules_to_the_end

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "cpu", "nvme"]
Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(ge=1)]
Interval = Positive | Literal["never"]
Goal = Literal["speed", "memory", "balanced", "largest-batch"]


class SourceConfig(Section):
    """One source of a mixture."""

    weight: Annotated[float, Field(ge=0)]
    """Its share of the samples, relative to the other sources' weights; 0 evaluates it only."""
    path: Path | None = None
    """Folder of its tokens; unset means the folder of its name below ``data.path``."""
    prepare: tuple[str, ...] = ()
    """What to prepare when it holds no tokens."""


class DataConfig(Section):
    """Tokens on disk, and how to make them when they are not there."""

    kind: Literal["tokens"] = "tokens"
    path: Path
    """Folder with ``train.bin``, ``val.bin`` and ``meta.json`` (or nanoGPT's files); of ``sources``, the folder that
    they lie in (``data`` when unset)."""
    sources: dict[str, SourceConfig] = Field(default={})
    """A mixture: name -> weight, or name -> ``{weight, path, prepare}``, as ``{shakespeare: 0.3, openwebtext: 0.7}``.
    Sample k of the run comes from the same source and place for every number of ranks."""
    prepare: tuple[str, ...] = ()
    """What to prepare when ``path`` holds no tokens: ``shakespeare``, ``openwebtext``, or text files, folders and
    patterns (.txt, .jsonl, .parquet, compressed or not)."""
    tokenizer: str = "char"
    """For ``prepare``: ``char`` (characters of the text), ``bytes``, ``gpt2`` (its byte-pair encoding), or a Hugging
    Face tokenizer: a name on the hub, a folder, or a ``tokenizer.json``."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """For ``prepare``: share of the text kept for validation."""
    split: Literal["tail", "documents"] = "tail"
    """For ``prepare``: the last tokens validate, or documents drawn from all of the text."""
    text_key: str = "text"
    """For ``prepare``: member of JSON lines, and column of Parquet files, that holds the text."""
    subset: str | None = None
    """For ``prepare``: part of the documents, as ``1%`` or ``20000``."""
    errors: Literal["strict", "replace"] = "strict"
    """For ``prepare``: refuse text that is not valid UTF-8, or replace what is not."""

    @model_validator(mode="before")
    @classmethod
    def _path_of_sources(cls, given: Any) -> Any:
        """Sources lie below ``data`` unless told otherwise."""
        return {"path": "data", **given} if isinstance(given, dict) and given.get("sources") else given

    @field_validator("sources", mode="before")
    @classmethod
    def _bare_weights(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        bare = {name for name, value in given.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        return {name: {"weight": value} if name in bare else value for name, value in given.items()}

    @field_validator("sources")
    @classmethod
    def _weights_add_up(cls, given: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        if given and not sum(source.weight for source in given.values()):
            raise ValueError(
                f"the weights of {', '.join(given)} add up to 0, so that no sample could be drawn; give at least one "
                f"of them a weight above 0"
            )
        return given

    def folders(self) -> dict[str, Path]:
        """Name of a source -> its folder; a single folder without sources has the empty name."""
        if not self.sources:
            return {"": self.path}
        return {name: source.path or self.path / name for name, source in self.sources.items()}


def _data_kind(data: Any) -> str:
    """Files from before there were pictures name no kind: they mean tokens."""
    return str(data.get("kind", "tokens") if isinstance(data, dict) else data.kind)


#: What a run reads, told apart by ``kind``.
AnyDataConfig = Annotated[
    Annotated[DataConfig, Tag("tokens")] | Annotated[ImageDataConfig, Tag("images")], Discriminator(_data_kind)
]
#: The kind of data that each task reads.
DATA_OF_TASK = {"language_modeling": "tokens", "image_classification": "images"}


class ScheduleConfig(Section):
    """The learning rate as a pure function of the step."""

    kind: Literal["cosine", "linear", "polynomial", "constant", "wsd", "one_cycle"] = "cosine"
    """After the warm-up: half a cosine, a line or a power down to the minimum; constant; ``wsd``: constant, then a
    cooldown (warmup-stable-decay); ``one_cycle``: up and down by half cosines."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0 (``one_cycle``: by half a cosine from a 25th of the peak)."""
    warmup_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The warm-up as a share of all steps up to ``decay_steps``, in place of ``warmup_steps``. ``one_cycle`` takes 0.3
    when neither is set."""
    decay_steps: Positive | None = None
    """Step at which the minimum is reached; unset means ``max_steps``. Constant from there on."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate after the decay."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a share of the peak (0.1: a tenth), in place of ``min_learning_rate``."""
    cooldown_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """wsd: share of all steps up to ``decay_steps`` that the cooldown takes, at their end; 0.2 when unset."""
    power: Annotated[float, Field(gt=0)] | None = None
    """polynomial: of the falling part, 2 when unset."""

    @model_validator(mode="after")
    def _one_meaning(self) -> ScheduleConfig:
        for name, value, kind in (
            ("cooldown_fraction", self.cooldown_fraction, "wsd"),
            ("power", self.power, "polynomial"),
        ):
            if value is not None and self.kind != kind:
                raise ValueError(
                    f"schedule.{name} {value} with schedule.kind {self.kind}: only {kind} has it. Leave it out, or use "
                    f"schedule.kind {kind}"
                )
        for fraction, other in (("warmup_fraction", "warmup_steps"), ("min_ratio", "min_learning_rate")):
            if getattr(self, fraction) is not None and getattr(self, other):
                raise ValueError(
                    f"schedule.{fraction} {getattr(self, fraction)} and schedule.{other} {getattr(self, other)}: both "
                    f"say the same thing. Keep one of them"
                )
        return self

    @property
    def needs_end(self) -> bool:
        """Whether the learning rate of a step depends on where the run ends."""
        falls = self.kind in ("cosine", "linear", "polynomial", "one_cycle")
        return self.decay_steps is None and (falls or self.warmup_fraction is not None)


class EarlyStoppingConfig(Section):
    """Stop when an evaluated metric has not improved for a while; the last checkpoint is ``final`` then."""

    patience: Positive | None = None
    """Evaluations without improvement before the run ends; unset: never."""
    metric: str = "val_loss"
    """What is watched: a name in the evaluation's line, ``val_loss`` or ``val_perplexity`` for text."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement."""
    mode: Literal["min", "max"] | None = None
    """Whether smaller or larger values are better; unset: larger for an accuracy, smaller for anything else."""

    @property
    def better(self) -> Literal["min", "max"]:
        """`mode`, where it is unset by the metric's name."""
        return self.mode or ("max" if "accuracy" in self.metric else "min")


class StageConfig(Section):
    """A part of a run with data or a learning rate of its own. What it leaves out is as in the rest of the run."""

    until: Positive | None = None
    """Step at which it ends; only the last one may leave it out, and ends with the run."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")] | None = None
    """Name of the checkpoint that it ends in; unset means ``stage-1``, ``stage-2`` …."""
    data: DataConfig | None = None
    """What it trains on."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Its peak learning rate."""
    schedule: ScheduleConfig | None = None
    """A schedule of its own, whose steps count from its start; unset: the run's schedule goes on."""


class LossScaleConfig(Section):
    """Dynamic loss scale of fp16 (Micikevicius et al. 2018)."""

    initial_power: Annotated[int, Field(ge=0, le=32)] = 16
    """The scale starts at two to this power."""
    window: Positive = 1000
    """Steps without overflow after which the scale doubles."""
    hysteresis: Positive = 2
    """Overflows that are forgiven before the scale halves."""
    min_scale: Annotated[float, Field(gt=0)] = 1.0
    """The scale never falls below this."""


class ZeroConfig(Section):
    """What a DeepSpeed JSON tunes by hand. Unset values are decided by the plan."""

    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on; costs a second bucket."""
    reduce_bucket_elements: Positive | None = None
    """Elements (not bytes) of a gradient bucket."""
    prefetch_bucket_elements: Annotated[int, Field(ge=0)] | None = None
    """ZeRO-3: elements gathered ahead of their use."""
    persistence_threshold_elements: Annotated[int, Field(ge=0)] | None = None
    """ZeRO-3: parameters below this size are not partitioned."""
    max_live_elements: Positive | None = None
    """ZeRO-3: gathered elements alive at most."""
    max_reuse_distance_elements: Annotated[int, Field(ge=0)] | None = None
    """ZeRO-3: keep a parameter gathered when it is used again within this many elements."""
    sub_group_elements: Positive | None = None
    """ZeRO-3: elements that the optimizer steps at a time."""
    pin_memory: bool | None = None
    """Page-locked host memory for what is offloaded: faster transfers, cannot be swapped."""


class FsdpConfig(Section):
    """Knobs of strategy fsdp2."""

    reshard_after_forward: bool = True
    """Let go of a block's gathered parameters after its forward pass and gather them again in the backward pass.
    ``false`` saves one all-gather a micro-step and keeps the whole compute copy on every rank from forward to
    backward."""


class Config(Section):
    """One run."""

    name: str | None = None
    """Name of the run folder; unset takes the preset's or the file's name."""
    runs_dir: Path = Path("runs")
    """Folder of run folders."""
    seed: int = 1337
    """Everything random is a function of this: weights, sample order, dropout."""

    init_from: str = "scratch"
    """Where weights come from: ``scratch`` (the seed); ``resume`` (go on with this run, as ``--resume``); ``gpt2``,
    ``gpt2-medium``, ``gpt2-large`` or ``gpt2-xl`` (published weights); another run or one of its checkpoints, a Hugging
    Face folder, a weights file, or ORGANISATION/NAME on the hub. The optimizer starts afresh, and the model's shape is
    that of the weights; a smaller ``model.block_size`` cuts the positions."""

    model: ModelConfig
    data: AnyDataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    loss_scale: LossScaleConfig = LossScaleConfig()
    zero: ZeroConfig = ZeroConfig()
    fsdp: FsdpConfig = FsdpConfig()

    stages: tuple[StageConfig, ...] = ()
    """A curriculum: a list of ``{until, name, data, learning_rate, schedule}``, one stage after the other. Each ends in
    a checkpoint of its name, which stays."""

    max_steps: Positive = 1000
    """Optimizer steps."""
    duration: Positive | str | None = None
    """How long the run is, in place of ``max_steps``: ``1000``, ``3ep`` (epochs), ``2e9tok`` (tokens) or ``90min`` (h,
    min, s of training, by the main rank's clock). Of two that contradict each other on one level the run is refused."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights with this decay a step (0.999 or so), for ``--weights ema`` of eval, generate and
    export; unset: none. Young averages decay faster: by at most (1 + t) / (10 + t) after t steps."""
    global_batch: Positive | None = None
    """Samples of one optimizer step over all ranks: ``micro_batch * accumulation_steps * world_size``."""
    micro_batch: Positive | None = None
    """Samples of one forward pass on one rank."""
    accumulation_steps: Positive | None = None
    """Forward and backward passes of one rank before an optimizer step."""

    strategy: Strategy | Literal["auto"] = "auto"
    """How states are spread over ranks; ``auto``: what serves the goal best of all that fits."""
    goal: Goal = "speed"
    """What the plan looks for among what fits: the fastest; the least GPU memory; ``balanced``: the least memory within
    a tenth of the fastest; the largest micro-batch."""
    offload: Offload | Literal["auto"] = "auto"
    """Where the optimizer's states live; ``auto``: on the GPU, elsewhere where that does not fit or is slower."""
    offload_parameters: Offload | Literal["auto"] = "auto"
    """ZeRO-3 only: where idle parameters live."""
    nvme_path: Path | None = None
    """Folder on a local NVMe drive, for ``nvme`` offload."""
    num_gpus: Positive | None = None
    """Processes on this machine; unset means every visible GPU, or one process without a GPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto``: the GPU when there is one."""
    precision: Precision | Literal["auto"] = "auto"
    """``auto``: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""
    gradient_dtype: Literal["compute", "fp32"] = "compute"
    """Type in which gradients are accumulated and reduced: that of the compute copy, or fp32."""
    activation_checkpointing: Literal["auto", "none", "light", "selective", "full"] | Positive = "auto"
    """Blocks whose activations are recomputed: none, all (``full``), or every n-th block (a number); ``auto``: as few
    as fit. Mamba has two ways between: ``selective`` keeps the projections and recomputes convolution, scan and gate;
    ``light`` keeps the scan's results too."""
    activation_offload: Literal["none", "cpu"] = "none"
    """``cpu``: the inputs of recomputed blocks are kept in page-locked host memory between the two passes. For every
    block recomputed (``light``, ``selective``, ``full``)."""
    compile: bool = False
    """``torch.compile`` each block."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record forward and backward pass as a CUDA graph and replay it: small models wait for the host otherwise. For one
    GPU without sharding, offload and recomputation. ``auto``: where launching is predicted to hold the GPU up, and the
    recording fits."""
    deterministic: bool = False
    """Deterministic GPU kernels, so that a repeated run is bit for bit the same; slower."""

    eval_interval: Interval | Literal["epoch"] = 250
    """Steps between evaluations, ``epoch``, or ``never``. The last step is evaluated too unless ``never``."""
    eval_batches: Positive = 20
    """Global batches of each split in an evaluation. Of pictures the whole validation split is evaluated."""
    log_style: Literal["plain", "nanogpt"] = "plain"
    """``nanogpt``: lines as nanoGPT prints them, ``iter 100: loss 3.2101, time 135.20ms, mfu 38.12%``."""
    log_interval: Positive = 10
    """Steps between lines on a terminal that is not live; every step is in ``events.jsonl``."""
    save_interval: Interval | Literal["epoch", "evaluation"] = "evaluation"
    """Steps between checkpoints, ``epoch``, every ``evaluation``, or ``never``. The last step too."""
    save_on_improvement: bool = True
    """Save and point ``best`` to it when the validation loss (of pictures, accuracy) improves."""
    save_asynchronously: bool = True
    """Write checkpoints while training goes on; takes a rank's share of the states in host memory once more."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep, beside ``best``, ``final`` and what ``zerofit checkpoint tag`` named."""
    keep_every: Positive | None = None
    """Keep every checkpoint whose step is a multiple of this, too."""
    keep_best: Positive | None = None
    """Keep this many checkpoints with the best evaluation (of the loss; of pictures, accuracy), too."""
    sample_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of text to generate and print when training ends; 0 for none."""
    sample_interval: Interval = "never"
    """Steps between such texts while training goes on, or ``never``. All ranks write them together."""
    sample_prompt: str = "\n"
    """Start of that text."""
    collective_timeout_seconds: Positive = 600
    """A collective that takes longer means that a rank is gone."""

    @model_validator(mode="before")
    @classmethod
    def _stages_decide(cls, given: Any) -> Any:
        """The last stage ends the run, and its data is the run's, where nothing else says so. Weights bring a model."""
        if isinstance(given, dict) and "model" not in given and given.get("init_from", "scratch") != "scratch":
            given = {**given, "model": {"kind": "gpt2"}}  # its shape comes with the weights
        stages = given.get("stages") if isinstance(given, dict) else None
        last = stages[-1] if isinstance(stages, list | tuple) and stages else None
        if not isinstance(last, dict):
            return given
        known = {"max_steps": last.get("until"), "data": last.get("data")}
        return {**{key: value for key, value in known.items() if value is not None}, **given}

    @model_validator(mode="after")
    def _legal_stages(self) -> Config:
        check_stages(self)
        return self

    @model_validator(mode="after")
    def _legal_combination(self) -> Config:
        _check_data(self)
        _check_offload(self)
        _check_checkpointing(self)
        if self.sample_interval != "never" and not self.sample_tokens:
            raise ValueError(
                f"sample_interval {self.sample_interval} with sample_tokens 0: a text of no tokens is asked for; set "
                f"sample_tokens, or sample_interval never"
            )
        _check_optimizer(self)
        _check_end(self)
        if self.compile and self.strategy == "zero3":
            raise ValueError(
                "strategy zero3 with compile true: torch.compile traces DeepSpeed's gathering hooks, and on GPUs the "
                "gradients came out wrong (measured: docs/experiments.md); use compile false, or strategy zero2"
            )
        if self.compile and self.compile_mode == "reduce-overhead":
            raise ValueError(
                "compile_mode reduce-overhead: it records each compiled unit as a CUDA graph, and those of blocks that "
                "are compiled one by one overwrite each other's outputs (torch 2.11 on an H200: docs/experiments.md); "
                "use compile_mode default, and cuda_graphs true, which records the whole micro-step"
            )
        if self.cuda_graphs is True:
            _check_graphs(self)
        return self


def _check_graphs(config: Config) -> None:
    """What cannot be recorded."""
    reasons = {
        f"strategy {config.strategy}": config.strategy not in ("auto", "single"),
        f"num_gpus {config.num_gpus}": (config.num_gpus or 1) > 1,
        f"activation_checkpointing {config.activation_checkpointing}": config.activation_checkpointing
        not in ("auto", "none"),
        "device cpu": config.device == "cpu",
    }
    found = next((what for what, wrong in reasons.items() if wrong), None)
    if found is not None:
        raise ValueError(
            f"cuda_graphs true with {found}: a CUDA graph records the forward and backward pass of one GPU without "
            f"sharding, collectives and recomputation. Use strategy single with activation_checkpointing none, or "
            f"cuda_graphs auto, which records only where that is possible and pays."
        )


def _check_data(config: Config) -> None:
    """Which data goes with which model."""
    wanted = DATA_OF_TASK[config.model.task]
    if config.data.kind != wanted:
        raise ValueError(
            f"model.kind {config.model.kind} with data.kind {config.data.kind}: {config.model.kind} is trained on "
            f"{wanted}; set data.kind {wanted} and data.path to {wanted} that were prepared, or choose another "
            f"model.kind"
        )
    if wanted == "images" and config.init_from not in ("scratch", "resume"):
        raise ValueError(
            f"init_from {config.init_from} with model.kind {config.model.kind}: init_from names weights of language "
            f"models; for a classifier set model.weights_from {config.init_from}, or model.pretrained true"
        )
    if wanted == "images" and any(stage.data is not None for stage in config.stages):
        raise ValueError(
            f"stages have data of their own with data.kind images: a run on pictures reads {config.data.path} from "
            f"first to last; its stages may have learning_rate and schedule"
        )


def _check_end(config: Config) -> None:
    """What ends the run, against the schedule and the evaluations."""
    timed = config.duration is not None and parse_duration(config.duration).unit == "seconds"
    endless = [schedule for schedule in schedules_to_the_end(config) if schedule.needs_end]
    if timed and endless:
        raise ValueError(
            f"duration {config.duration} with schedule.kind {endless[0].kind}: nobody knows at which step the "
            f"time will be over, and the learning rate is a function of the step. Set schedule.decay_steps (and "
            f"warmup_steps, not warmup_fraction), or use schedule.kind constant or wsd"
        )
    if config.early_stopping.patience is not None and config.eval_interval == "never":
        raise ValueError(
            "early_stopping.patience with eval_interval never: nothing would be watched; set eval_interval"
        )


def _check_optimizer(config: Config) -> None:
    """The optimizer under the strategy and offload that were named."""
    optimizer, offload = config.optimizer, "none" if config.offload == "auto" else config.offload
    reason = why_not(optimizer.kind, optimizer.state, optimizer.master, config.strategy, offload)
    if reason is None and optimizer.master == "bf16" and config.precision not in ("bf16", "auto"):
        reason = (
            f"optimizer.master bf16 with precision {config.precision}: the compute copy is what is updated, so it must "
            f"be bf16; use precision bf16, or optimizer.master fp32"
        )
    if reason is None and config.ema_decay is not None and config.offload == "nvme":
        reason = "ema_decay with offload nvme: the weights that are averaged lie on the drive; use offload cpu"
    if reason is not None:
        raise ValueError(reason)


def _check_checkpointing(config: Config) -> None:
    """Not every model has the ways between none and full."""
    wish, has = config.activation_checkpointing, config.model.recomputations
    if not isinstance(wish, int) and wish not in ("auto", "none", *has):
        raise ValueError(
            f"activation_checkpointing {wish} with model kind {config.model.kind}: its blocks are recomputed whole "
            f"or not at all; use full, or a number n for every n-th block"
        )
    if config.activation_offload == "cpu" and (wish == "none" or (isinstance(wish, int) and wish > 1)):
        raise ValueError(
            f"activation_offload cpu with activation_checkpointing {wish}: what is kept in host memory are the inputs "
            f"of recomputed blocks; use activation_checkpointing full, or activation_offload none"
        )
    if config.activation_offload == "cpu" and not config.model.inputs_to_host:
        raise ValueError(
            f"activation_offload cpu with model kind {config.model.kind}: its blocks may take several tensors, and "
            f"which one is the input is not known; use activation_offload none, with activation_checkpointing full"
        )
    if config.compile and wish in ("light", "selective"):
        raise ValueError(
            f"activation_checkpointing {wish} with compile true: in compiled blocks the compiler's partitioner "
            f"decides what is kept; use compile false, or activation_checkpointing full"
        )


def _check_offload(config: Config) -> None:
    """The offload that a strategy has; the nearest legal choice is named."""
    strategy, given = config.strategy, ("cpu", "nvme")
    if strategy in ("single", "ddp", "fsdp2") and config.offload in given:
        raise ValueError(
            f"strategy {strategy} with offload {config.offload}: only ZeRO moves optimizer states off the GPU; "
            f"use strategy zero2 (it also runs on one GPU) or offload none"
        )
    if config.offload == "nvme" and strategy != "zero3":
        raise ValueError(
            f"strategy {strategy} with offload nvme: DeepSpeed swaps to NVMe under ZeRO-3 only (under ZeRO-1 and 2 "
            f"the setting silently does nothing); use strategy zero3, or offload cpu"
        )
    if config.offload_parameters in given and strategy != "zero3":
        raise ValueError(
            f"strategy {strategy} with offload_parameters {config.offload_parameters}: only ZeRO-3 partitions "
            f"parameters; use strategy zero3, or offload_parameters none"
        )
    if config.offload_parameters in given and config.offload == "none":
        raise ValueError(
            f"offload_parameters {config.offload_parameters} with offload none: parameters leave the GPU only after "
            f"the optimizer states have; set offload {config.offload_parameters} too"
        )
    if "nvme" in (config.offload, config.offload_parameters) and config.nvme_path is None:
        raise ValueError("offload nvme needs a folder on a local NVMe drive: set nvme_path")
