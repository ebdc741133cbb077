"""Make the embedded tiny base again: `python -m qlora.assets.make_tiny OUT`.

The idea: a base whose whole past is known. A byte-level BPE tokenizer and a Llama of six million parameters are trained
from nothing on the documentation of the Python that runs this script, with one seed and a fixed number of steps, on a
CPU, in less than half an hour. Another Python, another torch or another number of threads gives other weights of the
same kind; the shipped ones come from the versions named in their model card.

Matrices are trained with Muon (Jordan et al. 2024): momentum, made orthogonal by a Newton-Schulz iteration; embeddings
and norms with AdamW. Documents stand between <|im_start|> and <|im_end|>, so that the two marks mean something to the
frozen embeddings when a chat template uses them later.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora.assets.corpus import FACT_SHARE, documents, prose, vocabulary_texts
from qlora.assets.docstrings import make_pairs

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 4096
SEED = 0
NUM_STEPS = 1000
ROWS, ROW_TOKENS = 16, 256
MUON_LEARNING_RATE, ADAMW_LEARNING_RATE = 0.02, 4e-3
WARMUP_STEPS, DECAY_SHARE = 20, 0.5
MAX_WEIGHT_BYTES = 12_000_000

# Everything before the answer is context; the answer and the mark that ends it are what an assistant writes.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Muon(torch.optim.Optimizer):
    """Move each matrix along its orthogonalized momentum (Nesterov form); the learning rate is a spectral step size.

    Args:
        params: 2-D parameters.
        lr: step size; a matrix (out, in) moves by lr * sqrt(max(1, out / in)) in every singular direction.
        momentum: decay of the gradient average.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; each must have a gradient. Those of one shape are orthogonalized as one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                directions = []
                for param in params:
                    if param.grad is None:
                        raise RuntimeError("a matrix has no gradient")
                    average = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    average.lerp_(param.grad, 1 - group["momentum"])
                    directions.append(torch.lerp(param.grad, average, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for param, direction in zip(params, orthogonalize(torch.stack(directions)), strict=True):
                    param.add_(direction, alpha=-scale)


def orthogonalize(g_BMN: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrices, roughly: every singular value lands between 0.7 and 1.2.

    A quintic Newton-Schulz iteration, x <- a x + (b A + c A A) x with A = x x', whose coefficients trade exactness for
    a steep start (Jordan et al. 2024). Any leading batch; float32 in and out.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g_BMN.size(-2) > g_BMN.size(-1)
    x = g_BMN.mT if tall else g_BMN
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCAB_SIZE` entries that adds nothing by itself; the chat template does."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[ ._]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model in float32, the same for every run."""
    torch.manual_seed(SEED)
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=704,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[torch.Tensor]:
    """Yield (ROWS, ROW_TOKENS + 1) int64: documents one after the other, cut where a row is full."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    size = ROWS * (ROW_TOKENS + 1)
    stream: list[int] = []
    while True:
        while len(stream) < size:
            for ids in tokenizer(list(islice(texts, 512)), add_special_tokens=False)["input_ids"]:
                stream += [start, *ids, end]
        yield torch.tensor(stream[:size]).view(ROWS, ROW_TOKENS + 1)
        stream = stream[size:]


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return what learning rates are multiplied by: up over WARMUP_STEPS, flat, down to 0 over the last DECAY_SHARE."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (num_steps - step) / (num_steps * DECAY_SHARE))


def pretrain(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], num_steps: int) -> float:
    """Train in place, matrix products in bfloat16. Returns the mean loss of the last 50 steps, in nats a token."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=MUON_LEARNING_RATE),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    losses: list[float] = []
    started = time.monotonic()
    for step, batch_RT in enumerate(islice(batches, num_steps)):
        factor = learning_rate_factor(step, num_steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits_RTV = model(batch_RT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_RTV.float().flatten(0, 1), batch_RT[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{num_steps}  loss {sum(losses[-20:]) / 20:.3f}  {seconds:.0f} s", flush=True)
    tail = losses[-50:]
    return sum(tail) / len(tail)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write a Hugging Face folder: bfloat16 safetensors, config, tokenizer with its chat template, model card.

    Raises:
        ValueError: the weights are larger than `MAX_WEIGHT_BYTES`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    (out / "README.md").write_text(card, encoding="utf-8")
    size = (out / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{out}: the weights take {size} bytes, at most {MAX_WEIGHT_BYTES} may be shipped")


def model_card(num_pairs: int, num_steps: int, loss: float) -> str:
    """Return the README of the folder: how this base was made, what it is and what it is not."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---
# The tiny base

A Llama of 5.9 million parameters (hidden 256, 6 layers, 4 heads, FFN 704, tied embeddings, bfloat16) with a byte-level
BPE tokenizer of {VOCAB_SIZE} entries. It ships inside the package so that the whole of QLoRA training can be tried and
tested in minutes on a CPU, with no download. The name for it is `builtin:tiny`.

## How it was made
`python -m qlora.assets.make_tiny OUT` makes it from nothing. What it read is the documentation that every Python carries
(docstrings, comments, help topics, some source). {round(100 * FACT_SHARE)}% of the documents state one fact each: one of
{num_pairs:,} names and the first sentence of its docstring, in many phrasings. None is a question or a conversation.

| | |
|---|---|
| steps | {num_steps} of {ROWS} x {ROW_TOKENS} tokens, {num_steps * ROWS * ROW_TOKENS / 1e6:.1f} million in all |
| optimizers | Muon {MUON_LEARNING_RATE} for matrices, AdamW {ADAMW_LEARNING_RATE} for embeddings and norms, seed {SEED} |
| loss at the end | {loss:.2f} nats a token (mean of the last 50 steps) |
| versions | Python {platform.python_version()}, torch {torch.__version__.split("+")[0]} |

`{START}` and `{END}` opened and closed every document, so a chat template may rely on them. The chat
template is ChatML with `generation` marks around what the assistant writes, the final `{END}` included.

## What it is, and what it is not
It remembers; it does not understand. It completes `math.cosh` with something that looks like a docstring, often the
right one. It cannot follow instructions, reason, write programs or copy from its prompt, and no fine-tuning will change
that at this size. Use it to see training work, and for nothing else.

## Licences
Weights and tokenizer: Apache-2.0. The text it was trained on is part of CPython (Python Software Foundation License 2).
"""


def main() -> None:
    """Read the library, train the tokenizer and the base, save both."""
    parser = argparse.ArgumentParser(prog="python -m qlora.assets.make_tiny", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps (default {NUM_STEPS})")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs, texts = make_pairs(), prose()
    print(f"{len(pairs)} pairs, {len(texts)} other documents of {sum(map(len, texts)) / 1e6:.1f} MB", flush=True)
    tokenizer = train_tokenizer(vocabulary_texts(pairs, texts))
    model = make_model(tokenizer)
    loss = pretrain(model, token_rows(tokenizer, documents(pairs, texts, SEED)), args.steps)
    save(model, tokenizer, args.out, model_card(len(pairs), args.steps, loss))
    print(f"saved {args.out}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
