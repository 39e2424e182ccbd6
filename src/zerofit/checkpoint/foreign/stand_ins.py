"""What foreign pickles may name beside tensors: a short list, each entry an inert stand-in.

PyTorch's `weights_only` unpickler builds tensors and plain containers and calls nothing else. DeepSpeed and training
scripts store a few objects more. Their names are admitted here, and stand for functions and classes of this file that
hold what they were given and do nothing: neither the named code runs, nor need its package be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


class Inert:
    """Holds the arguments and the attributes of an object of another program."""

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        self = super().__new__(cls)
        self.arguments = arguments
        self.attributes = {}
        return self

    arguments: tuple[Any, ...]
    attributes: dict[str, Any]

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes whatever the object's class took."""

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.attributes.update(part)


def _value(value: Any, *_: Any) -> Any:
    """An enumeration's member is its value."""
    return value


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """A defaultdict before its items are set, without its factory."""
    return {}


def _items(items: Any = (), *_: Any) -> list[Any]:
    """A deque or a frozenset."""
    return list(items)


#: numpy's type code -> format of `struct`.
NUMPY_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I", "b1": "?"}


def _numpy_number(kind: Any, raw: Any = b"") -> float | int | bool | None:
    """A numpy scalar as Python's own number; None for kinds that are no numbers."""
    code = str(kind.arguments[0]) if isinstance(kind, Inert) and kind.arguments else ""
    form = NUMPY_NUMBERS.get(code.lstrip("<=|"))
    if form is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(form):
        return None
    number: float | int | bool = struct.unpack(f"<{form}", raw)[0]
    return number


_INERT = (
    # What DeepSpeed keeps in its optimizer states: the loss scaler, and where each parameter lies in the flat groups.
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment",
    # What scripts put into client_state: arguments, times, states of random generators.
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    # Factories of a defaultdict.
    "builtins.list",
    "builtins.dict",
    "builtins.int",
    "builtins.float",
)

#: Name in the pickle -> what stands for it.
STAND_INS: dict[str, Callable[..., Any]] = {
    **{name: type(name.rpartition(".")[2], (Inert,), {}) for name in _INERT},
    "deepspeed.runtime.zero.config.ZeroStageEnum": _value,
    "collections.defaultdict": _empty_dict,
    "collections.deque": _items,
    "builtins.frozenset": _items,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
    **{
        f"{module}.{name}": _posix_path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    },
    **{
        f"{module}.{name}": _windows_path
        for module in ("pathlib", "pathlib._local")
        for name in ("WindowsPath", "PureWindowsPath")
    },
}
