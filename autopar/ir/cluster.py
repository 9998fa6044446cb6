"""What a plan is made for: devices and the links between them. Pure data, no torch.

A newcomer adds a device by one line in `DEVICES` and a machine by one line in `PRESETS`; every number carries its source.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from autopar.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or CPU process).

    `flops_per_s` maps a dtype to the vendor's dense peak; `memory_bytes_per_s` is peak memory bandwidth. `flops_efficiency` and
    `bandwidth_efficiency` are the fractions of the peaks that large operations reach in practice; `launch_s` is the fixed time of
    one small operation. `felt_share`: of the time of traffic that runs beside computing, so much is felt all the same, because
    it takes from what computes (0: none, 1: nothing is ever hidden).
    """

    name: str
    memory_bytes: int
    flops_per_s: tuple[tuple[str, float], ...]
    memory_bytes_per_s: float
    flops_efficiency: float
    bandwidth_efficiency: float
    launch_s: float
    felt_share: float = 20 / 132
    """For GPUs: 20 of an H800's 132 multiprocessors saturate NVLink and InfiniBand (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
    section 3.2.2)."""


@dataclass(frozen=True, slots=True)
class Link:
    """One level of links in the alpha-beta model: `latency_s` per message step and `bytes_per_s` per device and direction.

    `start_s` is what every collective costs once, however few its steps and bytes. `gather_factor`: how much longer the bytes of an
    all-gather take than a ring's would."""

    name: str
    latency_s: float
    bytes_per_s: float
    start_s: float = 0.0
    gather_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` machines of `devices_per_node` devices: `intra` links inside a machine, `inter` links between machines.

    `expert_imbalance`: where routed experts are split over ranks, the fullest has so many times the mean of their rows (at least 1)."""

    name: str
    device: Device
    devices_per_node: int
    nodes: int
    intra: Link
    inter: Link
    expert_imbalance: float = 1.04
    """Measured where a bias on the router's scores keeps experts balanced (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy
    for Mixture-of-Experts", table 2: largest violation 0.04; with an auxiliary loss instead 0.5 to 0.7). Give your own router's."""

    @property
    def world_size(self) -> int:
        return self.devices_per_node * self.nodes

    @staticmethod
    def from_name(name: str) -> Cluster:
        """A preset: `"h100x8"` (one machine), `"h100x8:4"` (four), `"h100x16"` (two of eight), `"h100x2"` (part of one), `"cpu:4"`
        (four processes on one host). Raises `ClusterError` with the list of presets."""
        match = re.fullmatch(r"([a-z][a-z0-9]*?)x(\d{1,6})(?::(\d{1,6}))?", name) or re.fullmatch(r"(cpu):(\d{1,6})()", name)
        machine = PRESETS.get(match[1]) if match else None
        if match is None or machine is None:
            raise ClusterError(f"`{name}` is no cluster. {_KNOWN}")
        full, count, nodes = machine.devices_per_node, int(match[2]), int(match[3] or 1)
        if machine.device.name == "cpu":
            full = count
        elif count > full and not match[3]:
            count, nodes = full, count // full if count % full == 0 else 0
        if not 1 <= count <= full or nodes < 1:
            raise ClusterError(f"`{name}`: a machine has 1 to {full} devices; write `{match[1]}x{full}:2` for two whole ones. {_KNOWN}")
        return replace(machine, name=name, devices_per_node=count, nodes=nodes)

    @staticmethod
    def from_toml(path: str | Path) -> Cluster:
        """A cluster from a file such as `to_toml` writes. `device`, `intra` and `inter` may also be names of presets:
        `device = "h100"`, `intra = "nvlink4"`. Raises `ClusterError` naming file, field and remedy."""
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ClusterError(f"cluster file `{path}` cannot be read: {error.strerror}. {_KNOWN}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ClusterError(f"cluster file `{path}` is not TOML: {error}") from None
        return _read(data, str(path))

    def to_toml(self) -> str:
        """The text of a file that `from_toml` reads back as this cluster."""
        device = asdict(self.device)
        flops = dict(device.pop("flops_per_s"))
        top = {"name": self.name, "nodes": self.nodes, "devices_per_node": self.devices_per_node}
        top |= {"expert_imbalance": self.expert_imbalance}
        tables = {"device": device, "device.flops_per_s": flops, "intra": asdict(self.intra), "inter": asdict(self.inter)}
        parts = ["".join(f"{key} = {_toml(value)}\n" for key, value in top.items())]
        parts += [f"[{head}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in rows.items()) for head, rows in tables.items()]
        return "\n".join(parts)

    @staticmethod
    def local(world_size: int, device_name: str, memory_bytes: int, devices_per_node: int | None = None) -> Cluster:
        """The cluster of a running process group: `device_name` is `"cpu"` or what CUDA calls the device, `memory_bytes` what it
        has; of a GPU's some is left to the context. A CUDA device that is in no preset is priced as an A100."""
        per_node = devices_per_node or world_size
        if world_size % per_node:
            per_node = math.gcd(world_size, per_node)
        lowered = device_name.lower()
        key = next((key for key in DEVICES if key in lowered), "a100")
        machine = PRESETS[key]
        usable = memory_bytes if key == "cpu" else int(_USABLE * memory_bytes)
        device = replace(machine.device, name=device_name, memory_bytes=usable)
        local = replace(machine, name=f"local-{key}x{world_size}", device=device, devices_per_node=per_node, nodes=world_size // per_node)
        return _checked(local, "the running process group")


# Memory is the datasheet's decimal size: the card's few per cent beyond it are left to the context, NCCL and fragmentation.
_USABLE = 0.935  # 80e9 bytes of the 81559 MiB that an H100 reports
# Peaks: NVIDIA A100 datasheet (2021), H100 datasheet (2023), H200 datasheet (2024), SXM, dense. float32 is the plain FP32 rate, as
# PyTorch leaves TF32 off for matrix products; float64 is the tensor core rate.
# Efficiencies: large cuBLAS bfloat16 products reach 70 to 80% of the dense peak on these parts, streaming kernels 80 to 90% of
# the bandwidth (Megatron-LM reports whole-model 47 to 57%, Korthikanti et al. 2022, table 5, which includes everything else).
# Launch: the CUDA launch floor is 2 to 4 us, an eager PyTorch operator 5 to 10 us, hidden where the queue is ahead.
_H_PEAKS = (
    ("bfloat16", 989e12), ("float16", 989e12), ("tfloat32", 494e12), ("float32", 67e12), ("float64", 67e12),
)  # fmt: skip
DEVICES = {
    "a100": Device("A100-SXM-80GB", 80_000_000_000, (
        ("bfloat16", 312e12), ("float16", 312e12), ("tfloat32", 156e12), ("float32", 19.5e12), ("float64", 19.5e12),
    ), 2.039e12, 0.7, 0.8, 4e-6),
    "h100": Device("H100-SXM", 80_000_000_000, _H_PEAKS, 3.35e12, 0.7, 0.8, 4e-6),
    "h200": Device("H200-SXM", 141_000_000_000, _H_PEAKS, 4.8e12, 0.7, 0.8, 4e-6),
    # What one of 4 gloo processes has of 2 server cores (AVX-512) that they share, by `benchmarks/calibrate_cpu.py`: products, sums of
    # 4 MiB tensors and small operators of eager PyTorch 2.13, in CPU time, times 2 ranks a core. Measured rates are reached by
    # definition. float64 is half of float32; bfloat16 has no fast path on most. Collectives run on the same cores: none is hidden.
    "cpu": Device("cpu", 8 * 2**30, (
        ("float32", 76e9), ("float64", 38e9), ("bfloat16", 19e9), ("float16", 19e9),
    ), 1e10, 1.0, 1.0, 6.4e-6, 1.0),
}  # fmt: skip

# bytes_per_s is what nccl-tests reports as bus bandwidth of large messages: about 80% of the wire inside a machine (A100 235 GB/s of
# 300, H100 360 GB/s of 450 per direction), 90% of the network cards (DGX A100: 200 Gb/s a GPU, DGX H100 and H200: 400 Gb/s a GPU).
# latency_s is one hop of the ring with the LL128 protocol: table `hwLat` of NCCL's src/graph/tuning.cc, NVLink 1.9 us, network 4 us.
# start_s is its `baseLat` of a ring, 8.4 us (Simple protocol).
# gloo over loopback: by `benchmarks/calibrate_cpu.py`, 4 processes on 2 cores, as the device `cpu`. What it gathers lands in
# new memory, piece by piece, and costs about as much as the all-reduce of as many bytes.
LINKS = {
    "nvlink3": Link("NVLink3", 1.9e-6, 0.78 * 300e9, 8.4e-6),
    "nvlink4": Link("NVLink4", 1.9e-6, 0.80 * 450e9, 8.4e-6),
    "ib200": Link("InfiniBand-200", 4e-6, 0.9 * 25e9, 8.4e-6),
    "ib400": Link("InfiniBand-400", 4e-6, 0.9 * 50e9, 8.4e-6),
    "gloo": Link("gloo-loopback", 65e-6, 0.6e9, 170e-6, 1.8),
}

PRESETS = {
    "a100": Cluster("a100x8", DEVICES["a100"], 8, 1, LINKS["nvlink3"], LINKS["ib200"]),
    "h100": Cluster("h100x8", DEVICES["h100"], 8, 1, LINKS["nvlink4"], LINKS["ib400"]),
    "h200": Cluster("h200x8", DEVICES["h200"], 8, 1, LINKS["nvlink4"], LINKS["ib400"]),
    "cpu": Cluster("cpu:1", DEVICES["cpu"], 1, 1, LINKS["gloo"], LINKS["gloo"]),
}
_KNOWN = "Known: a100x8, h100x8, h200x8 (one machine), h100x8:4 (four), cpu:4 (processes), or the path of a .toml file"


def resolve(cluster: Cluster | str | Path) -> Cluster:
    """A `Cluster` from what a user may give: a cluster, the name of a preset, or the path of a TOML file. Raises `ClusterError`."""
    if isinstance(cluster, Cluster):
        return _checked(cluster, f"cluster `{cluster.name}`")
    if isinstance(cluster, Path) or (isinstance(cluster, str) and cluster.endswith(".toml")):
        return Cluster.from_toml(cluster)
    if isinstance(cluster, str):
        return Cluster.from_name(cluster)
    raise ClusterError(f"a cluster is a Cluster, a name or a path, not {type(cluster).__name__}. {_KNOWN}")


def _toml(value: object) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's for everything a name can hold.
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    return repr(value)


def _read(data: dict[str, Any], where: str) -> Cluster:
    device = _part(data, "device", DEVICES, Device, where)
    intra = _part(data, "intra", LINKS, Link, where)
    inter = _part(data, "inter", LINKS, Link, where, default=intra)
    name = data.get("name", Path(where).stem)
    unknown = set(data) - {field.name for field in fields(Cluster)}
    if unknown or not isinstance(name, str):
        raise ClusterError(
            f"{where}: unknown or wrong {sorted(unknown) or ['name']}; a cluster has {[field.name for field in fields(Cluster)]}"
        )
    imbalance = data.get("expert_imbalance", Cluster.__dataclass_fields__["expert_imbalance"].default)
    return _checked(Cluster(name, device, data.get("devices_per_node", 0), data.get("nodes", 1), intra, inter, imbalance), where)


def _part(data: dict[str, Any], key: str, known: dict[str, Any], kind: type, where: str, default: Any = None) -> Any:
    given = data.get(key, default)
    if isinstance(given, kind):
        return given
    if isinstance(given, str) and given in known:
        return known[given]
    names = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(given, dict) or not needed <= set(given) <= names:
        raise ClusterError(f"{where}: `{key}` must be one of {', '.join(known)} or a table with {', '.join(sorted(names))}")
    if kind is Device:
        if not isinstance(given["flops_per_s"], dict):
            raise ClusterError(f"{where}: `device.flops_per_s` must be a table such as {{bfloat16 = 989e12, float32 = 67e12}}")
        given = {**given, "flops_per_s": tuple(given["flops_per_s"].items())}
    return kind(**given)


def _checked(cluster: Cluster, where: str) -> Cluster:
    """The cluster itself if its numbers make one."""
    device = cluster.device
    counts = {"nodes": cluster.nodes, "devices_per_node": cluster.devices_per_node, "device.memory_bytes": device.memory_bytes}
    for key, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ClusterError(f"{where}: `{key}` is {value!r}; it must be a whole number of at least 1")
    rates: dict[str, Any] = {f"device.flops_per_s.{key}": value for key, value in device.flops_per_s}
    rates |= {f"device.{key}": getattr(device, key) for key in ("memory_bytes_per_s", "flops_efficiency", "bandwidth_efficiency")}
    links: dict[str, Link] = {"intra": cluster.intra, "inter": cluster.inter}
    rates |= {f"{level}.bytes_per_s": link.bytes_per_s for level, link in links.items()}
    rates |= {f"{level}.gather_factor": link.gather_factor for level, link in links.items()}
    times: dict[str, Any] = {"device.launch_s": device.launch_s, "device.felt_share": device.felt_share}
    times |= {f"{level}.{key}": getattr(getattr(cluster, level), key) for level in ("intra", "inter") for key in ("latency_s", "start_s")}
    for key, value in (rates | times).items():
        least = "more than 0" if key in rates else "at least 0"
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (key in rates and value == 0):
            raise ClusterError(f"{where}: `{key}` is {value!r}; it must be a finite number of {least}")
    imbalance = cluster.expert_imbalance
    if not isinstance(imbalance, int | float) or isinstance(imbalance, bool) or not 1.0 <= imbalance < math.inf:
        raise ClusterError(f"{where}: `expert_imbalance` is {imbalance!r}; it must be a finite number of at least 1")
    if not device.flops_per_s:
        raise ClusterError(f"{where}: `device.flops_per_s` is empty; give at least float32")
    return cluster
