"""Docstrings refer to names as Sphinx writes it, which Markdown does not know."""

import re

ROLE = re.compile(r":(?:class|meth|func|data|attr|mod):<code>~?([^<]+)</code>")


def on_page_content(html, **kwargs):
    return ROLE.sub(r"<code>\1</code>", html)
