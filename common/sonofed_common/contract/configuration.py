"""Strict configuration: TOML files read by pydantic; an unknown key is refused with a hint."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from sonofed_common.contract.errors import ConfigurationError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Model(BaseModel):
    """Base of every configuration and wire model: immutable, finite numbers, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def with_preset(values: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Put the settings of the preset that the values name under what they say themselves.

    Parameters
    ----------
    values : mapping
        Parsed configuration; anything else is returned as it is, for pydantic to refuse.
    presets : mapping
        Preset name to what it sets: sections, of which each setting counts alone, and whole values.
    """
    if not isinstance(values, dict):
        return values
    merged = dict(values)
    for name, settings in presets.get(str(values.get("preset", "default")), {}).items():
        given = values.get(name, {})
        if not isinstance(settings, Mapping):
            merged.setdefault(name, settings)
        elif isinstance(given, dict):
            merged[name] = {**settings, **given}
    return merged


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ConfigurationError
        The file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error.strerror}); check the path"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None


def validate(model: type[ModelT], values: Mapping[str, Any], where: str) -> ModelT:
    """Validate values against a model.

    Parameters
    ----------
    model : type of BaseModel
        What the values must be.
    values : mapping
        Parsed TOML or JSON.
    where : str
        Name of the file or message, for the error sentence.

    Raises
    ------
    ConfigurationError
        One sentence: the first offending key and, for an unknown one, the nearest known key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {_sentence(model, error)}") from None


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False)
    # A misspelt key is also a missing one; the first is what helps.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = [part for part in first["loc"] if isinstance(part, str | int)]
    # A key of the wire is a stranger's text: no line breaks or control codes, and not too long.
    key = repr(".".join(str(part) for part in location)[:64])
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if location else message


def _known_keys(model: type[BaseModel], location: list[Any]) -> list[str]:
    current: Any = model
    for part in location:
        if (
            isinstance(current, type)
            and issubclass(current, BaseModel)
            and part in current.model_fields
        ):
            current = current.model_fields[str(part)].annotation
        while not (isinstance(current, type) and issubclass(current, BaseModel)):
            models = [
                a for a in _flatten(current) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            if not models:
                return []
            current = models[0]
    return list(current.model_fields)


def _flatten(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [annotation] if not arguments else [leaf for a in arguments for leaf in _flatten(a)]
