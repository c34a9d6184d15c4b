"""What cluster/ ships runs commands that exist on search spaces that exist."""

import re
import shlex
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"


def test_manifests_are_yaml_and_run_a_shipped_search_space_on_data_they_fetch() -> None:
    for name in ("rayjob", "ray-cluster"):
        file = CLUSTER / f"{name}.yaml"
        assert yaml.safe_load(file.read_text()), file
        assert "effir-ray data get msmarco" in file.read_text()
        spaces = set(re.findall(r"search_spaces/[\w.-]+\.yaml", file.read_text()))
        assert spaces, file
        assert all((ROOT / space).is_file() for space in spaces)


def test_ray_job_resumes_on_the_shared_volume_with_the_version_of_the_image() -> None:
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    shell, option, script = shlex.split(job["spec"]["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    fetch, entry = (command.split() for command in script.split("&&"))
    assert fetch == ["effir-ray", "data", "get", "msmarco"]
    assert entry[:2] == ["effir-ray", "search"]
    assert "--resume" in entry
    assert entry[entry.index("--out") + 1].startswith("/shared/")
    image = re.search(r"rayproject/ray:([\d.]+)", (CLUSTER / "Dockerfile").read_text())
    assert image is not None
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == image[1]


def test_the_volume_outlives_the_job() -> None:
    claim = yaml.safe_load((CLUSTER / "volume.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (volume,) = {
        item["persistentVolumeClaim"]["claimName"]
        for item in yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"][
            "headGroupSpec"
        ]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in item
    }
    assert volume == claim["metadata"]["name"]


def test_the_cluster_begins_with_a_gpu_worker() -> None:
    """A search looks at the GPUs there are: with none, nothing would ever ask for more."""
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    assert cluster["available_node_types"]["gpu"]["min_workers"] >= 1


def test_every_file_the_image_copies_exists() -> None:
    lines = re.findall(r"^COPY --chown=\S+ (.+)$", (CLUSTER / "Dockerfile").read_text(), re.M)
    sources = [name for line in lines for name in line.split()[:-1]]
    assert sources
    assert all((ROOT / name).exists() for name in sources)


def test_clusters_ask_for_a_token_and_share_nothing_with_strangers() -> None:
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}
    (head,) = job["headGroupSpec"]["template"]["spec"]["containers"]
    assert {port["containerPort"] for port in head["ports"]} == {6379, 8265}
    cluster = yaml.safe_load((CLUSTER / "ray-cluster.yaml").read_text())
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert not any("777" in command for command in cluster["initialization_commands"])
