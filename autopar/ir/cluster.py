"""What a plan is made for: devices and the links between them. Pure data, no torch.

A newcomer adds a device by one line in `DEVICES` and a machine by one line in `PRESETS`; every number carries its source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or CPU process).

    `flops_per_s` maps a dtype to the vendor's dense peak; `memory_bytes_per_s` is peak memory bandwidth. `flops_efficiency` and
    `bandwidth_efficiency` are the fractions of the peaks that large operations reach in practice; `launch_s` is the fixed time of
    one small operation.
    """

    name: str
    memory_bytes: int
    flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes_per_s: float
    flops_efficiency: float
    bandwidth_efficiency: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class Link:
    """One level of links in the alpha-beta model: `latency_s` per message step and `bytes_per_s` per device and direction."""

    name: str
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` machines of `devices_per_node` devices: `intra` links inside a machine, `inter` links between machines."""

    name: str
    device: Device
    devices_per_node: int
    nodes: int
    intra: Link
    inter: Link

    @property
    def world_size(self) -> int:
        return self.devices_per_node * self.nodes
