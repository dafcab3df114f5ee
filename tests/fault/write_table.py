"""Writes the tables of docs/reliability.md from results/faults.json and results/kills.json.

python -m tests.fault.write_table

The first is written by the tests of faults, ATTNZOOM_RECORD_FAULTS=1 python -m pytest tests/fault;
the second by python -m tests.fault.run_kills --kills=100 --out=results/kills.json.
"""

import json
import re
from typing import Any

from tests.fault.programmes import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def write_tables(text: str) -> str:
    """The page with its tables filled anew."""
    faults = json.loads((ROOT / "results" / "faults.json").read_text())
    kills = json.loads((ROOT / "results" / "kills.json").read_text())
    for name, lines in (("faults", _faults(faults)), ("kills", _kills(kills))):
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        filled = "\n" + "\n".join(lines) + "\n\n"
        text = between.sub(lambda match, filled=filled: match[1] + filled + match[2], text)
    return text


def _faults(faults: dict[str, Any]) -> list[str]:
    rows = [
        f"| {fault} | {_cell(of['said'])} | {of['exit code']} | {of['lost']} |"
        for fault, of in faults.items()
    ]
    return ["| fault | what the programme says | exit code | lost |", "|---|---|---|---|", *rows]


def _kills(kills: dict[str, Any]) -> list[str]:
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(kills["moments"].items()))
    return [
        f"{kills['kills']} kills in {kills['runs']} runs ({moments}): {kills['lost']} runs lost, "
        f"{kills['different']} different from the one that was not killed."
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text()))
