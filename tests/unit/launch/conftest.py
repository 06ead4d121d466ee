"""A supervisor as a real process over stand-in ranks."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.records import read_record
from tests.unit.launch.cases import Case, is_gone


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    case = Case(tmp_path)
    yield case
    for process in case.started:
        record = read_record(case.folder.job(case.job))
        if record is not None and not is_gone(record.supervisor_pid):
            os.kill(record.supervisor_pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.communicate()
