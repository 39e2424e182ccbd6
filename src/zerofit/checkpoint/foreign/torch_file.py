"""Files that ``torch.save`` wrote, opened without reading a tensor and without running what they name."""

from __future__ import annotations

import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .sources import FileSource, MemorySource, Source
from .stand_ins import STAND_INS, Inert

#: How torch's restricted unpickler names what it refuses.
REFUSED = re.compile(r"GLOBAL (\S+)|unrecognized function (.+?)(?: which|$)", re.MULTILINE)
#: Elements of a tensor that is small enough to be a value of a client state.
SMALL_ELEMENTS = 16
#: Levels of a client state that are carried over; a list may hold itself.
DEEPEST = 12


class TorchFile:
    """The object of one file. Its tensors have shapes and no data; `source` reads them interval by interval.

    Attributes:
        path: the file.
        content: the object; tensors on the meta device (in PyTorch's old format: in memory).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size_bytes = path.stat().st_size if path.is_file() else 0
        self._indexed = zipfile.is_zipfile(path)
        self.content = self._load()

    def _load(self) -> Any:
        # The zip format tells where a tensor lies, and loading to "meta" leaves it there. The old format has no index.
        admitted: Any = [(stand_in, name) for name, stand_in in STAND_INS.items()]
        try:
            self._offsets = data_offsets(self.path) if self._indexed else frozenset()
            with torch.serialization.safe_globals(admitted):
                return torch.load(self.path, map_location="meta" if self._indexed else "cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(f"No file {self.path}. The checkpoint is incomplete; copy it again.") from error
        except pickle.UnpicklingError as error:
            raise _refused(self.path, error) from error
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.path} cannot be read as a PyTorch file ({type(error).__name__}: {_first_line(error)}). It is "
                f"cut off or of another format; copy it again, or use another checkpoint."
            ) from error

    def source(self, tensor: Tensor) -> Source:
        """Where the data of a tensor of `content` lies.

        Raises:
            CheckpointError: the tensor is sparse or quantized, or lies beyond the end of the file.
        """
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{self.path} holds a {'quantized' if tensor.is_quantized else 'sparse'} tensor; zerofit reads dense "
                f"ones. Save the weights as dense tensors in the program that wrote the file."
            )
        if tensor.device.type != "meta":
            return MemorySource(tensor.detach())
        start = tensor.untyped_storage()._checkpoint_offset
        if start not in self._offsets:
            # PyTorch computes offsets from the layout of its own writer.
            raise CheckpointError(
                f"{self.path} was packed again or compressed after PyTorch wrote it, and is read only as PyTorch "
                f"writes it. Load and save it with PyTorch, or unpack the original."
            )
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        elements = span if tensor.numel() else 0
        offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
        if offset + elements * tensor.dtype.itemsize > self._size_bytes:
            raise CheckpointError(
                f"{self.path} has {self._size_bytes} bytes, and a tensor of shape {tuple(tensor.shape)} is said to lie "
                f"at byte {offset}. It is cut off or damaged; copy it again from where it was written."
            )
        if tensor.is_contiguous():
            return FileSource(self.path, offset, tensor.dtype, tuple(tensor.shape))
        # A view with gaps or in another order: its span is read into memory at once.
        flat = FileSource(self.path, offset, tensor.dtype, (elements,)).read(0, elements)
        return MemorySource(flat.as_strided(tensor.shape, tensor.stride()).contiguous())

    def number(self, value: Any) -> float | None:
        """A number, or a tensor of one element, as a float; None for anything else."""
        if isinstance(value, Tensor):
            return float(self.source(value).read(0, 1).item()) if value.numel() == 1 else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A value as JSON can say it: small tensors as numbers, large ones and unknown objects as a description."""
        if depth > DEEPEST:
            return "<nested too deeply, not carried over>"
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, Mapping):
            return {str(key): self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [self.plain(item, depth + 1) for item in value]
        if isinstance(value, Tensor):
            return self._plain_tensor(value)
        if isinstance(value, Inert):
            return {str(key): self.plain(item, depth + 1) for key, item in value.attributes.items()}
        return f"<{type(value).__name__}>"

    def _plain_tensor(self, tensor: Tensor) -> Any:
        if tensor.numel() > SMALL_ELEMENTS or tensor.layout != torch.strided:
            return f"<tensor of shape {tuple(tensor.shape)}, not carried over>"
        return self.source(tensor).read(0, tensor.numel()).view(tensor.shape).tolist()


#: A local header before its name, and where in it the lengths of name and extra field stand (APPNOTE 4.3.7).
LOCAL_BYTES, LENGTHS_AT = 30, 26


def data_offsets(path: Path) -> frozenset[int]:
    """First bytes of the uncompressed entries of a zip file.

    Raises:
        CheckpointError: written on a machine with the other byte order; intervals are read as they lie.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for name in archive.namelist():
            if name.endswith("/byteorder") and (order := archive.read(name).decode()) != sys.byteorder:
                raise CheckpointError(
                    f"{path} was written on a {order}-endian machine, and this one is {sys.byteorder}-endian. Load "
                    f"and save it with PyTorch on this machine first."
                )
        stored = [entry for entry in archive.infolist() if entry.compress_type == zipfile.ZIP_STORED]
        return frozenset(_data_offset(file, entry.header_offset) for entry in stored)


def _data_offset(file: IO[bytes], header: int) -> int:
    file.seek(header + LENGTHS_AT)
    name, extra = struct.unpack("<2H", file.read(4))
    return header + LOCAL_BYTES + int(name) + int(extra)


def _refused(path: Path, error: Exception) -> CheckpointError:
    found = REFUSED.search(str(error))
    named = (found.group(1) or found.group(2)).rstrip(",.") if found else None
    cause = f"names the Python object {named}" if named else f"is no plain checkpoint ({_first_line(error)})"
    return CheckpointError(
        f"{path} {cause}, which zerofit will not load: unpickling can run any code, so only tensors, plain values and "
        f"a short list of harmless types are admitted. Nothing of it was run. If you trust the file, save its weights "
        f"again in the program that wrote it, with torch.save(model.state_dict(), FILE)."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
