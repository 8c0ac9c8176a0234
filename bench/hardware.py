"""What the figures were measured on: a profile with a stable key, and the conditions of the moment.

Parsers are pure functions of the tools' text, so that they are tested on recorded output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from mlxkd import runtime

KEY_FIELDS = ("chip", "cores", "gpu_cores", "ane_cores", "memory_gb", "system", "low_power", "power_source")
LOAD_PER_CORE = 0.5  # above this, others are computing too


class Hardware(BaseModel):
    """A machine as far as it shapes a figure; None where the system does not say.

    ``key`` holds everything that must agree before two figures may be compared; package versions are
    provenance, not identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    chip: str
    cores: int
    gpu_cores: int | None = None
    ane_cores: int | None = None
    memory_gb: int | None = None
    system: str
    power_source: str | None = None
    low_power: bool | None = None
    thermal: str | None = None
    versions: dict[str, str | None] = {}

    @property
    def key(self) -> str:
        """Twelve hex digits that stay the same while the machine, its system and its power mode do."""
        identity = json.dumps({name: getattr(self, name) for name in KEY_FIELDS}, sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def differences(self, other: Hardware) -> list[str]:
        """The identity fields in which two machines differ, in words."""
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in KEY_FIELDS]
        return [f"{name}: {ours} against {theirs}" for name, ours, theirs in pairs if ours != theirs]


class Conditions(BaseModel):
    """The moment of a round; ``problems`` says what was not nominal."""

    model_config = ConfigDict(extra="forbid")
    power_source: str | None = None
    low_power: bool | None = None
    thermal: str | None = None
    load: float | None = None
    swapping: bool | None = None
    problems: list[str] = []


Run = Callable[[list[str]], str]


def run_tool(command: list[str]) -> str:
    """Output of a system tool; empty where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    return ""


def parse_battery(text: str) -> str | None:
    """``pmset -g batt``: "AC" or "battery"."""
    found = re.search(r"drawing from '([^']+)'", text)
    return None if not found else ("AC" if found[1].startswith("AC") else "battery")


def parse_low_power(text: str) -> bool | None:
    """``pmset -g``: the lowpowermode line (powermode 1 on machines that have three modes)."""
    found = re.search(r"^\s*(lowpowermode|powermode)\s+(\d+)", text, re.MULTILINE)
    return None if not found else found[2] == "1"


def parse_thermal(text: str) -> str | None:
    """``pmset -g therm``: "nominal", or what is limited."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if limit and int(limit[1]) < 100:
        return f"CPU limited to {limit[1]} %"
    level = re.search(r"thermal warning level[^\d\n]*?(\d+)", text, re.IGNORECASE)
    if level and int(level[1]) > 0 and "No thermal warning" not in text:
        return f"warning level {level[1]}"
    return "nominal" if limit or "thermal warning level" in text.lower() else None


def parse_gpu_cores(text: str) -> int | None:
    """``system_profiler SPDisplaysDataType -json``: number of GPU cores."""
    try:
        displays = json.loads(text)["SPDisplaysDataType"]
        return int(displays[0]["sppci_cores"])
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def ane_cores(chip: str) -> int | None:
    """Neural Engine cores by Apple's specifications: 16, or 32 on the Ultra; None off Apple silicon."""
    if not chip.startswith("Apple M"):
        return None
    return 32 if "Ultra" in chip else 16


def _mac_state(run: Run) -> dict[str, Any]:
    settings = run(["pmset", "-g"])
    return {
        "power_source": parse_battery(run(["pmset", "-g", "batt"])),
        "low_power": parse_low_power(settings),
        "thermal": parse_thermal(run(["pmset", "-g", "therm"])),
    }


def _linux_state(root: Path = Path("/sys")) -> dict[str, Any]:
    mains = [p.read_text().strip() for p in sorted(root.glob("class/power_supply/*/online"))]
    profile = root / "firmware/acpi/platform_profile"
    return {
        "power_source": None if not mains else ("AC" if "1" in mains else "battery"),
        "low_power": profile.read_text().strip() == "low-power" if profile.exists() else None,
        "thermal": None,
    }


def state(run: Run = run_tool) -> dict[str, Any]:
    """Power source, low-power mode and thermal state now."""
    return _mac_state(run) if platform.system() == "Darwin" else _linux_state()


def profile(run: Run = run_tool) -> Hardware:
    """This machine."""
    chip, memory = runtime.cpu_name(), runtime.total_memory()
    mac = platform.system() == "Darwin"
    build = run(["sw_vers", "-buildVersion"]).strip() if mac else ""
    return Hardware(
        chip=chip,
        cores=runtime.usable_cores(),
        gpu_cores=parse_gpu_cores(run(["system_profiler", "SPDisplaysDataType", "-json"])) if mac else None,
        ane_cores=ane_cores(chip),
        memory_gb=round(memory / 2**30) if memory else None,
        system=f"macOS {platform.mac_ver()[0]} {build}".strip() if mac else f"Linux {platform.release()}",
        versions=runtime.versions(),
        **state(run),
    )


def swapping(run: Run = run_tool) -> bool | None:
    """Whether memory is being swapped out in quantity; None where the system does not say."""
    if platform.system() == "Darwin":
        used = re.search(r"used = ([\d.]+)M", run(["sysctl", "-n", "vm.swapusage"]))
        return None if not used else float(used[1]) > 1024
    try:
        lines = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
        return int(lines["SwapTotal"]) - int(lines["SwapFree"]) > 1024 * 1024
    except (OSError, KeyError):
        return None


def judge(found: dict[str, Any]) -> list[str]:
    """What of a moment's state is not nominal, in words."""
    problems = []
    if found.get("power_source") == "battery":
        problems.append("on battery")
    if found.get("low_power"):
        problems.append("low-power mode is on")
    if found.get("thermal") not in (None, "nominal"):
        problems.append(f"thermal state: {found['thermal']}")
    load = found.get("load")
    if load is not None and load > LOAD_PER_CORE:
        problems.append(f"the machine is busy (load {load:.1f} per core)")
    if found.get("swapping"):
        problems.append("memory is swapped out")
    return problems


def preflight(run: Run = run_tool) -> Conditions:
    """The conditions now. ``load`` is the one-minute run queue per usable core."""
    found = state(run) | {
        "load": os.getloadavg()[0] / runtime.usable_cores(),
        "swapping": swapping(run),
    }
    return Conditions(**found, problems=judge(found))


def cpu_chip() -> str:
    """Generation of this Mac's chip ("m4"), or an empty string elsewhere."""
    found = re.search(r"^Apple (M\d+)", runtime.cpu_name())
    return found[1].lower() if found else ""
