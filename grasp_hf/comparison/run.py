"""Runs every method of a comparison on the same labels with the same fine-tuning, over several seeds."""

import hashlib
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..config.recipe import Recipe
from ..data.samples import Samples
from ..errors import ConfigError, DataError, GraspError, OutputExistsError
from ..files import LOCK, workspace
from ..hub.download import look_up
from ..internals import lacks_memory
from ..record.redaction import without_secrets
from ..runs.prepare import prepare
from ..validation.losses import SampleLosses
from .fairness import check_fairness
from .methods import METHODS, Method, load_source
from .results import OURS, RESULTS, Comparison, Result, kind_of, title_of
from .workbench import Workbench

logger = logging.getLogger(__name__)

# Keys of a configuration that depend on where and with which versions a model was saved, not on the model.
MOST_UNLABELED = 512  # training samples that a run does not label, and that `taught` reads without their labels
CIRCUMSTANCES = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")


def compare(
    recipe: Recipe,
    output: str | Path,
    *,
    sizes: Sequence[int | None] = (None,),
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    variants: dict[str, dict[str, Any]] | None = None,
) -> Comparison:
    """Run every method on the same labels, with the same seeds and the same fine-tuning, and save the results.

    Each seed draws labels from the training split and shuffles the sources. A method chooses by these labels only:
    controls and existing methods by the plain loss, ours by the calibrated loss. The finished method is scored on the
    test split. Every merged model is fine-tuned in the same number of steps; the sources alone and their ensemble are
    not fine-tuned. The steps by which a method chooses are extra. Learned mixtures take as many steps again. Ours
    reads `num_batches` batches per source, with the gate for each half of the labels. The gate trains one model on
    each half of the labels, in ours also without any source.

    A stopped comparison continues: results in `output` are not computed again.

    Args:
        recipe: Base model, sources, data with a split `test`, and the fine-tuning that each method may spend.
        output: Folder for the results.
        sizes: Numbers of labels; `None` means all.
        seeds: Seeds, each of which is one run.
        methods: Keys of `METHODS` to run; by default all. Every source alone and ours always run.
        variants: Settings that replace those of the recipe, by the title of the row. Each variant is another row of
            ours.

    Returns:
        All results that `output` holds; `str` gives their tables.

    Raises:
        DataError: The comparison would be unfair: test samples are also training samples, the test samples are too
            few, or a source has other labels.
        ConfigError: The folder holds another comparison, or an argument is out of range.
        OutputExistsError: The folder cannot be written.

    Example:
        >>> print(compare(Recipe.from_yaml("recipe.yaml"), "comparison", sizes=[64, None]))  # doctest: +SKIP
    """
    output, chosen = Path(output), _choose_methods(methods)
    if not sizes or not all(size is None or size >= 1 for size in sizes):
        raise ConfigError(
            f"sizes: expected at least one number of labels, each 1 or more or None for all, got {[*sizes]}"
        )
    if not seeds:
        raise ConfigError("seeds: expected at least one, got none")
    for seed in seeds:  # the configuration checks the range of a seed
        replace(recipe.config, seed=seed)
    if recipe.config.adapts:
        raise ConfigError(
            "output: got 'adapter', expected 'model' in a comparison, because many of its methods mix whole weights"
        )
    if recipe.base_model is None:
        raise ConfigError(
            "base_model: expected one in a comparison, because without it the first source is the base, and rows such "
            "as the average of all lack it; name the model that the sources were fine-tuned from"
        )
    if own := {"max_steps", "num_train_epochs"} & set(recipe.config.training_arguments):
        raise ConfigError(
            f"training_arguments.{own.pop()}: expected none in a comparison, because each method splits the same "
            "number of epochs in its own way; set final_epochs"
        )
    base, sources, data = prepare(recipe)
    digests = check_fairness(recipe, base, sources, data)
    counts = [len(data.train) if size is None else size for size in sizes]
    if max(counts) > len(data.train):
        raise DataError(
            f"sizes: got {max(counts)}, but the split 'train' has {len(data.train)} samples; expected no more, or "
            "None for all ('all' on the command line)"
        )
    setting = _setting(recipe, digests, model_identities(recipe), variants or {})
    with _locked(output):
        done = _load_earlier(output, setting, chosen)
        try:
            for count in counts:
                for seed in seeds:
                    _run_seed(done, output, recipe, base, sources, data, chosen, variants or {}, count, seed)
        finally:
            if done.results:
                done.save_figures(output)
    return done


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Make and lock the folder, because two processes would overwrite each other's results."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(f"'{output}' cannot be written: {error.strerror}; name another folder") from error
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process is running the comparison in '{output}'; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()


def model_identities(recipe: Recipe) -> dict[str, str]:
    """Return an identity of the recipe's base and of each source, which differs for other models of the same name.

    For a model on the Hub it is the commit; for a folder, a digest of its weights and its configuration.
    """
    references = [*filter(None, [recipe.base_model]), *recipe.sources]
    return {reference: _identity(recipe.locate(reference), recipe) for reference in references}


def _choose_methods(methods: Sequence[str] | None) -> dict[str, Method]:
    if methods is None:
        return METHODS
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"methods: got {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    return {name: METHODS[name] for name in METHODS if name in {*methods, OURS}}


def _identity(reference: str, recipe: Recipe) -> str:
    located, _ = look_up(reference, trusted=recipe.config.trust_remote_code)
    if located.sha:
        return located.sha
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (located.folder / name).exists():
            values = json.loads((located.folder / name).read_text(encoding="utf-8"))
            kept = {key: value for key, value in values.items() if key not in CIRCUMSTANCES}
            digest.update(json.dumps(kept, sort_keys=True).encode())
    for path in sorted([*located.folder.glob("*.safetensors"), *located.folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _setting(
    recipe: Recipe, digests: dict[str, str], models: dict[str, str], variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the setting that all results of one table share, and the present versions."""
    packages = ("grasp_hf", "torch", "transformers", "peft")
    return {
        "recipe": {
            "base_model": recipe.base_model,
            "sources": recipe.sources,
            "task": recipe.task,
            "data": without_secrets(recipe.data),
            **asdict(recipe.config),
        },
        "digests": digests,
        "models": models,
        "variants": variants,
        "versions": {name: version(name) for name in packages} | {"code": code_digest()},
    }


def code_digest(package: Path | None = None) -> str:
    """Return a digest of the names and contents of all files of the package; it tells states of one version apart.

    Compiled files of Python are left out.

    Args:
        package: Folder of the package; by default that of `grasp_hf`.
    """
    package = package or Path(str(files("grasp_hf")))
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _load_earlier(output: Path, setting: dict[str, Any], methods: Collection[str]) -> Comparison:
    """Return the results of the same comparison in `output`, without those of `methods` that could not run.

    Raises:
        ConfigError: The folder holds something else, or the comparison of another setting.
    """
    if not (output / RESULTS).exists():
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise ConfigError(
                f"'{output}' holds files but no '{RESULTS}', so it is not a comparison; name a new folder"
            )
        return Comparison([], setting)
    earlier = Comparison.load(output)
    now = json.loads(json.dumps(setting))
    if earlier.setting["recipe"] != now["recipe"]:
        raise ConfigError(f"'{output}' holds the comparison of another recipe; name a new folder")
    if changed := [name for name, digest in now["digests"].items() if earlier.setting["digests"].get(name) != digest]:
        raise ConfigError(
            f"'{output}' holds a comparison on other data (changed since: {', '.join(changed)}); name a new folder"
        )
    models = earlier.setting.get("models", {})  # the first version did not record models
    if changed := [name for name, identity in now["models"].items() if models.get(name) != identity]:
        raise ConfigError(
            f"'{output}' holds a comparison of other models (changed since: {', '.join(changed)}); name a new folder"
        )
    known = earlier.setting["variants"]
    if changed := [name for name, settings in now["variants"].items() if known.get(name, settings) != settings]:
        raise ConfigError(
            f"'{output}' holds a variant '{changed[0]}' with other settings: got {now['variants'][changed[0]]}, "
            f"expected {known[changed[0]]}; give the new variant another title"
        )
    known.update(now["variants"])
    if earlier.setting["versions"] != now["versions"]:
        logger.warning(
            "the earlier results in '%s' were computed with other versions: %s; the new ones will be computed with %s",
            output,
            earlier.setting["versions"],
            now["versions"],
        )
    earlier.results = [result for result in earlier.results if not (result.problem and result.method in methods)]
    return earlier


def _run_seed(
    done: Comparison,
    output: Path,
    recipe: Recipe,
    base: Any,
    sources: list[str],
    data: Samples,
    methods: dict[str, Method],
    variants: dict[str, dict[str, Any]],
    count: int,
    seed: int,
) -> None:
    """Run the methods that have no result for this seed and number of labels."""
    order = [sources[i] for i in _permutation(len(sources), seed)]
    rows: dict[str, tuple[Callable[[Workbench], SampleLosses | None], bool]] = {
        f"source:{source}": (partial(load_source, source=source), False) for source in sources
    }
    has_unlabeled = data.unlabeled is not None or count < len(data.train)
    methods = {name: method for name, method in methods.items() if has_unlabeled or not method.needs_unlabeled}
    rows |= {name: (method.run, method.finetuned) for name, method in methods.items()}
    rows |= {f"variant:{name}": (partial(METHODS[OURS].run, **settings), False) for name, settings in variants.items()}
    finished = {(result.method, result.size, result.seed) for result in done.results}
    missing = {name: row for name, row in rows.items() if (name, count, seed) not in finished}
    if not missing:
        return
    shuffled = data.train.shuffle(seed=seed)
    labels = shuffled.select(range(count))
    rest = [*range(count, min(len(shuffled), count + MOST_UNLABELED))]
    unlabeled = shuffled.select(rest) if rest and data.unlabeled is None else data.unlabeled
    config = replace(recipe.config, seed=seed)
    base.config = config
    epochs = config.total_epochs(len(sources))
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-compare-") as directory, ExitStack() as stack:
        bench = Workbench(
            base, order, replace(data, train=labels), unlabeled=unlabeled, epochs=epochs, directory=directory
        )
        stack.callback(bench.restore_base)  # the next workbench starts from the weights of the model
        for method, (run, finetuned) in missing.items():
            began = time.perf_counter()
            losses: dict[str, SampleLosses] = {}
            problem = None
            try:
                final = run(bench)
                if finetuned:
                    losses["merged"] = bench.test()
                    bench.finetune(epochs)
                losses["final"] = final or bench.test()
            except (GraspError, MemoryError, RuntimeError) as error:
                if not isinstance(error, GraspError) and not _lacks_memory(error):
                    raise
                if kind_of(method) != "existing":
                    message = f"while running '{title_of(method)}' with seed {seed}: {error}"
                    reworded = error.reworded(message) if isinstance(error, GraspError) else type(error)(message)
                    raise reworded from error
                losses, problem = {}, str(error) or "out of memory"
            result = Result.of(method, count, seed, losses, time.perf_counter() - began, problem)
            done.results.append(result)
            done.save(output)
            outcome = ", ".join(f"{key} {value:.3f}" for key, value in result.final.items()) or f"not run: {problem}"
            logger.info("%d labels, seed %d: %s: %s (%.0f s)", count, seed, title_of(method), outcome, result.seconds)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or lacks_memory(error)


def _permutation(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
