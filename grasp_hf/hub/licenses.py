"""The licence that a merge should declare, given the licences of its parents.

The module has a table of the licence ids of the Hub, and rules for two licences in one model. It is no legal advice:
it reads the ids on model cards, not the texts of the licences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations
from typing import Any, Literal

from ..errors import one_line

OTHER = "other"  # the id of the Hub for a licence that is not in its list
UNCLEAR = (OTHER, "unknown", "cc")  # `cc` is a family of licences, from public domain to no derivatives


class Strictness(IntEnum):
    """Classes of licences, from the fewest to the most obligations for a person who shares a model."""

    PERMISSIVE = 0
    ATTRIBUTION = 1
    WEAK_COPYLEFT = 2
    COPYLEFT = 3
    NETWORK_COPYLEFT = 4
    USE_RESTRICTED = 5
    NON_COMMERCIAL = 6
    NO_DERIVATIVES = 7


Bond = Literal["free", "same", "terms"]


@dataclass(frozen=True)
class License:
    """One row of the table.

    Attributes:
        name: Id on the Hub.
        strictness: Class of the licence.
        bond: Obligation for a merge. `free` allows any stricter licence, `same` requires this licence or one of its
            `SUCCESSORS`, `terms` requires that its own terms are passed on.
        place: Index in the table. Of two licences in one class, the later one has more obligations or is newer.
    """

    name: str
    strictness: Strictness
    bond: Bond
    place: int


# The ids are those of https://huggingface.co/docs/hub/repositories-licenses, which are those of
# https://spdx.org/licenses if SPDX has the licence. Each class is sorted from the fewest to the most obligations, and
# from old to new.
_CLASSES: tuple[tuple[Strictness, Bond, str], ...] = (
    (
        Strictness.PERMISSIVE,
        "free",
        "cc0-1.0 pddl unlicense wtfpl c-uda zlib bsl-1.0 postgresql isc mit ncsa bsd bsd-2-clause bsd-3-clause "
        "bsd-3-clause-clear openmdw-1.0 afl-3.0 ecl-2.0 artistic-2.0 apache-2.0",
    ),
    (
        Strictness.ATTRIBUTION,
        "free",
        "cdla-permissive-1.0 cdla-permissive-2.0 etalab-2.0 odc-by cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0",
    ),
    (
        Strictness.WEAK_COPYLEFT,
        "same",
        "ms-pl lppl-1.3c ofl-1.1 lgpl-lr mpl-2.0 epl-1.0 epl-2.0 lgpl lgpl-2.1 lgpl-3.0",
    ),
    (
        Strictness.COPYLEFT,
        "same",
        "cdla-sharing-1.0 odbl gfdl cc-by-sa-3.0 cc-by-sa-4.0 osl-3.0 eupl-1.1 eupl-1.2 gpl gpl-2.0 gpl-3.0",
    ),
    (Strictness.NETWORK_COPYLEFT, "same", "agpl-3.0"),
    (
        Strictness.USE_RESTRICTED,
        "terms",
        "openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
        "gemma llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community",
    ),
    (Strictness.NON_COMMERCIAL, "free", "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0"),
    (Strictness.NON_COMMERCIAL, "same", "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0"),
    (
        Strictness.NON_COMMERCIAL,
        "terms",
        "deepfloyd-if-license apple-amlr intel-research h-research fair-noncommercial-research-license",
    ),
    (Strictness.NO_DERIVATIVES, "free", "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0"),
)

_ROWS = [(name, strictness, bond) for strictness, bond, names in _CLASSES for name in names.split()]
LICENSES = {name: License(name, strictness, bond, place) for place, (name, strictness, bond) in enumerate(_ROWS)}

# Other licences that a `same` licence allows by its own text: section 3 of LGPL 2.1, LGPL 3.0 (which is GPL 3.0 with
# more permissions), section 13 of GPL 3.0, the secondary licences of MPL 2.0, later versions of CC share-alike.
SUCCESSORS: dict[str, frozenset[str]] = {
    "mpl-2.0": frozenset({"lgpl-2.1", "lgpl-3.0", "gpl-2.0", "gpl-3.0", "agpl-3.0"}),
    "lgpl-2.1": frozenset({"gpl-2.0", "gpl-3.0", "agpl-3.0"}),
    "lgpl-3.0": frozenset({"gpl-3.0", "agpl-3.0"}),
    "lgpl": frozenset({"gpl"}),
    "gpl-3.0": frozenset({"agpl-3.0"}),
    "cc-by-sa-3.0": frozenset({"cc-by-sa-4.0"}),
    "cc-by-nc-sa-2.0": frozenset({"cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"}),
    "cc-by-nc-sa-3.0": frozenset({"cc-by-nc-sa-4.0"}),
}
# Pairs that cannot be combined, see https://www.gnu.org/licenses/license-list.html.
EXCLUDED = frozenset({frozenset({"apache-2.0", "gpl-2.0"})})

LIMITS = {
    Strictness.WEAK_COPYLEFT: "requires the same licence on derived models",
    Strictness.COPYLEFT: "requires the same licence on derived models",
    Strictness.NETWORK_COPYLEFT: "requires the same licence on derived models, also if they are only served",
    Strictness.USE_RESTRICTED: "restricts the uses of the merge, and requires that its terms are passed on",
    Strictness.NON_COMMERCIAL: "allows no commercial use of the merge",
}


def license_of(metadata: Any) -> str | None:
    """Return the licence in the metadata of a model card, several licences as one text; `None` if there is none."""
    found = metadata.get("license")
    if isinstance(found, list):
        found = ", ".join(map(str, found[:10]))
    return None if found is None else clean_license(str(found))


def clean_license(text: str) -> str:
    """Return a licence as a stranger wrote it in one short line, without the backticks that would end code in Markdown."""
    return one_line(text, 100).replace("`", "'")


def strictest(licenses: Mapping[str, str | None]) -> tuple[str | None, list[str]]:
    """Return the licence that a merge of models should declare, and warnings for its author.

    This is no legal advice. If all licences can be satisfied, the result is the strictest one. The result is `other`
    if a model declares no licence or an id outside the table, if a licence allows no derivatives, or if two licences
    exclude each other.

    Args:
        licenses: Licence id on the card of each model, by the name of the model.

    Returns:
        The value for the metadata key `license`, `None` if no model declares a licence; and the warnings, which name
        the models.

    Example:
        >>> strictest({"org/a": "mit", "org/b": "apache-2.0"})
        ('apache-2.0', [])
    """
    holders: dict[str | None, list[str]] = {}
    for model, name in licenses.items():
        holders.setdefault((name or "").strip().lower() or None, []).append(model)
    known = sorted((LICENSES[name] for name in holders if name in LICENSES), key=lambda found: found.place)
    unclear = [name for name in holders if name not in LICENSES]
    problems = _find_conflicts(known, holders)
    warnings = problems + [_warn_of_unclear(name, holders[name]) for name in unclear]
    if len(holders) > 1:
        warnings += [
            f"{_name_with_models(found, holders)} {LIMITS[found.strictness]}"
            for found in known
            if found.strictness in LIMITS
        ]
    if set(holders) <= {None}:
        return None, warnings
    return OTHER if unclear or problems else known[-1].name, warnings


def _find_conflicts(known: list[License], holders: Mapping[str | None, list[str]]) -> list[str]:
    """Return the reasons why no licence can satisfy all of `known`.

    Args:
        known: Licences in the order of the table.
        holders: Names of the models under each licence id.
    """
    fixed = [found for found in known if found.strictness is Strictness.NO_DERIVATIVES]
    problems = [
        f"{_name_with_models(found, holders)} does not allow sharing derived models, such as a merge: ask its authors "
        "first"
        for found in fixed
    ]
    for one, two in combinations(known[: len(known) - len(fixed)], 2):
        if reason := _explain_conflict(one, two):
            names = f"{_name_with_models(one, holders)} and {_name_with_models(two, holders)}"
            problems.append(f"{names} cannot both be satisfied: {reason}")
    return problems


def _explain_conflict(one: License, two: License) -> str | None:
    """Return the reason why no merge can satisfy both licences, if any; `two` is later in the table."""
    if frozenset({one.name, two.name}) in EXCLUDED:
        return f"{two.name} does not allow the additional conditions of {one.name}"
    if one.bond == two.bond == "terms":
        return "each requires that its own terms are passed on with the merge"
    if one.bond == two.bond == "same":
        return None if two.name in SUCCESSORS.get(one.name, ()) else "each requires its own licence on the merge"
    for bound, added in ((one, two), (two, one)):
        if bound.bond == "same" and (added.bond == "terms" or added.place > bound.place):
            return f"{bound.name} requires the same licence on the merge, without the restrictions of {added.name}"
    return None


def _name_with_models(found: License, holders: Mapping[str | None, list[str]]) -> str:
    return f"{found.name} ({_list_models(holders[found.name])})"


def _list_models(models: list[str]) -> str:
    return ", ".join(f"`{model}`" for model in models)


def _warn_of_unclear(name: str | None, models: list[str]) -> str:
    if name is None:
        return (
            f"no licence is declared by {_list_models(models)}: only the authors may share a model without a licence"
        )
    why = "" if name in UNCLEAR else ", which is not in the table of licence ids,"
    return f"`{name}`{why} is declared by {_list_models(models)}: read its terms before you share the merge"
