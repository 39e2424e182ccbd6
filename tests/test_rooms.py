"""What an import costs: configuration and help need neither torch nor DeepSpeed."""

from __future__ import annotations

import subprocess
import sys

import pytest

SNIPPETS = {
    "import zerofit": "import zerofit",
    "validate a configuration": "from zerofit.config.load import load_config; load_config(None, 'gpt2')",
    "parse arguments": "from zerofit.config.arguments import parse_arguments; parse_arguments(['--seed', '1'])",
    "help": "from zerofit.cli.main import load_verb; load_verb('train'); load_verb('plan'); load_verb('presets')",
    "prepare a run": "import zerofit.training.start",
    "prepare pictures": "import zerofit.cli.data, zerofit.data.prepare.images, zerofit.data.images.dataset",
}


@pytest.mark.parametrize("code", SNIPPETS.values(), ids=SNIPPETS.keys())
def test_neither_torch_nor_deepspeed_is_imported(code: str) -> None:
    probe = f"import sys\n{code}\nprint(sorted({{'torch', 'deepspeed', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
