"""A real Slurm on one machine: munge, a controller and two nodes, all on the loopback, all state in one directory.

    python tests/helpers/slurm.py start DIRECTORY    # prints the SLURM_CONF to export
    python tests/helpers/slurm.py stop DIRECTORY

Nothing outside the directory is written and no configuration of the system is read. It needs no root: daemons, user
and jobs are then one and the same person. Every node is this host under another name; the names do not resolve.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.ports import free_ports

NODES = ("graft1", "graft2")
CPUS_PER_NODE = 2
GPUS_PER_NODE = 1  # counted by Slurm, used by nobody: there need not be one
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
PATIENCE_SECONDS = 60

# cred_expire: a requeued job waits as long as a credential lives (else 120 s) before it may start again.
# linuxproc: needs no cgroups, which a container does not have; ends whole process trees.
CONFIGURATION = """\
ClusterName=graft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
TaskProlog={directory}/task_prolog.sh
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
ReturnToService=2
KillWait=5
MinJobAge=3600
MaxArraySize=1001
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# As on clusters whose nodes have a disk: every task has a TMPDIR that no other task sees.
TASK_PROLOG = """\
#!/usr/bin/env bash
scratch={directory}/tmp/$SLURMD_NODENAME/$SLURM_JOB_ID.${{SLURM_STEP_ID:-batch}}.${{SLURM_PROCID:-0}}
mkdir -p "$scratch"
echo "export TMPDIR=$scratch"
"""


class SlurmUnavailable(Exception):
    """This machine cannot start a Slurm; the message says why and what to do."""


def commands() -> dict[str, str]:
    """Name -> path of what a Slurm is made of.

    Raises:
        SlurmUnavailable: some of it is not installed.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = {name: shutil.which(name, path=path) for name in COMMANDS}
    if missing := [name for name, place in found.items() if place is None]:
        raise SlurmUnavailable(f"no {', '.join(missing)} on this machine: run scripts/install_test_tools.sh as root")
    return {name: place for name, place in found.items() if place is not None}


class Slurm:
    """A cluster of two nodes whose files lie below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()

    @property
    def configuration(self) -> Path:
        """What ``SLURM_CONF`` must name."""
        return self.directory / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, for commands that are to speak to this Slurm and no other."""
        ours = {name: value for name, value in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN)_", name)}
        return ours | {"SLURM_CONF": str(self.configuration)}

    # ---- starting and stopping

    def start(self) -> None:
        """Start the daemons; return when both nodes are idle.

        Raises:
            SlurmUnavailable: not installed, or a daemon did not start; with the end of its log.
        """
        found = commands()
        self._write_configuration()
        try:
            key, state = f"--key-file={self.directory}/munge.key", f"--seed-file={self.directory}/munge.seed"
            files = [f"--{name}={self.directory}/munge.{end}" for name, end in
                     (("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"))]  # fmt: skip
            # --force: the directories above, such as /tmp, may be writable for everybody.
            self._daemon(found["munged"], "--force", key, state, *files)
            self._daemon(found["slurmctld"], "-c")
            for node in NODES:
                self._daemon(found["slurmd"], "-N", node)
            wait_until(self._nodes_are_idle, "both nodes idle", 30)
        except (SlurmUnavailable, TimeoutError) as error:
            logs = self.logs()
            self.stop()
            raise SlurmUnavailable(f"Slurm did not start: {error}\n{logs}") from None

    def _write_configuration(self) -> None:
        for name in ("state", "tmp", *(f"spool-{node}" for node in NODES)):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = free_ports(1 + len(NODES))
        text = CONFIGURATION.format(
            directory=self.directory,
            host=socket.gethostname().split(".")[0],
            user=_user(),
            controller_port=ports[0],
            nodes=",".join(NODES),
            node_ports=",".join(map(str, ports[1:])),
            cpus=CPUS_PER_NODE,
            memory=_memory_megabytes() // len(NODES),
            gpus=GPUS_PER_NODE,
        )
        self.configuration.write_text(text)
        (self.directory / "gres.conf").write_text(f"Name=gpu Count={GPUS_PER_NODE} File=/dev/null\n")
        prolog = self.directory / "task_prolog.sh"
        prolog.write_text(TASK_PROLOG.format(directory=self.directory))
        prolog.chmod(0o755)

    def _daemon(self, *command: str) -> None:
        finished = subprocess.run(
            command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
        if finished.returncode != 0:
            raise SlurmUnavailable(f"{Path(command[0]).name}: {finished.stderr.strip()}")

    def _nodes_are_idle(self) -> bool:
        finished = self._call(["sinfo", "--noheader", "--Node", "--format=%N %t"])
        states = dict(line.split() for line in finished.stdout.splitlines())
        return states == dict.fromkeys(NODES, "idle")

    def stop(self) -> None:
        """End all jobs and daemons; the directory stays."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._call(["scancel", f"--user={_user()}"], timeout=10).check_returncode()
            wait_until(lambda: not self._call(["squeue", "--noheader"]).stdout, "no job left", 10)
        files = [
            self.directory / f"{name}.pid" for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES), "munge")
        ]
        _end([int(file.read_text()) for file in files if file.exists()])

    def logs(self, last_lines: int = 12) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.directory.glob("*.log"))
        return "\n".join(
            f"{file.name}:\n" + "\n".join(file.read_text(errors="replace").splitlines()[-last_lines:]) for file in files
        )

    # ---- jobs

    def _call(self, command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        settings = {"env": self.environment, "capture_output": True, "text": True, "timeout": PATIENCE_SECONDS}
        return subprocess.run(command, **(settings | options))  # type: ignore[call-overload,no-any-return]

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        """Run one command against this Slurm; return what it printed, or fail with it."""
        words = [str(word) for word in command]
        finished = self._call(words, cwd=cwd, env=self.environment | variables)
        if finished.returncode != 0:
            raise AssertionError(f"{words}: exit code {finished.returncode}\n{finished.stdout}{finished.stderr}")
        return finished.stdout

    def submit(self, *arguments: object, cwd: Path, **variables: str) -> str:
        """``sbatch``; return the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def show(self, job: str) -> list[dict[str, str]]:
        """The fields of ``scontrol show job``: one dictionary for the job or for each of its array's tasks."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line]

    def states(self, job: str) -> list[str]:
        """State of the job, or of each task of its array, such as ``COMPLETED``."""
        return [fields["JobState"] for fields in self.show(job)]

    def wait(self, job: str, timeout: float = 120) -> list[str]:
        """Wait until a job and every task of its array have ended; return their states."""
        under_way = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}
        try:
            wait_until(lambda: not under_way & set(self.states(job)), f"the end of job {job}", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.run('squeue', '--long')}\n{self.logs()}") from None
        return self.states(job)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE_SECONDS) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: it is still not so after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.1)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _memory_megabytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def _end(processes: Sequence[int]) -> None:
    """TERM, then KILL, to daemons that are not our children. What they would still write is thrown away."""

    def are_gone() -> bool:
        return not any(Path(f"/proc/{process}").exists() for process in processes)

    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        with contextlib.suppress(TimeoutError):
            wait_until(are_gone, "the daemons' end", 5)
            return


def main(argv: list[str]) -> int:
    """Start or stop by hand."""
    if len(argv) != 2 or argv[0] not in ("start", "stop"):
        print(__doc__, file=sys.stderr)
        return 2
    slurm = Slurm(Path(argv[1]))
    if argv[0] == "stop":
        slurm.stop()
        return 0
    try:
        slurm.start()
    except SlurmUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={slurm.configuration}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
