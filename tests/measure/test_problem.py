import pytest
import torch
from torch import nn

from steppe.measure import Problem

from .models import CRITERION, batches, data, losses, net


@pytest.mark.parametrize(
    ("loss", "given", "error", "message"),
    [
        (CRITERION, [], ValueError, "data must hold at least one example, got no batch"),
        (CRITERION, (torch.zeros(0, 4), torch.zeros(0)), ValueError, "at least one example, got 0"),
        (CRITERION, iter([data()]), TypeError, "iterated again"),
        (CRITERION, 3, TypeError, "data must be a batch"),
        (CRITERION, data()[0], ValueError, r"data must be \(inputs, targets\)"),
        (nn.CrossEntropyLoss(), data(), ValueError, 'reduction="none"'),
        (lambda m, d: losses(m, d).mean(), data(), ValueError, "one loss per example"),
        (lambda m, d: losses(m, d) / 0.0, data(), ValueError, "loss must be finite at w, got 23 of 23"),
        ("cross entropy", data(), TypeError, "loss must be a function"),
    ],
)
def test_bad_input_is_named(loss, given, error, message):
    with pytest.raises(error, match=message):
        Problem(net(), loss, given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "test"}, "mode must be"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"params": []}, "params must be at least one parameter"),
        ({"params": [torch.ones(2)]}, "params must be at least one parameter"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Problem(net(), CRITERION, data(), **options)


def test_parameters_outside_a_low_precision_model_are_refused():
    with pytest.raises(ValueError, match="params must be parameters of the model"):
        Problem(net(torch.bfloat16), CRITERION, data(), params=[torch.ones(2, dtype=torch.bfloat16).requires_grad_()])


def test_a_loss_that_is_no_function_of_the_weights_is_refused():
    noise = torch.Generator().manual_seed(0)

    def restless(model, d):
        return losses(model, d) + torch.rand(len(d[0]), generator=noise)

    with pytest.raises(ValueError, match="two passes over the data differ"):
        Problem(net(), restless, data())


def test_torchs_own_random_numbers_are_replayed():
    problem = Problem(net(), lambda model, d: losses(model, d) + torch.rand(len(d[0])), data())
    assert torch.equal(problem.losses(), problem.losses())


def test_the_first_examples_are_read_and_no_more():
    read = []

    class Stream:
        def __iter__(self):
            for batch in batches(data(), 5, 16, 2):
                read.append(len(batch[0]))
                yield batch

    problem = Problem(net(), CRITERION, Stream())
    read.clear()
    assert problem.first(5).n == 5
    assert read == [5]


def test_parts_are_the_examples_in_order():
    problem = Problem(net(), CRITERION, batches(data(), 5, 16, 2))
    parts = list(problem.split(4))
    assert [part.n for part in parts] == [4, 1, 4, 4, 4, 4, 2]
    torch.testing.assert_close(torch.cat([part.losses() for part in parts]), problem.losses())
    first = problem.first(8)
    assert first.n == 8
    torch.testing.assert_close(first.losses(), problem.losses()[:8])
    assert problem.first(1000).n == 23
