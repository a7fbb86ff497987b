"""Configuration of the decoder: every switch that the published ALiBi decoders need."""

import dataclasses
import itertools
from typing import Literal

from alibi_jax import fields
from alibi_jax.errors import require


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm causal transformer language model.

    BLOOM, MPT, Falcon-RW, BTLM/JAIS, Baichuan-13B and Refact are settings of these fields.
    """

    vocab_size: int | None = None  # None in a training config: the tokenizer's
    num_layers: int = 4  # blocks
    embed_dim: int = 128  # of the residual stream
    num_heads: int = 8  # query heads
    num_kv_heads: int | None = None  # key/value heads, grouped queries if fewer; None: num_heads
    head_dim: int | None = None  # None: embed_dim / num_heads
    mlp_dim: int | None = None  # hidden units of the MLP; None: 4 * embed_dim

    # Position: the method, then options that only the methods named have.
    position: Literal[
        "alibi",
        "sinusoidal",
        "learned",
        "rotary",
        "t5",
        "kerple_log",
        "kerple_power",
        "fire",
        "none",
        "bam",
        "forgetting",
    ] = "alibi"
    bias_max: float = 8.0  # alibi, bam: slopes run down to 2^-bias_max (MPT's alibi_bias_max)
    slopes: tuple[float, ...] | None = None  # alibi: slopes given one by one; None: the standard
    slope_scale: float = 1.0  # alibi: factor on every slope (Falcon-RW: 1/sqrt(head_dim))
    alibi_heads: int | None = None  # alibi: only so many heads have the bias; None: all
    learned_slopes: bool = False  # alibi: each layer learns its slopes, from those above on
    sink: bool = False  # alibi: the first token of the row is at distance 0 from all
    # alibi, rotary: how rows longer than those of training are squeezed. It is always on, so set it
    # for the evaluation of a trained model. "yarn" is rotary's alone.
    length_scaling: Literal["none", "linear", "dynamic", "ntk", "yarn"] = "none"
    scaling_factor: float = 1.0  # by how many times longer, for "linear", "ntk" and "yarn"
    # Tokens of a training sequence, which "learned" has positions for, and "dynamic" and "yarn"
    # scale by. None in a training config: data.sequence_length.
    trained_length: int | None = None

    # Block.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before attention, MLP and the head
    norm_bias: bool = True  # layernorm only
    norm_eps: float = 1e-5  # added to the variance
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"  # "gelu" is the exact one
    gated_mlp: bool = False  # down(activation(gate(x)) * up(x))
    qkv_bias: bool = True  # of the query, key and value projections
    out_bias: bool = True  # of the attention's output projection
    mlp_bias: bool = True  # of every projection in the MLP
    clip_qkv: float | None = None  # queries, keys, values are clipped to [-clip_qkv, clip_qkv]
    qk_norm: Literal["full", "per_head"] | None = None  # norm of queries and keys, after the clip
    attention_scale: float | None = None  # factor on q.k, never on the bias; None: 1/sqrt(head_dim)
    final_norm: bool = True  # a norm after the last block
    dropout: float = 0.0  # probability, on the embedding and on each residual branch
    mlp_dropout: float = 0.0  # probability, on the hidden layer of the MLP

    # Ends.
    embed_norm: bool = False  # a norm after the embedding (BLOOM)
    embed_scale: float = 1.0  # factor on the embedding
    tie_embeddings: bool = True  # the output head is the embedding matrix
    logit_scale: float = 1.0  # factor on the logits
    # Adaptive input and softmax: the first ids of the bands of rarer words, for instance
    # 20000,60000; None: one embedding for all.
    adaptive_cutoffs: tuple[int, ...] | None = None
    adaptive_factor: int = 4  # by which the embeddings of each band are narrower than the last's
    adaptive_dropout: float = 0.0  # probability, on the projection to each tail of the softmax

    # How it is computed: none of these changes the parameters.
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    scan_layers: bool = True  # one compiled layer for any depth; False unrolls
    # What the backward pass recomputes, to save memory. "dots": all but products with a weight;
    # "full": each layer from its input.
    remat: Literal["none", "dots", "full"] = "none"

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, with the default filled."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Head dimension, with the default filled."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        """Hidden units of the MLP, with the default filled."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def biased_heads(self) -> int:
        """Heads that ALiBi gives a slope, with the default filled."""
        return self.num_heads if self.alibi_heads is None else self.alibi_heads

    @property
    def needs_trained_length(self) -> bool:
        """Whether the position method cannot do without `trained_length`."""
        return self.position == "learned" or self.length_scaling in ("dynamic", "yarn")

    @property
    def uses_dropout(self) -> bool:
        """Whether training needs a key."""
        return max(self.dropout, self.mlp_dropout, self.adaptive_dropout) > 0.0

    def with_position(self, position: str) -> "DecoderConfig":
        """The same model with another position method; options that it lacks get their defaults."""
        lost = {name: _default(name) for name, have in OPTIONS.items() if position not in have}
        return dataclasses.replace(self, position=position, **lost)  # type: ignore[arg-type]

    def band_dims(self) -> tuple[int, ...]:
        """Width of the embeddings of each adaptive band, from frequent to rare words."""
        bands = range(len(self.adaptive_cutoffs or ()) + 1)
        return tuple(self.embed_dim // self.adaptive_factor**band for band in bands)

    def vocabulary_std(self, dim: int) -> float:
        """Standard deviation of the first embeddings and output weights of that width.

        Smaller by M^0.25 than the dim^-0.5 that gives logits unit variance. A tied head finds in
        the residual stream the embedding of the token that it was given, whose logit would else
        begin at up to M^0.5, above all others.
        """
        return dim**-0.5 * self.embed_dim**-0.25

    def validate(self) -> None:
        """Raises UserError for values that no model can have."""
        fields.check(self, "config.model")
        for name in ("num_layers", "embed_dim", "num_heads"):
            _at_least_one(name, getattr(self, name))
        optional = ("vocab_size", "num_kv_heads", "head_dim", "mlp_dim", "trained_length")
        for name in optional:
            if (value := getattr(self, name)) is not None:
                _at_least_one(name, value)
        require(
            self.head_dim is not None or self.embed_dim % self.num_heads == 0,
            f"config.model.embed_dim={self.embed_dim} is not a multiple of "
            f"num_heads={self.num_heads}: change one, or give head_dim",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"config.model.num_heads={self.num_heads} is not a multiple of "
            f"num_kv_heads={self.kv_heads}: every key/value head serves equally many query heads",
        )
        for name in ("dropout", "mlp_dropout", "adaptive_dropout"):
            value = getattr(self, name)
            require(
                0.0 <= value < 1.0,
                f"config.model.{name}={value}: a probability, at least 0 and below 1",
            )
        for name in ("bias_max", "norm_eps", "embed_scale", "logit_scale"):
            _positive(name, getattr(self, name))
        for name in ("clip_qkv", "attention_scale"):
            if (value := getattr(self, name)) is not None:
                _positive(name, value)
        require(
            0.0 <= self.slope_scale < float("inf"),
            f"config.model.slope_scale={self.slope_scale}: a finite number, at least 0",
        )
        if self.slopes is not None:
            require(
                len(self.slopes) == self.num_heads,
                f"config.model.slopes has {len(self.slopes)} values for num_heads="
                f"{self.num_heads}: give one a head",
            )
            require(
                all(0.0 <= slope < float("inf") for slope in self.slopes),
                f"config.model.slopes={self.slopes}: finite numbers, at least 0",
            )
            require(
                self.bias_max == _default("bias_max"),
                f"config.model.bias_max={self.bias_max} with slopes={self.slopes}: it is of the "
                "standard slopes; give one of the two",
            )
        self._validate_position()
        if self.adaptive_cutoffs is not None:
            self._validate_bands(self.adaptive_cutoffs)
        for name in ("adaptive_factor", "adaptive_dropout"):
            require(
                self.adaptive_cutoffs is not None or getattr(self, name) == _default(name),
                f"config.model.{name}={getattr(self, name)} is of the bands of adaptive_cutoffs, "
                "and there are none: leave it out, or give them",
            )

    def _validate_position(self) -> None:
        for name, methods in OPTIONS.items():
            require(
                self.position in methods or getattr(self, name) == _default(name),
                f"config.model.{name}={getattr(self, name)} is an option of "
                f"{' and '.join(methods)}, not of position={self.position}: leave it out",
            )
        require(
            self.position != "sinusoidal" or self.embed_dim % 2 == 0,
            f"config.model.embed_dim={self.embed_dim} is odd: sinusoidal positions need it even",
        )
        require(
            self.position != "rotary" or self.head_size % 2 == 0,
            f"config.model.head_dim={self.head_size} is odd: rotary positions turn its dimensions "
            "two by two, so change head_dim, or embed_dim or num_heads",
        )
        if self.alibi_heads is not None:
            require(
                1 <= self.alibi_heads <= self.num_heads,
                f"config.model.alibi_heads={self.alibi_heads}: from 1 to num_heads="
                f"{self.num_heads}; for no bias at all set position=none",
            )
            require(
                self.slopes is None,
                f"config.model.alibi_heads={self.alibi_heads} with slopes={self.slopes}: give one "
                "of the two; a slope of 0 leaves a head without bias",
            )
        require(
            not self.learned_slopes or (self.slope_scale > 0 and min(self.slopes or (1.0,)) > 0),
            f"config.model.learned_slopes=true with slopes={self.slopes}, slope_scale="
            f"{self.slope_scale}: slopes are learned by their logarithm, so all must be above 0",
        )
        self._validate_scaling()

    def _validate_scaling(self) -> None:
        require(
            self.length_scaling != "yarn" or self.position == "rotary",
            f"config.model.length_scaling=yarn is rotary's, position={self.position} has none, "
            "linear, dynamic and ntk: choose one",
        )
        given = (
            f"config.model.length_scaling={self.length_scaling} with scaling_factor="
            f"{self.scaling_factor}"
        )
        if self.length_scaling in ("linear", "ntk", "yarn"):
            require(
                1.0 < self.scaling_factor < float("inf"),
                f"{given}: the factor is by how many times rows are longer than in training, a "
                "finite number above 1",
            )
        else:
            require(
                self.scaling_factor == 1.0,
                f"{given}: only linear, ntk and yarn take a factor; leave it out or choose one",
            )
        if self.length_scaling == "ntk" and self.position == "alibi":
            values = range(self.biased_heads) if self.slopes is None else {*self.slopes} - {0.0}
            require(
                len(values) >= 2,
                f"{given} leaves the steepest slope and divides the shallowest, so it takes two "
                f"different slopes above 0, and here is {len(values)}: choose linear or dynamic",
            )
        # With one frequency the base does not matter.
        require(
            self.length_scaling not in ("ntk", "dynamic")
            or self.position != "rotary"
            or self.head_size > 2,
            f"{given} leaves the highest of rotary's frequencies and lowers the others, but "
            f"head_dim={self.head_size} has one alone: choose linear, or a larger head_dim",
        )

    def _validate_bands(self, cutoffs: tuple[int, ...]) -> None:
        given = f"config.model.adaptive_cutoffs={cutoffs}"
        bounds = (0, *cutoffs) if self.vocab_size is None else (0, *cutoffs, self.vocab_size)
        require(
            bool(cutoffs) and all(low < high for low, high in itertools.pairwise(bounds)),
            f"{given} with vocab_size={self.vocab_size}: give one or more rising ids, above 0 and "
            "below vocab_size",
        )
        _at_least_one("adaptive_factor", self.adaptive_factor)
        power = self.adaptive_factor ** len(cutoffs)
        require(
            self.embed_dim % power == 0,
            f"config.model.embed_dim={self.embed_dim} is not a multiple of {power}: the width of "
            f"the last of {len(cutoffs) + 1} bands is embed_dim / {self.adaptive_factor}^"
            f"{len(cutoffs)}",
        )
        require(
            self.tie_embeddings and self.logit_scale == 1.0,
            f"{given}: adaptive input and softmax share their weights and have no scale; set "
            "tie_embeddings=true and logit_scale=1",
        )


# Options of the position methods, and which methods have them.
OPTIONS: dict[str, tuple[str, ...]] = {
    "bias_max": ("alibi", "bam"),
    "slopes": ("alibi",),
    "slope_scale": ("alibi",),
    "alibi_heads": ("alibi",),
    "learned_slopes": ("alibi",),
    "sink": ("alibi",),
    "length_scaling": ("alibi", "rotary"),
    "scaling_factor": ("alibi", "rotary"),
}


def _default(name: str) -> object:
    return next(field.default for field in dataclasses.fields(DecoderConfig) if field.name == name)


def _at_least_one(name: str, value: int) -> None:
    require(value >= 1, f"config.model.{name}={value}: must be at least 1")


def _positive(name: str, value: float) -> None:
    require(0.0 < value < float("inf"), f"config.model.{name}={value}: a finite number above 0")
