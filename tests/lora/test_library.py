"""Our layers in other people's programs: plain loops, Lightning, hand-written models, classifiers, torch.compile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qlora
from qlora.lora.layer import lora_layers

CONFIG = qlora.LoraConfig(r=4, lora_alpha=16.0)
IDS = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))


class HandWritten(nn.Module):
    """A transformer block as people write it in an afternoon."""

    def __init__(self, vocab_size: int = 90, dim: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.to_qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.to_out(attended.transpose(1, 2).flatten(-2))
        return self.head(x + self.mlp(self.norm_2(x)))  # type: ignore[no-any-return]


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "sequential":
        return nn.Sequential(nn.Embedding(90, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 90))
    if kind == "hand-written":
        return HandWritten()
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-any-return]


def move(model: nn.Module) -> None:
    """B from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["sequential", "hand-written"])
def test_a_plain_loop(kind: str, tmp_path: Path) -> None:
    """Every linear layer gets one, the loss falls, nothing else moves, and the file brings it all back."""
    model = make(kind)
    frozen = {id(p): p.clone() for p in model.parameters()}
    report = qlora.inject_lora(model, CONFIG)
    assert len(report.targeted) == sum(isinstance(m, nn.Linear) for m in make(kind).modules())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, frozen[id(p)]) for p in model.parameters() if id(p) in frozen)
    qlora.save_adapter(model, tmp_path)
    again = make(kind)
    qlora.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))


def test_lightning(tmp_path: Path) -> None:
    """A Lightning module trains, and its checkpoint is loaded back into a module made anew."""
    lightning = pytest.importorskip("pytorch_lightning", reason="the test extra installs it")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make("hand-written")
            qlora.inject_lora(self.model, CONFIG)

        def training_step(self, ids: Tensor) -> Tensor:
            loss = next_token_loss(self.model, ids)
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)

    losses: list[float] = []
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=20, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(IDS, batch_size=4))  # type: ignore[arg-type]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = Module()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    module.eval()
    again.eval()
    assert torch.equal(again.model(IDS), module.model(IDS))


def test_a_classifier_with_its_head(tmp_path: Path) -> None:
    """An encoder for classification: the head is trained and saved, the task recorded, PEFT reads the same logits."""
    import json

    import peft

    model = make("classifier").eval()
    config = qlora.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    report = qlora.inject_lora(model, config)
    assert report.trained == ("classifier",)
    move(model)
    qlora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(make("classifier"), tmp_path).eval()
    again = make("classifier").eval()
    qlora.load_adapter(again, tmp_path)
    with torch.no_grad():
        want = model(IDS).logits
        assert not torch.allclose(want, make("classifier").eval()(IDS).logits, atol=1e-3)
        assert torch.equal(again(IDS).logits, want)
        torch.testing.assert_close(theirs(IDS).logits, want, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The embedded base in 4 bits with an adapter that does something."""
    model, _ = qlora.load_base("builtin:tiny", dtype="float32")
    qlora.inject_lora(model, CONFIG)
    move(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_compiled_it_is_one_graph_with_the_same_numbers(tiny: Any) -> None:
    """On a 4-bit base too: dequantizing is an operation that the compiler does not look into."""
    torch._dynamo.reset()
    tiny(IDS).logits.square().sum().backward()
    want = gradients(tiny)
    compiled = torch.compile(tiny, backend="aot_eager", fullgraph=True)
    out = compiled(IDS).logits
    torch.testing.assert_close(out, tiny(IDS).logits)
    out.square().sum().backward()
    found = gradients(tiny)
    assert found.keys() == want.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5 * want[name].abs().max().item())


def test_a_hot_swap_leaves_the_compiled_graph_as_it_is(tmp_path: Path) -> None:
    """Other values, another scaling, a smaller rank, fewer layers: the graph is the one that was compiled."""
    made = make("hand-written")
    qlora.inject_lora(made, qlora.LoraConfig(r=2, lora_alpha=3.0, use_rslora=True, target_modules=["to_qkv", "mlp.0"]))
    move(made)
    qlora.save_adapter(made, tmp_path)
    model = make("hand-written")
    qlora.inject_lora(model, CONFIG)
    move(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(IDS)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        qlora.hotswap_adapter(model, tmp_path)
        torch.testing.assert_close(compiled(IDS), made(IDS), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8, "target_modules": ["to_qkv"]}, "larger rank"),
        ({"r": 2, "target_modules": ["head"]}, "does not adapt 1 layers"),
        ({"r": 2, "target_modules": ["to_qkv"], "use_dora": True}, "use_dora"),
        ({"r": 2, "target_modules": ["to_qkv"], "train_norms": True}, "trained as wholes"),
    ],
)
def test_what_cannot_be_swapped_changes_nothing(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    other = make("hand-written")
    qlora.inject_lora(other, qlora.LoraConfig(**config))
    qlora.save_adapter(other, tmp_path)
    model = make("hand-written")
    qlora.inject_lora(model, qlora.LoraConfig(r=4, target_modules=["to_qkv", "mlp.0"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(qlora.QloraError, match=message):
        qlora.hotswap_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_pickles_and_state_dicts(tiny: Any) -> None:
    """A copy shares nothing with its original, and a pickle and a state dict bring back the same function."""
    with torch.no_grad():
        want = tiny(IDS).logits
        twin = copy.deepcopy(tiny)
        next(p for p in twin.parameters() if p.requires_grad).zero_()
        assert torch.equal(tiny(IDS).logits, want)
        assert torch.equal(pickle.loads(pickle.dumps(tiny))(IDS).logits, want)
        fresh, _ = qlora.load_base("builtin:tiny", dtype="float32")
        qlora.inject_lora(fresh, CONFIG)
        assert not torch.equal(fresh(IDS).logits, want)
        fresh.load_state_dict(tiny.state_dict())
        assert torch.equal(fresh(IDS).logits, want)
    assert all(layer.active_adapter == "default" for _, layer in lora_layers(twin))
