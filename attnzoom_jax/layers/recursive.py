"""Recursive attention: an LSTM looks at one vector again and again, and its states are weighted.

The vector x [n, d], an image's averaged features, is the input of every step t = 1 ... T:

    layer 1      z_t = W x + b + U h_{t-1} + b'
                 i, f, g, o = the four quarters of z_t
                 c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
                 h_t = sigmoid(o) tanh(c_t),                       h_0 = c_0 = 0
    layer 2, ... the same with the states h_t of the layer before in place of x
    attention    e_t = u . h_t + b,    a = softmax over t of e,    m = sum_t a_t h_t

with h_t of the last layer. As the input never changes, steps differ by the recurrent state alone:
the first ones most, and with many steps the state tends to a fixed point.

Source: Shroff, Chen, Wei, Wang, "Focus Longer to See Better: Recursively Refined Attention for
Fine-Grained Image Classification", CVPR Workshops 2020 (arXiv 2005.10979); layers, initialisation
and order of the gates as in the authors' code, where the two biases are PyTorch's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.layers.gate import Gate
from attnzoom_jax.layers.tap import Tap

AGGREGATIONS = ("attention", "last", "mean")


class RecursiveAttention(nn.Module):
    """Refines a vector in several steps and fuses the steps.

    | path                           | torch, transposed        | shape                        |
    |--------------------------------|--------------------------|------------------------------|
    | lstm1/input_{kernel,bias}      | {weight,bias}_ih_l0      | [d, 4 hidden], [4 hidden]    |
    | lstm1/hidden_{kernel,bias}     | {weight,bias}_hh_l0      | [hidden, 4 hidden], the same |
    | lstm2/..., and so on           | ..._l1                   | d is hidden                  |
    | score/{kernel,bias}            | attention's linear layer | [hidden, 1], [1]             |

    The two biases add up; that there are two doubles the step with which training moves their sum.
    `score` is there with aggregation "attention" alone.

    Taps: `<path>/states` [n, t, hidden] and, with aggregation "attention", the weights of the steps
    `<path>/gate` [n, t, 1], which sum to 1 over t. Relevance goes to the states, never to the
    weights; Excitation Backprop ends there, for the products inside of the LSTM have no signal
    among their factors, and says so. Gradients pass. All is computed in float32.

    Attributes:
        steps: T, how often to look, at least 1. The authors' command has 10.
        hidden: units of each LSTM layer.
        num_layers: LSTM layers, at least 1.
        aggregation: "attention", the weighted sum of the states; "last", the state of step T;
            "mean", their mean. With one step all three are its state.
    """

    steps: int = 10
    hidden: int = 512
    num_layers: int = 2
    aggregation: str = "attention"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Look `steps` times, then fuse.

        Args:
            x: vectors [n, d].

        Returns:
            float32 [n, hidden].

        Raises:
            ValueError: a field out of range, or an input that is not [n, d].
        """
        self._check(x)
        states = x.astype(jnp.float32)[:, None]  # [n, 1, d]: the same at every step
        for i in range(1, self.num_layers + 1):
            states = LSTM(self.hidden, self.steps, name=f"lstm{i}")(states)
        states = Tap(name="states")(states)  # [n, t, hidden]
        if self.aggregation == "last":
            return states[:, -1]
        if self.aggregation == "mean":
            return states.mean(axis=1)
        init = torch_uniform(self.hidden)
        scores = nn.Dense(1, kernel_init=init, bias_init=init, name="score")(states)  # [n, t, 1]
        return (states * Gate(name="gate")(nn.softmax(scores, axis=1))).sum(axis=1)

    def _check(self, x: jax.Array) -> None:
        for field, example in (("steps", 10), ("hidden", 512), ("num_layers", 2)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"RecursiveAttention.{field} is {value!r}, expected a whole number of at least "
                    f"1; try {example}."
                )
        if self.aggregation not in AGGREGATIONS:
            raise unknown_name("RecursiveAttention.aggregation", self.aggregation, AGGREGATIONS)
        if x.ndim != 2:
            raise ValueError(
                f"RecursiveAttention takes vectors [n, d], got shape {x.shape}: average features "
                "over their places first."
            )


class LSTM(nn.Module):
    """One layer of an LSTM, from a state of zeros.

    Attributes:
        hidden: units.
        steps: how many steps it takes.
    """

    hidden: int
    steps: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [n, steps, d], or [n, 1, d] that stays the same, to [n, steps, hidden]."""
        n, _, d = inputs.shape
        init, width = torch_uniform(self.hidden), 4 * self.hidden
        input_kernel = self.param("input_kernel", init, (d, width), jnp.float32)
        hidden_kernel = self.param("hidden_kernel", init, (self.hidden, width), jnp.float32)
        input_bias = self.param("input_bias", init, (width,), jnp.float32)
        hidden_bias = self.param("hidden_bias", init, (width,), jnp.float32)
        # Outside of the loop, for all steps at once; for an input that stays, once.
        products = inputs @ input_kernel + input_bias + hidden_bias
        products = jnp.broadcast_to(products, (n, self.steps, width))

        def step(
            carry: tuple[jax.Array, jax.Array], product: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            state, cell = carry
            i, f, g, o = jnp.split(product + state @ hidden_kernel, 4, axis=-1)
            cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
            state = nn.sigmoid(o) * jnp.tanh(cell)
            return (state, cell), state

        zeros = jnp.zeros((n, self.hidden), jnp.float32)
        _, states = jax.lax.scan(step, (zeros, zeros), products.swapaxes(0, 1))
        return states.swapaxes(0, 1)  # [n, t, hidden]


def torch_uniform(fan: int) -> nn.initializers.Initializer:
    """Uniform within 1 / sqrt(fan), as torch starts an LSTM of so many units, biases included.

    Args:
        fan: units, at least 1.

    Returns:
        An initializer.
    """

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)

    return init
