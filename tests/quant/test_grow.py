"""A base with more rows than its files hold: every run of the larger tensors is what it would be of a larger file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora.distributed.sharding import Sharding
from qlora.quant.fill import read_run
from qlora.quant.grow import GrownEntry, mean_row
from qlora.quant.load import load_model
from qlora.quant.shards import read_entries
from qlora.quant.source import resolve_base

MakeBase = Callable[..., Path]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_reads_its_run_of_old_and_new_rows(make_base: MakeBase, world_size: int) -> None:
    entry = read_entries(make_base("llama", dtype="float32"))["model.embed_tokens.weight"]
    row = mean_row(entry)
    torch.testing.assert_close(row, entry.read_whole().double().mean(0).float())
    grown = GrownEntry((entry,), (323, 64), row)
    want = torch.cat([entry.read_whole(), row.repeat(3, 1)]).flatten()
    for rank in range(world_size):
        sharding = Sharding(rank, world_size)
        start, stop = sharding.run(want.numel())
        found = read_run(grown, sharding, torch.device("cpu"), torch.float32).flatten()
        assert torch.equal(found[start:stop], want[start:stop])
    for start, stop in [(0, 0), (20_470, 20_490), (20_480, 20_481), (20_500, 20_672), (20_671, 20_672)]:
        assert torch.equal(grown.read(start, stop), want[start:stop])


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("gpt_neox", False)])
def test_a_grown_model_is_the_old_one_with_mean_rows(make_base: MakeBase, name: str, tied: bool) -> None:
    options = {} if name == "gpt2" else {"tie_word_embeddings": tied}
    folder = make_base(name, dtype="float32", **options)
    ours = load_model(resolve_base(str(folder)), dtype="float32", num_rows=323)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.resize_token_embeddings(323, mean_resizing=False)
    with torch.no_grad():
        for side in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
            side.weight[320:] = side.weight[:320].double().mean(0).float()
        ids = torch.tensor([[3, 7, 320, 322, 9]])
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    assert ours.config.vocab_size == 323
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tied
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_vocabulary_with_room_is_left_as_it_is(make_base: MakeBase) -> None:
    ours = load_model(resolve_base(str(make_base("llama", dtype="float32"))), dtype="float32", num_rows=320)
    assert ours.config.vocab_size == ours.get_input_embeddings().num_embeddings == 320
