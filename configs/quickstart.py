"""Train short, test long on a laptop: 0.8M parameters at 128 bytes, tested to 4096.

Data      the Python standard library's own sources, as bytes; no download
Hardware  2 CPU cores
Command   python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config() -> Config:
    """The quickstart: every field, with its meaning, is in the class that it belongs to."""
    return Config(
        model=DecoderConfig(
            num_layers=4,
            embed_dim=128,
            num_heads=8,
            position="alibi",
            embed_scale=128**0.5,  # as in Vaswani et al. 2017
            scan_layers=False,  # a few layers run faster unrolled, and compile as fast
        ),
        data=DataConfig(source="stdlib", tokenizer="bytes", sequence_length=128, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
        training=TrainingConfig(num_steps=500, checkpoint_every=100, validate_every=250),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4, 8, 16, 32),
            num_windows=20,
            num_targets=64,
            tokens_per_batch=4096,
        ),
    )
