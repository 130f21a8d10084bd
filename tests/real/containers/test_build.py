"""`make build-image`, for real: what it refuses, what is in an image and what must not be.

The whole image is built once, by the ordinary user and from a Debian mirror (tests/real/
whole_image.py). The other kinds of base are a shell and little more, built with stages that install
nothing: the road, without the load.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.plan.image import lock_sha256
from tests.real.accounts import IS_ROOT, Account, make_account
from tests.real.whole_image import SECRETS
from tests.shared import CHECKOUT, free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.needs("unshare", "apptainer", "mmdebstrap", "docker-registry", "skopeo")

Refusal = Callable[..., str]


# ---- what it refuses, before it builds anything ---------------------------------------------


@pytest.fixture
def refusal(builder: Account, builder_checkout: Path, apptainer: str) -> Refusal:
    """Return a function that runs build.sh and gives the one line that it answers with."""

    def run(*prefix: str, script: str = "", **environment: str) -> str:
        command: tuple[str, ...] = (*prefix, "containers/build.sh")
        if script:
            command = (*prefix, "bash", "-c", f"{script}; exec containers/build.sh")
        image, temporary = builder.home / "refused/image.sif", builder.home / "refused/tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        builder.own(image.parent)
        given = {"VARIANT": "cpu", "IMAGE": str(image), "TMPDIR": str(temporary)}
        given |= {"APPTAINER": apptainer} | environment
        done = builder.run(*command, cwd=builder_checkout, environment=given)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        # Of what is wrong there is one line, the last.
        *steps, line = done.stderr.splitlines()
        assert line.startswith("error: "), done.stderr
        assert not any("error" in step.lower() for step in steps)
        if given.get("BASE") != "debian":
            assert not any("building" in step for step in steps), "it had begun"
        written = {file.name for file in image.parent.glob("*")}
        assert written <= {"image.failed.log", "tmp"}
        assert list(temporary.iterdir()) == [], "something was left"
        return line

    return run


def test_without_user_namespaces_it_says_whom_to_ask(refusal: Refusal) -> None:
    forbid = "echo 0 >/proc/sys/user/max_user_namespaces"
    assert "max_user_namespaces" in refusal("unshare", "--map-root-user", script=forbid)


def test_without_space_it_names_the_folder_and_what_is_needed(
    refusal: Refusal, builder: Account
) -> None:
    small = builder.home / "small"
    small.mkdir(exist_ok=True)
    builder.own(small)
    line = refusal(
        "unshare",
        "--map-root-user",
        "--mount",
        script=f"mount -t tmpfs -o size=50m tmpfs {small}",
        TMPDIR=str(small),
    )
    assert f"TMPDIR={small}: 50 MiB are free" in line
    line = refusal(
        "unshare",
        "--map-root-user",
        "--mount",
        script=f"mount -t tmpfs -o size=50m tmpfs {small}",
        IMAGE=str(small / "image.sif"),
    )
    assert f"IMAGE={small}/image.sif: 50 MiB are free" in line


def test_without_apptainer_it_names_the_script_that_installs_it(
    refusal: Refusal, tmp_path: Path
) -> None:
    line = refusal(PATH="/usr/bin:/bin", APPTAINER="", APPTAINER_PREFIX=str(tmp_path / "none"))
    assert "containers/install-apptainer.sh" in line


@pytest.mark.parametrize("base", ["docker", "docker://127.0.0.1:9/debian:bookworm", "debian"])
def test_an_unreachable_base_is_said_with_another_way(refusal: Refusal, base: str) -> None:
    # Without a network nothing answers; the loopback has no registry.
    line = refusal("unshare", "--map-root-user", "--net", BASE=base)
    assert base.partition("/")[0].rstrip(":") in line.lower()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"VARIANT": "rocm"}, "choose cuda or cpu"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere"),
        ({"BASE": "docker://someone:word@registry.example/debian"}, "apptainer registry login"),
        ({"IMAGE": "image.img"}, "ends in .sif"),
        ({"IMAGE": "a,b.sif"}, "contains a comma or a colon"),
        ({"IMAGE": "/proc/image.sif"}, "IMAGE=/proc/image.sif"),
        ({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere"),
        ({"CUDA_ARCHITECTURES": "sm_90"}, "compute capabilities"),
        ({"COMPRESSION": "rar"}, "choose zstd or gzip"),
        ({"EXTRA": "/nowhere.txt"}, "EXTRA=/nowhere.txt: there is no such file"),
        ({"BASE": "docker://127.0.0.1:port/debian"}, "is not a name such as"),
    ],
)
def test_bad_input_is_one_line(refusal: Refusal, environment: dict[str, str], says: str) -> None:
    line = refusal(**environment)
    assert says in line
    assert "word@" not in line


# ---- the whole image ------------------------------------------------------------------------


def test_a_user_builds_from_a_debian_mirror(image: Path) -> None:
    manifest = json.loads(image.with_suffix(".json").read_text())
    assert manifest["image"] == "sluice-cpu.sif"
    assert manifest["base"]["name"] == "debian"
    assert manifest["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert manifest["size_bytes"] == image.stat().st_size < 800e6


def test_the_sbom_lists_debian_and_python_packages(image: Path) -> None:
    sbom = json.loads(image.with_suffix(".cdx.json").read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {component.get("purl", "").partition("?")[0] for component in sbom["components"]}
    packages = [line.split() for line in image.with_suffix(".txt").read_text().splitlines()]
    kinds = {kind for kind, _, _ in packages}
    assert kinds == {"deb", "pypi"}
    python = {name.lower().replace("_", "-"): v for kind, name, v in packages if kind == "pypi"}
    in_sbom = {
        purl.removeprefix("pkg:pypi/").partition("@")[0]
        for purl in listed
        if purl.startswith("pkg:pypi/")
    }
    assert in_sbom >= {name.replace(".", "-") for name in python}
    assert "torch" in in_sbom
    for name in ("python3", "libc6"):
        assert any(purl.startswith(f"pkg:deb/debian/{name}@") for purl in listed)


def test_its_labels_say_what_it_was_made_of(image: Path, apptainer: str) -> None:
    shown = subprocess.run(
        [apptainer, "inspect", "--json", image], check=True, capture_output=True, text=True
    ).stdout
    labels = json.loads(shown)["data"]["attributes"]["labels"]
    # What the commands compare it with, in this very checkout.
    assert labels["sluice.lock.sha256"] == lock_sha256("cpu")
    assert labels["sluice.variant"] == "cpu"
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")
    assert labels["sluice.version.torch"].startswith("2.")


def test_a_package_of_the_users_own_is_in_it_and_recorded(image: Path, apptainer: str) -> None:
    recorded = json.loads(image.with_suffix(".json").read_text())["extra_packages"]
    assert "trl" in recorded
    listed = image.with_suffix(".txt").read_text().splitlines()
    sbom = json.loads(image.with_suffix(".cdx.json").read_text())
    components = {component.get("purl") for component in sbom["components"]}
    for name, version in recorded.items():
        assert f"pypi {name} {version}" in listed
        assert f"pkg:pypi/{name}@{version}" in components
    program = "from runfolder.packages import installed; print(installed())"
    command = ("env", "PYTHONPATH=/mnt", "python", "-c", program)
    done = inside(apptainer, image, *command, binds=(f"{CHECKOUT}:/mnt",))
    assert done.stdout == f"{recorded}\n", done.stderr
    log = image.with_suffix(".log").read_text()
    assert f" packages as locked, {len(recorded)} extra, torch 2." in log


def test_the_log_has_the_self_test(image: Path) -> None:
    log = image.with_suffix(".log").read_text()
    for check in ("imports", "versions", "shared libraries", "two processes, gloo"):
        assert f"\nok       {check}: " in log


def inside(
    apptainer: str, image: Path, *command: str | Path, binds: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a command in an image, as its root: what only that may read is looked at, too."""
    options = ["--userns" if IS_ROOT else "--fakeroot", "--cleanenv", "--no-home"]
    # An ordinary user's lies below /home, in which the image's own would not be seen.
    options += ["--no-mount=cwd", *(f"--bind={bind}" for bind in binds)]
    return subprocess.run(
        [apptainer, "exec", *options, image, *command], check=False, capture_output=True, text=True
    )


def test_the_self_test_finds_another_version_and_a_lost_library(
    image: Path, apptainer: str, tmp_path: Path
) -> None:
    lock = inside(apptainer, image, "cat", "/opt/sluice/share/lock.txt").stdout
    (tmp_path / "lock.txt").write_text(lock.replace("rich==", "rich==0."))
    libraries = "echo /opt/sluice/lib/python3*/site-packages/numpy.libs"
    place = inside(apptainer, image, "bash", "-c", libraries)
    (tmp_path / "empty").mkdir()
    done = inside(
        apptainer,
        image,
        *("python", "/opt/sluice/selftest.py"),
        binds=(
            f"{tmp_path}/lock.txt:/opt/sluice/share/lock.txt",
            f"{tmp_path}/empty:{place.stdout.strip()}",
        ),
    )
    assert done.returncode == 1
    found = re.findall(r"^(ok|FAILED) +(.+?): ", done.stdout, re.MULTILINE)
    verdicts = {name: verdict for verdict, name in found}
    assert verdicts["imports"] == verdicts["versions"] == verdicts["shared libraries"] == "FAILED"


def test_no_password_is_in_the_image_the_manifest_or_the_log(image: Path, apptainer: str) -> None:
    # The definition, the labels and the build's arguments lie in the file as they are ...
    found = [
        (file.name, secret)
        for file in image.parent.glob(f"{image.stem}.*")
        for secret in SECRETS.values()
        if secret.encode() in file.read_bytes()
    ]
    assert found == []
    # ... and the file system packed. Libraries are as their wheels have them, and bytecode is made
    # of what is looked at.
    words = [word for secret in SECRETS.values() for word in ("-e", secret)]
    grep = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip"]
    grep += ["--exclude=*.so*", "--exclude-dir=__pycache__"]
    places = ["/opt", "/etc", "/usr", "/var", "/root", "/home", "/.singularity.d"]
    listed = inside(apptainer, image, *grep, *words, *places)
    # 1: grep found nothing. 0 is a find, 2 a folder that it could not read.
    assert (listed.stdout, listed.returncode) == ("", 1), listed.stderr


def test_its_bytecode_is_used_as_it_is(image: Path, apptainer: str) -> None:
    program = """
from importlib.util import cache_from_source, find_spec
for name in ("torch", "transformers"):
    with open(cache_from_source(find_spec(name).origin), "rb") as stream:
        # By a hash (1) that is not checked (2), as PEP 552 has it.
        print(int.from_bytes(stream.read(8)[4:], "little"))
"""
    assert inside(apptainer, image, "python", "-c", program).stdout.split() == ["1", "1"]


# ---- the other kinds of base, with stages that install nothing ------------------------------


@pytest.fixture(scope="module")
def small_base(builder: Account) -> Path:
    """Return a root file system with the shell and the few programs that these builds take."""
    folder = builder.home / "small base"
    for name in ("dev", "etc", "mnt", "opt", "proc", "root", "sys", "tmp", "var/tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "etc/os-release").write_text("ID=small\n")
    (folder / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (folder / "etc/group").write_text("root:x:0:\n")
    for name in ("bash", "cat", "mkdir", "sh", "test"):
        program = shutil.which(name, path="/bin")
        assert program
        listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True)
        for file in (program, *re.findall(r"(/\S+) \(0x", listed.stdout)):
            target = folder / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
    builder.own(folder)
    return folder


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> Iterator[str]:
    """Return the address of a registry on this machine, with the base as sluice/base:12."""
    folder = tmp_path_factory.mktemp("registry")
    port = free_port()
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    layout = folder / "layout"
    write_oci_layout(small_base, layout)
    log = folder / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=stream, stderr=stream
        )
    address = f"127.0.0.1:{port}"
    push = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
    push += ["--retry-times=5", f"oci:{layout}:12", f"docker://{address}/sluice/base:12"]
    try:
        wait_until(
            lambda: "listening on" in log.read_text() or server.poll() is not None,
            "the registry listens",
            so_far=log.read_text,
        )
        subprocess.run(push, check=True, capture_output=True)
        yield address
    finally:
        server.kill()
        server.wait()


def digest_of(registry: str) -> str:
    """Return the digest of the base, as another tool than ours tells it."""
    asked = ["skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}"]
    return subprocess.run(
        [*asked, f"docker://{registry}/sluice/base:12"], check=True, capture_output=True, text=True
    ).stdout.strip()


def write_oci_layout(base: Path, layout: Path) -> None:
    """Write a folder as an image of one layer, as the OCI's image-spec describes it."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    # With owners as in a real image, which a user who maps only itself cannot keep.
    tar = subprocess.run(
        ["tar", "--create", "--directory", base, "--owner=0", "--group=42", "."],
        check=True,
        capture_output=True,
    ).stdout
    diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    kind = "application/vnd.oci.image"
    config = {"architecture": "amd64", "os": "linux", "config": {}}
    config["rootfs"] = {"type": "layers", "diff_ids": [diff_id]}
    layer = {"mediaType": f"{kind}.layer.v1.tar+gzip", **blob(gzip.compress(tar, 1))}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", **blob(json.dumps(config).encode())},
        "layers": [layer],
    }
    entry = {"mediaType": f"{kind}.manifest.v1+json", **blob(json.dumps(manifest).encode())}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "12"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


@dataclass(frozen=True)
class Light:
    """A checkout whose image is a moment's work, and whose it is."""

    account: Account
    checkout: Path
    apptainer: str

    def make(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {"APPTAINER": self.apptainer}
        return self.account.run("make", *words, cwd=self.checkout, environment=environment)

    def build(self, base: str | Path) -> dict[str, str]:
        """Build images/light.sif; return what its manifest says of the base."""
        done = self.make("build-image", "VARIANT=cpu", f"BASE={base}", "IMAGE=images/light.sif")
        assert done.returncode == 0, done.stderr
        recorded: dict[str, str] = json.loads((self.checkout / "images/light.json").read_text())
        assert recorded["base"]["name"] == str(base)
        return recorded["base"]


def light_checkout(account: Account, apptainer: str, environment_of: Path) -> Light:
    checkout = account.checkout("light")
    (checkout / ".venv").symlink_to(environment_of / ".venv")
    stages = checkout / "containers/stages"
    (stages / "build.sh").write_text("mkdir -p /opt/sluice /opt/sbom\n")
    (stages / "runtime.sh").write_text(
        "mkdir -p /opt/sluice/share; cd /opt/sluice/share\n"
        "echo deb base-files 12 >packages.txt; echo '{}' >sbom.cdx.json\n"
        'echo sluice.lock.sha256 0 >>"$2"\n'
    )
    definition = checkout / "apptainer.def"
    self_test = "exec /opt/sluice/bin/python /opt/sluice/selftest.py"
    text = definition.read_text()
    assert self_test in text
    definition.write_text(text.replace(self_test, "test -d /opt/sluice/share"))
    account.own(checkout)
    return Light(account, checkout, apptainer)


@pytest.fixture(scope="module")
def light(builder: Account, builder_checkout: Path, apptainer: str) -> Light:
    """Return the ordinary user's light checkout."""
    return light_checkout(builder, apptainer, builder_checkout)


def test_a_base_can_be_an_image_file(light: Light, small_base: Path) -> None:
    file = light.account.home / "base.sif"
    made = light.account.run(light.apptainer, "build", file, small_base)
    assert made.returncode == 0, made.stderr
    digest = light.build(file)["digest"]
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_a_base_can_be_a_folder(light: Light, small_base: Path) -> None:
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", light.build(small_base)["digest"])


def test_a_base_can_be_named_by_its_digest(light: Light, registry: str) -> None:
    digest = digest_of(registry)
    assert light.build(f"docker://{registry}/sluice/base@{digest}")["digest"] == digest


# As root, where the tests are root's.
def test_whoever_runs_the_tests_builds_from_a_tag_whose_digest_is_recorded(
    registry: str, apptainer: str, builder_checkout: Path
) -> None:
    account = make_account("root" if IS_ROOT else os.environ["USER"])
    light = light_checkout(account, apptainer, builder_checkout)
    assert light.build(f"docker://{registry}/sluice/base:12")["digest"] == digest_of(registry)
    shutil.rmtree(account.home)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("this is the reason", "  this is the reason"),
        ("error: EXTRA: this is the reason", "error: EXTRA: this is the reason (log: "),
    ],
)
def test_a_build_that_fails_keeps_the_log_and_the_image_before(
    light: Light, small_base: Path, reason: str, shown: str
) -> None:
    earlier = light.checkout / "images/kept.sif"
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_bytes(b"an image")
    manifest = {"extra_packages": {"einops": "0.8.2"}}
    earlier.with_suffix(".json").write_text(json.dumps(manifest, indent=2))
    light.account.own(earlier.parent)
    broken = light.checkout / "containers/stages/build.sh"
    whole = broken.read_text()
    broken.write_text(f"echo '{reason}'; exit 1\n")
    temporary = light.account.home / "tmp of a failure"
    temporary.mkdir(exist_ok=True)
    light.account.own(temporary)
    words = ["build-image", "VARIANT=cpu", f"BASE={small_base}", f"IMAGE={earlier}"]
    done = light.make(*words, f"TMPDIR={temporary}")
    broken.write_text(whole)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith(shown)], done.stderr
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert "that this replaces has extra packages, and the new one none" in done.stderr
    assert "this is the reason" in earlier.with_suffix(".failed.log").read_text()
    assert earlier.read_bytes() == b"an image"
    assert list(temporary.iterdir()) == []
