"""Links to what is not a page of the site.

- JAX, Optax and Flax: the names that the docs mention stand in `INVENTORIES`, with the
  pages on which their projects document them. They are written to small inventories, so
  that the build needs no network.
- Files of the repository: `../examples/adamw.py` in a page leads to the page of that
  example, and every other file outside of docs to the repository.
- Names of the library in inline code lead to the reference.
"""

import pathlib
import re
import zlib
from typing import Any, ClassVar

from docutils import nodes
from generated_pages import home
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

from sam_optax.methods import FURTHER_METHODS, METHODS

JAX = "_autosummary/{name}.html"
INVENTORIES = {
    "jax": (
        "https://docs.jax.dev/en/latest/",
        {
            JAX: """jax.ShapeDtypeStruct jax.checkpoint jax.custom_vjp jax.debug_nans
            jax.distributed.initialize jax.grad jax.jit jax.lax.cond jax.lax.pcast
            jax.lax.pmean jax.lax.scan jax.make_mesh jax.pmap jax.shard_map jax.tree.map
            jax.tree_util.Partial jax.value_and_grad jax.vmap""",
        },
    ),
    "optax": (
        "https://optax.readthedocs.io/en/latest/api/",
        {
            "apply_updates.html": "optax.apply_updates optax.incremental_update",
            "combining_optimizers.html": "optax.chain optax.partition",
            "contrib.html": "optax.contrib.sam",
            "optimizer_schedules.html": "optax.inject_hyperparams",
            "optimizer_wrappers.html": "optax.MultiSteps optax.apply_if_finite",
            "optimizers.html": "optax.adamw optax.lbfgs optax.sgd",
            "transformations.html": """optax.GradientTransformation
            optax.GradientTransformationExtraArgs optax.add_decayed_weights
            optax.clip_by_global_norm optax.masked""",
        },
    ),
    "flax": (
        "https://flax.readthedocs.io/en/latest/api_reference/",
        {
            "flax.nnx/training/optimizer.html": "nnx.Optimizer nnx.Optimizer.update",
            "flax.nnx/transforms.html": "nnx.value_and_grad",
        },
    ),
}


def write_inventory(path: pathlib.Path, project: str, pages: dict[str, str]) -> None:
    """Writes an inventory as Sphinx makes them (version 2 of the format)."""
    lines = [
        # Flax's pages have no anchor under the short names.
        f"{name} py:function 1 {page.format(name=name)}{_anchor(name)} -\n"
        for page, names in pages.items()
        for name in names.split()
    ]
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))


def _anchor(name: str) -> str:
    return "" if name.startswith("nnx.") else f"#{name}"


def _use_inventories(app: Any, config: Any) -> None:
    folder = pathlib.Path(app.doctreedir)
    folder.mkdir(parents=True, exist_ok=True)
    for project, (url, pages) in INVENTORIES.items():
        path = folder / f"{project}.inv"
        write_inventory(path, project, pages)
        config.intersphinx_mapping[project] = (url, str(path))


def _lead_to_pages(app: Any, docname: str, content: list[str]) -> None:
    """In Markdown, the pages of examples in the place of the scripts themselves."""
    depth = "../" * docname.count("/")
    for pattern, replacement in (
        (r"\]\((?:\.\./)+examples/(\w+)\.py\)", rf"]({depth}examples/\1.rst)"),
        (r"\]\((?:\.\./)+examples/?\)", rf"]({depth}examples.md)"),
        (r"\]\((?:\.\./)+CONTRIBUTING\.md", rf"]({depth}contributing.md"),
        (
            r"\]\((?:\.\./)+(?=benchmarks/)",
            f"]({app.config.html_theme_options['source_repository']}/blob/main/",
        ),
    ):
        content[0] = re.sub(pattern, replacement, content[0])
    if docname == "index":
        content[0] = _without_missing_pages(content[0], app.srcdir)


def _without_missing_pages(index: str, docs: pathlib.Path) -> str:
    """The index, without the entries of its navigation that nobody has written yet."""

    def sections(match: re.Match[str]) -> str:
        head, names = match[1], match[2].split()
        there = [name for name in names if (docs / f"{name}.md").exists()]
        return head + "\n".join(there) + "\n```" if there else ""

    return re.sub(r"(```\{toctree\}\n(?::.*\n)+\n)([\w\n-]+)```", sections, index)


class LinkCode(SphinxTransform):
    """Inline code that is a name of the library becomes a link to it.

    So do the names of methods alone, except for `sam`, which is a variable in most
    pages.
    """

    default_priority = 400
    NAME = re.compile(r"(sam_optax|jax|optax|nnx)(\.\w+)+")
    METHODS: ClassVar = {
        method.make.__name__: home(method)
        for method in (*METHODS.values(), *FURTHER_METHODS.values())
        if method.make.__name__ != "sam"
    }

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            target = self.METHODS.get(text, text)
            parents = nodes.reference | addnodes.pending_xref | nodes.title
            if isinstance(literal.parent, parents) or not self.NAME.fullmatch(target):
                continue
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refdoc=self.env.docname,
                refwarn=False,
            )
            literal.replace_self(link)
            link += literal


def _drop_way_back(
    app: Any, pagename: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Drops the links from a source to its documentation.

    Sphinx guesses their anchors from the file, but the names are documented where users
    import them from.
    """
    if pagename.startswith("_modules/") and "body" in context:
        link = r'<a class="viewcode-back"[^>]*>.*?</a>'
        context["body"] = re.sub(link, "", context["body"])


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", _use_inventories, priority=100)
    app.connect("source-read", _lead_to_pages)
    app.connect("html-page-context", _drop_way_back)
    app.add_transform(LinkCode)
    return {"parallel_read_safe": True}
