"""A trained model back from its workdir."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from attnzoom_jax.models import create_model
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What eval.py and explain.py work on.

    Attributes:
        config: ConfigDict of the run, or the one given instead.
        model: classifier.
        variables: its trained variables (the averaged ones where the run kept such).
        step: of the checkpoint.
        class_names: one per class.
        image_shape: [h, w, c] of what the model sees.
    """

    config: Any
    model: nn.Module
    variables: Any
    step: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def restore_model(
    workdir: str,
    *,
    checkpoint: str = "best",
    config: Any = None,
    data_dir: str = "",
    mesh: Mesh,
) -> TrainedModel:
    """Restore a model from a run's folder; its data set is not needed for that.

    Args:
        workdir: folder of the run.
        checkpoint: "best", "last" or a step.
        config: instead of the run's own.
        data_dir: folder of prepared data sets, instead of the config's; "" for that.
        mesh: where the variables live.

    Returns:
        The model.

    Raises:
        ValueError: no run or no such checkpoint there, or a checkpoint of another model (both sides
            are listed).
    """
    folder = Workdir(workdir)
    own = folder.config()
    config = own if config is None else config
    if data_dir:
        config = config.copy_and_resolve_references()
        config.data.dir = data_dir
    run = folder.run_info()
    if "class_names" not in run:
        raise ValueError(f"--workdir={workdir} has no trained model (no run.json); train first")
    class_names, image_shape = tuple(run["class_names"]), tuple(run["image_shape"])
    model = create_model(num_classes=len(class_names), **config.model.to_dict())
    checkpoints = Checkpoints(
        folder.checkpoints, best_metric=own.best_metric, best_mode=own.best_mode, read_only=True
    )
    step = checkpoints.find(checkpoint)
    shapes = jax.eval_shape(lambda: init_variables(model, image_shape, 0))
    variables = checkpoints.restore_variables(step, like=shapes, mesh=mesh)
    checkpoints.close()
    return TrainedModel(
        config=config,
        model=model,
        variables=variables,
        step=step,
        class_names=class_names,
        image_shape=image_shape,
    )
