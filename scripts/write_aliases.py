"""Write docs/aliases.md from the table of familiar names: ``python scripts/write_aliases.py``."""

from __future__ import annotations

from pathlib import Path

from zerofit.config.dialects.aliases import HUGGING_FACE, NANOGPT, SCRIPT, rows

HEAD = """# Names of other tools

Written by `python scripts/write_aliases.py` from `src/zerofit/config/dialects/aliases.py`; do not edit.

These names work as flags of `zerofit train` and `zerofit plan` and as keys of configuration files. What became of each
is printed with the plan, and stands under `keys` in `zerofit plan --json`. Names that zerofit has itself
(`learning_rate`, `weight_decay`, `block_size`, `num_gpus`, …) are not in the list.

`gradient_accumulation_steps` means two things: nanoGPT counts over all ranks, DeepSpeed scripts and Hugging Face count
those of each rank. In a file it is read in the dialect of the file; on the command line, in that of the names beside
it; where nothing tells and there may be several GPUs, it is refused with both readings.

| name | from | here |
|---|---|---|
"""


def text() -> str:
    """The page."""
    order = (SCRIPT, NANOGPT, HUGGING_FACE)
    lines = sorted(rows(), key=lambda row: (order.index(row[1].partition(", ")[0]), row[0]))  # type: ignore[arg-type]
    return HEAD + "".join(f"| `{name}` | {dialects} | {becomes} |\n" for name, dialects, becomes in lines)


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "aliases.md"
    page.write_text(text(), encoding="utf-8")
    print(f"Wrote {page}.")
