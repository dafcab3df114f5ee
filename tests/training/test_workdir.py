import json
import pathlib
import subprocess
from typing import Any

import jax
import ml_collections
import pytest

from attnzoom_jax.training import workdir
from attnzoom_jax.training.workdir import Workdir


def config(**changes) -> Any:
    base = ml_collections.ConfigDict(
        {
            "seed": 0,
            "platform": "",
            "model": {"name": "resnet", "insert": {}, "stage_sizes": (1, 2)},
            "data": {"dir": "", "num_threads": 4, "mean": (0.5, 0.25), "batch_size": 8},
            "optimizer": {"learning_rate_multipliers": ((".*", 1.0),), "clip_norm": None},
            "evals": {
                "validation": {"name": "classify", "split": "validation"},
                "test": {"name": "classify", "split": "test"},
            },
            "train_evals": ("validation",),
        }
    )
    base.update_from_flattened_dict(changes)
    return base.lock()


def claimed(path, **changes):
    folder = Workdir(path)
    folder.claim(config(**changes), {"seed": 0})
    return folder


def with_checkpoint(folder):
    (folder.checkpoints / "3").mkdir(parents=True)
    return folder


def contents(path: pathlib.Path):
    return {str(p): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_config_comes_back_as_it_was(tmp_path):
    folder = claimed(tmp_path / "deep" / "run")
    back = folder.config()
    assert back == config() and back.model.stage_sizes == (1, 2)
    assert back.optimizer.learning_rate_multipliers == ((".*", 1.0),)
    assert back.is_locked and folder.overrides() == {"seed": 0}
    with pytest.raises(KeyError):
        back["sed"] = 1


@pytest.mark.parametrize("value", [{"seed": 1}, {"data.mean": (0.5,)}, {"data.batch_size": 16}])
def test_the_folder_of_another_config_is_left_as_it_is(tmp_path, value):
    folder = with_checkpoint(claimed(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        folder.claim(config(**value), {})
    key = next(iter(value))
    for line in (f"{tmp_path} holds a run of another config", f"- {key} = ", f"+ {key} = "):
        assert line in str(error.value)
    assert str(error.value).count(" = ") == 2
    assert contents(tmp_path) == before


def test_a_key_of_one_side_is_listed_once(tmp_path):
    folder = with_checkpoint(claimed(tmp_path))
    with config().unlocked() as other:
        other.model.width = 8
        del other.optimizer["clip_norm"]
        other.model.insert = {"stage1": {"name": "attention_zoom"}}
    with pytest.raises(ValueError) as error:
        folder.claim(other, {})
    assert str(error.value).splitlines()[1:-1] == [
        "  - model.insert = {}",
        "  + model.insert.stage1.name = attention_zoom",
        "  + model.width = 8",
        "  - optimizer.clip_norm = None",
    ]


def test_what_no_number_depends_on_may_change(tmp_path):
    folder = with_checkpoint(claimed(tmp_path))
    with config(platform="cpu", **{"data.dir": "/x", "data.num_threads": 1}).unlocked() as other:
        other.evals.test.split = "validation"
        other.evals.more = {"name": "localize", "split": "test"}
    folder.claim(other, {"platform": "cpu"})
    assert folder.config().evals.more.name == "localize"  # later evaluations follow the new config
    assert folder.overrides() == {"platform": "cpu"}


def test_an_evaluation_that_training_watches_may_not_change(tmp_path):
    folder = with_checkpoint(claimed(tmp_path))
    before = contents(tmp_path)
    other = config()
    other.evals.validation.split = "test"
    with pytest.raises(ValueError, match=r"\+ evals\.validation\.split = test"):
        folder.claim(other, {})
    assert contents(tmp_path) == before


def test_before_the_first_checkpoint_a_config_may_be_mended(tmp_path):
    folder = claimed(tmp_path)
    (folder.checkpoints / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    folder.claim(config(seed=4), {"seed": 4})
    assert folder.config().seed == 4 and folder.overrides() == {"seed": 4}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into --workdir=.*file/run: Not a"):
        claimed(tmp_path / "file" / "run")


def test_a_folder_without_a_run_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no run .*; train first"):
        Workdir(tmp_path / "none").config()
    assert Workdir(tmp_path).overrides() == {}
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match="is no JSON file"):
        Workdir(tmp_path).config()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    folder = Workdir(tmp_path)
    folder.write("x.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write("x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_provenance_says_which_code_ran_where(root):
    info = workdir.provenance()
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert info["commit"].removesuffix("+") == head
    assert info["versions"]["jax"] == jax.__version__ and all(info["versions"].values())
    assert (info["platform"], info["device_count"], info["process_count"]) == ("cpu", 4, 1)
    json.dumps(info)


def test_a_run_goes_on_with_the_data_set_that_it_began_with(tmp_path):
    began = {"name": "a/1.0.0", "examples": {"train": 3}, "sha256": "x"}
    folder = with_checkpoint(claimed(tmp_path))
    folder.claim(config(), {}, data=began)  # of an earlier version: nothing is written down
    folder.write("run.json", {"data": began})
    folder.claim(config(), {}, data=dict(began))
    folder.claim(config(), {})
    with pytest.raises(ValueError) as error:
        folder.claim(config(), {}, data={**began, "examples": {"train": 4}})
    assert str(error.value).splitlines() == [
        f"{tmp_path} holds a run of another data set (- there, + given):",
        "  - examples.train = 3",
        "  + examples.train = 4",
        "name another --workdir, or delete this one",
    ]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = Workdir(tmp_path)
    (tmp_path / "run.json.tmp").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*run\.json: Is a directory"):
        folder.write("run.json", {})
