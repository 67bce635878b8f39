"""`deepflow doctor`: what it reads from the files of machines of every kind, and what it makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepflow.doctor import ascend, nvidia, torch_probe
from deepflow.doctor.doctor import here, require
from deepflow.doctor.finding import Examination, Finding, State
from deepflow.doctor.host import Host
from deepflow.doctor.torch_probe import Seen
from services.worker.flowserve.device.torch_build import TorchBuild
from shared.errors import Unavailable

PLAIN = TorchBuild("2.13.0+cpu", None)
CUDA = TorchBuild("2.13.0", "13.0")

NPU_SMI = """
+-------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                          |
+---------------------------+---------------+-----------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage |
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)   |
+===========================+===============+===============================================+
| 0     910B3               | OK            | 92.1        37                0    / 0        |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3401 / 65536    |
+===========================+===============+===============================================+
| 1     910B3               | Alarm         | 91.0        36                0    / 0        |
| 0                         | 0000:01:00.0  | 0           0    / 0          3401 / 65536    |
+===========================+===============+===============================================+
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of the machine under examination, by its absolute path there."""

    def put(path: str, text: str) -> Path:
        target = tmp_path / "root" / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    return put


@pytest.fixture
def tool(tmp_path: Path) -> Write:
    """Puts a tool on the machine's PATH: a name, and the lines of its shell script."""

    def put(name: str, script: str) -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return put


def host(tmp_path: Path, **env: str) -> Host:
    """The machine whose files `write` wrote and whose tools `tool` put there."""
    (tmp_path / "root").mkdir(exist_ok=True)
    return Host(tmp_path / "root", {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **env})


def states(findings: list[Finding]) -> dict[str, State]:
    """How it stands, by subject."""
    return {finding.subject: finding.state for finding in findings}


def text(findings: list[Finding], subject: str) -> str:
    """What is said of a subject, remedy included."""
    return next(f"{one.text} -> {one.remedy}" for one in findings if one.subject == subject)


def ascend_host(write: Write, tool: Write) -> None:
    """An Ascend machine in good order, with two NPUs."""
    for node in ("davinci0", "davinci1", "davinci_manager", "devmm_svm", "hisi_hdc"):
        write(f"/dev/{node}", "")
    write(
        "/etc/ascend_install.info",
        "UserName=HwHiAiUser\nDriver_Install_Path_Param=/usr/local/Ascend\n",
    )
    write("/usr/local/Ascend/driver/version.info", "Version=25.2.0\nascendhal_version=7.35.23\n")
    write(
        "/usr/local/Ascend/ascend-toolkit/latest/aarch64-linux/ascend_toolkit_install.info",
        "package_name=Ascend-cann-toolkit\nversion=8.5.0\ninnerversion=V100R001C25\n",
    )
    write("/usr/local/Ascend/ascend-toolkit/set_env.sh", "")
    tool("npu-smi", f"cat <<'END'{NPU_SMI}END")


CANN_HOME = "/usr/local/Ascend/ascend-toolkit/latest"


def test_an_ascend_machine_in_order_lacks_nothing(
    tmp_path: Path, write: Write, tool: Write
) -> None:
    """Cards, driver, CANN and versions are read from where their installers leave them."""
    ascend_host(write, tool)
    found = ascend.examine(host(tmp_path, ASCEND_HOME_PATH=CANN_HOME), PLAIN, "2.13.0")
    assert not [finding for finding in found if finding.blocks("npu")]
    assert "/dev/davinci0, /dev/davinci1" in text(found, "Ascend NPU")
    assert text(found, "NPU driver").startswith("25.2.0 ")
    assert text(found, "CANN").startswith(f"8.5.0 in {CANN_HOME}")
    assert "not well: 910B3 (Alarm)" in text(found, "npu-smi")


def test_what_nobody_can_know_is_called_unknown(tmp_path: Path, write: Write, tool: Write) -> None:
    """The wheel of torch-npu 2.13.0 names no CANN: neither ok nor missing."""
    ascend_host(write, tool)
    found = ascend.examine(host(tmp_path, ASCEND_HOME_PATH=CANN_HOME), PLAIN, "2.13.0")
    assert states(found)["CANN and torch-npu"] is State.UNKNOWN
    assert "not stated in its wheel: unknown" in text(found, "CANN and torch-npu")


def test_cann_that_is_not_sourced_is_missing(tmp_path: Path, write: Write, tool: Write) -> None:
    """Installed is not enough: the remedy names the script to source."""
    ascend_host(write, tool)
    found = ascend.examine(host(tmp_path), PLAIN, "2.13.0")
    assert states(found)["CANN"] is State.MISSING
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in text(found, "CANN")


def test_cann_without_the_installers_file_is_read_from_its_version_file(
    tmp_path: Path, write: Write
) -> None:
    """version.cfg holds each part's own version, and after the colon CANN's."""
    write(
        "/opt/cann/version.cfg", "# version: 1.0\ntoolkit_running_version=[7.6.0.1.220:8.1.RC1]\n"
    )
    found = ascend.examine(host(tmp_path, ASCEND_HOME_PATH="/opt/cann"), PLAIN, "2.13.0")
    assert text(found, "CANN").startswith("8.1.RC1 in /opt/cann")


@pytest.mark.parametrize(
    ("torch", "torch_npu", "said"),
    [
        (PLAIN, None, "pip install 'deepflow[npu]'"),
        (None, "2.13.0", "without torch"),
        (TorchBuild("2.12.0+cpu", None), "2.13.0", "does not go with torch 2.12.0+cpu"),
        (TorchBuild("2.13.1+cpu", None), "2.13.0", "does not go with torch 2.13.1+cpu"),
        (CUDA, "2.13.0", "refuses torch 2.13.0, which has CUDA 13.0"),
    ],
)
def test_torch_npu_goes_with_its_own_torch_only(
    tmp_path: Path, torch: TorchBuild | None, torch_npu: str | None, said: str
) -> None:
    """Same number, and no CUDA build."""
    found = ascend.examine(host(tmp_path), torch, torch_npu)
    assert states(found)["torch-npu"] is State.MISSING
    assert said in text(found, "torch-npu")


def test_a_later_build_of_the_same_torch_npu_goes_with_it(tmp_path: Path) -> None:
    """2.13.0.post1 is for torch 2.13.0."""
    found = ascend.examine(host(tmp_path), PLAIN, "2.13.0.post1")
    assert states(found)["torch-npu"] is State.OK


def test_hidden_and_closed_npus_are_missing(tmp_path: Path, write: Write, tool: Write) -> None:
    """An empty list of visible devices hides all of them; a node left out of a container is named."""
    ascend_host(write, tool)
    hidden = host(tmp_path, ASCEND_RT_VISIBLE_DEVICES="")
    assert states(ascend.examine(hidden, PLAIN, "2.13.0"))["Ascend NPU"] is State.MISSING
    (tmp_path / "root/dev/hisi_hdc").unlink()
    found = ascend.examine(host(tmp_path), PLAIN, "2.13.0")
    assert "/dev/hisi_hdc not there" in text(found, "NPU device nodes")


def test_a_card_without_a_driver_is_seen_on_the_bus(tmp_path: Path, write: Write) -> None:
    """Vendor and class tell an accelerator from the vendor's other chips."""
    for slot, vendor, kind in (
        ("0000:01:00.0", "0x19e5", "0x120000"),
        ("0000:02:00.0", "0x19e5", "0x020000"),  # a network card of the same maker
        ("0000:03:00.0", "0x10de", "0x030200"),
        ("0000:03:00.1", "0x10de", "0x040300"),  # the graphics card's sound
    ):
        write(f"/sys/bus/pci/devices/{slot}/vendor", vendor + "\n")
        write(f"/sys/bus/pci/devices/{slot}/class", kind + "\n")
    assert "1 on the bus" in text(ascend.examine(host(tmp_path), PLAIN, None), "Ascend NPU")
    found = nvidia.examine(host(tmp_path), PLAIN)
    assert "1 on the bus" in text(found, "NVIDIA card")
    assert states(found)["NVIDIA driver"] is State.MISSING


def nvidia_smi(cuda: str) -> str:
    """A script that answers as nvidia-smi does."""
    return (
        'case "$1" in --query-gpu*) echo "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, 580.95.05";; '
        f'*) echo "| NVIDIA-SMI 580.95.05  Driver Version: 580.95.05  CUDA Version: {cuda} |";; esac'
    )


def test_an_nvidia_machine_in_order_lacks_nothing(tmp_path: Path, tool: Write) -> None:
    """Name, memory, driver, and a driver that knows the CUDA that torch was built for."""
    tool("nvidia-smi", nvidia_smi("13.0"))
    found = nvidia.examine(host(tmp_path), CUDA)
    assert set(states(found).values()) == {State.OK}
    assert "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0" in text(found, "NVIDIA card")
    assert text(found, "NVIDIA driver").startswith("580.95.05")


def test_a_driver_older_than_torchs_cuda_is_missing(tmp_path: Path, tool: Write) -> None:
    """A driver runs every CUDA of its own major version, but no newer one."""
    tool("nvidia-smi", nvidia_smi("12.8"))
    found = nvidia.examine(host(tmp_path), CUDA)
    assert "the driver knows CUDA 12.8 at most" in text(found, "torch for CUDA")
    older = TorchBuild("2.13.0+cu126", "12.6")
    assert states(nvidia.examine(host(tmp_path), older))["torch for CUDA"] is State.OK


def test_a_driver_whose_tool_is_missing_is_read_from_the_kernel(
    tmp_path: Path, write: Write
) -> None:
    """/proc/driver/nvidia/version is there without nvidia-smi."""
    write("/dev/nvidia0", "")
    write(
        "/proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n",
    )
    found = nvidia.examine(host(tmp_path), CUDA)
    assert text(found, "NVIDIA driver").startswith("580.95.05")
    assert states(found)["torch for CUDA"] is State.UNKNOWN


def test_a_tool_that_hangs_is_ended(tmp_path: Path, tool: Write) -> None:
    """A driver that does not answer cannot hang the doctor."""
    tool("npu-smi", "sleep 600")
    ran = host(tmp_path).run("npu-smi", "info", timeout_s=0.2)
    assert ran is not None
    assert ran.code is None


def test_auto_takes_the_best_device_that_lacks_nothing() -> None:
    """npu before cuda before cpu, and it says why not the better ones."""
    no_npu = Finding(subject="a", state=State.MISSING, text="no card", needed_by=("npu",))
    no_cuda = Finding(subject="b", state=State.MISSING, text="old driver", needed_by=("cuda",))
    assert Examination.of("auto", []).device == "npu"
    assert Examination.of("auto", [no_npu]).device == "cuda"
    last = Examination.of("auto", [no_npu, no_cuda])
    assert (last.device, last.why) == ("cpu", "no npu: no card; no cuda: old driver")
    assert last.missing == ()
    assert Examination.of("npu", [no_npu, no_cuda]).missing == (no_npu,)


def test_what_torch_saw_decides_in_the_end() -> None:
    """A driver that torch cannot use is missing, whatever the files say."""
    assert ascend.judge(Seen(error="RuntimeError: aclInit failed")).blocks("npu")
    assert nvidia.judge(Seen()).blocks("cuda")
    assert not nvidia.judge(Seen(names=("NVIDIA H100",))).blocks("cuda")


def test_the_installed_torch_is_told_without_loading_it() -> None:
    """The version file says what `torch.__version__` and `torch.version.cuda` say."""
    script = (
        "import json, sys; from services.worker.flowserve.device.torch_build import TorchBuild; "
        "built = TorchBuild.installed(); early = 'torch' in sys.modules; import torch; "
        "print(json.dumps([early, built.version, torch.__version__, built.cuda, torch.version.cuda]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    early, version, real_version, cuda, real_cuda = json.loads(done.stdout)
    assert not early
    assert (version, cuda) == (real_version, real_cuda)


def test_neither_doctor_nor_verify_loads_torch_itself() -> None:
    """What may hang or crash is done in processes of its own."""
    script = (
        "import sys, deepflow.cli.doctor, deepflow.cli.verify; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_probe_tells_what_torch_saw() -> None:
    """In a process of its own, with a reason where there is no device."""
    if torch_probe.installed("torch-npu") is not None:
        pytest.skip("torch-npu is installed here")
    assert torch_probe.probe(here(), "npu") == Seen(error="torch sees no npu device")


def test_a_command_told_a_device_that_is_not_here_says_what_to_install(tmp_path: Path) -> None:
    """The message names the extra and CANN; auto and cpu are never refused."""
    with pytest.raises(Unavailable) as refused:
        require(host(tmp_path), "npu")
    assert "pip install 'deepflow[npu]'" in refused.value.message
    assert "CANN" in refused.value.message
    require(host(tmp_path), "cpu")
    require(host(tmp_path), "auto")


@pytest.mark.skipif(Path("/dev/davinci0").exists(), reason="there is an NPU here")
@pytest.mark.parametrize("command", [("up",), ("bench", "engine"), ("verify",)])
def test_every_command_that_takes_a_device_refuses_one_that_is_not_here(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """At once, before anything is pulled or started, with what to install."""
    env = {"PATH": "/usr/bin:/bin", "DEEPFLOW_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "deepflow.cli.main", *command, "--device", "npu"],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert "--device npu cannot be used here" in done.stderr
    assert "pip install 'deepflow[npu]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.service
def test_the_command_fails_only_for_what_the_device_needs(tmp_path: Path) -> None:
    """Exit code 0 for the CPU on a machine that runs these tests, 1 for a device that is not there, JSON for both."""
    env = {"PATH": "/usr/bin:/bin", "DEEPFLOW_HOME": str(tmp_path), "HOME": str(tmp_path)}
    codes = {}
    for device in ("cpu", "npu"):
        done = subprocess.run(
            [sys.executable, "-m", "deepflow.cli.main", "doctor", "--device", device, "--json"],
            capture_output=True, text=True, check=False, env=env,
        )  # fmt: skip
        report = json.loads(done.stdout)
        codes[device] = done.returncode
        assert report["device"] == device
        assert report["usable"][device] is (done.returncode == 0)
        assert {"python", "torch", "native kernels", "cores"} <= {
            finding["subject"] for finding in report["findings"]
        }
    assert codes["cpu"] == 0
    if not Path("/dev/davinci0").exists():
        assert codes["npu"] == 1
