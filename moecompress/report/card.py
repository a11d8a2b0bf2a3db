"""README.md of an output directory: the model card that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

from moecompress.report.html import TEMPLATES
from moecompress.report.markdown import fenced, headline_table, inline, markdown_table
from moecompress.report.schema import Evaluation, Report
from moecompress.report.tables import loadable_table, pass_table, quality_table, recipe_text
from moecompress.report.text import NOT_MEASURED

PLAIN_FORMATS = ("dense", "portable", "container")  # load without moecompress being imported


def model_card(report: Report, evaluation: Evaluation | None, licence: str | None = None) -> str:
    """The card's text. licence: the source model's licence identifier, written through unchanged."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown, not HTML: `inline` escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    quality = quality_table(evaluation)
    return environment.get_template("card.md.j2").render(
        front=_front_matter(report, licence),
        title=inline(f"{report.model.name.rstrip('/').rsplit('/', 1)[-1]}, compressed"),
        name=report.model.name,
        headline=markdown_table(headline_table(report)),
        code=_code(report),
        loadable=markdown_table(loadable_table(report)),
        passes=markdown_table(pass_table(report)),
        quality=markdown_table(quality) if quality else NOT_MEASURED,
        warnings=report.warnings,
        recipe=fenced(recipe_text(report.recipe), "yaml"),
        inline=inline,
    )


def _front_matter(report: Report, licence: str | None) -> str:
    """YAML for the hub. A local directory is no `base_model`; unquantized output is a finetune."""
    import yaml

    families = sorted({p.name.partition(".")[0] for p in report.passes})
    quantized = any(
        bits is not None and bits < 16
        for layer in report.layers
        for expert in layer.experts
        for bits in (expert.bits.gate_up, expert.bits.down)
    ) or any(name == "quantize" for name in families)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if licence is not None:
        front["license"] = licence
    if report.model.source == "hub":
        front["base_model"] = report.model.name
        front["base_model_relation"] = "quantized" if quantized else "finetune"
    front["tags"] = ["moecompress", "mixture-of-experts", *families]
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip()


def _code(report: Report) -> str:
    if report.format == "gptq":  # transformers has no loader for GPTQ experts
        return 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load(".")  # or its name on the hub'
    first = (
        [] if report.format in PLAIN_FORMATS else ["import moecompress  # lets transformers read the packed experts"]
    )
    return "\n".join(
        [
            *first,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'directory = "."  # this directory, or its name on the hub',
            'model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(directory)",
        ]
    )
