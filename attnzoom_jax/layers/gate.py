"""The mark by which an attention mask is found and told from the signal that it weights."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name


class Gate(nn.Module):
    """Names a mask by its module path and returns it unchanged.

    A layer calls it as a submodule named "gate", right before it multiplies: the mask is then the
    tap `<path of the layer>/gate`, and relevance goes to the other factor, never to the mask.

        gated = x * Gate(name="gate")(mask)

    It holds no parameters and costs nothing when compiled. Outside a layer the name is "gate".
    """

    def __call__(self, mask: jax.Array) -> jax.Array:
        """Mark a mask.

        Args:
            mask: any shape that broadcasts against the signal, usually [n, h, w, 1].

        Returns:
            The same values, shape and type, named.
        """
        path = () if self.scope is None else self.path
        return checkpoint_name(mask, "/".join(path) or "gate")
