"""Tokens and keys that no message, log or file of ours may hold."""

from __future__ import annotations

import os
import re

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "CLEARML_API_SECRET_KEY",
    "SWANLAB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_SHORTEST_SECRET = 8  # a shorter value would hide ordinary words


def redact(text: str) -> str:
    """Return the text with every token of the environment, and whatever looks like a hub token, replaced by ***."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("***", text)
