"""A real run: about 40M parameters at 512 tokens on whole books, tested to 8192.

Data      files of whole books: one JSON object a line with a "text" field, split by author into
          train, valid and test; set --config.data.source=files:DIR/{split}.jsonl.xz to your own
Hardware  one GPU of 24 GB or more, in bfloat16: XLA plans 10 GB for a step
Command   python train.py --config=configs/books_small.py --workdir=runs/books
          alibi eval --workdir=runs/books --lengths=512,2048,8192,32768

The tokenizer is a byte-level BPE of 16384 tokens, trained on the train split once and cached.
6000 steps of 131,072 tokens are 0.8B tokens, about 20 a parameter.
"""

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config() -> Config:
    """The run: every field, with its meaning, is in the class that it belongs to."""
    return Config(
        model=DecoderConfig(
            num_layers=10,
            embed_dim=512,
            num_heads=8,  # slopes 1/2 .. 1/256
            mlp_dim=1408,  # gated: three matrices of 8/3 * embed_dim
            gated_mlp=True,
            activation="silu",
            norm="rmsnorm",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            position="alibi",
            embed_scale=512**0.5,  # as in Vaswani et al. 2017
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="files:books/{split}.jsonl.xz",
            tokenizer="bpe:16384",
            sequence_length=512,
            batch_size=256,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=300,
            final_fraction=0.1,
            weight_decay=0.1,
        ),
        training=TrainingConfig(
            num_steps=6000,
            gradient_accumulation=16,
            checkpoint_every=250,
            validate_every=500,
        ),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4, 8, 16),
            num_windows=64,
            num_targets=256,
            tokens_per_batch=8192,
        ),
    )
