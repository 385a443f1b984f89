"""How Sphinx builds these pages: `sphinx-build -nW docs SITE` (needs `pip install '.[docs]'`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

import corrmatch
from corrmatch.config import Config
from corrmatch.methods import METHODS

project = "corrmatch"
author = "the corrmatch authors"
release = corrmatch.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "myst_parser"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"corrmatch {release}"
html_show_sphinx = False
nitpick_ignore_regex = [("py:class", r"(torch|collections\.abc)\..*")]
autodoc_typehints = "none"  # the docstrings name types and shapes
python_maximum_signature_line_length = 88

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HOME = {"cuda": "GPU", "triton": "GPU", "cpu": "CPU", "reference": "any device"}


class Support(Directive):
    """`{support} OP`: which backend takes what, asked of the objects that decide it in every call."""

    required_arguments = 1
    option_spec = {"integers": directives.flag}  # noqa: RUF012  (docutils reads it so)

    def run(self) -> list[nodes.Node]:
        """The table."""
        integers = "integers" in self.options
        rows = [["backend", "tensors on", *([] if integers else [*map(_name, DTYPES), "channels"])]]
        for name, backend in corrmatch.backends().items():
            limits = backend.implementations.get(self.arguments[0])
            if limits is not None:
                taken = ["yes" if limits.dtypes is None or d in limits.dtypes else "no" for d in DTYPES]
                channels = "any number" if limits.channels is None else f"at most {limits.channels}"
                rows.append([name, HOME[name], *([] if integers else [*taken, channels])])
        if len(rows) == 1:
            raise self.error(f"no backend has an op called {self.arguments[0]}")
        return [_table(rows)]


class Keys(Directive):
    """`{keys} SECTION`: the keys of a method or of another section, asked of the class that holds them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table."""
        section = self.arguments[0]
        kinds = {entry.name: entry.default_factory for entry in dataclasses.fields(Config)}
        kind = METHODS[section].Options if section in METHODS else kinds[section]
        rows = [["key", "default", "", "values"]]
        for entry in dataclasses.fields(kind):
            limits = entry.metadata
            rows.append([f"{section}.{entry.name}", _value(_default(entry)), limits["about"], _limits(limits)])
        return [_table(rows)]


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return "expected" if value == "???" else str(value)


def _limits(limits: Mapping[str, Any]) -> str:
    if limits["choices"]:
        return ", ".join(map(_value, limits["choices"]))
    if limits["high"] is not None:
        return f"{limits['low']} to {limits['high']}"
    return "" if limits["low"] is None else f"at least {limits['low']}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(rows: list[list[str]]) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in rows[0]), cols=len(rows[0]))
    lines = [nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in row)) for row in rows]
    group += [nodes.thead("", lines[0]), nodes.tbody("", *lines[1:])]
    return nodes.table("", group)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("support", Support)
    app.add_directive("keys", Keys)
