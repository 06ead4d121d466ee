"""The table of peaks: names as drivers print them; files that were measured; choices that cannot be."""

import json
from pathlib import Path

import pytest

from ii_dist.config import ConfigError
from ii_dist.metrics.peaks import DEVICES, Device, MachineFile, choose_device, device_named, read_machine, write_machine

ONE = Device("a CPU", {"fp32": 0.1, "bf16": 0.4}, 10.0, kind="cpu", threads=1, roofline_share=0.5)
ALL = Device("a CPU", {"fp32": 0.3}, 16.0, kind="cpu", threads=8)
FILE = MachineFile((ONE, ALL), cores=8, loader_images_per_core_s=400.0, loader="dali")


@pytest.mark.parametrize(
    ("printed", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("h100", "H100"),
    ],
)
def test_gpus_by_the_names_that_drivers_print(printed: str, row: str) -> None:
    found = device_named(printed)
    assert found is not None
    assert found.name == row


def test_what_is_not_in_the_table_has_no_row() -> None:
    assert device_named("NVIDIA L400") is None
    assert device_named("") is None


def test_the_rows_are_sane() -> None:
    for row in DEVICES.values():
        assert row.tflops["fp32"] < max(row.tflops.values()) <= 2250, row
        assert 300 <= row.gb_per_s <= 8000
        assert row.flops_per_s("fp16") >= row.flops_per_s("fp32")
    assert DEVICES[("A100",)].flops_per_s("bf16") == 312e12
    assert DEVICES[("A100",)].flops_per_s("fp32") == 156e12, "TF32"
    assert DEVICES[("V100",)].flops_per_s("bf16") == 15.7e12, "no units for it"


def test_a_measured_file_comes_back(tmp_path: Path) -> None:
    write_machine(tmp_path / "m.json", FILE)
    assert read_machine(tmp_path / "m.json") == FILE


def test_a_cpus_processes_share_its_memory() -> None:
    assert FILE.device("cpu", threads=1) == ONE
    assert FILE.device("cpu", threads=6) == ALL
    assert FILE.device("cpu", threads=1, processes=4).gb_per_s == 4.0
    with pytest.raises(ConfigError, match="no cuda device"):
        FILE.device("cuda")


def test_choices(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_machine(path, FILE)
    assert choose_device("none", "NVIDIA H200") is None
    assert choose_device("auto", "") is None, "a CPU is in no table"
    assert choose_device("auto", "a GPU of tomorrow") is None
    assert choose_device("auto", "NVIDIA H200") == choose_device("H200", "anything") == DEVICES[("H200",)]
    assert choose_device(str(path), "", threads=1) == ONE
    with pytest.raises(ConfigError, match=r"metrics.machine 'H1000': not one of B200"):
        choose_device("H1000", "")


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"format": 2}), json.dumps({"format": 1, "devices": [1]})])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_machine(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"m\.json: is not a file of tools.measure_machine") as error:
        read_machine(path)
    assert "\n" not in str(error.value)
