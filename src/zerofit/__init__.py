"""zerofit: trains models on the GPUs you have, and says beforehand what fits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import load_model, plan, train

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "plan", "train"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: the command line starts faster without.
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
