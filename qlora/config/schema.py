"""The job file as types. Every default of the project lives here, once.

Names are Hugging Face's where one exists. How many ranks run and which ZeRO stage shards them is not in here: it
belongs to the launch configuration, so that one job file serves one GPU or five hundred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qlora.config.problems import explain


def _number_from_string(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number_from_string), Field(allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number_from_string)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and a config never changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    if not TYPE_CHECKING:  # which reads the arguments off the fields

        def __init__(self, **values: Any) -> None:
            """Make a section in Python. Raises ConfigError: all that is wrong with the values."""
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise explain(error, type(self)) from None

        # A section inside another one is made without it, so that `load.py` hears of every mistake.
        __init__.__pydantic_base_init__ = True


class QuantizationConfig(Section):
    """How linear weights are quantized (bitsandbytes' formats; QLoRA paper, section 3, LLM.int8() paper, section 3.1)."""

    bits: Literal[4, 8] = Field(4, description="8 is one scale a row (LLM.int8's weights); the keys below are of 4 bits.")
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = Field(True, description="Quantize the block scales as well: 0.127 instead of 0.5 bits a weight.")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(64, description="Weights that share one scale.")
    quant_storage: Literal["auto", "uint8", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype the packed bytes are stored as; auto is uint8, which no cast touches."
    )
    skip_modules: list[str] = Field(
        default_factory=list, description="Module path suffixes that stay unquantized, besides heads and embeddings."
    )

    @property
    def kind(self) -> str:
        """What a weight is kept as: nf4, fp4 or int8."""
        return self.quant_type if self.bits == 4 else "int8"


class ModelConfig(Section):
    """The frozen base."""

    base: str = Field("builtin:tiny", description="builtin:tiny, a Hugging Face folder, or a hub id.")
    revision: str | None = Field(None, description="Hub revision; the commit it resolves to is what gets recorded.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="dtype of unquantized weights, and what quantized layers compute in."
    )
    attention: Literal["auto", "documents", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto is attention per packed document where the model allows it, else sdpa."
    )
    quantization: QuantizationConfig | None = Field(default_factory=QuantizationConfig)
    allow_pickle: bool = Field(
        False, description="Read *.bin weights (torch.load, weights_only) where no safetensors exist."
    )


class LoraConfig(Section):
    """Our LoRA layers: h = W x + (lora_alpha / r) B A dropout(x) (Hu et al. 2021, equation 3)."""

    r: int = Field(16, ge=1, description="Rank of the update; the process rank is never called r.")
    lora_alpha: Number = Field(32.0, gt=0)
    lora_dropout: Number = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(
        "all-linear",
        description="all-linear, a regular expression (fullmatch), or a list of path suffixes or layer class names.",
    )
    exclude_modules: str | list[str] = Field(default_factory=list, description="Same forms as target_modules.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of A and B. bfloat16 ones have fp32 copies, which the optimizer updates."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (Liu et al. 2024).")
    lora_bias: bool = Field(False, description="Give B a bias.")
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="r of some layers: a path's end, or a regular expression for it -> r."
    )
    alpha_pattern: dict[str, PositiveNumber] = Field(default_factory=dict, description="lora_alpha of some layers.")
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="Numbers of the blocks that get an adapter; null is all."
    )
    layers_pattern: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="What the list of blocks is called; null is any list."
    )
    target_parameters: list[str] = Field(
        default_factory=list, description="Fused expert weights to adapt, by the end of their path (mlp.experts.down_proj)."
    )
    modules_to_save: list[str] = Field(default_factory=list, description="Modules to train fully, by the end of their path.")
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="Token ids whose embedding rows are trained."
    )
    new_tokens: list[str] = Field(
        default_factory=list, description="Tokens to add to the tokenizer; their rows alone are trained."
    )
    init_lora_weights: str = Field(
        "default",
        pattern=r"^(default|gaussian|pissa|pissa_niter_[1-9]\d*|olora|loftq|eva)$",
        description="default, gaussian, pissa, pissa_niter_N, olora, loftq or eva.",
    )
    loftq_iterations: PositiveInt = Field(1, description="Alternations of quantization and SVD.")
    eva_batches: PositiveInt = Field(4, description="Batches of training data that EVA looks at.")
    train_norms: bool = Field(False, description="Train every normalisation layer fully.")
    train_embeddings: bool = Field(False, description="Train the input embeddings fully.")
    train_head: bool = Field(False, description="Train the output head fully.")


class DataConfig(Section):
    """What is learned from."""

    train: list[str] = Field(default_factory=list, description="Files, folders or hub dataset ids.")
    eval: list[str] = Field(default_factory=list)
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "text"] = "auto"
    train_on: Literal["assistant", "completion", "all"] = Field(
        "assistant", description="Which tokens are targets; assistant and completion both mean the answers."
    )
    max_length: int = Field(2048, ge=8, description="Longest row in tokens, and the size of a pack.")
    over_long: Literal["truncate", "split", "drop"] = "truncate"
    packing: bool = Field(True, description="Fill rows with several documents, which never see each other.")
    chat_template: str | None = Field(None, description="A Jinja file to use instead of the tokenizer's own template.")
    cache_dir: str | None = Field(None, description="Where token rows are kept; null is the user's cache folder.")


class GradientCheckpointingConfig(Section):
    """How activations are computed again in backward (torch.utils.checkpoint)."""

    use_reentrant: bool = Field(False, description="torch's older kind, which runs a second backward pass inside the first.")


class TrainConfig(Section):
    """How it is learned."""

    output_dir: str = "runs/qlora"
    num_train_epochs: Number = Field(1.0, gt=0)
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; wins over num_train_epochs.")
    per_device_train_batch_size: PositiveInt = Field(1, description="Rows (packs) a rank and micro-step.")
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: Number = Field(2.0e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Number = Field(0.03, ge=0, le=1)
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Wins over warmup_ratio.")
    max_grad_norm: Number = Field(1.0, gt=0)
    max_nonfinite_steps: PositiveInt = Field(
        3, description="A step whose loss or gradient is not finite is skipped; the job ends with so many in a row."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    adam_beta1: Number = Field(0.9, ge=0, lt=1)
    adam_beta2: Number = Field(0.999, ge=0, lt=1)
    adam_epsilon: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    z_loss: Number = Field(
        0.0, ge=0, description="Coefficient of logsumexp^2 in what is learned (PaLM: 1e-4); reported losses leave it out."
    )
    loraplus_lr_ratio: PositiveNumber | None = Field(
        None, description="Learning rate of B over that of A (LoRA+, Hayou et al. 2024); null is one rate."
    )
    gradient_checkpointing: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = Field(
        "auto", description="Layers computed again in backward: auto (as many as memory asks for), all, none, or how many."
    )
    gradient_checkpointing_kwargs: GradientCheckpointingConfig = Field(default_factory=GradientCheckpointingConfig)
    offload_activations: bool = Field(
        False, description="Keep the inputs of recomputed layers in the host's memory until backward needs them."
    )
    seed: int = Field(0, ge=0)
    silent_rank_seconds: Annotated[PositiveNumber, Field(ge=5)] = Field(
        60.0, description="A rank that is not heard of for so long is taken for lost, and the job ends."
    )
    stalled_rank_seconds: Annotated[PositiveNumber, Field(ge=5)] = Field(
        1800.0, description="No rank gets on for so long: the job ends, and names those that the others wait for."
    )


class EvalConfig(Section):
    """Evaluation on data.eval during training."""

    every_steps: PositiveInt | None = Field(None, description="null evaluates once, at the end, where data.eval is given.")
    per_device_eval_batch_size: PositiveInt | None = Field(None, description="null is the training batch size.")


class CheckpointConfig(Section):
    """What survives."""

    every_steps: PositiveInt | None = 500
    keep_last: PositiveInt = 2
    resume: str = Field("auto", description="auto, none (the word), or the path of a checkpoint.")


class LoggingConfig(Section):
    """What is shown and recorded."""

    trackers: list[
        Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
    ] = Field(default_factory=list)
    log_every_steps: PositiveInt = 1


class JobConfig(Section):
    """A whole job file."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
