"""Templates to HTML: every page has the styles, macros and filters of this package."""

from typing import Any

import jinja2

from selfalign.pages import numbers

FILTERS = ("number", "signed", "span", "share", "plus_minus", "p_value")


def render(package: str, template: str, **values: Any) -> bytes:
    """A page, as a file holds it.

    Args:
        package: whose folder `templates` has the template; what it includes may be this package's.
        template: the file's name.
        values: what it speaks of.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package), jinja2.PackageLoader("selfalign.pages")]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(numbers, name)
    # Names of files may hold what UTF-8 cannot.
    return environment.get_template(template).render(values).encode(errors="backslashreplace")
