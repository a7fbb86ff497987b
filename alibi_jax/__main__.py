"""`python -m alibi_jax`: the `alibi` command."""

import sys

from alibi_jax.cli import main

sys.exit(main())
