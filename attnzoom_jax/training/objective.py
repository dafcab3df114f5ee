"""The objective of a training, a sum of terms: `config.losses` = {its name: {"name": term, ...}}.

    loss = sum over terms of  weight * mean over the batch of the term's value per example

| term                 | value of an example                                                       |
|----------------------|---------------------------------------------------------------------------|
| cross_entropy        | of the model's output, or of logits at a tap                              |
| binary_cross_entropy | likewise, the mean over attributes, each there or not                     |
| channel_guidance     | distance of channel attention from the channel weights of Grad-CAM        |
| guidance             | distance of a mask from an attribution map, any of attribution/methods.py |
| sparsity             | mean of a mask                                                            |

Taps are read in the forward pass that is trained: they have a gradient, and cost nothing, but that
nn.remat around a tap is undone. So `config.remat` does not go with terms that read taps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training.forward import run_forward
from attnzoom_jax.training.guidance import ChannelGuidance, Guidance
from attnzoom_jax.training.terms import BinaryCrossEntropy, CrossEntropy, Sparsity, Term

TERMS: dict[str, type[Term]] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "channel_guidance": ChannelGuidance,
    "guidance": Guidance,
    "sparsity": Sparsity,
}


def create_terms(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Term]:
    """The terms that a config describes.

    Args:
        losses: {name: {"name": one of TERMS, **its options}}.

    Returns:
        {name: term}.

    Raises:
        ValueError: no term at all, unknown term or option, an option missing or out of range.
    """
    if not losses:
        raise ValueError('losses is empty; expected {"cross_entropy": {"name": "cross_entropy"}}')
    terms = {}
    for key, given in losses.items():
        if not isinstance(given, Mapping) or "name" not in given:
            raise ValueError(
                f"losses.{key} is {given!r}; expected the name of a term and its options, such as "
                '{"name": "cross_entropy", "weight": 1.0}'
            )
        name, options = given["name"], {k: v for k, v in given.items() if k != "name"}
        if name not in TERMS:
            raise unknown_name(f"term losses.{key}.name", name, TERMS)
        fields = {field.name: field for field in dataclasses.fields(TERMS[name])}
        for option in options:
            if option not in fields:
                raise unknown_name(f"option of losses.{key}", option, fields)
        for field in fields.values():
            has_default = field.default_factory is field.default is dataclasses.MISSING
            if has_default and field.name not in options:
                raise ValueError(f"losses.{key} lacks {field.name}; it is the path of a tap")
        try:
            terms[key] = TERMS[name](**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"losses.{key}: {error}") from error
    return terms


def total_loss(
    terms: Mapping[str, Term],
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    targets: jax.Array,
    *,
    inputs: Mapping[str, jax.Array] | None = None,
    label_smoothing: float,
    key: jax.Array,
    remat: Sequence[str] = (),
) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array, Any]]:
    """The loss of a batch, from one forward pass in training mode.

    Args:
        terms: {name: term}.
        model: images [n, h, w, c] -> logits [n, k].
        variables: {"params": ..., "batch_stats": ...}.
        images: [n, h, w, c].
        targets: float32 [n, k], weights of the classes, or attributes.
        inputs: what else the model is called with, see `data.patches.extra_inputs`.
        label_smoothing: in [0, 1).
        key: of dropout, and of methods that draw.
        remat: as of `run_forward`.

    Returns:
        The weighted sum of the terms; and {name: mean of the term over the batch, unweighted}, the
        logits [n, k], the new `batch_stats`.

    Raises:
        ValueError: unknown tap or path, with near matches, a tap of another shape than a term
            needs, `remat` beside taps.
    """
    reads = list(dict.fromkeys(tap for term in terms.values() for tap in term.reads))
    forward, batch_stats = run_forward(
        model,
        variables,
        images,
        targets,
        inputs=inputs,
        reads=reads,
        label_smoothing=label_smoothing,
        key=key,
        remat=remat,
    )
    means = {name: term(forward).mean() for name, term in terms.items()}
    weighted = (term.weight * means[name] for name, term in terms.items())
    loss = sum(weighted, start=jnp.zeros(()))
    return loss, (means, forward.logits, batch_stats)
