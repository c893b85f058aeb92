"""Three hosts, the pipeline as a job on them, and one host taken away in the middle of `align`: `make hosts`.

Each host is a network namespace with an address and a temporary folder of its own, which takes a superuser on Linux;
about ten minutes on two cores. Token authentication is on. The job has to end well and with the metrics of one that was
left alone. What was lost and how long it took is printed.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters import ROOT, Jobs, environment, expect, furthest_apart, metrics, step_of_align, timed

BRIDGE, NETWORK = "recray0", "10.77.5"
CPUS = (1, 2, 2)  # of the head, and of two workers that hold one trainer each
TRAINERS = ("--workers", "2", "--set", "resources.cpus_per_worker=1.5", "--set", "resources.min_workers=1")
STRIKE_AFTER, STEPS = 20, 60  # see small.json


class Host:
    """A machine as far as the network goes."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"recray{number}", f"{NETWORK}.{number}"
        self.prefix = ("ip", "netns", "exec", self.name)

    def connect(self) -> None:
        """Make the namespace, and plug it in."""
        outside, inside = f"{self.name}o", f"{self.name}i"
        for command in (
            f"ip netns add {self.name}",
            f"ip link add {outside} type veth peer name {inside}",
            f"ip link set {inside} netns {self.name}",
            f"ip link set {outside} master {BRIDGE} up",
            f"ip -n {self.name} addr add {self.address}/24 dev {inside}",
            f"ip -n {self.name} link set {inside} up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(command.split(), check=True)

    def start_ray(self, arguments: list[str], env: dict[str, str], place: Path) -> None:
        """Start Ray here, with a temporary folder of this host's own where all have theirs."""
        own, shared = place / self.name, place / "ray"
        for folder in (own, shared):
            folder.mkdir(exist_ok=True)
        command = ["ray", "start", "--block", f"--node-ip-address={self.address}", *arguments]
        private = ["bash", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(own), str(shared), *command]
        with (place / f"{self.name}.log").open("w") as file:
            subprocess.Popen(
                [*self.prefix, *private], env=env, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
            )

    def vanish(self) -> None:
        """Pull the plug: no more packets, and nothing runs."""
        subprocess.run(["ip", "-n", self.name, "link", "set", f"{self.name}i", "down"], check=False)
        self.kill()

    def kill(self) -> None:
        """End every process here."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for process in found.stdout.split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def remove(self) -> None:
        """Take everything away again."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.name}o"], check=False, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Yield hosts on one network."""
    made = [Host(number) for number in range(1, count + 1)]
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
        for host in made:
            host.connect()
        yield made
    finally:
        for host in made:
            host.remove()
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


def main() -> None:
    """Run the pipeline twice, the second time with a host less in the middle; compare."""
    if os.geteuid() != 0:
        sys.exit("network namespaces take a superuser")
    with tempfile.TemporaryDirectory(prefix="rh", dir="/tmp", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        env = environment(place, Path(sys.executable).parent)
        subprocess.run(["ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
        with hosts(len(CPUS)) as (head, *others):
            jobs = start(head, others, env, place)
            with timed("a job that is left alone"):
                jobs.submit("quiet", "--workspace", str(place / "quiet"), *TRAINERS)
                expect(jobs.wait("quiet") == "SUCCEEDED", jobs.log("quiet")[-5000:])
            shutil.copytree(
                place / "quiet", place / "struck", ignore=shutil.ignore_patterns("align", "evaluate", "report")
            )
            with timed("a job that goes on from there, and loses a host in `align`"):
                strike(jobs, others[-1], place / "struck")
            lines = [line for line in jobs.log("struck").splitlines() if "goes on from the checkpoint" in line]
            expect(len(lines) == 1, f"went on {len(lines)} times: {lines}")
            apart = furthest_apart(metrics(place / "quiet"), metrics(place / "struck"))
            print(f"{lines[0].partition('goes on')[2].strip()}; metrics differ by {apart:.2g} at most")
            expect(apart < 1e-3, f"metrics differ by {apart}")
    print("passed")


def start(head: Host, others: list[Host], env: dict[str, str], place: Path) -> Jobs:
    """Start Ray on all hosts and return its jobs."""
    dashboard = [f"--dashboard-host={head.address}", "--dashboard-port=8265", "--port=6379"]
    head.start_ray(["--head", f"--num-cpus={CPUS[0]}", *dashboard], env, place)
    jobs = Jobs(f"http://{head.address}:8265", env, prefix=head.prefix)
    until = time.monotonic() + 90
    while jobs.ray("list").returncode:
        expect(time.monotonic() < until, (place / f"{head.name}.log").read_text()[-3000:])
        time.sleep(1)
    for host, cpus in zip(others, CPUS[1:], strict=True):
        options = [f"--address={head.address}:6379", f"--num-cpus={cpus}", f"--object-store-memory={100 * 1024**2}"]
        host.start_ray(options, env, place)
    return jobs


def strike(jobs: Jobs, victim: Host, workspace: Path) -> None:
    """Submit a job and take a host away from it once `align` has a checkpoint."""
    jobs.submit("struck", "--workspace", str(workspace), *TRAINERS)
    until = time.monotonic() + 900
    while step_of_align(workspace) < STRIKE_AFTER:
        expect(time.monotonic() < until, jobs.log("struck")[-5000:])
        time.sleep(0.2)
    victim.vanish()
    print(f"{victim.address} is gone, {step_of_align(workspace)} steps of {STEPS} were kept", flush=True)
    expect(jobs.wait("struck") == "SUCCEEDED", jobs.log("struck")[-5000:])


if __name__ == "__main__":
    main()
