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
