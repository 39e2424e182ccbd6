"""Write the golden loss files that tests compare with: 20 steps on one CPU process in fp32. Run after a change that is
meant to change what a model computes, and say in the commit why.

    python scripts/write_golden_losses.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from golden import FOLDER, MODELS, losses_of  # noqa: E402


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        content = {
            "made_by": "scripts/write_golden_losses.py",
            "what": "training losses, nats a token; fp32, one CPU process, AdamW, seed 1337, tokens of seed = step",
            "torch": torch.__version__,
            "model": MODELS[name].model_dump(mode="json"),
            "losses": losses_of(name),
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(name, content["losses"][:2], content["losses"][-1])


if __name__ == "__main__":
    main()
