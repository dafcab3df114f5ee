"""Result files and the tables made of them: no number in the documentation is typed by hand.

    python tools/make_tables.py --record=runs/demo --name=demo   # runs/demo -> results/demo.json
    python tools/make_tables.py                                  # writes the tables anew
    python tools/make_tables.py --check                          # exit code 1 where one is stale

A table stands between `<!-- table NAME METRIC ... -->` and `<!-- end -->` in a Markdown file. For
one run it has a row per metric; for a suite (tools/run_suite.py) a row per run, with the mean and
the standard deviation over its seeds, and where there is a run `base`, of the differences to it; a
metric that a run does not have is left blank.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from attnzoom_jax.training.workdir import MACHINE_KEYS

ROOT = pathlib.Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table (\S+) ([^>]*?) ?-->\n).*?(<!-- end -->)", re.DOTALL)


def record(workdir: pathlib.Path, name: str, root: pathlib.Path = ROOT) -> pathlib.Path:
    """Gather a run's eval.json, run.json and validation curve into results/NAME.json.

    Args:
        workdir: folder of a run that eval.py has evaluated.
        name: of the result.
        root: of the repository.

    Returns:
        The file written.

    Raises:
        ValueError: the run was not evaluated.
    """
    if not (workdir / "eval.json").exists():
        raise ValueError(f"{workdir} has no eval.json; run: python eval.py --workdir={workdir}")
    evaluation = json.loads((workdir / "eval.json").read_text())
    run = json.loads((workdir / "run.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # Folders of the machine at hand are of no use to others.
    for key in MACHINE_KEYS:
        evaluation["overrides"].pop(key, None)
        evaluation["config"].pop(key, None)
    evaluation["config"]["data"].pop("dir", None)
    curve = [line for line in lines if any(key.startswith("validation/") for key in line)]
    content = {"eval": evaluation, "run": run, "curve": curve}
    path = root / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def write_tables(text: str, root: pathlib.Path = ROOT) -> str:
    """Fill every table of a Markdown text from its result file."""

    def fill(match: re.Match[str]) -> str:
        start, name, metrics, end = match.groups()
        result = json.loads((root / "results" / f"{name}.json").read_text())
        make = _suite_table if "suite" in result else _table
        return start + "\n" + make(result, metrics.split()) + "\n\n" + end

    return TABLE.sub(fill, text)


def _table(result: dict[str, Any], metrics: list[str]) -> str:
    evaluation, run = result["eval"], result["run"]
    rows = [f"| {name} | {evaluation['metrics'][name]:.4g} |" for name in metrics]
    curve = ", ".join(f"{line['validation/top1']:.3f} ({line['step']})" for line in result["curve"])
    overrides = " ".join(
        f"--config.{key}={value}" for key, value in evaluation["overrides"].items()
    )
    facts = [
        ("validation top-1 (step)", curve),
        ("overrides", f"`{overrides}`" if overrides else "none"),
        ("seed, checkpoint", f"{evaluation['seed']}, step {evaluation['step']}"),
        ("device", f"{run['device_count']} x {run['device_kind']}, JAX {run['versions']['jax']}"),
        ("training time", f"{run['duration_s'] / 60:.1f} min"),
        ("commit", run["commit"][:12] + ("+" if run["commit"].endswith("+") else "")),
    ]
    rows += [f"| {name} | {value} |" for name, value in facts]
    return "\n".join(["| | |", "|---|---|", *rows])


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
    overrides = " ".join(f"--config.{k}={v}" for k, v in result["suite"]["overrides"].items())
    kinds = sorted({f"{r['device_count']} x {r['device_kind']}" for r in runs})
    commits = sorted({r["commit"][:12] + ("+" if r["commit"].endswith("+") else "") for r in runs})
    facts = (
        f"Mean and standard deviation over the seeds; minutes of training, median. On "
        f"{', '.join(kinds)} ({runs[0]['cpu_count']} cores), JAX {runs[0]['versions']['jax']}, "
        f"commit {', '.join(commits)}, {sum(r['training_s'] for r in runs) / 3600:.1f} hours in "
        f"all. Overrides: {f'`{overrides}`' if overrides else 'none'}."
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
