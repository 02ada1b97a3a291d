"""Hugging Face Trainer: a small vision transformer, made from a configuration, learns digits of 8 x 8 pixels.

Run it: python examples/huggingface_digits.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import steppe
from steppe.integrations.huggingface import SharpnessAwareTrainer


class Digits(Dataset):
    def __init__(self, part: slice) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[part] / 8 - 1, dtype=torch.float32).unsqueeze(1)
        self.labels = torch.tensor(digits.target[part])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def main():
    set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        initializer_range=0.1,
    )
    model = ViTForImageClassification(config)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        max_steps=100,
        learning_rate=8e-3,
        max_grad_norm=1.0,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SharpnessAwareTrainer(
        model,
        arguments,
        train_dataset=Digits(slice(0, 1500)),
        eval_dataset=Digits(slice(1500, None)),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        sharpness=lambda base: steppe.SAM(base, rho=0.05),
    )
    trainer.train()
    print(f"test accuracy {trainer.state.log_history[-2]['eval_accuracy']:.3f}")


if __name__ == "__main__":
    main()
