"""Tests and processes: the start of scripts for processes of their own, and folders that all workers share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import grasp_hf

# The start of a script: its imports of `grasp_hf.x` skip the package's `__init__`, which takes seconds.
WITHOUT_TORCH = f"""
import sys, types

package = sys.modules["grasp_hf"] = types.ModuleType("grasp_hf")
package.__path__ = {grasp_hf.__path__!r}
"""


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` filled, once for all workers of pytest-xdist; it gets the path of an empty folder."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (factory.getbasetemp().parent if parallel else factory.getbasetemp()) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder
