"""What a merge is worth: every method on the same labels and with the same fine-tuning, over several seeds."""

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
from ..record.entries import Evaluation
from ..record.redaction import without_secrets
from ..runs.prepare import prepare
from .fairness import check_fairness
from .methods import METHODS, Method, source_alone
from .results import OURS, RESULTS, Comparison, Result, kind_of, title_of
from .workbench import Workbench

logger = logging.getLogger(__name__)

CIRCUMSTANCES = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")  # of saving


def compare(
    recipe: Recipe,
    output: str | Path,
    *,
    sizes: Sequence[int | None] = (None,),
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    variants: dict[str, dict[str, Any]] | None = None,
) -> Comparison:
    """Run every method on the same labels, with the same seeds and the same fine-tuning, and save what they reached.

    For each seed the labels are drawn from the training split anew and the sources are put in another order. What a method
    chooses, it chooses by these labels, controls and existing methods by the loss as it is, ours by the calibrated one; the
    test split is looked at once the method is done. Every merged model is fine-tuned in the same number of steps;
    sources alone and their ensemble are not. What a method spends to choose comes on top: learned mixtures take as
    many steps again; ours reads `num_batches` batches per source, with the gate for each half of the labels; and the gate
    trains a model on each of two halves of the labels, in ours also without any source. A run that was stopped goes on
    where it was: what `output` holds already is not run again.

    Args:
        recipe: Base model, sources, data with a split `test`, and the fine-tuning that each method may spend.
        output: Folder for the results.
        sizes: Numbers of labels; `None` is all.
        seeds: One run each.
        methods: Keys of `METHODS` to run; all where left out.
        variants: More rows of ours: a title, and the settings that make it.

    Returns:
        All results that `output` holds now; printed, they are its tables.

    Raises:
        DataError: The comparison would be dishonest: test samples among the training samples, too few test samples, or
            a source with other labels.
        ConfigError: The folder holds another comparison, or an argument is out of range.

    Example:
        >>> print(compare(Recipe.from_yaml("recipe.yaml"), "comparison", sizes=[64, None]))  # doctest: +SKIP
    """
    output, chosen = Path(output), _chosen(methods)
    if not sizes or not all(size is None or size >= 1 for size in sizes):
        raise ConfigError(
            f"sizes: expected at least one number of labels of 1 or more, or None for all, got {[*sizes]}"
        )
    if not seeds:
        raise ConfigError("seeds: expected at least one")
    for seed in seeds:  # the configuration knows which there can be
        replace(recipe.config, seed=seed)
    if recipe.base_model is None:
        raise ConfigError(
            "base_model: expected one in a comparison, or rows such as the average of all would lack the first source; "
            "name the model that the sources were fine-tuned from"
        )
    if own := {"max_steps", "num_train_epochs"} & set(recipe.config.training_arguments):
        raise ConfigError(
            f"training_arguments.{own.pop()}: expected none in a comparison, where each method splits the same budget in its "
            "own way; set final_epochs"
        )
    base, sources, data = prepare(recipe)
    digests = check_fairness(recipe, base, sources, data)
    counts = [len(data.train) if size is None else size for size in sizes]
    if max(counts) > len(data.train):
        raise DataError(
            f"sizes: got {max(counts)}, but the split 'train' has {len(data.train)} samples; expected no more, or None for "
            "all ('all' on the command line)"
        )
    setting = _setting(recipe, digests, model_identities(recipe), variants or {})
    with _held(output):
        done = _continued(output, setting, chosen)
        try:
            for count in counts:
                for seed in seeds:
                    _run_seed(done, output, recipe, base, sources, data, chosen, variants or {}, count, seed)
        finally:
            if done.results:
                done.save_figures(output)
    return done


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Keep other processes out of a folder, whose results each would write over those of the other."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputExistsError(f"'{output}' cannot be written: {error.strerror}; name another folder") from error
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process is at work on the comparison in '{output}'; wait for it, or name another folder"
        ) from None
    try:
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()


def model_identities(recipe: Recipe) -> dict[str, str]:
    """Return what tells the recipe's base and each of its sources from other models of that name.

    The commit of a model on the Hub; of a folder a digest of its weights and of what its configuration says of them.
    """
    references = [*filter(None, [recipe.base_model]), *recipe.sources]
    return {reference: _identity(recipe.locate(reference), recipe) for reference in references}


def _chosen(methods: Sequence[str] | None) -> dict[str, Method]:
    if methods is None:
        return METHODS
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"unknown methods {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    return {name: METHODS[name] for name in METHODS if name in {*methods, OURS}}


def _identity(reference: str, recipe: Recipe) -> str:
    located, _ = look_up(reference, trusted=recipe.config.trust_remote_code)
    if located.sha:
        return located.sha
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (located.folder / name).exists():
            values = json.loads((located.folder / name).read_text(encoding="utf-8"))
            said = {key: value for key, value in values.items() if key not in CIRCUMSTANCES}
            digest.update(json.dumps(said, sort_keys=True).encode())
    for path in sorted([*located.folder.glob("*.safetensors"), *located.folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _setting(
    recipe: Recipe, digests: dict[str, str], models: dict[str, str], variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return what must be the same for results to stand in one table, and the versions that they began with."""
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
    """Return a digest of every file of the package, in every folder, which tells states of one version apart.

    The digest covers names and contents. It leaves out what Python compiles.
    """
    package = package or Path(str(files("grasp_hf")))
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _continued(output: Path, setting: dict[str, Any], methods: Collection[str]) -> Comparison:
    """Return what an earlier run of the same comparison has left in `output`; of `methods`, what could not be run, goes."""
    if not (output / RESULTS).exists():
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise ConfigError(f"'{output}' holds something else; name a new folder for the comparison")
        return Comparison([], setting)
    earlier = Comparison.load(output)
    now = json.loads(json.dumps(setting))
    if earlier.setting["recipe"] != now["recipe"]:
        raise ConfigError(f"'{output}' holds the comparison of another recipe; name a new folder")
    if changed := [name for name, digest in now["digests"].items() if earlier.setting["digests"].get(name) != digest]:
        raise ConfigError(
            f"'{output}' holds a comparison on other data (changed since: {', '.join(changed)}); name a new folder"
        )
    models = earlier.setting.get("models", {})  # earlier versions did not keep it, and so cannot tell
    if changed := [name for name, identity in now["models"].items() if models.get(name) != identity]:
        raise ConfigError(
            f"'{output}' holds a comparison of other models (changed since: {', '.join(changed)}); name a new folder"
        )
    known = earlier.setting["variants"]
    if changed := [name for name, settings in now["variants"].items() if known.get(name, settings) != settings]:
        raise ConfigError(f"'{output}' holds a variant '{changed[0]}' with other settings; name it differently")
    known.update(now["variants"])
    if earlier.setting["versions"] != now["versions"]:
        logger.warning(
            "the results so far were made with %s, those to come with %s", earlier.setting["versions"], now["versions"]
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
    """Run what is missing of one seed."""
    order = [sources[i] for i in _permutation(len(sources), seed)]
    rows: dict[str, tuple[Callable[[Workbench], Evaluation | None], bool]] = {
        f"source:{source}": (partial(source_alone, source=source), False) for source in sources
    }
    rows |= {name: (method.run, method.finetuned) for name, method in methods.items()}
    rows |= {f"variant:{name}": (partial(METHODS[OURS].run, **settings), False) for name, settings in variants.items()}
    finished = {(result.method, result.size, result.seed) for result in done.results}
    missing = {name: row for name, row in rows.items() if (name, count, seed) not in finished}
    if not missing:
        return
    labels = data.train.shuffle(seed=seed).select(range(count))
    config = replace(recipe.config, seed=seed)
    base.config = config
    epochs = config.total_epochs(len(sources))
    with workspace(Path(tempfile.gettempdir()), "grasp_hf-compare-") as directory, ExitStack() as held:
        bench = Workbench(base, order, replace(data, train=labels), epochs=epochs, directory=directory)
        held.callback(bench.begin)  # the next bench starts from what the model holds then
        for method, (run, finetuned) in missing.items():
            began = time.perf_counter()
            try:
                scores = run(bench)
                merged = {} if scores or not finetuned else bench.score()
                if finetuned:
                    bench.finetune(epochs)
                final = scores or bench.score()
                problem = None
            except (GraspError, MemoryError, RuntimeError) as error:
                if not isinstance(error, GraspError) and not _lacks_memory(error):
                    raise
                if kind_of(method) != "existing":
                    message = f"while running '{title_of(method)}' with seed {seed}: {error}"
                    told = error.reworded(message) if isinstance(error, GraspError) else type(error)(message)
                    raise told from error
                merged, final, problem = {}, {}, str(error) or "out of memory"
            result = Result(method, count, seed, merged, final, time.perf_counter() - began, problem)
            done.results.append(result)
            done.save(output)
            shown = ", ".join(f"{key} {value:.3f}" for key, value in final.items()) or f"not run: {problem}"
            logger.info("%d labels, seed %d: %s: %s (%.0f s)", count, seed, title_of(method), shown, result.seconds)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or lacks_memory(error)


def _permutation(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
