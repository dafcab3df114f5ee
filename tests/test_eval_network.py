"""eval.py and explain.py on networks that were never trained here, from end to end."""

import json
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import eval as eval_programme
import train
from attnzoom_jax import evaluation
from attnzoom_jax.data.augment import normalize
from attnzoom_jax.data.source import open_source
from attnzoom_jax.evaluation.restore import load_model
from attnzoom_jax.models import create_model
from attnzoom_jax.training import sharding
from attnzoom_jax.training.state import init_variables
from configs import attribution_table, default, demo
from configs.networks import imagenet
from tests.attribution import imported_networks

FILE = """
import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from attnzoom_jax.models import Network

def run(params, images):
    x = images[:, ::2, ::2] @ params["kernel"]
    x = checkpoint_name(jax.nn.relu(x), "features")
    return x.mean((1, 2)) @ params["head"]

def named(weights):
    with np.load(weights) as file:
        return Network(run, dict(file), class_names=[f"thing {i}, item" for i in range(16)])

def unnamed(weights):
    return Network(run, named(weights).weights, image_shape=(24, 24, 3))

def flat(weights):
    return Network(lambda params, images: images.reshape(-1, 24 * 24 * 3) @ params["head"], {})

def scalar(weights):
    return Network(lambda params, images: images.sum(), {})
"""
ONE = jax.devices()[:1]
WIDTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file with networks, and weights for them."""
    folder = tmp_path_factory.mktemp("network")
    (folder / "net.py").write_text(FILE)
    rng = np.random.default_rng(0)
    kernel, head = rng.normal(size=(3, WIDTH)), rng.normal(size=(WIDTH, 16))
    np.savez(folder / "weights.npz", kernel=np.float32(kernel), head=np.float32(head))
    np.savez(folder / "of_1000.npz", kernel=np.float32(kernel), head=np.zeros((WIDTH, 1000), "f4"))
    (folder / "names.txt").write_text("\n".join(f"line {i}" for i in range(16)) + "\n")
    return folder


def config(**changes) -> Any:
    base: Any = default.get_config()
    base.data.update({"name": "fine_shapes/tiny", "eval_batch_size": 16})
    base.evals = {"test": {"name": "classify", "split": "test"}}
    base.update_from_flattened_dict(changes)
    return base


def of(folder, name="named", **changes):
    names = {"network": f"{folder}/net.py:{name}", "pretrained": f"{folder}/weights.npz"}
    return config(**(names | changes))


def load(config, workdir, **options):
    return load_model(str(workdir), config=config, mesh=sharding.create_mesh(ONE), **options)


def test_a_function_from_file_to_results(folder, tmp_path):
    """Accuracy is that of the arithmetic by hand; where the network looks is scored too."""
    out = tmp_path / "made" / "out"
    given = of(folder)
    given.evals.looks = {"name": "localize", "split": "test", "tap": "features", "prefix": "looks"}
    metrics = eval_programme.evaluate(str(out), config=given, overrides={"seed": 0})

    source = open_source("fine_shapes/tiny", split="test")
    images = np.stack([example["image"] for example in source]) / 255.0
    labels = np.array([example["label"] for example in source])
    with np.load(folder / "weights.npz") as weights:
        x = (images - 0.5) / 0.25
        x = np.maximum(x[:, ::2, ::2] @ weights["kernel"], 0).mean((1, 2)) @ weights["head"]
    assert metrics["test/top1"] == pytest.approx(np.mean(x.argmax(1) == labels))
    assert metrics["test/count"] == len(source) == 60
    assert 0 < metrics["looks/object_energy"] < 1

    results = json.loads((out / "eval.json").read_text())
    assert results["metrics"] == metrics and results["step"] is None
    assert results["config"]["network"].endswith("net.py:named")
    assert results["overrides"] == {"seed": 0} and results["versions"]["jax"]
    assert [path.name for path in out.iterdir()] == ["eval.json"]
    assert eval_programme.evaluate(str(out), config=given) == metrics  # no run, and so again


class OfTable:
    """An evaluator that writes files and names classes."""

    def __init__(self, model, *, data, split, mesh, class_names=(), folder=None):
        self.names, self.folder, self.metric_names = class_names, folder, ["table/names"]

    def run(self, variables):
        if self.folder is None:
            return {"table/names": len(self.names)}
        self.folder.mkdir(parents=True)
        (self.folder / "table.txt").write_text(",".join(self.names))
        return {"table/names": len(self.names)}


def test_an_evaluator_gets_a_folder_and_names_if_it_takes_them(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation._EVALUATORS, "of_table", OfTable)
    given = of(folder, **{"evals": {"first": {"name": "of_table", "split": "test"}}})
    eval_programme.evaluate(str(tmp_path), config=given)
    written = (tmp_path / "tables" / "first" / "table.txt").read_text()
    assert written.startswith("thing 0, item,thing 1, item,")
    # Training gives neither; a config may name both.
    mesh = sharding.create_mesh(ONE)
    made = evaluation.create_evaluator(model=nn.Module(), data=None, mesh=mesh, **given.evals.first)
    assert made.folder is None and made.names == ()
    given.evals.first.update({"folder": f"{tmp_path}/other", "class_names": ("a", "b")})
    assert eval_programme.evaluate(str(tmp_path), config=given) == {"table/names": 2}
    assert (tmp_path / "other" / "table.txt").read_text() == "a,b"


# ---- class names and sizes


def test_class_names(folder, tmp_path):
    found = load(of(folder), tmp_path)
    assert found.class_names == tuple(f"thing {i}, item" for i in range(16))
    assert found.short_names == tuple(f"thing {i}" for i in range(16))
    names = load(of(folder, class_names=f"{folder}/names.txt"), tmp_path).class_names
    assert names == tuple(f"line {i}" for i in range(16))
    names = load(of(folder, "unnamed"), tmp_path).class_names
    assert names == open_source("fine_shapes/tiny", split="test").class_names
    nowhere = {"pretrained": f"{folder}/of_1000.npz", "data.name": "a_set_that_nobody_has"}
    names = load(of(folder, "unnamed", **nowhere), tmp_path).class_names
    assert names == tuple(str(i) for i in range(1000))


def test_image_shape(folder, tmp_path):
    """The config's, the network's, the data set's."""
    crop = {"data.crop_size": 20}
    squash = {"data.resize": "squash", "data.image_size": 48}
    assert load(of(folder, "unnamed", **crop), tmp_path).image_shape == (20, 20, 3)
    assert load(of(folder, "unnamed", **squash), tmp_path).image_shape == (48, 48, 3)
    assert load(of(folder, "unnamed"), tmp_path).image_shape == (24, 24, 3)
    assert load(of(folder), tmp_path).image_shape == (32, 32, 3)


# ---- published weights in a model of the package

SMALL = {"name": "resnet", "stem": "small", "width": 4, "stage_sizes": (1,)}


def save_weights(path, num_classes, *, head=True):
    model = create_model(num_classes=num_classes, **SMALL)
    variables = init_variables(model, (32, 32, 3), 3)
    flat = flatten_dict(variables, sep="/")
    np.savez(path, **{k: np.asarray(v) for k, v in flat.items() if head or "/head/" not in k})
    return model, variables


def test_published_weights_are_evaluated_as_they_are(tmp_path):
    model, variables = save_weights(tmp_path / "weights.npz", 16)
    given = config(model=SMALL | {"insert": {}}, pretrained=f"{tmp_path}/weights.npz")
    found = load(given, tmp_path)
    assert found.step is None
    assert found.class_names == open_source("fine_shapes/tiny", split="test").class_names
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = model.apply(variables, images)
    np.testing.assert_allclose(found.model.apply(found.variables, images), expected, rtol=1e-5)
    metrics = eval_programme.evaluate(str(tmp_path / "out"), config=given)
    assert metrics["test/count"] == 60


def test_what_is_wrong_with_weights_is_one_line(tmp_path):
    given = config(model=SMALL | {"insert": {}}, pretrained=f"{tmp_path}/weights.npz")
    refuse(given, tmp_path, "weights.npz: there is no such file")
    save_weights(tmp_path / "weights.npz", 16, head=False)
    refuse(given, tmp_path, "weights.npz has no head for resnet; train one first")
    save_weights(tmp_path / "weights.npz", 7)
    message = "fine_shapes/tiny:test has 16 class names, and the network has 7 outputs"
    refuse(given, tmp_path, message)
    np.savez(tmp_path / "weights.npz", other=np.ones(3))
    refuse(given, tmp_path, "weights.npz is of another network than the model")


# ---- what is said


def refuse(given, workdir, message, **options):
    before = sorted(workdir.iterdir())
    with pytest.raises(ValueError) as error:
        eval_programme.evaluate(str(workdir), config=given, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nmaed", {}, "unknown network in"),
        ("named", {"pretrained": "none.npz"}, "net.py:named: [Errno 2] No such file"),
        ("named", {"network": "net.py"}, "expected FILE.py:NAME"),
        ("named", {"network": ""}, "holds no run, and the config no weights; train first, or set"),
        ("named", {"network": "", "model.name": "resnet18", "pretrained": ""}, "no weights; train"),
        ("named", {"class_names": "none.txt"}, "class_names=none.txt: there is no such file"),
        ("unnamed", {"data.name": "fine_shapes/tny"}, "did you mean 'fine_shapes/tiny'"),
        ("named", {"data.name": "fine_shapes/tny"}, "or, for images of any size, set data.image_s"),
        (
            "flat",
            {},
            "net.py:flat does not take images of [1, 32, 32, 3]: TypeError: cannot reshape array",
        ),
        ("scalar", {}, "net.py:scalar gives ShapeDtypeStruct for images [1, 32, 32, 3]; expected "),
    ],
)
def test_what_is_wrong_is_one_line(folder, tmp_path, name, changes, message):
    refuse(of(folder, name, **changes), tmp_path, message)


def test_numbers_of_classes_that_differ_are_one_line(folder, tmp_path):
    thousand = {"pretrained": f"{folder}/of_1000.npz"}
    message = "net.py:named gives 16 class names, and the network has 1000 outputs; set class_names"
    refuse(of(folder, **thousand), tmp_path, message)
    message = "classify takes a label for the index of an output: fine_shapes/tiny:test has 16 "
    refuse(of(folder, "unnamed", **thousand), tmp_path, message)


def test_a_step_of_what_has_none(folder, tmp_path):
    message = "--checkpoint=last: --workdir="
    refuse(of(folder), tmp_path, message, checkpoint="last")


def test_a_file_in_the_way(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into --workdir=.*file/out: Not a "):
        eval_programme.evaluate(str(tmp_path / "file" / "out"), config=of(folder))


def test_a_run_and_a_network_do_not_share_a_folder(folder, tmp_path):
    run = tmp_path / "run"
    given = config(
        **{"model": SMALL | {"insert": {}}, "total_steps": 1, "data.batch_size": 16},
        **{"train_evals": (), "best_metric": "", "total_epochs": 0.0},
    )
    given.eval_every_epochs, given.eval_every_steps = 0.0, 1
    train.train(given, str(run), devices=ONE)
    refuse(of(folder), run, "holds a run, and the config has network=")
    assert load(None, run).step == load(given, run).step == 1
    given.network = f"{folder}/net.py:named"
    with pytest.raises(ValueError, match=r"network=.*named' is evaluated, by eval.py, and not"):
        train.train(given, str(tmp_path / "other"), devices=ONE)


# ---- explain.py


def test_explain_draws_where_a_function_looks(root, folder, tmp_path):
    (tmp_path / "net_config.py").write_text(
        "from configs import default\n\n\ndef get_config():\n"
        "    config = default.get_config()\n"
        "    config.data.name = 'fine_shapes/tiny'\n"
        f"    config.network = '{folder}/net.py:named'\n"
        f"    config.pretrained = '{folder}/weights.npz'\n"
        "    return config\n"
    )
    process = subprocess.run(
        [
            *(sys.executable, "explain.py", f"--config={tmp_path}/net_config.py", "--count=2"),
            *(f"--workdir={tmp_path}/out", "--method=grad_cam,excitation_backprop"),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and process.stderr == ""
    with np.load(tmp_path / "out" / "explain" / "maps.npz") as maps:
        assert maps["grad_cam"].shape == maps["excitation_backprop"].shape == (2, 16, 16)
    assert (tmp_path / "out" / "explain" / "contact_sheet.png").exists()


# ---- configs/networks/imagenet.py


def test_the_config_of_an_imagenet_network_normalises_as_published():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels[..., 0] = 255 - pixels[..., 0]
    expected = {
        "squeezenet": np.float64(pixels) - [123, 117, 104],
        "mobilenet_v1": (np.float64(pixels) - 128) * 0.0078125,
        "mobilenet_v2": (np.float64(pixels) - 127) * 0.007843137718737125,
    }
    for name, images in expected.items():
        given = config()
        imagenet.use(given, name, "weights.npz")
        found = normalize(jnp.asarray(pixels), mean=given.data.mean, std=given.data.std)
        np.testing.assert_allclose(found, images, rtol=1e-5, atol=1e-6 * np.abs(images).max())
        assert given.network == f"configs/networks/imagenet.py:{name}"
    with pytest.raises(ValueError, match="unknown network 'mobilenet'"):
        imagenet.use(config(), "mobilenet", "weights.npz")


@pytest.mark.data
@pytest.mark.skipif(
    not (imported_networks.DATA / "weights_imagenet").is_dir(),
    reason=f"no weights_imagenet in {imported_networks.DATA} (ATTNZOOM_DATA)",
)
@pytest.mark.parametrize("name", imagenet.INPUTS)
def test_an_imagenet_network_by_its_config(name, tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    given = config(**{"data.name": "a_set_that_nobody_has"})
    weights = imported_networks.DATA / "weights_imagenet" / imported_networks.WEIGHTS[name]
    imagenet.use(given, name, str(weights))
    found = load(given, tmp_path)
    assert len(found.class_names) == 1000 and found.class_names[0] == "tench, Tinca tinca"
    assert found.class_names[-1].startswith("toilet tissue")
    assert found.image_shape == (imagenet.INPUTS[name].size,) * 2 + (3,)


def test_evaluations_alone_take_the_model_and_data_of_the_run(tmp_path):
    """configs/attribution_table.py on a run, with a flag of the data section."""
    run: Any = demo.get_config("tiny")
    run.total_steps, run.train_evals, run.best_metric = 1, (), ""
    train.train(run, str(tmp_path), devices=jax.devices()[:1])
    config: Any = attribution_table.get_config()
    config.evals.table.update({"methods": ("gradient",), "max_images": 4, "batch_size": 4})
    config.data.num_threads = 1
    config.data.image_size = 7  # not from the command line: the run's own holds
    metrics = eval_programme.evaluate(
        str(tmp_path), config=config, overrides={"data.num_threads": 1}, output="table.json"
    )
    assert "test/gradient/pointing" in metrics
    found = json.loads((tmp_path / "table.json").read_text())["config"]
    assert found["model"]["name"] == "resnet10" and found["data"]["name"] == "fine_shapes/tiny"
    assert found["data"]["num_threads"] == 1 and found["data"]["image_size"] == 0
    with pytest.raises(ValueError, match=r"config.model.width is given; the model is that of the"):
        eval_programme.evaluate(str(tmp_path), config=config, overrides={"model.width": 4})
    config.pretrained = "other.npz"
    with pytest.raises(ValueError, match=r"holds a run, .*pretrained='other.npz'"):
        eval_programme.evaluate(str(tmp_path), config=config)
