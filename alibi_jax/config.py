"""The configuration of a run, and how a file and the command line make one.

A config file is Python with a function `get_config()` that returns a `Config`. A file with
several names them in `VARIANTS` and takes one, `get_config(variant)`, for --config=FILE:VARIANT. On
the command line `--config.SECTION.FIELD=VALUE` overrides a field. Unknown names, wrong types and
impossible values end in one line that says what is allowed, before anything is read or allocated.
"""

import dataclasses
import difflib
import runpy
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from alibi_jax import fields
from alibi_jax.data.config import DataConfig
from alibi_jax.errors import UserError, require
from alibi_jax.evaluation.config import EvaluationConfig
from alibi_jax.files import given_path
from alibi_jax.models.config import DecoderConfig
from alibi_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clipping, then AdamW or Nesterov's accelerated gradient, with warm-up and a schedule."""

    name: Literal["adamw", "nag"] = "adamw"
    learning_rate: float = 2e-3  # the peak, reached at the end of the warm-up
    # After the warm-up. "wsd" (warm-up, stable, decay) stays at the peak and decays at the end.
    # With more num_steps such a run goes on from where its decay began, whose checkpoint is kept.
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 50  # steps of linear warm-up from 0
    decay_fraction: float = 0.2  # wsd: share of the steps, at the end, that decay
    final_fraction: float = 0.1  # of the peak, reached after the last step (not "constant")
    beta1: float = 0.9  # decay of the mean of gradients; the momentum of nag
    beta2: float = 0.95  # adamw: decay of the mean of squared gradients
    epsilon: float = 1e-8  # adamw: added to the denominator
    weight_decay: float = 0.1  # decoupled; never on norms, biases and positions
    clip_norm: float = 1.0  # largest global norm of the gradient

    def validate(self) -> None:
        """Raises UserError for values that cannot train."""
        fields.check(self, "config.optimizer")
        _within("optimizer.learning_rate", self.learning_rate, 0.0, 1e3, low_open=True)
        _within("optimizer.warmup_steps", self.warmup_steps, 0)
        _within("optimizer.decay_fraction", self.decay_fraction, 0.0, 1.0, low_open=True)
        _within("optimizer.final_fraction", self.final_fraction, 0.0, 1.0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(
                0.0 <= value < 1.0,
                f"config.optimizer.{name}={value}: must be at least 0 and below 1",
            )
        _within("optimizer.epsilon", self.epsilon, 0.0, 1.0, low_open=True)
        _within("optimizer.weight_decay", self.weight_decay, 0.0, 1e3)
        _within("optimizer.clip_norm", self.clip_norm, 0.0, low_open=True)

    def decay_start(self, num_steps: int) -> int | None:
        """The step at which "wsd" begins to decay; None for other schedules."""
        if self.schedule != "wsd":
            return None
        return num_steps - max(1, round(self.decay_fraction * num_steps))


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to keep on the way."""

    num_steps: int = 500  # optimizer steps
    seed: int = 0  # of the parameters, the order of the data and dropout
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)^2), which keeps logits small
    gradient_accumulation: int = 1  # microbatches a step; each holds batch_size / this sequences
    log_every: int = 10  # steps between lines in metrics.jsonl and TensorBoard
    validate_every: int = 250  # steps between losses on validation data; 0: never
    validation_batches: int = 8  # batches of validation data in each such loss
    checkpoint_every: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept
    keep_best: bool = False  # also save and keep that of the lowest validation loss
    # What a loss or gradient that is not finite does: "skip" leaves parameters and optimizer as
    # they were and goes on to the next batch.
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def validate(self) -> None:
        """Raises UserError for values that cannot train."""
        fields.check(self, "config.training")
        positive = ("num_steps", "gradient_accumulation", "log_every", "validation_batches")
        for name in (*positive, "checkpoint_every", "keep_checkpoints"):
            _within(f"training.{name}", getattr(self, name), 1, 2**31 - 1)  # steps are int32
        _within("training.seed", self.seed, 0, 2**32 - 1)
        _within("training.z_loss", self.z_loss, 0.0, 1.0)
        _within("training.validate_every", self.validate_every, 0)
        require(
            self.validate_every > 0 or not self.keep_best,
            "config.training.keep_best=true needs validation losses, and validate_every=0: give a "
            "number of steps",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self, num_devices: int, *, test_long: bool = True) -> None:
        """Checks types, values and what fields ask of each other; raises UserError.

        Args:
          num_devices: that it runs on.
          test_long: whether training ends with an evaluation, which asks more of memory.
        """
        fields.check(self, "config")
        self.model.validate()
        self.data.validate()
        self.optimizer.validate()
        self.training.validate()
        self.evaluation.validate(self.data.sequence_length, whole_windows=test_long)
        data, fsdp, tensor, context = self.mesh.sizes(num_devices)
        batch, parts = self.data.batch_size, self.training.gradient_accumulation
        require(
            batch % (parts * data * fsdp) == 0,
            f"config.data.batch_size={batch} does not divide into {parts} microbatch(es) over "
            f"{data * fsdp} device(s) of the data and fsdp axes: use a multiple of "
            f"{parts * data * fsdp}",
        )
        require(
            self.data.sequence_length % context == 0,
            f"config.data.sequence_length={self.data.sequence_length} does not divide over "
            f"{context} devices of the context axis: use a multiple of {context}, or a smaller "
            "axis in config.mesh",
        )
        whole = "forgetting" if self.model.position == "forgetting" else "a sink"
        require(
            context == 1 or not (whole == "forgetting" or self.model.sink),
            f"config.mesh.context={context} divides sequences, and {whole} needs them whole: use "
            "config.mesh.context=1",
        )
        sharded = {
            "num_heads": tensor,
            "num_kv_heads": tensor,
            "mlp_dim": tensor,
            "embed_dim": fsdp,
        }
        actual = {"num_kv_heads": self.model.kv_heads, "mlp_dim": self.model.mlp_size}
        for name, shards in sharded.items():
            size = actual.get(name, getattr(self.model, name))
            require(
                size % shards == 0,
                f"config.model.{name}={size} does not divide over {shards} devices of the "
                f"{'fsdp' if name == 'embed_dim' else 'tensor'} axis: use a multiple of {shards}, "
                "or a smaller axis in config.mesh",
            )
        narrowest = self.model.band_dims()[-1]
        require(
            narrowest % fsdp == 0,
            f"config.model.adaptive_cutoffs={self.model.adaptive_cutoffs}: embeddings of width "
            f"{narrowest}, of the last band, do not divide over {fsdp} devices of the fsdp axis: "
            "use a smaller fsdp axis in config.mesh or a smaller adaptive_factor",
        )
        require(
            self.optimizer.warmup_steps <= self.training.num_steps,
            f"config.optimizer.warmup_steps={self.optimizer.warmup_steps} is more than "
            f"config.training.num_steps={self.training.num_steps}: warm up for at most as many",
        )
        decay_start = self.optimizer.decay_start(self.training.num_steps)
        require(
            decay_start is None or self.optimizer.warmup_steps <= decay_start,
            f"config.optimizer.warmup_steps={self.optimizer.warmup_steps} is beyond step "
            f"{decay_start} of {self.training.num_steps}, where decay_fraction="
            f"{self.optimizer.decay_fraction} begins: make one of them smaller",
        )

    def with_trained_length(self) -> "Config":
        """The config whose model knows the length that it is trained at."""
        length = self.model.trained_length or self.data.sequence_length
        model = dataclasses.replace(self.model, trained_length=length)
        return dataclasses.replace(self, model=model)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)


def load_config(path: str, overrides: dict[str, str]) -> Config:
    """Runs a config file and applies overrides such as {"model.num_layers": "2"}.

    Args:
      path: The file, or FILE:VARIANT for one of the file's `VARIANTS`.
      overrides: Values by name.

    Raises:
      UserError: the file is missing or fails, or a name or a value is wrong.
    """
    name, _, variant = (path, "", "") if Path(path).exists() else path.partition(":")
    file = given_path("--config", name)
    require(file.is_file(), f"--config={path}: no such file")
    try:
        module = runpy.run_path(str(file))
        get_config, variants = module.get("get_config"), module.get("VARIANTS", ())
        if not callable(get_config):
            raise UserError(
                f"--config={path} has no function get_config(): define one that returns an "
                "alibi_jax.config.Config"
            )
        known = f"it has {', '.join(variants)}" if variants else f"leave out :{variant}"
        require(
            not variant or variant in variants,
            f"--config={path}: {name} has no variant {variant!r}: {known}",
        )
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--config={path} fails with {type(error).__name__}: {error}; it must be Python with "
            "a function get_config()"
        ) from error
    require(
        isinstance(config, Config),
        f"--config={path}: get_config() returned {type(config).__name__}, it must return an "
        "alibi_jax.config.Config",
    )
    fields.check(config, "config")
    return override(config, overrides)


def override(config: Config, overrides: dict[str, str]) -> Config:
    """The config with fields set, such as {"model.num_layers": "2"}; UserError if one cannot be."""
    for name, text in overrides.items():
        config = _override(config, name.split("."), text, "config")
    return config


def from_dict(values: dict[str, Any], section: type = Config, prefix: str = "config") -> Any:
    """The config that `Config.to_dict` gave, also after JSON; fields that are missing get defaults.

    Raises:
      UserError: a field is not known, as in a run of a later version, or has a wrong type.
    """
    annotations = typing.get_type_hints(section)
    given: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{prefix}.{name}"
        require(name in annotations, f"{where} is not known to this version of alibi_jax")
        if dataclasses.is_dataclass(annotations[name]):
            require(isinstance(value, dict), f"{where} is not a section")
            given[name] = from_dict(value, annotations[name], where)
        else:
            given[name] = tuple(value) if isinstance(value, list) else value
    config = section(**given)
    fields.check(config, prefix)
    return config


def describe(config: Any, prefix: str = "config") -> Iterator[str]:
    """Yields one line, `--config.SECTION.FIELD=VALUE`, for every field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{prefix}.{field.name}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            yield f"--{prefix}.{field.name}={text}"


def _override(node: Any, path: Sequence[str], text: str, prefix: str) -> Any:
    """The dataclass `node` with the field at `path` set to the value that `text` spells."""
    name, *rest = path
    names = [field.name for field in dataclasses.fields(node)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {prefix}.{close[0]}?" if close else f"it has {', '.join(names)}"
        raise UserError(f"--{prefix}.{name} does not exist: {hint}")
    value = getattr(node, name)
    here = f"{prefix}.{name}"
    if dataclasses.is_dataclass(value):
        require(bool(rest), f"--{here} is a section: set one of its fields, --{here}.FIELD=VALUE")
        return dataclasses.replace(node, **{name: _override(value, rest, text, here)})
    require(not rest, f"--{here} is a field, not a section: --{here}=VALUE")
    annotation = typing.get_type_hints(type(node))[name]
    return dataclasses.replace(node, **{name: fields.parse(text, annotation, here)})


def _within(
    name: str, value: float, low: float, high: float = float("inf"), *, low_open: bool = False
) -> None:
    above = value > low if low_open else value >= low
    limit = f"above {low}" if low_open else f"at least {low}"
    limit += f" and at most {high}" if high != float("inf") else ""
    require(
        above and value <= high and value != float("inf"), f"config.{name}={value}: must be {limit}"
    )
