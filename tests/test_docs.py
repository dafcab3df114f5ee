"""The examples of the documentation run as they are printed."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def examples(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


@pytest.mark.parametrize(
    ("page", "number"), [(page, i) for page in PAGES for i in range(len(examples(page)))]
)
def test_example_runs(page, number):
    exec(compile(examples(page)[number], f"{page}, example {number + 1}", "exec"), {})


def test_examples_are_found():
    assert len(examples("docs/methods.md")) == 4 and len(examples("README.md")) == 1
