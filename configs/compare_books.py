"""Position methods side by side on whole books: 0.8M parameters at 128 bytes, tested to 4096.

Data      files of whole books: one JSON object a line with a "text" field, split by author into
          train, valid and test; set --config.data.source=files:DIR/{split}.jsonl.xz to your own
Hardware  2 CPU cores: about 4 minutes a run, an hour and a half for seven methods with three seeds
Command   alibi compare --config=configs/compare_books.py --workdir=runs/compare_books
          --methods=alibi,sinusoidal,rotary,t5,kerple_log,none,forgetting
          --protocols=nonoverlapping,fixed_targets,by_position,truncated_input

A run trains on 1.4M bytes: enough for the shape of the curves, too little for the best loss.
The same command with more methods, seeds or protocols adds to it: runs that are there are not
trained again.
"""

from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config() -> Config:
    """The comparison: every field, with its meaning, is in the class that it belongs to."""
    return Config(
        model=DecoderConfig(
            num_layers=4,
            embed_dim=128,
            num_heads=8,
            embed_scale=128**0.5,  # as in Vaswani et al. 2017
            scan_layers=False,  # a few layers run faster unrolled, and compile as fast
        ),
        data=DataConfig(
            source="files:books/{split}.jsonl.xz",
            tokenizer="bytes",
            sequence_length=128,
            batch_size=16,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
        training=TrainingConfig(num_steps=700, checkpoint_every=175, validate_every=350),
        evaluation=EvaluationConfig(
            multiples=(1, 2, 4, 8, 16, 32),
            num_windows=16,
            num_targets=64,
            tokens_per_batch=4096,
        ),
    )
