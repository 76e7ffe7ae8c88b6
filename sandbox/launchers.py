"""The command or manifest that starts a config somewhere: `sandbox launch`.

Each launcher is a function from a Job to text. All end in the same words, `sandbox run CONFIG`, in as many processes as
the mesh has ranks, each with torchrun's variables. The files of `launch/` and `docker/` are what these functions print.

Where ranks of nodes are numbered (Kubernetes, compose, accelerate, deepspeed), rank r lives on node r // gpus. Under
torchrun's c10d rendezvous the ranks of a node are neighbours too, but which node is the first is open.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

from sandbox.errors import ConfigError

__all__ = ["LAUNCHERS", "Job", "Launcher"]

PORT = 29500

# Without it a second attempt on several nodes meets addresses of the first in the agent's store (torch 2.13, gloo).
FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True)
class Job:
    """A config on `nodes` machines with `gpus` ranks each. `words` are those after `-m`: sandbox run CONFIG ...

    `origin` is the command that prints it, for a first line that says where a manifest is from.
    """

    name: str
    words: tuple[str, ...]
    nodes: int
    gpus: int
    cuda: bool = True
    host: str = "HOST"
    image: str = "distributed-training-sandbox"
    origin: str = ""

    @property
    def module(self) -> list[str]:
        """The words that every launcher's command ends in."""
        return ["-m", *self.words]

    @property
    def label(self) -> str:
        """The name as Kubernetes and DNS take it."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40] or "run"


def local(job: Job) -> str:
    """Processes that sandbox itself starts."""
    if job.nodes > 1:
        raise ConfigError(f"--on local is one machine, not {job.nodes}. Say --on torchrun.")
    return shlex.join(["python", *job.module])


def torchrun(job: Job) -> str:
    """torchrun: on one node alone, or the same command on every node, which meet at `host`."""
    if job.nodes == 1:
        return shlex.join(["torchrun", "--standalone", *_sized(job), *job.module])
    meet = ["--rdzv-id", job.name, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{job.host}:{PORT}"]
    command = shlex.join(["torchrun", *_sized(job), *meet, *job.module])
    return f"# on each of the {job.nodes} nodes; {job.host} is one of them\n{FRESH_STORE}=1 {command}"


def slurm(job: Job) -> str:
    """A batch script for sbatch: one torchrun a node."""
    resource = f"gpus-per-node={job.gpus}" if job.cuda else f"cpus-per-task={job.gpus}"
    meet = f'--rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "${{hosts%%$\'\\n\'*}}:{PORT}"'
    return f"""#!/usr/bin/env bash
# {job.origin} | sbatch
#SBATCH --job-name={job.label}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --{resource}
#SBATCH --time=01:00:00
set -euo pipefail
export {FRESH_STORE}=1
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # the first is where they meet
srun --kill-on-bad-exit=1 torchrun {shlex.join(_sized(job))} \\
  {meet} \\
  {shlex.join(job.module)}"""


def pytorchjob(job: Job) -> str:
    """A PyTorchJob of Kubeflow's training operator, which tells each pod its number and the first one's address."""
    pod = {"spec": _pod(job, _numbered(job, "$(RANK)", "$(MASTER_ADDR)"), name="pytorch")}
    replicas = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    roles = {role: {"replicas": count, "restartPolicy": "Never", "template": pod} for role, count in replicas.items()}
    policy = {"cleanPodPolicy": "Running", "backoffLimit": 0}
    return _resource(job, "kubeflow.org/v1", "PyTorchJob", {"runPolicy": policy, "pytorchReplicaSpecs": roles})


def jobset(job: Job) -> str:
    """A JobSet: one indexed Job whose pods find the first by its DNS name."""
    first = f"{job.label}-node-0-0.{job.label}"
    pod = _pod(job, _numbered(job, "$(JOB_COMPLETION_INDEX)", first)) | {"restartPolicy": "Never"}
    indexed = {"completionMode": "Indexed", "parallelism": job.nodes, "completions": job.nodes, "backoffLimit": 0}
    node = {"name": "node", "replicas": 1, "template": {"spec": indexed | {"template": {"spec": pod}}}}
    network = {"enableDNSHostnames": True, "subdomain": job.label, "publishNotReadyAddresses": True}
    spec = {"network": network, "failurePolicy": {"maxRestarts": 0}, "replicatedJobs": [node]}
    return _resource(job, "jobset.x-k8s.io/v1alpha2", "JobSet", spec)


def compose(job: Job) -> str:
    """A compose file: a container a node. docker/cluster.sh starts it, and ends with the run's status."""
    services = {
        f"node{node}": {
            "image": f"${{SANDBOX_IMAGE:-{job.image}}}",
            "hostname": f"node{node}",
            "command": ["torchrun", *_numbered(job, str(node), "node0")],
            "stop_grace_period": "2s",
        }
        for node in range(job.nodes)
    }
    return _manifest(f"{job.origin} | docker/cluster.sh -", {"services": services})


def accelerate(job: Job) -> str:
    """Hugging Face's launcher: on every node, each with its own number in RANK.

    `--multi_gpu` means a world of several processes, without GPUs too. (`--cpu` makes none: every machine would train
    by itself, and say nothing.)
    """
    where = [] if job.nodes == 1 else ["--main_process_ip", job.host, "--main_process_port", str(PORT)]
    mine = "" if job.nodes == 1 else ' --machine_rank "$RANK"'
    size = ["--num_machines", str(job.nodes), "--num_processes", str(job.nodes * job.gpus)]
    command = shlex.join(["accelerate", "launch", "--multi_gpu", *size, *where])
    note = "" if job.nodes == 1 else f"# on each of the {job.nodes} nodes, with RANK=0, 1, ...; {job.host} is node 0\n"
    return f"{note}{command}{mine} {shlex.join(job.module)}"


def deepspeed(job: Job) -> str:
    """DeepSpeed's launcher: on one machine, which reaches those of the hostfile over ssh."""
    several = [] if job.nodes == 1 else ["--hostfile", "launch/hostfile", "--num_nodes", str(job.nodes)]
    size = ["--num_gpus", str(job.gpus), "--no_local_rank"]
    note = "" if job.nodes == 1 else "# on a machine that reaches all of launch/hostfile over ssh\n"
    return note + shlex.join(["deepspeed", *several, *size, "--module", *job.words])


class Launcher(StrEnum):
    """What `--on` may say."""

    LOCAL = "local"
    TORCHRUN = "torchrun"
    SLURM = "slurm"
    K8S = "k8s"
    JOBSET = "jobset"
    COMPOSE = "compose"
    ACCELERATE = "accelerate"
    DEEPSPEED = "deepspeed"


LAUNCHERS: dict[Launcher, Callable[[Job], str]] = {
    Launcher.LOCAL: local,
    Launcher.TORCHRUN: torchrun,
    Launcher.SLURM: slurm,
    Launcher.K8S: pytorchjob,
    Launcher.JOBSET: jobset,
    Launcher.COMPOSE: compose,
    Launcher.ACCELERATE: accelerate,
    Launcher.DEEPSPEED: deepspeed,
}


def _sized(job: Job) -> list[str]:
    size = [] if job.nodes == 1 else ["--nnodes", str(job.nodes)]
    return [*size, "--nproc-per-node", str(job.gpus)]


def _numbered(job: Job, rank: str, first: str) -> list[str]:
    """Arguments of torchrun where every node knows its number."""
    size = ["--nnodes", str(job.nodes), "--nproc-per-node", str(job.gpus)]
    return [*size, "--node-rank", rank, "--master-addr", first, "--master-port", str(PORT), *job.module]


def _pod(job: Job, arguments: list[str], name: str = "node") -> dict[str, Any]:
    limits = {"nvidia.com/gpu": job.gpus} if job.cuda else {"cpu": job.gpus}
    container = {
        "name": name,
        "image": job.image,
        "command": ["torchrun", *arguments],
        "ports": [{"name": f"{name}job-port" if name == "pytorch" else "rendezvous", "containerPort": PORT}],
        "resources": {"limits": limits},
    }
    return {"containers": [container]}


def _resource(job: Job, version: str, kind: str, spec: dict[str, Any]) -> str:
    head = {"apiVersion": version, "kind": kind, "metadata": {"name": job.label}}
    return _manifest(f"{job.origin} | kubectl apply -f -", {**head, "spec": spec})


def _manifest(origin: str, tree: dict[str, Any]) -> str:
    return f"# {origin}\n{yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=120)}".rstrip()


class _Plain(yaml.SafeDumper):
    """Each part in full: readers of manifests do not expect aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True
