"""What libraries put around the names of parameters."""

from __future__ import annotations


def strip_wrappers(name: str) -> str:
    """A name without what DDP, ``torch.compile`` and FSDP put around modules."""
    name = name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").replace("_forward_module.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
