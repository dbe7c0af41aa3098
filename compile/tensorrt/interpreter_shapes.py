"""Layers that move values and compute shapes: gather, scatter, slice, shuffle and the like.

An index outside its dimension is an error here. A device reads or writes other memory then.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from headrace.compile.tensorrt.interpreter_layers import Compute, Site


def _in_range(indices: Tensor, size: int, name: str) -> Tensor:
    """Indices as int64.

    Raises:
        IndexError: one is negative, or not below `size`.
    """
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(
            f"{name} has indices {int(indices.min())} to {int(indices.max())} into {size} places"
        )
    return indices.long()


def gather(site: Site) -> Compute:
    layer, name = site.layer, site.layer.name
    axis, batch = layer.axis, layer.num_elementwise_dims

    def default(data: Tensor, indices: Tensor) -> Tensor:
        chosen = _in_range(indices, data.shape[axis], name)
        if batch:
            each = [
                torch.index_select(data[b], axis - 1, row.reshape(-1))
                for b, row in enumerate(chosen)
            ]
            found = torch.stack(each)
            return found.reshape(*data.shape[:axis], *indices.shape[1:], *data.shape[axis + 1 :])
        found = torch.index_select(data, axis, chosen.reshape(-1))
        return found.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])

    def element(data: Tensor, indices: Tensor) -> Tensor:
        return torch.gather(data, axis, _in_range(indices, data.shape[axis], name))

    def nd(data: Tensor, indices: Tensor) -> Tensor:
        return data[_nd_index(data.shape, indices, batch, name)]

    return {"DEFAULT": default, "ELEMENT": element, "ND": nd}[layer.mode.name]


def _nd_index(shape: Sequence[int], indices: Tensor, batch: int, name: str) -> tuple[Tensor, ...]:
    """The index tensors of indices [*batch dims, .., K]: one for each of batch + K dimensions."""
    rank = indices.ndim - 1
    leading: list[Tensor] = []
    for dim in range(batch):
        places = [1] * rank
        places[dim] = -1
        leading.append(torch.arange(shape[dim]).reshape(places))
    tail = [_in_range(indices[..., k], shape[batch + k], name) for k in range(indices.shape[-1])]
    return (*leading, *tail)


def scatter(site: Site) -> Compute:
    layer, name, axis = site.layer, site.layer.name, site.layer.axis

    def element(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return torch.scatter(data, axis, _in_range(indices, data.shape[axis], name), updates)

    def nd(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        out = data.clone()
        out[_nd_index(data.shape, indices, 0, name)] = updates
        return out

    return {"ELEMENT": element, "ND": nd}[layer.mode.name]


def slice_(site: Site) -> Compute:
    layer = site.layer
    if layer.mode.name not in {"STRICT_BOUNDS", "FILL"}:
        raise site.refuse(f"the mode {layer.mode.name}")
    start, size, stride, axes = (
        None if each is None else [int(value) for value in each]
        for each in (layer.start, layer.shape, layer.stride, layer.axes)
    )
    fills = layer.mode.name == "FILL"

    def compute(x: Tensor, *given: Tensor | None) -> Tensor:
        dynamic = [None if each is None else each.tolist() for each in given]
        first, sizes, steps, _, dims = (
            dynamic[index] if index < len(dynamic) and dynamic[index] is not None else known
            for index, known in enumerate((start, size, stride, None, axes))
        )
        assert first is not None
        assert sizes is not None
        assert steps is not None
        fill = given[3] if len(given) > 3 else None
        for dim, at, count, step in zip(
            range(x.ndim) if dims is None else dims, first, sizes, steps, strict=True
        ):
            x = _sliced(x, dim, torch.arange(count) * step + at, fill, fills, layer.name)
        return x

    return compute


def _sliced(
    x: Tensor, dim: int, places: Tensor, fill: Tensor | None, fills: bool, name: str
) -> Tensor:
    if not fills:
        return torch.index_select(x, dim, _in_range(places, x.shape[dim], name))
    inside = (places >= 0) & (places < x.shape[dim])
    shape = [1] * x.ndim
    shape[dim] = -1
    found = torch.index_select(x, dim, places.clamp(0, x.shape[dim] - 1))
    value = torch.zeros((), dtype=x.dtype) if fill is None else fill.reshape(())
    return torch.where(inside.reshape(shape), found, value)


def shuffle(site: Site) -> Compute:
    """Transpose, reshape, transpose."""
    layer = site.layer
    before, after = list(layer.first_transpose), list(layer.second_transpose)
    moves_before, moves_after = before != sorted(before), after != sorted(after)
    stated = None if layer.reshape_dims is None else [int(size) for size in layer.reshape_dims]
    copies_zeros = layer.zero_is_placeholder

    def compute(x: Tensor, sizes: Tensor | None = None) -> Tensor:
        if moves_before:
            x = x.permute(before[: x.ndim])
        wanted = stated if sizes is None else sizes.tolist()
        if wanted is not None:
            if copies_zeros:
                wanted = [size or x.shape[dim] for dim, size in enumerate(wanted)]
            x = x.reshape(wanted)
        return x.permute(after[: x.ndim]) if moves_after else x

    return compute


def concatenation(site: Site) -> Compute:
    axis = site.layer.axis
    return lambda *inputs: torch.cat(inputs, axis)


def shape(site: Site) -> Compute:
    del site
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def fill(site: Site) -> Compute:
    """Sum alpha and, over dimensions, beta times the index there."""
    layer, (wanted,) = site.layer, site.types
    if layer.operation.name != "LINSPACE":
        raise site.refuse(f"the operation {layer.operation.name}")
    sizes, alpha, beta = tuple(layer.shape), layer.alpha, layer.beta

    def compute(
        dims: Tensor | None = None, first: Tensor | None = None, step: Tensor | None = None
    ) -> Tensor:
        whole = sizes if dims is None else dims.tolist()
        steps = [beta] if step is None else step.reshape(-1).tolist()
        out = torch.full(whole, alpha if first is None else first.item(), dtype=wanted)
        for dim, (size, each) in enumerate(zip(whole, steps, strict=True)):
            places = [1] * len(whole)
            places[dim] = -1
            out = out + (torch.arange(size) * each).to(wanted).reshape(places)
        return out

    return compute


def one_hot(site: Site) -> Compute:
    axis = site.layer.axis

    def compute(indices: Tensor, values: Tensor, depth: Tensor) -> Tensor:
        chosen = _in_range(indices, int(depth), site.layer.name)
        off, on = values
        hot = chosen.unsqueeze(-1) == torch.arange(int(depth))
        return torch.where(hot, on, off).movedim(-1, axis)

    return compute


def non_zero(site: Site) -> Compute:
    (wanted,) = site.types
    return lambda x: torch.nonzero(x).T.to(wanted)


def squeeze(site: Site) -> Compute:
    static = [dim for dim, size in enumerate(site.layer.get_input(0).shape) if size == 1]

    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        return torch.squeeze(x, static if axes is None else axes.tolist())

    return compute


def unsqueeze(site: Site) -> Compute:
    def compute(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(int(axis) % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    del site
    return compute


SHAPES: Mapping[str, Callable[[Site], Compute]] = {
    "CONCATENATION": concatenation,
    "FILL": fill,
    "GATHER": gather,
    "NON_ZERO": non_zero,
    "ONE_HOT": one_hot,
    "SCATTER": scatter,
    "SHAPE": shape,
    "SHUFFLE": shuffle,
    "SLICE": slice_,
    "SQUEEZE": squeeze,
    "UNSQUEEZE": unsqueeze,
}
