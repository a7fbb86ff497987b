"""ALiBi at scale as published: about 1.3B parameters, one epoch of 461 GB of text.

Paper     Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022 (arXiv:2108.12409), pages 7-9
          and 21-22. It gives the sizes of the model, the data and 50,000 updates, but neither
          batch, optimizer nor vocabulary: a step of 2^21 tokens makes 461 GB last 50,000 updates at
          4.4 bytes a token; the optimizer is that of GPT-3 1.3B (Brown et al. 2020, Table 2.1)
Data      RoBERTa's corpus and English CC-100 (neither can be given here): files that are split into
          train, valid and test. Set --config.data.source=files:DIR/{split}/*.jsonl.zst, and
          --config.data.tokenizer=FILE if you have a tokenizer.json (GPT-2's has 50,257 tokens)
Hardware  the paper: 128 V100 for 5.5k to 6.7k GPU hours, 24.6 to 29.4 GB each. Parameters and
          optimizer take 16 bytes each, 22 GB, divided over all devices (mesh.fsdp)
Command   python train.py --config=configs/paper_1p3b.py:alibi1024 --workdir=runs/1p3b
Variants  alibi512, alibi1024 (without one), alibi2048, sinusoidal512, sinusoidal1024,
          sinusoidal2048; `tiny` has every mechanism on two layers and the Python standard library
Reach     validation perplexity per token of the paper's vocabulary (Table 12; "perplexity" in
          extrapolation.json), which differs with the tokenizer; the order of the rows should not:

          tokens            512     1024    2048
          alibi512          9.79    9.30    9.54
          sinusoidal512     9.71    37.05   105.42
          alibi1024                 9.16    8.92
          sinusoidal1024            9.15    48.85
          alibi2048                         8.84
          sinusoidal2048                    8.83

          In as much time as alibi1024 takes, sinusoidal2048 made 44,200 updates and reached 9.01
          (Table 11: 11% slower, 29.3 GB instead of 26.2).
"""

import dataclasses
from typing import Literal

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig
from alibi_jax.sharding import MeshConfig

TOKENS_PER_STEP = 1 << 21

# Position method and length.
VARIANTS: dict[str, tuple[Literal["alibi", "sinusoidal"], int]] = {
    "alibi512": ("alibi", 512),
    "alibi1024": ("alibi", 1024),
    "alibi2048": ("alibi", 2048),
    "sinusoidal512": ("sinusoidal", 512),
    "sinusoidal1024": ("sinusoidal", 1024),
    "sinusoidal2048": ("sinusoidal", 2048),
    "tiny": ("alibi", 64),
}


def get_config(variant: str = "alibi1024") -> Config:
    """The run: every field, with its meaning, is in the class that it belongs to."""
    position, length = VARIANTS[variant]
    config = Config(
        model=DecoderConfig(
            vocab_size=50_304,  # the tokenizer's, up to a multiple of 128
            num_layers=25,
            embed_dim=2048,
            num_heads=16,
            mlp_dim=8192,
            activation="relu",
            position=position,
            embed_scale=2048**0.5,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="files:cc100_roberta/{split}/*.jsonl.zst",
            tokenizer="bpe:50257",
            packing="stream",
            sequence_length=length,
            batch_size=TOKENS_PER_STEP // length,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(num_steps=50_000, checkpoint_every=500, validate_every=1000),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4, 8),
            split="valid",
            num_windows=32,
            num_targets=256,
            tokens_per_batch=131_072,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    return tiny(config) if variant == "tiny" else config


def tiny(config: Config) -> Config:
    """The config with every mechanism and small sizes."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            vocab_size=None,
            num_layers=2,
            embed_dim=64,
            mlp_dim=256,
            embed_scale=64**0.5,
            dtype="float32",
        ),
        data=dataclasses.replace(config.data, source="stdlib", tokenizer="bpe:512", batch_size=8),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-3, warmup_steps=20),
        training=TrainingConfig(num_steps=100, checkpoint_every=50, validate_every=50),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4),
            split="valid",
            num_windows=8,
            num_targets=32,
            tokens_per_batch=2048,
        ),
    )
