"""The emulated machine: Debian's Python for arm64, and the files that describe a processor."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SUITE = "bookworm"
PACKAGES = ("python3.11", "libstdc++6")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
N_CPU = 2
# Arm's Neoverse N1, revision r3p1, as Linux describes it: torch's cpuinfo and oneDNN read these.
MIDR = "0x00000000413fd0c1"
CPUINFO = """\
processor\t: {cpu}
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc \
dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
# apt with folders of its own: the system's packages and lists are neither read nor changed.
APT_CONFIG = """\
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Debug::NoLocking "true";
Dir::Etc::sourcelist "{apt}/sources.list";
Dir::Etc::sourceparts "{apt}/parts";
Dir::Etc::preferences "{apt}/preferences";
Dir::Etc::preferencesparts "{apt}/parts";
Dir::State::lists "{apt}/lists";
Dir::State::status "/dev/null";
Dir::State::extended_states "{apt}/extended_states";
Dir::Cache "{apt}";
"""


def make_root(root: Path, work: Path) -> None:
    """Unpacks Debian's Python for arm64 and all that it needs into `root`.

    Args:
        root: a folder that does not exist yet.
        work: a folder for apt's lists and the downloaded packages.
    """
    for name in ("parts", "lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True, exist_ok=True)
    source = f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n"
    (work / "sources.list").write_text(source, "utf-8")
    (work / "apt.conf").write_text(APT_CONFIG.format(apt=work), "utf-8")
    env = {**os.environ, "APT_CONFIG": str(work / "apt.conf"), "LC_ALL": "C"}
    apt = ["apt-get", "--quiet=2", "--yes"]
    subprocess.run([*apt, "update"], env=env, check=True)
    subprocess.run([*apt, "install", "--download-only", *PACKAGES], env=env, check=True)
    for package in sorted((work / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", package, root], check=True)
    describe_processor(root)


def describe_processor(root: Path) -> None:
    """Writes /proc/cpuinfo and /sys/devices/system/cpu under `root`; QEMU reads them from there."""
    cpus = range(N_CPU)
    everyone = f"0-{N_CPU - 1}"
    files = {
        "proc/cpuinfo": "".join(CPUINFO.format(cpu=cpu) for cpu in cpus),
        "sys/devices/system/cpu/kernel_max": "511\n",
        **{
            f"sys/devices/system/cpu/{name}": f"{everyone}\n"
            for name in ("possible", "present", "online")
        },
    }
    for cpu in cpus:
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{folder}/regs/identification/midr_el1"] = f"{MIDR}\n"
        files[f"{folder}/topology/core_id"] = f"{cpu}\n"
        files[f"{folder}/topology/physical_package_id"] = "0\n"
        files[f"{folder}/topology/core_siblings"] = f"{(1 << N_CPU) - 1:x}\n"
        files[f"{folder}/topology/core_siblings_list"] = f"{everyone}\n"
        files[f"{folder}/topology/thread_siblings"] = f"{1 << cpu:x}\n"
        files[f"{folder}/topology/thread_siblings_list"] = f"{cpu}\n"
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
