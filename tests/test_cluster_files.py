"""What cluster/ ships runs commands that exist on search spaces that exist."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"


def test_manifests_are_yaml_and_run_a_shipped_search_space() -> None:
    for file in CLUSTER.glob("*.yaml"):
        assert all(yaml.safe_load_all(file.read_text())), file
        spaces = set(re.findall(r"search_spaces/[\w.-]+\.yaml", file.read_text()))
        assert spaces, file
        assert all((ROOT / space).is_file() for space in spaces)


def test_ray_job_resumes_on_the_shared_volume_with_the_version_of_the_image() -> None:
    job, claim = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
    entry = job["spec"]["entrypoint"].split()
    assert entry[:2] == ["effir-ray", "search"]
    assert "--resume" in entry
    assert entry[entry.index("--out") + 1].startswith("/shared/")
    image = re.search(r"rayproject/ray:([\d.]+)", (CLUSTER / "Dockerfile").read_text())
    assert image is not None
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == image[1]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_every_file_the_image_copies_exists() -> None:
    lines = re.findall(r"^COPY --chown=\S+ (.+)$", (CLUSTER / "Dockerfile").read_text(), re.M)
    sources = [name for line in lines for name in line.split()[:-1]]
    assert sources
    assert all((ROOT / name).exists() for name in sources)
