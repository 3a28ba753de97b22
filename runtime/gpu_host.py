"""Preflight of a host with NVIDIA GPUs: what would make a run slow or end it, before JAX starts.

    python -m runtime.gpu_host    everything, with remedies; without a GPU, what would be checked

Entry points run it on hosts with GPUs: process 0 prints what it found, others their problems.
Everything comes from `nvidia-smi`, the environment and installed packages, so
nothing here touches a GPU. A problem never ends a run: it may be meant.
"""

import collections
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import NamedTuple

CUDA_MAJOR = 13
"""Major version of the locked wheels (requirements-cuda13.lock)."""
LEAST_DRIVER = 580
"""First driver for CUDA 13 (NVIDIA's CUDA toolkit release notes, table of minimum drivers)."""
TAKEN_MIB = 1024
"""Memory taken by others above which it is a problem: contexts and displays take less."""
SHM_GIB = 1
"""NCCL's buffers between processes of a host; containers give 64 MB by default."""
TIMEOUT_S = 30

CHECKS = {
    "CUDA of JAX": "installed for the locked jax, and the assembler on the PATH as new as it",
    "driver": f"of CUDA {CUDA_MAJOR}: {LEAST_DRIVER} or newer",
    "GPUs": "how many there are, how many this process sees, whether they are of one kind, no MIG",
    "memory": f"less than {TAKEN_MIB} MiB taken by others on every GPU seen",
    "links": "NVLink or PCIe between every pair, and whether peers may read each other",
    "NCCL": "switches that forbid its transports, shared memory of the host, InfiniBand",
    "XLA flags": "which are set, by whom, and why",
}
FLAGS = {
    "xla_gpu_dot_merger_threshold_mb": "ours: two micro batches overlap only if their products "
    "are not joined",
    "xla_disable_hlo_passes": "ours: the same for joined fusions",
    "xla_gpu_autotune_level": "0 compiles faster, and takes the first algorithm of a library",
    "xla_gpu_enable_latency_hiding_scheduler": "schedules collectives beside products; JAX's "
    "default on GPUs",
    "xla_gpu_enable_triton_gemm": "false leaves products to cuBLAS",
    "xla_dump_to": "writes every program to disk; slow, and large",
    "xla_cpu_multi_thread_eigen": "ours: of emulated devices",
}
FORBIDDEN = {
    "NCCL_P2P_DISABLE": "GPUs of a host then send through its memory, not over NVLink",
    "NCCL_SHM_DISABLE": "processes of a host then send over the network",
    "NCCL_IB_DISABLE": "hosts then send over TCP, not InfiniBand",
    "NCCL_NVLS_ENABLE": "0 leaves reductions to the GPUs that a switch could make",
}


class Finding(NamedTuple):
    """A line of the preflight."""

    check: str
    text: str
    remedy: str = ""
    """The remedy; empty where nothing is wrong."""


class Host(NamedTuple):
    """Facts of a host; tests make up their own."""

    ask: Callable[..., str]
    """Output of `nvidia-smi` with these arguments; '' if it fails."""
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    """Installed packages."""
    assembler: str
    """Answer of `ptxas --version`; '' without one on the PATH."""
    shared_gib: float
    """Size of /dev/shm."""
    adapters: tuple[str, ...]
    """InfiniBand devices."""


def this_host() -> Host:
    """The machine that this process runs on."""

    def output(*command: str) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    shm, infiniband = pathlib.Path("/dev/shm"), pathlib.Path("/sys/class/infiniband")
    return Host(
        lambda *arguments: output("nvidia-smi", *arguments),
        os.environ,
        {d.name.lower(): d.version for d in metadata.distributions()},
        output("ptxas", "--version"),
        shutil.disk_usage(shm).total / 2**30 if shm.is_dir() else 0.0,
        tuple(sorted(p.name for p in infiniband.iterdir())) if infiniband.is_dir() else (),
    )


def has_gpus() -> bool:
    """Whether NVIDIA's driver is on this machine."""
    return shutil.which("nvidia-smi") is not None


def preflight(host: Host) -> list[Finding]:
    """All findings about a host with GPUs; one that says why if it has none that answers."""
    fields = "index,name,compute_cap,memory.total,memory.used,driver_version,mig.mode.current"
    rows = _table(host.ask(f"--query-gpu={fields}", "--format=csv,noheader,nounits"), 7)
    if not rows:
        text = "nvidia-smi lists none"
        return [Finding("GPUs", text, "load the driver, or ask the scheduler for GPUs")]
    seen = _seen(rows, host.environment.get("CUDA_VISIBLE_DEVICES"))
    findings = [*_cuda(host), *_driver(rows[0][5], host.ask()), *_gpus(rows, seen, host)]
    findings += [*_memory(seen, host), *_links(seen, host), *_nccl(seen, host), *_flags(host)]
    return findings


def lines(findings: list[Finding], problems_only: bool = False) -> list[str]:
    """Findings in words, remedies after their problems."""
    return [
        f"gpu host  {f.check}: {f.text}" + (f" -> {f.remedy}" if f.remedy else "")
        for f in findings
        if f.remedy or not problems_only
    ]


# ---- the checks ----------------------------------------------------------------------------------


def _cuda(host: Host) -> list[Finding]:
    plugin, jaxlib = host.versions.get(f"jax-cuda{CUDA_MAJOR}-plugin"), host.versions.get("jaxlib")
    if plugin is None:
        return [Finding("CUDA of JAX", "not installed: JAX would run on the CPU", "make gpu-env")]
    if plugin != jaxlib:
        text = f"plugin {plugin} with jaxlib {jaxlib}: JAX would ignore the GPUs"
        return [Finding("CUDA of JAX", text, "make gpu-env")]
    found = [Finding("CUDA of JAX", f"plugin {plugin}")]
    newest = re.search(r"release (\d+)\.(\d+)", host.assembler)
    locked = re.match(r"(\d+)\.(\d+)", host.versions.get("nvidia-cuda-nvcc", ""))
    if newest and locked and _pair(newest) < _pair(locked):
        text = (
            f"ptxas {newest[1]}.{newest[2]} on the PATH comes before the locked "
            f"{locked[1]}.{locked[2]}; kernels in Triton may not assemble"
        )
        remedy = (
            'PATH="$(.venv/bin/python -c "import nvidia.cu13 as n; print(*n.__path__)")/bin:$PATH"'
        )
        found.append(Finding("CUDA of JAX", text, remedy))
    return found


def _pair(match: re.Match) -> tuple[int, int]:
    return int(match[1]), int(match[2])


def _driver(version: str, header: str) -> list[Finding]:
    cuda = re.search(r"CUDA Version:\s*(\d+\.\d+)", header)
    text = f"{version}, for CUDA {cuda[1] if cuda else 'unknown'}"
    if int(version.split(".")[0]) >= LEAST_DRIVER:
        return [Finding("driver", text)]
    remedy = f"install driver {LEAST_DRIVER} or newer, or NVIDIA's cuda-compat-{CUDA_MAJOR}-0"
    return [Finding("driver", f"{text}; the wheels are CUDA {CUDA_MAJOR}", remedy)]


def _gpus(rows: list[list[str]], seen: list[list[str]], host: Host) -> list[Finding]:
    kinds = collections.Counter(f"{name} (sm{cc.replace('.', '')})" for _, name, cc, *_ in seen)
    told = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    visible = host.environment.get("CUDA_VISIBLE_DEVICES")
    found = [Finding("GPUs", f"{len(seen)} of {len(rows)} are seen: {told or 'none'}")]
    if not seen:
        text = f"CUDA_VISIBLE_DEVICES={visible} hides all"
        found.append(Finding("GPUs", text, "unset it, or name GPUs that there are"))
    if len(kinds) > 1:
        remedy = "choose one kind with CUDA_VISIBLE_DEVICES: the slowest sets the pace, and kernels"
        found.append(Finding("GPUs", "of several kinds", f"{remedy} are chosen for the first"))
    if any(mig.lower() == "enabled" for *_, mig in seen):
        text = "MIG is on: a slice has no peers, and NCCL joins none"
        found.append(Finding("GPUs", text, "train on one slice, or have MIG switched off"))
    names = "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"
    tasks = next((host.environment[n] for n in names if n in host.environment), "1")
    per_host = int(re.match(r"\d+", tasks)[0]) if re.match(r"\d+", tasks) else 1  # pyright: ignore[reportOptionalSubscript]
    if per_host > 1 and len(seen) == len(rows) > 1:
        text = f"{per_host} processes on this host, and each sees all {len(rows)}"
        remedy = "start one process per host, or give each its own (Slurm: --gpus-per-task=1)"
        found.append(Finding("GPUs", text, remedy))
    return found


def _memory(seen: list[list[str]], host: Host) -> list[Finding]:
    taken = [(row[0], int(row[4]), int(row[3])) for row in seen if int(row[4]) > TAKEN_MIB]
    if not taken:
        return [Finding("memory", "free")] if seen else []
    apps = _table(
        host.ask("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"), 2
    )
    who = f"processes {', '.join(pid for pid, _ in apps)}" if apps else "processes not shown here"
    each = "; ".join(f"GPU {i}: {used} of {total} MiB" for i, used, total in taken)
    remedy = "end them, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    return [Finding("memory", f"{each} taken ({who})", remedy)]


def _links(seen: list[list[str]], host: Host) -> list[Finding]:
    if len(seen) < 2:
        return []
    indices = [f"GPU{row[0]}" for row in seen]
    links, peers = (_matrix(host.ask("topo", *how), indices) for how in (["-m"], ["-p2p", "r"]))
    kinds = collections.Counter("NVLink" if v.startswith("NV") else v for v in links.values())
    told = ", ".join(f"{count} pairs by {kind}" for kind, count in kinds.items())
    found = [Finding("links", told or "nvidia-smi topo says nothing")]
    if kinds.keys() - {"NVLink"} and "NVLink" in kinds:
        slow = [f"{a}-{b} ({v})" for (a, b), v in links.items() if not v.startswith("NV")]
        text = f"some pairs have no NVLink: {', '.join(slow[:4])}{' ...' * (len(slow) > 4)}"
        remedy = (
            "choose GPUs of one NVLink group (CUDA_VISIBLE_DEVICES), or have the fabric looked at"
        )
        found.append(Finding("links", text, remedy))
    closed = [f"{a}-{b} ({v})" for (a, b), v in peers.items() if v != "OK"]
    if closed:
        text = f"no peer access: {', '.join(closed[:4])}{' ...' * (len(closed) > 4)}"
        remedy = (
            "switch off ACS or the IOMMU, or start nv-fabricmanager; else all goes over the host"
        )
        found.append(Finding("links", text, remedy))
    return found


def _nccl(seen: list[list[str]], host: Host) -> list[Finding]:
    set_here = {k: v for k, v in sorted(host.environment.items()) if k.startswith("NCCL_")}
    told = ", ".join(f"{name}={value}" for name, value in set_here.items()) or "no variable set"
    found = [Finding("NCCL", f"{told}; InfiniBand: {', '.join(host.adapters) or 'none'}")]
    for name, effect in FORBIDDEN.items():
        bad = "0" if name == "NCCL_NVLS_ENABLE" else "1"
        if set_here.get(name) == bad:
            found.append(Finding("NCCL", f"{name}={bad}: {effect}", f"unset {name}"))
    if len(seen) > 1 and host.shared_gib < SHM_GIB:
        text = f"/dev/shm has {host.shared_gib:.2f} GiB"
        remedy = f"give the container at least {SHM_GIB} (docker run --shm-size=8g, or --ipc=host)"
        found.append(Finding("NCCL", text, remedy))
    hosts = int(host.environment.get("SLURM_JOB_NUM_NODES", "1") or 1)
    if hosts > 1 and not host.adapters and "NCCL_SOCKET_IFNAME" not in set_here:
        text = f"{hosts} hosts and no InfiniBand: NCCL takes the first network that it finds"
        remedy = "name the fast one: NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says what is used"
        found.append(Finding("NCCL", text, remedy))
    return found


def _flags(host: Host) -> list[Finding]:
    found = []
    for flag in host.environment.get("XLA_FLAGS", "").split():
        name = flag.lstrip("-").partition("=")[0]
        found.append(Finding("XLA flags", f"{flag}: {FLAGS.get(name, 'from the environment')}"))
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        if name in host.environment:
            text = f"{name}={host.environment[name]}: how much memory JAX takes at its start"
            found.append(Finding("XLA flags", text))
    return found or [
        Finding(
            "XLA flags",
            "none from the environment; a layout that computes two "
            "micro batches side by side sets its own",
        )
    ]


# ---- reading nvidia-smi --------------------------------------------------------------------------


def _table(text: str, columns: int) -> list[list[str]]:
    """Rows of its comma-separated output."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]


def _seen(rows: list[list[str]], visible: str | None) -> list[list[str]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: up to the first name that there is not.

    Names that are no numbers (UUIDs) are counted, not looked up.
    """
    if visible is None:
        return rows
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if any(name.startswith(("GPU-", "MIG-")) for name in names):
        return rows[: len(names)]
    by_index, found = {row[0]: row for row in rows}, []
    for name in names:
        if name not in by_index:
            break
        found.append(by_index[name])
    return found


def _matrix(text: str, wanted: list[str]) -> dict[tuple[str, str], str]:
    """Entries of a matrix of `nvidia-smi topo` for pairs of these GPUs."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    table = [line.split() for line in plain.splitlines() if line.strip()]
    header = next((row for row in table if row[0].startswith("GPU")), [])
    columns = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    found = {}
    for row in table[table.index(header) + 1 :] if header else []:
        for name, value in zip(columns, row[1:], strict=False):
            if row[0] in wanted and name in wanted and row[0] < name:
                found[row[0], name] = value
    return found


def main() -> None:
    """Print the preflight of this machine."""
    if has_gpus():
        print("\n".join(lines(preflight(this_host()))))
        return
    print("gpu host  no nvidia-smi here: this machine has no NVIDIA GPU. On one that has:")
    print("\n".join(f"gpu host  {check}: {what}" for check, what in CHECKS.items()))


if __name__ == "__main__":
    main()
