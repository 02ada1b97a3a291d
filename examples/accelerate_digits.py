"""accelerate: ``backward(batch)`` in place of forward, loss and ``accelerator.backward(loss)``; the rest stays.

Run it: python examples/accelerate_digits.py, or on several processes: accelerate launch examples/accelerate_digits.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import steppe
from steppe.integrations.accelerate import Backward


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def main():
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train, test = random_split(data, [1500, 297])

    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(None))
    optimizer = steppe.SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), rho=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    backward = Backward(accelerator, model, optimizer, loss)

    for epoch in range(10):
        for batch in loader:
            with accelerator.accumulate(model):
                backward(batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        seen = optimizer.optimizer.telemetry
        accelerator.print(f"epoch {epoch}: loss {seen.loss:.3f}, gap {seen.gap:.4f}")

    accelerator.print(f"{len(forwards)} forwards for {10 * len(loader)} micro-batches")
    model.eval()
    x, y = test[:]
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    accelerator.print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
