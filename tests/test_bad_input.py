"""Bad input is one clear message and an exit code that is not 0; nothing is lost, nothing written.

The programmes run as a person runs them, but from one process, which forks for each of them: that
saves the seconds that their imports take.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import eval as eval_programme
import explain
import train
from attnzoom_jax.evaluation.restore import restore_model
from attnzoom_jax.training import sharding
from configs import demo

RUN_ALL = """
import json, os, runpy, sys, traceback, warnings
sys.path.insert(0, os.getcwd())
import eval, explain, train
warnings.simplefilter("ignore")  # JAX warns of every fork; its threads start later
for prefix, sys.argv in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT), number)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{prefix}.code", "w") as file:
        file.write(str(code))
"""
ROOT = pathlib.Path(__file__).parent.parent
TRAIN = ["train.py", "--config=configs/demo.py:tiny", "--workdir={new}"]
# {name: (arguments, exit code, what the message says)}; {new} does not exist, {run} is a run.
CASES: dict[str, tuple[list[str], int, str]] = {
    "unknown key": (
        [*TRAIN, "--config.optimizer.learning_rat=0.1"],
        2,
        "unknown config key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'",
    ),
    "unknown section": (
        [*TRAIN, "--config.optimiser.learning_rate=0.1"],
        2,
        "unknown config key 'optimiser.learning_rate'; did you mean 'optimizer.learning_rate'",
    ),
    "key of a number": ([*TRAIN, "--config.seed.x=1"], 2, "unknown config key 'seed.x'"),
    "wrong type": ([*TRAIN, "--config.total_steps=many"], 2, "--config.total_steps=many"),
    "None for a value": ([*TRAIN, "--config.seed=None"], 2, "config key 'seed' cannot be None"),
    "no flag": ([*TRAIN, "configs/demo.py"], 2, "unexpected argument 'configs/demo.py'"),
    "unknown flag": ([*TRAIN, "--confg=1"], 2, "'confg'. Did you mean: config"),
    "no workdir": (TRAIN[:2], 2, "--workdir must have a value"),
    "no config": (
        ["train.py", "--config=configs/dem.py", "--workdir={new}"],
        2,
        "--config: [Errno 2] No such file or directory: 'configs/dem.py'",
    ),
    "unknown mode": (
        ["train.py", "--config=configs/demo.py:tny", "--workdir={new}"],
        2,
        "unknown mode 'tny'; there is: tiny",
    ),
    "not prepared": (
        [*TRAIN, "--config.data.name=imagenet2012"],
        1,
        "run: python tools/prepare_data.py imagenet2012 --data_dir=",
    ),
    "unknown model": (
        [*TRAIN, "--config.model.name=resnet19"],
        1,
        "unknown model 'resnet19'; did you mean 'resnet18'",
    ),
    "softmax of attributes": (
        [*TRAIN, "--config.data.labels=attributes"],
        1,
        "data.labels is attributes; set its name to binary_cross_entropy",
    ),
    "classes of attributes": (
        [
            *(*TRAIN, "--config.data.labels=attributes"),
            "--config.losses.cross_entropy.name=binary_cross_entropy",
        ],
        1,
        "the evaluator classify needs data.labels=label, and it is attributes",
    ),
    "batch over devices": (
        [*TRAIN, "--config.data.batch_size=18"],
        1,
        "data.batch_size=18 cannot be split over 4 devices; take a multiple of 4",
    ),
    "evaluation batch": (
        [*TRAIN, "--config.data.eval_batch_size=18"],
        1,
        "data.eval_batch_size=18 cannot be split over 4 devices; take a multiple of 4",
    ),
    "no length": ([*TRAIN, "--config.total_steps=0"], 1, "set exactly one of them above 0"),
    "two lengths": ([*TRAIN, "--config.total_epochs=1"], 1, "set exactly one of them above 0"),
    "platform": (
        [*TRAIN, "--config.platform=tpu"],
        1,
        "config.platform is 'tpu' and JAX finds only 'cpu' devices",
    ),
    "unknown platform": ([*TRAIN, "--config.platform=tpuu"], 1, "unknown platform 'tpuu'"),
    "no number": (
        [*TRAIN, "--config.optimizer.learning_rate=1e35"],
        1,
        "NaN or infinite at step 1; there is no checkpoint yet in ",
    ),
    "unwritable": (
        [*TRAIN[:2], "--workdir={file}/run"],
        1,
        "cannot write into --workdir=",
    ),
    "workdir of another config": (
        ["train.py", "--config=configs/demo.py:tiny", "--workdir={run}"],
        1,
        "holds a run of another config (- there, + given):\n",
    ),
    "no run": (["eval.py", "--workdir={new}"], 1, "holds no run (no config.json); train first"),
    "no checkpoint": (
        ["eval.py", "--workdir={run}", "--checkpoint=7"],
        1,
        "there is: last, best, 2",
    ),
    "checkpoint of another model": (
        ["eval.py", "--workdir={run}", "--config=configs/demo.py:tiny"],
        1,
        "- saved, + expected by this config",
    ),
    "nothing to explain": (
        ["explain.py", "--workdir={run}", "--images={new}/*.jpg", "--out={new}"],
        1,
        "/*.jpg' matches no file",
    ),
    "unknown figure": (
        ["explain.py", "--workdir={run}", "--figure=wrap"],
        2,
        "flag --figure=wrap: value should be one of <maps|warp|compare|steps|",
    ),
    "comparison with nothing": (
        ["explain.py", "--workdir={run}", "--figure=compare", "--out={new}"],
        1,
        "--figure=compare needs the folder of the other run: --other_workdir=DIR",
    ),
    "comparison with no run": (
        ["explain.py", "--workdir={run}", "--figure=compare", "--other_workdir={new}"],
        1,
        "holds no run (no config.json); train first",
    ),
    "flag of another figure": (
        ["explain.py", "--workdir={run}", "--figure=warp", "--other_workdir={run}"],
        1,
        "--figure=warp does not heed --other_workdir; leave it out (it is of: compare, robustness)",
    ),
    "several methods where one is taken": (
        ["explain.py", "--workdir={run}", "--figure=warp", "--method=rise,occlusion"],
        1,
        "--figure=warp takes one method, got --method=rise,occlusion",
    ),
    "method where there is no choice": (
        ["explain.py", "--workdir={run}", "--figure=steps", "--method=rise", "--out={new}"],
        1,
        "--figure=steps does not heed --method; leave it out (it is of: maps, warp, compare)",
    ),
    "split where no images are read": (
        ["explain.py", "--workdir={run}", "--figure=robustness", "--count=2", "--out={new}"],
        1,
        "--figure=robustness does not heed --count",
    ),
    "attributes of a model without masks of them": (
        ["explain.py", "--workdir={run}", "--figure=attributes", "--out={new}"],
        1,
        '--figure=attributes needs a model with masks of attributes, config.model.name="multi_chan',
    ),
    "robustness of a run not evaluated": (
        ["explain.py", "--workdir={run}", "--figure=robustness", "--out={new}"],
        1,
        "has no eval.json; run: python eval.py --workdir=",
    ),
    "robustness of no run": (
        ["explain.py", "--workdir={new}", "--figure=robustness", "--out={new}"],
        1,
        "holds no run (no config.json); train first",
    ),
    "unknown option of the warp": (
        ["explain.py", "--workdir={run}", "--figure=warp", "--option=flor=0.1", "--out={new}"],
        1,
        "unknown option of the warp 'flor'; did you mean 'floor'",
    ),
}


def config() -> Any:
    base: Any = demo.get_config("tiny")
    base.model = {
        "name": "resnet",
        "stem": "small",
        "width": 4,
        "stage_sizes": (1,),
        "insert": {"stage1": {"name": "attention_zoom"}},
    }
    base.update({"total_steps": 2})
    return base


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.train(config(), str(folder), devices=jax.devices()[:1])
    return folder


@pytest.fixture(scope="module")
def trained(run):
    return restore_model(str(run), mesh=sharding.create_mesh(jax.devices()[:1]))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclasses.dataclass
class Outcome:
    code: int
    message: str


@pytest.fixture(scope="module")
def outcomes(run, tmp_path_factory):
    """What becomes of every case."""
    logs, places = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("places")
    (places / "file").write_text("")
    arguments = {}
    for name, (words, _, _) in CASES.items():
        names = {"new": places / name, "file": places / "file", "run": run}
        arguments[str(logs / name)] = [word.format(**names) for word in words]
    before = contents(run)
    subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(arguments),
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        text=True,
        check=True,
    )
    assert contents(run) == before
    # Only the loss that is no number comes after the beginning of a run.
    assert {path.name for path in places.iterdir()} == {"file", "no number"}
    assert not list((places / "no number" / "checkpoints").iterdir())
    read = lambda name, kind: (logs / f"{name}.{kind}").read_text()  # noqa: E731
    return {name: Outcome(int(read(name, "code")), read(name, "err")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_programme_says_what_is_wrong(outcomes, name):
    _, code, message = CASES[name]
    outcome = outcomes[name]
    assert outcome.message.startswith("error: ") and message in outcome.message
    assert outcome.code == code
    # One line; where two sides differ, one more for each difference.
    rest = outcome.message.rstrip().split("\n")[1:]
    assert all(line.startswith(("  - ", "  + ", "  ... ", "name another")) for line in rest)


def test_what_differs_is_listed(outcomes):
    message = outcomes["workdir of another config"].message
    assert "  - model.width = 4\n  + model.width = 8\n" in message
    message = outcomes["checkpoint of another model"].message
    assert message.count("\n  - ") == message.count("\n  + ") == 8 and "  ... and " in message


# explain.py, by its functions.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ["grad_cam", "rise"], "options": {"sampels": 2}},
            "--option=sampels: none of grad_cam, rise has this option",
        ),
        (
            {"methods": ["excitation_backprop"], "options": {"negative": "clmap"}},
            "unknown option negative 'clmap'; did you mean 'clamp'",
        ),
        ({"methods": ["grad_cm"]}, "unknown method 'grad_cm'; did you mean 'grad_cam'"),
        (
            {"tap": "backbone/stage9"},
            "unknown tap 'backbone/stage9'; did you mean 'backbone/stage1",
        ),
        ({"tap": "backbone/head"}, "'backbone/head'"),
        ({"target": "16"}, "--class='16': expected predicted, label, or a class id below 16"),
        ({"target": "cat"}, "--class='cat': expected predicted, label, or a class id below 16"),
    ],
)
def test_explain_says_what_it_does_not_know(trained, tmp_path, options, message):
    examples = explain.from_split(trained, "test", 2)
    with pytest.raises(ValueError) as error:
        explain.explain(trained, examples, tmp_path / "out", **options)
    assert message in str(error.value) and "\n" not in str(error.value).partition("\n-----")[0]
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there_is_named(trained):
    with pytest.raises(ValueError, match="'tset'; did you mean 'test'"):
        explain.from_split(trained, "tset", 2)


def test_a_file_that_is_no_image_is_named_and_the_others_go_on(run, tmp_path, root):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (40, 30)), ("b.png", (16, 16)), ("grey.png", (20, 20))):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if name == "grey.png" else image).save(photos / name)
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    (photos / "notes.jpg").write_text("no image")
    out = tmp_path / "out"
    command = [sys.executable, "explain.py", f"--workdir={run}", f"--out={out}"]
    command += [f"--images={photos}/*", "--class=3"]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr == ""
    for name in ("broken.jpg", "notes.jpg"):
        assert f"left out: {photos / name} is no readable image" in process.stdout
    pictures = {path.name for path in out.iterdir()}
    assert pictures == {"a.png", "b.png", "grey.png", "contact_sheet.png", "maps.npz"}
    with np.load(out / "maps.npz") as maps:
        assert maps["names"].tolist() == ["a", "b", "grey"] and maps["targets"].tolist() == [3] * 3
        assert maps["grad_cam"].shape[0] == 3 and np.isfinite(maps["grad_cam"]).all()


def test_only_files_that_are_no_images_is_an_error(trained, tmp_path, capsys):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 1 files of --images=.* is an image"):
        explain.from_files(trained, f"{tmp_path}/*.jpg")
    assert "left out" in capsys.readouterr().out


def test_a_damaged_eval_leaves_the_last_results(run, monkeypatch):
    """eval.json is written whole, at the end, or stays as it was."""
    (run / "eval.json").write_text("{}")
    monkeypatch.setattr(eval_programme, "provenance", lambda: {"not": object()})
    with pytest.raises(TypeError):
        eval_programme.evaluate(str(run), checkpoint="last")
    assert (run / "eval.json").read_text() == "{}"
    (run / "eval.json").unlink()
