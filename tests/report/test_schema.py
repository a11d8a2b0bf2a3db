"""The keys that other tools rely on, and the values a report may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from moecompress.report.schema import Evaluation, ExpertInfo, ModelInfo, Report

# The contract, by hand: a nested dict is an object, a list has one sample element, None is a leaf.
REPORT_KEYS: dict[str, Any] = {
    **dict.fromkeys(("schema", "model", "recipe", "versions", "seeds", "hardware", "backend")),
    "size": dict.fromkeys(("source_bytes", "output_bytes", "expert_bits_per_weight", "total_bits_per_weight")),
    "plan": dict.fromkeys(("peak_bytes", "disk_bytes", "seconds")),
    "peak_rss_bytes": None,
    "seconds": None,
    "layers": [
        {
            **dict.fromkeys(("layer", "experts_before", "experts_after", "output_error")),
            "router": dict.fromkeys(("topk_agreement", "kl", "load_cv")),
            "experts": [
                {
                    **dict.fromkeys(("id", "tokens", "importance", "error", "action", "fallback")),
                    "bits": dict.fromkeys(("gate_up", "down")),
                }
            ],
        }
    ],
    "warnings": None,
    "loadable": {name: dict.fromkeys(("status", "reason")) for name in ("transformers", "vllm", "sglang")},
}
EVALUATION_KEYS = (
    "perplexity kl top1_agreement router_agreement tasks samples backend versions limit reference "
    "windows tasks_paired tasks_reference task_settings".split()
)


def assert_has(keys: Any, found: Any, where: str = "report") -> None:
    if isinstance(keys, list):
        assert len(found) > 0, where
        for i, item in enumerate(found):
            assert_has(keys[0], item, f"{where}[{i}]")
    elif isinstance(keys, dict):
        for key, inner in keys.items():
            assert key in found, f"{where}.{key}"
            assert_has(inner, found[key], f"{where}.{key}")


def test_every_contract_key_is_written(make_report: Callable[[int, int], Report]) -> None:
    assert_has(REPORT_KEYS, make_report(2, 4).model_dump(mode="json", by_alias=True))


def test_every_evaluation_key_is_read(make_evaluation: Callable[[int], Evaluation]) -> None:
    assert set(EVALUATION_KEYS) == set(make_evaluation(2).model_dump())


def test_dump_is_what_was_read(make_data: Callable[[int, int], dict[str, Any]]) -> None:
    data = make_data(3, 5)
    assert Report.model_validate(data).model_dump(mode="json", by_alias=True) == data


def test_unmeasured_is_null_and_nothing_else() -> None:
    data = Report(model=ModelInfo(name="m", source="directory"), recipe={}).model_dump(mode="json", by_alias=True)
    measured = ("backend", "format", "peak_rss_bytes", "seconds", "resumed")
    assert {key: data[key] for key in measured} == dict.fromkeys(measured)
    assert set(data["plan"].values()) == set(data["loadable"].values()) == {None}
    assert {v for k, v in data["size"].items() if k != "components"} == {None}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "moecompress.report/2"),
        (("surprise",), 1),
        (("loadable", "vllm"), {"status": "maybe", "reason": ""}),
        (("size", "components"), {"flux_capacitor": {"source_bytes": 1, "output_bytes": 1}}),
        (("layers", 0, "experts", 0, "id"), -1),
    ],
)
def test_what_is_not_in_the_contract_is_refused(
    make_data: Callable[[int, int], dict[str, Any]], path: tuple[Any, ...], value: Any
) -> None:
    data: Any = make_data(1, 2)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValidationError) as error:
        Report.model_validate(data)
    assert error.value.errors()[0]["loc"][: len(path)] == path


def test_models_are_frozen(make_report: Callable[[int, int], Report]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_report(1, 2).seconds = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "removed", "uncovered"),
    [
        ({"tokens": 9, "bits": {"gate_up": 2, "down": 2}, "action": "quantized"}, False, False),
        ({"tokens": 0, "bits": {"gate_up": 2, "down": 2}, "action": "quantized"}, False, True),
        (
            {"tokens": 9, "bits": {"gate_up": 2, "down": 2}, "action": "quantized", "fallback": "rtn"},
            False,
            True,
        ),
        ({"tokens": 9, "action": "pruned"}, True, False),
        ({"tokens": 9, "action": "merged into 3"}, True, False),
        ({"tokens": 9, "bits": {"gate_up": 16, "down": 16}, "action": "merged from 1, 2"}, False, False),
        ({"action": "kept"}, False, False),
    ],
)
def test_removed_and_uncovered_experts(fields: dict[str, Any], removed: bool, uncovered: bool) -> None:
    expert = ExpertInfo(id=0, **fields)
    assert (expert.removed, expert.uncovered) == (removed, uncovered)
