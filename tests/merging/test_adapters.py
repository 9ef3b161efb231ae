"""A merge whose output is an adapter: the same decisions and logits as a merge of weights, without a copy of the base."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grasp_hf import GraspConfig, GraspMerger, MergeReport
from grasp_hf.cli import main
from grasp_hf.comparison.run import compare
from grasp_hf.config.recipe import Recipe
from grasp_hf.errors import ConfigError, IncompatibleSourceError
from grasp_hf.runs.lineage import reproduce
from grasp_hf.runs.plan import plan, problem_list
from grasp_hf.tensors.mapped import MappedTensors
from tests.support.hub.server import HubServer
from tests.support.models import NO_TUNING, saved, saved_adapter, tiny_data, tiny_model

BODY = {"vit": ["q_proj", "v_proj", "fc1"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"]}
BODY["llama"] = ["q_proj", "v_proj", "up_proj"]
HEAD = {"modules_to_save": ["classifier"]}
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def model_of(kind: str, seed: int = 0) -> PreTrainedModel:
    if kind != "llama":
        return tiny_model(kind, seed)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(intermediate_size=32, num_key_value_heads=1, **sizes))


def data_of(kind: str, samples: int, seed: int = 0) -> Any:
    return tiny_data("gpt2" if kind == "llama" else kind, samples, seed)


def sources(kind: str, folder: Path) -> tuple[str, list[str]]:
    """Return a base, and three adapters of other ranks and layers; those of a classifier bring a head."""
    base = saved(model_of(kind), folder / "base")
    head = HEAD if kind in ("vit", "bert") else {}
    chosen = [BODY[kind], BODY[kind][:2], BODY[kind]]
    return base, [
        saved_adapter(
            model_of(kind),
            base,
            folder / f"adapter-{k}",
            seed=k,
            r=k + 1,
            lora_alpha=4,
            target_modules=chosen[k],
            **head,
        )
        for k in range(3)
    ]


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    inputs = {key: value for key, value in data_of(kind, 8, seed=9)[:8].items() if key != "labels"}
    return model.eval()(**inputs).logits


def merged(base: str, adapters: list[str], config: dict[str, Any], **data: Any) -> tuple[GraspMerger, MergeReport]:
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**config))
    return merger, merger.merge(adapters, **data)


def decisions(report: MergeReport) -> list[Any]:
    return [(step.source, step.accepted, step.reason, step.chosen) for step in report.steps]


CONFIGS: dict[str, dict[str, Any]] = {
    "average": {"method": "average", **NO_TUNING, "gate": False},
    "average by modules": {"method": "average", "unit": "module", **NO_TUNING},
    "weighted": {**NO_TUNING, "order": "loss"},
    "blend": {"method": "blend", "num_batches": 3, "coefficient_lr": 0.3, **NO_TUNING},
    "blend without gate": {"method": "blend", "num_batches": 3, "gate": False, **NO_TUNING},
    "default": {"final_epochs": 2, "lora": {"r": 2}, "training_arguments": {"learning_rate": 3e-3}},
    "between": {"method": "average", "order": "given", "finetune_epochs": 1, "final_epochs": 0, "lora": {"r": 2}},
}


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_of_adapters_equals_the_merge_of_weights(name: str, kind: str, tmp_path: Path) -> None:
    base, adapters = sources(kind, tmp_path)
    config = {"batch_size": 8, **CONFIGS[name]}
    data: dict[str, Any] = {"train_dataset": data_of(kind, 24), "eval_dataset": data_of(kind, 12, seed=1)}
    whole, expected = merged(base, adapters, config, **data)
    merger, report = merged(base, adapters, {**config, "output": "adapter"}, **data)
    torch.testing.assert_close(logits(merger.model, kind), logits(whole.model, kind), **TOLERANCE)
    if any(step.accepted for step in report.steps):
        assert not torch.allclose(logits(merger.model, kind), logits(model_of(kind), kind), atol=1e-4)
    assert decisions(report) == decisions(expected)
    for ours, theirs in zip(report.steps, expected.steps, strict=True):
        assert ours.after == pytest.approx(theirs.after, abs=1e-5)
        found = {unit.name: (unit.decision, unit.coefficient) for unit in ours.units}
        for unit in theirs.units:
            decision, coefficient = found[unit.name]
            assert (decision, coefficient) == (unit.decision, pytest.approx(unit.coefficient, abs=1e-5))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_card_names_the_base_and_its_code_loads_the_adapter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = sources(kind, tmp_path)
    config = {"method": "average", "output": "adapter", **NO_TUNING}
    merger, _ = merged(base, adapters, config)
    merger.save_pretrained(tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "merged into one LoRA adapter of rank" in card.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    torch.testing.assert_close(logits(scope["model"], kind), logits(merger.model, kind), **TOLERANCE)


@pytest.mark.parametrize("rank", [1, 2, 20])
def test_an_adapter_is_compressed_to_the_best_one_of_its_rank(rank: int, tmp_path: Path) -> None:
    base, adapters = sources("llama", tmp_path)
    config = {"method": "average", "output": "adapter", **NO_TUNING}
    exact = by_peft("llama", base, merged(base, adapters, config)[0], tmp_path / "exact")
    merger, report = merged(base, adapters, {**config, "rank": rank}, eval_dataset=data_of("llama", 12))
    found = by_peft("llama", base, merger, tmp_path / "compressed")
    start = dict(model_of("llama").named_parameters())
    lost, whole = 0.0, 0.0
    for name, weights in exact.items():
        values = torch.linalg.svdvals((weights - start[name]).double()) if weights.ndim == 2 else torch.zeros(1)
        torch.testing.assert_close((found[name] - weights).norm(), values[rank:].norm().float(), atol=1e-5, rtol=0)
        lost, whole = lost + float(values[rank:].square().sum()), whole + float(values.square().sum())
    adapter = report.run.adapter
    assert adapter is not None and adapter.exact_rank == 6 and adapter.rank == min(rank, 6)
    assert adapter.error == pytest.approx((lost / whole) ** 0.5, abs=1e-6)
    assert ("compressed from rank 6" in str(report)) == (rank < 6)
    if rank < 6:
        torch.testing.assert_close(adapter.after["loss"], merger.evaluate(data_of("llama", 12))["loss"])
        assert adapter.before["loss"] != adapter.after["loss"]


def by_peft(kind: str, base: str, merger: GraspMerger, folder: Path) -> dict[str, Tensor]:
    """Return the weights of the base after PEFT merged a saved adapter into them."""
    merger.save_pretrained(folder)
    model = PeftModel.from_pretrained(type(merger.model).from_pretrained(base), str(folder)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "llama"])
def test_peft_loads_the_saved_adapter(kind: str, tmp_path: Path) -> None:
    base, adapters = sources(kind, tmp_path)
    config = {**CONFIGS["default"], "output": "adapter", "batch_size": 8}
    merger, _ = merged(base, adapters, config, train_dataset=data_of(kind, 24))
    merger.save_pretrained(tmp_path / "merged")
    assert not [
        path for path in (tmp_path / "merged").glob("*.safetensors") if path.name != "adapter_model.safetensors"
    ]
    loaded = PeftModel.from_pretrained(type(merger.model).from_pretrained(base), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(loaded, kind), logits(merger.model, kind), **TOLERANCE)
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), kind), logits(merger.model, kind), **TOLERANCE)


def test_an_adapter_that_was_merged_is_continued(tmp_path: Path) -> None:
    """Merging one source more into a saved adapter gives the mean of all."""
    base, adapters = sources("vit", tmp_path)
    config = {"method": "average", "output": "adapter", **NO_TUNING}
    at_once, _ = merged(base, adapters, config)
    first, _ = merged(base, adapters[:2], config)
    first.save_pretrained(tmp_path / "merged")
    again, report = merged(str(tmp_path / "merged"), adapters[2:], config)
    assert [step.name for step in report.steps] == ["adapter-0", "adapter-1", "adapter-2"]
    torch.testing.assert_close(logits(again.model, "vit"), logits(at_once.model, "vit"), **TOLERANCE)
    again.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(type(again.model).from_pretrained(base), str(tmp_path / "again"))
    torch.testing.assert_close(logits(loaded, "vit"), logits(at_once.model, "vit"), **TOLERANCE)


@pytest.mark.parametrize("placebo", [False, True])
def test_controls_equal_those_of_a_merge_of_weights(placebo: bool, tmp_path: Path) -> None:
    base, adapters = sources("llama", tmp_path)
    data: dict[str, Any] = {"train_dataset": data_of("llama", 24)}
    found = []
    for output in ("model", "adapter"):
        config = GraspConfig(output=output, batch_size=8, final_epochs=1, lora={"r": 2})
        merger = GraspMerger.from_pretrained(base, config=config)
        before = logits(merger.model, "llama")
        losses = merger.control_merge(adapters, data_of("llama", 16, 5), config, placebo=placebo, **data)
        assert torch.equal(logits(merger.model, "llama"), before)
        alone = merger.finetuned_alone(3, data_of("llama", 16, 5), **data)
        assert torch.equal(logits(merger.model, "llama"), before)
        merger.merge(adapters, **data)
        found.append((losses.losses, alone.losses, logits(merger.model, "llama")))
    for whole, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=0)


def test_what_is_undone_leaves_nothing_in_the_adapter(tmp_path: Path) -> None:
    """A source that harms is undone and its block is removed; an adapter without any source loads and changes nothing."""
    base, adapters = sources("llama", tmp_path)
    trained = GraspMerger.from_pretrained(
        base,
        config=GraspConfig(output="adapter", final_epochs=8, batch_size=4, training_arguments={"learning_rate": 0.03}),
    )
    data: dict[str, Any] = {"train_dataset": data_of("llama", 24), "eval_dataset": data_of("llama", 24)}
    trained.merge(adapters[:1], **data)
    trained.save_pretrained(tmp_path / "trained")
    harmful = {"method": "average", "output": "adapter", **NO_TUNING}
    merger, report = merged(str(tmp_path / "trained"), [str(save_large(base, tmp_path))], harmful, **data)
    assert not report.steps[-1].accepted
    assert torch.equal(logits(merger.model, "llama"), logits(trained.model, "llama"))
    merger.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "again")]
    assert [{key: value.shape for key, value in file.items()} for file in files][0] == {
        key: value.shape for key, value in files[1].items()
    }
    none, report = merged(base, [str(tmp_path / "large")], {**harmful}, **data)
    assert not report.steps[0].accepted
    none.save_pretrained(tmp_path / "none")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(tmp_path / "none"))
    torch.testing.assert_close(logits(loaded, "llama"), logits(model_of("llama"), "llama"))


def save_large(base: str, folder: Path) -> Path:
    """Write an adapter with a large random change."""
    config: dict[str, Any] = {"r": 4, "lora_alpha": 400, "target_modules": ["lm_head"]}
    return Path(saved_adapter(model_of("llama"), base, folder / "large", seed=9, **config))


def test_an_error_leaves_the_mixture_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters = sources("llama", tmp_path)
    config = GraspConfig(output="adapter", batch_size=8, order="given", finetune_epochs=1, final_epochs=0)
    merger = GraspMerger.from_pretrained(base, config=config)
    data = {"train_dataset": data_of("llama", 24)}
    merger.merge(adapters[:1], **data)
    before = logits(merger.model, "llama")

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grasp_hf.merging.step.Finetuning.run", fail)
        with pytest.raises(KeyboardInterrupt):
            merger.merge(adapters[1:2], **data)
    assert torch.equal(logits(merger.model, "llama"), before)
    merger.merge(adapters[1:2], **data)
    assert not torch.allclose(logits(merger.model, "llama"), before, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "copy"}, "method: got 'copy'.*gradients of whole weights"),
        ({"order": "rank"}, "order: got 'rank'"),
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 4, "output": "model"}, "rank: got 4.*output='adapter'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GraspConfig(**{"output": "adapter", **settings})


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"bias": "all"}]
)
def test_fine_tuning_by_more_than_plain_lora_is_refused_before_the_first_source(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    base, adapters = sources("vit", tmp_path)
    before = dict(model_of("vit").named_parameters())
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(output="adapter", lora=lora))
    with pytest.raises(ConfigError, match="lora: .*expected none|lora: .*also changes"):
        merger.merge(adapters, train_dataset=data_of("vit", 12))
    found = dict(merger.model.named_parameters())
    assert not merger.report.steps and all(torch.equal(found[name], value) for name, value in before.items())


def test_other_verbs_say_that_they_need_whole_weights(tmp_path: Path) -> None:
    base, adapters = sources("llama", tmp_path)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(output="adapter"))
    with pytest.raises(ConfigError, match="cannot be ranked by gain"):
        merger.rank(adapters, train_dataset=data_of("llama", 8))
    with pytest.raises(ConfigError, match="got 'model', but the model holds a mixture"):
        GraspMerger(merger.model)
    with pytest.raises(IncompatibleSourceError, match="is an adapter; expected a full model to start from"):
        GraspMerger.from_pretrained(adapters[0], config=GraspConfig(output="adapter"))
    merger.merge(adapters[:1], train_dataset=data_of("llama", 8))
    merger.save_pretrained(tmp_path / "merged")
    with pytest.raises(ConfigError, match="output: got 'model', but .* is an adapter; expected 'adapter'"):
        GraspMerger.from_pretrained(str(tmp_path / "merged"))


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_the_report_names_another_base_that_an_adapter_was_trained_on(output: str, tmp_path: Path) -> None:
    base, adapters = sources("llama", tmp_path)
    adapters_of("org/base-in-4-bits", adapters[:1])
    settings = {"method": "average", "accepted_bases": ["org/base-in-4-bits"], "output": output, **NO_TUNING}
    _, report = merged(base, adapters, settings)
    note = "trained on 'org/base-in-4-bits', which accepted_bases declares to be the base"
    assert [step.notes for step in report.steps] == [[note], [], []]
    assert note in " ".join(report.conclusions())


def test_temporary_files_are_small_and_the_base_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=512, **sizes)).bfloat16()
    base = saved(model, tmp_path / "base")
    adapter = saved_adapter(model, base, tmp_path / "adapter", r=8, target_modules="all-linear")
    written: dict[Path, int] = {}
    make = MappedTensors.__init__

    def count(self: MappedTensors, path: Path, like: Any) -> None:
        make(self, path, like)
        written[path] = path.stat().st_size

    monkeypatch.setattr(MappedTensors, "__init__", count)
    settings = GraspConfig(output="adapter", batch_size=4, final_epochs=1, lora={"r": 2})
    merger = GraspMerger.from_pretrained(base, config=settings)
    merger.merge([adapter], train_dataset=data_of("llama", 8), eval_dataset=data_of("llama", 8))
    assert len(written) >= 5
    assert sum(written.values()) <= Path(adapter, "adapter_model.safetensors").stat().st_size
    assert sum(written.values()) < Path(base, "model.safetensors").stat().st_size / 10


def test_a_comparison_needs_whole_weights(tmp_path: Path) -> None:
    base, adapters = sources("llama", tmp_path)
    recipe = Recipe.from_dict({"base_model": base, "sources": adapters, "output": "adapter"})
    with pytest.raises(ConfigError, match="output: got 'adapter', expected 'model' in a comparison"):
        compare(recipe, tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()


def test_an_adapter_is_pushed_appended_to_and_reproduced(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.chdir(tmp_path)
    base, adapters = sources("llama", tmp_path)
    sha = hub.add_repo("org/adapted-base", base)
    for number, folder in enumerate(adapters):
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "org/adapted-base"
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        hub.add_repo(f"org/adapted-{number}", folder)
    settings: dict[str, Any] = {"method": "average", "output": "adapter", **NO_TUNING}
    recipe = {"base_model": "org/adapted-base", "sources": ["org/adapted-0", "org/adapted-1"], **settings}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", "recipe.yaml", "--output", "out", "--push-to-hub", "alice/adapted"]) == 0
    pushed = Path(huggingface_hub.snapshot_download("alice/adapted"))
    assert {path.suffix for path in pushed.iterdir()} >= {".safetensors", ".json", ".md"}
    assert not (pushed / "model.safetensors").exists()
    card = ModelCard.load(pushed / "README.md").data
    assert (card.base_model, card.base_model_relation) == (["org/adapted-base"], "adapter")
    config = json.loads((pushed / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/adapted-base", sha)

    assert not reproduce("alice/adapted").differences
    assert main(["append", "alice/adapted", "org/adapted-2", "--output", "appended"]) == 0
    whole, _ = merged(base, adapters_of(base, adapters), {**settings, "output": "model"})
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), "appended")
    torch.testing.assert_close(logits(loaded, "llama"), logits(whole.model, "llama"), **TOLERANCE)


def adapters_of(base: str, adapters: list[str]) -> list[str]:
    """Return the adapters after they were changed to name `base`."""
    for folder in adapters:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
    return adapters


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_stays_quantized(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="a quantized base needs bitsandbytes")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    config = LlamaConfig(intermediate_size=64, **sizes)
    base = saved(LlamaForCausalLM(config), tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    stored = LlamaForCausalLM.from_pretrained(base, quantization_config=quantization)
    stored.save_pretrained(tmp_path / "stored")
    adapters = [
        saved_adapter(
            LlamaForCausalLM(config),
            str(tmp_path / "stored"),
            tmp_path / f"{seed}",
            seed=seed,
            target_modules=BODY["llama"],
        )
        for seed in (1, 2)
    ]
    recipe = Recipe.from_dict(
        {
            "base_model": str(tmp_path / "stored"),
            "sources": adapters,
            "output": "adapter",
            "method": "average",
            **NO_TUNING,
        }
    )
    assert not problem_list(plan(recipe))
    settings = GraspConfig(output="adapter", batch_size=8, final_epochs=1, rank=3, lora={"r": 2})
    merger = GraspMerger.from_pretrained(str(tmp_path / "stored"), config=settings)
    report = merger.merge(adapters, train_dataset=data_of("llama", 16), eval_dataset=data_of("llama", 16))
    assert report.run.adapter and report.run.adapter.base == f"{bits} bits" and report.run.adapter.rank <= 3
    assert type(merger.model.get_submodule("model.layers.0.mlp.up_proj")).__name__.startswith(f"Linear{bits}bit")
    merger.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "stored"), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(again, "llama"), logits(merger.model, "llama"), **TOLERANCE)
    with pytest.raises(IncompatibleSourceError, match="its weights are quantized"):
        GraspMerger.from_pretrained(str(tmp_path / "stored"))
