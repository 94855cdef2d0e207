"""The page on selective scans shows what its script says."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "selective-scans.md"


def test_the_script_says_what_the_page_shows(capsys):
    page = PAGE.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), {})
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == shown
