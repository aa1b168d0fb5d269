"""Tensor parallelism: the vocabulary sharded over the processes of a group.

Every process has the same tokens and its own part of the vocabulary; parts follow the ranks.

Forward sends one all_gather. Each process sends its record of each token (the running maxima and
sums over its part of the vocabulary, 36 bytes in float32), and each merges all records in the order
of ranks, so all get the same bits. A reduction would take two collectives in sequence, since the
sums are relative to maxima that all processes must know first.

Backward sends nothing for logits, since forward leaves every process all it needs. For a head it
sends one all_reduce: every part contributes to the gradient of the hidden states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORED = -(2**63)
"""The value that replaces ``ignore_index`` in labels that count from a part's first entry.

``ignore_index`` itself may be such a label; this value cannot.
"""


class Shard(NamedTuple):
    """A process's part of the vocabulary. Its fields are arguments of ops, so they are plain."""

    group: str
    """The name of the process group."""
    start: int
    """The id of the part's first vocabulary entry."""
    total: int
    """The number of entries of the whole vocabulary."""

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
        """The number of entries of the largest part."""
        return -(-self.total // self.size)

    def own_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels counted from the part's first entry.

        Labels of other parts lie outside [0, width of this part); ignored ones become ``IGNORED``.
        """
        labels = labels.to(torch.int64)  # int32 would be compared with half of ignore_index
        return (labels - self.start).masked_fill(labels == ignore_index, IGNORED)


def shard_of(process_group: ProcessGroup | None, width: int) -> Shard | None:
    """This process's part, if all parts are ``width`` wide, which ``gather_records`` checks."""
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
    """The tensors of all processes, ``[size, ...]``."""
    gathered = tensor.new_empty((shard.size, *tensor.shape))
    flat = gathered.flatten(0, 1)  # gloo takes no other shape
    gather = getattr(dist, "all_gather_single", None)  # the name since PyTorch 2.13
    gather = gather or dist.all_gather_into_tensor
    gather(flat, tensor.contiguous(), group=shard.process_group)
    return gathered


def _all_reduce(tensor: Tensor, shard: Shard) -> None:
    dist.all_reduce(tensor, group=shard.process_group)


_LOW = 4096  # float32 holds both halves of a width exactly: width // _LOW and width % _LOW


def _header(records: Tensor, labels: Tensor, width: int, start: int) -> Tensor:
    """One more record, with what the processes must agree on.

    It holds the width and the start of this process's part, and a checksum of the labels, each
    weighted by its position.
    """
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
    """The records of all processes, by the one collective of forward.

    Args:
        records: ``[N, 9]``, this process's.
        labels: N global ids, of any shape.
        width: the number of vocabulary entries of this process's part.
        shard: this process's part.

    Returns:
        The records, ``[size, N + 1, 9]``, where the last row of each process is its header; and a
        0-d bool tensor: whether the processes agree on labels and parts.

    Raises:
        ValueError: on the CPU, the processes do not agree.
    """
    header = _header(records, labels, width, shard.start)
    gathered = _all_gather(torch.cat([records, header[None]]), shard)
    headers = gathered[:, -1].long()
    widths, starts = (headers[:, at] * _LOW + headers[:, at + 1] for at in (0, 2))
    checksums = headers[:, 4]
    # The check compares all parts, not this one with the others: every process finds the same.
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
    """Logits of the whole vocabulary from the parts of all processes, for plain PyTorch."""
    missing = shard.widest - logits.shape[-1]
    parts = _all_gather(torch.nn.functional.pad(logits, (0, missing)), shard)
    return torch.cat([*parts], dim=-1)[..., : shard.total]


def sum_gradient(gradient: Tensor, shard: Shard) -> None:
    """Sum a gradient over the processes, in place: the one collective of a head's backward."""
    _all_reduce(gradient, shard)


# --- DTensors -------------------------------------------------------------------------------------


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor. DTensor itself is not imported, since that takes long."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def local_logits(
    policy_logits: Tensor, reference_logits: Tensor, *labels: Tensor | None, process_group: Any
) -> tuple[Any, ...]:
    """The parts of this process, if the logits are DTensors sharded on the vocabulary.

    Returns policy, reference, labels and the process's ``Shard``; plain tensors come back as they
    are, with None for the shard.
    """
    given = {"policy_logits": policy_logits, "reference_logits": reference_logits}
    if not any(map(is_dtensor, given.values())):
        return policy_logits, reference_logits, *labels, None
    shard = _common_shard(given, process_group, dim=-1)
    policy, reference = map(_local_shard, given.values())
    return policy, reference, *(local_labels(x, policy_logits) for x in labels), shard


def local_head(
    which: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Shard | None]:
    """This process's part of a head, if its weight is a DTensor sharded on the vocabulary.

    Returns (hidden states, weight, bias) and the process's ``Shard``; a head of plain tensors comes
    back as it is, with None for the shard.
    """
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
    """This process's part of DTensors that must all be sharded alike on dimension ``dim``."""
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
    """The local tensor of a DTensor that must be replicated over the mesh of ``like``."""
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
    """Labels as a plain tensor; a DTensor must be replicated over the mesh of ``like``."""
    return _replicated("labels", labels, like) if is_dtensor(labels) else labels
