"""Any JAX function with weights as a linen module, so that every evaluator and programme takes it.

A network of Haiku, Equinox, NNX, another linen code or plain jnp is a function of its weights and
of images. A file says how to make it:

    def small(weights: str) -> Network:
        with np.load(weights) as file:
            params = dict(file)

        def run(params, images):  # float [n, h, w, c], as the config's data.mean and std make them
            features = jax.nn.relu(images @ params["kernel"])
            features = checkpoint_name(features, "features")  # a tap
            return features.mean((1, 2)) @ params["head"]

        return Network(run, params, class_names=("cat", "dog"))

and `config.network = "FILE.py:small"`, `config.pretrained = "WEIGHTS.npz"` names it. What
`checkpoint_name` marks in the function is a tap; so is the output of every module of a linen code.
"""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import unfreeze

from attnzoom_jax.errors import unknown_name

Run = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as a function.

    Attributes:
        run: (weights, images float [n, h, w, c]) -> logits [n, k], or [n, h', w', k] where the
            network is fully convolutional; a pure JAX function.
        weights: any pytree of arrays, its only other input.
        class_names: k names; () for those of the config or of the data set.
        image_shape: [h, w, c] that it was trained on, for a config whose data section sets no size;
            None for the data set's.
    """

    run: Run
    weights: Any
    class_names: Sequence[str] = ()
    image_shape: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class LoadedNetwork:
    """A network as the evaluators take it.

    Attributes:
        model: `model.apply(variables, images, train=False)` gives its logits.
        variables: {"params": {"weights": tree}}.
        class_names: as in `Network`.
        image_shape: as in `Network`.
    """

    model: nn.Module
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None


class FunctionModel(nn.Module):
    """A function of weights and images as a linen module.

    Its variables are {"params": {"weights": tree}}. They are given, never initialised.

    Attributes:
        run: (weights, images) -> logits.
    """

    run: Run

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> Any:
        """Calls the function.

        Args:
            images: float [n, h, w, c].
            train: a function has no such mode: it must be False.

        Returns:
            What `run` returns.

        Raises:
            ValueError: no weights are given, or train is set.
        """
        if train:
            raise ValueError(
                "a network that is a function has no training mode; to train one, write it as a "
                "linen module"
            )
        if not self.has_variable("params", "weights"):
            raise ValueError(
                "a network that is a function has no weights to begin with; pass its variables, "
                '{"params": {"weights": tree}}'
            )
        # The function expects the tree as it made it; Flax may have frozen its dictionaries.
        return self.run(unfreeze(self.get_variable("params", "weights")), images)


def load_function(name: str, *, weights: str = "") -> LoadedNetwork:
    """Make a network by a function in a file.

    The file is run as Python: load what you trust.

    Args:
        name: "FILE.py:NAME", a path and a function in it that takes the path of the weights and
            returns a `Network`.
        weights: path that it is given; "" where it needs none.

    Returns:
        The network.

    Raises:
        ValueError: no such file or function, code that fails, or something else returned.
    """
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py") or not function:
        raise ValueError(
            f"network {name!r}: expected FILE.py:NAME, such as configs/networks/imagenet.py:"
            "squeezenet"
        )
    if not pathlib.Path(path).is_file():
        raise ValueError(f"network {name}: there is no file {path}")
    module = _import(path, name)
    create = getattr(module, function, None)
    if not callable(create):
        known = [key for key, value in vars(module).items() if _is_own_function(value, module)]
        raise unknown_name(f"network in {path}", function, known)
    try:
        network = create(weights)
    except (ValueError, OSError) as error:  # with words for the user
        raise ValueError(f"network {name}: {error}") from error
    except Exception as error:
        raise _failed(name, error) from error
    network = _checked(network, name)
    return LoadedNetwork(
        model=FunctionModel(network.run),
        variables={"params": {"weights": network.weights}},
        class_names=tuple(network.class_names),
        image_shape=network.image_shape,
    )


def _import(path: str, name: str) -> Any:
    """The file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"network_{pathlib.Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # a file ending in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of somebody's programme
        raise _failed(name, error) from error
    return module


def _failed(name: str, error: Exception) -> ValueError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"network {name} failed: {said} (ATTNZOOM_TRACEBACK=1 shows where)")


def _is_own_function(value: Any, module: Any) -> bool:
    is_public = not getattr(value, "__name__", "_").startswith("_")
    return callable(value) and is_public and getattr(value, "__module__", "") == module.__name__


def _checked(network: Any, name: str) -> Network:
    """The network, or a ValueError unless it holds what it should."""
    if not isinstance(network, Network) or not callable(network.run):
        run = network.run if isinstance(network, Network) else None
        returned = type(network).__name__ if run is None else f"a Network with run={run!r}"
        raise ValueError(
            f"network {name}: expected attnzoom_jax.models.Network(run, weights, class_names), "
            f"not {returned}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(network.weights):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise ValueError(
                f"network {name}: weights{jax.tree_util.keystr(path)} is a {type(leaf).__name__}; "
                "expected arrays only (of an Equinox module, those of "
                "equinox.partition(module, equinox.is_array))"
            )
    names = network.class_names
    if isinstance(names, str) or not all(isinstance(item, str) for item in names):
        raise ValueError(f"network {name}: class_names are {str(names)[:60]}; expected strings")
    shape = network.image_shape
    if shape is not None and (len(shape) != 3 or any(int(side) < 1 for side in shape)):
        raise ValueError(f"network {name}: image_shape is {shape}; expected (h, w, c)")
    return network
