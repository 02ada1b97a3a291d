"""TRL's trainers: a radius of 0 is TRL bit for bit, records are kept once, and nothing is generated twice."""

import pytest
import torch

import steppe
from tests.integrations.helpers import llama, same

trl = pytest.importorskip("trl")

import transformers  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from steppe.integrations.huggingface import SharpnessAwareTrainerMixin  # noqa: E402

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, transformers' and datasets'
WORDS = ["red", "green", "blue", "one", "two", "three", "left", "right", "up", "down", "sun", "moon", "star", "tree"]


class SFT(SharpnessAwareTrainerMixin, trl.SFTTrainer):
    pass


class DPO(SharpnessAwareTrainerMixin, trl.DPOTrainer):
    pass


class KTO(SharpnessAwareTrainerMixin, trl.KTOTrainer):
    pass


class GRPO(SharpnessAwareTrainerMixin, trl.GRPOTrainer):
    pass


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(i: int, n: int) -> str:
    return " ".join(WORDS[(i * 5 + 3 * j) % len(WORDS)] for j in range(n))


def data(kind: str, n: int = 32) -> Dataset:
    if kind == "SFT":
        return Dataset.from_dict({"text": [text(i, 4 + i % 5) for i in range(n)]})
    prompts = [text(i, 3) for i in range(n)]
    if kind == "GRPO":
        return Dataset.from_dict({"prompt": prompts})
    if kind == "DPO":
        chosen, rejected = ([" " + text(i + s, 2 + i % 4) for i in range(n)] for s in (1, 2))
        return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    completions = [" " + text(i + 1, 2 + i % 4) for i in range(n)]
    return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": [i % 3 > 0 for i in range(n)]})


def trainer(kind: str, path, sharpness=None, k: int = 2, **more):
    cls = globals()[kind] if sharpness else getattr(trl, f"{kind}Trainer")
    common = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": k,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if kind == "GRPO":
        common |= {"num_generations": 4, "max_completion_length": 4}
    own = {"sharpness": sharpness} if sharpness else {}
    if kind == "GRPO":
        own["reward_funcs"] = lambda completions, **_: [float(len(set(c))) for c in completions]
    elif kind != "SFT":
        own["ref_model"] = llama()
    transformers.set_seed(0)
    made = cls(
        model=llama(),
        args=getattr(trl, f"{kind}Config")(**common | more),
        train_dataset=data(kind),
        processing_class=tokenizer(),
        **own,
    )
    made.train()
    return made


def records(made) -> list[dict[str, float]]:
    """What is logged, without clocks and what steppe adds."""
    times = ("runtime", "per_second", "step_time", "sharpness")
    return [
        {key: value for key, value in entry.items() if not any(time in key for time in times)}
        for entry in made.state.log_history
    ]


def sam(rho: float, **options):
    return lambda base: steppe.SAM(base, rho=rho, **options)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO"])
def test_a_radius_of_zero_is_trl_bit_for_bit(kind: str, k: int, tmp_path) -> None:
    ours, theirs = trainer(kind, tmp_path, sam(0.0), k), trainer(kind, tmp_path, k=k)
    assert same(ours.model, theirs.model)
    assert records(ours) == records(theirs)


@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO"])
def test_two_passes_keep_records_once(kind: str, tmp_path) -> None:
    """The first update's records are those of TRL: they are made at ``w``."""
    ours, theirs = trainer(kind, tmp_path, sam(0.05)), trainer(kind, tmp_path)
    mine, plain = records(ours)[0], records(theirs)[0]
    assert {k: v for k, v in mine.items() if k != "grad_norm"} == {k: v for k, v in plain.items() if k != "grad_norm"}
    assert [r.get("num_tokens") for r in records(ours)] == [r.get("num_tokens") for r in records(theirs)]
    assert ours.state.log_history[0]["sharpness_passes"] == 2
    assert not same(ours.model, theirs.model)


@pytest.mark.parametrize("more", [{"k": 1}, {"k": 2}, {"k": 1, "steps_per_generation": 2}], ids=str)
def test_grpo_generates_once_and_sees_the_same_completions_in_both_passes(more, tmp_path, monkeypatch) -> None:
    seen, generated = [], []
    compute, generate = trl.GRPOTrainer.compute_loss, trl.GRPOTrainer._generate_and_score_completions

    def looked(self, model, inputs, *args, **kwargs):
        seen.append((self.further_pass, inputs["completion_ids"].clone()))
        return compute(self, model, inputs, *args, **kwargs)

    def counted(self, inputs):
        generated.append(len(inputs))
        return generate(self, inputs)

    monkeypatch.setattr(trl.GRPOTrainer, "compute_loss", looked)
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", counted)
    made = trainer("GRPO", tmp_path, sam(0.05), **more)
    k = more["k"]
    assert len(seen) == 3 * k * 2
    assert made._step == 3 * k
    assert len(generated) == {1: 3, 2: 3}[k] if "steps_per_generation" not in more else 2
    for i in range(0, len(seen), 2 * k):
        for first, further in zip(seen[i : i + k], seen[i + k : i + 2 * k], strict=True):
            assert (first[0], further[0]) == (False, True)
            assert torch.equal(first[1], further[1])
    assert made.state.log_history[0]["sharpness_passes"] == 2


@pytest.mark.parametrize("options", [{"m": 1}, {"m": 2, "sampled": 1}, {"ascent": 2}], ids=str)
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_parts(kind: str, options, tmp_path) -> None:
    ours = trainer(kind, tmp_path, sam(0.05, **options))
    plain = trainer(kind, tmp_path)
    assert ours.optimizer.optimizer.telemetry.skipped == 0
    assert [r.get("num_tokens") for r in records(ours)] == [r.get("num_tokens") for r in records(plain)]
    tiny = trainer(kind, tmp_path, sam(1e-7, **options))
    for p, q in zip(tiny.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)
    assert not same(ours.model, plain.model)


def test_all_pairs_of_dpo_are_the_whole_batch(tmp_path) -> None:
    """m at the size of the batch, by way of parts: pairs stay together."""
    ours = trainer("DPO", tmp_path, lambda base: steppe.USAM(base, rho=0.5, m=4))
    theirs = trainer("DPO", tmp_path, lambda base: steppe.USAM(base, rho=0.5, m=4, sampled=1), k=1)
    whole = trainer("DPO", tmp_path, lambda base: steppe.USAM(base, rho=0.5), k=1)
    for p, q in zip(theirs.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert ours.optimizer.optimizer.telemetry.skipped == 0


def test_what_cannot_be_cut_is_refused(tmp_path) -> None:
    with pytest.raises(NotImplementedError, match="generated completions"):
        trainer("GRPO", tmp_path, sam(0.05, m=1))
    with pytest.raises(NotImplementedError, match="mean KL divergence of the batch"):
        trainer("KTO", tmp_path, sam(0.05, m=1))
    with pytest.raises(NotImplementedError, match="padding-free inputs are one row"):
        trainer("SFT", tmp_path, sam(0.05, m=1), padding_free=True, max_length=None)
