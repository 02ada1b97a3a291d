"""Lightning: the mixin, and ``configure_optimizers`` returns a steppe optimizer. Nothing else changes.

Run it: python examples/lightning_digits.py
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import steppe
from steppe.integrations.lightning import SharpnessAwareMixin


class Classifier(SharpnessAwareMixin, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
        self.accuracy = MulticlassAccuracy(10)
        self.forwards = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.forwards += 1
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)  # the loss at w: further passes log nothing
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        gap = self.optimizers().telemetry.gap
        if gap is not None:  # as it is before the first step
            self.log("gap", gap, on_step=False, on_epoch=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self.net(x), y)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = steppe.SAM(torch.optim.AdamW(self.parameters(), lr=3e-3), rho=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    L.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train, test = random_split(data, [1500, 297])
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_epochs=10,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(train, 64, shuffle=True, drop_last=True))
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    print(f"{module.forwards} forwards for {10 * trainer.num_training_batches} micro-batches")
    (scores,) = trainer.test(module, DataLoader(test, 297), verbose=False)
    print(f"test accuracy {scores['test_accuracy']:.3f}")


if __name__ == "__main__":
    main()
