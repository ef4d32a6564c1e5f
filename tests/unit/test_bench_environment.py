from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta

import torch

from refold.bench import environment as module
from refold.bench.measure import environment


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_environment_names_versions_and_machine_but_no_path():
    record = environment()
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["refold"]
    assert record["timm"]
    assert record["cpu"]
    when = datetime.fromisoformat(record["date"])
    assert timedelta(0) <= datetime.now(UTC) - when < timedelta(minutes=1)
    assert json.loads(json.dumps(record)) == record
    assert not any(str(module.Path.home()) in str(v) or "site-packages" in str(v) for v in record.values())


def test_commit_is_that_of_our_own_checkout_only(tmp_path, monkeypatch):
    ours = tmp_path / "environment.py"
    ours.write_text("")
    monkeypatch.setattr(module, "__file__", str(ours))
    assert environment()["commit"] is None  # no checkout

    git(tmp_path, "init", "-q")
    (tmp_path / "theirs.txt").write_text("")
    git(tmp_path, "add", "theirs.txt")
    git(tmp_path, "commit", "-q", "-m", "another project")
    assert environment()["commit"] is None  # inside the checkout of another project, as in its .venv

    git(tmp_path, "add", "environment.py")
    git(tmp_path, "commit", "-q", "-m", "ours")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment()["commit"] == head
    ours.write_text("# changed\n")
    assert environment()["commit"] == f"{head}-dirty"


def test_commit_is_none_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None
