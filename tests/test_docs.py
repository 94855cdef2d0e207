"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch
import yaml

from memarch import LM, LMConfig, decode
from memarch.layers import CHANNELS, MIXERS
from memarch.wrappers import WRAPPERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {name: torch.randint(0, 512, (2, 40)) for name in ("tokens", "more", "packed")}
    given["starts"] = torch.zeros(2, 40, dtype=torch.bool)
    found = blocks("python")
    assert len(found) == 2
    for code in found:
        exec(compile(code, "README.md", "exec"), given)


def test_the_yaml_is_a_model():
    for text in blocks("yaml"):
        LM(decode(LMConfig, yaml.safe_load(text)["model"]))


def test_the_table_names_every_layer_and_a_command_stands_by_line_20():
    named = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert named == set(MIXERS) | set(CHANNELS) | set(WRAPPERS)
    assert any(line.strip().startswith("make train") for line in README.splitlines()[:20])


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
