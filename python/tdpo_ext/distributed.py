"""The vocabulary sharded over the processes of a group (tensor parallel): what they exchange.

Every process has the same tokens, and of the vocabulary its own part, in the order of ranks.

Forward: one all_gather of each token's record of each part (36 bytes in float32), which every
process then merges in the order of ranks, so that all get the same bits. Reducing would take two
collectives, one after the other, since sums are relative to maxima that have to be agreed on first.

Backward: nothing for logits, since forward has left every process all it needs. For a head one
all_reduce, of the gradient of the hidden states, to which every part contributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tdpo_ext.checks import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORED = -(2**63)
"""What stands for ``ignore_index`` in labels that count from a part's first entry."""


class Shard(NamedTuple):
    """A process's part of the vocabulary; plain values, since ops take it apart."""

    group: str
    start: int
    """The id of its first entry."""
    total: int
    """Entries of the whole vocabulary."""

    @property
    def process_group(self) -> ProcessGroup:
        registry: Any = dist.distributed_c10d
        group: ProcessGroup = registry._resolve_process_group(self.group)
        return group

    @property
    def size(self) -> int:
        return dist.get_world_size(self.process_group)

    @property
    def widest(self) -> int:
        """Entries of the largest part."""
        return -(-self.total // self.size)

    def own_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels that count from the part's first entry; those of other parts lie outside it."""
        own = labels.to(torch.int64) - self.start
        return own.masked_fill(labels == ignore_index, IGNORED)


def shard_of(process_group: ProcessGroup | None, width: int) -> Shard | None:
    """Of parts that are all as wide as this one, which ``gather_records`` checks."""
    if process_group is None:
        return None
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    return Shard(process_group.group_name, rank * width, size * width)


# --- collectives ----------------------------------------------------------------------------------


def _all_gather(tensor: Tensor, shard: Shard) -> Tensor:
    """``[size, ...]``"""
    gathered = tensor.new_empty((shard.size, *tensor.shape))
    flat = gathered.flatten(0, 1)  # gloo takes no other shape
    gather = getattr(dist, "all_gather_single", None)  # the name since PyTorch 2.13
    gather = gather or dist.all_gather_into_tensor
    gather(flat, tensor.contiguous(), group=shard.process_group)
    return gathered


def _all_reduce(tensor: Tensor, shard: Shard) -> None:
    dist.all_reduce(tensor, group=shard.process_group)


_LOW = 4096  # a float32 holds a width in two halves exactly


def _header(records: Tensor, labels: Tensor, width: int, start: int) -> Tensor:
    """What every process has to agree on, as one more record: how wide its part is and where it
    starts, and a sum over the labels in which their places count."""
    place = torch.arange(labels.numel(), device=labels.device) % 251 + 1
    checksum = (labels.reshape(-1) * place).sum() % 2**24
    header = records.new_zeros(records.shape[-1])
    header[0], header[1] = width // _LOW, width % _LOW
    header[2], header[3] = start // _LOW, start % _LOW
    header[4] = checksum
    return header


def gather_records(
    records: Tensor, labels: Tensor, width: int, shard: Shard
) -> tuple[Tensor, Tensor]:
    """The one collective of forward.

    Args:
        records: ``[N, 9]``, of this process's part.
        labels: ``[...]`` of N tokens, global ids.
        width: of this process's part.

    Returns:
        ``[size, N + 1, 9]``, the last row of each no record, and whether the processes agree on
        labels and parts, 0-d. On the CPU they do, or ValueError is raised.
    """
    header = _header(records, labels, width, shard.start)
    gathered = _all_gather(torch.cat([records, header[None]]), shard)
    headers = gathered[:, -1].long()
    widths, starts = (headers[:, at] * _LOW + headers[:, at + 1] for at in (0, 2))
    checksums = headers[:, 4]
    # Of all parts, not of this one: where one process sees a fault every process has to.
    same_parts = (widths.sum() == shard.total) & (widths.cumsum(0) - widths == starts).all()
    same_labels = (checksums == checksums[0]).all()
    if records.device.type == "cpu":
        if not same_parts:
            raise ValueError(
                "the shards of process_group must be equally wide, got vocabularies of "
                f"{widths.tolist()}; pad them with -inf, or pass DTensors sharded on the "
                "vocabulary, which know where each begins"
            )
        if not same_labels:
            raise ValueError(
                "labels must be the same on all processes of process_group, which share the "
                "vocabulary, not the tokens; got different ones"
            )
    return gathered, same_parts & same_labels


def gather_logits(logits: Tensor, shard: Shard) -> Tensor:
    """``[..., V]`` from parts, for plain PyTorch."""
    missing = shard.widest - logits.shape[-1]
    parts = _all_gather(torch.nn.functional.pad(logits, (0, missing)), shard)
    return torch.cat([*parts], dim=-1)[..., : shard.total]


def sum_gradient(gradient: Tensor, shard: Shard) -> None:
    """The one collective of a head's backward, in place."""
    _all_reduce(gradient, shard)


# --- DTensors -------------------------------------------------------------------------------------


def local_logits(
    policy_logits: Tensor, reference_logits: Tensor, *labels: Tensor | None, process_group: Any
) -> tuple[Any, ...]:
    """Policy, reference and labels, of DTensors sharded on the vocabulary this process's parts,
    others as they are; and its ``Shard``, if they are DTensors."""
    given = {"policy_logits": policy_logits, "reference_logits": reference_logits}
    if not any(map(is_dtensor, given.values())):
        return policy_logits, reference_logits, *labels, None
    shard = _common_shard(given, process_group, dim=-1)
    policy, reference = map(_local_shard, given.values())
    return policy, reference, *(local_labels(x, policy_logits) for x in labels), shard


def local_head(
    which: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Shard | None]:
    """A head whose weight is a DTensor sharded on the vocabulary -> this process's part of it."""
    if not is_dtensor(weight):
        for name, value in ((f"{which}_hidden", hidden), (f"{which}_bias", bias)):
            if is_dtensor(value):
                raise ValueError(
                    f"{name} is a DTensor and {which}_weight is not; make {which}_weight one, "
                    f"sharded on dimension 0, or pass {name}.full_tensor()"
                )
        return (hidden, weight, bias), None
    given = {f"{which}_weight": weight}
    if bias is not None:
        given[f"{which}_bias"] = bias
    shard = _common_shard(given, process_group, dim=0)
    own_bias = None if bias is None else _local_shard(bias)
    states = _replicated(f"{which}_hidden", hidden, weight)
    return (states, _local_shard(weight), own_bias), shard


def _common_shard(given: dict[str, Any], process_group: Any, dim: int) -> Shard:
    """The part of their vocabulary, dimension ``dim``, that this process has of DTensors."""
    if process_group is not None:
        raise ValueError(
            "process_group and DTensors were both given; a DTensor knows its processes: leave "
            "process_group out, or pass .to_local()"
        )
    first = next(name for name, value in given.items() if is_dtensor(value))
    layout = given[first].device_mesh, given[first].placements
    for name, value in given.items():
        if not is_dtensor(value):
            raise ValueError(
                f"{name} must be a DTensor like {first}, or both plain tensors, got a "
                f"{type(value).__name__}; DTensor.from_local makes one"
            )
        if (value.device_mesh, value.placements) != layout:
            raise ValueError(
                f"{name} must be placed like {first} ({layout[1]}), got {value.placements}; "
                "redistribute it"
            )
    return _shard_of_dtensor(first, given[first], dim)


def _shard_of_dtensor(name: str, tensor: Any, dim: int) -> Shard:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardPlacement

    dim %= tensor.dim()
    sharded = [
        number
        for number, placement in enumerate(tensor.placements)
        if not isinstance(placement, Replicate)
    ]
    wanted = ShardPlacement(dim)
    if len(sharded) != 1 or tensor.placements[sharded[0]] != wanted:
        raise ValueError(
            f"{name} must be a DTensor sharded on the vocabulary, dimension {dim}, over one "
            f"dimension of its mesh and replicated over the others, got {tensor.placements}; "
            "redistribute it, or pass .to_local() with process_group"
        )
    mesh, total = tensor.device_mesh, tensor.shape[dim]
    size, rank = mesh.size(sharded[0]), mesh.get_local_rank(sharded[0])
    widest = -(-total // size)
    if (size - 1) * widest >= total:
        raise ValueError(
            f"{name} has a vocabulary of {total}, which leaves some of {size} processes without "
            "an entry; shard it over fewer"
        )
    return Shard(mesh.get_group(sharded[0]).group_name, rank * widest, total)


def _local_shard(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local(grad_placements=tensor.placements)
    return local


def _replicated(name: str, value: Any, like: Any) -> Tensor:
    """The whole of a DTensor that all processes of a sharded head have."""
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    if not is_dtensor(value) or value.device_mesh != mesh or [*value.placements] != everywhere:
        got = f"{value.placements}" if is_dtensor(value) else f"a {type(value).__name__}"
        raise ValueError(
            f"the head's weight is a DTensor sharded on the vocabulary, so {name} must be one "
            f"replicated over the same mesh, got {got}; if every process has the same tokens, "
            f"DTensor.from_local({name}, mesh, [Replicate()]) says so. If each has its own (FSDP), "
            "use attach_tdpo, or weight.full_tensor(grad_placements=[Partial('avg')])"
        )
    local: Tensor = value.to_local(grad_placements=everywhere)
    return local


def local_labels(labels: Any, like: Any) -> Any:
    """Labels that may be a DTensor, replicated over the mesh of what they label."""
    return _replicated("labels", labels, like) if is_dtensor(labels) else labels
