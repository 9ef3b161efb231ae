"""References, and the source in a folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grasp_hf.errors import IncompatibleSourceError, SourceNotFoundError
from grasp_hf.hub.download import locate
from grasp_hf.hub.reference import Source, SourceRef
from tests.support.models import copied, saved, saved_adapter, tiny_model


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny_model("vit"), tmp_path_factory.mktemp("models") / "vit")


def inspect(folder: Path) -> Source:
    return Source.inspect(SourceRef(str(folder)), folder)


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("org/name", "org/name", None),
        ("gpt2", "gpt2", None),
        ("org/name@v1.0", "org/name", "v1.0"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name@" + "a" * 40, "org/name", "a" * 40),
    ],
)
def test_hub_references(text: str, name: str, revision: str | None) -> None:
    ref = SourceRef.parse(text)
    assert (ref.name, ref.revision, ref.is_local) == (name, revision, False)
    assert str(ref) == text


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "a@b").mkdir(parents=True)
    assert SourceRef.parse(str(tmp_path)) == SourceRef(str(tmp_path), None)
    assert SourceRef.parse(str(tmp_path)).is_local
    monkeypatch.chdir(tmp_path)
    assert SourceRef.parse("models/a@b") == SourceRef("models/a@b", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SourceRef.parse("~/models") == SourceRef(str(tmp_path / "models"), None)


@pytest.mark.parametrize(
    "text", ["", "@v1", "org/name@", "./nowhere", "../nowhere@v1", "/nowhere/at/all", "~/nowhere", "a//b", "a/b/@v1"]
)
def test_a_reference_to_nothing(text: str) -> None:
    with pytest.raises(SourceNotFoundError, match=f"^'{text}' is neither an existing folder nor a Hub id"):
        SourceRef.parse(text)


def test_a_folder_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceNotFoundError, match="'models/a@v1'"):
        SourceRef.parse("models/a@v1")


def test_a_full_model(vit: str) -> None:
    source = inspect(Path(vit))
    assert (source.kind, source.sha, source.folder) == ("full", None, Path(vit))
    assert [path.name for path in source.weight_files] == ["model.safetensors"]
    assert source.num_bytes == (Path(vit) / "model.safetensors").stat().st_size > 0
    assert source.dtypes() == {"F32"}


def test_an_adapter(tmp_path: Path) -> None:
    source = inspect(Path(saved_adapter(tiny_model("vit"), "org/base", tmp_path / "a", target_modules=["q_proj"])))
    assert source.kind == "adapter"
    assert [path.name for path in source.weight_files] == ["adapter_model.safetensors"]
    assert source.dtypes() == {"F32"}


def test_shards(tmp_path: Path) -> None:
    model = tiny_model("vit").bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    source = inspect(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert source.kind == "full" and len(source.weight_files) > 1
    assert source.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert source.dtypes() == {"BF16"}


def test_pickled_weights_only(vit: str, tmp_path: Path) -> None:
    folder = copied(vit, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("vit").state_dict(), folder / "pytorch_model.bin")
    source = inspect(folder)
    assert [path.name for path in source.weight_files] == ["pytorch_model.bin"]
    assert source.num_bytes == (folder / "pytorch_model.bin").stat().st_size
    assert source.dtypes() == set()


def test_safetensors_come_before_pickles(vit: str, tmp_path: Path) -> None:
    folder = copied(vit, tmp_path / "both")
    torch.save({}, folder / "pytorch_model.bin")
    assert [path.name for path in inspect(folder).weight_files] == ["model.safetensors"]


def test_all_dtypes_are_found(vit: str, tmp_path: Path) -> None:
    folder = copied(vit, tmp_path / "mixed")
    save_file({"a": torch.ones(1), "b": torch.ones(1).half(), "c": torch.ones(1).long()}, folder / "model.safetensors")
    assert inspect(folder).dtypes() == {"F32", "F16", "I64"}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"holds no config.json and no adapter_config.json.*found: no files"):
        inspect(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SourceNotFoundError, match=r"neither a model nor an adapter; found: notes.txt"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("config.json", "model.safetensors, model.safetensors.index.json"),
        ("adapter_config.json", "adapter_model.safe"),
    ],
)
def test_no_weights(config: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / config).write_text("{}")
    with pytest.raises(SourceNotFoundError, match=rf"holds no weights: expected one of {expected}.*; found: {config}"):
        inspect(tmp_path)


def test_the_folders_of_a_training_run_are_named(vit: str, tmp_path: Path) -> None:
    """A folder of the Trainer may hold a configuration, but its weights are in `checkpoint-*`."""
    for step in (500, 1000, 90):
        copied(vit, tmp_path / "run" / f"checkpoint-{step}")
    message = "a model or adapter is in checkpoint-1000, checkpoint-500, checkpoint-90: name the one to use, such as"
    for file in ("trainer_state.json", "config.json"):
        (tmp_path / "run" / file).write_text("{}")
        with pytest.raises(SourceNotFoundError, match=rf"run' holds no .*{message} '.*run/checkpoint-1000'$"):
            inspect(tmp_path / "run")
    inspect(tmp_path / "run" / "checkpoint-1000")


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        (
            "zero_to_fp32.py",
            "DeepSpeed has saved a part of the weights for each process: join them with its zero_to_fp32",
        ),
        (
            "pytorch_model_fsdp_0/__0_0.distcp",
            "FSDP has saved a part of the weights .*: join them with `accelerate merge",
        ),
    ],
)
@pytest.mark.parametrize("folder", [".", "checkpoint-5"])
def test_weights_in_parts_are_named(file: str, advice: str, folder: str, tmp_path: Path) -> None:
    for name in ("config.json", file):
        (tmp_path / folder / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / folder / name).write_text("{}")
    with pytest.raises(SourceNotFoundError, match=f"holds no .*; {advice}"):
        inspect(tmp_path)


def test_the_folders_of_named_adapters_are_named(tmp_path: Path) -> None:
    model = tiny_model("vit")
    saved_adapter(model, "org/base", tmp_path / "both" / "french", target_modules=["q_proj"])
    (tmp_path / "both" / "logs").mkdir()
    (tmp_path / "both" / "logs" / "config.json").write_text("{}")
    with pytest.raises(SourceNotFoundError, match="a model or adapter is in french: name the one .*both/french'$"):
        inspect(tmp_path / "both")


def test_the_folders_of_a_repository_are_named() -> None:
    files = ["README.md"]
    below = ["checkpoint-2/adapter_config.json", "checkpoint-2/adapter_model.safetensors", "onnx/model.onnx"]
    with pytest.raises(
        SourceNotFoundError, match="is in checkpoint-2: name the one to use, such as 'org/a/checkpoint-2"
    ):
        Source.inspect(SourceRef("org/a"), Path(), "sha", files=files, below=below)
    ref = SourceRef("org/a", "v1", "runs")
    with pytest.raises(SourceNotFoundError, match="such as 'org/a/runs/checkpoint-2@v1'"):
        Source.inspect(ref, Path(), "sha", files=files, below=below)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 17\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
)
def test_a_pointer_of_git_lfs_is_no_file(name: str, tmp_path: Path) -> None:
    tiny_model("vit").save_pretrained(tmp_path, max_shard_size="4KB" if "-" in name or "index" in name else "1GB")
    found = sorted(tmp_path.glob(name.replace("00002", "*")))[0]
    found.write_text(POINTER)
    message = f"^'{tmp_path}': {found.name}: got a git-LFS pointer, not the file itself; run `git lfs pull`"
    with pytest.raises(SourceNotFoundError, match=message):
        inspect(tmp_path)


def test_a_truncated_file(vit: str, tmp_path: Path) -> None:
    folder = copied(vit, tmp_path / "cut")
    content = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(IncompatibleSourceError, match=r"cut': model.safetensors cannot be read as safetensors: "):
            inspect(folder).dtypes()


def save_shards(folder: Path) -> list[str]:
    """Save a model in shards, and a shard of an earlier version; return the names of the current shards."""
    tiny_model("vit").save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    (folder / "model-00001-of-00099.safetensors").write_bytes((folder / shards[0]).read_bytes())
    return shards


def test_the_index_says_which_files_are_the_model(tmp_path: Path) -> None:
    shards = save_shards(tmp_path)
    assert [path.name for path in inspect(tmp_path).weight_files] == shards
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert [path.name for path in inspect(tmp_path).weight_files] == ["model.safetensors"], "as transformers does"


def test_shards_of_another_name(tmp_path: Path) -> None:
    shards = save_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / shards[0]).rename(tmp_path / "first.safetensors")
    index.write_text(index.read_text().replace(shards[0], "first.safetensors"))
    assert [path.name for path in inspect(tmp_path).weight_files] == ["first.safetensors", *shards[1:]]


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    shards = save_shards(tmp_path)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(SourceNotFoundError, match=f"is not complete: {shards[1]} missing"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as an index of weight files"),
        ("[]", "cannot be read as an index of weight files"),
        (
            '{"weight_map": {"a": "../secret.safetensors"}}',
            "lists '../secret.safetensors', expected only files in its own",
        ),
    ],
)
def test_a_file_that_is_not_an_index(content: str, message: str, tmp_path: Path) -> None:
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(IncompatibleSourceError, match=f"model.safetensors.index.json {message}"):
        locate(str(tmp_path))
