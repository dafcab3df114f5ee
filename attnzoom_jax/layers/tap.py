"""A name for a value that no module returns, so that it can be read and drawn like any other."""

import jax
from flax import linen as nn


class Tap(nn.Module):
    """Returns what it is given: seen through `models.bind`, a tap at the module's path.

        views = Tap(name="view")(views)

    It holds no parameters and costs nothing. For attention masks there is `Gate`.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Name a value.

        Args:
            x: any array.

        Returns:
            The same array.
        """
        return x
