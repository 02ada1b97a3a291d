"""The algebra of vectors, against numbers by hand."""

import pytest
import torch
from torch import nn

from steppe.engine.vector import Vector, norm_of, shift_, shift_all_
from steppe.pieces.weights import _signs, generator


def vector(*entries, scale=1.0) -> Vector:
    return Vector([None if e is None else torch.tensor(e, dtype=torch.float64) for e in entries], scale)


def as_lists(v: Vector) -> list:
    return [None if t is None else t.tolist() for t in v.materialised()]


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0, 9.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 2.0, torch.tensor(2.0, dtype=torch.float64)])
def test_lerp(c: float, scale) -> None:
    a, b = vector([1.0, 2.0], None, [3.0], None, scale=scale), vector([5.0, -2.0], [4.0], None, None)
    s = float(scale)
    first = [s + c * (5 - s), 2 * s + c * (-2 - 2 * s)]
    found = as_lists(a.lerp(b, c))
    assert found[0] == pytest.approx(first)
    assert found[1] == pytest.approx([4 * c])
    assert found[2] == pytest.approx([3 * s * (1 - c)])
    assert found[3] is None
    assert a.tensors[0].tolist() == [1.0, 2.0]  # a value


def test_lerp_of_low_precision_is_computed_in_float32() -> None:
    a, b = (torch.randn(50, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    low = Vector([a.bfloat16()]).lerp(Vector([b]), 0.3).tensors[0]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, a.bfloat16().float() * 0.7 + b * 0.3)


@pytest.mark.parametrize("cx", [1.0, 0.5, torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("cy", [1.0, 0.25, torch.tensor(0.25, dtype=torch.float64)])
def test_sums_of_multiples(cx, cy) -> None:
    x, y = vector([1.0, 2.0], [3.0], None), vector([8.0, -4.0], None, [2.0])
    found = as_lists(cx * x + cy * y)
    a, b = float(cx), float(cy)
    assert found == [[a + 8 * b, 2 * a - 4 * b], [3 * a], [2 * b]]
    assert (x.tensors[0].tolist(), y.tensors[0].tolist()) == ([1.0, 2.0], [8.0, -4.0])


def test_products_are_remembered_by_what_they_are_of() -> None:
    x, y = vector([1.0, 2.0], [3.0]), vector([2.0, 1.0], [-1.0])
    assert float(x.dot(y)) == 1.0
    assert float((3 * x).dot(2 * y)) == 6.0  # the same product, scaled
    assert float(x.dot(vector([1.0, 1.0], [1.0]))) == 6.0
    assert float(x.dot(x)) == 14.0
    for k in range(50):  # other vectors at the same places in memory
        assert float(x.dot(vector([float(k), 0.0], [0.0]))) == k


def test_one_call_for_all_entries_gives_what_single_calls_give() -> None:
    """Plain tensors of one type take the fast path; a ``None``, a Parameter or another type take the other."""
    g = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(n, 3, generator=g) for n in (2, 5, 1)] for _ in "xy")
    for cx, cy in ((1.0, 1.0), (0.3, 1.0), (1.0, -2.0), (0.3, -2.0)):
        fast = (cx * Vector(xs)) + (cy * Vector(ys))
        slow = (cx * Vector([*xs, None])) + (cy * Vector([*ys, None]))
        for a, b, x, y in zip(fast.tensors, slow.tensors, xs, ys, strict=False):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            torch.testing.assert_close(a, cx * x + cy * y)
    for a, b in zip(Vector(xs).lerp(Vector(ys), 0.3).tensors, xs, strict=True):
        assert a.shape == b.shape
    whole = torch.cat([x.flatten() for x in xs])
    assert float(Vector(xs).norm()) == pytest.approx(float(whole.norm()))
    assert float(Vector([nn.Parameter(xs[0]).detach(), *xs[1:]]).norm()) == pytest.approx(float(whole.norm()))
    mixed = Vector([xs[0], xs[1].double(), xs[2].bfloat16()])
    assert (mixed + mixed).tensors[1].dtype == mixed.norm().dtype == torch.float64


def test_the_norm_of_entries_that_are_not_kept() -> None:
    x = vector([3.0], None, [4.0])
    assert float(norm_of(iter(x.tensors), like=x)) == 5.0
    assert float(norm_of(iter([]), like=vector(None))) == 0.0


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (1000, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = _signs(torch.empty(shape, dtype=dtype), generator(0, 3))
    assert (z.shape, z.dtype) == (shape, dtype)
    assert z.abs().eq(1).all()
    again = _signs(torch.empty(shape, dtype=dtype), generator(0, 3))
    assert torch.equal(z, again)
    if z.numel() > 1000:
        n = z.numel()
        assert abs(float(z.sum())) < 4 * n**0.5  # fair
        flat = z.flatten()
        for lag in range(1, 17):  # and independent, also of those from the same byte
            assert abs(float(flat[lag:] @ flat[:-lag])) < 4 * n**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_many_small_tensors_have_the_norm_of_one(dtype: torch.dtype) -> None:
    """On a CPU they are gathered; a large one among them and one of another type are not."""
    tensors = [torch.randn(3, 2).to(dtype).T for _ in range(300)]
    tensors += [torch.randn(2000).to(dtype), torch.randn(3, dtype=torch.float64)]
    expected = torch.cat([t.double().flatten() for t in tensors]).norm()
    torch.testing.assert_close(Vector(tensors).norm().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.3, torch.tensor(0.3)])
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.bfloat16])
def test_shifting_all_is_shifting_each(c, other: torch.dtype) -> None:
    ws = [torch.randn(3), torch.randn(2, 2).to(other)]
    ts = [torch.randn(3), torch.randn(2, 2).to(other)]
    together, each = ([w.clone() for w in ws] for _ in range(2))
    shift_all_(together, ts, c)
    for w, t in zip(each, ts, strict=True):
        shift_(w, t, c)
    assert all(map(torch.equal, together, each))
