"""Training losses, one value per example, so that the caller decides how to mask and average.

Softmax cross-entropy of logits z [n, k] with target weights q [n, k]:

    loss_n = - sum_k q_nk log softmax(z_n)_k

Label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7) replaces q by (1 - s) q + s / k.

Sigmoid cross-entropy of logits z [n, a] with targets y [n, a], with a weight w_k of what is there:

    loss_n = - mean_k ( w_k y_nk log sigmoid(z_nk) + (1 - y_nk) log sigmoid(-z_nk) )

An attribute is there or not, two classes: smoothing replaces y by (1 - s) y + s / 2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def one_hot_targets(targets: jax.Array, *, num_classes: int) -> jax.Array:
    """Target weights over the classes, from class ids or from weights.

    Args:
        targets: int [n], class ids in [0, k); or float [n, k], returned as they are.
        num_classes: k.

    Returns:
        float32 [n, k]. The row of a class id outside [0, k) is NaN: a wrong label must not pass
        as an example without a loss.

    Raises:
        ValueError: neither int [n] nor float [n, k].
    """
    targets = jnp.asarray(targets)
    if targets.ndim == 2 and jnp.issubdtype(targets.dtype, jnp.floating):
        if targets.shape[1] == num_classes:
            return targets.astype(jnp.float32)
    elif targets.ndim == 1 and jnp.issubdtype(targets.dtype, jnp.integer):
        known = (targets >= 0) & (targets < num_classes)
        return jnp.where(known[:, None], jax.nn.one_hot(targets, num_classes), jnp.nan)  # [n, k]
    raise ValueError(
        f"targets are {targets.dtype}{list(targets.shape)}; expected class ids, int [n], or class "
        f"weights, float [n, {num_classes}]"
    )


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy of each example, computed in float32.

    Args:
        logits: [n, k], any float dtype.
        targets: int [n], class ids in [0, k); or float [n, k], rows that sum to 1 (as mixup makes).
        label_smoothing: s in [0, 1), the share of every target that is spread over all classes.

    Returns:
        float32 [n], in nats. NaN where a class id lies outside [0, k).

    Raises:
        ValueError: wrong shapes, or `label_smoothing` outside [0, 1).

    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7.
    """
    _check_smoothing(label_smoothing)
    if logits.ndim != 2 or logits.shape[0] != jnp.shape(targets)[0]:
        raise ValueError(
            f"logits have shape {logits.shape} and targets {jnp.shape(targets)}; "
            "expected [n, k] and [n] or [n, k] with the same n"
        )
    weights = one_hot_targets(targets, num_classes=logits.shape[1])  # [n, k]
    if label_smoothing:
        weights = optax.smooth_labels(weights, label_smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), weights)


def sigmoid_cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    positive_weight: float | Sequence[float] = 1.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Sigmoid cross-entropy of each example, the mean over its attributes, computed in float32.

    Args:
        logits: [n, a], any float dtype.
        targets: [n, a], 1 where the attribute is there and 0 where not; mixup: between.
        positive_weight: w, above 0: one number for all attributes, or one for each.
        label_smoothing: s in [0, 1), the share of every target that is spread over both cases.

    Returns:
        float32 [n], in nats.

    Raises:
        ValueError: wrong shapes, or `label_smoothing` outside [0, 1).

    Source: smoothing, Szegedy et al. 2016 (arXiv 1512.00567), section 7, with two classes.
    """
    _check_smoothing(label_smoothing)
    if logits.ndim != 2 or logits.shape != jnp.shape(targets):
        raise ValueError(
            f"logits have shape {logits.shape} and targets {jnp.shape(targets)}; expected [n, a] "
            "for both, one logit and one target per attribute"
        )
    weight = jnp.asarray(positive_weight, jnp.float32)
    if weight.shape not in ((), logits.shape[1:]):
        raise ValueError(
            f"positive_weight holds {weight.size} numbers and there are {logits.shape[1]} "
            "attributes; expected one number, or one per attribute"
        )
    logits = logits.astype(jnp.float32)
    targets = (1 - label_smoothing) * jnp.asarray(targets, jnp.float32) + label_smoothing / 2
    there = targets * jax.nn.log_sigmoid(logits)
    not_there = (1 - targets) * jax.nn.log_sigmoid(-logits)
    return -(weight * there + not_there).mean(axis=1)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a share in [0, 1)")
