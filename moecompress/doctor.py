"""What this machine offers: versions, processors, memory, devices, and which kernel backends can run and why."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from moecompress import ops
from moecompress.fingerprint import versions
from moecompress.memory import available_bytes
from moecompress.report.text import data_size

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def doctor() -> dict[str, Any]:
    """JSON-able facts. Sizes are bytes; a value that this system does not tell is None."""
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory": memory(),
        "devices": devices(),
        "kernels": kernels(),
        "versions": versions(),
    }


def memory() -> dict[str, int | None]:
    """total: physical; limit: what the container may use, if that is less; available: free or reclaimable now."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    limit = int(text) if text.isdecimal() and int(text) < total else None
    return {"total": total, "limit": limit, "available": available_bytes()}


def devices() -> list[dict[str, Any]]:
    """Accelerators that PyTorch can use; empty on a machine with processors only."""
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        capability = f"{facts.major}.{facts.minor}"
        found.append(
            {
                "device": f"cuda:{number}",
                "name": facts.name,
                "memory": facts.total_memory,
                "capability": capability,
            }
        )
    return found


def kernels() -> list[dict[str, Any]]:
    """Backends in order of preference, each with the reason why it can or cannot run."""
    rows: list[dict[str, Any]] = []
    for name in (*ops.ORDER, ops.TORCH):
        reason = ops.unavailable(name)
        rows.append({"backend": name, "available": reason is None, "reason": reason or ops.backend(name).describe()})
    return rows


def render(facts: dict[str, Any]) -> str:
    """The facts of `doctor` for people."""
    amount = facts["memory"]
    limit = f", this process may use {data_size(amount['limit'])}" if amount["limit"] else ""
    lines = [
        f"system    {facts['platform']}",
        f"cpu       {facts['cpus']} processors, torch uses {facts['torch_threads']} threads",
        f"memory    {data_size(amount['total'])}{limit}, {data_size(amount['available'])} available",
    ]
    for device in facts["devices"]:
        lines.append(f"device    {device['device']} {device['name']}, {data_size(device['memory'])}")
    if not facts["devices"]:
        lines.append("device    none; everything runs on the cpu")
    for backend in facts["kernels"]:
        verdict = "available" if backend["available"] else "not available"
        lines.append(f"kernels   {backend['backend']}: {verdict} ({backend['reason']})")
    lines += [f"version   {name} {version}" for name, version in facts["versions"].items()]
    return "\n".join(lines)
