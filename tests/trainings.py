"""`python train.py` as a process, on one small config, and what a run leaves in its directory."""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

from tests.texts import draw_words, write_texts

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 200
CONFIG = """
from alibi_jax.config import Config, OptimizerConfig, TrainingConfig
from alibi_jax.data import DataConfig
from alibi_jax.evaluation import EvaluationConfig
from alibi_jax.models import DecoderConfig


def get_config():
    return Config(
        model=DecoderConfig(num_layers=1, embed_dim=16, num_heads=2),
        data=DataConfig(
            source="files:{folder}/text/*.txt",
            sequence_length=16,
            batch_size=8,
            cache_dir="{folder}/cache",
        ),
        optimizer=OptimizerConfig(warmup_steps=10),
        training=TrainingConfig(
            num_steps={steps}, checkpoint_every=10, validate_every=50, validation_batches=2
        ),
        evaluation=EvaluationConfig(
            multiples=(1, 2), num_windows=4, num_targets=8, tokens_per_batch=256, num_bootstrap=100
        ),
    )
"""


def load_train():
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Command:
    """`python train.py` on one CPU device, with one config for all tests."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "config.py"
        self.file.write_text(CONFIG.format(folder=folder, steps=STEPS))
        rng = random.Random(0)
        write_texts(folder / "text", rng, draw_words(rng))
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            # Starting again compiles nothing again.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir, *flags, limit=None):
        """Starts a process; `limit` is the largest file in bytes that it may write."""
        command = [sys.executable, "train.py", f"--config={self.file}", f"--workdir={workdir}"]
        if limit is not None:
            command[:0] = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash"]
        return subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *flags, expect=0, limit=None):
        """Runs to the end; gives what was printed on stdout and on stderr."""
        process = self.start(workdir, *flags, limit=limit)
        out, err = process.communicate(timeout=300)
        assert process.returncode == expect, err[-3000:]
        assert "Traceback" not in err, err[-3000:]
        return out, err


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("command"))


def metrics(folder):
    """The lines of metrics.jsonl, without what time decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def last_step(folder):
    """The last step in metrics.jsonl, which may be growing; 0 if there is none."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return max((json.loads(line)["step"] for line in whole), default=0)
