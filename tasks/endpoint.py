"""A server that speaks the OpenAI protocol: settings only, shared by whoever asks one."""

import ipaddress
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.addresses import SECRETLESS_SCHEMA
from tasks.secrets import SECRET_NAME_SCHEMA, check_secret_name


class Endpoint(BaseModel):
    """A server that speaks the OpenAI protocol: vLLM, SGLang, a hosted one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_url: str = Field(
        description="Address up to and including /v1, for example http://127.0.0.1:8000/v1.",
        json_schema_extra=SECRETLESS_SCHEMA,
    )
    model: str = Field(description="Name of the model at that server.")
    api_key: str | None = Field(
        default=None,
        description="Name of the secret that holds the key (environment variable or Prefect block); not the key.",
        json_schema_extra=SECRET_NAME_SCHEMA,
    )
    deployment: str | None = Field(
        default=None,
        description="What stands behind the address, for example a hub revision. With it, a change of the address alone does "
        "not sample again.",
    )
    concurrency: int = Field(default=64, ge=1, le=4096, description="Most requests in flight.")
    timeout_seconds: float = Field(default=600.0, gt=0, description="Longest wait for one answer.")
    max_tries: int = Field(default=6, ge=1, description="Tries per request; only what can pass is tried again.")
    insecure: bool = Field(
        default=False, description="Send the key over plain http to a host that is not in your network."
    )

    @model_validator(mode="after")
    def _key_is_named(self) -> Self:
        if self.api_key is not None:
            check_secret_name(self.api_key, "api_key")
        return self

    @model_validator(mode="after")
    def _address_is_safe(self) -> Self:
        try:
            address = urlsplit(self.base_url)
            host, _ = address.hostname, address.port
        except ValueError as error:
            raise ValueError(f"base_url is not an address ({error}): correct it") from None
        if address.scheme not in ("http", "https") or not host:
            raise ValueError(f"base_url {self.base_url!r} must begin with http:// or https:// and name a host")
        if address.username or address.password or address.query or address.fragment:
            # not shown: there is a password or a key in it
            raise ValueError(
                f"base_url (host {host}) must be a plain address: put the key into a secret, named by api_key"
            )
        if address.scheme == "http" and self.api_key and not (self.insecure or _in_own_network(host)):
            raise ValueError(
                f"base_url {self.base_url!r} would send the key {self.api_key!r} unencrypted over a public network: use https, "
                f"or set insecure if you mean it"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the answers: the model, and the deployment or else the address."""
        return {"model": self.model, "deployment": self.deployment or self.base_url.rstrip("/")}


def is_loopback(base_url: str) -> bool:
    """Whether an address is of this machine."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _in_own_network(host: str) -> bool:
    """Whether a host is, by its name or number, this machine or one of a private network. Names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal", ".lan", ".home.arpa"))
