"""Joules: RAPL on a made-up tree of zones, NVML by a made-up package, and neither."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memory_bench.budget import Usage
from memory_bench.driver.accounting import Accounting
from memory_bench.driver.energy import Energy


def zone(root: Path, number: str, name: str, microjoules: int, wraps: int = 1_000_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{wraps}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_processors_and_their_memory_are_summed_and_nothing_counts_twice(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", 5_000_000)
    parts = [zone(tmp_path, "0:0", "core", 10), zone(tmp_path, "0:1", "uncore", 10), zone(tmp_path, "2", "psys", 10)]
    memory, second = zone(tmp_path, "0:2", "dram", 0), zone(tmp_path, "1", "package-1", 0)
    energy = Energy(root=tmp_path)
    assert energy.now() == 0
    for counter in (*parts, memory, second):
        counter.write_text("2000000")
    first.write_text("6000000")
    assert energy.now() == pytest.approx(1 + 2 + 2)


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "0", "package-0", 900, wraps=1000)
    energy = Energy(root=tmp_path)
    for value in ("100", "900", "50"):
        counter.write_text(value)
        energy.now()
    assert energy.now() == pytest.approx((200 + 800 + 150) * 1e-6)


@pytest.mark.parametrize("broken", ["nothing", "name", "energy_uj", "max_energy_range_uj", "words"])
def test_where_nothing_or_not_all_can_be_read_there_is_no_number(tmp_path: Path, broken: str) -> None:
    if broken != "nothing":
        zone(tmp_path, "0", "package-0", 5)
        other = zone(tmp_path, "1", "package-1", 5)
        if broken == "words":
            other.write_text("no number")
        else:
            (other.parent / broken).unlink()
    assert Energy(root=tmp_path).now() is None
    usage = Usage()
    accounting = Accounting(usage, torch.device("cpu"), Energy(root=tmp_path))
    accounting.entered("train")
    accounting.entered("")
    assert usage.train_joules is None


def test_a_counter_that_is_lost_leaves_no_number(tmp_path: Path) -> None:
    counter = zone(tmp_path, "0", "package-0", 5)
    energy = Energy(root=tmp_path)
    counter.unlink()
    assert energy.now() is None
    counter.write_text("50")
    assert energy.now() is None


def test_phases_have_their_own_joules_and_controls_have_none(tmp_path: Path) -> None:
    counter, usage = zone(tmp_path, "0", "package-0", 0), Usage()
    accounting = Accounting(usage, torch.device("cpu"), Energy(root=tmp_path))
    spent = 0
    for phase, joules in (("", 1), ("train", 2), ("", 4), ("eval", 8), ("control", 16), ("eval", 32), ("", 64)):
        accounting.entered(phase)
        spent += joules
        counter.write_text(str(spent * 10**6))
    assert (usage.train_joules, usage.eval_joules) == (2, 8 + 32)


class NVMLError(Exception):
    pass


def nvml(readings: list[int], wanted: str) -> Any:
    def handle(uuid: str) -> str:
        if uuid != wanted:
            raise NVMLError
        return uuid

    def read(_: str) -> int:
        if not readings:
            raise NVMLError
        return readings.pop(0)

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )  # fmt: skip


def test_a_gpu_is_read_by_its_identifier_where_the_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([1000, 1000, 3500], "GPU-12"))
    energy = Energy("12")
    assert energy.now() == 2.5
    assert energy.now() is None  # it is gone
    monkeypatch.setitem(sys.modules, "pynvml", nvml([1000, 1000], "GPU-12"))
    assert Energy("13").now() is None
    monkeypatch.setitem(sys.modules, "pynvml", nvml([2000, 2000, 1000], "GPU-12"))
    assert Energy("12").now() is None  # a counter without a range has gone back
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert Energy("12").now() is None
