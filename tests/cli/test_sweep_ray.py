"""A sweep on a Ray cluster: nothing is lost with a worker, and results are those of local workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_core.leyline.errors import MissingDependency
from esper_core.trials import ray_workers
from tests.cli.test_sweep import FILE, LONG, esper, home, reached, results, trains_in

__all__ = ["home"]

EIGHT = LONG.replace("seed = [0, 1]", "seed = [0, 1, 2, 3]\nlearning_rate = [0.002, 0.02]").replace("= 30", "= 6")


def test_without_ray_the_install_line_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"--ray needs the package ray; try: pip install 'esper-core\[ray\]'"):
        ray_workers.RayWorkers()
    assert "--gpus without --ray" in esper("sweep", "nets.toml", "--gpus", "1", code=2).output


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two processes, which ends with these tests."""
    pytest.importorskip("ray")
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it, whose paths are short
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--block",
               "--disable-usage-stats", f"--temp-dir={place}", "--object-store-memory=100000000"]  # fmt: skip
    log = Path(place, "log")
    with pytest.MonkeyPatch.context() as patch, log.open("w") as out:
        patch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine is no failure
        patch.setenv("RAY_AUTH_MODE", "disabled")  # which would write a token into the home folder
        head = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 300
            while not (found := re.search(r"--address='([^']+)'", log.read_text())):
                assert head.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield found[1]
        finally:
            head.terminate()
            try:
                head.wait(60)
            except subprocess.TimeoutExpired:
                head.kill()
            shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_eight_runs_of_which_one_loses_its_worker_equal_those_of_local_workers(home: Path, cluster: str) -> None:
    (home / "nets.toml").write_text(EIGHT)
    command = [sys.executable, "-m", "esper_core", "sweep", "nets.toml", "--out", "far", "--ray", cluster]
    far = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    os.kill(trains_in(home / "far"), signal.SIGKILL)
    told = far.communicate(timeout=900)[1]
    assert far.returncode == 0, told
    assert "on Ray: 1 machine, room for 2 at a time" in told
    assert told.count(" begins\n") == 8 and told.count("is resumed, since its worker died") == 1
    assert results(home / "far")["count"] == {"finished": 8, "failed": 0, "stopped": 0, "left": 0}
    esper("sweep", "nets.toml", "--out", "near", "--workers", "2")
    assert reached(home / "near") == reached(home / "far")


@pytest.mark.slow
def test_a_comparison_on_the_cluster_equals_one_with_local_workers(home: Path, cluster: str) -> None:
    (home / "nets.toml").write_text(FILE.replace(', "module:net.py:Fails"', "").replace("seed = [0, 1]", "seed = [0]"))
    esper("sweep", "nets.toml", "--out", "one")
    run = results(home / "one")["runs"][0]["folder"]
    shutil.copytree(run, home / "copy")
    for folder, where in ((run, ["--ray", cluster]), ("copy", ["--workers", "1"])):
        esper("compare", folder, "--arms", "host", "--seeds", "2", "--host", "module:net.py:Net", *where)
    far, near = (json.loads((Path(folder) / "compare.json").read_text()) for folder in (run, "copy"))
    assert [arm["name"] for arm in far["arms"]] == ["grown", "host"] and far["arms"][1]["seeds"] == [0, 1]
    for one, two in zip(far["arms"], near["arms"], strict=True):
        assert {key: one[key] for key in ("score", "loss", "params", "flops")} == {
            key: two[key] for key in ("score", "loss", "params", "flops")
        }


@pytest.mark.slow
def test_a_cluster_that_is_not_there_or_does_not_see_the_folder_is_refused(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper_core.leyline.errors import BadOption

    with pytest.raises(BadOption, match=r"no Ray cluster at localhost:1:.*ray start --head"):
        ray_workers.RayWorkers("localhost:1")
    pool = ray_workers.RayWorkers(cluster, share=ray_workers.Share(1, 0.5))
    try:
        with pytest.raises(BadOption, match="does not see"):
            pool.check(tmp_path / "nothing")
        (tmp_path / "there").touch()
        with pytest.raises(BadOption, match=r"a run takes 1 CPUs and 0.5 GPUs, the cluster has 2 and 0"):
            pool.check(tmp_path / "there")
        monkeypatch.setattr(ray_workers, "_versions", lambda: {"torch": "1.0"})
        with pytest.raises(BadOption, match=r"has torch .*, and this machine 1.0"):
            pool.check(tmp_path / "there")
    finally:
        pool.close()
