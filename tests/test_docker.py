"""The images: one list of steps for both, layers that outlive a change of code, and keys that are made at the start."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import build_horovod
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
SSHD = shutil.which("sshd", path="/usr/sbin:/sbin")
QUIETLY = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}


def steps(kind):
    """The instructions of a Dockerfile as (name, arguments), with lines joined and spaces alike."""
    lines = (DOCKER / kind / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\\\n", " ", text).splitlines()
    return [tuple(" ".join(line.split()).split(" ", 1)) for line in joined if line.strip()]


def where(kind, *step):
    return steps(kind).index(step)


# The two files


def test_the_gpus_steps_are_the_cpus_and_those_of_cuda():
    """Without the default base, and without what names CUDA's choices, the same instructions in the same order."""
    cpu, gpu = steps("cpu"), steps("gpu")
    own = [step for step in gpu if step not in cpu]
    assert [step for step in gpu if step in cpu] == [step for step in cpu if not step[1].startswith("BASE=")]
    assert [step for step in cpu if step not in gpu] == [("ARG", "BASE=debian:bookworm-slim")]
    assert [step[0] for step in own] == ["ARG", "ARG", "ARG", "ARG", "ENV"]
    assert own[0][1].startswith("CUDA=") and own[1] == ("ARG", "BASE=nvidia/cuda:${CUDA}-devel-ubuntu24.04")
    assert own[2] == ("ARG", "HOROVOD_GPU_OPERATIONS=NCCL")
    assert all("HOROVOD_GPU_OPERATIONS" in step[1] or "CUDA" in step[1] for step in own)


def test_the_gpus_base_has_the_cuda_that_torch_is_built_with():
    pinned = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "environment/constraints.txt").read_text(), re.M)[1]
    assert dict(step[1].split("=", 1) for step in steps("gpu") if step[0] == "ARG")["CUDA"].startswith(pinned + ".")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_what_takes_minutes_comes_before_the_code_and_sees_only_its_inputs(kind):
    before = steps(kind)[: where(kind, "COPY", "--chown=qgenx . .")]
    copied = [word for name, rest in before if name == "COPY" for word in rest.split()[:-1] if "=" not in word]
    named = ["docker/ssh/client.conf"]
    named += [f"environment/{name}" for name in ("requirements.txt", "constraints.txt", "build_horovod.py")]
    assert copied == named
    assert before[-1] == ("RUN", "python environment/build_horovod.py")
    assert any("pip install" in rest and "--constraint environment/constraints.txt" in rest for _, rest in before)
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_user_is_not_root_and_horovod_says_how_it_is(kind):
    assert [rest for name, rest in steps(kind) if name == "USER"] == ["qgenx"]
    assert where(kind, "USER", "qgenx") < where(kind, "COPY", "--chown=qgenx . .")
    health = next(rest for name, rest in steps(kind) if name == "HEALTHCHECK")
    assert health.endswith('CMD ["horovodrun", "--check-build"]')


def test_the_gpus_choices_reach_horovods_build(monkeypatch):
    chosen = next(rest for name, rest in steps("gpu") if name == "ENV" and "HOROVOD" in rest)
    names = re.findall(r"(HOROVOD_\w+)=", chosen)
    for name in names:
        monkeypatch.setenv(name, "chosen")
    monkeypatch.setattr(build_horovod, "cuda_toolkit", lambda: "")
    assert not set(names) & set(build_horovod.build_environment())
    monkeypatch.setattr(build_horovod, "cuda_toolkit", lambda: "/usr/local/cuda")
    assert [build_horovod.build_environment()[name] for name in names] == ["chosen", "chosen"]


def test_no_private_key_is_in_the_checkout_and_none_of_the_base_stays_in_an_image():
    names = [path for path in DOCKER.rglob("*") if path.is_file()]
    assert not [path for path in names if "PRIVATE KEY" in path.read_text()]
    for kind in ("cpu", "gpu"):
        installs = [rest for _, rest in steps(kind) if "apt-get install" in rest]
        assert installs and all(rest.endswith("/etc/ssh/ssh_host_*") for rest in installs)


# A node


@pytest.fixture
def start(tmp_path):
    """docker/start as a command, with a folder for the user's keys."""
    keys = tmp_path / "ssh"
    keys.mkdir(mode=0o700)
    return lambda *command: (["sh", str(DOCKER / "start"), *command], {**os.environ, "SSH_FOLDER": str(keys)})


def test_a_container_runs_its_command_as_given(start):
    command, env = start("sh", "-c", 'echo "$1"; exit 3', "sh", "two  words")
    done = subprocess.run(command, env=env, **QUIETLY)
    assert (done.returncode, done.stdout) == (3, "two  words\n")


def test_nodes_that_start_at_once_make_one_key_for_all(start, tmp_path):
    command, env = start("cat", str(tmp_path / "ssh" / "authorized_keys"))
    nodes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    read = {node.communicate(timeout=60)[0] for node in nodes}
    assert read == {(tmp_path / "ssh" / "id_ed25519.pub").read_text()}
    assert (tmp_path / "ssh" / "id_ed25519").stat().st_mode & 0o777 == 0o600


def test_keys_that_are_there_are_used(start, tmp_path):
    (tmp_path / "ssh" / "authorized_keys").write_text("as mounted")
    command, env = start("true")
    assert subprocess.run(command, env=env, **QUIETLY).returncode == 0
    assert os.listdir(tmp_path / "ssh") == ["authorized_keys"]


@pytest.mark.skipif(SSHD is None, reason="needs sshd (the package openssh-server)")
def test_a_node_lets_its_user_in_by_the_key_and_nobody_else(start, tmp_path):
    keys = tmp_path / "ssh"
    command, env = start("sshd", "-p", str(port := free_port()), "-o", f"AuthorizedKeysFile={keys}/authorized_keys")
    if os.geteuid() == 0:  # whose sshd wants it
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(tmp_path / "log", "w") as log:
        node = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(port, node, tmp_path / "log")
        assert enter(port, keys / "id_ed25519").stdout == "inside\n"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], **QUIETLY)
        refused = enter(port, tmp_path / "other")
        assert refused.returncode == 255 and "Permission denied" in refused.stderr
    finally:
        node.kill()
        node.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(port, node, log):
    """Returns when something listens."""
    deadline = time.monotonic() + 30
    while node.poll() is None and time.monotonic() < deadline:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())


def enter(port, key):
    """Runs a command through ssh with the settings that the image has, and this key."""
    to = ["-F", str(DOCKER / "ssh" / "client.conf"), "-p", str(port), "-i", str(key), "-o", "IdentitiesOnly=yes"]
    command = ["ssh", *to, "-o", "BatchMode=yes", f"{getpass.getuser()}@127.0.0.1", "echo inside"]
    return subprocess.run(command, **QUIETLY)


# Three nodes


def test_compose_starts_a_rank_on_each_of_its_three_nodes():
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {name: service["hostname"] for name, service in services.items()} == {n: n for n in services}
    assert sorted(services) == ["node1", "node2", "node3"]
    run = services["node1"]["command"][-1]
    assert "-np 3 -H node1:1,node2:1,node3:1 $$JOB" in run
    assert services["node1"]["depends_on"] == {node: {"condition": "service_healthy"} for node in ("node2", "node3")}
    assert services["node2"]["command"] == services["node3"]["command"] == ["sshd"]
    assert all("keys:/home/qgenx/.ssh" in service["volumes"] for service in services.values())


def test_compose_names_the_image_and_the_dockerfile_of_the_checkout():
    build = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["node1"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
