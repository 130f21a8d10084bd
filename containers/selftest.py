"""Is everything in this image, and does it work?  apptainer test IMAGE

Prints a line for each check and exits with 1 if one failed. Without a GPU, the checks that need
one are reported as skipped.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHARE = Path(__file__).parent / "share"
LABELS = Path("/.singularity.d/labels.json")
MODULES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "faiss",
    "jsonargparse",
    "numpy",
    "paramiko",
    "pyarrow",
    "rich",
    "safetensors.torch",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "torch",
    "torch.distributed.checkpoint",
    "transformers",
)
# From the driver, which `--nv` binds from the host.
OF_THE_DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
# Plug-ins for rare fabrics, storage and compilers; each is loaded only on request.
OPTIONAL = re.compile(
    r"/(libcufile_rdma|nvshmem_(transport|bootstrap)_\w+)\.so[.\d]*$|/triton/plugins/"
)


class Failed(Exception):
    """A check found something wrong; the text says what."""


class Skipped(Exception):
    """A check needs something that this machine lacks; the text says what."""


def main() -> int:
    """Run all checks; return 1 if one failed."""
    labels = json.loads(LABELS.read_text())
    variant = labels["sluice.variant"]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("imports", imports),
        ("versions", lambda: versions(labels)),
        ("shared libraries", shared_libraries),
        ("two processes, gloo", lambda: processes("gloo", 2)),
    ]
    if variant == "cuda":
        checks += [
            ("NCCL", own_nccl),
            ("InfiniBand verbs", verbs),
            ("DeepSpeed's ops", ops),
            ("compiler for Triton", compiler),
            ("GPUs, NCCL", gpus),
        ]
    failed = 0
    for name, check in checks:
        try:
            verdict, detail = "ok", check()
        except Skipped as reason:
            verdict, detail = "skipped", str(reason)
        except Failed as reason:
            verdict, detail, failed = "FAILED", str(reason), failed + 1
        except Exception:
            verdict, detail, failed = "FAILED", traceback.format_exc().strip(), failed + 1
        print(f"{verdict:8} {name}: {detail}", flush=True)
    return 1 if failed else 0


# ---- what is there ------------------------------------------------------------------------------


def imports() -> str:
    """Import what the jobs import, from this image and from nowhere else."""
    for name in MODULES:
        module = importlib.import_module(name)
        place = Path(module.__file__ or "")
        if not place.is_relative_to(sys.prefix):
            raise Failed(f"{name} comes from {place}, not from {sys.prefix}")
    return f"{len(MODULES)} modules"


def versions(labels: dict[str, str]) -> str:
    """Compare what is installed with the lock, and the image's labels with both."""
    lock = (SHARE / "lock.txt").read_text()
    digest = hashlib.sha256(lock.encode()).hexdigest()
    if labels["sluice.lock.sha256"] != digest:
        raise Failed(f"label sluice.lock.sha256 is not that of {SHARE / 'lock.txt'}, {digest}")
    # A package can be listed twice, with a version for each kind of system.
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^ ;\\]+)", lock, re.MULTILINE):
        locked.setdefault(name, []).append(version)
    extra = extra_packages()
    locked |= {name: [version] for name, version in extra.items()}
    installed = {
        re.sub(r"[-_.]+", "-", d.name).lower(): d.version
        for d in importlib.metadata.distributions()
    }
    for name, allowed in locked.items():
        if name in installed and installed[name] not in allowed:
            raise Failed(f"{name} {installed[name]} is installed, {', '.join(allowed)} is locked")
    if unlocked := sorted(installed.keys() - locked.keys()):
        raise Failed(f"neither in the lock nor among the extra packages: {', '.join(unlocked)}")
    for label, version in labels.items():
        name = label.removeprefix("sluice.version.")
        if name != label and installed.get(name) != version:
            raise Failed(f"label {label} is {version}, {installed.get(name)} is installed")
    beside = f", {len(extra)} extra" if extra else ""
    return f"{len(installed) - len(extra)} packages as locked{beside}, torch {installed['torch']}"


def extra_packages() -> dict[str, str]:
    """Return the packages of EXTRA=, with their versions."""
    path = SHARE / "extra.txt"
    lines = path.read_text().split() if path.exists() else []
    pairs = (line.split("==") for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def shared_libraries() -> str:
    """Let the dynamic linker resolve each library in the environment."""
    import torch

    # Libraries bundled in wheels, torch's own and NVIDIA's are found because the process has loaded
    # them already; ldd needs their folders.
    packages = Path(torch.__file__).parent.parent
    places = [packages / "torch/lib", *packages.glob("*.libs"), *packages.glob("nvidia/*/lib")]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, places))}
    files = [path for path in Path(sys.prefix).rglob("*.so*") if is_elf(path)]

    def missing(path: Path) -> list[str]:
        shown = subprocess.run(
            ["ldd", path], check=False, capture_output=True, text=True, env=environment
        )
        return re.findall(r"^\s*(\S+) => not found$", shown.stdout, re.MULTILINE)

    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(missing, files), strict=True))
    wrong, of_extra = [], set()
    # Often for other systems or versions of CUDA; only their user knows which are needed.
    extra = {path for name in extra_packages() for path in files_of(name)}
    for path, names in found.items():
        for name in names:
            if path in extra:
                of_extra.add(name)
            elif name not in OF_THE_DRIVER and not OPTIONAL.search(str(path)):
                wrong.append(f"{path} needs {name}")
    if wrong:
        raise Failed("; ".join(wrong))
    beside = f", but extra packages lack {', '.join(sorted(of_extra))}" if of_extra else ""
    return f"{len(files)} libraries, all dependencies found{beside}"


def files_of(package: str) -> list[Path]:
    """Return the files that a package has installed."""
    distribution = importlib.metadata.distribution(package)
    return [Path(str(distribution.locate_file(file))) for file in distribution.files or []]


def is_elf(path: Path) -> bool:
    """Return whether `path` is a program or a library, not a link to one."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def own_nccl() -> str:
    """Check that this process has loaded torch's own NCCL, whatever the base image has."""
    import torch

    version = ".".join(map(str, torch.cuda.nccl.version()))
    maps = Path("/proc/self/maps").read_text()
    loaded = sorted(set(re.findall(r"(/\S*/libnccl\.so\S*)$", maps, re.MULTILINE)))
    if len(loaded) != 1 or not Path(loaded[0]).is_relative_to(sys.prefix):
        raise Failed(f"loaded: {', '.join(loaded) or 'none'}; expected the one in {sys.prefix}")
    return f"{version} from torch's own wheels is loaded"


def verbs() -> str:
    """Load the user space of InfiniBand, with the provider of the usual cards."""
    for name in ("libibverbs.so.1", "librdmacm.so.1", "libmlx5.so.1"):
        ctypes.CDLL(name)
    providers = sorted(Path("/etc/libibverbs.d").glob("*.driver"))
    if not providers:
        raise Failed("/etc/libibverbs.d lists no provider")
    return f"libibverbs, librdmacm, {len(providers)} providers"


def ops() -> str:
    """Load DeepSpeed's prebuilt ops as a job does, and take a step with the one for the CPU.

    In a separate process, which tells DeepSpeed to use GPUs, whether there are any or not.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--ops"],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"DS_ACCELERATOR": "cuda"},
    )
    if done.returncode:
        raise Failed(f"{done.stdout}{done.stderr}".strip())
    return done.stdout.strip().splitlines()[-1]


def use_ops() -> None:
    """Run the checks of `ops`."""
    import torch
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    # Ops built for another environment would be compiled again in the middle of a job.
    assert accelerator_name == "cuda", f"the ops were built for {accelerator_name}"
    assert installed_ops["fused_adam"] and installed_ops["cpu_adam"], installed_ops
    for builder in (FusedAdamBuilder(), CPUAdamBuilder()):
        builder.jit_load = None  # Any compilation fails.
        op = builder.load(verbose=False)
        assert "site-packages/deepspeed/ops" in op.__file__, op.__file__
    fused = Path(FusedAdamBuilder().load(verbose=False).__file__).read_bytes()
    assert b".nv_fatbin" in fused, "fused_adam has no code for GPUs"

    torch.manual_seed(0)
    ours = torch.randn(1000)
    theirs, gradient = ours.clone(), torch.randn(1000)
    for weight, optimizer in (
        (ours, DeepSpeedCPUAdam([ours], lr=0.1, adamw_mode=True)),
        (theirs, torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)),
    ):
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-5), "cpu_adam differs from torch's AdamW"
    print("fused_adam and cpu_adam are prebuilt; cpu_adam matches torch's AdamW")


def compiler() -> str:
    """Compile what Triton compiles before a kernel's first launch: C with Python.h."""
    import sysconfig
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "launcher.c"
        source.write_text("#include <Python.h>\nint launch(void) { return PY_MAJOR_VERSION; }\n")
        include = sysconfig.get_paths()["include"]
        command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/launcher.so"]
        done = subprocess.run([*command, source], check=False, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"gcc: {done.stderr.strip()}")
    return "gcc and Python.h"


# ---- does it work -------------------------------------------------------------------------------


def gpus() -> str:
    """Use all GPUs that the driver shows together, with NCCL."""
    import torch

    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    if not devices:
        raise Skipped("no GPU on this machine; the checks of GPUs and NCCL were not run")
    if not torch.cuda.is_available():
        raise Failed(
            f"/dev has {len(devices)} GPUs, torch {torch.__version__} sees none; was --nv given, "
            f"and is the driver recent enough for CUDA {torch.version.cuda}?"
        )
    count = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    return f"{count} x {', '.join(sorted(names))}; {processes('nccl', count)}"


def processes(backend: str, number: int) -> str:
    """Start processes that reduce a tensor and train a step together; see `worker`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc_per_node={number}", __file__, "--worker", backend]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    if done.returncode:
        raise Failed(f"exit code {done.returncode}\n{done.stdout}{done.stderr}".strip())
    return done.stdout.strip().splitlines()[-1]


def worker(backend: str) -> None:
    """Check an all-reduce, and that a step of DDP uses the mean of the ranks' gradients."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    dist.init_process_group(backend)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    ones = torch.full((1 << 20,), rank + 1.0, device=device)
    dist.all_reduce(ones)
    expected = world_size * (world_size + 1) / 2
    assert bool((ones == expected).all()), f"all-reduce gave {ones[0]}, not {expected}"

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1, bias=False).to(device)
    before = layer.weight.detach().clone()
    wrapped = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    wrapped(torch.full((1, 4), float(rank), device=device)).sum().backward()
    optimizer.step()
    mean_gradient = (world_size - 1) / 2
    assert torch.allclose(before - layer.weight, torch.full_like(before, mean_gradient))
    if rank == 0:
        print(f"all-reduce and a training step over {world_size} with {backend}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    elif sys.argv[1:2] == ["--ops"]:
        use_ops()
    else:
        sys.exit(main())
