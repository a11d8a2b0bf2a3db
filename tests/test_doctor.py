from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from moecompress import doctor as room
from moecompress import ops


def test_facts_are_json_and_about_this_machine() -> None:
    facts = room.doctor()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch_threads"] == torch.get_num_threads() and facts["cpus"] == os.cpu_count()
    assert facts["memory"]["total"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert len(facts["devices"]) == torch.cuda.device_count()


def test_some_backend_can_run_and_every_one_says_why() -> None:
    backends = room.kernels()
    assert [b["backend"] for b in backends] == [*ops.ORDER, "torch"]
    assert backends[-1]["available"]
    assert all(b["reason"] for b in backends)


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, info = tmp_path / "memory.max", tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(room, "_CGROUP", limit)
    monkeypatch.setattr("moecompress.memory._MEMINFO", info)
    for text, expected in (("max\n", None), ("1048576\n", 1048576), (str(2**62), None)):
        limit.write_text(text)
        assert room.memory()["limit"] == expected and room.memory()["available"] == 2048 * 1024
    limit.unlink()
    info.unlink()
    assert room.memory()["limit"] is None and room.memory()["available"] is None


def test_the_text_names_devices_backends_and_versions() -> None:
    facts = room.doctor()
    facts["memory"] = {"total": 8 * 2**30, "limit": 2**30, "available": None}
    facts["devices"] = [{"device": "cuda:0", "name": "Some GPU", "memory": 2**34, "capability": "9.0"}]
    text = room.render(facts)
    for part in ("8.00 GiB, this process may use 1.00 GiB", "cuda:0 Some GPU, 16.0 GiB", "torch: available"):
        assert part in text
    assert f"version   torch {facts['versions']['torch']}" in text
    facts["devices"] = []
    assert "none; everything runs on the cpu" in room.render(facts)
