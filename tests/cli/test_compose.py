"""docker-compose.yml: valid, tight, and able to answer a chat, run as its processes on a machine without an engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepflow.cli.launcher import DRAIN_ORDER
from deepflow.deploy.nats_config import PRODUCER
from services.worker.settings import WorkerSettings
from tests.cli import machine
from tests.cli.machine import ROOT, Machine
from tests.worker.tiny import make_tiny

SERVICES = ("cache", "worker", "scheduler", "gateway")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKERS = {"cpu": "worker", "cuda": "worker-cuda", "npu": "worker-npu"}  # by profile
# Only a socket that is bound to every address answers here: that is how a published port reaches into a container.
_OUTSIDE = "127.0.0.2"
# A client in the machine's network: argv is url, key, JSON body; prints status and body.
_CLIENT = """
import sys, urllib.error, urllib.request
url, key, body = sys.argv[1:]
headers = {"Content-Type": "application/json"}
if key: headers["Authorization"] = "Bearer " + key
try:
    with urllib.request.urlopen(urllib.request.Request(url, body.encode() or None, headers), timeout=30) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except urllib.error.URLError as error:  # nobody listens yet
    print(0, "{}")
"""


@pytest.fixture(scope="module", params=WORKERS)
def profile(request: pytest.FixtureRequest) -> str:
    """Each of the three."""
    return str(request.param)


@pytest.fixture(scope="module")
def described(profile: str) -> dict[str, Any]:
    """The file under a profile, with no variable set."""
    return machine.read({}, profile)


@pytest.fixture(scope="module")
def worker(described: dict[str, Any], profile: str) -> dict[str, Any]:
    """The worker of the profile."""
    service: dict[str, Any] = described["services"][WORKERS[profile]]
    return service


@pytest.mark.service
@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/npu-8.yml"])
def test_the_files_are_valid(name: str) -> None:
    """The schema of the compose specification accepts them."""
    check = Path(sysconfig.get_path("scripts"), "check-jsonschema")
    result = subprocess.run(
        [check, "--builtin-schema", "vendor.compose-spec", ROOT / name],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


def test_only_the_gateway_is_published_and_only_on_loopback(described: dict[str, Any]) -> None:
    """Nobody outside this host reaches anything, and nobody at all reaches the bus."""
    published = {
        name: one["ports"] for name, one in described["services"].items() if "ports" in one
    }
    assert published == {"gateway": ["127.0.0.1:8000:8000"]}
    assert described["networks"]["bus"]["internal"] is True


def test_a_service_sees_its_own_secrets_only(described: dict[str, Any]) -> None:
    """Each secret volume belongs to one service; `init` writes them all."""
    for name, service in described["services"].items():
        secrets = [v.split(":") for v in service["volumes"] if "-secret:" in v]
        if name != "init":
            kind = "worker" if name in WORKERS.values() else name
            assert [volume for volume, *_ in secrets] == [f"{kind}-secret"]
            assert all(options == ["ro"] for *_, options in ([v[0], v[1], v[2:]] for v in secrets))


def test_the_arena_is_the_caches_and_the_workers(described: dict[str, Any], profile: str) -> None:
    """They alone share a folder in memory, at one path, of a size above the arena's, that the images' user owns."""
    holders = {
        name: [volume for volume in service["volumes"] if str(volume).startswith("arena:")]
        for name, service in described["services"].items()
    }
    assert {name for name, mounts in holders.items() if mounts} == {"cache", WORKERS[profile]}
    cache = described["services"]["cache"]
    for name in ("cache", WORKERS[profile]):
        environment = described["services"][name]["environment"]
        assert holders[name] == [f"arena:{environment['DEEPFLOW_ARENA_DIR']}"]
        assert environment["DEEPFLOW_FABRIC"] == "127.0.0.1"
    options = described["volumes"]["arena"]["driver_opts"]
    assert (options["type"], options["device"]) == ("tmpfs", "tmpfs")
    made = dict(one.split("=") for one in options["o"].split(","))
    dockerfile = (ROOT / cache["build"]["dockerfile"]).read_text()
    assert f"--uid {made['uid']} " in dockerfile
    assert made["mode"] == "0700"
    assert int(made["size"].rstrip("g")) << 30 > int(cache["environment"]["DEEPFLOW_ARENA_BYTES"])


def test_roles_are_split_by_a_variable() -> None:
    """DEEPFLOW_PD alone asks for no colocated TE, and DEEPFLOW_WORKERS for some beside it."""
    for variables, numbers in (
        ({}, (1, 1, 0, 0)),
        ({"DEEPFLOW_PD": "1p2d"}, (0, 0, 1, 2)),
        ({"DEEPFLOW_PD": "1p1d", "DEEPFLOW_WORKERS": "2"}, (2, 2, 1, 1)),
        ({"DEEPFLOW_WORKERS": "0..8"}, (0, 8, 0, 0)),
    ):
        environment = machine.read(variables)["services"]["worker"]["environment"]
        asked = {k: environment[k] for k in ("DEEPFLOW_PD", "DEEPFLOW_WORKERS", "DEEPFLOW_MODELS")}
        found = WorkerSettings.load(asked)
        bounds = (found.min_tes, found.max_tes)
        assert (*bounds, found.num_prefill, found.num_decode) == numbers


def test_every_service_is_bounded_and_watched(described: dict[str, Any]) -> None:
    """A memory limit each, and for what stays: a health check, and time enough to drain."""
    for name, service in described["services"].items():
        assert service["deploy"]["resources"]["limits"]["memory"]
        if name == "init":
            continue
        assert service["healthcheck"]["test"]
        grace_s = float(service["stop_grace_period"].rstrip("s"))
        assert grace_s > float(service.get("environment", {}).get("DEEPFLOW_GRACE_S", 0))


def test_compose_stops_in_the_drain_order(described: dict[str, Any], profile: str) -> None:
    """It stops against the dependencies, which are a chain: gateway, scheduler, worker, cache, nats."""
    services = described["services"]
    chain = ["gateway"]
    while depends := list(services[chain[-1]].get("depends_on", {})):
        assert len(depends) == 1
        chain += depends
    kinds = ["worker" if name == WORKERS[profile] else name for name in chain]
    assert kinds == [*DRAIN_ORDER, "init"]


def test_each_service_has_its_image(described: dict[str, Any], profile: str) -> None:
    """A Dockerfile of its own, built from the root, that runs the service's command as nobody special."""
    for kind in SERVICES:
        service = described["services"][WORKERS[profile] if kind == "worker" else kind]
        build = service["build"]
        assert build["context"] == "."
        dockerfile = (ROOT / build["dockerfile"]).read_text()
        assert f"CMD {json.dumps(service['command'])}" in dockerfile
        assert re.search(r"^USER deepflow$", dockerfile, re.MULTILINE)
        assert ("torch" in dockerfile.lower().replace("no torch", "")) == (kind == "worker")


# ------------------------------------------------------------------------------------------------------- profiles


def test_the_cpu_is_the_default() -> None:
    """Compose reads .env beside the file, and a profile on the command line replaces what it says."""
    assert re.findall(r"^COMPOSE_PROFILES=(.*)$", (ROOT / ".env").read_text(), re.MULTILINE) == [
        "cpu"
    ]


def test_profiles_differ_in_the_worker_alone(described: dict[str, Any], profile: str) -> None:
    """Five services are the same, and one worker is there, told its device."""
    assert set(described["services"]) == {
        "init",
        "nats",
        "cache",
        "scheduler",
        "gateway",
        WORKERS[profile],
    }
    worker = described["services"][WORKERS[profile]]
    common = machine.read({})["services"]["worker"]
    assert worker["environment"]["DEEPFLOW_DEVICE"] == profile
    assert (
        worker["environment"].items()
        >= (common["environment"] | {"DEEPFLOW_DEVICE": profile}).items()
    )
    for key in ("command", "cap_drop", "security_opt", "networks", "healthcheck", "depends_on"):
        assert worker[key] == common[key]


def test_what_a_worker_is_built_from_its_dockerfile_asks_for(worker: dict[str, Any]) -> None:
    """Every build argument is one that the Dockerfile declares, and the extras are those of pyproject.toml."""
    dockerfile = (ROOT / worker["build"]["dockerfile"]).read_text()
    declared = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    arguments = declared | worker["build"].get("args", {})
    assert set(arguments) == set(declared)
    extras = PROJECT["optional-dependencies"]
    assert set(arguments["EXTRA"].split(",")) <= set(extras)
    assert re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) == ["${BASE}", "${BASE}"]


def test_an_npu_worker_gets_what_cann_needs() -> None:
    """One card and the three managers, the driver read-only from the host, a torch without CUDA, nothing more."""
    worker = machine.read({}, "npu")["services"]["worker-npu"]
    assert worker["devices"] == [
        "/dev/davinci0", "/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"
    ]  # fmt: skip
    mounts = [volume for volume in worker["volumes"] if isinstance(volume, dict)]
    assert {mount["target"] for mount in mounts} == {
        "/usr/local/Ascend/driver", "/usr/local/dcmi", "/usr/local/bin/npu-smi", "/etc/ascend_install.info"
    }  # fmt: skip
    assert all(mount["read_only"] and not mount["bind"]["create_host_path"] for mount in mounts)
    environment = worker["environment"]
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    # A variable without a value is the host's, or not there: an empty one would hide every NPU.
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] is None
    assert (
        "ASCEND_VISIBLE_DEVICES" not in environment
    )  # Ascend Docker Runtime's; never beside `devices`
    assert worker["build"]["args"]["TORCH"] == "cpu"
    assert re.fullmatch(r"quay\.io/ascend/cann:.*ubuntu.*py3\.11", worker["build"]["args"]["BASE"])
    assert "privileged" not in worker


def test_another_npu_can_be_named() -> None:
    """By a variable, as the base image and the place of npu-smi can."""
    chosen = {"DEEPFLOW_NPU": "/dev/davinci3", "DEEPFLOW_CANN_IMAGE": "cann:mine"}
    worker = machine.read(chosen, "npu")["services"]["worker-npu"]
    assert worker["devices"][0] == "/dev/davinci3"
    assert worker["build"]["args"]["BASE"] == "cann:mine"


def test_eight_npus_are_handed_in_together() -> None:
    """The second file adds to the same service, and to no other."""
    added = yaml.safe_load((ROOT / "deploy/npu-8.yml").read_text())["services"]
    assert set(added) == {"worker-npu"}
    assert added["worker-npu"]["devices"] == [f"/dev/davinci{number}" for number in range(8)]
    assert [mount["target"] for mount in added["worker-npu"]["volumes"]] == ["/etc/hccn.conf"]


def test_a_cuda_worker_reserves_its_cards() -> None:
    """By the container toolkit's driver, which also brings the driver's libraries; torch is the CUDA build."""
    worker = machine.read({"DEEPFLOW_GPUS": "2"}, "cuda")["services"]["worker-cuda"]
    reserved = worker["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}]
    assert worker["environment"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert worker["build"]["args"] == {
        "BASE": "python:3.11-slim",
        "EXTRA": "cuda,cli",
        "TORCH": "cuda",
    }


@pytest.mark.parametrize(
    ("torch", "machine_name", "installs"),
    [
        ("cpu", "x86_64", "--extra-index-url https://download.pytorch.org/whl/cpu {torch}+cpu"),
        ("cpu", "aarch64", "{torch}"),
        ("cuda", "x86_64", "{torch}"),
        ("cuda", "aarch64", "{torch}"),
        (
            "cu126",
            "x86_64",
            "--extra-index-url https://download.pytorch.org/whl/cu126 {torch}+cu126",
        ),
    ],
)
def test_the_image_takes_the_torch_that_its_device_needs(
    tmp_path: Path, torch: str, machine_name: str, installs: str
) -> None:
    """The Dockerfile's own line, run with a pip that says what it was asked for."""
    dockerfile = (ROOT / "services/worker/Dockerfile").read_text().replace("\\\n", "")
    line = next(
        one.removeprefix("RUN ")
        for one in dockerfile.splitlines()
        if one.startswith('RUN torch="$(')
    )
    for name, script in (("pip", 'echo "$@"'), ("uname", f"echo {machine_name}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)
    done = subprocess.run(
        ["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": torch},
    )  # fmt: skip
    asked = done.stdout.strip().removeprefix("install --no-cache-dir ")
    pinned = PROJECT["optional-dependencies"]["worker"][0]
    assert asked == installs.format(torch=pinned)


def test_the_entrypoint_takes_up_cann_and_then_runs_the_command(tmp_path: Path) -> None:
    """CANN's variables and the driver's libraries are there where the image has them, and the exit code is the
    command's; where it has none, only the command is."""
    entrypoint = str(ROOT / "services/worker/entrypoint.sh")
    show = ["sh", "-c", 'echo "$CANN:$LD_LIBRARY_PATH:$TORCH_DEVICE_BACKEND_AUTOLOAD"; exit 7']
    env = {"PATH": "/usr/bin:/bin", "DEEPFLOW_ASCEND_HOME": str(tmp_path)}
    done = subprocess.run([entrypoint, *show], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "::0\n")
    (tmp_path / "ascend-toolkit").mkdir()
    (tmp_path / "ascend-toolkit/set_env.sh").write_text(
        "export CANN=here LD_LIBRARY_PATH=/cann:$UNSET\n"
    )
    (tmp_path / "driver/lib64/driver").mkdir(parents=True)
    done = subprocess.run([entrypoint, *show], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"here:{tmp_path}/driver/lib64/driver:/cann::0\n"


class Platform:
    """The services of the file, started in order."""

    def __init__(self, host: Machine) -> None:
        self.host = host
        self.codes: dict[str, int] = {}

    @property
    def key(self) -> str:
        """What `init` showed."""
        found = re.search(r"sk-[0-9a-f]+", self.host.log("init"))
        assert found, self.host.log("init")
        return found[0]

    def ask(self, path: str, key: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of the gateway's answer."""
        text = json.dumps(body) if body is not None else ""
        command = ["python3", "-c", _CLIENT, f"http://{_OUTSIDE}:8000{path}", key, text]
        done = subprocess.run(
            self.host.inside(command), capture_output=True, text=True, check=True, timeout=60
        )
        status, _, answer = done.stdout.partition(" ")
        try:
            return int(status), json.loads(answer)
        except ValueError:
            return int(status), answer


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Everything up, with a tiny model where `init` would have put a pulled one."""
    if reason := machine.can_run():
        pytest.skip(reason)
    host = Machine(tmp_path_factory.mktemp("compose"), {"DEEPFLOW_MODELS": "tiny"})
    make_tiny(host.volume("models") / "models" / "tiny")
    started = Platform(host)
    try:
        for name in host.start_order():
            process = host.start(name)
            if name == "init":
                assert process.wait(60) == 0, host.log(name)
            else:
                host.wait_healthy(name)
        yield started
    finally:
        host.close()


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


@pytest.mark.system
@pytest.mark.apart
@pytest.mark.timeout(180)
class TestPlatform:
    """In order: asked, looked at, stopped."""

    def test_a_chat_goes_through_with_the_key(self, platform: Platform) -> None:
        """`init`'s key opens the gateway, and the answer has the tokens asked for."""
        for _ in range(300):
            if platform.ask("/ready", "")[0] == 200:
                break
        status, answer = platform.ask("/v1/chat/completions", platform.key, CHAT)
        assert status == 200, (answer, *map(platform.host.log, SERVICES))
        assert 1 <= answer["usage"]["completion_tokens"] <= 8
        assert answer["choices"][0]["finish_reason"] in ("length", "stop")

    def test_nothing_goes_through_without_it(self, platform: Platform) -> None:
        """No key and a wrong key are 401."""
        for key in ("", "sk-wrong"):
            assert platform.ask("/v1/chat/completions", key, CHAT)[0] == 401

    def test_a_producer_is_answered(self, platform: Platform) -> None:
        """A program on the bus gets its stream with the producers' password, over an account that has only prompts."""
        password = (
            (platform.host.volume(f"{PRODUCER}-secret") / "nats-password").read_text().strip()
        )
        script = f"""
import asyncio, json, nats
async def main():
    bus = await nats.connect("nats://127.0.0.1:4222", user={PRODUCER!r}, password={password!r})
    inbox, seen = bus.new_inbox(), asyncio.Queue()
    async def hear(message): seen.put_nowait(message.data)
    await bus.subscribe(inbox, cb=hear)
    await bus.publish("deepflow.v1.prompt.tiny", json.dumps({CHAT!r}).encode(), reply=inbox)
    while True:
        data = await asyncio.wait_for(seen.get(), 30)
        print(data.decode())
        if not data or b"DONE" in data or b"usage" in data or b"error" in data:
            break
    await bus.close()
asyncio.run(main())
"""
        scripts = Path(sysconfig.get_path("scripts"), "python")
        done = subprocess.run(
            platform.host.inside([str(scripts), "-c", script]),
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + platform.host.log("gateway")
        assert "tiny" in done.stdout
        assert "error" not in done.stdout, done.stdout

    def test_the_permissions_suffice(self, platform: Platform) -> None:
        """In all of the above the bus refused nothing to anybody."""
        assert "Violation" not in platform.host.log("nats")
        for service in SERVICES:
            assert "permissions violation" not in platform.host.log(service).lower()

    def test_the_services_share_no_folder_but_their_volumes(self, platform: Platform) -> None:
        """What one writes to /tmp or /dev/shm the next one does not see, nor anybody else's secrets."""
        probe = (
            "import os, sys; sys.exit(bool(os.listdir('/dev/shm')) or os.path.exists('/tmp/mark'))"
        )
        write = "open('/tmp/mark', 'w').close(); open('/dev/shm/mark', 'w').close()"
        assert platform.host.start("worker", ["python", "-c", write]).wait() == 0
        assert platform.host.start("cache", ["python", "-c", probe]).wait() == 0
        show = "import os; print('secrets:', sorted(os.listdir('/run/deepflow')))"
        assert platform.host.start("cache", ["python", "-c", show]).wait() == 0
        assert "secrets: ['nats-password']" in platform.host.log("cache")

    def test_init_keeps_what_is_there(self, platform: Platform) -> None:
        """Another start of the same volumes shows the same key."""
        assert platform.host.start("init").wait(60) == 0
        assert set(re.findall(r"sk-[0-9a-f]+", platform.host.log("init"))) == {platform.key}

    def test_they_stop_in_order(self, platform: Platform) -> None:
        """Each drains on SIGTERM by itself and ends well."""
        for service in DRAIN_ORDER:
            platform.codes[service] = platform.host.stop(service)
        assert platform.codes == dict.fromkeys(DRAIN_ORDER, 0)
