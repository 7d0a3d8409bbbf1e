import subprocess
from pathlib import Path

import mmdiff_ray
from mmdiff_ray.tracking import provenance


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_revision_is_that_of_the_checkout_with_the_number_of_changed_files(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    assert provenance.git_revision(tmp_path) is None  # nothing committed yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert provenance.git_revision(tmp_path) == (git(tmp_path, "rev-parse", "HEAD"), 0)
    (tmp_path / "a.py").write_text("2")
    assert provenance.git_revision(tmp_path) == (git(tmp_path, "rev-parse", "HEAD"), 1)


def test_an_installed_package_does_not_take_the_revision_of_the_project_around_it(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    package = tmp_path / ".venv" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert provenance.git_revision(package) is None


def test_outside_a_checkout_there_is_no_revision_and_no_error(tmp_path):
    assert provenance.git_revision(tmp_path) is None
    assert not any("git" in key for key in provenance.tags(tmp_path))


def test_the_versions_name_this_package_and_what_decides_a_result():
    versions = provenance.versions()
    assert versions["mmdiff-ray"] == mmdiff_ray.__version__
    assert {"python", "torch", "ray", "mlflow"} <= versions.keys()
