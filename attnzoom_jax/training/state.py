"""All that training changes, and how it begins."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.training.sharding import Rules, replicated, split_by_rules


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds. Random keys are not in it: they are folded from (seed, step).

    Attributes:
        step: int32 scalar, updates done.
        params: float32 parameters.
        batch_stats: running statistics of BatchNorm; {} without.
        opt_state: of the optimiser.
        ema_params: exponential moving average of the parameters; None when switched off.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any

    def variables(self) -> dict[str, Any]:
        """The variables to evaluate with: the averaged parameters where there are such."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def init_variables(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> Any:
    """Variables of a model: pure, so it can be jitted or only shaped (`jax.eval_shape`).

    Args:
        model: a linen classifier of images.
        image_shape: [h, w, c].
        seed: of the parameters.

    Returns:
        {"params": ..., "batch_stats": ...}, the latter {} without BatchNorm.
    """
    key = jax.random.key(seed)
    images = jnp.zeros((1, *image_shape))
    train: Any = train_argument(model, False)
    variables = model.init({"params": key, "dropout": key}, images, **train)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    image_shape: tuple[int, ...],
    seed: int,
    mesh: Mesh,
    use_ema: bool = False,
    pretrained: Any = None,
    rules: Rules = (),
) -> TrainState:
    """The state at step 0, on the devices of a mesh.

    Args:
        model: a linen classifier of images.
        optimizer: what will update it.
        image_shape: [h, w, c] of what the model sees.
        seed: of the parameters.
        mesh: where the state lives.
        use_ema: whether to keep averaged parameters.
        pretrained: variables to begin with; None for new ones.
        rules: `config.sharding`, see `split_by_rules`; without, all is whole on every device.

    Returns:
        The state.

    Raises:
        ValueError: rules that do not fit, see `split_by_rules`.
    """

    def create(variables: Any) -> TrainState:
        if variables is None:
            variables = init_variables(model, image_shape, seed)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(variables["params"]),
            # A copy: one buffer must not stand for two leaves of a donated state.
            ema_params=jax.tree.map(jnp.copy, variables["params"]) if use_ema else None,
        )

    place: Any = replicated(mesh)
    if rules:
        shapes = jax.eval_shape(create, pretrained)
        place = split_by_rules(shapes, params=shapes.params, rules=rules, mesh=mesh)
    return jax.jit(create, out_shardings=place)(pretrained)
