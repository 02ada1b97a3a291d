"""Print which models of timm and transformers share passes in m-SAM, and why others run in a loop.

``python -m benchmarks.coverage --m 8`` needs ``timm`` (with torchvision) and ``transformers``. A missing library is
left out. All models are small ones from configurations, with random weights and data, and with their own dropout, drop
path and layer drop.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import steppe

N, CLASSES, LENGTH, VOCABULARY = 32, 10, 12, 100
Case = tuple[str, Callable[[], nn.Module], Callable[[nn.Module, Any], Tensor], Any]  # name, model, loss, data

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SIZES | {"vocab_size": VOCABULARY, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
VIT = SIZES | {"image_size": 32, "patch_size": 8}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
WAV: dict[str, Any] = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}

# name: the kind of its data, the head of its class, the options of its configuration
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Bert": ("text", "ForSequenceClassification", TEXT),
    "DistilBert": (
        "text",
        "ForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": VOCABULARY},
    ),
    "DebertaV2": ("text", "ForSequenceClassification", TEXT),
    "ModernBert": ("text", "ForSequenceClassification", TEXT),
    "GPT2": ("tokens", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "Llama": ("tokens", "ForCausalLM", TEXT | {"num_key_value_heads": 2}),
    "Qwen3": ("tokens", "ForCausalLM", GROUPED),
    "Gemma3Text": ("tokens", "ForCausalLM", GROUPED),
    "Mixtral": ("tokens", "ForCausalLM", TEXT | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "T5": ("pairs", "ForConditionalGeneration", T5 | {"decoder_start_token_id": 0, "pad_token_id": 0}),
    "ViT": ("images", "ForImageClassification", VIT),
    "Dinov2": ("images", "ForImageClassification", VIT),
    "Swin": (
        "images",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNext": ("images", "ForImageClassification", STAGES | {"drop_path_rate": 0.1}),
    "ResNet": ("images", "ForImageClassification", STAGES | {"embedding_size": 8}),
    "Wav2Vec2": (
        "sounds",
        "ForSequenceClassification",
        SIZES | WAV | {"num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0},
    ),
}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4},
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},
}


def classified(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of every example."""
    out = model(data[0])
    return F.cross_entropy(getattr(out, "logits", out), data[1], reduction="none")


def next_token(model: nn.Module, index: Tensor) -> Tensor:
    """Return the mean cross entropy of every sequence's next tokens."""
    scores = model(input_ids=index).logits[:, :-1]
    return F.cross_entropy(scores.mT, index[:, 1:], reduction="none").mean(1)


def copied(model: nn.Module, index: Tensor) -> Tensor:
    """Return the mean cross entropy of a sequence that is to be repeated."""
    scores = model(input_ids=index, labels=index).logits
    return F.cross_entropy(scores.mT, index, reduction="none").mean(1)


def of_transformers() -> Iterator[Case]:
    """Yield the models of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    y, index = torch.randint(CLASSES, (N,)), torch.randint(5, VOCABULARY, (N, LENGTH))
    data = {"text": index, "images": torch.randn(N, 3, 32, 32), "sounds": torch.randn(N, 800)}
    for name, (kind, head, options) in TRANSFORMERS.items():
        config = getattr(transformers, f"{name}Config")
        model = getattr(transformers, name.removesuffix("Text") + head)
        labels = {} if kind in ("tokens", "pairs") else {"num_labels": CLASSES}
        make = lambda model=model, config=config, options=options | labels: model(config(**options))  # noqa: E731
        loss = {"tokens": next_token, "pairs": copied}.get(kind, classified)
        yield name, make, loss, index if not labels else (data[kind], y)


def of_timm() -> Iterator[Case]:
    """Yield the models of timm, with drop path."""
    import timm

    data = torch.randn(N, 3, 32, 32), torch.randint(CLASSES, (N,))
    for name, options in TIMM.items():
        options = {"num_classes": CLASSES, "drop_path_rate": 0.1} | options
        yield name, lambda name=name, options=options: timm.create_model(name, **options), classified, data


class Heard(logging.Handler):
    """Keeps what steppe logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


def verdict(make: Callable[[], nn.Module], loss: Callable[..., Tensor], data: Any, m: int) -> str:
    """Return "shared", or why micro-batches of one of three steps run in a loop."""
    torch.manual_seed(0)
    heard, log = Heard(), logging.getLogger("steppe")
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    try:
        model = make().train()
        opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=1e-3), rho=0.05, m=m)
        for _ in range(3):
            opt.step(steppe.Batch(model, loss, data))
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    finally:
        log.removeHandler(heard)
    return f"loop: {heard.messages[-1]}" if heard.messages else "shared"


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--m", type=int, default=8)
    parser.add_argument("--only", nargs="*", help="names of models")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {"timm": of_timm, "transformers": of_transformers}
    for library, cases in found.items():
        if find_spec(library) is None:
            print(f"{library} is not installed")
            continue
        for name, make, loss, data in cases():
            if not args.only or name in args.only:
                print(f"{library:13} {name:22} {verdict(make, loss, data, args.m)}", flush=True)


if __name__ == "__main__":
    main()
