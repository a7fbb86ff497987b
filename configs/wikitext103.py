"""ALiBi on WikiText-103 as published: about 247M parameters, 205 epochs.

Paper     Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022 (arXiv:2108.12409), pages 3-6
          and 15-20, on the model of Baevski & Auli 2019 (arXiv:1809.10853); optimizer, schedule and
          batch are those of the authors' command (`transformer_lm_wiki103` in fairseq)
Data      WikiText-103's wiki.{train,valid,test}.tokens in a folder wikitext-103, whole words
Hardware  8 devices of 32 GB (compiled for a TPU, alibi512 takes 24 GB of temporaries on each); with
          fewer or smaller ones raise --config.training.gradient_accumulation. 21.1B words are 207
          GPU hours at the paper's 28,300 words/s on a V100
Command   python train.py --config=configs/wikitext103.py:alibi512 --workdir=runs/wikitext103
Variants  alibi512 (without one), alibi1024, sinusoidal1024, sinusoidal2048; `tiny` has every
          mechanism on two layers and the Python standard library, for a laptop
Reach     validation perplexity per word, ends of lines among them as in fairseq: "perplexity" in
          extrapolation.json, nonoverlapping windows (Tables 2, 3 and 5):

          tokens         512    1024    2048    about 4K   about 8K
          alibi512       19.73  18.81   18.48   18.41      18.34
          alibi1024             18.66   18.05   17.95      17.96
          sinusoidal1024        19.34   51.09   144.00     284.88
          sinusoidal2048                18.87

          About 4K and 8K are 4512 and 8512 after 512 tokens, 4024 and 8024 after 1024; sinusoidal's
          51.09 is at 2024. Test (Table 6): alibi512 at 3072 tokens 19.08, sinusoidal at 3072 19.38.

Not as in the paper: no dropout of attention weights (theirs 0.1), which never exist in memory here;
the learning rate rises from 0 instead of 1e-7; weights start as this library's do; bfloat16, theirs
float16; the evaluation scores 26 windows of 8192, 98% of the validation words.
"""

import dataclasses
from typing import Literal

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig

# Position method, length, and sequences a step: 8 devices with as many as 9216 words hold.
VARIANTS: dict[str, tuple[Literal["alibi", "sinusoidal"], int, int]] = {
    "alibi512": ("alibi", 512, 8 * 18),
    "alibi1024": ("alibi", 1024, 8 * 9),
    "sinusoidal1024": ("sinusoidal", 1024, 8 * 9),
    "sinusoidal2048": ("sinusoidal", 2048, 8 * 4),
    "tiny": ("alibi", 64, 8),
}


def get_config(variant: str = "alibi512") -> Config:
    """The run: every field, with its meaning, is in the class that it belongs to."""
    position, length, batch_size = VARIANTS[variant]
    config = Config(
        model=DecoderConfig(
            vocab_size=267_744,  # fairseq's dictionary; the tokenizer has a few ids less
            num_layers=16,
            embed_dim=1024,
            num_heads=8,
            mlp_dim=4096,
            activation="relu",
            position=position,
            embed_scale=1024**0.5,
            final_norm=False,
            adaptive_cutoffs=(20_000, 60_000),  # bands of 1024, 256 and 64
            adaptive_factor=4,
            dropout=0.3,
            mlp_dropout=0.1,
            adaptive_dropout=0.2,
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="files:wikitext-103/wiki.{split}.tokens",
            tokenizer="words:267744",
            packing="stream",
            sequence_length=length,
            batch_size=batch_size,
        ),
        optimizer=OptimizerConfig(
            name="nag",
            learning_rate=1.0,
            schedule="cosine",  # 270,000 steps: exactly one period, so no restart
            warmup_steps=16_000,
            final_fraction=1e-4,
            beta1=0.99,
            weight_decay=0.0,
            clip_norm=0.1,
        ),
        training=TrainingConfig(
            num_steps=286_000,
            seed=1,
            log_every=100,
            checkpoint_every=1000,
            validate_every=2000,
            validation_batches=2,
        ),
        evaluation=EvaluationConfig(
            multiples=tuple(2**k for k in range(5) if 2**k * length <= 8192),
            split="valid",
            num_windows=26,
            num_targets=256,
            tokens_per_batch=65_536,
        ),
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
            adaptive_cutoffs=(200, 600),  # bands of 64, 16 and 4
            dtype="float32",
        ),
        data=dataclasses.replace(config.data, source="stdlib", tokenizer="words:2000"),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=20),
        training=dataclasses.replace(
            config.training,
            num_steps=100,
            log_every=10,
            checkpoint_every=50,
            validate_every=50,
        ),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4),
            split="valid",
            num_windows=8,
            num_targets=32,
            tokens_per_batch=1024,
        ),
    )
