"""What every page that coldtap writes has in common: text is escaped, and a policy forbids it to fetch anything."""

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def page_environment(package: str) -> Environment:
    """Return a template engine for the templates beside a package's modules, which escapes whatever it is given.

    Its templates know `css`, the package's `page.css`, and `policy`, the content security policy of a page with that
    style: no script, no font, no request; images only where they are in the page itself.
    """
    css = files(package).joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"css": Markup(css), "policy": Markup(_policy(css))}  # our own file
    return environment


def _policy(css: str) -> str:
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
