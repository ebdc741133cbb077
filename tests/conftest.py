"""Small random bases that all tests share, and the architectures that claims about models are tested on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 320

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX_LIKE = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}

# Each has something that the others have not: see the remarks.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,  # grouped queries
    "qwen2": _LLAMA_LIKE | {"tie_word_embeddings": True},  # biases, a tied head
    "qwen3": _LLAMA_LIKE | {"head_dim": 16},  # norms on queries and keys
    "mistral": _LLAMA_LIKE | {"sliding_window": 6},
    "gemma2": _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 6, "final_logit_softcapping": 3.0},  # soft caps
    "gemma3_text": _LLAMA_LIKE | {"head_dim": 16, "sliding_window": 6},  # scaled embedding, two rotary bases
    "phi3": _LLAMA_LIKE,  # q, k, v in one weight
    "gpt2": {  # Conv1D, learned positions
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "granite": _LLAMA_LIKE | {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    "cohere": _LLAMA_LIKE | {"logit_scale": 0.25},  # layer norm without bias, parallel blocks
    "mixtral": _LLAMA_LIKE | {"num_local_experts": 4},  # experts in one 3-D weight
    "qwen2_moe": _LLAMA_LIKE  # a shared expert with a gate of one output, a window that only the mask tells
    | {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "gpt_neox": _NEOX_LIKE | {"attention_bias": True},  # q, k, v in one weight, biases everywhere
    "opt": {  # learned positions with an offset
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 64,
        "init_std": 0.1,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def pytest_configure(config: pytest.Config) -> None:
    # Tensors are tiny here: a second thread costs several times what it gives. Torch is not imported yet.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config.addinivalue_line("filterwarnings", r"error:::qlora(\..*)?")


@pytest.fixture(scope="module")
def without_compiling() -> Iterator[None]:
    """Torch's compiler is off, as in the processes that tests launch."""
    from torch._dynamo import config

    former, config.disable = config.disable, True
    yield
    config.disable = former


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """Makes the transformers config of a tiny model: make_config(architecture, **changes)."""
    from transformers import AutoConfig

    def make(name: str, **changes: Any) -> Any:
        return AutoConfig.for_model(name, **(ARCHITECTURES.get(name, {}) | changes))

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a tiny random model in eval mode: make_model(architecture, dtype="float32", **config changes)."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(name: str, dtype: str = "float32", **changes: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(make_config(name, **changes), dtype=getattr(torch, dtype))
            # Norms and biases start as ones and zeros, behind which many mistakes hide.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any]) -> Callable[..., Path]:
    """Makes a model folder without a tokenizer, once for each set of arguments.

    make_base(architecture, dtype="bfloat16", max_shard_size="1GB", **config changes). The folder is shared: a test that
    changes it copies it first.
    """
    from transformers.utils import logging

    made: dict[str, Path] = {}

    def make(name: str, dtype: str = "bfloat16", max_shard_size: str = "1GB", **changes: Any) -> Path:
        key = json.dumps([name, dtype, max_shard_size, changes], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            logging.disable_progress_bar()
            make_model(name, dtype, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any]) -> Path:
    """A small random Llama folder, tied and in bfloat16, with a byte-level BPE tokenizer and a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    trained.train_from_iterator(
        ["hello world, what is this? A question, an answer and the answer to the question."] * 4, trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    folder = tmp_path_factory.mktemp("random_base")
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()
    model = make_model(
        "llama",
        "bfloat16",
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    return folder
