"""Recipes: YAML to a frozen `Recipe`, checked as a whole before anything else happens."""

from moecompress.recipe.build import PassSpec, Recipe, load_recipe, recipe_data, resolved_yaml
from moecompress.recipe.json_schema import schema
from moecompress.recipe.source import catalogue
from moecompress.recipe.specs import CalibrationSpec, EvaluateSpec, OutputSpec

__all__ = [
    "CalibrationSpec",
    "EvaluateSpec",
    "OutputSpec",
    "PassSpec",
    "Recipe",
    "catalogue",
    "load_recipe",
    "recipe_data",
    "resolved_yaml",
    "schema",
]
