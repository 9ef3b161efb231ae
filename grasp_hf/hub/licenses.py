"""The licence that a merge should declare, from those that its parents declare.

A small closed table of licence ids as model cards on the Hub give them, and rules for two that meet in one model. This is
no legal advice: it reads the ids that cards declare, not the texts behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations
from typing import Any, Literal

OTHER = "other"  # what the Hub's metadata takes for a licence that is not in its list
UNCLEAR = (OTHER, "unknown", "cc")  # `cc` names a family from public domain to no derivatives


class Strictness(IntEnum):
    """How much a licence asks of whoever passes a model on."""

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
        name: The id on the Hub.
        strictness: Its class.
        bond: What it asks of a merge: `free` lets it have any stricter licence, `same` wants this licence (or one of
            `SUCCESSORS`), `terms` wants its own terms passed on.
        place: Its place in the table; of two licences of one class the later one asks for more, or is newer.
    """

    name: str
    strictness: Strictness
    bond: Bond
    place: int


# The ids are those of https://huggingface.co/docs/hub/repositories-licenses, which follow https://spdx.org/licenses where
# SPDX has them; within a class from the least to the most that is asked, and from old to new.
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

# Licences that a work under a `same` licence may move to, each by its own text: section 3 of LGPL 2.1, LGPL 3.0 as GPL 3.0
# with permissions, section 13 of GPL 3.0, the secondary licences of MPL 2.0, later versions of CC share-alike.
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
# https://www.gnu.org/licenses/license-list.html
EXCLUDED = frozenset({frozenset({"apache-2.0", "gpl-2.0"})})

LIMITS = {
    Strictness.WEAK_COPYLEFT: "asks for the same licence on what is made of it",
    Strictness.COPYLEFT: "asks for the same licence on what is made of it",
    Strictness.NETWORK_COPYLEFT: "asks for the same licence on what is made of it, also where it is only served",
    Strictness.USE_RESTRICTED: "restricts what the merge may be used for, and wants its terms passed on",
    Strictness.NON_COMMERCIAL: "allows no commercial use of the merge",
}


def license_of(metadata: Any) -> str | None:
    """Return the licence in the metadata of a card, several of them as one text; `None` where it names none."""
    found = metadata.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else found and str(found)


def strictest(licenses: Mapping[str, str | None]) -> tuple[str | None, list[str]]:
    """Return the licence that a merge of models should declare, and what its maker should know.

    This is no legal advice. The strictest licence wins where all can be satisfied. `other` stands where a model declares
    none or one outside the table, where one allows no derivatives, and where two exclude each other.

    Args:
        licenses: What each model's card declares, as a licence id of the Hub, by the model's name.

    Returns:
        A value for the metadata key `license`, `None` where no model declares a licence; and the warnings, each of which
        names the models that it is about.

    Example:
        >>> strictest({"org/a": "mit", "org/b": "apache-2.0"})
        ('apache-2.0', [])
    """
    holders: dict[str | None, list[str]] = {}
    for model, name in licenses.items():
        holders.setdefault((name or "").strip().lower() or None, []).append(model)
    known = sorted((LICENSES[name] for name in holders if name in LICENSES), key=lambda found: found.place)
    unclear = [name for name in holders if name not in LICENSES]
    problems = value_problems(known, holders)
    warnings = problems + [_unclear(name, holders[name]) for name in unclear]
    if len(holders) > 1:
        warnings += [
            f"{_named(found, holders)} {LIMITS[found.strictness]}" for found in known if found.strictness in LIMITS
        ]
    if set(holders) <= {None}:
        return None, warnings
    return OTHER if unclear or problems else known[-1].name, warnings


def value_problems(known: list[License], holders: Mapping[str | None, list[str]]) -> list[str]:
    """Return what keeps a single licence from standing for all of `known`, which are in the order of the table."""
    fixed = [found for found in known if found.strictness is Strictness.NO_DERIVATIVES]
    problems = [
        f"{_named(found, holders)} does not allow sharing what is made of it, such as a merge: ask its authors first"
        for found in fixed
    ]
    for one, two in combinations(known[: len(known) - len(fixed)], 2):
        if reason := _conflict(one, two):
            problems.append(f"{_named(one, holders)} and {_named(two, holders)} cannot both be satisfied: {reason}")
    return problems


def _conflict(one: License, two: License) -> str | None:
    """Say why no merge can satisfy both licences, of which `two` stands later in the table."""
    if frozenset({one.name, two.name}) in EXCLUDED:
        return f"{two.name} does not allow the further conditions of {one.name}"
    if one.bond == two.bond == "terms":
        return "each wants its own terms passed on with the merge"
    if one.bond == two.bond == "same":
        return None if two.name in SUCCESSORS.get(one.name, ()) else "each asks for its own licence on the merge"
    for bound, added in ((one, two), (two, one)):
        if bound.bond == "same" and (added.bond == "terms" or added.place > bound.place):
            return f"{bound.name} asks for the same licence on the merge, without the restrictions of {added.name}"
    return None


def _named(found: License, holders: Mapping[str | None, list[str]]) -> str:
    return f"{found.name} ({_listed(holders[found.name])})"


def _listed(models: list[str]) -> str:
    return ", ".join(f"`{model}`" for model in models)


def _unclear(name: str | None, models: list[str]) -> str:
    if name is None:
        return f"no licence is declared by {_listed(models)}: without one, only the authors may share it"
    why = "" if name in UNCLEAR else ", which is not a licence id known here,"
    return f"`{name}`{why} is declared by {_listed(models)}: read its terms before you share the merge"
