"""Repairs what `torch.distributed.checkpoint` does with DTensors that are split in blocks (`S(d, b)`, PyTorch's `_StridedShard`).

PyTorch 2.13 describes a rank's part of a DTensor by one offset and one size. A part of a tensor split in blocks is several boxes, and
saving one, or loading a whole tensor into one, silently takes the wrong elements (fused query-key-value weights under tensor
parallelism). Here DTensor's own checkpoint protocol, and the helper that cuts whole tensors on load, are taught to list all boxes.
Parameters, gradients and the states of any optimizer are thereby saved, loaded and resharded like all others, without any
communication. DTensors whose part is one box go PyTorch's own way.

`install` is called when the runtime is imported. Should PyTorch describe such parts itself, `tests/runtime/test_checkpoint.py` passes
without it, and this file can go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._state_dict_utils as state_dict_utils
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from autopar.runtime.state.shards import chunks, coordinate_of, local_part, state_of

_Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # global offset, local offset, lengths


def boxes(tensor: DTensor) -> list[_Box] | None:
    """The boxes of elements that this rank holds, where they are several; None where one offset and one size say it all."""
    state = state_of(tensor)
    if state is None or not any(placement.is_shard and placement.blocks > 1 for placement in state):
        return None
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:
        return None
    found = list(chunks(tensor.shape, state, mesh.shape, coordinate_of(mesh)))
    return found if len(found) > 1 else None


def _write_items(original: Callable[..., Any]) -> Callable[..., Any]:
    def write_items(self: DTensor, fqn: str, object: Any) -> Any:
        found = boxes(self)
        if found is None:
            return original(self, fqn, object)
        properties = TensorProperties.create_from_tensor(self.to_local())
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(lengths)),
                    properties=properties,
                    size=self.size(),
                ),
            )
            for offset, _, lengths in found
        ]

    return write_items


def _chunk_list(original: Callable[..., Any]) -> Callable[..., Any]:
    def chunk_list(self: DTensor) -> Any:
        found = boxes(self)
        if found is None:
            return original(self)
        return [ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(lengths)) for offset, _, lengths in found]

    return chunk_list


def _tensor_shard(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_shard(self: DTensor, index: MetadataIndex) -> Any:
        found = boxes(self)
        if found is None:
            return original(self, index)
        [(local, lengths)] = [(local, lengths) for offset, local, lengths in found if torch.Size(offset) == index.offset]
        view: Tensor = self.to_local()
        for dim, (start, length) in enumerate(zip(local, lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    return tensor_shard


def _distribute_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    def distribute_tensors(local_state_dict: dict[str, Any], keys: list[str], *args: Any, **kwargs: Any) -> None:
        rest = []
        for key in keys:
            entry = local_state_dict.get(key)
            if not isinstance(entry, tuple) or not isinstance(entry[0], DTensor) or entry[0].is_meta or boxes(entry[0]) is None:
                rest.append(key)
                continue
            target, whole = entry
            state = state_of(target)
            assert state is not None
            mesh = target.device_mesh
            target.to_local().copy_(local_part(whole, state, mesh.shape, coordinate_of(mesh)))
            local_state_dict[key] = target
        original(local_state_dict, rest, *args, **kwargs)

    return distribute_tensors


def install() -> None:
    """Put the repairs in place; once, however often it is called."""
    if getattr(DTensor, "_autopar_boxes", False):
        return
    for name, repair in (
        ("__create_write_items__", _write_items),
        ("__create_chunk_list__", _chunk_list),
        ("__get_tensor_shard__", _tensor_shard),
    ):
        setattr(DTensor, name, repair(getattr(DTensor, name)))
    state_dict_utils._distribute_tensors = _distribute_tensors(state_dict_utils._distribute_tensors)
    DTensor._autopar_boxes = True  # type: ignore[attr-defined]
