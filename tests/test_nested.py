"""Cutting nested data: where the examples are, and what cannot be cut."""

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn

from steppe import Batch
from steppe.engine.nested import Examples, leaves, mapped

Pair = namedtuple("Pair", "x y")
N = 4


def images(n: int = N, same: bool = False) -> list[torch.Tensor]:
    return [torch.full((3, 5 if same else 5 + i, 6), float(i)) for i in range(n)]


def boxes(n: int = N, same: bool = False) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": torch.full((3 if same else i, 4), float(i)), "id": torch.tensor(i)} for i in range(n)]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def rows(n: int = N, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + 2 * n).reshape(n, 2)


CASES = {
    "a tensor": (rows(), rows()[1:3]),
    "a pair": ((rows(), rows()), (rows()[1:3], rows()[1:3])),
    "a list of a loader": ([rows(), rows()], [rows()[1:3], rows()[1:3]]),
    "inputs and targets that are dicts": (
        ({"x": rows(), "mask": None}, {"y": rows()}),
        ({"x": rows()[1:3], "mask": None}, {"y": rows()[1:3]}),
    ),
    "nested": ({"a": {"b": [rows(), (rows(),)]}}, {"a": {"b": [rows()[1:3], (rows()[1:3],)]}}),
    "of the whole batch": (
        {"x": rows(), "scale": torch.tensor(2.0), "n": 3, "flag": True, "mode": "train"},
        {"x": rows()[1:3], "scale": torch.tensor(2.0), "n": 3, "flag": True, "mode": "train"},
    ),
    "texts": ({"x": rows(), "text": ["a", "b", "c", "d"]}, {"x": rows()[1:3], "text": ["b", "c"]}),
    "texts alone": ({"text": ["a", "b", "c", "d"]}, {"text": ["b", "c"]}),
    "numbers": ({"x": rows(), "id": (5, 6, 7, 8)}, {"x": rows()[1:3], "id": (6, 7)}),
    "detection": ([images(), boxes()], [images()[1:3], boxes()[1:3]]),
    "detection, tuples": ((tuple(images()), tuple(boxes())), (tuple(images()[1:3]), tuple(boxes()[1:3]))),
    "images of one size": ([images(same=True), boxes()], [images(same=True)[1:3], boxes()[1:3]]),
    "all of one size": (
        [images(same=True), boxes(same=True)],
        [images(same=True)[1:3], boxes(same=True)[1:3]],
    ),
    "samples": (
        [{"image": im, **b} for im, b in zip(images(same=True), boxes(same=True), strict=True)],
        [{"image": im, **b} for im, b in zip(images(same=True), boxes(same=True), strict=True)][1:3],
    ),
    "features of one model": (
        {"f": [rows(), rows()], "y": rows()},
        {"f": [rows()[1:3], rows()[1:3]], "y": rows()[1:3]},
    ),
    "objects": ({"x": rows(), "o": [slice(i) for i in range(N)]}, {"x": rows()[1:3], "o": [slice(1), slice(2)]}),
}


@pytest.mark.parametrize("name", CASES)
def test_examples_are_found_and_cut(name: str) -> None:
    data, expected = CASES[name]
    examples = Examples.of(data)
    assert examples.n == N
    assert equal(examples.cut(data, slice(1, 3)), expected)
    assert equal(examples.cut(data, torch.tensor([1, 2])), expected)
    assert equal(examples.cut(data, slice(0, N)), data)


def test_three_images_of_three_channels() -> None:
    """Lists beside ragged lists are read alike, also where the channels are as many as the images."""
    data = (images(3, same=True), boxes(3))
    cut = Examples.of(data).cut(data, slice(0, 1))
    assert [len(cut[0]), len(cut[1]), cut[0][0].shape] == [1, 1, (3, 5, 6)]
    other = ([im[:3] for im in images(3, same=True)], [torch.ones(i, 4) for i in range(3)])
    assert equal(Examples.of(other).cut(other, slice(0, 1)), (other[0][:1], other[1][:1]))


def test_mappings_of_any_kind_are_kept() -> None:
    for data in (UserDict(x=rows()), OrderedDict(x=rows()), MappingProxyType({"x": rows()})):
        cut = Examples.of(data).cut(data, slice(0, 2))
        assert type(cut) is type(data)
        assert torch.equal(cut["x"], rows()[:2])
        assert len(data["x"]) == N
    data = Pair(rows(), [rows()])
    cut = Examples.of(data).cut(data, torch.tensor([3]))
    assert isinstance(cut, Pair)
    assert torch.equal(cut.x, rows()[3:])


def test_containers_of_transformers_are_kept() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    for data in (
        transformers.BatchEncoding({"input_ids": rows(), "labels": rows()[:, 0]}),
        SequenceClassifierOutput(logits=rows(), hidden_states=(rows(), rows())),
    ):
        cut = Examples.of(data).cut(data, slice(1, 3))
        assert type(cut) is type(data)
        assert all(torch.equal(a, b[1:3]) for a, b in zip(leaves(cut), leaves(data), strict=True))
    assert torch.equal(cut.logits, rows()[1:3])  # the attribute too


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((rows(), rows(3)), ValueError, r"data\[1\] has shape \(3, 2\), for 4 examples"),
        ([rows(), rows(3)], ValueError, r"data\[1\] has shape \(3, 2\), for 4 examples"),
        ({"a": rows(), "b": {"c": rows(1)}}, ValueError, r'data\["b"\]\["c"\] has shape \(1, 2\), for 4 examples'),
        ({"a": rows(), "sizes": (224, 224)}, ValueError, r'data\["sizes"\] must have one item an example.* 2 items'),
        ({"a": rows(), "b": [None, slice(3)]}, ValueError, r'data\["b"\] must have one item an example'),
        ({"a": rows(), "b": {"cache": object()}}, TypeError, r'data\["b"\]\["cache"\], of type object, cannot be cut'),
        ("text", ValueError, "one row an example, got none"),
        ({"a": set()}, TypeError, r'data\["a"\], of type set'),
        ((), ValueError, "got none"),
        ({"x": rows(0)}, ValueError, "at least one example, got 0"),
        (torch.tensor(1.0), ValueError, "got none"),
        (nn.utils.rnn.pack_sequence([rows(3)]), TypeError, "of type PackedSequence"),
        ((rows(), nn.utils.rnn.pack_sequence([rows(3)])), TypeError, r"data\[1\], of type PackedSequence"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), TypeError, "nested tensor"),
    ],
)
def test_what_cannot_be_cut_is_named(data, error, message) -> None:
    with pytest.raises(error, match=message):
        Batch(nn.Identity(), lambda model, d: d, data)


def test_mapped_and_leaves_go_in_order() -> None:
    data = {"a": [torch.ones(1), None], "b": (torch.zeros(1), 3)}
    assert [float(t) for t in leaves(data)] == [1.0, 0.0]
    assert equal(mapped(lambda t: t + 1, data), {"a": [torch.full((1,), 2.0), None], "b": (torch.ones(1), 3)})
