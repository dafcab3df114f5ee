"""Small prepared data sets that several files read."""

import pytest
import tensorflow_datasets as tfds

from attnzoom_jax.data.datasets import fine_shapes


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory) -> str:
    """A folder of prepared sets with `fine_shapes/mini`: 30, 10 and 10 images at 32x32."""
    folder = str(tmp_path_factory.mktemp("prepared"))
    config = fine_shapes.FineShapesConfig(
        name="mini", image_size=32, train=30, validation=10, test=10
    )
    tfds.builder("fine_shapes", config=config, data_dir=folder).download_and_prepare()
    return folder
