"""The training objective against the model's own forward, one document at a time: loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.config.schema import LoraConfig
from qlora.data.batch import Batch, Row, collate_packed, collate_padded, empty_batch
from qlora.errors import ConfigError, DataError
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.objective.evaluate import evaluate
from qlora.objective.train_model import TrainModel
from qlora.ops.nf4 import QuantSpec
from qlora.quant.linear import Linear4bit

PAD = 0
MakeModel = Callable[..., Any]


def make_rows(lengths: Sequence[int] = (9, 14, 5, 2, 11), seed: int = 0) -> list[Row]:
    """Documents, longer than the sliding windows of the test's models, with about half of the tokens as targets."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        is_target = rng.integers(0, 2, length).astype(np.uint8)
        is_target[-1] = 1
        rows.append((rng.integers(3, 300, length), is_target))
    return rows


def with_lora(model: Any, **config: Any) -> Any:
    """With everything that trains moved off its initial value."""
    if not any(isinstance(module, nn.Linear) and "lm_head" not in name for name, module in model.named_modules()):
        config.setdefault("target_modules", ["lm_head"])  # gpt2: the other layers are Conv1D
    inject_lora(model, LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def own_loss(model: Any, rows: Sequence[Row]) -> tuple[Tensor, int]:
    """What the model's own forward says of each document alone, summed over target tokens."""
    loss, num_targets = torch.zeros((), dtype=torch.float64), 0
    for ids, is_target in rows:
        input_ids = torch.from_numpy(ids)[None]
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1].double()
        targets = input_ids[0, 1:].masked_fill(torch.from_numpy(is_target[1:] == 0), -100)
        loss = loss + nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        num_targets += int((targets != -100).sum())
    return loss, num_targets


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_gradients(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Each within a fp32 rounding error of its own size."""
    assert found.keys() == want.keys()
    for name in want:
        size = want[name].abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(found[name], want[name], rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}")


BATCHES: dict[str, Callable[[Sequence[Row]], Batch]] = {
    "packed": collate_packed,
    "padded": lambda rows: collate_padded(rows, PAD),
}


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_loss_and_gradients_are_the_models_own(architecture: str, attention: str, make_model: MakeModel) -> None:
    """Packed or padded, with every kind of attention, each document is computed as if it were alone."""
    model = with_lora(make_model(architecture), train_norms=True)
    rows = make_rows()
    want, num_targets = own_loss(model, rows)
    want_gradients = gradients(want, model)
    if architecture == "gemma2" and attention == "sdpa":
        with pytest.raises(ConfigError, match=r"model\.attention: Gemma2ForCausalLM cannot compute attention with 'sdpa'"):
            TrainModel(model, attention)
        return
    train_model = TrainModel(model, attention)
    assert train_model.loss_head is not None
    for kind, collate in BATCHES.items():
        batch = collate(rows)
        if architecture == "opt" and attention != "auto" and kind == "packed":
            with pytest.raises(ConfigError, match="lets packed documents see each other"):
                train_model(batch)
            continue
        loss, count = train_model(batch)
        assert count.item() == num_targets == batch.num_target_tokens
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
        assert_same_gradients(gradients(loss, model), want_gradients)


def test_attention_per_document_is_what_auto_chooses(architecture: str, make_model: MakeModel) -> None:
    # gemma2 caps its scores, which attention per document does not compute.
    want = "eager" if architecture == "gemma2" else "documents"
    train_model = TrainModel(make_model(architecture))
    train_model.settle()
    assert train_model.attention_name == train_model.model.config._attn_implementation == want
    assert train_model.packing_refused is None


def test_the_model_keeps_its_own_forward(make_model: MakeModel) -> None:
    model = make_model("llama")
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        TrainModel(model).settle()
        # Its norms, MLPs and rotary embeddings are computed by our operations: rotary products are added in another order.
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6 * before.abs().max().item())
    assert not any(m._forward_hooks for m in model.modules())


def test_making_one_draws_no_random_number_and_changes_no_mode(make_model: MakeModel) -> None:
    model = with_lora(make_model("llama"), lora_dropout=0.5).train()
    state = torch.get_rng_state()
    TrainModel(model).settle()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral"])
def test_in_bf16_packing_moves_the_loss_by_rounding_alone(make_model: MakeModel, name: str) -> None:
    model = with_lora(make_model(name, "bfloat16"))
    train_model = TrainModel(model)
    rows = make_rows()
    with torch.no_grad():
        packed = train_model(collate_packed(rows))[0]
        alone = sum(train_model(collate_packed([row]))[0] for row in rows)
    assert packed.dtype == torch.float32
    # Logits in bf16 are off by up to 2**-8 of themselves.
    torch.testing.assert_close(packed, alone, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("kind", BATCHES)
def test_gradient_checkpointing_changes_no_gradient(make_model: MakeModel, name: str, kind: str) -> None:
    results = []
    for recompute in (False, True):
        model = with_lora(make_model(name), lora_dropout=0.3)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train_model = TrainModel(model).train()
        torch.manual_seed(4)
        loss, _ = train_model(BATCHES[kind](make_rows()))
        results.append((loss, gradients(loss, model)))
    (loss, want), (again, found) = results
    assert torch.equal(loss, again)
    assert_same_gradients(found, want, tolerance=1e-6)


@pytest.mark.parametrize("kind", BATCHES)
def test_without_targets_loss_and_gradients_are_zero(make_model: MakeModel, kind: str) -> None:
    model = with_lora(make_model("llama"), train_head=True)
    train_model = TrainModel(model)
    for batch in (
        BATCHES[kind]([(ids, np.zeros_like(is_target)) for ids, is_target in make_rows()]),
        empty_batch(PAD, is_packed=kind == "packed"),
    ):
        loss, num_targets = train_model(batch)
        assert (loss.item(), num_targets.item()) == (0.0, 0)
        assert all(not gradient.any() for gradient in gradients(loss, model).values())


HEADS: dict[str, dict[str, Any]] = {
    "trained": {"train_head": True},
    "trained with the embedding": {"train_head": True, "train_embeddings": True},
    "adapted": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize(
    ("head", "tied"),
    # One side of a tied pair cannot train alone.
    [("trained", False), *((head, tied) for head in ("trained with the embedding", "adapted") for tied in (False, True))],
)
def test_a_head_that_trains(make_model: MakeModel, head: str, tied: bool) -> None:
    model = with_lora(make_model("llama", tie_word_embeddings=tied), **HEADS[head])
    rows = make_rows()
    want, _ = own_loss(model, rows)
    loss, _ = TrainModel(model)(collate_packed(rows))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    found = gradients(loss, model)
    assert any("lm_head" in name or (tied and "embed_tokens" in name) for name in found)
    assert_same_gradients(found, gradients(want, model))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_trains_over_a_bf16_base(make_model: MakeModel, head: str) -> None:
    model = with_lora(make_model("llama", "bfloat16"), **HEADS[head])
    rows = make_rows()
    loss, _ = TrainModel(model)(collate_packed(rows))
    torch.testing.assert_close(loss.double(), own_loss(model, rows)[0], rtol=0.01, atol=0)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients(loss, model).values())


def test_a_quantized_head(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.lm_head = Linear4bit.from_weight(model.lm_head.weight, None, QuantSpec())
    with_lora(model, target_modules=["q_proj"])
    train_model = TrainModel(model)
    assert train_model.loss_head is not None
    rows = make_rows()
    torch.testing.assert_close(train_model(collate_packed(rows))[0].double(), own_loss(model, rows)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("head", ["frozen", *HEADS])
def test_the_logits_of_a_batch_are_never_whole(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    from qlora.ops import cross_entropy

    model = with_lora(make_model("llama"), **HEADS.get(head, {}))
    train_model = TrainModel(model)
    train_model.settle()
    sizes, seen = [], []
    monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", 4)
    compute = cross_entropy.softmax_loss_
    monkeypatch.setattr(
        cross_entropy, "softmax_loss_", lambda logits, *args, **kw: seen.append(logits.shape) or compute(logits, *args, **kw)
    )
    handle = train_model.loss_head.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    batch = collate_packed(make_rows())
    loss, num_targets = train_model(batch)
    handle.remove()
    # Hidden states at target positions alone reach the head, four at a time.
    assert sizes == [num_targets.item()] == [batch.num_target_tokens]
    assert sum(num_tokens for num_tokens, _ in seen) == batch.num_target_tokens
    assert max(seen) == (4, model.config.vocab_size)
    torch.testing.assert_close(loss.double(), own_loss(model, make_rows())[0], rtol=1e-5, atol=0)


# The z-loss: in what is learned, not in what is reported.


@pytest.mark.parametrize("head", ["frozen", *HEADS, "quantized", "scaled and capped", "unknown"])
def test_z_loss_is_learned_and_not_reported(make_model: MakeModel, llama_like: dict[str, Any], head: str) -> None:
    changes = {"final_logit_softcapping": 2.0} if head == "scaled and capped" else {}
    if head == "unknown":
        changes = llama_like | {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
    name = {"scaled and capped": "gemma2", "unknown": "modernbert-decoder"}.get(head, "llama")
    model = make_model(name, **changes)
    if head == "quantized":
        model.lm_head = Linear4bit.from_weight(model.lm_head.weight, None, QuantSpec())
    with_lora(model, **HEADS.get(head, {"target_modules": ["q_proj"]} if head == "quantized" else {}))
    rows, z_loss = make_rows(), 0.1
    want, z_term = own_loss(model, rows)[0], torch.zeros((), dtype=torch.float64)
    for ids, is_target in rows:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, :-1].double()
        z_term = z_term + logits.logsumexp(-1)[torch.from_numpy(is_target[1:] != 0)].square().sum()
    train_model = TrainModel(model, z_loss=z_loss)
    loss, _ = train_model(collate_packed(rows))
    assert (train_model.loss_head is None) == (head == "unknown")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(loss, model), gradients(want + z_loss * z_term, model))


# How logits are made, and whether documents stay apart, is seen in the model and not looked up.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("granite", {"logits_scaling": 7.0}),  # divides
        ("hyperclovax", {"logits_scaling": 7.0}),  # multiplies, under the same name
        ("cohere", {"logit_scale": 0.1}),
        ("gemma2", {"final_logit_softcapping": 1.0}),
        ("gpt2", {"final_logit_softcapping": 1.0, "logit_scale": 0.1}),  # names that mean nothing to it
    ],
)
def test_logits_are_scaled_as_the_model_scales_them(
    make_model: MakeModel, name: str, changes: dict[str, Any], llama_like: dict[str, Any]
) -> None:
    if name == "hyperclovax":
        changes = llama_like | changes
    model = make_model(name, **changes)
    rows = make_rows()
    train_model = TrainModel(model)
    train_model.settle()
    # Where the head is known, the logits need not be made as a whole.
    assert (train_model.loss_head is None) == (name == "gpt2")
    with torch.no_grad():
        loss, _ = train_model(collate_packed(rows))
        torch.testing.assert_close(loss.double(), own_loss(model, rows)[0], rtol=1e-5, atol=0)


@pytest.fixture
def llama_like(make_config: Callable[..., Any]) -> dict[str, Any]:
    config = make_config("llama")
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {name: getattr(config, name) for name in names}


def test_a_model_with_a_layer_before_its_head_uses_its_own_forward(
    make_model: MakeModel, llama_like: dict[str, Any]
) -> None:
    model = make_model("modernbert-decoder", **llama_like, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, cls_token_id=1)
    train_model = TrainModel(with_lora(model))
    train_model.settle()
    assert train_model.loss_head is None
    rows = make_rows()
    for collate in BATCHES.values():
        loss, _ = train_model(collate(rows))
        torch.testing.assert_close(loss.double(), own_loss(model, rows)[0], rtol=1e-5, atol=0)


LEAKY: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},  # makes its mask itself
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320},  # hands on a state
    "lfm2": {  # a convolution beside attention that gets its boundaries
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "layer_types": ["conv", "full_attention"],
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEAKY)
def test_a_model_whose_packed_documents_would_leak_is_refused(make_model: MakeModel, name: str) -> None:
    model = make_model(name, **LEAKY[name])
    train_model = TrainModel(model)
    rows = make_rows()
    with pytest.raises(ConfigError, match=r"data\.packing: .* lets packed documents see each other") as error:
        train_model(collate_packed(rows))
    assert "set data.packing to false" in str(error.value)
    # Padded rows are right.
    with torch.no_grad():
        loss, _ = train_model(collate_padded(rows, PAD))
        torch.testing.assert_close(loss.double(), own_loss(model, rows)[0], rtol=1e-4, atol=0)


def test_a_model_that_cannot_have_its_documents_told_apart_by_name_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: attention per document does not compute all"):
        TrainModel(make_model("gemma2"), "documents")
    with pytest.raises(ConfigError, match=r"model\.attention: LlamaForCausalLM cannot compute attention with 'no_such'"):
        TrainModel(make_model("llama"), "no_such")


def test_wrapping_twice_changes_nothing(make_model: MakeModel) -> None:
    model = make_model("llama")
    first, second = TrainModel(model), TrainModel(model)
    assert first.attention_name == second.attention_name == "documents"
    batch = collate_packed(make_rows())
    with torch.no_grad():
        assert torch.equal(first(batch)[0], second(batch)[0])


@pytest.mark.parametrize(
    ("name", "changes", "factor"),
    [("llama", {}, 1.0), ("granite", {"logits_scaling": 4.0}, 0.25), ("cohere", {"logit_scale": 0.125}, 0.125)],
)
def test_a_model_without_storage_is_wrapped_unseen(
    make_config: Callable[..., Any], name: str, changes: dict[str, Any], factor: float
) -> None:
    """What a rank holds of a sharded base cannot be run yet: its config is believed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(name, **changes))
    train_model = TrainModel(model)
    assert train_model.loss_head is not None
    assert train_model.loss_head.logit_factor == factor
    assert train_model.attention_name == "documents"


# Evaluation.


def test_evaluation_is_the_mean_over_all_target_tokens(make_model: MakeModel) -> None:
    model = with_lora(make_model("llama"), lora_dropout=0.5)
    train_model = TrainModel(model).train()
    batches = [collate_packed(make_rows(seed=seed)) for seed in range(2)] + [empty_batch(PAD, is_packed=True)]
    result = evaluate(train_model, batches, torch.device("cpu"))
    assert train_model.training
    model.eval()
    sums = [own_loss(model, make_rows(seed=seed)) for seed in range(2)]
    loss = sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)
    assert result["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert result["eval_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert result["eval_num_target_tokens"] == sum(count for _, count in sums)


def test_evaluation_of_nothing_is_an_error(make_model: MakeModel) -> None:
    with pytest.raises(DataError, match="no target tokens"):
        evaluate(TrainModel(make_model("llama")), [empty_batch(PAD, is_packed=True)], torch.device("cpu"))


def test_an_evaluation_in_between_leaves_training_as_it_was(make_model: MakeModel) -> None:
    """In 4 bits, where bitsandbytes' own layers would have been repacked for good."""
    model = make_model("llama", "bfloat16", hidden_size=128, intermediate_size=256)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, Linear4bit.from_weight(module.weight, None, QuantSpec()))
    twin = copy.deepcopy(with_lora(model))
    batch = collate_packed(make_rows())
    results = []
    for own, is_evaluated in ((model, False), (twin, True)):
        train_model = TrainModel(own).train()
        if is_evaluated:
            evaluate(train_model, [batch], torch.device("cpu"))
        loss, _ = train_model(batch)
        results.append((loss, gradients(loss, own)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    assert all(layer.lora_B["default"].requires_grad for _, layer in lora_layers(twin))
