"""JSON Schema of a recipe file, so that an editor can complete and check it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moecompress.recipe.calibration import CALIBRATION_SOURCES
from moecompress.recipe.specs import EvaluateSpec, OutputSpec, RecipeHead
from moecompress.registry import pass_class, pass_names

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file, for editors: every section, every pass with its keys."""
    passes = {name: pass_class(name) for name in pass_names()}
    models: set[type[BaseModel]] = {
        RecipeHead,
        OutputSpec,
        EvaluateSpec,
        *CALIBRATION_SOURCES.values(),
        *passes.values(),
    }
    ordered = sorted(models, key=lambda model: model.__name__)
    refs, shared = models_json_schema([(model, "validation") for model in ordered])
    ref = {model: refs[(model, "validation")] for model in models}
    definitions = shared["$defs"]
    head = definitions.pop(RecipeHead.__name__)
    spec = {"anyOf": [ref[model] for model in CALIBRATION_SOURCES.values()]}
    steps = [_step_schema(name, ref[model]) for name, model in passes.items()]
    head["properties"] |= {
        "extends": {"type": "string", "description": "a recipe file or a catalogue name"},
        "calibration": {"anyOf": [spec, {"type": "object", "additionalProperties": spec}, {"type": "null"}]},
        "passes": {"type": "array", "minItems": 1, "items": {"oneOf": steps}},
        "output": ref[OutputSpec],
        "evaluate": ref[EvaluateSpec],
    }
    head.update(required=[], anyOf=[{"required": ["passes"]}, {"required": ["extends"]}])
    return {"$schema": DIALECT, **head, "title": "moecompress recipe", "$defs": definitions}


def _step_schema(name: str, params: Any) -> dict[str, Any]:
    body = {name: {"anyOf": [params, {"type": "null"}]}}
    return {"type": "object", "properties": body, "required": [name], "additionalProperties": False}
