"""The integrations under DDP on two ranks, against one process that sees the whole batch."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from torch import Tensor, nn

import steppe
from tests.cases import sgd
from tests.integrations.helpers import batches

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("lightning")

K, STEPS = 2, 3  # micro-batches an update, updates
ROUNDS = 2 * K * STEPS  # batches of 16 for all ranks together; batch i is rank i % 2's


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def sam(model: nn.Module, sync: str, **more) -> steppe.SharpnessAware:
    if sync == "parts":  # of one example, all drawn
        return steppe.USAM(sgd(model), rho=0.1, m=1, sampled=16 * K)
    return steppe.WSAM(sgd(model), rho=0.1, gamma=0.7, sync=sync, **more)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def as_launched(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody connects: the ranks are connected already


def shard(accelerator) -> None:
    """accelerate turns FSDP into DDP on a CPU, where torch has ``fully_shard``: what it sets on a GPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10)
    kinds = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin, "torch_fsdp_plugin": plugin}
    accelerator.state.__dict__.update(kinds)
    assert accelerator.is_fsdp2


def with_accelerate(sync: str, sharded: bool = False) -> tuple[list[Tensor], int]:
    from accelerate import Accelerator

    from steppe.integrations.accelerate import Backward

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=K)
    if sharded:
        shard(accelerator)
    model, forwards = net(), []
    model.register_forward_hook(lambda *_: forwards.append(None))
    wrapped, optimizer = accelerator.prepare(model, sam(model, sync))
    assert sharded or isinstance(wrapped, nn.parallel.DistributedDataParallel)
    backward = Backward(accelerator, wrapped, optimizer, cross_entropy)
    for batch in batches(ROUNDS)[accelerator.process_index :: 2]:
        with accelerator.accumulate(wrapped):
            backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    return whole(model), len(forwards)


def whole(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]


class Dataset(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = (torch.cat(part) for part in zip(*batches(ROUNDS), strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.forwards = net(), 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.forwards += 1
        return {"loss": cross_entropy(self.net, (x, labels))}


def with_the_trainer(sync: str, sharded: bool = False) -> tuple[list[Tensor], int]:
    from transformers import TrainingArguments

    from steppe.integrations.huggingface import SharpnessAwareTrainer

    class Sequential(SharpnessAwareTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=K,
        max_steps=STEPS,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = WithLoss()
    optimizer = sam(model, sync)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = Sequential(model, args, train_dataset=Dataset(), optimizers=(optimizer, constant))
    if sharded:
        shard(trainer.accelerator)
        trainer.is_fsdp_enabled = True
    trainer.train()
    assert sharded or isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    return whole(model), model.forwards


def with_lightning(sync: str) -> tuple[list[Tensor], int]:
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from steppe.integrations.lightning import SharpnessAwareMixin

    class Module(SharpnessAwareMixin, L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.forwards = net(), 0

        def training_step(self, batch, batch_idx):
            self.forwards += 1
            return cross_entropy(self.net, batch)

        def configure_optimizers(self):
            return sam(self, sync)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(cluster_environment=LightningEnvironment()),
        max_epochs=1,
        accumulate_grad_batches=K,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    mine = batches(ROUNDS)[int(os.environ["RANK"]) :: 2]
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    return [p.detach() for p in module.parameters()], module.forwards


def run(framework: str, sync: str, *sharded: bool) -> tuple[list[Tensor], int]:
    as_launched(torch.distributed.get_rank())
    return globals()[framework](sync, *sharded)


def alone(sync: str) -> list[Tensor]:
    """One process: a perturbation for each rank's part of the batch, or one for all."""
    model = net()
    optimizer = sam(model, "auto", m=16 * K if sync == "local" else None, parallel=False)
    data = batches(ROUNDS)
    criterion = nn.CrossEntropyLoss(reduction="none")
    for i in range(0, ROUNDS, 2 * K):
        ours = data[i : i + 2 * K]
        x, y = (torch.cat(part) for part in zip(*(ours[0::2] + ours[1::2]), strict=True))  # rank by rank
        optimizer.step(steppe.Batch.supervised(model, criterion, x, y))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("framework", ["with_accelerate", "with_the_trainer", "with_lightning"])
def test_parts_of_two_ranks_are_averaged(framework: str, two_ranks) -> None:
    """Every rank draws its own; parts of 1 are m-SAM for any draw."""
    (first, forwards), (second, also) = two_ranks(run, framework, "parts")
    assert forwards == also
    for p, q in zip(first, second, strict=True):
        assert torch.equal(p, q)
    model = net()
    optimizer = steppe.USAM(sgd(model), rho=0.1, m=1)
    for i in range(0, ROUNDS, 2 * K):
        x, y = (torch.cat(part) for part in zip(*batches(ROUNDS)[i : i + 2 * K], strict=True))
        optimizer.step(steppe.MeanBatch(model, cross_entropy, (x, y)))
    for p, expected in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize("framework", ["with_accelerate", "with_the_trainer", "with_lightning"])
def test_two_ranks_are_one_process(framework: str, sync: str, two_ranks) -> None:
    (first, forwards), (second, also) = two_ranks(run, framework, sync)
    assert forwards == also == 2 * K * STEPS
    for p, q, expected in zip(first, second, alone(sync), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("framework", ["with_accelerate", "with_the_trainer"])
def test_parameters_sharded_by_the_framework(framework: str, two_ranks) -> None:
    """``fully_shard``: all ranks share one perturbation."""
    (first, forwards), (second, also) = two_ranks(run, framework, "auto", True)
    assert forwards == also == 2 * K * STEPS
    for p, q, expected in zip(first, second, alone("global"), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
