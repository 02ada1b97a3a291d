"""A loop of one's own with what real ones have: accumulation, bfloat16, clipping, a schedule and a checkpoint.

Run it: python examples/plain_loop.py
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import steppe


def data():
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1500]], y[order[:1500]], x[order[1500:]], y[order[1500:]]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = steppe.SAM(base, rho=0.05, max_norm=1.0)  # clips what the base sees, once a step
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)


def train(model, optimizer, scheduler, x, y, epochs):
    for epoch in epochs:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for update in order.split(256):
            optimizer.step(partial(forward_backward, model, optimizer, x, y, update.split(64)))
            scheduler.step()
        seen = optimizer.telemetry
        print(f"epoch {epoch}: loss {seen.loss:.3f}, gap {seen.gap:.4f}, {seen.passes:.0f} passes a step")


def forward_backward(model, optimizer, x, y, micro_batches):
    optimizer.zero_grad()
    total = 0.0
    for i in micro_batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x[i])
        loss = nn.functional.cross_entropy(logits.float(), y[i]) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    return total


def main():
    x, y, test_x, test_y = data()
    parts = build()
    train(*parts, x, y, range(10))

    path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    torch.save([part.state_dict() for part in parts] + [torch.get_rng_state()], path)
    train(*parts, x, y, range(10, 12))

    resumed = build()  # goes on bit for bit where the first was saved: dropout too
    *states, random = torch.load(path)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    train(*resumed, x, y, range(10, 12))
    same = all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), resumed[0].parameters(), strict=True))
    print(f"resumed bit for bit: {same}")

    model = resumed[0].eval()
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
