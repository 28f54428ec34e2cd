"""Trains the small language model with its output layer divided over the ranks of torchrun, by vocabulary.

Each rank has the body of the model and the output layer's rows for its part of the vocabulary; no rank ever has the
logits of the others. At the end the first rank trains the same model alone, and compares the losses of all updates.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from data import DataError, load_documents, make_blocks, split_by_document, train_tokenizer
from model import Size, make_model
from tokenizers import Tokenizer
from torch import Tensor

import fusedloss as fl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from arguments import count, cpus, parse

QUICK = {
    "out": Path("runs/lm-tensor-parallel-quick"),
    "steps": 8,
    "vocab_size": 4000,
    "width": 64,
    "layers": 1,
    "length": 64,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, options.threads // ranks))
    if "RANK" not in os.environ:  # not under torchrun: one rank
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cuda" if gpu else "cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        return run(options, dist.get_rank(), ranks, device)
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> int:
    if rank == 0:
        prepare(options)
    dist.barrier()
    blocks = torch.load(options.out / "blocks.pt")
    vocabulary = Tokenizer.from_file(str(options.out / "tokenizer.json")).get_vocab_size()
    size = Size(vocabulary, options.width, options.layers, options.heads, options.length)
    sizes = [len(part) for part in torch.arange(vocabulary).tensor_split(ranks)]
    shards = fl.VocabularyShards(dist.group.WORLD, sizes)
    if rank == 0:
        print(f"{ranks} ranks, vocabulary {' + '.join(map(str, sizes))}, {options.steps} updates on {device}")
    start = time.perf_counter()
    together = train(options, size, blocks.to(device), shards)
    if rank == 0:
        print(f"together {time.perf_counter() - start:.1f} s: loss {together[0]:.4f} to {together[-1]:.4f}")
        torch.set_num_threads(options.threads)
        alone = train(options, size, blocks.to(device), None)
        furthest = max(abs(a - b) for a, b in zip(together, alone, strict=True))
        print(f"one rank alone: loss {alone[0]:.4f} to {alone[-1]:.4f}; the curves are {furthest:.2g} apart at most")
        curves = {"ranks": ranks, "together": together, "alone": alone}
        (options.out / "curves.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
        print(f"figures: {options.out / 'curves.json'}")
    dist.barrier()
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Leaves the tokenizer and the blocks in the folder, for all ranks."""
    options.out.mkdir(parents=True, exist_ok=True)
    documents, _ = split_by_document(load_documents(options.data), options.held_out, options.seed)
    tokenizer = train_tokenizer(documents, options.vocab_size)
    tokenizer.save(str(options.out / "tokenizer.json"))
    torch.save(make_blocks(documents, tokenizer, options.length), options.out / "blocks.pt")


def train(options: argparse.Namespace, size: Size, blocks: Tensor, shards: fl.VocabularyShards | None) -> list[float]:
    """The losses of all updates; without shards of the whole vocabulary on this rank."""
    body = make_model(size, options.seed).model.to(blocks.device)
    generator = torch.Generator().manual_seed(options.seed)
    head = 0.02 * torch.randn(size.vocabulary, size.width, generator=generator)  # alike on all ranks, which take a part
    head = (head if shards is None else head[shards.own]).to(blocks.device).clone().requires_grad_()
    optimizer = torch.optim.AdamW([*body.parameters(), head], lr=options.lr, weight_decay=0.1)
    losses = []
    for _ in range(options.steps):
        tokens = blocks[torch.randint(len(blocks), (options.batch,), generator=generator)]
        hidden = body(tokens).last_hidden_state[:, :-1]
        # The gradient by `hidden` is that of all ranks: the body's copies stay the same without a word between them.
        loss = fl.linear_cross_entropy(hidden, head, tokens[:, 1:], group=shards)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a small language model with its output layer divided over the ranks of torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data", type=Path, help="your own text, UTF-8; else what train.py takes")
    add("--out", type=Path, default=Path("runs/lm-tensor-parallel"), help="folder of the losses")
    add("--steps", type=count(1), default=60, help="updates")
    add("--batch", type=count(1), default=8, help="blocks an update")
    add("--length", type=count(1), default=128, help="pieces a block")
    add("--vocab-size", type=count(1), default=32000, help="BPE pieces")
    add("--width", type=count(1), default=160, help="of the model")
    add("--layers", type=count(1), default=2, help="of the model")
    add("--heads", type=count(1), default=4, help="attention heads")
    add("--lr", type=float, default=2e-3, help="learning rate")
    add("--held-out", type=float, default=0.03, help="share of the text left out")
    add("--seed", type=int, default=1, help="of the split, the weights and the order of the blocks")
    add("--threads", type=count(1), default=cpus(), help="CPU threads of all ranks")
    return parse(parser, QUICK, arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        sys.exit(f"error: {error}")
