"""Define vmap of the operators: the batch that is mapped over joins a dimension of the tensors.

The mapped batch joins the batch of dense and padded tensors, the heads of packed ones. A tensor
that is not mapped is expanded, not copied, where the tensors' own batch is 1. Where a tensor has no
room for a batch (the lengths of packed sequences, which all heads share), samples are computed one
after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flashcore.problem.options import Results

# Of each input and result: the dimension that the batch joins, in front; "mask" for up to four
# dimensions that broadcast, of which the first is joined; None: there is none.
Places = Mapping[str, int | Literal["mask"] | None]
Dims = Mapping[str, int | None]


def forward_over_batch(
    operator: Any,
    places: Places,
    n: int,
    dims: Dims,
    inputs: Mapping[str, Any],
    rest: tuple[Any, ...],
    wanted: Sequence[str],
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Call a forward operator over a batch.

    Args:
        operator: takes the inputs, then the rest.
        places: where the batch joins the inputs and the results.
        n: size of the batch.
        dims: of the inputs, the dimension that is mapped over, or None.
        inputs: by name, in the operator's order.
        rest: its other arguments.
        wanted: names of the results that have elements.

    Returns:
        The results, and for each the dimension that is the batch.
    """
    if not _all_join(places, dims):
        return _one_by_one(operator, n, dims, inputs, rest)
    results = operator(*_joined(places, n, dims, inputs), *rest)
    pairs = [
        _split(x, places[name], n) if name in wanted else (x, None)
        for name, x in zip(Results._fields, results, strict=True)
    ]
    return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


def backward_over_batch(
    operator: Any,
    places: Places,
    n: int,
    dims: Dims,
    tensors: Mapping[str, Any],
    rest: tuple[Any, ...],
    needed: Mapping[str, bool],
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Call a backward operator over a batch. Each of the batch has its own gradient of an input
    that all of them share.

    Args:
        operator: takes the tensors, then the rest.
        places: where the batch joins inputs and results; a gradient has the place of its tensor.
        n: size of the batch.
        dims: of the tensors, the dimension that is mapped over, or None.
        tensors: gradients that arrive (named dout, dlse), inputs and results, in the operator's
            order.
        rest: its other arguments.
        needed: of each input with a gradient, in the operator's order, whether it is asked for.

    Returns:
        The gradients, and for each the dimension that is the batch.
    """
    places = {**places, **{f"d{name}": places[name] for name in Results._fields}}
    shared = any(need and places[name] is None for name, need in needed.items())
    if shared or not _all_join(places, dims):
        return _one_by_one(operator, n, dims, tensors, rest)
    gradients = operator(*_joined(places, n, dims, tensors), *rest)
    pairs: list[tuple[Tensor, int | None]] = []
    for (name, need), x in zip(needed.items(), gradients, strict=True):
        if not need or tensors[name] is None:
            pairs.append((x, None))
        elif places[name] == "mask":
            pairs.append((_split_mask(x, tensors[name], dims[name], n), 0))
        else:
            pairs.append(_split(x, places[name], n))
    return tuple(x for x, _ in pairs), tuple(dim for _, dim in pairs)


def _all_join(places: Places, dims: Dims) -> bool:
    """Return whether every tensor that is mapped over has a place for the batch."""
    return all(dim is None or places.get(name) is not None for name, dim in dims.items())


def _joined(places: Places, n: int, dims: Dims, tensors: Mapping[str, Any]) -> list[Any]:
    """Join the batch that vmap maps over and what the tensors have at its place into one."""
    batch = tensors["q"].shape[1 if dims["q"] == 0 else 0]
    joined = []
    for name, x in tensors.items():
        place = places.get(name)
        if not isinstance(x, Tensor) or place is None:
            joined.append(x)
            continue
        dim = dims[name]
        x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
        if place == "mask":
            x = x.reshape(n, *(1,) * (5 - x.dim()), *x.shape[1:])
            joined.append(x.expand(n, batch, *x.shape[2:]).flatten(0, 1))
        else:
            x = x.movedim(0, place).flatten(place, place + 1)
            joined.append(x.contiguous() if x.dim() == 1 else x)  # as lengths must be
    return joined


def _split(x: Tensor, place: Any, n: int) -> tuple[Tensor, int]:
    """Return a result as the batch and what it joined, and where the batch is."""
    return x.unflatten(place, (n, x.shape[place] // n)), place


def _split_mask(gradient: Tensor, mask: Tensor, dim: int | None, n: int) -> Tensor:
    """Return each sample's gradient of a mask, of the mask's own shape, behind the batch."""
    shape = list(mask.shape)
    if dim is not None:
        del shape[dim]
    gradient = gradient.unflatten(0, (n, gradient.shape[0] // n))
    if len(shape) < 4 or shape[0] == 1:  # broadcast over the batch
        gradient = gradient.sum(1, keepdim=True)
    return gradient.reshape(n, *shape)


def _one_by_one(
    operator: Any, n: int, dims: Dims, tensors: Mapping[str, Any], rest: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    def sample(name: str, i: int) -> Any:
        dim = dims[name]
        return tensors[name] if dim is None else tensors[name].select(dim, i).contiguous()

    samples = [operator(*(sample(name, i) for name in tensors), *rest) for i in range(n)]
    results = tuple(torch.stack(x) for x in zip(*samples, strict=True))
    return results, (0,) * len(results)
