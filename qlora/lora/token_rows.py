"""Rows of an embedding that are trained for some tokens alone (PEFT's trainable tokens); a tied head follows.

    y = rows[x] where token x has a row of its own, else W[x];      logit of such a token: its row times the hidden state

W is frozen and untouched: what trains, what has a gradient and what is saved are the rows, (n, hidden), values and not
differences. They start at W's own. Each embedding or untied head has its own rows; a tied head uses the embedding's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.config.schema import LoraConfig
from qlora.distributed.collectives import gathered
from qlora.errors import AdapterError, ConfigError
from qlora.lora.embedding import embed_scale, is_embedding
from qlora.lora.layer import LoraLayer
from qlora.lora.update import Update
from qlora.ops.lora_embedding import embedding_with_rows
from qlora.ops.lora_linear import lora_linear

# What a file calls the rows behind the path of their module.
ROWS = "token_adapter.trainable_tokens_delta"
PLACE = "lora.trainable_token_indices, lora.new_tokens"
# Rows by the path of their module: token ids, in the order of the rows.
TokenIds = Mapping[str, tuple[int, ...]]


class _RowsLayer(LoraLayer):
    """What an embedding with rows of its own and a head that follows it share. No low-rank update has a place here."""

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether rows of this module can be trained: an embedding, or torch's Linear as a head."""
        return (is_embedding(module) and module.max_norm is None) or type(module) is nn.Linear

    @classmethod
    def shapes(cls, module: nn.Module, update: Update) -> dict[str, tuple[int, ...]]:
        raise ConfigError(
            "rows of this module are trained for some tokens, so it can carry no low-rank update beside them",
            place="lora.target_modules",
            found=type(module).__name__,
            next_step="leave it out (lora.exclude_modules), or train no rows of tokens",
        )

    def initial_magnitude(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        raise NotImplementedError("rows have no magnitude")

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, as other code looks for it; without the rows."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    @property
    def used(self) -> str | None:
        """The adapter whose rows a forward pass uses now."""
        return self.merged_adapter if self.computes_merged else self.applied

    def merge(self) -> None:
        """Use the active rows from now on. They take the place of W's, so that no second weight is made."""
        self.merged_adapter = self._check_can_merge()

    def unmerge(self) -> None:
        """Go back to rows beside W. Raises AdapterError where nothing is merged."""
        self._check_can_unmerge()
        self.merged_adapter = None


class TokenRows(_RowsLayer):
    """An embedding, or an untied head, some of whose rows are trained; all else is the base's own.

    Attributes:
        trainable_tokens: rows (n, hidden) by adapter name.
        indices: their token ids by adapter name.
        followers: heads that are tied to this embedding.
    """

    TABLES: ClassVar[dict[str, str]] = {ROWS: "trainable_tokens"}
    asks_for_anchor = True  # token ids have no gradient

    trainable_tokens: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.indices: dict[str, tuple[int, ...]] = {}
        self.followers: list[TiedTokenRows] = []

    def add_rows(self, name: str, ids: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None) -> None:
        """Give tokens rows of their own and make them active. Collective without values if the weight is in shares.

        Args:
            ids: see `check_rows`.
            dtype: of the rows, or the weight's where that is wider.
            values: (n, hidden); the base's own where None.
        """
        if values is None:
            with gathered(self.base_layer.parameters()):
                values = self.weight.data[list(ids)]
        # Narrower than W's, rows would not start at the base's own function.
        dtype = torch.promote_types(dtype, self.weight.dtype)
        self.trainable_tokens[name] = nn.Parameter(values.detach().to(device=self._device(), dtype=dtype, copy=True))
        sorted_ids, order = torch.tensor(ids, device=self._device()).sort()
        self.register_buffer(f"ids_{name}", torch.tensor(ids, device=self._device()), persistent=False)
        self.register_buffer(f"sorted_ids_{name}", sorted_ids, persistent=False)
        self.register_buffer(f"order_{name}", order, persistent=False)
        self.indices[name] = ids
        self.updates[name] = Update(r=len(ids), scaling=1.0)
        for layer in (self, *self.followers):
            layer.set_active(name)

    def remove_adapter(self, name: str) -> None:
        for head in self.followers:
            if head.merged_adapter == name:
                head.unmerge()
            if head.active_adapter == name:
                head.active_adapter = None
        super().remove_adapter(name)
        del self.indices[name]
        for kind in ("ids", "sorted_ids", "order"):
            delattr(self, f"{kind}_{name}")

    def forward(self, x: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Embeddings of token ids, or logits of hidden states. For the anchor see `lora.embedding.LoraEmbedding`."""
        name, base = self.used, self.base_layer
        rows = None if name is None else self.trainable_tokens[name]
        if isinstance(base, nn.Linear):
            return logits_with_rows(x, base, rows, getattr(self, f"ids_{name}", None))
        if rows is None:
            return base(x)
        sorted_ids, order = (getattr(self, f"{kind}_{name}") for kind in ("sorted_ids", "order"))
        return embedding_with_rows(x, base, rows, sorted_ids, order, embed_scale(base), anchor=anchor)


class TiedTokenRows(_RowsLayer):
    """A head that is tied to an embedding with rows of its own, and uses them.

    The rows are the embedding's parameters and none of the head's: a parameter's gradient is whole when the backward pass
    has been through the embedding, which is what ZeRO-3 has to wait for.
    """

    TABLES: ClassVar[dict[str, str]] = {}

    def __init__(self, base_layer: nn.Module, embedding: TokenRows) -> None:
        super().__init__(base_layer)
        self._embedding = (embedding,)  # in a tuple, so that it is no module inside this one
        self.updates = embedding.updates
        embedding.followers.append(self)

    @property
    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The embedding's rows, which a forward pass of this module reads."""
        return list(self._embedding[0].trainable_tokens.values())

    def forward(self, x: Tensor) -> Tensor:
        """Logits of hidden states."""
        name, embedding = self.used, self._embedding[0]
        rows = None if name is None else embedding.trainable_tokens[name]
        return logits_with_rows(x, self.base_layer, rows, getattr(embedding, f"ids_{name}", None))  # type: ignore[arg-type]


def logits_with_rows(x: Tensor, head: nn.Linear, rows_NH: Tensor | None, ids_N: Tensor | None) -> Tensor:
    """x W^T + b (..., V) in the dtype of x, with the columns of some tokens made of their own rows. W gets no gradient."""
    y = lora_linear(x, lambda: head.weight.data, head.bias, None, None, 1.0)
    if rows_NH is None or ids_N is None:
        return y
    dtype = head.weight.dtype
    bias = None if head.bias is None else head.bias.detach()[ids_N]
    own = nn.functional.linear(x.to(dtype), rows_NH.to(dtype), bias)
    return y.index_copy_(-1, ids_N, own.to(y.dtype))


def borrowed_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of other modules that a forward pass of this one reads."""
    for inner in module.modules():
        if isinstance(inner, TiedTokenRows):
            yield from inner.borrowed_parameters


def token_rows(model: nn.Module, config: LoraConfig, targeted: Collection[str], trained: Collection[str]) -> TokenIds:
    """The rows that a config asks to train, by path. Rank-local.

    New tokens get rows in the embedding and in an untied head, because no base has learned to say them; tokens that are
    trained otherwise get them in the embedding alone (as in PEFT).

    Raises:
        ConfigError: the tokens were not added when the base was loaded, or see `check_rows`.
    """
    if not config.trainable_token_indices and not config.new_tokens:
        return {}
    new: tuple[int, ...] = ()
    if config.new_tokens:
        added = model.__dict__.get("qlora_new_tokens")
        if added is None or list(added.tokens) != config.new_tokens:
            raise ConfigError(
                "the new tokens were not added when the base was loaded",
                place="lora.new_tokens",
                found="none" if added is None else list(added.tokens),
                next_step="give load_base the same lora config",
            )
        new = added.ids
    embedding, head = _sides(model)
    if embedding is None:
        raise ConfigError("the model does not say which module is its embedding", place=PLACE)
    rows = {embedding: (*config.trainable_token_indices, *new)}
    if new and head is not None and not _is_tied(model, embedding, head):
        rows[head] = new
    check_rows(model, rows, targeted, trained)
    return rows


def check_rows(model: nn.Module, rows: TokenIds, targeted: Collection[str], trained: Collection[str]) -> None:
    """Refuse what `add_token_rows` could not do. Rank-local.

    Raises:
        ConfigError: ids that are out of range or given twice, or none; a module without rows, or one that is adapted or
            trained as a whole, also as the head that a row would change.
    """
    embedding, head = _sides(model)
    for path, ids in rows.items():
        module: Any = model.get_submodule(path)
        base = module.base_layer if isinstance(module, LoraLayer) else module
        if not _RowsLayer.supports(base):
            raise _no_rows(path, base)
        num_rows: int = base.out_features if isinstance(base, nn.Linear) else base.num_embeddings  # type: ignore[assignment]
        twice = sorted({token for token in ids if ids.count(token) > 1}) if len(set(ids)) < len(ids) else []
        beyond = [token for token in ids if not 0 <= token < num_rows]
        for wrong, why in ((twice, "given twice"), (beyond, "out of range")):
            if wrong:
                raise ConfigError(
                    f"token ids are {why}",
                    place=PLACE,
                    found=", ".join(map(str, wrong[:5])),
                    wanted=f"each once, from 0 to {num_rows - 1}, the rows of {path}",
                    next_step="tokens that the base has no rows for are added by lora.new_tokens" if beyond else None,
                )
        if not ids:
            raise ConfigError("no token is named whose row is to be trained", place=PLACE, found=path)
        follower = head if path == embedding and head is not None and _is_tied(model, path, head) else None
        if follower in rows:
            found = f"{path}, {follower}"
            raise ConfigError("the base ties these modules, so they have the same rows", place=PLACE, found=found)
        for own in (path, follower):
            _refuse_other_uses(model, own, targeted, trained)


def _refuse_other_uses(model: nn.Module, path: str | None, targeted: Collection[str], trained: Collection[str]) -> None:
    if path is None:
        return
    module: Any = model.get_submodule(path)
    adapted = path in targeted or (isinstance(module, LoraLayer) and not isinstance(module, _RowsLayer))
    if adapted or path in trained:
        use = "carries a low-rank update" if adapted else "is trained as a whole"
        raise ConfigError(
            f"rows of {path} are to be trained, and it {use}",
            place=PLACE,
            next_step="leave it out there (lora.exclude_modules), or train no rows of tokens",
        )
    base = module.base_layer if isinstance(module, LoraLayer) else module
    if not _RowsLayer.supports(base):
        raise _no_rows(path, base)


def _no_rows(path: str, base: nn.Module) -> ConfigError:
    found = f"{path} ({type(base).__name__})"
    return ConfigError("rows of tokens cannot be trained in this module", place=PLACE, found=found)


def add_token_rows(
    model: nn.Module, rows: TokenIds, name: str, dtype: torch.dtype, values: Mapping[str, Tensor] | None = None
) -> None:
    """Put an adapter's rows into a model, and let a tied head follow. See `check_rows`, `TokenRows.add_rows`."""
    embedding, head = _sides(model)
    for path, ids in rows.items():
        follows = path == embedding and head is not None and _is_tied(model, path, head)
        module = model.get_submodule(path)
        layer = module if isinstance(module, TokenRows) else TokenRows(module).train(module.training)
        model.set_submodule(path, layer)
        if follows and not layer.followers:
            tied = model.get_submodule(head)  # type: ignore[arg-type]
            model.set_submodule(head, TiedTokenRows(tied, layer).train(tied.training))  # type: ignore[arg-type]
        layer.add_rows(name, ids, dtype, None if values is None else values[path])


def remove_token_rows(model: nn.Module, rows: TokenIds, name: str) -> None:
    """Forget an adapter's rows. Raises AdapterError where there are none."""
    for path in rows:
        layer = model.get_submodule(path)
        if not isinstance(layer, TokenRows) or name not in layer.updates:
            raise AdapterError(f"the adapter {name!r} has no rows here", place=path)
        layer.remove_adapter(name)


def _sides(model: Any) -> tuple[str | None, str | None]:
    """Paths of the input embedding and of the head."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for side in ("input", "output"):
        get = getattr(model, f"get_{side}_embeddings", None)
        module = get() if callable(get) else None
        found.append(None if module is None else paths.get(id(module)))
    return found[0], found[1]


def _is_tied(model: nn.Module, embedding: str, head: str) -> bool:
    one, other = (getattr(model.get_submodule(path), "weight", None) for path in (embedding, head))
    return one is not None and one is other
