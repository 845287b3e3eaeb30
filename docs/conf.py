"""How Sphinx builds this site: `nox -s docs`, or `sphinx-build -W --keep-going -n docs build/docs`."""

from __future__ import annotations

import inspect
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import adamss

project = "adamss"
author = "The adamss authors"
copyright = "the adamss authors"
release = version = adamss.__version__

# Formulas are drawn by a copy of MathJax in the site: neither the build nor a reader of it needs the network.
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["_build"]
nitpicky = True
# Signatures name types that are not public: base classes, aliases, type variables. Names in docstrings must resolve.
nitpick_ignore_regex = [("py:class", r"adamss.*")]

# Pages are Markdown that GitHub shows too: formulas between dollar signs, links to headings by their text.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Signatures have the types, docstrings what they mean.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
autodoc_type_aliases = {"Array": "Array", "Model": "Model"}  # of any framework: typing knows them as Any
python_maximum_signature_line_length = 120
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "adamss"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}

# Single backticks in a docstring are a name of ours, another library's name, or code.
default_role = "py:obj"
OURS = ("adamss", "adamss_torch", "adamss_jax", "adamss_conformance")


def resolve(app: Sphinx, env: Any, node: nodes.Element, contnode: nodes.Element) -> nodes.Element | None:
    """Resolve what Sphinx has not found where it was written; None lets it warn.

    Sphinx looks in the module and the class of the docstring. Docstrings also name classes of our other packages, and
    signatures name types by the module that defines them, which is often not the one that documents them.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    ours = target.split(".")[0] in OURS
    name = target.rpartition(".")[2]
    if ours or name[:1].isupper():
        domain = env.get_domain("py")
        public = {full for full in domain.objects if full.rpartition(".")[2] == name}
        if len(public) == 1:
            (full,) = public
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, contnode)
    # Other libraries have sites of their own: to link them would take their inventories from the network.
    return None if ours else contnode


def skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which their class documents under "Attributes"."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def shorten(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None] | None:
    """Leave types out of the signatures of classes: a config has twenty fields, which its docstring describes."""
    if what != "class" or not signature:
        return None
    found = inspect.signature(obj)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return text.replace("<factory>", "{}"), None


def setup(app: Sphinx) -> None:
    """Register the functions above."""
    app.connect("autodoc-process-signature", shorten)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-skip-member", skip_fields)
