"""How long a step takes on many GPUs: a model of compute, gathers and links. Arithmetic, never a measurement.

A micro-step is a row of modules, forward and backward, each with its arithmetic and, under ZeRO-3, with a gather that has to
be there first. Gathers run one after another beside the computation, ahead of it as far as DeepSpeed lets them; what they
cannot hide is waited for. What the machine does in a second (arithmetic, links, latencies) comes from whoever asks, measured
or assumed. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qlora.config.schema import JobConfig
from qlora.plan.gathers import max_live
from qlora.plan.memory import Mode, plan_rank, recomputes
from qlora.plan.parameters import Stored, ZeroSettings, layer_of, stored_parameters
from qlora.plan.shapes import BaseShapes

_GRADIENT_BYTES = 4  # of A and B, whatever they are
_UPDATE_BYTES = 28  # read and written a parameter by Adam in fp32: value, gradient, two moments


@dataclass(frozen=True)
class Machine:
    """What the GPUs and their links do. Rates a second; whether they were measured is for the caller to say.

    Attributes:
        flop_per_second: what one GPU achieves in a step, not its peak.
        memory_bytes_per_second: of one GPU's memory.
        gpus_per_node: ranks that reach each other by the inner link.
        inner_bytes_per_second, outer_bytes_per_second: at which one rank receives a gather, in a node and across nodes.
        inner_hop_seconds, outer_hop_seconds: latency of one hop of a ring.
        gather_seconds: of the host for every gather, hooks included.
        copy_bytes_per_second: at which gathered bytes are unpacked; DeepSpeed copies them once. None costs nothing.
        overlap: share of a gather's time that can pass beside the computation; 0 where both use the same cores.
    """

    flop_per_second: float
    memory_bytes_per_second: float = 3.0e12
    gpus_per_node: int = 8
    inner_bytes_per_second: float = 360e9
    outer_bytes_per_second: float = 45e9
    inner_hop_seconds: float = 1.5e-6
    outer_hop_seconds: float = 5e-6
    gather_seconds: float = 0.0
    copy_bytes_per_second: float | None = None
    overlap: float = 1.0

    def collective_seconds(self, num_bytes: float, ranks: int) -> float:
        """One all-gather or reduce-scatter by a ring: `num_bytes` is the whole, of which a rank moves (N-1)/N."""
        if ranks == 1:
            return 0.0
        crosses = ranks > self.gpus_per_node
        rate = self.outer_bytes_per_second if crosses else self.inner_bytes_per_second
        hop = self.outer_hop_seconds if crosses else self.inner_hop_seconds
        return hop * (ranks - 1) + num_bytes * (ranks - 1) / ranks / rate

    def unpack_seconds(self, num_bytes: float) -> float:
        """Copying what was gathered to where it is used."""
        return 0.0 if self.copy_bytes_per_second is None else num_bytes / self.copy_bytes_per_second


@dataclass(frozen=True)
class Work:
    """One module in one pass of a micro-step.

    Attributes:
        module: its path.
        flop: arithmetic of this pass over all tokens.
        gathered: bytes that ZeRO-3 gathers for it, own share included.
        elements: of these, as DeepSpeed counts them.
    """

    module: str
    flop: float
    gathered: int
    elements: int


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of a rank, in seconds, by the model.

    Attributes:
        compute: arithmetic alone, over all micro-steps.
        gather: of all gathers, one after another.
        waited: of these, what computation did not hide.
        reduce: LoRA's gradients over ranks, counted as not hidden.
        update: the optimizer, and gathering what stays whole after it.
        host: what the host takes for hooks; the step cannot be shorter.
    """

    compute: float
    gather: float
    waited: float
    reduce: float
    update: float
    host: float

    @property
    def total(self) -> float:
        """The whole step. Where nothing overlaps, the host's time adds up in `waited` already."""
        return max(self.compute + self.waited, self.host) + self.reduce + self.update

    @property
    def efficiency(self) -> float:
        """The same work's speed against a GPU that waits for nobody."""
        return self.compute / self.total


def flop_per_token(base: BaseShapes, job: JobConfig, context: int, *, recompute: bool) -> float:
    """Arithmetic of one token, forward and backward, over a frozen base.

    A frozen weight costs 2 FLOP forward and 2 for the gradient of its input; none for its own. A weight of A or B costs 2
    and 4. Causal attention costs 2 T D a layer forward, twice that backward. Recomputing repeats the layers' forward pass.

    Args:
        context: tokens a document has.
    """
    linear = sum(t.num_elements for t in base.tensors if t.kind == "linear")
    head = sum(t.num_elements for t in base.tensors if t.kind == ("embedding" if base.tied else "head"))
    lora = sum(p.elements for p in stored_parameters(base, job) if p.part == "trained")
    attention = 2 * context * base.hidden_size * base.num_layers
    once = 4 * (linear + head) + 6 * lora + 3 * attention
    return once + (2 * linear + 2 * lora + attention) * recompute


def passes(base: BaseShapes, job: JobConfig, tokens: int, context: int, *, recompute: bool) -> list[Work]:
    """A micro-step's work in its order: forward, head with its gradient, then layer by layer backward.

    Its arithmetic adds up to `flop_per_token` times the tokens, its bytes to `memory.gathered_bytes`.

    Args:
        tokens: of the micro-step, over all its documents.
        context: tokens a document has.
    """
    modules = _modules(base, job, tokens, context)
    forward = [m.work(m.forward) for m in modules]
    backward: list[Work] = []
    for layer in reversed(_by_layer(modules)):
        again = recompute and layer[0].layer is not None
        if again and len(layer) > 1:
            backward += [m.work(m.forward) for m in layer]
        # A layer that is gathered as one is there for both.
        more = layer[0].forward if again and len(layer) == 1 else 0.0
        backward += [m.work(m.backward + more, m.backward_gathers) for m in reversed(layer)]
    return [work for work in (*forward, *backward) if work.flop or work.gathered]


@dataclass(frozen=True)
class _Module:
    """What is gathered by one hook, a layer or a module: FLOP forward and backward, and its bytes, in forward once."""

    path: str
    layer: str | None
    forward: float
    backward: float
    backward_gathers: int
    num_bytes: int
    elements: int

    def beside(self, other: _Module) -> _Module:
        """Both as one."""
        return replace(
            self,
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            backward_gathers=max(self.backward_gathers, other.backward_gathers),
            num_bytes=self.num_bytes + other.num_bytes,
            elements=self.elements + other.elements,
        )

    def work(self, flop: float, gathers: int = 1) -> Work:
        return Work(self.path, flop, self.num_bytes * gathers, self.elements * gathers)


def _modules(base: BaseShapes, job: JobConfig, tokens: int, context: int) -> list[_Module]:
    stored: dict[str, list[Stored]] = {}
    for parameter in stored_parameters(base, job):
        stored.setdefault(parameter.module, []).append(parameter)
    tensors = {t.module: t for t in base.tensors if t.kind in ("linear", "head", "embedding")}
    last_linear = {layer_of(t.module): t.module for t in base.tensors if t.kind == "linear" and t.in_layer}
    attention = 2 * context * base.hidden_size
    made = []
    for path, parameters in stored.items():
        tensor, layer = tensors.get(path), layer_of(path)
        weights = tensor.num_elements if tensor is not None and tensor.kind != "embedding" else 0
        lora = sum(p.elements for p in parameters if p.part == "trained")
        forward, backward = 2.0 * (weights + lora), 2.0 * weights + 4.0 * lora
        if last_linear.get(layer) == path and layer is not None:  # any one of the layer's modules may carry its attention
            forward, backward = forward + attention, backward + 2 * attention
        if tensor is not None and tensor.kind == "head":  # a frozen head's gradient is made in forward
            forward, backward = forward + 2.0 * weights, backward - 2.0 * weights
        gathered = [p for p in parameters if not p.stays_whole]
        uses = max((p.uses for p in gathered), default=0)
        uses //= 2 if base.tied and tensor is not None and tensor.kind == "embedding" else 1  # the head's are its own
        made.append(
            _Module(
                path, layer, tokens * forward, tokens * backward, max(0, uses - 1),
                sum(p.num_bytes for p in gathered), sum(p.elements for p in gathered),
            )
        )  # fmt: skip
        if base.tied and tensor is not None and tensor.kind == "embedding":
            head = replace(made[-1], path="head", forward=4.0 * tokens * tensor.num_elements)
    hooks = {p.module: p.gathered_with for p in stored_parameters(base, job)}
    merged: dict[str, _Module] = {}
    for module in made:
        hook = hooks[module.path]
        before = merged.get(hook)
        merged[hook] = replace(module, path=hook) if before is None else before.beside(module)
    return [*merged.values(), head] if base.tied else list(merged.values())


def _by_layer(modules: Sequence[_Module]) -> list[list[_Module]]:
    """Neighbours of one layer together; what is in none stands alone."""
    runs: list[list[_Module]] = []
    for module in modules:
        if runs and module.layer is not None and runs[-1][0].layer == module.layer:
            runs[-1].append(module)
        else:
            runs.append([module])
    return runs


def waited_seconds(work: Sequence[Work], machine: Machine, ranks: int, live: int) -> Iterator[tuple[float, float]]:
    """For every piece of work: seconds of its gather, and seconds computation waits for it.

    Gathers run in the order of use, one at a time, as long as fewer than `live` elements are there that are not done with.
    """
    done: list[tuple[float, int]] = []  # when a gathered module is done with, and its elements
    link_free = computed = 0.0
    held = released = 0
    for piece in work:
        seconds = machine.collective_seconds(piece.gathered, ranks) if piece.gathered else 0.0
        seconds += machine.unpack_seconds(piece.gathered) if ranks > 1 else 0.0
        start = link_free
        while held >= live and released < len(done):
            start, held, released = max(start, done[released][0]), held - done[released][1], released + 1
        there = start + seconds * machine.overlap
        link_free = there if piece.gathered else link_free
        waited = (max(0.0, there - computed) if piece.gathered else 0.0) + seconds * (1 - machine.overlap)
        computed += waited + piece.flop / machine.flop_per_second
        if piece.gathered:
            held += piece.elements
            done.append((computed, piece.elements))
        yield seconds, waited


def step_time(
    base: BaseShapes,
    job: JobConfig,
    mode: Mode,
    ranks: int,
    machine: Machine,
    *,
    tokens: int,
    context: int,
    micro_steps: int = 1,
    recompute: bool | None = None,
    zero: ZeroSettings | None = None,
) -> StepTime:
    """One optimizer step of one rank. A model: see the head of this file. Raises as `memory.plan_rank` does.

    Args:
        tokens: of one micro-step of one rank.
        context: tokens a document has.
        recompute: None is what the job says.
    """
    zero = zero or ZeroSettings()
    again = recomputes(job) if recompute is None else recompute
    plan_rank(base, job, mode, ranks, zero)  # refuses what training refuses
    work = passes(base, job, tokens, context, recompute=again)
    stored = stored_parameters(base, job, zero)
    compute = sum(piece.flop for piece in work) / machine.flop_per_second
    gather = waited = host = 0.0
    if mode == "zero3":
        times = list(waited_seconds(work, machine, ranks, max_live(stored, zero)))
        host = machine.gather_seconds * sum(1 for piece in work if piece.gathered)
        gather, waited = sum(t for t, _ in times), sum(t for _, t in times) + host * (1 - machine.overlap)
    trained = [p for p in stored if p.part == "trained"]
    elements = sum(p.elements for p in trained)
    # DDP adds up everywhere: a reduce-scatter and an all-gather. ZeRO scatters, and sends values round after the update.
    once = machine.collective_seconds(_GRADIENT_BYTES * elements, ranks)
    owned = elements if mode in ("single", "ddp") else -(-elements // ranks)
    reduced = once * {"single": 0, "ddp": 2, "zero1": 1}.get(mode, micro_steps)
    values = sum(p.num_bytes for p in trained if p.stays_whole or mode != "zero3")
    update = _UPDATE_BYTES * owned / machine.memory_bytes_per_second
    update += machine.collective_seconds(values, ranks) if mode.startswith("zero") else 0.0
    return StepTime(compute * micro_steps, gather * micro_steps, waited * micro_steps, reduced, update, host * micro_steps)
