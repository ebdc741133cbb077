"""The LoRA linear against plain autograd on W x + b + s (B A x + c), and on DoRA's m / |W + s B A| (W x + s B A x) + b;
and what it keeps alive between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from qlora.ops.dropout import dropout_mask
from qlora.ops.lora_linear import lora_linear, row_norms

T, I, O, R = 12, 20, 16, 4  # noqa: E741  the shape letters of the module under test
SCALING = 1.75


class Case:
    """Random W, b, A, B and x; W is handed out by a function that counts its calls."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, bias: bool = True, lora_dtype: torch.dtype | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = random(O, I).to(dtype)
        self.bias = random(O).to(dtype) if bias else None
        self.lora_A = random(R, I).to(lora_dtype or dtype).requires_grad_()
        self.lora_B = random(O, R).to(lora_dtype or dtype).requires_grad_()
        self.x = random(2, T // 2, I).to(dtype).requires_grad_()
        self.dy = random(2, T // 2, O).to(dtype)
        self.num_reads = 0

    def read_weight(self) -> Tensor:
        self.num_reads += 1
        return self.weight

    def __call__(self, x: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        x = self.x if x is None else x
        return lora_linear(x, self.read_weight, self.bias, self.lora_A, self.lora_B, SCALING, dropout)

    def plain(self, mask: Tensor | float = 1.0) -> Tensor:
        update = ((self.x * mask) @ self.lora_A.T) @ self.lora_B.T
        return torch.nn.functional.linear(self.x, self.weight, self.bias) + SCALING * update

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (self.x, self.lora_A, self.lora_B), self.dy.to(y.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_the_derivatives(dropout: float, bias: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))

    weight, bias_O = random(3, 4), random(3) if bias else None
    inputs = [random(1, 2, 4).requires_grad_(), random(2, 4).requires_grad_(), random(3, 2).requires_grad_()]

    def function(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same mask at each evaluation
        return lora_linear(x, lambda: weight, bias_O, lora_A, lora_B, SCALING, dropout)

    assert torch.autograd.gradcheck(function, inputs)


# Variants: a bias of B, and DoRA. Their gradients are those of plain autograd in float64 over the same formula.


class Variant(Case):
    """A case with a bias of B or a magnitude."""

    def __init__(self, *, bias: bool, lora_bias: bool = False, magnitude: bool = False) -> None:
        super().__init__(torch.float64, bias=bias)
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.lora_bias = random(O) if lora_bias else None
        self.magnitude = random(O) if magnitude else None

    def __call__(self, x: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        x = self.x if x is None else x
        return lora_linear(
            x, self.read_weight, self.bias, self.lora_A, self.lora_B, SCALING, dropout,
            lora_bias_O=self.lora_bias, magnitude_O=self.magnitude,
        )  # fmt: skip

    def plain(self, mask: Tensor | float = 1.0) -> Tensor:
        update = ((self.x * mask) @ self.lora_A.T) @ self.lora_B.T
        if self.lora_bias is not None:
            update = update + self.lora_bias
        y = self.x @ self.weight.T + SCALING * update
        if self.magnitude is not None:
            direction = (self.weight + SCALING * self.lora_B @ self.lora_A).detach()
            y = y * (self.magnitude / direction.norm(dim=1))
        return y if self.bias is None else y + self.bias

    def inputs(self) -> dict[str, Tensor]:
        """What may ask for a gradient."""
        named = {"x": self.x, "A": self.lora_A, "B": self.lora_B, "c": self.lora_bias, "m": self.magnitude}
        return {letter: tensor for letter, tensor in named.items() if tensor is not None}


VARIANTS = {"plain": {}, "lora_bias": {"lora_bias": True}, "dora": {"magnitude": True}}


@pytest.mark.parametrize("frozen", ["", "x", "A", "B", "cm", "xAB", "xcm", "AB"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_plain_autograd(variant: str, bias: bool, dropout: float, frozen: str) -> None:
    case = Variant(bias=bias, **VARIANTS[variant])
    wanted = {letter: t for letter, t in case.inputs().items() if letter not in frozen}
    for letter, tensor in case.inputs().items():
        tensor.requires_grad_(letter in wanted)
    torch.manual_seed(3)
    y = case(dropout=dropout)
    torch.manual_seed(3)
    mask: Tensor | float = 1.0
    if dropout:
        mask = dropout_mask(case.x.detach().reshape(-1, I), dropout, int(torch.randint(0, 2**62, ()))).reshape(case.x.shape)
    want = case.plain(mask)
    torch.testing.assert_close(y, want)
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    found = torch.autograd.grad(y, list(wanted.values()), case.dy)
    plain = torch.autograd.grad(want, list(wanted.values()), case.dy)
    for letter, ours, right in zip(wanted, found, plain, strict=True):
        torch.testing.assert_close(ours, right, msg=lambda text, letter=letter: f"d{letter}: {text}")
    # The weight is read for dx and dm alone, and once for both.
    assert case.num_reads == 1 + bool({"x", "m"} & set(wanted))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_with_the_norm_constant_doras_gradients_are_the_derivatives(bias: bool, dropout: float) -> None:
    """Of x and m, which the norm does not depend on."""
    case = Variant(bias=bias, magnitude=True)
    for tensor in (case.lora_A, case.lora_B):
        tensor.requires_grad_(False)

    def function(x: Tensor, magnitude: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same mask at each evaluation
        case.magnitude = magnitude
        return case(x, dropout)

    assert torch.autograd.gradcheck(function, [case.x, case.magnitude])


def test_a_bias_of_B_has_the_derivative_of_a_bias() -> None:
    case = Variant(bias=True, lora_bias=True)

    def function(*inputs: Tensor) -> Tensor:
        case.x, case.lora_A, case.lora_B, case.lora_bias = inputs
        return case()

    assert torch.autograd.gradcheck(function, list(case.inputs().values()))


def test_row_norms_are_those_of_the_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.float64)
    want = torch.linalg.vector_norm(case.weight + SCALING * case.lora_B @ case.lora_A, dim=1)
    for at_one_time in (1, 3 * I, 1 << 20):
        monkeypatch.setattr("qlora.ops.lora_linear.NORM_ELEMENTS", at_one_time)
        norms = row_norms(case.weight, case.lora_A, case.lora_B, SCALING)
        torch.testing.assert_close(norms, want.detach())
        assert not norms.requires_grad
    # Rows that are not contiguous, as Conv1D's are, and 16-bit weights.
    torch.testing.assert_close(row_norms(case.weight.T.contiguous().T, case.lora_A, case.lora_B, SCALING), want.detach())
    assert row_norms(case.weight.bfloat16(), case.lora_A.float(), case.lora_B.float(), SCALING).dtype == torch.float32


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    """It has no direction to scale: nothing is divided by its norm of 0."""
    case = Variant(bias=True, magnitude=True)
    with torch.no_grad():
        case.weight[2] = 0
        case.lora_B[2] = 0
        case.magnitude[2] = 0
    y = case()
    assert torch.equal(y[..., 2], case.bias[2].expand(y.shape[:-1]))
    for gradient in torch.autograd.grad(y, list(case.inputs().values()), case.dy):
        assert gradient.isfinite().all()


def test_doras_sum_is_rounded_once_in_bf16() -> None:
    """After x W^T: each is the bf16 number nearest to the exact one, so that small steps of m and of B add up."""
    case = Variant(bias=True, magnitude=True)
    weight, x = case.weight.bfloat16(), torch.randn(500, I, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias, A, B = case.bias.bfloat16(), case.lora_A.float().detach(), case.lora_B.float().detach()
    magnitude = row_norms(weight, A, B, SCALING) * 1.001
    y = lora_linear(x, lambda: weight, bias, A, B, SCALING, magnitude_O=magnitude)
    h = (x @ A.bfloat16().T).double()
    z = (x @ weight.T).double() + SCALING * h @ B.double().T
    want = z * (magnitude.double() / row_norms(weight, A, B, SCALING).double()) + bias.double()
    # fp32 errs by 1e-7 in a sum of few terms: where the exact number is that near to the middle of two, either is right.
    assert (want.bfloat16() == y).float().mean() > 0.999


@pytest.mark.parametrize("without", ["x", "A", "B", "AB"])
def test_gradients_that_nobody_asked_for_are_not_made(without: str) -> None:
    case, other = Case(torch.float64), Case(torch.float64)
    inputs = {"x": "x", "A": "lora_A", "B": "lora_B"}
    for letter in without:
        getattr(case, inputs[letter]).requires_grad_(False)
    case().backward(case.dy)
    other.plain().backward(other.dy)
    for letter, name in inputs.items():
        found = getattr(case, name).grad
        if letter in without:
            assert found is None
        else:
            torch.testing.assert_close(found, getattr(other, name).grad)


@pytest.mark.parametrize("bias", [True, False])
def test_fp32_equals_plain_autograd(bias: bool) -> None:
    case = Case(bias=bias)
    found, want = case(), case.plain()
    torch.testing.assert_close(found, want)
    for ours, plain in zip(case.gradients(found), case.gradients(want), strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_update_alone_may_be_absent() -> None:
    case = Case()
    y = lora_linear(case.x, case.read_weight, case.bias, None, None, 1.0)
    want = torch.nn.functional.linear(case.x, case.weight, case.bias)
    assert torch.equal(y, want)
    assert torch.equal(*(torch.autograd.grad(out, case.x, case.dy)[0] for out in (y, want)))


def test_bf16_with_fp32_factors_errs_by_bf16_rounding_alone() -> None:
    """Against the same numbers in float64. bf16 has 8 bits: each of the few roundings moves a sum by at most 2**-8 of the
    size of its terms, so 2% of the largest entry is a bound that wrong mathematics would not keep."""
    case, exact = Case(torch.bfloat16, lora_dtype=torch.float32), Case(torch.float64)
    for name in ("weight", "bias", "dy"):
        setattr(exact, name, getattr(case, name).double())
    for name in ("lora_A", "lora_B", "x"):
        setattr(exact, name, getattr(case, name).detach().double().requires_grad_())
    y, want = case(), exact.plain()
    assert y.dtype == torch.bfloat16
    assert (y - want).abs().max() < 0.02 * want.abs().max()
    gradients = case.gradients(y)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    for ours, right in zip(gradients, exact.gradients(want), strict=True):
        assert (ours - right).abs().max() < 0.02 * right.abs().max()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_output_has_the_type_of_the_input(x_dtype: torch.dtype) -> None:
    case = Case()
    y = case(case.x.detach().to(x_dtype))
    assert y.dtype == x_dtype
    torch.testing.assert_close(y.float(), case.plain(), rtol=0.02, atol=0.2)


def test_autocast_gives_its_type_and_gradients_of_the_parameters_types() -> None:
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case()
        want = torch.nn.functional.linear(case.x, case.weight, case.bias)
    assert y.dtype == want.dtype == torch.bfloat16
    # The weight is given in fp32 and is multiplied in fp32: the input alone is rounded.
    rounded = case.x.detach().bfloat16().float()
    plain = torch.nn.functional.linear(rounded, case.weight, case.bias) + SCALING * (rounded @ case.lora_A.T @ case.lora_B.T)
    torch.testing.assert_close(y, plain.bfloat16(), rtol=2**-7, atol=2**-7)
    assert [g.dtype for g in case.gradients(y)] == [torch.float32] * 3


# What is kept, and how often the weight is read.


def run_and_count_saved(function: Callable[[], Tensor]) -> tuple[Tensor, int]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return y, sum(tensor.numel() for tensor in saved)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_saves_more_than_the_input(variant: str, dropout: float) -> None:
    case = Variant(bias=True, **VARIANTS[variant])
    _, num_saved = run_and_count_saved(lambda: case(dropout=dropout))
    assert num_saved == case.x.numel()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("with_update", [True, False])
def test_nothing_is_saved_but_the_input_of_an_update(with_update: bool, dropout: float) -> None:
    case = Case()
    if with_update:
        y, num_saved = run_and_count_saved(lambda: case(dropout=dropout))
    else:
        y, num_saved = run_and_count_saved(lambda: lora_linear(case.x, case.read_weight, case.bias, None, None, 1.0))
    assert num_saved == (case.x.numel() if with_update else 0)
    _, num_saved_plainly = run_and_count_saved(lambda: case.plain())
    assert num_saved_plainly > case.x.numel() + case.weight.numel()
    y.sum().backward()


def test_no_weight_that_was_read_stays_alive() -> None:
    import weakref

    case = Case()
    handed_out = []

    def read_weight() -> Tensor:
        weight = case.weight.clone()
        handed_out.append(weakref.ref(weight))
        return weight

    y = lora_linear(case.x, read_weight, case.bias, case.lora_A, case.lora_B, SCALING)
    assert [ref() for ref in handed_out] == [None]
    y.sum().backward()
    assert [ref() for ref in handed_out] == [None, None]


@pytest.mark.parametrize(("x_needs_gradient", "reads_in_backward"), [(True, 1), (False, 0)])
def test_the_weight_is_read_once_forward_and_at_most_once_backward(x_needs_gradient: bool, reads_in_backward: int) -> None:
    case = Case()
    case.x.requires_grad_(x_needs_gradient)
    y = case()
    assert case.num_reads == 1
    y.backward(case.dy)
    assert case.num_reads == 1 + reads_in_backward


def test_backward_uses_the_weight_as_it_is_then() -> None:
    """ZeRO-3 frees the weight after forward and puts it, gathered anew, into other storage before backward."""
    case = Case()
    y = case()
    want = torch.autograd.grad(case.plain(), case.x, case.dy)[0]
    case.weight = case.weight.clone()
    torch.testing.assert_close(torch.autograd.grad(y, case.x, case.dy)[0], want)


def test_layers_may_be_handed_their_weights_in_one_buffer() -> None:
    cases = [Case(torch.float64), Case(torch.float64)]
    mix = torch.randn(O, I, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cases[1].weight = torch.flip(cases[0].weight, [0])
    buffer = torch.empty(O, I, dtype=torch.float64)

    def run(apply: Callable[[Case, Tensor], Tensor]) -> tuple[Tensor, ...]:
        y = apply(cases[1], apply(cases[0], cases[0].x) @ mix)
        inputs = (cases[0].x, cases[0].lora_A, cases[0].lora_B, cases[1].lora_A, cases[1].lora_B)
        return y, *torch.autograd.grad(y, inputs, cases[0].dy)

    def ours(case: Case, x: Tensor) -> Tensor:
        return lora_linear(x, lambda: buffer.copy_(case.weight), case.bias, case.lora_A, case.lora_B, SCALING)

    def plain(case: Case, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, case.weight, case.bias) + SCALING * (x @ case.lora_A.T @ case.lora_B.T)

    torch.testing.assert_close(run(ours), run(plain))


# Dropout.


def test_dropout_is_the_mask_on_the_input_of_A_alone() -> None:
    case = Case(torch.float64)
    torch.manual_seed(3)
    y = case(dropout=0.5)
    torch.manual_seed(3)
    mask = dropout_mask(case.x.detach().reshape(-1, I), 0.5, int(torch.randint(0, 2**62, ()))).reshape(case.x.shape)
    want = case.plain(mask)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(y, want)
    for ours, plain in zip(case.gradients(y), case.gradients(want), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_dropout_keeps_the_expectation(dropout: float) -> None:
    like = torch.ones(400, 500)
    mask = dropout_mask(like, dropout, seed=11)
    kept = (mask != 0).double().mean().item()
    # 200,000 draws: five standard deviations of a share.
    assert abs(kept - (1 - dropout)) < 5 * (dropout * (1 - dropout) / like.numel()) ** 0.5
    torch.testing.assert_close(mask[mask != 0], torch.full((int((mask != 0).sum()),), 1 / (1 - dropout)))
    assert torch.equal(mask, dropout_mask(like, dropout, seed=11))
    assert not torch.equal(mask, dropout_mask(like, dropout, seed=12))


def test_each_call_draws_another_mask_and_the_seed_decides_which() -> None:
    case = Case()
    torch.manual_seed(0)
    first, second = case(dropout=0.5), case(dropout=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(case(dropout=0.5), first)


def test_without_dropout_no_random_number_is_drawn() -> None:
    case = Case()
    before = torch.get_rng_state()
    case()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_mask(use_reentrant: bool) -> None:
    case = Case(torch.float64)
    torch.manual_seed(5)
    y = case(dropout=0.5)
    y.backward(case.dy)
    want = [t.grad.clone() for t in (case.x, case.lora_A, case.lora_B)]
    for tensor in (case.x, case.lora_A, case.lora_B):
        tensor.grad = None
    torch.manual_seed(5)
    again = checkpoint(lambda x: case(x, dropout=0.5), case.x, use_reentrant=use_reentrant)
    torch.rand(3)  # what the rest of a model draws in between
    again.backward(case.dy)
    assert torch.equal(again, y)
    assert all(torch.equal(t.grad, w) for t, w in zip((case.x, case.lora_A, case.lora_B), want, strict=True))


class CutUp:
    """Two layers whose parameters have no elements but while they compute, as ZeRO-3 leaves them."""

    def __init__(self, *, trainable: bool, save_weight: bool) -> None:
        self.cases = [Case(torch.float64), Case(torch.float64)]
        self.save_weight = save_weight
        for case in self.cases:
            case.weight = case.weight.T @ case.weight / O  # square, so that one follows the other
            case.bias, case.lora_B = None, torch.randn(I, R, dtype=torch.float64)
            case.lora_A.requires_grad_(trainable)
            case.lora_B.requires_grad_(trainable)
            case.whole = {name: getattr(case, name).data for name in ("weight", "lora_A", "lora_B")}

    def cut(self, case: Case) -> None:
        for name in case.whole:
            getattr(case, name).data = torch.empty(0, dtype=torch.float64)

    def gather(self, case: Case) -> None:
        for name, whole in case.whole.items():
            getattr(case, name).data = whole

    def __call__(self, x: Tensor) -> Tensor:
        for case in self.cases:
            self.gather(case)
            x = x @ case.weight if self.save_weight else case(x)
            x.register_hook(lambda _, case=case: self.gather(case))
            self.cut(case)
        return x


@pytest.mark.parametrize("trainable", [True, False])
def test_recomputation_survives_parameters_that_are_cut_up_in_between(trainable: bool) -> None:
    """It compares the shapes of what was saved, and a frozen tensor is saved as itself, so none may be among it."""
    layers = CutUp(trainable=trainable, save_weight=False)
    x = layers.cases[0].x
    (want,) = torch.autograd.grad(layers(x).sum(), x)
    (found,) = torch.autograd.grad(checkpoint(layers, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, want)
    with pytest.raises(CheckpointError, match="different metadata"):
        checkpoint(CutUp(trainable=trainable, save_weight=True), x, use_reentrant=False).sum().backward()
