"""A trained model back from its workdir, or one that was never trained here."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attnzoom_jax.data.pipeline import Resize, check_one_size
from attnzoom_jax.data.source import Source
from attnzoom_jax.data.split import open_split
from attnzoom_jax.models import count_classes, create_model, load_function, load_pretrained
from attnzoom_jax.models.insert import train_argument
from attnzoom_jax.training.checkpoint import Checkpoints
from attnzoom_jax.training.sharding import replicated, split_by_rules
from attnzoom_jax.training.state import init_variables
from attnzoom_jax.training.workdir import Workdir

IMAGENET = 1000  # classes, whose names a file of weights does not say


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What eval.py and explain.py work on.

    Attributes:
        config: ConfigDict of the run, or the one given instead.
        model: classifier.
        variables: its trained variables (the averaged ones where the run kept such).
        step: of the checkpoint; None of a model that was never trained here.
        class_names: one per class.
        image_shape: [h, w, c] of what the model sees.
    """

    config: Any
    model: nn.Module
    variables: Any
    step: int | None
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]

    @property
    def short_names(self) -> tuple[str, ...]:
        """For pictures: of a name that lists synonyms, as those of ImageNet do, the first."""
        return tuple(name.partition(",")[0] for name in self.class_names)


def load_model(
    workdir: str,
    *,
    checkpoint: str = "best",
    config: Any = None,
    overrides: Mapping[str, Any] | None = None,
    data_dir: str = "",
    mesh: Mesh,
) -> TrainedModel:
    """The model of a run, or, in a folder without one, the network that the config names.

    Args:
        workdir: folder of the run; need not exist where the config names a network.
        checkpoint: "best", "last" or a step.
        config: instead of the run's own. One that names no model, as those of evaluations alone do,
            takes the run's, and its data section but for the set that it names itself.
        overrides: what the command line changed in that config; of the data section it holds for
            the run's too.
        data_dir: folder of prepared data sets, instead of the config's; "" for that.
        mesh: where the variables live.

    Returns:
        The model.

    Raises:
        ValueError: as `restore_model` and `load_network`; neither a run nor a network; both.
    """
    folder = Workdir(workdir)
    if config is not None and not config.model.name and not config.network and folder.has_run():
        config = _on_run(config, folder.config(), overrides or {})
    if config is not None and folder.has_run():
        for key in ("network", "pretrained"):
            if config.get(key) and config.get(key) != folder.config().get(key):
                raise ValueError(
                    f"--workdir={workdir} holds a run, and the config has {key}={config[key]!r}; "
                    "name another --workdir for its results"
                )
    if config is None or folder.has_run():
        return restore_model(
            workdir, checkpoint=checkpoint, config=config, data_dir=data_dir, mesh=mesh
        )
    if not config.get("network") and not (config.model.name and config.pretrained):
        raise ValueError(
            f"--workdir={workdir} holds no run, and the config no weights; train first, or set "
            "network=FILE.py:NAME, or model.name and pretrained=WEIGHTS"
        )
    if checkpoint != "best":
        raise ValueError(f"--checkpoint={checkpoint}: --workdir={workdir} holds no run")
    return load_network(_with_data_dir(config, data_dir), mesh=mesh)


def load_network(config: Any, *, mesh: Mesh) -> TrainedModel:
    """A network that was never trained here: a function, or published weights in a known model.

    Args:
        config: with `network`, or with `model.name` and `pretrained`.
        mesh: where the variables live.

    Returns:
        The model, with `step` None. Its class names are those of the file `class_names`, of the
        function, "0" to "999" where there are 1000 outputs, or those of the data set.

    Raises:
        ValueError: as `load_function`, `create_model` and `load_pretrained`; a file without a head;
            a network that does not take such images; class names that are not as many as outputs.
    """
    if config.get("network"):
        network = load_function(config.network, weights=config.pretrained)
        model, variables, names = network.model, network.variables, network.class_names
        shape = _image_shape(config, network.image_shape)
    else:
        shape, names = _image_shape(config), ()
        model, variables = _pretrained(config, shape)
    num_outputs = _num_outputs(model, variables, shape, config.get("network") or config.model.name)
    return TrainedModel(
        config=config,
        model=model,
        variables=jax.device_put(variables, replicated(mesh)),
        step=None,
        class_names=_class_names(config, names, num_outputs),
        image_shape=shape,
    )


def restore_model(
    workdir: str,
    *,
    checkpoint: str = "best",
    config: Any = None,
    data_dir: str = "",
    mesh: Mesh | None,
) -> TrainedModel:
    """Restore a model from a run's folder; its data set is not needed for that.

    Args:
        workdir: folder of the run.
        checkpoint: "best", "last" or a step.
        config: instead of the run's own.
        data_dir: folder of prepared data sets, instead of the config's; "" for that.
        mesh: where the variables live, split over it by the run's `sharding`; None: on the host, as
            NumPy arrays.

    Returns:
        The model.

    Raises:
        ValueError: no run or no such checkpoint there, or a checkpoint of another model (both sides
            are listed).
    """
    folder = Workdir(workdir)
    own = folder.config()
    config = _with_data_dir(own if config is None else config, data_dir)
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
    if mesh is not None and own.get("sharding"):
        places = split_by_rules(shapes, params=shapes["params"], rules=own.sharding, mesh=mesh)
        shapes = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)
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


def _on_run(config: Any, own: Any, overrides: Mapping[str, Any]) -> Any:
    """A config of evaluations alone, with the model of a run, and its data."""
    for key in overrides:
        if key.startswith("model."):
            raise ValueError(f"config.{key} is given; the model is that of the run, whose it is")
    name = config.data.name
    config = config.copy_and_resolve_references().unlock()
    config.model, config.data = own.model, own.data.copy_and_resolve_references().unlock()
    if name:
        config.data.update({"name": name, "dir": ""})
    given = {key: value for key, value in overrides.items() if key.startswith("data.")}
    config.update_from_flattened_dict(given)
    return config.lock()


def _with_data_dir(config: Any, data_dir: str) -> Any:
    if not data_dir:
        return config
    config = config.copy_and_resolve_references()
    config.data.dir = data_dir
    return config


def _pretrained(config: Any, image_shape: tuple[int, int, int]) -> tuple[nn.Module, Any]:
    """A model of a known name with all weights of a file, its head too."""
    options, path = config.model.to_dict(), config.pretrained
    num_classes = count_classes(
        create_model(num_classes=1, **options), path, image_shape=image_shape
    )
    model = create_model(num_classes=num_classes or 1, **options)
    variables = load_pretrained(
        model, path, key=jax.random.key(config.seed), image_shape=image_shape
    )
    if not num_classes:
        raise ValueError(f"{path} has no head for {config.model.name}; train one first")
    return model, variables


def _image_shape(
    config: Any, preferred: tuple[int, int, int] | None = None
) -> tuple[int, int, int]:
    """Of what the model sees: the config's, else the preferred one, else the data set's."""
    data = config.data
    # Also without data.resize: an evaluator may resize on its own.
    size = data.crop_size or data.image_size
    if size:
        return size, size, 3
    if preferred is not None:
        return preferred
    try:
        source = _open(config)
    except ValueError as error:
        raise ValueError(f"{error}; or, for images of any size, set data.image_size") from error
    check_one_size(source, Resize(data.resize, data.image_size))
    h, w, c = source.image_shape
    return int(h or 0), int(w or 0), int(c or 0)


def _num_outputs(
    model: nn.Module, variables: Any, image_shape: tuple[int, int, int], name: str
) -> int:
    """How many logits a model gives; nothing is computed."""

    def logits(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images, **train_argument(model, False))

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    try:
        found: Any = jax.eval_shape(logits, variables, images)
    except Exception as error:  # of somebody's function
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the network {name} does not take images of {list(images.shape)}: {said[:300]}"
        ) from error
    if not hasattr(found, "shape") or len(found.shape) not in (2, 4) or found.shape[0] != 1:
        shape = list(getattr(found, "shape", ())) or type(found).__name__
        raise ValueError(
            f"the network {name} gives {shape} for images {list(images.shape)}; expected logits "
            "[n, k], or [n, h, w, k]"
        )
    return found.shape[-1]


def _class_names(config: Any, own: Sequence[str], num_outputs: int) -> tuple[str, ...]:
    """One name per output."""
    path = config.get("class_names")
    if path:
        if not pathlib.Path(path).is_file():
            raise ValueError(f"class_names={path}: there is no such file")
        names, whose = pathlib.Path(path).read_text().splitlines(), f"class_names={path} has"
    elif own:
        names, whose = own, f"network={config.network} gives"
    elif num_outputs == IMAGENET:
        return tuple(map(str, range(IMAGENET)))
    else:
        source = _open(config)
        names, whose = source.class_names, f"{source.name} has"
    if len(names) != num_outputs:
        raise ValueError(
            f"{whose} {len(names)} class names, and the network has {num_outputs} outputs; set "
            "class_names to a text file with a name per line"
        )
    return tuple(names)


def _open(config: Any) -> Source:
    """The data set, at the first split that is evaluated."""
    splits = [options["split"] for options in config.evals.values() if "split" in options]
    return open_split(config.data, split=(splits or [config.data.train_split])[0])
