"""What cluster/ ships: every file against the schema of what reads it, every command against the real CLI."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from effir_ray.cli import app
from effir_ray.provenance import __version__
from tests.helpers.kuberay import KINDS, unknown_fields

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.iterdir())
LAUNCHERS = ["aws", "gcp", "on-premise"]
MANIFESTS = ["rayjob", "raycluster"]
KUBERNETES = kubernetes_validate.latest_version()
SHELLCHECK = Path(sys.executable).parent / "shellcheck"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own command line

COMMANDS = get_command(app)
GROUP = COMMANDS.make_context("effir-ray", [], resilient_parsing=True)


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> Any:
    spec = load(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_templates(name: str) -> list[Any]:
    spec = cluster_spec(name)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def containers(name: str) -> list[Any]:
    return [container for template in pod_templates(name) for container in template["spec"]["containers"]]


# Commands


def quoted_commands(text: str) -> Iterator[list[str]]:
    """The words of every ``effir-ray COMMAND ...`` in ``text``, up to the end of the shell command."""
    names = "|".join(COMMANDS.commands)  # type: ignore[attr-defined]
    for line in re.findall(rf"\beffir-ray ((?:{names})\b[^\n`]*)", text.replace("\\\n", " ")):
        words = []
        for word in _shell_words(line):
            if not set(word) - set("();<>|&"):
                break
            words.append(word)
        yield words


def _shell_words(line: str) -> list[str]:
    for end in (len(line), *(match.start() for match in re.finditer(r"[\"']", line))):
        try:
            lexer = shlex.shlex(line[:end], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            return list(lexer)
        except ValueError:  # the quote was opened before `effir-ray`
            continue
    raise AssertionError(f"not a shell command: {line}")


def parse(words: list[str]) -> None:
    """Parse as the command line would, without running anything. A name alone is a mention."""
    name, command, rest = GROUP.command.resolve_command(GROUP, words)  # type: ignore[attr-defined]
    while hasattr(command, "commands"):
        parent = command.make_context(name, rest, parent=GROUP, resilient_parsing=True)
        name, command, rest = command.resolve_command(parent, rest)
    if len(words) > 1:
        command.make_context(name, rest, parent=GROUP)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_quoted_command_parses(file: Path) -> None:
    for words in quoted_commands(file.read_text()):
        parse(words)


def test_commands_are_found_where_they_are() -> None:
    found = [words for file in FILES for words in quoted_commands(file.read_text())]
    assert {words[0] for words in found} >= {"search", "data", "submit", "results", "pareto", "jobs", "stop"}
    assert ["search", "$space", "--out", "$out", "--address", "auto", "--resume"] in found
    assert ["data", "get", "msmarco"] in found
    with pytest.raises(Exception, match="--adress"):
        parse(["jobs", "--adress", "http://head:8265"])


def test_the_guide_shows_only_commands_that_exist() -> None:
    shown = [line for line in (CLUSTER / "README.md").read_text().splitlines() if line.startswith("    ")]
    names = set(re.findall(r"(?:^ +|[|&'] ?|-- )effir-ray (\S+)", "\n".join(shown), re.M))
    assert len(names) > 4
    assert names <= set(COMMANDS.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_search_spaces_that_are_named_exist(file: Path) -> None:
    for space in re.findall(r"search_spaces/[\w./-]+\.yaml", file.read_text()):
        assert (ROOT / space).is_file(), space


def test_the_files_that_the_guide_names_are_there_and_all_are_named() -> None:
    guide = (CLUSTER / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", guide):
        assert (CLUSTER / link).exists(), link
    for name in re.findall(r"(?<![/\w])cluster/([\w-]+(?:\.\w+)?)", guide):
        assert (CLUSTER / name).exists(), name
    for file in FILES:
        assert file.name in guide or file.name == "README.md", file


# Ray's cluster launcher


def launcher_schema() -> Any:
    import ray

    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_what_ray_expects(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(load(name), launcher_schema())
    prepared = prepare_config(load(name))  # its defaults, and what no schema says
    validate_config(prepared)


def test_a_field_that_the_launcher_does_not_know_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker'"):
        jsonschema.validate(load("aws") | {"max_worker": 3}, launcher_schema())


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_gpu_nodes_come_on_demand_to_a_head_that_does_no_work(name: str) -> None:
    """With CPUs on the head a first trial would run there, see no GPU and ask for none."""
    types = load(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] == 8


def test_gpus_have_the_80_gb_that_the_training_settings_expect() -> None:
    assert "80 GB" in (ROOT / "search_spaces/train/mistral-7b-msmarco.yaml").read_text()
    assert load("aws")["available_node_types"]["gpu"]["node_config"]["InstanceType"] == "p4de.24xlarge"
    assert load("gcp")["available_node_types"]["gpu"]["node_config"]["machineType"] == "a2-ultragpu-8g"
    assert set(load("skypilot")["resources"]["accelerators"]) == {"A100-80GB", "H100"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_clusters_ask_for_a_token_and_open_no_dashboard(name: str) -> None:
    cluster = load(name)
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    start = " ".join(cluster["head_start_ray_commands"])  # Ray's own opens it to the network
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    assert not any("777" in command for command in cluster["initialization_commands"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_start_knows_the_options_of_the_launcher_files(name: str) -> None:
    cluster = load(name)
    for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        for part in command.split(";"):
            words = shlex.split(part.replace("$RAY_HEAD_IP", "10.0.0.1"))
            if words[:2] == ["ray", "start"]:
                parse_ray("start", words[2:])


def parse_ray(name: str, words: list[str]) -> Any:
    from ray.scripts.scripts import cli

    return cli.commands[name].make_context(name, words)


# Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_use_fields_that_kuberay_has(name: str) -> None:
    manifest = load(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert list(unknown_fields(manifest, KINDS[manifest["kind"]])) == []
    for template in pod_templates(name):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    kubernetes_validate.validate(load("volume"), KUBERNETES, strict=True)


def test_a_field_that_kuberay_does_not_have_is_found() -> None:
    manifest = load("rayjob")
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 0
    assert list(unknown_fields(manifest, KINDS["RayJob"])) == [
        "spec.rayClusterSpec.workerGroupSpecs.minReplica"
    ]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_clusters_scale_from_no_gpu_and_reserve_what_they_use(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    assert workers["maxReplicas"] > 0
    tolerated = {toleration["key"] for toleration in workers["template"]["spec"]["tolerations"]}
    assert tolerated == {"nvidia.com/gpu"}
    for container in containers(name):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"readinessProbe", "livenessProbe"} <= set(container)
    assert containers(name)[1]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_a_ray_job_gives_up_waiting_and_tries_again() -> None:
    spec = load("rayjob")["spec"]
    assert spec["preRunningDeadlineSeconds"] > 0
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_the_ray_job_and_the_ray_cluster_are_the_same_cluster() -> None:
    assert cluster_spec("rayjob") == cluster_spec("raycluster")


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_clusters_ask_for_a_token_and_share_nothing_with_strangers(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP, inside alone
    assert {port["containerPort"] for port in containers(name)[0]["ports"]} == {6379, 8265}
    head, *workers = pod_templates(name)
    for template in (head, *workers):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "automountServiceAccountToken" not in head["spec"], "its autoscaler asks Kubernetes for nodes"
    assert all(template["spec"]["automountServiceAccountToken"] is False for template in workers)
    for container in containers(name):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_ray_job_resumes_on_the_shared_volume() -> None:
    fetch, entry = quoted_commands((CLUSTER / "rayjob.yaml").read_text())
    assert fetch == ["data", "get", "msmarco"]
    assert "--resume" in entry
    assert entry[entry.index("--out") + 1].startswith("/shared/")


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_volume_outlives_the_cluster(name: str) -> None:
    claim = load("volume")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in pod_templates(name):
        claims = [volume.get("persistentVolumeClaim") for volume in template["spec"]["volumes"]]
        assert {"claimName": claim["metadata"]["name"]} in claims


# Slurm and SkyPilot


def scripts() -> Iterator[tuple[str, str]]:
    yield "slurm.sh", (CLUSTER / "slurm.sh").read_text()
    for part in ("setup", "run"):
        yield f"skypilot.yaml {part}", f"#!/usr/bin/env bash\n{load('skypilot')[part]}"
    for name in LAUNCHERS:
        yield f"{name}.yaml", "#!/usr/bin/env bash\n" + "\n".join(load(name)["initialization_commands"])


@pytest.mark.parametrize("script", [text for _, text in scripts()], ids=[name for name, _ in scripts()])
def test_scripts_are_sound(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    checked = subprocess.run([SHELLCHECK, "-x", "-"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder of commands that stand in for Slurm's, on the PATH before all others: each writes what it was
    given. (`ray symmetric-run` itself would end with `ray stop`, for every Ray of this machine.)"""
    record = f'printf "%s\\n" "$(basename "$0")" "$@" >> {tmp_path}/calls; printf "\\n" >> {tmp_path}/calls'
    bodies = {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": f"{record}; env > {tmp_path}/environment",
        "effir-ray": record,
    }
    for name, body in bodies.items():
        file = tmp_path / name
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("nodes", ["1", "4"])
def test_slurm_starts_one_ray_over_all_nodes(slurm: Path, nodes: str) -> None:
    environment = {
        "PATH": f"{slurm}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_CPUS_ON_NODE": "64",
        "SLURM_JOB_ID": "42",
    }
    command = ["bash", CLUSTER / "slurm.sh", "space.yaml", "/shared/a study"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    srun, pareto = [call.split("\n") for call in (slurm / "calls").read_text().strip().split("\n\n")]
    assert srun[0] == "srun"
    assert {f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(srun)
    ray = srun[srun.index("ray") :]
    assert ray[:2] == ["ray", "symmetric-run"]
    parsed = parse_ray("symmetric-run", ray[2:]).params
    assert (parsed["address"], parsed["min_nodes"]) == ("node7:6379", int(nodes))
    parse_ray("start", ["--head", *parsed["ray_args_and_entrypoint"][:1]])  # what is left is for `ray start`
    entry = ray[ray.index("--") + 1 :]
    assert entry[0] == "effir-ray"
    parse(entry[1:])
    assert entry[entry.index("--out") + 1] == "/shared/a study"
    assert pareto == ["effir-ray", "pareto", "/shared/a study"]
    given = dict(line.split("=", 1) for line in (slurm / "environment").read_text().splitlines())
    assert given["RAY_AUTH_MODE"] == "token"
    assert len(given["RAY_AUTH_TOKEN"]) == 64
    from ray._private.ray_constants import env_integer

    assert env_integer("RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT", 30) == 30, "set where tests run"
    assert int(given["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 600


def test_slurm_says_what_it_needs(slurm: Path) -> None:
    asked = subprocess.run(["bash", CLUSTER / "slurm.sh"], capture_output=True, text=True)
    assert asked.returncode != 0
    assert "SPACE.yaml OUT" in asked.stderr


_SKYPILOT = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "volumes",
    "file_mounts",
    "setup",
    "run",
    "config",
    "service",
}
_SKYPILOT_RESOURCES = {
    "infra",
    "accelerators",
    "accelerator_args",
    "cpus",
    "memory",
    "instance_type",
    "use_spot",
    "disk_size",
    "disk_tier",
    "network_tier",
    "image_id",
    "ports",
    "labels",
    "autostop",
    "any_of",
    "ordered",
    "job_recovery",
}


def test_the_skypilot_task_has_known_fields_no_open_port_and_no_secret() -> None:
    task = load("skypilot")
    assert set(task) <= _SKYPILOT
    assert set(task["resources"]) <= _SKYPILOT_RESOURCES
    assert "ports" not in task["resources"]
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert task["envs"]["RAY_AUTH_MODE"] == "token"
    assert "ray stop" not in task["run"]
    for line in re.findall(r"ray start ([^;|]+?)(?:;|$)", task["run"].replace("\\\n", " "), re.M):
        parse_ray("start", shlex.split(line.replace("$head", "10.0.0.1")))


# Image


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def test_the_image_has_a_target_for_cpus_and_one_for_gpus_on_pinned_bases() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    ray = re.search(r"^ray==(\S+)$", constraints, re.M)
    assert ray is not None
    source, *bases = re.findall(r"^FROM (\S+) AS (\w+)$", dockerfile(), re.M)
    assert source == ("scratch", "source")
    assert [name for _, name in bases] == ["cpu", "cuda"]
    digest = f"sha256:{'0' * 64}"
    for (base, name), kind in zip(bases, ("cpu", "gpu"), strict=True):
        argument = f"{name.upper()}_DIGEST"
        assert re.search(rf"^ARG {argument}$", dockerfile(), re.M), "without a default: nobody could know it"
        assert expanded(base, {argument: digest}) == (f"rayproject/ray:{ray[1]}-py311-{kind}@{digest}", "")
        for missing in ({}, {argument: ""}):
            built, said = expanded(base, missing)
            assert built == "" and argument in said and "see-cluster/README.md" in said
        assert f"--build-arg {argument}" in (CLUSTER / "README.md").read_text()
    for stage in dockerfile().split("\nFROM ")[2:]:
        assert re.findall(r"^USER (\w+)$", stage, re.M)[-1] == "ray"
        assert "-c constraints.txt" in stage


def expanded(base: str, arguments: dict[str, str]) -> tuple[str, str]:
    """What a builder makes of an image's name, and what it says: the shell expands ``${NAME:?why}`` alike."""
    done = subprocess.run(
        ["bash", "-c", f'printf %s "{base}"'], env=arguments, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) == bool(done.stdout)
    return done.stdout, done.stderr


def test_every_file_the_image_copies_exists() -> None:
    lines = re.findall(r"^COPY (?!--from)(.+)$", dockerfile(), re.M)
    sources = [name for line in lines for name in line.split()[:-1]]
    assert len(sources) == 6
    assert all((ROOT / name).exists() for name in sources)


def test_all_files_name_the_images_and_the_ray_of_the_dockerfile() -> None:
    built = set(re.findall(r"-t (registry\S+)", dockerfile()))
    assert built == {f"registry.example.com/effir-ray:{__version__}-{target}" for target in ("cpu", "cuda")}
    for name in LAUNCHERS:
        assert {load(name)["docker"]["head_image"], load(name)["docker"]["worker_image"]} == built
    for name in MANIFESTS:
        assert {container["image"] for container in containers(name)} == built
        assert f"rayproject/ray:{cluster_spec(name)['rayVersion']}-" in dockerfile()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_passes_a_dry_build(target: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "buildx", "ls"], capture_output=True).returncode != 0:
        pytest.skip("no image builder here")
    command = [docker, "buildx", "build", "--check", "-f", CLUSTER / "Dockerfile", "--target", target]
    for name in ("CPU_DIGEST", "CUDA_DIGEST"):
        command += ["--build-arg", f"{name}=sha256:{'0' * 64}"]
    checked = subprocess.run([*command, ROOT], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
