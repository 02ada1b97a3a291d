"""Nested data: where its examples are, and how they are cut out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Data = Any  # nested tuples, lists and dicts of tensors
Path = tuple[Any, ...]  # keys and indices from the data to an entry
WHOLE = (str, bytes, Number, type(None))  # belong to the whole batch, outside a list of examples


@dataclass(frozen=True)
class Examples:
    """Where the examples of nested data are: in the first dimension of every tensor, and in some lists.

    Attributes:
        n: the number of examples.
        lists: the paths of the lists, or tuples, that hold one item an example.
    """

    n: int
    lists: frozenset[Path] = frozenset()

    @classmethod
    def of(cls, data: Data) -> Examples:
        """Find the examples.

        Tensors have one row an example; those of no dimension, numbers, texts and ``None`` belong to the whole batch. A
        list (or tuple) inside the data holds such entries too, or else one item an example: images of several sizes,
        texts. A list of dicts with equal keys has one item an example, so a list of samples may be the whole data; a
        list of tensors beside a list of items that hold tensors is read alike.

        Raises:
            TypeError: an entry cannot be cut; the message has its path.
            ValueError: there is no example, or the entries differ in their number of examples.
        """
        n = _rows_of_tensors(data)
        if n:  # the usual, in no time
            return cls(n)
        first: Exception | None = None
        for n in dict.fromkeys(_candidates(data)):
            try:
                return _Reader(n).examples(data)
            except (TypeError, ValueError) as error:
                first = first or error
        if first is None:
            with suppress(ValueError):
                _Reader(-1).examples(data)  # names an entry that cannot be cut
            first = ValueError("data must hold tensors with a common first dimension, one row an example, got none")
        raise first

    def cut(self, data: Data, index: slice | Tensor) -> Data:
        """Return the examples of a slice, or those with these indices, shape ``(k,)``."""
        if not self.lists:
            return mapped(lambda t: _rows(t, index), data)
        return self._cut(data, index, ())

    def _cut(self, data: Data, index: slice | Tensor, path: Path) -> Data:
        if path in self.lists:
            items = data[index] if isinstance(index, slice) else [data[i] for i in index.tolist()]
            return type(data)(items)
        if isinstance(data, Tensor):
            return _rows(data, index)
        return _rebuilt(data, lambda key, value: self._cut(value, index, (*path, key)))


class _Reader:
    """Reads nested data as ``n`` examples."""

    def __init__(self, n: int) -> None:
        self.n, self.lists = n, set[Path]()
        self.ragged = False  # whether a list of examples holds tensors: then lists of tensors are read alike

    def examples(self, data: Data) -> Examples:
        if self.n == 0:
            raise ValueError("data must hold at least one example, got 0")
        self.read(data, ())
        if self.ragged:
            self.read(data, ())
        return Examples(self.n, frozenset(self.lists))

    def read(self, data: Data, path: Path) -> None:
        if isinstance(data, WHOLE) or (isinstance(data, Tensor) and not data.dim()):
            return
        if isinstance(data, Tensor):
            if data.is_nested:
                raise TypeError(f"{named(path)} cannot be cut into examples: it is a nested tensor; pass padded rows")
            if data.shape[0] != self.n:
                raise ValueError(
                    "data must hold tensors with a common first dimension, one row an example: "
                    f"{named(path)} has shape {tuple(data.shape)}, for {self.n} examples"
                )
        elif _is_sequence(data):
            self._read_sequence(data, path)
        elif isinstance(data, Mapping) or _is_named(data):
            for key, value in _items(data):
                self.read(value, (*path, key))
        else:
            raise TypeError(
                "data must be a nested tuple, list or dict of tensors, or of lists with one item an example: "
                f"{named(path)}, of type {type(data).__name__}, cannot be cut into examples"
            )

    def _read_sequence(self, data: list[Any] | tuple[Any, ...], path: Path) -> None:
        holds = any(True for _ in leaves(data))
        records = len(data) == self.n and (_alike(data) or (self.ragged and bool(path)))
        why = self._cannot_hold_rows(data, path) if holds and not records else None
        if holds and not records and why is None:
            return
        if len(data) == self.n and (path or records):
            self.lists.add(path)
            self.ragged |= holds
            return
        raise why or ValueError(
            f"{named(path)} must have one item an example, or hold tensors: it has {len(data)} items, for {self.n} "
            "examples; what belongs to the whole batch goes into the loss function"
        )

    def _cannot_hold_rows(self, data: list[Any] | tuple[Any, ...], path: Path) -> Exception | None:
        """Read a list as one that holds nested data; return what is against it."""
        before = set(self.lists)
        try:
            for key, value in _items(data):
                self.read(value, (*path, key))
        except (TypeError, ValueError) as error:
            self.lists = before
            return error
        return None


def _rows_of_tensors(data: Data) -> int:
    """Return the first dimension of plain tensors in one tuple, list or dict, where it is the same; else 0."""
    n = 0
    for t in data.values() if type(data) is dict else data if type(data) in (list, tuple) else ():
        if type(t) is not Tensor or not t.dim() or t.is_nested or t.shape[0] != (n or t.shape[0]):
            return 0
        n = t.shape[0]
    return n


def _candidates(data: Data) -> Iterator[int]:
    """Yield the possible numbers of examples, the likeliest first."""
    lists = list(_sequences(data, ()))
    yield from (len(s) for path, s in lists if _alike(s))
    yield from (t.shape[0] for t in leaves(data) if t.dim())
    yield from (len(s) for path, s in lists if path)


def _sequences(data: Data, path: Path) -> Iterator[tuple[Path, list[Any] | tuple[Any, ...]]]:
    if _is_sequence(data):
        yield path, data
    if not isinstance(data, Tensor):
        for key, value in _items(data):
            yield from _sequences(value, (*path, key))


def _alike(data: list[Any] | tuple[Any, ...]) -> bool:
    """Tell whether a list holds dicts with the same keys: records of examples, not inputs and targets."""
    return bool(data) and all(isinstance(d, Mapping) and d.keys() == data[0].keys() for d in data)


def _is_named(data: Data) -> bool:
    return isinstance(data, tuple) and hasattr(data, "_fields") and not isinstance(data, PackedSequence)


def _is_sequence(data: Data) -> bool:
    return isinstance(data, list | tuple) and not hasattr(data, "_fields")


def _items(data: Data) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a dict, list or tuple, each with its key or index; of anything else nothing."""
    if isinstance(data, Mapping):
        return data.items()
    if _is_named(data):
        return zip(data._fields, data, strict=True)
    return enumerate(data) if _is_sequence(data) else ()


def _rebuilt(data: Data, f: Callable[[Any, Any], Any]) -> Data:
    """Return a dict, list or tuple of the same type with ``f(key, value)`` of every entry; anything else as it is."""
    if isinstance(data, MutableMapping):  # of any kind, kept: BatchEncoding, ModelOutput
        other = copy(data)
        for key, value in data.items():
            other[key] = f(key, value)
        return other
    if isinstance(data, Mapping):
        return type(data)({key: f(key, value) for key, value in data.items()})  # type: ignore[call-arg]
    if _is_named(data):
        return type(data)(*(f(key, value) for key, value in _items(data)))
    return type(data)([f(i, value) for i, value in enumerate(data)]) if _is_sequence(data) else data


def _rows(t: Tensor, index: slice | Tensor) -> Tensor:
    if not t.dim():
        return t
    return t[index] if isinstance(index, slice) else t[index.to(t.device)]


def mapped(f: Callable[[Tensor], Tensor], data: Data) -> Data:
    """Return nested data with ``f`` of every tensor."""
    return f(data) if isinstance(data, Tensor) else _rebuilt(data, lambda _, value: mapped(f, value))


def leaves(data: Data) -> Iterator[Tensor]:
    """Yield the tensors of nested data, in order."""
    if isinstance(data, Tensor):
        yield data
    else:
        for _, value in _items(data):
            yield from leaves(value)


def named(path: Path) -> str:
    """Return the expression of an entry: ``data["x"][0]``."""
    return "data" + "".join(f'["{key}"]' if isinstance(key, str) else f"[{key!r}]" for key in path)
