"""Result files and the tables made of them: no number in the documentation is typed by hand.

    python tools/make_tables.py --record=runs/demo --name=demo   # runs/demo -> results/demo.json
    python tools/make_tables.py                                  # writes the tables anew
    python tools/make_tables.py --check                          # exit code 1 where one is stale

A table stands between `<!-- table NAME METRIC ... -->` and `<!-- end -->` in a Markdown file. For
one run it has a row per metric; for a suite (tools/run_suite.py) a row per run, with the mean and
the standard deviation over its seeds, and where there is a run `base`, of the differences to it; a
metric that a run does not have is left blank. For the scores of attribution methods it has a row
per method; NAME/TABLE says which table, where the result has several or was trained, too.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training.workdir import MACHINE_KEYS
from attnzoom_jax.viz import score_table

ROOT = pathlib.Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table (\S+) ([^>]*?) ?-->\n).*?(<!-- end -->)", re.DOTALL)
# The folders before the name of a file, also within a sentence; not "/" alone, nor "test/top1".
FOLDERS = re.compile(r"""(?<![^\s'"(=,\[])(?:~|\.\.)?/(?:[^\s/]+/)*(?=[^\s/])""")


def record(workdir: pathlib.Path, name: str, root: pathlib.Path = ROOT) -> pathlib.Path:
    """Gather what eval.py found, and of a trained run how it was trained, in results/NAME.json.

    Args:
        workdir: folder of a run that eval.py has evaluated, or in which it has written down how a
            network scores that was not trained here.
        name: of the result.
        root: of the repository.

    Returns:
        The file written: "eval", the eval.json; "tables", {name: table} of its tables/, if any;
        "run" and "curve", the run.json and the metrics of the validation, of a run. Folders of the
        machine at hand, of no use to others, are left out; files outside of the repository, such as
        weights, keep their names.

    Raises:
        ValueError: the run was not evaluated.
    """
    if not (workdir / "eval.json").exists():
        raise ValueError(f"{workdir} has no eval.json; run: python eval.py --workdir={workdir}")
    evaluation = json.loads((workdir / "eval.json").read_text())
    for key in MACHINE_KEYS:
        evaluation["overrides"].pop(key, None)
        evaluation["config"].pop(key, None)
    evaluation["config"]["data"].pop("dir", None)
    content: dict[str, Any] = {"eval": evaluation}
    if (workdir / "run.json").exists():
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        content["run"] = json.loads((workdir / "run.json").read_text())
        content["curve"] = [
            line for line in lines if any(key.startswith("validation/") for key in line)
        ]
    tables = sorted(workdir.glob("tables/*/table.json"))
    if tables:
        content["tables"] = {file.parent.name: json.loads(file.read_text()) for file in tables}
    path = root / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_without_folders(content, root), indent=1) + "\n")
    return path


def _without_folders(content: Any, root: pathlib.Path) -> Any:
    """The same with files named from the repository's root, or if they are outside, alone."""
    if isinstance(content, dict):
        return {key: _without_folders(value, root) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_folders(value, root) for value in content]
    if isinstance(content, str):
        return FOLDERS.sub("", content.replace(f"{root.resolve()}/", ""))
    return content


def write_tables(text: str, root: pathlib.Path = ROOT) -> str:
    """Fill every table of a Markdown text from its result file."""

    def fill(match: re.Match[str]) -> str:
        start, name, metrics, end = match.groups()
        name, _, table = name.partition("/")
        result = json.loads((root / "results" / f"{name}.json").read_text())
        if table or ("tables" in result and "run" not in result):
            filled = _score_table(result, table, metrics.split())
        else:
            make = _suite_table if "suite" in result else _table
            filled = make(result, metrics.split())
        return start + "\n" + filled + "\n\n" + end

    return TABLE.sub(fill, text)


def _table(result: dict[str, Any], metrics: list[str]) -> str:
    evaluation, run = result["eval"], result.get("run")
    facts = list(_facts(evaluation | (run or {})).items())
    if run:
        curve = ", ".join(f"{of['validation/top1']:.3f} ({of['step']})" for of in result["curve"])
        facts.insert(0, ("validation top-1 (step)", curve))
        facts.insert(-1, ("training time", f"{run['duration_s'] / 60:.1f} min"))
    rows = [f"| {name} | {evaluation['metrics'][name]:.4g} |" for name in metrics]
    rows += [f"| {name} | {value} |" for name, value in facts]
    return "\n".join(["| | |", "|---|---|", *rows])


def _score_table(result: dict[str, Any], name: str, metrics: list[str]) -> str:
    tables = result.get("tables", {})
    if not name and len(tables) == 1:
        (name,) = tables
    if name not in tables:
        raise unknown_name("table of the result", name, tables)
    table = tables[name]
    problems = {kind: found["count"] for kind, found in table["problems"].items()}
    counts = [
        f"{n} {what.replace('_', ' ')}" for what, n in {**table["counts"], **problems}.items()
    ]
    facts = [f"{what}: {of}" for what, of in _facts(result["eval"]).items()]
    note = "In brackets: intervals by bootstrap over the images; bold: the best of each column."
    below = "; ".join([f"{note} {', '.join(counts)}", *facts])
    return f"{score_table.markdown(table, metrics)}\n\n{below}."


def _facts(origin: dict[str, Any]) -> dict[str, str]:
    """Where a number comes from, of what eval.json or run.json hold."""
    overrides = _overrides(origin["overrides"])
    step = f"step {origin['step']}" if origin["step"] is not None else "not trained here"
    return {
        "overrides": overrides,
        "seed, checkpoint": f"{origin['seed']}, {step}",
        "device": f"{origin['device_count']} x {origin['device_kind']}, "
        f"JAX {origin['versions']['jax']}",
        "commit": _short(origin["commit"]),
    }


def _overrides(given: dict[str, Any]) -> str:
    return f"`{' '.join(f'--config.{k}={v}' for k, v in given.items())}`" if given else "none"


def _short(commit: str) -> str:
    return commit[:12] + ("+" if commit.endswith("+") else "")


def _suite_table(result: dict[str, Any], metrics: list[str]) -> str:
    runs = result["runs"]
    names = list(dict.fromkeys(run["run"] for run in runs))
    by_name = {name: {r["seed"]: r for r in runs if r["run"] == name} for name in names}
    base = by_name.get("base", {})
    columns = ["run", "seeds"]
    compared = [metric for metric in metrics if any(metric in r["metrics"] for r in base.values())]
    for metric in metrics:
        columns += [metric, "less base"] if metric in compared else [metric]
    columns.append("minutes")
    rows = []
    for name, seeds in by_name.items():
        row = [name, str(len(seeds))]
        for metric in metrics:
            known = {s: r["metrics"][metric] for s, r in seeds.items() if metric in r["metrics"]}
            row.append(_mean(list(known.values())))
            if metric in compared:
                of_base = {s: base[s]["metrics"].get(metric) for s in known if s in base}
                gains = [known[s] - value for s, value in of_base.items() if value is not None]
                row.append("" if name == "base" else _mean(gains, sign="+"))
        row.append(f"{statistics.median(r['training_s'] for r in seeds.values()) / 60:.1f}")
        rows.append(row)
    kinds = sorted({f"{r['device_count']} x {r['device_kind']}" for r in runs})
    commits = sorted({_short(r["commit"]) for r in runs})
    facts = (
        f"Mean and standard deviation over the seeds; minutes of training, median. On "
        f"{', '.join(kinds)} ({runs[0]['cpu_count']} cores), JAX {runs[0]['versions']['jax']}, "
        f"commit {', '.join(commits)}, {sum(r['training_s'] for r in runs) / 3600:.1f} hours in "
        f"all. Overrides: {_overrides(result['suite']['overrides'])}."
    )
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", facts])


def _mean(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.4f}" if values else ""
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--name", help="of the result, with --record")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.record:
        if not given.name:
            parser.error("--record needs --name")
        try:
            print(f"written: {record(given.record, given.name)}")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        if write_tables(text) != text:
            stale.append(path.name)
            if not given.check:
                path.write_text(write_tables(text))
    if stale:
        print(("not true: " if given.check else "written: ") + ", ".join(stale))
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
