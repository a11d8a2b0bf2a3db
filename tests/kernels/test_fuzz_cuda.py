"""Layers and arguments drawn at random on the backends of devices, under the shim and in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import packed_fuzz as fuzz
import packed_layers as layers
import pytest
import torch

from moecompress import ops
from moecompress_kernels import cuda

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.usefixtures("on_shim")
def test_any_experts_and_arguments_on_cuda_kernels() -> None:
    compare("cuda", range(90), most=200)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_any_experts_and_arguments_on_triton_kernels() -> None:
    compare("triton", range(30), most=5)


def compare(name: str, seeds: range, most: int) -> None:
    """Ids that are no expert's skip their slot: an error would mean waiting for the device."""
    for seed in seeds:
        packed = fuzz.layer(seed, plain=True)
        call, count, text = fuzz.call(packed, seed), packed.layer.experts, packed.layer.text
        if len(call.hidden) > most:
            continue
        hidden = call.hidden if name == "triton" or call.hidden.dtype in cuda.DTYPES else call.hidden.bfloat16()
        ids = call.ids.long().clone()
        ids[(ids < 0) | (ids > count)] = count
        found = ops.moe_mlp(hidden, call.ids, call.weights, layers.sealed_handle(packed, name), name, text)
        wanted = ops.moe_mlp(hidden, ids, call.weights, layers.sealed_handle(packed, "torch"), "torch", text)
        bad = [token for token in call.bad if bool((ids[token] < count).any())]
        (finite, spoilt), (expected, _) = fuzz.split(found, bad), fuzz.split(wanted, bad)
        assert not bool(torch.isfinite(spoilt).any()), (seed, bad)
        assert layers.error(finite, expected) <= LIMIT[hidden.dtype], seed
