"""A model as a folder or a Hub repository: config.json, model.safetensors (or shards and their index), README.md.

config.json names kinds, never import paths, and tensors are read from safetensors only: loading runs nothing that a file brings along.
Loading is strict, and what it refuses it refuses in one sentence.

    save_pretrained(model, "export")        model = from_pretrained("export")
    push_to_hub(model, "me/recall")         model = from_pretrained("me/recall", revision="v2")
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memarch import __version__
from memarch.config import ConfigError, decode, encode, require
from memarch.models import LM, PRESETS, LMConfig

FORMAT = 1  # raised when an older memarch could no longer read what this one writes
CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
OURS = re.compile(rf"config\.json|README\.md|model\.safetensors\.index\.json|{SHARD.pattern}")
MARKS = {CONFIG: '"library_name": "memarch"', CARD: "library_name: memarch"}  # by which we know our own among a folder's files
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Find = Callable[[str], Path | None]  # the local path of one of an export's files, or None when the export lacks it


@dataclass(frozen=True, kw_only=True)
class Export:
    """What config.json holds."""

    format_version: int
    library_name: Literal["memarch"]
    memarch_version: str
    model: LMConfig


@dataclass(frozen=True, kw_only=True)
class Card:
    """What only the run knows about its model. Nothing is printed that is not given here."""

    title: str = "A memarch model"
    license: str | None = None
    tags: tuple[str, ...] = ()
    metrics: Any = None  # {"recall": 0.99}, or rows for a table: [{"pairs": 8, "recall": 0.99}, ...]
    command: str | None = None  # what regenerates this model
    data: Any = None  # these four: a sentence, a list or a mapping
    hardware: Any = None
    versions: Any = None
    seeds: Any = None

    def __post_init__(self) -> None:
        rows = self.metrics if isinstance(self.metrics, list | tuple) else [self.metrics or {}]
        require(all(isinstance(row, Mapping) for row in rows), f"metrics is a mapping from names to numbers, or a list of such rows, got {self.metrics!r}.")


# ------------------------------------------------------------------------------------------------ save, push, load


def save_pretrained(model: LM, folder: str | Path, *, card: Mapping[str, Any] | None = None, max_shard_size: int | str = "5GB") -> Path:
    """Write the model into a folder. The same model gives the same bytes.

    The files of an earlier export are replaced together; files of other names are left alone. See `_replacing` for what a kill leaves."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an export is a folder of several files.")
    for name, mark in MARKS.items():
        if (folder / name).is_file() and mark not in (folder / name).read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{folder / name} belongs to something else and would be replaced; save into a folder of its own.")
    about = decode(Card, card or {}, "card")
    with _replacing(folder) as new:
        _write(model, new, about, max_shard_size, ".")
    return folder


def push_to_hub(
    model: LM,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model with memarch",
    card: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> CommitInfo:
    """Save the model in a repository, made if it is not there, on the branch `revision` (main), made likewise. One commit replaces the
    earlier export, stale shards included; its hash is `.oid` of what returns. `private` is for a repository made here; None: the owner's default."""
    about = decode(Card, card or {}, "card")
    api = HfApi(token=token, library_name="memarch", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        _write(model, Path(temp), about, max_shard_size, repo_id)
        new = sorted(file.name for file in Path(temp).iterdir())
        stale = [name for name in api.list_repo_files(repo_id, revision=revision) if OURS.fullmatch(name) and name not in new]
        # Not upload_folder: it may spread a large model over several commits, and a reader could meet half of each.
        operations = [CommitOperationAdd(name, Path(temp, name)) for name in new] + [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def from_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> LM:
    """The model that save_pretrained wrote into a folder or push_to_hub into a repository, in eval mode.

    dtype: for floating tensors; None keeps what was saved. strict: every tensor of the config must be there in its shape and no other;
    False starts missing ones afresh and passes over the rest, with a warning. local_files_only: the cache alone (HF_HUB_OFFLINE=1 says the same)."""
    find = _finder(name_or_path, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    config = _read_config(find, name_or_path)
    try:
        with torch.device("meta"):  # nothing is computed or allocated; the tensors of the files become the model's
            model = LM(config)
    except ConfigError as error:
        raise ConfigError(f"{CONFIG} of {name_or_path}: {error}") from None
    plan = _plan(_weight_files(find, name_or_path), _tensors(model), name_or_path, strict)
    _fill(model, _read_tensors(plan, torch.device(device), dtype), torch.device(device), dtype)
    return model.eval()


# ------------------------------------------------------------------------------------------------ writing


def _tensors(model: LM) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once: of tied names the first stands for all, and retie() restores the others."""
    first: dict[int, str] = {}
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if first.setdefault(id(x), name) == name}


def _write(model: LM, folder: Path, card: Card, max_shard_size: int | str, name: str) -> None:
    tensors = _tensors(model)
    if any(x.is_meta for x in tensors.values()):
        raise ValueError("the model is on the meta device: it has shapes and no weights to save. Build it on a real device, or load weights first.")
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        # One metadata key only: safetensors writes several in random order (its issue 584), and the bytes would differ from save to save.
        save_file({n: tensors[n].detach().cpu().contiguous() for n in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    _write_json(folder / CONFIG, encode(Export(format_version=FORMAT, library_name="memarch", memarch_version=__version__, model=model.config)))
    (folder / CARD).write_text(_render(model.config, card, name), encoding="utf-8")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, whose files then take the place of the earlier export's.

    An exception leaves the earlier export as it was, and so does a kill while writing. A kill among the renames leaves a folder without
    config.json, which nothing loads, and the earlier export whole under .saving-*/old."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    new, old = work / "new", work / "old"
    try:
        new.mkdir()
        old.mkdir()
        yield new
        _flush(new)
        for name in _ours(folder):
            _keep(folder / name, old / name)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    try:
        _publish(new, folder)
    except BaseException:
        _publish(old, folder)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _publish(source: Path, folder: Path) -> None:
    """config.json leaves first and arrives last: at no moment does a mixture look complete."""
    names = _ours(source)
    (folder / CONFIG).unlink(missing_ok=True)
    for stale in set(_ours(folder)) - set(names):
        (folder / stale).unlink()
    for name in names:
        os.replace(source / name, folder / name)


def _ours(folder: Path) -> list[str]:
    """The names of an export's files, config.json last."""
    return sorted((name for name in os.listdir(folder) if OURS.fullmatch(name)), key=lambda name: (name == CONFIG, name))


def _keep(file: Path, copy: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


def _flush(folder: Path) -> None:
    """To the disk before the renames, which may otherwise survive a power cut that the contents do not."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


# ------------------------------------------------------------------------------------------------ finding


def _finder(name: str | Path, revision: str | None, **options: Any) -> Find:
    local = Path(name).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is for a Hub repository, and {name} is a folder here. Rename the folder, or leave revision out.")
        return lambda file: local / file if (local / file).is_file() else None
    if local.is_file():
        raise FileNotFoundError(f"{name} is a file; give the folder it is in.")
    if str(name) in PRESETS:
        raise FileNotFoundError(f"{name!r} is a preset, a size without weights: memarch.create_model({name!r}) builds it afresh.")
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}.")
    return _remote(name, revision, options)


def _remote(name: str, revision: str | None, options: dict[str, Any]) -> Find:
    commit: str | None = None  # of the first file found: a push in between must not mix two exports

    def find(file: str) -> Path | None:
        nonlocal commit
        try:
            path = hf_hub_download(name, file, revision=commit or revision, library_name="memarch", library_version=__version__, **options)
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:
            offline = error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled)
            if offline and commit is not None:
                return None
            why = "was not asked: allow it (no local_files_only, no HF_HUB_OFFLINE), or check the name" if offline else f"gave no answer ({error.__cause__})"
            where = f"{name} (revision {revision or 'main'})"
            raise FileNotFoundError(f"{where} is neither a folder here nor whole in the cache, and the Hub {why}.".replace("\n", " ")) from None
        except (HfHubHTTPError, HFValidationError) as error:
            raise FileNotFoundError(_refusal(name, revision, error)) from None
        commit = Path(path).parent.name
        return Path(path)

    return find


def _refusal(name: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, HFValidationError):
        return f"there is no folder {name}, and a repository is called 'owner/name'."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision!r}."
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access on its page, then pass token=... or log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no folder {name} and no repository {name} on the Hub; for a private one pass token=... or log in with `hf auth login`."
    return f"the Hub refused {name}: {' '.join(str(error).split())}"


def _weight_files(find: Find, where: str | Path) -> list[Path]:
    single = find(WEIGHTS)
    if single is not None:
        return [single]
    index = find(INDEX)
    if index is None:
        pickles = sorted(file.name for file in Path(where).glob("*") if file.suffix in PICKLES)
        hint = f" memarch never reads a pickle such as {pickles[0]}: loading one can run any code. Convert it to safetensors first." if pickles else ""
        hint = hint if Path(where).is_dir() else " Offline, only what was downloaded before is there."
        raise FileNotFoundError(f"{where} has no weights: neither {WEIGHTS} nor {INDEX} is there.{hint}")
    data = _read_json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not all(isinstance(file, str) and SHARD.fullmatch(file) for file in names.values()):
        raise ConfigError(f"{INDEX} of {where} needs a 'weight_map' from tensor names to files called model-00001-of-00002.safetensors and so on.")
    files = []
    for shard in sorted(set(names.values())):
        path = find(shard)
        if path is None:
            raise FileNotFoundError(f"{INDEX} of {where} names the shard {shard}, which is not there. Copy or download the export again.")
        files.append(path)
    return files


# ------------------------------------------------------------------------------------------------ reading


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None


def _read_config(find: Find, where: str | Path) -> LMConfig:
    path = find(CONFIG)
    if path is None:
        killed = sorted(Path(where).glob(".saving-*/old/config.json"))
        hint = f" A save was killed here; the export before it is whole in {killed[-1].parent}." if killed else ""
        raise FileNotFoundError(f"{where} has no {CONFIG}, so it is not an export of memarch. save_pretrained writes one.{hint}")
    data = _read_json(path)
    if not isinstance(data, dict) or data.get("library_name") != "memarch":
        other = data.get("model_type") or data.get("library_name") if isinstance(data, dict) else None
        hint = f" It says {other!r}, a model of another library." if other else ""
        raise ConfigError(f"{where} is not an export of memarch: its {CONFIG} lacks library_name 'memarch'.{hint}")
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT:
        by = f"written by memarch {data.get('memarch_version')}"
        raise ConfigError(f"{where} has format_version {version}, {by}; memarch {__version__} reads up to {FORMAT}. Upgrade memarch.")
    return decode(Export, data, f"{CONFIG} of {where}").model


def _plan(files: Iterable[Path], wanted: Mapping[str, Tensor], where: str | Path, strict: bool) -> dict[Path, list[str]]:
    """Which tensors to take from which file. Names and shapes are compared in the files' headers, before any data is read."""
    plan: dict[Path, list[str]] = {}
    unexpected: list[str] = []
    wrong: dict[str, str] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name not in wanted:
                    unexpected.append(name)
                elif problem := _differs(file.get_slice(name), wanted[name]):
                    wrong[name] = f"{name} {problem}"
                else:
                    plan.setdefault(path, []).append(name)
    missing = sorted(wanted.keys() - wrong.keys() - {name for names in plan.values() for name in names})
    problems = [f"{what}: {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong", [*wrong.values()])) if names]
    if problems and strict:
        raise ValueError(f"the tensors of {where} do not fit its config. {'; '.join(problems)}. strict=False takes what fits and starts the rest afresh.")
    if problems:
        warnings.warn(f"{where} was loaded in part. {'; '.join(problems)}. Missing and wrong ones start afresh.", stacklevel=3)
    return plan


def _read_tensors(plan: Mapping[Path, list[str]], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {}
    for path, names in plan.items():
        with _open(path) as file:
            for name in names:
                x = file.get_tensor(name)
                # A copy, tensor by tensor: what get_tensor gives is a window into the mapped file, unaligned, and dies with the file.
                tensors[name] = x.to(device=device, dtype=dtype if x.is_floating_point() else None, copy=True)
    return tensors


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). It is truncated or of another kind: copy or download it again.") from None


def _differs(stored: Any, want: Tensor) -> str | None:
    shape, dtype = stored.get_shape(), stored.get_dtype()
    if list(shape) != list(want.shape):
        return f"is {list(shape)} in the file and {list(want.shape)} by the config"
    if dtype.startswith(("F", "BF")) != want.is_floating_point():
        return f"is {dtype} in the file and {want.dtype} by the config"
    return None


def _some(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _fill(model: LM, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """Give the meta model its tensors. What no file holds, non-persistent buffers and (not strict) missing tensors, is what a fresh model has."""
    saved = model.state_dict()
    hidden = [name for name, _ in model.named_buffers() if name not in saved]
    missing = [name for name in _tensors(model) if name not in tensors]
    if hidden or missing:
        fresh = LM(model.config)
        values = {**dict(fresh.named_buffers()), **fresh.state_dict()}
        for name in hidden + missing:
            x = values[name]
            tensors[name] = x.to(device=device, dtype=dtype if x.is_floating_point() else None)
    for name in hidden:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensors.pop(name)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.retie()


# ------------------------------------------------------------------------------------------------ the model card


def _render(config: LMConfig, card: Card, name: str) -> str:
    used = _kinds(config)
    front = {"library_name": "memarch", "license": card.license, "tags": list(dict.fromkeys(["memarch", *used, *card.tags]))}
    head = yaml.safe_dump({key: value for key, value in front.items() if value is not None}, sort_keys=False, allow_unicode=True)
    total, active = config.num_params(), config.active_params()
    sparse = f" ({active:,} touched by one token)" if active < total else ""
    blocks = f"{config.layers} blocks of width {config.dim}, pattern `{config.pattern}`" + "".join(f", in {wrapper.kind}" for wrapper in config.wrap)
    kinds = [(f"`{letter}`", getattr(part.mixer, "kind", "none"), getattr(part.ffn, "kind", "none")) for letter, part in config.parts.items()]
    sections = [
        f"# {card.title}",
        f"{total:,} parameters{sparse}: {blocks}. Built with memarch {__version__}.",
        _table([dict(zip(("part", "mixer", "feed-forward"), row, strict=True)) for row in kinds]),
        "\n".join(f"- `{kind}`: {paper}" for kind, paper in used.items() if paper),
        f"## Use\n\n```python\n{_snippet(config, name)}\n```",
    ]
    if card.metrics is not None:
        rows = card.metrics if isinstance(card.metrics, list | tuple) else [{"metric": key, "value": value} for key, value in card.metrics.items()]
        sections.append(f"## Results\n\n{_table(rows)}")
    if card.command is not None:
        sections.append(f"## Regenerate\n\n```bash\n{card.command}\n```")
    made = [f"- {what}: {_plain(value)}" for what in ("data", "hardware", "versions", "seeds") if (value := getattr(card, what)) is not None]
    if made:
        sections.append("## How it was made\n\n" + "\n".join(made))
    sections.append(f"## Configuration\n\n```json\n{json.dumps(encode(config), indent=2)}\n```")
    return f"---\n{head}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _kinds(config: LMConfig) -> dict[str, str]:
    """Every kind in the model and its paper."""
    layers = [layer for part in config.parts.values() for layer in (part.mixer, part.ffn)] + [branch.layer for branch in config.branches]
    return {layer.kind: layer.paper for layer in (*layers, *config.wrap) if layer is not None}


def _snippet(config: LMConfig, name: str) -> str:
    """Lines that run as they stand: in the export's own folder, or anywhere once it is on the Hub."""
    load = f'model = memarch.from_pretrained("{name}")' + ("  # this folder" if name == "." else "")
    if config.embed == "linear" or config.head == "regression":
        given = f"torch.zeros(1, 8, {config.inputs})" if config.embed == "linear" else "torch.zeros(1, 8, dtype=torch.int64)"
        return f"import torch\n\nimport memarch\n\n{load}\ny = model({given}).logits  # [1, 8, {config.outputs or config.vocab_size}]"
    if config.vocab_size == 256:
        loop = 'for piece in generate_text(model, "The ", max_new_tokens=64, temperature=0.8):\n    print(piece, end="")'
        return f"import memarch\nfrom memarch.generation import generate_text\n\n{load}\n{loop}"
    return f"import memarch\n\n{load}\nout = model.generate([[1, 2, 3]], max_new_tokens=16)\nprint(out.tokens[0])"


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_plain(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    """One line of Markdown: numbers and words as they are, what is nested as JSON."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else [("", item) for item in value]
        items = [(key, item) for key, item in items if item is not None]
        if any(isinstance(item, Mapping | list | tuple) for _, item in items):
            return f"`{json.dumps(encode(value), default=str)}`"
        return ", ".join(f"{key} {_plain(item)}".strip() for key, item in items)
    value = value.item() if isinstance(value, Tensor) else value
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
