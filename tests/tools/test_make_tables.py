import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("make_tables", ROOT / "tools" / "make_tables.py")
make_tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_tables)

RUN = {
    "device_count": 1,
    "device_kind": "cpu",
    "versions": {"jax": "0.0"},
    "duration_s": 90.0,
    "commit": "abc",
}


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    evaluation = {"metrics": {"test/top1": 0.9}, "seed": 3, "step": 20}
    evaluation["overrides"] = {"seed": 3, "compile_cache": "/here/only"}
    evaluation["config"] = {"seed": 3, "compile_cache": "/here/only", "data": {"dir": "/here"}}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [{"step": 10, "train/loss": 1.0}, {"step": 20, "validation/top1": 0.8}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_recorded_run_fills_its_table_and_filling_again_changes_nothing(workdir, tmp_path):
    assert "/here" not in make_tables.record(workdir, "it", root=tmp_path).read_text()
    text = "before\n<!-- table it test/top1 -->\nstale\n<!-- end -->\nafter\n"
    filled = make_tables.write_tables(text, root=tmp_path)
    assert "| test/top1 | 0.9 |" in filled
    assert "0.800 (20)" in filled
    assert "--config.seed=3" in filled
    assert "stale" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert make_tables.write_tables(filled, root=tmp_path) == filled


def test_a_run_without_evaluation_says_what_to_do(workdir, tmp_path):
    (workdir / "eval.json").unlink()
    with pytest.raises(ValueError, match=r"python eval\.py --workdir="):
        make_tables.record(workdir, "it", root=tmp_path)


def test_the_tables_of_the_documentation_are_those_of_the_results():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert make_tables.write_tables(path.read_text()) == path.read_text(), path.name


def suite_run(run, seed, top1):
    facts = {"device_count": 1, "device_kind": "cpu", "cpu_count": 2, "versions": {"jax": "0.0"}}
    return {
        "run": run,
        "seed": seed,
        "metrics": {"test/top1": top1},
        "training_s": 60.0 * (seed + 1),
        "commit": "abcdefabcdefabc",
        **facts,
    }


def test_the_table_of_a_suite_has_means_spreads_and_differences_per_seed(tmp_path):
    (tmp_path / "results").mkdir()
    runs = [suite_run("zoom", 0, 0.50), suite_run("base", 0, 0.25)]
    runs += [suite_run("zoom", 1, 0.70), suite_run("base", 1, 0.25)]
    suite = {"suite": {"overrides": {"model.width": 16}}, "runs": runs}
    (tmp_path / "results" / "s.json").write_text(json.dumps(suite))
    text = make_tables.write_tables("<!-- table s test/top1 -->\n<!-- end -->", root=tmp_path)
    # Standard deviation of 0.5 and 0.7: 0.2 / sqrt(2).
    assert "| zoom | 2 | 0.6000 ± 0.1414 | +0.3500 ± 0.1414 | 1.5 |" in text
    assert "| base | 2 | 0.2500 ± 0.0000 |  | 1.5 |" in text
    assert "`--config.model.width=16`" in text and "abcdefabcdef," in text
    assert make_tables.write_tables(text, root=tmp_path) == text


def test_a_metric_that_a_run_does_not_have_is_blank(tmp_path):
    facts = {"commit": "c", "versions": {"jax": "0"}, "device_kind": "cpu"}
    facts |= {"device_count": 1, "cpu_count": 2, "training_s": 60.0, "seed": 0}
    runs = [
        {"run": "base", "metrics": {"a": 0.5}, **facts},
        {"run": "masks", "metrics": {"a": 0.75, "b": 0.25}, **facts},
    ]
    (tmp_path / "results").mkdir()
    content = {"suite": {"overrides": {}}, "runs": runs}
    (tmp_path / "results" / "s.json").write_text(json.dumps(content))
    text = make_tables.write_tables("<!-- table s a b -->\n<!-- end -->", tmp_path)
    assert "| base | 1 | 0.5000 |  |  | 1.0 |" in text
    assert "| masks | 1 | 0.7500 | +0.2500 | 0.2500 | 1.0 |" in text


def scores(**metrics):
    return {name: {"value": v, "low": v - 0.1, "high": v + 0.1} for name, v in metrics.items()}


ATTRIBUTION = {
    "name": "attribution",
    "metrics": {
        "pointing": {"label": "pointing", "better": "higher", "unit": "%"},
        "deletion": {"label": "deletion", "better": "lower", "unit": ""},
    },
    "rows": [
        {"row": "center", "scores": scores(pointing=0.5)},
        {"row": "cam@stage4", "scores": scores(pointing=0.75, deletion=0.25)},
    ],
    "counts": {"images": 200, "cues": 312},
    "problems": {"no_annotation": {"count": 2, "first": ["/here/only/it/a.jpg: no /here/a.xml"]}},
}
NEVER_TRAINED = {
    "metrics": {"test/top1": 0.9},
    "seed": 0,
    "step": None,
    "commit": "0123456789abcdef+",
    "versions": {"jax": "0.0"},
    "device_count": 1,
    "device_kind": "cpu",
    "config": {
        "network": "/here/net.py:squeezenet",
        "pretrained": "../here/too/w.npz",
        "data": {"name": "voc_folder", "dir": "/here/voc", "classes": "~/here/names.txt"},
        "evals": {"attribution": {"hard": ["/here/only/it/hard.txt"], "side": 224}},
    },
    "overrides": {"data.dir": "/here/voc", "pretrained": "/here/w.npz", "evals.a.images": 200},
}
START = "<!-- table {} {} -->\n<!-- end -->"


@pytest.fixture
def scored(tmp_path):
    """What eval.py leaves behind of a network that was never trained here."""
    folder = tmp_path / "scored"
    (folder / "tables" / "attribution").mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(NEVER_TRAINED))
    (folder / "tables" / "attribution" / "table.json").write_text(json.dumps(ATTRIBUTION))
    return folder


def test_a_table_of_scores_has_its_counts_and_where_it_comes_from(scored, tmp_path):
    make_tables.record(scored, "it", root=tmp_path)
    filled = make_tables.write_tables(START.format("it", "deletion pointing"), root=tmp_path)
    assert filled.splitlines()[2:-2] == [
        "| | deletion ↓ | pointing, % ↑ |",
        "|---|---:|---:|",
        "| center |  | 50.0 [40.0, 60.0] |",
        "| cam@stage4 | 0.250 [0.150, 0.350] | **75.0** [65.0, 85.0] |",
        "",
        "In brackets: intervals by bootstrap over the images; bold: the best of each column. "
        "200 images, 312 cues, 2 no annotation; "
        "overrides: `--config.pretrained=w.npz --config.evals.a.images=200`; "
        "seed, checkpoint: 0, not trained here; device: 1 x cpu, JAX 0.0; commit: 0123456789ab+.",
    ]
    assert make_tables.write_tables(filled, root=tmp_path) == filled
    named = make_tables.write_tables(START.format("it/attribution", "pointing"), root=tmp_path)
    assert "| cam@stage4 | **75.0** [65.0, 85.0] |" in named


def test_files_keep_their_names_and_lose_the_folders_of_this_machine(scored, tmp_path):
    evaluation = {**NEVER_TRAINED, "overrides": {"evals.a.map": f"{tmp_path}/configs/m.json"}}
    (scored / "eval.json").write_text(json.dumps(evaluation))
    content = make_tables.record(scored, "it", root=tmp_path).read_text()
    assert "here" not in content.replace("not trained here", "") and "~" not in content
    result = json.loads(content)
    config = result["eval"]["config"]
    assert config["network"] == "net.py:squeezenet" and config["pretrained"] == "w.npz"
    assert config["data"] == {"name": "voc_folder", "classes": "names.txt"}
    assert config["evals"] == {"attribution": {"hard": ["hard.txt"], "side": 224}}
    assert result["eval"]["overrides"] == {"evals.a.map": "configs/m.json"}  # of the repository
    table = result["tables"]["attribution"]
    assert table["problems"]["no_annotation"]["first"] == ["a.jpg: no a.xml"]
    assert {**table, "problems": 0} == {**ATTRIBUTION, "problems": 0}


@pytest.mark.parametrize(
    "text",
    ["test/top1", "insertion / deletion", "configs/networks/a.py:b", "gs://a/b", "1/255", "/"],
)
def test_what_is_no_folder_of_a_machine_stays(text):
    assert make_tables.FOLDERS.sub("", text) == text


def test_several_tables_and_those_of_a_trained_run_are_named(workdir, scored, tmp_path):
    (scored / "tables" / "attribution").rename(workdir / "tables")
    for name in ("boxes", "parts"):
        (workdir / "tables" / name).mkdir()
        (workdir / "tables" / name / "table.json").write_text(json.dumps(ATTRIBUTION))
    evaluation = json.loads((workdir / "eval.json").read_text())
    (workdir / "eval.json").write_text(json.dumps({**RUN, **evaluation}))
    make_tables.record(workdir, "run", root=tmp_path)
    filled = make_tables.write_tables(START.format("run", "test/top1"), root=tmp_path)
    assert "| test/top1 | 0.9 |" in filled and "0.800 (20)" in filled
    filled = make_tables.write_tables(START.format("run/parts", "pointing"), root=tmp_path)
    assert "| cam@stage4 | **75.0** [65.0, 85.0] |" in filled and "checkpoint: 3, step 20" in filled
    with pytest.raises(ValueError, match="unknown table of the result 'part'; did you mean"):
        make_tables.write_tables(START.format("run/part", "pointing"), root=tmp_path)
    with pytest.raises(ValueError, match="unknown metric of the table 'point'"):
        make_tables.write_tables(START.format("run/parts", "point"), root=tmp_path)
    (workdir / "run.json").unlink()
    make_tables.record(workdir, "it", root=tmp_path)
    with pytest.raises(ValueError, match=r"unknown table of the result ''.*boxes, parts"):
        make_tables.write_tables(START.format("it", "pointing"), root=tmp_path)


def test_the_metrics_of_a_network_that_was_never_trained_here(scored, tmp_path):
    (scored / "tables" / "attribution" / "table.json").unlink()
    make_tables.record(scored, "it", root=tmp_path)
    lines = make_tables.write_tables(START.format("it", "test/top1"), root=tmp_path).splitlines()
    assert lines[4:6] == ["| test/top1 | 0.9 |", lines[5]] and "w.npz" in lines[5]
    assert "| seed, checkpoint | 0, not trained here |" in lines
    assert not [line for line in lines if "training time" in line or "validation" in line]
