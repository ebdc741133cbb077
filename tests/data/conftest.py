"""Small byte-level tokenizers made on the spot, and chat templates of the families in use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora.config.schema import DataConfig

_CORPUS = [
    "hello world, what is the answer to this question? It is the answer to the question.",
    "def function(x):\n    return x + 1\n\nuser assistant system think ### Instruction: Response:",
] * 4

SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<｜User｜>",
    "<｜Assistant｜>",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The markers leave the end-of-turn token out, as some published templates do.
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Markers around the end-of-turn token and its line break.
CHATML_MARKED_WIDE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' -%}{%- generation -%}{{ message.content + '<|im_end|>\n' }}{%- endgeneration -%}"
    "{%- else -%}{{ message.content + '<|im_end|>\n' }}{%- endif -%}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Markers around the last answer alone.
CHATML_MARKED_LAST = CHATML_MARKED.replace("message.role == 'assistant'", "message.role == 'assistant' and loop.last")

# Markers around an answer, and around the answer with its end.
CHATML_MARKED_NESTED = CHATML_MARKED_WIDE.replace(
    "{{ message.content + '<|im_end|>\n' }}{%- endgeneration -%}",
    "{% generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}{%- endgeneration -%}",
)

# Markers that no message ever reaches.
CHATML_MARKED_NEVER = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# [INST] is no token of its own, there is no generation prompt, and roles must take turns.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

# Only the last turn keeps its thoughts, and gets an empty thought where it has none.
QWEN3 = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set answer = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in message.content else '' %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + answer + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + answer + '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# A text without generation prompt ends with one more token than its turns do.
PHI3 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# The generation prompt opens a thought that the history never shows.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% else %}{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

# Nothing ends a turn but a line break.
BARE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "chatml_eos_differs": (CHATML, "<|endoftext|>"),
    "chatml_marked": (CHATML_MARKED, "<|im_end|>"),
    "chatml_marked_eos_differs": (CHATML_MARKED, "<|endoftext|>"),
    "chatml_marked_wide": (CHATML_MARKED_WIDE, "<|endoftext|>"),
    "chatml_marked_last": (CHATML_MARKED_LAST, "<|im_end|>"),
    "chatml_marked_nested": (CHATML_MARKED_NESTED, "<|im_end|>"),
    "chatml_marked_never": (CHATML_MARKED_NEVER, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "phi3": (PHI3, "<|endoftext|>"),
    "deepseek_r1": (DEEPSEEK_R1, "</s>"),
    "bare": (BARE, "</s>"),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer for a family's template (None has none); its vocabulary is trained once."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(_CORPUS, trainer)
    saved = trained.to_str()

    def make(family: str | None = "chatml", *, adds_bos: bool = False, adds_eos: bool = False) -> Any:
        template, eos_token = TEMPLATES[family] if family else (None, "</s>")
        bos_token = "<|begin_of_text|>" if family == "llama3" else "<s>"
        backend = Tokenizer.from_str(saved)
        # Offsets without their white space, as GPT-2's and Llama's have them: runs of spaces then have no characters.
        steps = [processors.ByteLevel(trim_offsets=True)]
        if adds_bos or adds_eos:
            single = f"{bos_token} $A" if adds_bos else f"$A {eos_token}"
            named = [(token, backend.token_to_id(token)) for token in (bos_token, eos_token)]
            steps.append(processors.TemplateProcessing(single=single, special_tokens=named))
        backend.post_processor = processors.Sequence(steps)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token, chat_template=template
        )

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and returns the file's path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Makes a data section whose cache is the test's own."""

    def make(cache_dir_name: str = "cache", **values: Any) -> DataConfig:
        return DataConfig(cache_dir=str(tmp_path / cache_dir_name), **values)

    return make
