"""The model of a run that starts from other weights: its shape comes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from ..checkpoint import retention
from ..checkpoint.initial import locate_initial, published_model, told_model
from ..config.load import DEFAULT, ResolvedConfig
from ..config.models import ModelConfig
from ..errors import CheckpointError, ConfigError

#: Values of ``init_from`` that name no weights.
NO_WEIGHTS = ("scratch", "resume")
#: Settings of a model that are a matter of training, or are fitted when the weights are read.
_OWN = ("kind", "dropout", "vocab_size", "pad_vocab_to", "block_size")


def with_initial_model(
    resolved: ResolvedConfig, *, resumed: tuple[Path, str] | None = None, fetch: bool = True
) -> ResolvedConfig:
    """The configuration with what ``init_from`` tells of the model's shape, where the configuration says nothing.

    Args:
        resolved: as read.
        resumed: run folder and checkpoint of a run that is continued: it knows its shape, the first weights may be
            gone.
        fetch: False: of published weights only the shape, nothing is downloaded.

    Raises:
        ConfigError: a setting of the model that the weights do not have, with its place.
        CheckpointError: there are no such weights.
    """
    name = resolved.config.init_from
    if name in NO_WEIGHTS:
        return resolved
    if resumed is not None:
        told = told_model(retention.locate(*resumed))
    else:
        told = published_model(name) if not fetch else None
        told = told or told_model(locate_initial(name))
    if told is None:
        return resolved  # a bare state dict: what it holds is compared when it is opened
    _check(resolved, told, name)
    model = _merged(resolved, told, name)
    kept = {key: origin for key, origin in resolved.origins.items() if not key.startswith("model.")}
    for field in type(model).model_fields:
        origin = resolved.origins.get(f"model.{field}", DEFAULT)
        taken = origin == DEFAULT and field != "dropout"
        kept[f"model.{field}"] = f"init_from {name}" if taken else origin
    return replace(resolved, config=resolved.config.model_copy(update={"model": model}), origins=kept)


def refuse_another_kind(resolved: ResolvedConfig, flag: str, checkpoint: Path | None) -> None:
    """Refuse a checkpoint of another kind of model before data is prepared or anything planned for it. What cannot be
    read, or does not tell, is left to those who open it.

    Args:
        flag: how the checkpoint was named, for the message.
        checkpoint: None: it was not found.

    Raises:
        ConfigError: it holds another kind.
    """
    try:
        told = told_model(checkpoint) if checkpoint is not None else None
    except CheckpointError:
        return
    kind = resolved.config.model.kind
    if told is None or told.kind == kind:
        return
    origin = resolved.origins.get("model.kind", DEFAULT)
    place = "" if origin == DEFAULT else f" ({origin})"
    raise ConfigError(
        f"{flag} holds a model of kind {told.kind}, and model.kind is {kind}{place}: weights of one kind do not go "
        f"into another. Use the model section that it was trained with, or a checkpoint of a {kind} model."
    )


def _check(resolved: ResolvedConfig, told: ModelConfig, name: str) -> None:
    model, origins = resolved.config.model, resolved.origins
    if origins.get("model.kind", DEFAULT) != DEFAULT and model.kind != told.kind:
        raise ConfigError(
            f"{origins['model.kind']}: model.kind is {model.kind}, and init_from {name} holds a {told.kind}. Leave the "
            f"model section out, and it is taken from the weights."
        )
    for field in type(told).model_fields:
        origin = origins.get(f"model.{field}", DEFAULT)
        given, there = getattr(model, field, None), getattr(told, field)
        if origin == DEFAULT or given == there:
            continue
        if field == "block_size" and given is not None and given > there:
            raise ConfigError(
                f"{origin}: model.block_size is {given}, and init_from {name} has learned {there} positions: positions "
                f"can be cut and not be added, since nothing was learned for more. Set model.block_size {there} or "
                f"less."
            )
        if field not in _OWN:
            raise ConfigError(
                f"{origin}: model.{field} is {given}, and init_from {name} has {field} {there}: weights of one shape "
                f"do not go into another. Leave model.{field} out, and it is taken from the weights; or train such a "
                f"model from scratch (init_from: scratch)."
            )


def _merged(resolved: ResolvedConfig, told: ModelConfig, name: str) -> ModelConfig:
    """The weights' shape with what the configuration says itself."""
    model = resolved.config.model
    given = {
        field: getattr(model, field)
        for field in type(model).model_fields
        if resolved.origins.get(f"model.{field}", DEFAULT) != DEFAULT
    }
    own = {"dropout": model.dropout} if hasattr(model, "dropout") else {}
    try:
        return type(told).model_validate({**told.model_dump(), **own, **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"model.{'.'.join(map(str, first['loc']))} does not go with init_from {name}, which holds a {told.kind}: "
            f"{first['msg']}. Leave it out."
        ) from error
