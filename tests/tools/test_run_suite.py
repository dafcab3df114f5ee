import importlib.util
import json
import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("run_suite", ROOT / "tools" / "run_suite.py")
run_suite = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_suite)

NAMES = sorted(path.stem for path in (ROOT / "configs" / "suites").glob("[a-z]*.py"))
FACTS = {"step": 4, "commit": "c", "versions": {"jax": "0"}, "device_kind": "cpu"}
FACTS |= {"device_count": 1, "cpu_count": 2}


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_suite_is_a_config_that_takes_its_overrides(name):
    suite = run_suite.load_suite(name)
    assert len(set(suite["seeds"])) == len(suite["seeds"]) and suite["runs"]
    for config in suite["runs"].values():
        file, _, mode = config.partition(":")
        module = file.removesuffix(".py").replace("/", ".")
        values = importlib.import_module(module).get_config(mode).lock()
        for key, value in {**suite["overrides"], "seed": 1}.items():
            values.update_from_flattened_dict({key: value})


def test_an_unknown_suite_is_named():
    with pytest.raises(ValueError, match="unknown suite 'attention_zoom_smal'; did you mean"):
        run_suite.load_suite("attention_zoom_smal")


@pytest.fixture
def suite(monkeypatch):
    """A suite of two runs whose programmes only write what the real ones would."""
    suite = {"runs": {"base": "b.py", "zoom": "z.py"}, "overrides": {"a.b": 1.5}, "seeds": (0, 7)}
    monkeypatch.setattr(run_suite, "load_suite", lambda name: suite)
    called = []

    def programme(command):
        options = dict(word.split("=", 1) for word in command[1:])
        folder = pathlib.Path(options["--workdir"])
        if command[0] == "train.py":
            if not (folder / "run.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "run.json").write_text(json.dumps({"duration_s": 2.0}))
            return
        run, seed = folder.name.split("_seed")
        called.append((run, int(seed)))
        metrics = {"metrics": {"test/top1": int(seed) / 10}, **FACTS}
        metrics["overrides"] = {"a.b": 1.5, "seed": int(seed), "data.dir": "/here"}
        (folder / "eval.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(run_suite, "_call", programme)
    return called


def test_goes_on_where_it_stopped_and_writes_every_run(suite, tmp_path):
    places = {"results": tmp_path / "results"}
    run_suite.run_suite("s", tmp_path / "runs", **places)
    assert suite == [("base", 0), ("zoom", 0), ("base", 7), ("zoom", 7)]
    (tmp_path / "runs" / "zoom_seed0" / "eval.json").unlink()
    # Evaluated before the training went on, and evaluated with other settings.
    os.utime(tmp_path / "runs" / "base_seed7" / "eval.json", (0, 0))
    other = tmp_path / "runs" / "zoom_seed7" / "eval.json"
    other.write_text(other.read_text().replace("1.5", "1.25"))
    result = run_suite.run_suite("s", tmp_path / "runs", **places)
    assert suite[4:] == [("zoom", 0), ("base", 7), ("zoom", 7)]
    runs = json.loads(result.read_text())["runs"]
    assert [(r["run"], r["seed"], r["metrics"]["test/top1"]) for r in runs] == [
        ("base", 0, 0.0),
        ("zoom", 0, 0.0),
        ("base", 7, 0.7),
        ("zoom", 7, 0.7),
    ]


def test_tuned_runs_are_tuned_once_and_give_further_runs(suite, monkeypatch, tmp_path):
    loaded = run_suite.load_suite("s")
    monkeypatch.setattr(run_suite, "load_suite", lambda name: {**loaded, "tuned": ("zoom",)})
    train_and_evaluate, tuned = run_suite._call, []

    def programme(command):
        if command[0] != "tools/tune_masks.py":
            return train_and_evaluate(command)
        folder = pathlib.Path(command[1].partition("=")[2])
        tuned.append(folder.name)
        of_power = {"chosen": [{"name": "power"}], "test": {"test/top1": 0.9}}
        study = {"identity": {"chosen": None, "test": {}}, "power": of_power}
        (folder / "mask_study.json").write_text(json.dumps({"transforms": study, "controls": {}}))

    monkeypatch.setattr(run_suite, "_call", programme)
    for _ in range(2):
        result = run_suite.run_suite("s", tmp_path / "runs", results=tmp_path / "results")
    assert tuned == ["zoom_seed0", "zoom_seed7"]
    runs = json.loads(result.read_text())["runs"]
    assert [(r["run"], r["seed"], r["metrics"]["test/top1"]) for r in runs[:3]] == [
        ("base", 0, 0.0),
        ("zoom", 0, 0.0),
        ("zoom_power", 0, 0.9),
    ]
    assert [r["training_s"] for r in runs[:3]] == [2.0, 2.0, 0.0]


def test_folders_may_be_relative(suite, monkeypatch, tmp_path):
    """The programmes run in the checkout, wherever the suite is run."""
    loaded = run_suite.load_suite("s")
    monkeypatch.setattr(run_suite, "load_suite", lambda name: {**loaded, "tuned": ("zoom",)})
    monkeypatch.chdir(tmp_path)
    train_and_evaluate, folders = run_suite._call, []

    def programme(command):
        folders.append(pathlib.Path(dict(w.split("=", 1) for w in command[1:])["--workdir"]))
        if command[0] != "tools/tune_masks.py":
            return train_and_evaluate(command)
        (folders[-1] / "mask_study.json").write_text(json.dumps({"transforms": {}, "controls": {}}))

    monkeypatch.setattr(run_suite, "_call", programme)
    run_suite.run_suite("s", pathlib.Path("runs"), results=tmp_path / "results")
    assert len(folders) == 10 and all(folder.is_absolute() for folder in folders)


def test_commands_are_what_a_person_would_type(tmp_path):
    suite = {"runs": {"zoom": "configs/z.py:tiny"}, "overrides": {"model.width": 16}}
    train, evaluate = run_suite.commands(suite, "zoom", 3, tmp_path, {"data.dir": "/data"})
    assert train[:3] == ["train.py", "--config=configs/z.py:tiny", f"--workdir={tmp_path}"]
    assert train[3:] == ["--config.model.width=16", "--config.seed=3", "--config.data.dir=/data"]
    assert evaluate == ["eval.py", f"--workdir={tmp_path}"]


def test_a_failed_run_names_its_command(tmp_path):
    command = ["train.py", "--config=configs/none.py", f"--workdir={tmp_path}"]
    with pytest.raises(ValueError, match=r"exit code \d+ of: python train.py --config=configs/n"):
        run_suite._call(command)
