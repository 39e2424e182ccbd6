"""Hardware that is not here, from flags of ``zerofit plan``: ``--gpus 4 --gpu rtx4090 --nodes 2``.

``--gpus`` counts the GPUs of one node, as ``num_gpus`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from ..errors import ConfigError
from .gpus import GpuKind, find_gpu, slowest_of_size
from .hardware import Gpu, Hardware
from .sizes import GIB, format_bytes, parse_bytes

#: What a described node has when nothing is said: a common server's shares a GPU.
HOST_MEMORY_BYTES_A_GPU, CPU_CORES_A_GPU = 64 * GIB, 8
#: Between described nodes when nothing is said: 100 Gbit/s.
NETWORK_BYTES_PER_SECOND = 12.5e9
_LINK_RULE = (
    "it takes nvlink, pcie, ethernet:RATE or infiniband:RATE with a rate such as 100gbit, or two of them, as in "
    "nvlink,infiniband:400gbit"
)
_RATE = re.compile(r"(?:ethernet|infiniband|ib|roce):([0-9]+(?:\.[0-9]+)?)(?:gbit/s|gbit|gbps|g)")
_MOST_GPUS = 100_000


@dataclass(frozen=True)
class Description:
    """The flags as typed; None where one was not given. Their names are the flags' names."""

    gpus: str | None = None
    gpu: str | None = None
    gpu_memory: str | None = None
    nodes: str | None = None
    link: str | None = None
    host_memory: str | None = None
    cpu_cores: str | None = None
    disk: str | None = None
    nvme: str | None = None

    def __bool__(self) -> bool:
        """True when any flag was given."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def described_hardware(flags: Description, here: Hardware) -> Hardware:
    """The described machine; what is not described comes from this one where it has it, else from usual values.

    Raises:
        ConfigError: an unknown GPU, a size or count that cannot be, GPUs without a kind or a memory size.
    """
    gpu = _gpu(flags, here)
    nodes = _count("--nodes", flags.nodes, 1)
    per_node = _count("--gpus", flags.gpus, 1 if flags.gpu else max(len(here.gpus), 1))
    link, network = _links(flags.link, gpu.kind, nodes)
    size = {name: getattr(flags, name) for name in ("host_memory", "disk", "nvme")}
    given = {name: parse_bytes(text, "--" + name.replace("_", "-")) for name, text in size.items() if text}
    return Hardware(
        gpus=(gpu,) * per_node,
        nodes=nodes,
        link=link,
        network_bytes_per_second=network,
        cpu_cores=_count("--cpu-cores", flags.cpu_cores, CPU_CORES_A_GPU * per_node),
        host_memory_bytes=given.get("host_memory", HOST_MEMORY_BYTES_A_GPU * per_node),
        disk_free_bytes=given.get("disk"),
        nvme_free_bytes=given.get("nvme"),
        system="Linux",
        has_deepspeed=True,
        described=True,
    )


def _gpu(flags: Description, here: Hardware) -> Gpu:
    memory_bytes = parse_bytes(flags.gpu_memory, "--gpu-memory") if flags.gpu_memory else None
    if flags.gpu:
        return _of_kind(find_gpu(flags.gpu), memory_bytes)
    if here.gpus:
        gpu = here.gpus[0]
        changes = {} if memory_bytes is None else {"memory_bytes": memory_bytes, "free_bytes": memory_bytes}
        return gpu.model_copy(update=changes or {"free_bytes": gpu.memory_bytes})
    if memory_bytes is None:
        raise ConfigError(
            "Hardware was described without its GPU, and this machine has none to take: name one, as in --gpu rtx4090, "
            "or give its memory, as in --gpu-memory 24GiB."
        )
    alike = slowest_of_size(memory_bytes)
    return _of_kind(alike, memory_bytes).model_copy(
        update={"name": f"GPU with {format_bytes(memory_bytes)}", "assumed": True}
    )


def _of_kind(kind: GpuKind, memory_bytes: int | None) -> Gpu:
    size = memory_bytes or kind.memory_bytes
    return Gpu(name=kind.title, memory_bytes=size, free_bytes=size, capability=kind.capability, rates_of=kind.key)


def _count(flag: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdigit() or not 1 <= int(text) <= _MOST_GPUS:
        raise ConfigError(f"{flag} was set to {text!r}, and it takes a whole number from 1 to {_MOST_GPUS:,}.")
    return int(text)


def _links(text: str | None, kind: GpuKind | None, nodes: int) -> tuple[Literal["nvlink", "pcie"], float | None]:
    """What connects the GPUs of a node, and the network between nodes in bytes a second."""
    can_nvlink = kind is not None and kind.nvlink > 0
    inside: Literal["nvlink", "pcie"] = "nvlink" if can_nvlink else "pcie"
    network = NETWORK_BYTES_PER_SECOND
    for part in (text or "").lower().replace(" ", "").split(","):
        rate = _RATE.fullmatch(part)
        if part == "nvlink" and not can_nvlink:
            raise ConfigError(
                f"--link {text}: {kind.title if kind else 'this GPU'} has no NVLink in zerofit's table. Use --link "
                f"pcie."
            )
        if rate and nodes == 1:
            raise ConfigError(
                f"--link {text} with one node: a network connects nodes, and there is one. Add --nodes 2 (--gpus "
                f"counts the GPUs of one node), or use --link pcie."
            )
        if part in ("nvlink", "pcie"):
            inside = "nvlink" if part == "nvlink" else "pcie"
        elif rate and float(rate.group(1)) > 0:
            network = float(rate.group(1)) * 1e9 / 8
        elif part:
            raise ConfigError(f"--link was set to {text!r}, and {_LINK_RULE}.")
    return inside, network if nodes > 1 else None
