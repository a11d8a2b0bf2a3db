"""Tensors are read exactly, into memory of their own; FP8 blocks agree with a float64 loop."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress.checkpoint import reader as reader_module
from moecompress.checkpoint.fp8 import dequantize_blocks
from moecompress.checkpoint.index import open_index
from moecompress.checkpoint.reader import TensorReader
from moecompress.errors import CheckpointError


def store(root: Path, tensors: dict[str, Tensor], block: tuple[int, int] | None = None) -> TensorReader:
    save_file(tensors, root / "model.safetensors")
    return TensorReader(open_index(root), block=block)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def test_reads_what_the_library_reads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bf16": torch.randn(5, 3, 2, generator=generator).to(torch.bfloat16),
        "f64": torch.randn(7, generator=generator, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "fp8": torch.randn(3, 5, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(-3, dtype=torch.int64),
    }
    with store(tmp_path, tensors) as reader:
        library = load_file(tmp_path / "model.safetensors")
        assert sorted(reader.names()) == sorted(library)
        for name, expected in library.items():
            found = reader.read(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert (reader.logical_dtype(name), reader.shape(name)) == (expected.dtype, expected.shape)
            assert raw(found) == raw(expected) and found.is_contiguous()
            assert b"".join(bytes(piece) for piece in reader.chunks(name, size=5)) == raw(expected)


@given(first=st.integers(0, 6), count=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_rows(tmp_path_factory: pytest.TempPathFactory, first: int, count: int) -> None:
    tensor = torch.arange(6 * 3 * 2, dtype=torch.int16).reshape(6, 3, 2)
    with store(tmp_path_factory.mktemp("rows"), {"t": tensor}) as reader:
        if first + count <= 6:
            assert torch.equal(reader.read("t", first, first + count), tensor[first : first + count])
            assert torch.equal(reader.read("t", first), tensor[first:])
            assert torch.equal(reader.read("t", stop=first), tensor[:first])
        else:
            with pytest.raises(ValueError, match="with 6 rows"):
                reader.read("t", first, first + count)


def test_memory_is_its_own(tmp_path: Path) -> None:
    with store(tmp_path, {"t": torch.zeros(4)}) as reader:
        first, second = reader.read("t"), reader.read("t")
        first.fill_(7)
        assert not second.any() and not reader.read("t").any()
        assert first.untyped_storage().nbytes() == 16


def test_reads_go_on_after_close_and_with_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN", 2)
    weight_map = {}
    for number in range(5):
        save_file({f"t{number}": torch.full((3,), float(number))}, tmp_path / f"m-{number}.safetensors")
        weight_map[f"t{number}"] = f"m-{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    before = len(os.listdir("/dev/fd"))
    with TensorReader(open_index(tmp_path)) as reader:
        for number in (*range(5), *range(5)):
            assert reader.read(f"t{number}").tolist() == [number] * 3
        assert len(os.listdir("/dev/fd")) == before + 2
    assert len(os.listdir("/dev/fd")) == before
    assert reader.read("t4").tolist() == [4] * 3
    reader.close()
    assert len(os.listdir("/dev/fd")) == before


def test_threads(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((1000,), float(number)) for number in range(8)}
    wrong: list[str] = []
    with store(tmp_path, tensors) as reader:

        def work(offset: int) -> None:
            for number in range(40):
                name = f"t{(number + offset) % 8}"
                if not torch.equal(reader.read(name), tensors[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_large_reads_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_READ", 7)
    tensor = torch.arange(100, dtype=torch.int32)
    with store(tmp_path, {"t": tensor}) as reader:
        assert torch.equal(reader.read("t"), tensor)


def test_file_that_shrinks_or_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with store(tmp_path, {"t": torch.zeros(100)}) as reader:
        os.truncate(path, path.stat().st_size - 3)
        for read in (lambda: reader.read("t"), lambda: list(reader.chunks("t"))):
            with pytest.raises(CheckpointError, match="tensor 't': the file ends 3 bytes early"):
                read()
        reader.close()
        path.unlink()
        with pytest.raises(CheckpointError, match="model.safetensors: tensor 't': cannot be read"):
            reader.read("t")


def test_unknown_name(tmp_path: Path) -> None:
    with store(tmp_path, {"t": torch.zeros(1)}) as reader:
        for call in (reader.read, reader.shape, reader.logical_dtype):
            with pytest.raises(CheckpointError, match="no tensor 'u'"):
                call("u")
        with pytest.raises(ValueError, match="scalar"):
            store(tmp_path, {"s": torch.tensor(1.0)}).read("s", 0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_check_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    with store(tmp_path, {"w": torch.zeros(1)}) as reader:
        largest = torch.full((4, 5), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        reader.check_finite("w", largest)
        reader.check_finite("w", (-largest.double()).to(dtype).T)
        reader.check_finite("w", torch.zeros(0, dtype=torch.float32))
        reader.check_finite("w", torch.tensor([1, 2]))
        bad = largest.double()
        bad[0, 0], bad[3, 4] = float("nan"), float("nan")
        with pytest.raises(CheckpointError, match="tensor 'w': 2 of 20 values are NaN or Inf"):
            reader.check_finite("w", bad.to(dtype))
        if dtype.itemsize > 1:
            for value in (float("inf"), -float("inf")):
                with pytest.raises(CheckpointError, match="tensor 'w': 1 of 1 values"):
                    reader.check_finite("w", torch.tensor([value], dtype=dtype))


def float64_loop(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """code * scale of its block in float64 (exact: 4 + 24 bits), rounded to float32, then bfloat16."""
    result = torch.empty(codes.shape, dtype=torch.float64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            scale = scales[row // block[0], column // block[1]].double()
            result[row, column] = codes[row, column].double() * scale
    return result.float().to(torch.bfloat16)


def fp8_case(rows: int, columns: int, block: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x7E
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scales = torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-5, 3, shape, generator=generator)
    return codes.view(torch.float8_e4m3fn), scales.float()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 13),
    block=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    data=st.data(),
)
def test_fp8_blocks_with_ragged_edges_and_row_slices(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, block: tuple[int, int], data: st.DataObject
) -> None:
    codes, scales = fp8_case(rows, columns, block, seed=rows * 100 + columns)
    expected = float64_loop(codes, scales, block)
    root = tmp_path_factory.mktemp("fp8")
    with store(root, {"w.weight": codes, "w.weight_scale_inv": scales}, block) as reader:
        assert reader.names() == ["w.weight"]
        assert reader.logical_dtype("w.weight") == torch.bfloat16
        assert reader.shape("w.weight") == (rows, columns)
        assert torch.equal(reader.read("w.weight"), expected)
        first = data.draw(st.integers(0, rows))
        last = data.draw(st.integers(first, rows))
        found = reader.read("w.weight", first, last)
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected[first:last])
        assert b"".join(map(bytes, reader.chunks("w.weight"))) == raw(codes)


def test_fp8_default_block_is_128(tmp_path: Path) -> None:
    codes = torch.full((130, 257), 1.5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    with store(tmp_path, {"w": codes, "w_scale_inv": scales}) as reader:
        found = reader.read("w")
    expected = 1.5 * scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :257]
    assert torch.equal(found.float(), expected)


def test_fp8_fused_experts_are_sliced_by_expert(tmp_path: Path) -> None:
    block = (4, 3)
    cases = [fp8_case(7, 8, block, seed) for seed in range(3)]
    codes = torch.stack([case[0].view(torch.uint8) for case in cases]).view(torch.float8_e4m3fn)
    scales = torch.stack([case[1] for case in cases])
    expected = torch.stack([float64_loop(*case, block) for case in cases])
    with store(tmp_path, {"e": codes, "e_scale_inv": scales}, block) as reader:
        assert torch.equal(reader.read("e"), expected)
        assert torch.equal(reader.read("e", 1, 2), expected[1:2])
        assert reader.read("e", 3, 3).shape == (0, 7, 8)


def test_every_fp8_code_is_exact() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    target = torch.empty(1, 256, dtype=torch.bfloat16)
    found = dequantize_blocks(codes, torch.ones(1, 2), (128, 128), 0, target)
    assert torch.equal(found.isnan(), codes.float().isnan()) and int(found.isnan().sum()) == 2
    finite = ~codes.float().isnan()
    assert torch.equal(found[finite].float(), codes.float()[finite])
    without_nan = torch.tensor([[c for c in range(256) if c & 127 != 127]], dtype=torch.uint8)
    target = torch.empty(1, 254, dtype=torch.bfloat16)
    found = dequantize_blocks(without_nan.view(torch.float8_e4m3fn), torch.ones(1, 2), (1, 128), 0, target)
    assert raw(found) == raw(without_nan.view(torch.float8_e4m3fn).to(torch.bfloat16))  # also the sign of zero


def test_fp8_without_companion_stays_as_it_is(tmp_path: Path) -> None:
    codes, scales = fp8_case(4, 4, (4, 4), 0)
    tensors = {"w": codes, "x": torch.zeros(2, 2), "x_scale_inv": scales, "y_scale_inv": scales + 1}
    with store(tmp_path, tensors) as reader:
        assert sorted(reader.names()) == ["w", "x", "x_scale_inv", "y_scale_inv"]
        assert reader.read("w").dtype == torch.float8_e4m3fn and raw(reader.read("w")) == raw(codes)


@pytest.mark.parametrize("scales", [torch.ones(1, 2), torch.ones(2), torch.ones(2, 2, dtype=torch.int32)])
def test_fp8_scales_that_do_not_fit(tmp_path: Path, scales: Tensor) -> None:
    codes, _ = fp8_case(4, 4, (2, 2), 0)
    with store(tmp_path, {"w": codes, "w_scale_inv": scales}, (2, 2)) as reader:
        with pytest.raises(CheckpointError, match=r"'w_scale_inv'.*\[2, 2\] for blocks of 2 x 2.*weight_block_size"):
            reader.read("w")
