"""Top-1, top-5, cross-entropy and calibration error, as masked sums that add up over batches.

    sums = jax.tree.map(operator.add, classification_sums(...), classification_sums(...))
    classification_metrics(sums)   # divides once, so every example counts exactly once

Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3): with the confidence
(the largest softmax probability) cut into M bins of equal width, bin m holding ((m-1)/M, m/M],

    ECE = sum_m |B_m| / N * | accuracy(B_m) - confidence(B_m) |
"""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np


def classification_sums(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, *, num_bins: int = 15
) -> dict[str, jax.Array]:
    """Sums over the real examples of one batch; the sums of batches add up.

    Args:
        logits: [n, k].
        labels: int [n], class ids in [0, k).
        mask: [n], 1 = real example, 0 = padding, which counts nothing whatever its logits hold.
        num_bins: M, confidence bins of the calibration error.

    Returns:
        float32 sums: "top1", "top5" (top min(5, k)), "cross_entropy" (nats), "count"; and [M]
        "bin_confidence", "bin_accuracy", "bin_count". Equal logits rank in class order, as argmax
        has it. A real example with NaN logits or a label outside [0, k) counts as wrong and makes
        the cross-entropy NaN. Counts are exact up to 2**24 examples; beyond, add up in float64.
    """
    chex.assert_rank([logits, labels, mask], [2, 1, 1])
    chex.assert_equal_shape_prefix([logits, labels, mask], 1)
    chex.assert_type(labels, int)
    num_classes = logits.shape[1]
    real = mask > 0  # [n]
    weight = real.astype(jnp.float32)
    # Replaced before any arithmetic: 0 * NaN would be NaN.
    logits = jnp.where(real[:, None], logits.astype(jnp.float32), 0.0)
    # A negative id would index from the end; k is out of range and reads as NaN.
    labels = jnp.where(real, jnp.where(labels < 0, num_classes, labels), 0)

    log_probs = jax.nn.log_softmax(logits)  # [n, k]
    own_log_prob = jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="fill")[:, 0]
    own_logit = jnp.take_along_axis(logits, labels[:, None], axis=1, mode="fill")  # [n, 1]
    ahead = logits > own_logit
    ahead |= (logits == own_logit) & (jnp.arange(num_classes) < labels[:, None])
    # The label's rank, 0 = the argmax. NaN compares as neither ahead nor behind: last, by hand.
    rank = jnp.where(jnp.isnan(own_log_prob), num_classes, ahead.sum(axis=1))  # [n]
    top1 = (rank < 1) * weight
    top5 = (rank < min(5, num_classes)) * weight

    confidence = jnp.exp(log_probs.max(axis=1))  # [n]
    bins = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    in_bin = jax.nn.one_hot(bins, num_bins) * weight[:, None]  # [n, M]
    return {
        "top1": top1.sum(),
        "top5": top5.sum(),
        "cross_entropy": -jnp.where(real, own_log_prob, 0.0).sum(),
        "count": weight.sum(),
        "bin_confidence": (in_bin * confidence[:, None]).sum(axis=0),
        "bin_accuracy": (in_bin * top1[:, None]).sum(axis=0),
        "bin_count": in_bin.sum(axis=0),
    }


def classification_metrics(sums: Mapping[str, jax.Array | np.ndarray]) -> dict[str, float]:
    """The metrics of all examples behind some sums; runs on the host, once.

    Args:
        sums: what `classification_sums` returns, or several of them added up.

    Returns:
        "top1", "top5" and "calibration_error" in [0, 1], "cross_entropy" in nats, "count".

    Raises:
        ValueError: no example was counted.

    Source: calibration error, Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    total = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    count = total["count"]
    if count == 0:
        raise ValueError("no example was counted; expected sums over at least one, check the split")
    # |B_m| / N * |accuracy - confidence| is the difference of the two sums over N.
    gaps = np.abs(total["bin_accuracy"] - total["bin_confidence"])
    return {
        "top1": float(total["top1"] / count),
        "top5": float(total["top5"] / count),
        "cross_entropy": float(total["cross_entropy"] / count),
        "calibration_error": float(gaps.sum() / count),
        "count": int(count),
    }
