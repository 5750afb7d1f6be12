"""The door to the families of networks: from a name or a configuration to a network."""

from __future__ import annotations

from importlib import import_module

from hadaptive_q.errors import UserError, nearest
from hadaptive_q.models.config import FAMILIES, MODELS, NetworkConfig
from hadaptive_q.models.network import Family, Network


def find_family(name: str) -> Family:
    """Return the family `name`, whose module is loaded only now. Raises UserError for an unknown name."""
    if name not in FAMILIES:
        raise UserError(f"family {name!r}", "an unknown name", f"one of {', '.join(FAMILIES)}", nearest(name, FAMILIES))
    family = import_module(f"hadaptive_q.models.{name}").FAMILY
    assert isinstance(family, Family)
    return family


def find_config(name: str) -> NetworkConfig:
    """Return the configuration of the variant `name`. Raises UserError for an unknown name."""
    if name not in MODELS:
        raise UserError(f"model {name!r}", "an unknown name", f"one of {', '.join(MODELS)}", nearest(name, MODELS))
    return find_family(MODELS[name]).variants[name]


def create_model(name: str, num_classes: int = 100, **overrides: object) -> Network:
    """Return a freshly initialised variant; `overrides` replace fields of its configuration.

    Raises UserError for an unknown name.
    """
    config = find_config(name)
    return build(type(config).model_validate(config.model_dump() | {"num_classes": num_classes} | overrides))


def build(config: NetworkConfig) -> Network:
    """Return a freshly initialised network of the shape `config`."""
    return find_family(config.family).network(config)
