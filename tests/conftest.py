"""Which tests share a worker, and in which order: `make test` runs a worker a core (pytest-xdist)."""

from typing import Any

import pytest

SLURM = "tests/slurm/"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays together, for its fixtures; all SLURM tests do, for they share a cluster."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SLURM if nodeid.startswith(SLURM) else str(super()._split_scope(nodeid))

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SLURM tests wait more than they compute: they begin first, beside others that compute."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))
