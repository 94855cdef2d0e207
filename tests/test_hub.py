"""Folders: what is saved is what is loaded, whole or not at all, and what cannot be loaded says why."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import memarch
from memarch import LM, ConfigError, create_model, from_pretrained, hub, list_models

TINY = list_models("*-tiny")


@cache
def model(name: str = "hybrid-tiny", seed: int = 0) -> LM:
    return create_model(name, seed=seed).eval()


def given(made: LM) -> torch.Tensor:
    return torch.arange(80).view(2, 40) if made.config.embed == "tokens" else torch.randn(2, 40, made.config.inputs)


def same_weights(a: LM, b: LM) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]) for name in x)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded_is_itself_bit_for_bit(name, size, tmp_path):
    model(name).save_pretrained(tmp_path, max_shard_size=size)
    loaded = LM.from_pretrained(tmp_path)
    assert loaded.config == model(name).config
    assert same_weights(loaded, model(name))
    assert torch.equal(loaded(given(loaded)).logits, model(name)(given(loaded)).logits)
    assert (loaded.head.weight is loaded.embed.weight) == loaded.config.tie
    assert (tmp_path / hub.INDEX).exists() == (size != "5GB")
    assert not loaded.training


@pytest.mark.parametrize("name", TINY)
def test_the_same_model_is_the_same_bytes(name, tmp_path):
    a = hub.save_pretrained(model(name), tmp_path / "a", max_shard_size="30KB")
    b = hub.save_pretrained(from_pretrained(a), tmp_path / "b", max_shard_size="30KB")
    assert contents(a) == contents(b)


def test_an_untied_head_is_its_own(tmp_path):
    made = create_model("hybrid-tiny", tie=False)
    made.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert same_weights(loaded, made)
    assert loaded.head.weight is not loaded.embed.weight


def test_dtypes_are_kept_or_changed_on_request(tmp_path):
    made = create_model("hybrid-tiny").to(torch.bfloat16)
    made.backbone.norm.float()
    made.save_pretrained(tmp_path)
    assert same_weights(from_pretrained(tmp_path), made)
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    assert from_pretrained(tmp_path, device=torch.device("cpu")).device.type == "cpu"


def test_loading_computes_nothing_and_every_tensor_owns_its_memory(tmp_path, monkeypatch):
    model().save_pretrained(tmp_path)
    monkeypatch.setattr(LM, "init_", lambda *_: pytest.fail("weights were drawn, only to be replaced"))
    for name, p in from_pretrained(tmp_path).named_parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
        assert p.data_ptr() % 64 == 0, name  # as torch allocates: alignment can change the last bit of a matmul
        assert p.requires_grad


def test_a_loaded_model_outlives_its_files(tmp_path):
    model().save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    os.truncate(tmp_path / hub.WEIGHTS, 0)  # what a mapped file would die of
    assert same_weights(loaded, model())


def test_a_buffer_that_is_not_saved_is_right_all_the_same(tmp_path, monkeypatch):
    class Buffered(LM):
        def __init__(self, config, **kwargs):
            super().__init__(config, **kwargs)
            self.backbone.register_buffer("scale", torch.arange(5) * 0.5, persistent=False)
            self.backbone.register_buffer("count", torch.tensor([3]))

    monkeypatch.setattr(hub, "LM", Buffered)
    made = Buffered(model().config)
    made.backbone.count.add_(4)
    hub.save_pretrained(made, tmp_path)
    loaded = from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.backbone.scale, made.backbone.scale.double())
    assert loaded.backbone.count.tolist() == [7]
    assert loaded.state_dict().keys() == made.state_dict().keys()


def test_not_strict_takes_what_fits(tmp_path):
    model(seed=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / hub.WEIGHTS)
    del tensors["backbone.norm.weight"]
    save_file({**tensors, "embed.weight": torch.zeros(3, 3), "extra": torch.ones(1)}, tmp_path / hub.WEIGHTS)
    with pytest.warns(UserWarning, match=r"missing: backbone.norm.weight; unexpected: extra; wrong: embed.weight is \[3, 3\]"):
        loaded = from_pretrained(tmp_path, strict=False)
    fresh = create_model("hybrid-tiny").state_dict()
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, tensors[name] if name in tensors and name != "embed.weight" else fresh[name])
    assert loaded.head.weight is loaded.embed.weight


# ------------------------------------------------------------------------------------------------ whole or not at all


class Killed(BaseException):
    pass


@contextmanager
def dying(monkeypatch, step: int, forever: bool):
    """The save's `step`-th change of the disk fails; `forever`: and so does everything after it, as in a process that is gone."""
    done = 0

    def wrap(f):
        def g(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step or (forever and done > step):
                raise Killed
            return f(*args, **kwargs)

        return g

    with monkeypatch.context() as patch:
        changes = [(hub, "save_file"), (os, "link"), (os, "replace"), (Path, "unlink"), (Path, "write_text")]
        for owner, name in [*changes, (shutil, "rmtree")] if forever else changes:
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield


def load_or_none(folder: Path) -> LM | None:
    try:
        return from_pretrained(folder)
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("before, after", [(None, "5GB"), (None, "30KB"), ("5GB", "5GB"), ("30KB", "5GB"), ("5GB", "30KB"), ("60KB", "30KB")])
def test_a_killed_save_never_looks_complete(before, after, tmp_path, monkeypatch):
    old, new = model(seed=1), model(seed=2)
    survived = False
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if before:
            old.save_pretrained(folder, max_shard_size=before)
        try:
            with dying(monkeypatch, step, forever=True):
                new.save_pretrained(folder, max_shard_size=after)
            survived = True
        except Killed:
            pass
        loaded = load_or_none(folder)
        if loaded is None and before:  # killed among the renames: the earlier export is whole where the message says
            with pytest.raises(FileNotFoundError, match="A save was killed here") as refusal:
                from_pretrained(folder)
            loaded = from_pretrained(re.search(r"whole in (\S+)\.$", str(refusal.value))[1])
            assert same_weights(loaded, old)
        assert loaded is None or same_weights(loaded, old) or same_weights(loaded, new)
        assert loaded is not None or not before
        assert (folder / "notes.txt").read_text() == "mine"
        if survived:
            break
    assert survived
    assert step > 5
    assert same_weights(from_pretrained(folder), new)


def no_links(*_):
    raise OSError("this file system has no links")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [None, "5GB", "60KB"])
def test_a_failed_save_leaves_what_was_there(before, links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for step in range(1, 100):
        folder = tmp_path / str(step)
        folder.mkdir()
        if before:
            model(seed=1).save_pretrained(folder, max_shard_size=before)
        kept = contents(folder)
        try:
            with dying(monkeypatch, step, forever=False):
                model(seed=2).save_pretrained(folder, max_shard_size="100KB")
            break
        except Killed:
            assert contents(folder) == kept
            assert len(list(folder.iterdir())) == len(kept)  # and nothing beside it
    assert step > 5
    assert same_weights(from_pretrained(folder), model(seed=2))


def test_stale_shards_go_and_other_files_stay(tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    model().save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


# ------------------------------------------------------------------------------------------------ refusals


def edit(**changes):
    """Change top-level keys of config.json."""
    return lambda folder: (folder / hub.CONFIG).write_text(json.dumps({**json.loads((folder / hub.CONFIG).read_text()), **changes}))


def edit_model(path: str, value):
    def change(folder: Path) -> None:
        data = json.loads((folder / hub.CONFIG).read_text())
        edit(model=memarch.config.override(data["model"], path, value))(folder)

    return change


def edit_tensors(f):
    def change(folder: Path) -> None:
        tensors = load_file(folder / hub.WEIGHTS)
        f(tensors)
        save_file(tensors, folder / hub.WEIGHTS)

    return change


def edit_index(f):
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder, max_shard_size="30KB")
        data = json.loads((folder / hub.INDEX).read_text())
        f(folder, data)
        (folder / hub.INDEX).write_text(json.dumps(data))

    return change


def pickled(folder: Path) -> None:
    (folder / hub.WEIGHTS).rename(folder / "pytorch_model.bin")


def name_outside(folder: Path, index: dict) -> None:
    index["weight_map"]["embed.weight"] = "../model-00001-of-00002.safetensors"


def lose_shard(folder: Path, index: dict) -> None:
    next(folder.glob("model-00002*")).unlink()


def truncate(folder: Path) -> None:
    os.truncate(folder / hub.WEIGHTS, (folder / hub.WEIGHTS).stat().st_size - 10)


EMBED = "embed.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
WIDE = torch.zeros(9, 64)
REFUSALS = {
    "newer format": (edit(format_version=2, memarch_version="9.1"), ConfigError, r"format_version 2, written by memarch 9.1; .* reads up to 1. Upgrade"),
    "odd format": (edit(format_version="1"), ConfigError, "format_version: expected int, got '1'"),
    "no config": (lambda f: (f / hub.CONFIG).unlink(), FileNotFoundError, "has no config.json, so it is not an export of memarch"),
    "no weights": (lambda f: (f / hub.WEIGHTS).unlink(), FileNotFoundError, "has no weights: neither model.safetensors nor model.safetensors.index.json"),
    "a pickle": (pickled, FileNotFoundError, "never reads a pickle such as pytorch_model.bin.* Convert it to safetensors"),
    "truncated": (truncate, ValueError, "model.safetensors is not a whole safetensors file"),
    "empty weights": (lambda f: (f / hub.WEIGHTS).write_bytes(b""), ValueError, "not a whole safetensors file"),
    "missing shard": (edit_index(lose_shard), FileNotFoundError, "names the shard model-00002-of-000...safetensors, which is not there"),
    "index outside": (edit_index(name_outside), ConfigError, "needs a 'weight_map' from tensor names to files called"),
    "index empty": (edit_index(lambda f, index: index.clear()), ConfigError, "needs a 'weight_map'"),
    "transformers": (lambda f: (f / hub.CONFIG).write_text(json.dumps(LLAMA)), ConfigError, "not an export of memarch.* 'llama', a model of another library"),
    "a list": (lambda f: (f / hub.CONFIG).write_text("[1]"), ConfigError, "not an export of memarch"),
    "corrupt JSON": (lambda f: (f / hub.CONFIG).write_text('{"library_name": '), ConfigError, "config.json is not JSON"),
    "binary JSON": (lambda f: (f / hub.CONFIG).write_bytes(b"\x80\xff"), ConfigError, "config.json is not JSON"),
    "deep JSON": (lambda f: (f / hub.CONFIG).write_text("[" * 200_000), ConfigError, "config.json is not JSON"),
    "unknown kind": (edit_model("parts.M.mixer.kind", "gated_dleta"), ConfigError, "parts.M.mixer: unknown kind 'gated_dleta'. Did you mean 'gated_delta'"),
    "import path": (edit_model("parts.M.mixer.kind", "os.system"), ConfigError, "unknown kind 'os.system'"),
    "class path": (edit_model("parts.M.mixer.class_path", "os.system"), ConfigError, "unknown key 'class_path'"),
    "unknown key": (edit_model("dmi", 3), ConfigError, "unknown key 'dmi'. Did you mean 'dim'"),
    "unknown top key": (edit(auto_map={"AutoModel": "x.py"}), ConfigError, "unknown key 'auto_map'"),
    "no model": (lambda f: (f / hub.CONFIG).write_text('{"library_name": "memarch", "format_version": 1}'), ConfigError, "'memarch_version' is missing"),
    "unbuildable": (edit_model("parts.W.ffn", {"kind": "pkm", "pool": "none"}), ConfigError, "config.json of .*unknown pool 'none'"),
    "wrong shape": (edit_tensors(lambda t: t.update({EMBED: WIDE})), ValueError, r"wrong: embed.weight is \[9, 64\] in the file and \[256, 64\] by the config"),
    "wrong type": (edit_tensors(lambda t: t.update({EMBED: t[EMBED].long()})), ValueError, "wrong: embed.weight is I64 in the file"),
    "missing": (edit_tensors(lambda t: t.pop("backbone.norm.weight")), ValueError, "do not fit its config. missing: backbone.norm.weight. strict=False"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.ones(1))), ValueError, "unexpected: extra. strict"),
    "too many": (edit_tensors(lambda t: t.clear() or t.update(x=torch.ones(1))), ValueError, "missing: .* and 1[0-9] more; unexpected: x"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_clear_sentence(case, tmp_path):
    damage, kind, message = REFUSALS[case]
    folder = model().save_pretrained(tmp_path / "export")
    damage(folder)
    with pytest.raises(kind, match=message) as refusal:
        from_pretrained(folder)
    one_sentence(refusal.value)
    assert "export" in str(refusal.value)  # which one


def one_sentence(error: BaseException) -> None:
    """Nothing of the library below, no chain of causes, one line."""
    assert type(error).__module__ in ("builtins", "memarch.config")
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    assert "\n" not in str(error)
    assert len(str(error)) < 700


@pytest.mark.parametrize(
    "name, kwargs, kind, message",
    [
        ("./nowhere", {}, FileNotFoundError, "there is no folder ./nowhere"),
        (Path("nowhere"), {}, FileNotFoundError, "there is no folder nowhere"),
        ("a/b/c", {}, FileNotFoundError, "there is no folder a/b/c"),
        ("hybrid-tiny", {}, FileNotFoundError, r"is a preset.*memarch.create_model\('hybrid-tiny'\)"),
        ("me/x y", {}, FileNotFoundError, "no folder me/x y, and a repository is called 'owner/name'"),
        (__file__, {}, FileNotFoundError, "is a file; give the folder"),
        (Path(__file__).parent, {"revision": "v2"}, ValueError, "revision 'v2' is for a Hub repository"),
        ("me/nothing", {"local_files_only": True}, FileNotFoundError, "neither a folder here nor whole in the cache, and the Hub was not asked"),
    ],
)
def test_a_name_that_leads_nowhere(name, kwargs, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as refusal:
        from_pretrained(name, cache_dir=tmp_path, **kwargs)
    one_sentence(refusal.value)


@pytest.mark.parametrize("name, text", [("config.json", '{"model_type": "llama"}'), ("README.md", "# My project")])
def test_a_file_of_something_else_is_not_replaced(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} belongs to something else"):
        model().save_pretrained(tmp_path)
    assert contents(tmp_path) == {name: text.encode()}


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="on the meta device"):
        create_model("hybrid-tiny", device="meta").save_pretrained(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; an export is a folder"):
        model().save_pretrained(tmp_path / "file")
    assert not contents(tmp_path / "x")


# ------------------------------------------------------------------------------------------------ the model card

RUN = {
    "title": "Recall with a hybrid",
    "license": "apache-2.0",
    "tags": ["recall"],
    "metrics": [{"pairs": 8, "recall": 0.987654321}, {"pairs": 16, "recall": torch.tensor(0.5), "note": "a|b"}],
    "command": "python train.py fit --config configs/recall/hybrid.yaml",
    "data": {"kind": "mqar", "settings": [[64, 8]], "filler": None},
    "hardware": "2 CPU cores",
    "versions": {"torch": "2.13.0", "memarch": "0.1.0"},
    "seeds": {"model": 0, "data": 1, "other": None},
}


def card(folder: Path) -> tuple[dict, str]:
    _, front, body = (folder / hub.CARD).read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_the_run_knows(tmp_path):
    front, body = card(model().save_pretrained(tmp_path, card=RUN))
    assert front == {"library_name": "memarch", "license": "apache-2.0", "tags": ["memarch", "gated_delta", "swiglu", "attention", "recall"]}
    for line in (
        "# Recall with a hybrid",
        f"{model().config.num_params():,} parameters: 2 blocks of width 64, pattern `MW`.",
        "| 8 | 0.987654 |  |",
        "| 16 | 0.5 | a\\|b |",
        "python train.py fit --config configs/recall/hybrid.yaml",
        '- data: `{"kind": "mqar", "settings": [[64, 8]], "filler": null}`',
        "- hardware: 2 CPU cores",
        "- versions: torch 2.13.0, memarch 0.1.0",
        "- seeds: model 0, data 1\n",
        "- `gated_delta`: Yang et al. 2024, arXiv 2412.06464",
    ):
        assert line in body
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == memarch.encode(model().config)


def test_the_card_invents_nothing(tmp_path):
    front, body = card(model().save_pretrained(tmp_path))
    assert "license" not in front
    for word in ("Results", "Regenerate", "How it was made", "None", "hardware", "seeds"):
        assert word not in body
    _, body = card(model().save_pretrained(tmp_path, card={"metrics": {"recall": 0.5}}))
    assert "| recall | 0.5 |" in body


CONTINUOUS = {"embed": "linear", "inputs": 3, "tie": False}


@pytest.mark.parametrize(
    "changes",
    [{}, {"vocab_size": 300}, CONTINUOUS, {**CONTINUOUS, "head": "regression", "outputs": 2}],
    ids=["bytes", "tokens", "inputs", "regression"],
)
def test_the_cards_snippet_runs(changes, tmp_path, monkeypatch):
    create_model("gated-delta-tiny", **changes).save_pretrained(tmp_path)
    code = card(tmp_path)[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "wrong, message",
    [({"metric": {}}, "unknown key 'metric'. Did you mean 'metrics'"), ({"metrics": 0.9}, "metrics is a mapping"), ({"tags": "x"}, "card.tags")],
)
def test_a_wrong_card_is_refused_before_anything_is_written(wrong, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        model().save_pretrained(tmp_path / "x", card=wrong)
    assert not (tmp_path / "x").exists()
