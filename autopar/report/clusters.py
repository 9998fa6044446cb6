"""The presets of clusters: `autopar clusters`."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from autopar.ir import units
from autopar.ir.cluster import PRESETS
from autopar.report.terminal import heading, table


def clusters(console: Console) -> None:
    """Print each preset with the numbers that plans are priced by."""
    console.print(heading("clusters", "one machine each; `h100x8:4` is four of them, `cpu:4` four processes"))
    figures = ("memory", "bfloat16", "float32", "memory speed")
    devices, links = table("name", "device", *figures, right=figures), table("name", "inside a machine", "between machines")
    for cluster in PRESETS.values():
        device = cluster.device
        peaks = dict(device.flops_per_s)
        rates = [f"{peaks[dtype] / 1e12:g} TFLOP/s" if dtype in peaks else "" for dtype in ("bfloat16", "float32")]
        speed = f"{device.memory_bytes_per_s / 1e12:.3g} TB/s"
        devices.add_row(cluster.name, device.name, units.size(device.memory_bytes), *rates, speed)
        links.add_row(cluster.name, *(f"{link.name} {link.bytes_per_s / 1e9:.3g} GB/s" for link in (cluster.intra, cluster.inter)))
    console.print(devices)
    console.print()
    console.print(links)
    console.print(Text("Parts and multiples: h100x2, h100x16. Or the path of a .toml file; `Cluster.to_toml` writes one.", style="dim"))
