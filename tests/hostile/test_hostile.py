"""Every hostile input gets its error, in bounded time and memory, and the target stays as it was."""

from collections.abc import Callable

import pytest

from tests.hostile.kit import Bench, check, modules

KINDS = modules()
INPUTS = [(kind, name) for kind, module in KINDS.items() for name in module.INPUTS]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def get(kind: str) -> Bench:
        if kind not in made:
            made[kind] = Bench(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.mark.parametrize(("kind", "name"), INPUTS, ids=[f"{kind}-{name}" for kind, name in INPUTS])
def test_an_input_gets_its_error(kind: str, name: str, bench: Callable[[str], Bench]) -> None:
    check(KINDS[kind], bench(getattr(KINDS[kind], "MODEL", "bert")), name)
