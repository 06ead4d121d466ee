"""The machine, looked at for real; a GPU's driver by a stand-in, where there is none."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ii_dist.metrics.machine import MachineWatch, gpu_look, machine_looks, node_look
from ii_dist.metrics.process import process_age_s
from ii_dist.metrics.tags import TAGS


def test_a_busy_node_is_seen_as_busy() -> None:
    look = node_look()
    assert look is not None
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        sum(range(1000))
    told = look()
    assert told.keys() <= TAGS.keys()
    assert told["machine/cpu_share"] > 0.5 / (os.cpu_count() or 1)
    assert told["machine/cpu_share"] <= 1
    assert told["machine/network_mb_per_s"] >= 0


def test_rates_are_differences_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of a made-up machine, so that the sums can be done by hand."""
    state = {"s": 10.0, "read": 5e6, "net": 1e6, "idle": 100.0, "user": 50.0}
    card = SimpleNamespace(bytes_sent=0.0, bytes_recv=0.0)

    def cards(pernic: bool) -> dict[str, object]:
        assert pernic
        moved = SimpleNamespace(bytes_sent=state["net"], bytes_recv=2 * state["net"])
        return {"eth0": moved, "ib0": card, "lo": moved, "docker0": moved}

    monkeypatch.setattr(time, "monotonic", lambda: state["s"])
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: SimpleNamespace(read_bytes=state["read"]))
    monkeypatch.setattr(psutil, "net_io_counters", cards)
    times = psutil.cpu_times()
    monkeypatch.setattr(
        psutil, "cpu_times", lambda: times._replace(**dict.fromkeys(times._fields, 0.0))._replace(**cpu())
    )

    def cpu() -> dict[str, float]:
        return {"idle": state["idle"], "user": state["user"]}

    look = node_look()
    assert look is not None
    state |= {"s": 14.0, "read": 25e6, "net": 3e6, "idle": 101.0, "user": 53.0}
    assert look() == pytest.approx(
        {"machine/network_mb_per_s": 3 * 2 / 4, "machine/cpu_share": 0.75, "machine/disk_read_mb_per_s": 5.0}
    )


def test_what_was_seen_since_the_last_line_is_averaged_in_a_thread() -> None:
    values = iter(range(1, 1000))
    seen: list[float] = []

    def look() -> dict[str, float]:
        seen.append(float(next(values)))
        return {"gpu/power_w": seen[-1], "gpu/temperature_c": seen[-1]}

    watch = MachineWatch([look], every_s=0.002)
    while len(seen) < 5:
        time.sleep(0.002)
    watch.close()
    told = watch.tags()
    assert told["gpu/power_w"] == pytest.approx(sum(seen) / len(seen))
    assert told["gpu/temperature_c"] == max(seen)
    assert watch.tags() == {}
    count = len(seen)
    time.sleep(0.02)
    assert len(seen) == count  # nobody looks any more


def test_a_look_that_fails_now_and_then_does_not_end_the_watch() -> None:
    calls: list[int] = []

    def look() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 1:
            raise PermissionError("/proc/diskstats")
        return {"machine/cpu_share": 0.5}

    watch = MachineWatch([look], every_s=0.002)
    while len(calls) < 3:
        time.sleep(0.002)
    watch.close()
    assert watch.tags() == {"machine/cpu_share": 0.5}


def test_one_rank_of_a_node_looks_at_it() -> None:
    device = torch.device("cpu")
    assert [len(machine_looks(local_rank, device)) for local_rank in range(3)] == [1, 0, 0]
    MachineWatch([]).close()


@pytest.mark.parametrize(
    ("package", "look"), [("psutil", node_look), ("pynvml", lambda: gpu_look("GPU-0"))], ids=["psutil", "pynvml"]
)
def test_a_missing_package_is_one_line(
    package: str, look: Callable[[], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert look() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "python -m pip install" in record.getMessage()


class StandInError(Exception):
    pass


def stand_in(**answers: object) -> SimpleNamespace:
    """NVIDIA's module as far as it is asked, with a GPU that has no ECC."""

    def no_ecc(*_: object) -> int:
        raise StandInError("Not Supported")

    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown")
    reasons = {f"nvmlClocksThrottleReason{name}": 1 << place for place, name in enumerate(names, 2)}
    return SimpleNamespace(
        **reasons,
        NVMLError=StandInError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=85),
        nvmlDeviceGetClockInfo=lambda *_: 1410,
        nvmlDeviceGetPowerUsage=lambda _: 312_500,
        nvmlDeviceGetTemperature=lambda *_: 61,
        nvmlDeviceGetTotalEccErrors=no_ecc,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 1 | 1 << 3,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        **answers,
    )


def test_a_gpu_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    look = gpu_look("GPU-1")
    assert look is not None
    told = dict(look())
    assert told == {
        "gpu/utilization_share": 0.85,
        "gpu/sm_clock_mhz": 1410,
        "gpu/power_w": 312.5,
        "gpu/temperature_c": 61,
        "gpu/throttled_share": 1,
    }
    assert told.keys() <= TAGS.keys()


def test_an_idle_gpu_is_not_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stand_in()
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 1  # idle
    monkeypatch.setitem(sys.modules, "pynvml", module)
    look = gpu_look("GPU-1")
    assert look is not None
    assert look()["gpu/throttled_share"] == 0


def test_a_driver_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_driver() -> None:
        raise StandInError("NVML Shared Library Not Found")

    module = stand_in()
    module.nvmlInit = no_driver
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpu_look("GPU-1") is None
    assert len(caplog.records) == 1


def test_the_age_of_the_process() -> None:
    assert process_age_s() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.5)


def test_no_proc_is_age_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ii_dist.metrics.process._STAT", tmp_path / "stat")
    assert process_age_s() == 0
