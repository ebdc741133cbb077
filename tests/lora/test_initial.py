"""Where updates start. The oracles are PEFT's own starts and decompositions in float64.

Singular vectors are known but for their sign, so factors are compared with the sign of each pair taken out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qlora
from qlora.config.schema import LoraConfig, QuantizationConfig
from qlora.errors import AdapterError, ConfigError
from qlora.lora import initial
from qlora.lora.from_inputs import start_from_inputs
from qlora.lora.from_weights import FromWeights
from qlora.lora.inject import inject_lora
from qlora.lora.layer import lora_layers
from qlora.quant.load import load_model
from qlora.quant.source import resolve_base
from qlora.train.first_inputs import describe_unused

MakeBase = Callable[..., Path]
MakeModel = Callable[..., nn.Module]
NAMES = {"lora": {"r": 4, "lora_alpha": 10}, "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values halve."""
    U, _ = torch.linalg.qr(random(rows, rows, seed=seed))
    V, _ = torch.linalg.qr(random(columns, columns, seed=seed + 1))
    n = min(rows, columns)
    return U[:, :n] @ torch.diag(0.5 ** torch.arange(n)) @ V[:n]


def peft_model(model: nn.Module, method: Any, **keys: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=method, target_modules="all-linear", **keys))


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def same_directions(found: Tensor, wanted: Tensor, atol: float) -> None:
    """Rows are equal but for their sign."""
    signs = torch.sign((found * wanted).sum(1, keepdim=True))
    torch.testing.assert_close(found, wanted * signs, atol=atol, rtol=0)


# Against PEFT


@pytest.mark.parametrize("scaling", NAMES)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_factors_and_what_is_left_are_pefts(make_base: MakeBase, make_model: MakeModel, method: str, scaling: str) -> None:
    base = make_base("llama", dtype="float32")
    config = LoraConfig(init_lora_weights=method, **NAMES[scaling])
    model = load_model(resolve_base(str(base)), dtype="float32", initial=FromWeights(config, seed=0))
    inject_lora(model, config)
    with torch.no_grad():
        plain = make_model("llama", "float32")(ids()).logits
        theirs = peft_model(make_model("llama", "float32"), method, **NAMES[scaling])
        for path, layer in lora_layers(model):
            other: Any = theirs.get_submodule(f"base_model.model.{path}")
            same_directions(layer.lora_A["default"], other.lora_A["default"].weight, 1e-4)
            same_directions(layer.lora_B["default"].T, other.lora_B["default"].weight.T, 1e-4)
            torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight, atol=1e-5, rtol=0)
            assert layer.updates["default"].scaling == other.scaling["default"]
        torch.testing.assert_close(model(ids()).logits, theirs(ids()).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids()).logits, plain, atol=1e-4, rtol=1e-4)


def test_gaussian_is_pefts_distribution(make_model: MakeModel) -> None:
    """Entries of standard deviation 1/r, of each module its own, and B zero."""
    model = make_model("llama", hidden_size=256)
    inject_lora(model, LoraConfig(r=8, init_lora_weights="gaussian", target_modules=["q_proj", "k_proj"]), seed=5)
    theirs = peft_model(make_model("llama", hidden_size=256), "gaussian", r=8)
    factors = [layer.lora_A["default"].detach() for _, layer in lora_layers(model)]
    for A in factors:
        assert abs(A.std().item() * 8 - 1) < 0.1
        assert abs(A.mean().item()) < 0.02
    other: Any = theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert abs(other.lora_A["default"].weight.std().item() * 8 - 1) < 0.1
    assert len({float(A[0, 0]) for A in factors}) == len(factors)
    assert not any(layer.lora_B["default"].any() for _, layer in lora_layers(model))


# Mathematics


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 33)])
def test_pissa_is_the_best_approximation(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    U, S, V = np.linalg.svd(weight.double().numpy())
    best = torch.from_numpy(U[:, :5] * S[:5] @ V[:5])
    A, B = initial.pissa(weight, 5, scaling=2.5)
    torch.testing.assert_close(2.5 * (B.double() @ A.double()), best, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0))
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_randomized_decomposition_finds_the_same() -> None:
    weight = decaying(70, 90)
    exact = initial.pissa(weight, 6, 1.0)
    found = initial.pissa(weight, 6, 1.0, niter=4, generator=torch.Generator().manual_seed(1))
    again = initial.pissa(weight, 6, 1.0, niter=4, generator=torch.Generator().manual_seed(1))
    for part, wanted, same in zip(found, exact, again, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-4, rtol=0)
        assert torch.equal(part, same)
    whole = initial.randomized_svd(random(9, 12), 9, 0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole[0] * whole[1] @ whole[2], random(9, 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20)])
def test_olora_is_the_beginning_of_a_qr_decomposition(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    Q, R = np.linalg.qr(weight.double().numpy())
    A, B = initial.olora(weight, 4)
    torch.testing.assert_close(B.double() @ A.double(), torch.from_numpy(Q[:, :4] @ R[:4]), atol=1e-4, rtol=0)
    torch.testing.assert_close(B.T @ B, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_loftq_is_its_algorithm_in_float64(iterations: int) -> None:
    """Quantization is rounding to halves, which loses enough; the factors in turns are numpy's."""
    weight, scaling, r = random(24, 36), 3.0, 5

    def rounded(value: Tensor) -> Tensor:
        return (value * 2).round() / 2

    product = previous = np.zeros((24, 36))
    for _ in range(iterations):
        previous = product
        rest = weight.double().numpy() - np.round((weight.double().numpy() - product) * 2) / 2
        U, S, V = np.linalg.svd(rest)
        product = U[:, :r] * S[:r] @ V[:r]
    start, subtracted = initial.loftq(weight, r, scaling, iterations, rounded)
    torch.testing.assert_close(scaling * (start[1] @ start[0]).double(), torch.from_numpy(product), atol=1e-4, rtol=0)
    assert (subtracted is None) == (iterations == 1)
    if subtracted is not None:
        found = scaling * (subtracted[1] @ subtracted[0]).double()
        torch.testing.assert_close(found, torch.from_numpy(previous), atol=1e-4, rtol=0)


def test_directions_of_inputs_are_pefts_incremental_ones() -> None:
    """PEFT's IncrementalPCA with full decompositions, over batches whose mean moves."""
    from peft.utils.incremental_pca import IncrementalPCA

    ours, theirs = initial.InputDirections(5, torch.Generator().manual_seed(0)), IncrementalPCA(n_components=5)
    spread = torch.diag(0.6 ** torch.arange(30))
    for number in range(4):
        batch = random(50, 30, seed=number) @ spread + 0.3 * number * random(1, 30, seed=99)
        ours.update(batch)
        theirs.partial_fit(batch)
    assert ours.directions is not None
    same_directions(ours.directions, theirs.components_.float(), 1e-3)
    torch.testing.assert_close(ours.directions @ ours.directions.T, torch.eye(5), atol=1e-5, rtol=0)


# EVA in a model


def test_eva_sets_A_to_the_directions_of_each_layers_inputs(make_model: MakeModel) -> None:
    """In numpy, from the inputs that the base's layers are seen to get at the places that count."""
    model = make_model("llama")
    seen: dict[str, list[Tensor]] = {}
    counts = torch.rand(2, 17, generator=torch.Generator().manual_seed(0)) < 0.8
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda _, args, __, path=path: seen.setdefault(path, []).append(args[0][counts]))
    with torch.no_grad():
        plain = model(ids()).logits
    inject_lora(model, LoraConfig(r=3, init_lora_weights="eva", target_modules="all-linear"))
    before = {path: layer.base_layer.weight.clone() for path, layer in lora_layers(model)}
    assert start_from_inputs(model, [(lambda: model(ids()), counts)]) == []
    paths = [path for path, _ in lora_layers(model)]
    assert len(paths) == 14
    for path, layer in lora_layers(model):
        inputs = seen[path][0].double()
        inputs = inputs - inputs.mean(0)
        _, S, _ = np.linalg.svd(inputs.numpy())
        A = layer.lora_A["default"].detach().double()
        caught = (inputs @ A.T).square().sum()
        assert caught > 0.999 * (S[:3] ** 2).sum()
        torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
        assert not layer.lora_B["default"].any()
        assert torch.equal(layer.base_layer.weight, before[path])
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, plain)
    assert not any(layer._forward_pre_hooks for _, layer in lora_layers(model))


def test_eva_agrees_with_peft(make_model: MakeModel) -> None:
    """Both decompose at random; at half the width PEFT's decomposition carries all columns and is exact."""
    import peft

    model = make_model("llama")
    target = ["q_proj", "k_proj", "up_proj"]
    inject_lora(model, LoraConfig(r=32, init_lora_weights="eva", target_modules=target))
    batch = torch.randint(3, 300, (4, 30), generator=torch.Generator().manual_seed(0))
    start_from_inputs(model, [(lambda: model(batch), torch.ones(4, 30, dtype=torch.bool))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eva = peft.EvaConfig(rho=1.0, tau=0.99)
        config = peft.LoraConfig(r=32, init_lora_weights="eva", target_modules=target, eva_config=eva)
        theirs = peft.get_peft_model(make_model("llama"), config)
        peft.initialize_lora_eva_weights(theirs, [{"input_ids": batch}], show_progress_bar=False)
    for path, layer in lora_layers(model):
        other: Any = theirs.get_submodule(f"base_model.model.{path}")
        # Directions of nearly equal weight turn into one another by rounding; the first ones stand apart.
        same_directions(layer.lora_A["default"][:4].detach(), other.lora_A["default"].weight[:4].detach(), 2e-2)


def test_eva_needs_as_many_tokens_as_directions_and_linear_layers(make_model: MakeModel) -> None:
    model = make_model("llama")
    inject_lora(model, LoraConfig(r=16, init_lora_weights="eva", target_modules=["q_proj"]))
    few = torch.zeros(2, 17, dtype=torch.bool)
    few[0, :15] = True
    with pytest.raises(ConfigError, match="fewer tokens"):
        start_from_inputs(model, [(lambda: model(ids()), few)])
    with pytest.raises(ConfigError, match="embed_tokens"):
        inject_lora(make_model("llama"), LoraConfig(init_lora_weights="eva", target_modules=["embed_tokens"]))


# In a model


def test_dora_starts_at_the_same_function(make_base: MakeBase, make_model: MakeModel) -> None:
    """Its magnitude is |W - s B' A' + s B A|, which is |W|."""
    config = LoraConfig(r=4, init_lora_weights="pissa", use_dora=True)
    source = resolve_base(str(make_base("llama", dtype="float32")))
    model = load_model(source, dtype="float32", initial=FromWeights(config, 0))
    inject_lora(model, config)
    plain = make_model("llama", "float32")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, plain(ids()).logits, atol=1e-4, rtol=1e-4)
    for path, layer in lora_layers(model):
        norms = torch.linalg.vector_norm(plain.get_submodule(path).weight, dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].detach(), norms.detach(), atol=1e-5, rtol=1e-5)


def test_factors_in_bfloat16_give_back_what_they_took(make_base: MakeBase) -> None:
    config = LoraConfig(r=4, init_lora_weights="pissa", dtype="bfloat16")
    source = resolve_base(str(make_base("llama", dtype="float32")))
    model = load_model(source, dtype="float32", initial=FromWeights(config, 0))
    report = inject_lora(model, config)
    plain = load_model(source, dtype="float32")
    for path, layer in lora_layers(model):
        A, B = (layer.parts("default")[part].detach() for part in ("lora_A.weight", "lora_B.weight"))
        assert A.dtype == torch.bfloat16
        back = layer.base_layer.weight + layer.updates["default"].scaling * (B.float() @ A.float())
        torch.testing.assert_close(back, plain.get_submodule(path).weight, atol=1e-5, rtol=0)
    assert max(after for _, after in report.errors.values()) < 1e-6


def test_the_report_names_errors_before_and_after(make_base: MakeBase) -> None:
    config = LoraConfig(r=8, init_lora_weights="loftq", loftq_iterations=4)
    source = resolve_base(str(make_base("llama")))
    model = load_model(source, quantization=QuantizationConfig(), initial=FromWeights(config, 0))
    report = inject_lora(model, config)
    assert set(report.errors) == set(report.targeted)
    lines = str(report).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("quantization error"))
    for line, index in ((lines[at + 1], 0), (lines[at + 2], 1)):
        values = [both[index] for both in report.errors.values()]
        assert f"median {np.median(values):.4g}, worst {max(values):.4g}" in line
    assert "quantization error" not in str(inject_lora(load_model(source), LoraConfig(r=2)))


# Refused


def test_a_start_from_the_weights_must_be_prepared(make_base: MakeBase, make_model: MakeModel) -> None:
    pissa, olora = (LoraConfig(r=4, init_lora_weights=method) for method in ("pissa", "olora"))
    with pytest.raises(ConfigError, match="load_base"):
        inject_lora(make_model("llama"), pissa)
    model = load_model(resolve_base(str(make_base("llama"))), initial=FromWeights(pissa, 0))
    for other in (
        olora,
        LoraConfig(r=5, init_lora_weights="pissa"),
        pissa.model_copy(update={"target_modules": ["q_proj"]}),
    ):
        with pytest.raises(ConfigError, match="prepared for another start"):
            inject_lora(model, other)
    with pytest.raises(AdapterError, match="residual"):
        inject_lora(model, LoraConfig(r=4))
    assert not list(lora_layers(model))
    inject_lora(model, pissa)


def test_a_changed_base_is_not_used_alone(make_base: MakeBase) -> None:
    from qlora.lora.switch import adapters_by_row, set_adapter

    config = LoraConfig(r=4, init_lora_weights="pissa")
    model = load_model(resolve_base(str(make_base("llama"))), initial=FromWeights(config, 0))
    inject_lora(model, config)
    for use in (lambda: qlora.disable_adapter(model), lambda: adapters_by_row(model, [None, "default"])):
        with pytest.raises(AdapterError, match="load the base again"), use():
            pass
    for work in (lambda: set_adapter(model, None), lambda: qlora.delete_adapter(model, "default")):
        with pytest.raises(AdapterError, match="load the base again"):
            work()


def test_eva_in_a_library_says_that_it_waits_and_starts_when_called(make_model: MakeModel) -> None:
    model = make_model("llama")
    report = inject_lora(model, LoraConfig(r=3, init_lora_weights="eva", target_modules=["q_proj", "lm_head"]))
    assert report.waits_for_inputs
    assert "A waits for data" in str(report)
    batch = ids()
    before = {path: layer.lora_A["default"].clone() for path, layer in lora_layers(model)}
    assert qlora.start_from_inputs(model, [(lambda: model(batch), torch.ones_like(batch, dtype=torch.bool))]) == []
    assert all(not torch.equal(layer.lora_A["default"], before[path]) for path, layer in lora_layers(model))
    plain = inject_lora(make_model("llama"), LoraConfig(r=3))
    assert not plain.waits_for_inputs
    assert "waits" not in str(plain)


def test_a_head_that_no_batch_runs_through_is_named_as_such(make_model: MakeModel) -> None:
    model: Any = make_model("llama")
    inject_lora(model, LoraConfig(r=3, init_lora_weights="eva", target_modules=["q_proj", "lm_head"]))
    batch = ids()
    runs = [(lambda: model.get_decoder()(batch), torch.ones_like(batch, dtype=torch.bool))]
    unused = start_from_inputs(model, runs)
    assert describe_unused(model, unused) == ["the output head keeps A's default start: lm_head"]
    assert describe_unused(model, ["model.layers.0.self_attn.q_proj", *unused]) == [
        "the output head keeps A's default start: lm_head",
        "1 layers saw none of the data, and start as by default: model.layers.0.self_attn.q_proj ...",
    ]
