"""The tables of docs/reliability.md are those of the last recorded tests."""

import json

from tests.fault.write_table import PAGE, ROOT, write_tables


def test_the_page_says_what_was_recorded():
    assert write_tables(PAGE.read_text()) == PAGE.read_text()
    assert PAGE.read_text().count("| nothing |") >= 20


def test_nothing_was_lost():
    faults = json.loads((ROOT / "results" / "faults.json").read_text())
    lost = {fault: of["lost"] for fault, of in faults.items() if of["lost"] != "nothing"}
    assert lost == {"every checkpoint damaged": "all steps, done again"}
    kills = json.loads((ROOT / "results" / "kills.json").read_text())
    assert kills["kills"] >= 100 and kills["lost"] == kills["different"] == 0
