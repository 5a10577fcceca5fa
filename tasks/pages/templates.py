"""Where the pages' templates lie, and how they are read: nothing undefined is shown, and every text is escaped."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def template_environment() -> Environment:
    """Jinja for the templates beside this module, without filters."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
