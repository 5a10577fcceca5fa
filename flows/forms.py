"""Settings as a form in Prefect's pages: every field has a title and its place, in the order in which it is declared.

Those pages sort fields by ``position``, which Prefect gives to a flow's parameters but not to what is nested in them, and PostgreSQL
keeps no order of keys; a field that is a group of others has no title of its own.
"""

from collections.abc import Callable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema

Schema = dict[str, Any]


class Form(BaseModel):
    """Settings of a flow; the JSON schema of what is nested in them is put in order, too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __get_pydantic_json_schema__(cls: type[Self], core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """The schema that a form is made of."""
        schema = handler(core_schema)
        _arrange(schema, handler.resolve_ref_schema, [])
        return schema


def _arrange(schema: Schema, resolve: Callable[[Schema], Schema], seen: list[str]) -> None:
    reference = schema.get("$ref")
    if reference is not None and reference not in seen:
        seen.append(reference)
        _arrange(resolve(schema), resolve, seen)
    for position, (name, field) in enumerate(schema.get("properties", {}).items()):
        field.setdefault("title", name.replace("_", " ").title())
        field["position"] = position
        _arrange(field, resolve, seen)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("prefixItems", ())):
        _arrange(choice, resolve, seen)
    for items in ("items", "additionalProperties"):
        if isinstance(schema.get(items), dict):
            _arrange(schema[items], resolve, seen)
