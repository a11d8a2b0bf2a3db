"""Train a small MoE language model from a folder of text files, resumably, into a Hugging Face directory.

    python scripts/train_demo_moe.py --data texts --out demo --steps 3000 --mix "code=.3,prose=.7"

Every sub-folder of --data is a domain; its *.txt files hold documents, separated by lines `<|endoftext|>`.
The tail of each domain is held out. Work in progress lies in `<out>.run/`: tokenizer, token files, settings and
one checkpoint (weights, optimizer, step). The same command continues from it; on a CPU, with the same number of
threads, an interrupted run ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_tokens import Domain, batch_of, open_corpus, parse_mix
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from moecompress.calib import load_tokenizer, windows
from moecompress.checkpoint.writer import atomic_write
from moecompress.errors import MoecompressError, OutputError, message

FAMILIES = ("qwen3_moe", "qwen2_moe")  # the second has a shared expert and attention biases
EVALUATION_WINDOWS = 24
STATE = "state.safetensors"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained weights; a run is continued only under equal settings.

    The names from vocab_size to shared_expert_intermediate_size are transformers' own.
    """

    family: str = "qwen3_moe"
    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    head_dim: int = 32  # qwen3_moe only; qwen2_moe has hidden_size / num_attention_heads
    shared_expert_intermediate_size: int = 256  # qwen2_moe only
    window: int = 256
    batch: int = 16
    steps: int = 3000
    lr: float = 3e-3
    warmup: int = 200
    balance: float = 0.01  # weight of the load-balance loss, taken per layer
    z_loss: float = 1e-3
    heldout: float = 0.02  # tail of each domain's tokens
    mix: str = ""  # "name=weight,..."; empty: all domains alike
    seed: int = 0
    threads: int = 1
    device: str = "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = _parse(arguments)
    settings = Settings(**{key: getattr(options, key) for key in asdict(Settings())})
    try:
        train(options.data, options.out, settings, options.stop_after, options.checkpoint_every)
    except MoecompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def train(data: Path, out: Path, settings: Settings, stop_after: int | None, every: int) -> None:
    """Prepare or reopen `<out>.run/`, train to the end (or to step `stop_after`, kept), then write `out`."""
    if out.exists():
        raise OutputError(message(str(out), "it exists", then="choose another --out, or remove it"))
    torch.set_num_threads(settings.threads)
    run = out.with_name(out.name + ".run")
    corpus = open_corpus(run, data, asdict(settings))
    mix = parse_mix(settings.mix, tuple(corpus))
    model = build_model(settings, eos=int(load_tokenizer(run).eos_token_id)).to(settings.device)
    optimizer = _optimizer(model, settings)
    step = _restore(run / STATE, model, optimizer)
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    while step < last:
        ids = batch_of(corpus, mix, size=settings.batch, window=settings.window, seed=settings.seed, step=step)
        loss = _step(model, optimizer, ids.to(settings.device), settings, step)
        step += 1
        if step % every == 0 or step == last:
            atomic_write(run / STATE, _state(model, optimizer, step))
            print(f"step {step} of {settings.steps}: training loss {loss:.4f}", flush=True)
    if step < settings.steps:
        return
    losses = {name: evaluate(model, domain, settings) for name, domain in corpus.items()}
    for name, value in losses.items():
        print(f"held-out {name}: {value:.4f} nats/token, perplexity {math.exp(value):.2f}", flush=True)
    export(model, run, out, settings, losses)


def build_model(settings: Settings, eos: int) -> nn.Module:
    """A randomly initialised float32 model of the family; residual outputs start small, as in GPT-2."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    names = list(asdict(settings))
    shared = {name: getattr(settings, name) for name in names[names.index("vocab_size") : names.index("head_dim")]}
    shared |= {"intermediate_size": 4 * settings.hidden_size, "tie_word_embeddings": True}
    shared |= {"max_position_embeddings": max(1024, settings.window), "bos_token_id": eos, "eos_token_id": eos}
    # grouped_mm gains nothing on a CPU (measured at the default sizes)
    shared |= {"experts_implementation": "eager" if settings.device == "cpu" else "grouped_mm"}
    torch.manual_seed(settings.seed)
    model: nn.Module
    if settings.family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, head_dim=settings.head_dim, norm_topk_prob=True))
    else:
        width = settings.shared_expert_intermediate_size
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**shared, shared_expert_intermediate_size=width))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * settings.num_hidden_layers))
    return model.train()


def losses_of(model: nn.Module, ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (nats/token), load-balance loss (1 when balanced, mean over layers) and router z-loss."""
    output = model(input_ids=ids[:, :-1], output_router_logits=True, use_cache=False)
    cross_entropy = F.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    experts, top_k = settings.num_experts, settings.num_experts_per_tok
    balance, z_loss = [], []
    for logits in output.router_logits:  # layer by layer: transformers' own loss balances only their sum
        probabilities = logits.float().softmax(-1)
        chosen = torch.bincount(probabilities.topk(top_k, -1).indices.flatten(), minlength=experts)
        balance.append(experts * (chosen / chosen.sum() * probabilities.mean(0)).sum())
        z_loss.append(logits.float().logsumexp(-1).square().mean())
    return cross_entropy, torch.stack(balance).mean(), torch.stack(z_loss).mean()


def evaluate(model: nn.Module, domain: Domain, settings: Settings) -> float:
    """Mean held-out cross-entropy (nats/token) over windows spread through the domain's tail."""
    tail = torch.from_numpy(domain.heldout.astype(np.int64))
    ids = windows(tail, settings.window + 1, EVALUATION_WINDOWS).to(settings.device)
    with torch.inference_mode():
        total = sum(losses_of(model.eval(), part, settings)[0].item() * len(part) for part in ids.split(8))
    return total / len(ids)


def export(model: Any, run: Path, out: Path, settings: Settings, losses: Mapping[str, float]) -> None:
    """Write the bfloat16 checkpoint with one tensor per expert, built in the run folder and renamed."""
    part = run / "out"
    shutil.rmtree(part, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(part)
    load_tokenizer(run).save_pretrained(part)
    facts = {"settings": asdict(settings), "heldout_nats_per_token": dict(losses)}
    atomic_write(part / "training.json", json.dumps(facts, indent=1) + "\n")
    os.replace(part, out)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, settings: Settings, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * _schedule(step, settings)
    cross_entropy, balance, z_loss = losses_of(model, ids, settings)
    (cross_entropy + settings.balance * balance + settings.z_loss * z_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return cross_entropy.item()


def _schedule(step: int, settings: Settings) -> float:
    """Warm-up, constant, and from half way a linear decay to 5 %."""
    decay = min(1.0, 2 * (1 - step / settings.steps))
    return min(1.0, (step + 1) / settings.warmup) * (0.05 + 0.95 * decay)


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bytes:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in values.items()})
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"step": str(step)})


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one, into model and optimizer; returns the number of steps done."""
    if not path.is_file():
        return 0
    states: dict[int, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name in file.keys():
            kind, rest = name.split(".", 1)
            if kind == "model":
                parameters[rest].copy_(file.get_tensor(name))
            else:
                index, key = rest.split(".")
                states.setdefault(int(index), {})[key] = file.get_tensor(name)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    print(f"continuing after step {step}", flush=True)
    return step


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder of *.txt per domain")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--max-steps", type=int, dest="stop_after", help="stop after this step and keep the state")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    for key, value in asdict(Settings()).items():
        choices = FAMILIES if key == "family" else None
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, choices=choices, help=f"default: {value!r}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
