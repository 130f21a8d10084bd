"""`make build-image`, for real: as an ordinary user from a Debian mirror, and as root from a
registry on this machine; what it refuses; what must not be in an image.

The whole builds take some minutes each. The kinds of base that they leave out are built with
stages that install next to nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import image as images
from tests.conftest import free_port
from tests.image.accounts import IS_ROOT, Account, make_account

pytestmark = pytest.mark.needs("unshare", "apptainer", "mmdebstrap", "docker-registry", "skopeo")

# Planted wherever a password can stand; none of them may be found in what a build leaves.
SECRETS = {
    "environment": "sluice-planted-in-environment",
    "pip": "sluice-planted-in-pip",
    "apt": "sluice-planted-in-apt",
}


# ---- what it refuses, and how fast ----------------------------------------------------------


@pytest.fixture
def refusal(builder: Account, builder_checkout: Path, tmp_path: Path):
    """Return a function that runs build.sh and gives the one line that it answers with."""

    def run(*prefix: str, script: str = "", **environment: str) -> str:
        command: tuple[str, ...] = (*prefix, "containers/build.sh")
        if script:
            command = (*prefix, "bash", "-c", f"{script}; exec containers/build.sh")
        image = builder.home / "refused" / "image.sif"
        begin = time.monotonic()
        done = builder.run(
            *command,
            cwd=builder_checkout,
            environment={"VARIANT": "cpu", "IMAGE": str(image)} | environment,
        )
        took_s = time.monotonic() - begin
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        # Before it may stand what was begun; of what is wrong there is one line, the last.
        *steps, line = done.stderr.splitlines()
        assert line.startswith("error: "), done.stderr
        assert not any("error" in step.lower() for step in steps)
        assert took_s < 5
        written = {file.name for file in image.parent.glob("*")}
        assert written <= {"image.failed.log"}
        assert not list((builder.home / "tmp").glob("sluice-build-*")), "something was left"
        return line

    return run


def test_without_user_namespaces_it_says_whom_to_ask(refusal) -> None:
    forbid = "echo 0 >/proc/sys/user/max_user_namespaces"
    assert "max_user_namespaces" in refusal("unshare", "--map-root-user", script=forbid)


def test_without_space_it_names_the_folder_and_what_is_needed(refusal, builder: Account) -> None:
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


def test_without_apptainer_it_names_the_script_that_installs_it(refusal, tmp_path: Path) -> None:
    line = refusal(PATH="/usr/bin:/bin", APPTAINER_PREFIX=str(tmp_path / "none"))
    assert "containers/install-apptainer.sh" in line


@pytest.mark.parametrize("base", ["docker", "docker://127.0.0.1:9/debian:bookworm", "debian"])
def test_an_unreachable_base_is_said_with_another_way(refusal, base: str) -> None:
    # Without a network nothing answers; the loopback has no registry.
    line = refusal("unshare", "--map-root-user", "--net", BASE=base)
    assert base.partition("/")[0].rstrip(":") in line.lower()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"VARIANT": "rocm"}, "there are cuda and cpu"),
        ({"BASE": "/nowhere"}, "BASE=/nowhere"),
        ({"BASE": "docker://someone:word@registry.example/debian"}, "apptainer registry login"),
        ({"IMAGE": "image.img"}, "ends in .sif"),
        ({"IMAGE": "a,b.sif"}, "holds a comma or a colon"),
        ({"IMAGE": "/proc/image.sif"}, "IMAGE=/proc/image.sif"),
        ({"TMPDIR": "/nowhere"}, "TMPDIR=/nowhere"),
        ({"CUDA_ARCHITECTURES": "sm_90"}, "compute capabilities"),
        ({"COMPRESSION": "rar"}, "zstd and gzip"),
        ({"BASE": "docker://127.0.0.1:port/debian"}, "is not a name such as"),
    ],
)
def test_bad_input_is_one_line(refusal, environment: dict[str, str], says: str) -> None:
    line = refusal(**environment)
    assert says in line
    assert "word@" not in line


# ---- a whole build as an ordinary user ------------------------------------------------------


def test_a_user_builds_from_a_debian_mirror(image: Path) -> None:
    manifest = json.loads(image.with_suffix(".json").read_text())
    assert manifest["image"] == "sluice-cpu.sif"
    assert manifest["base"]["name"] == "debian"
    assert manifest["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert manifest["size_bytes"] == image.stat().st_size < 800e6
    # The user's, as the folder is.
    assert image.owner() == image.parent.owner()


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
    assert labels["sluice.lock.sha256"] == images.lock_sha256("cpu")
    assert labels["sluice.variant"] == "cpu"
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")
    assert labels["sluice.version.torch"].startswith("2.")


def test_the_log_has_the_self_test(image: Path) -> None:
    log = image.with_suffix(".log").read_text()
    for check in ("imports", "versions", "shared libraries", "two processes, gloo"):
        assert f"\nok       {check}: " in log


def test_the_self_test_finds_another_version_and_a_lost_library(
    image: Path, apptainer: str, tmp_path: Path
) -> None:
    def inside(*command: str | Path, binds: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        options = ["--userns"] if IS_ROOT else []
        options += ["--cleanenv", "--no-home", *(f"--bind={bind}" for bind in binds)]
        return subprocess.run(
            [apptainer, "exec", *options, image, *command],
            check=False,
            capture_output=True,
            text=True,
        )

    lock = inside("cat", "/opt/sluice/share/lock.txt").stdout
    (tmp_path / "lock.txt").write_text(lock.replace("rich==", "rich==0."))
    place = inside("bash", "-c", "echo /opt/sluice/lib/python3*/site-packages/numpy.libs")
    (tmp_path / "empty").mkdir()
    done = inside(
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


# ---- a whole build as root, from a registry, with passwords all around ----------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[str]:
    """Return the address of a registry on this machine, with the base as sluice/base:12."""
    folder = tmp_path_factory.mktemp("registry")
    port = free_port()
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    layout = folder / "layout"
    write_oci_layout(base, layout)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log
        )
    address = f"127.0.0.1:{port}"
    push = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false"]
    push += ["--retry-times=5", f"oci:{layout}:12", f"docker://{address}/sluice/base:12"]
    try:
        wait_for(port)
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


def wait_for(port: int) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the registry does not listen")


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


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    """Return the address of a package index that has nothing, and asks for no password."""

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def install_less(checkout: Path, name: str, as_it_is: str, instead: str) -> None:
    """Replace a part of a file of the checkout, which must be there."""
    file = checkout / name
    text = file.read_text()
    assert as_it_is in text
    file.write_text(text.replace(as_it_is, instead))


def without_self_test(checkout: Path) -> None:
    """Have `apptainer test` ask no more than that something is there."""
    self_test = "exec /opt/sluice/bin/python /opt/sluice/selftest.py"
    install_less(checkout, "apptainer.def", self_test, "test -d /opt/sluice/share")


@pytest.fixture(scope="module")
def second_image(registry: str, index: str, apptainer: str) -> Iterator[Path]:
    """Return an image built as whoever runs the tests, with a password in every setting.

    By the stages as they are, but for the environment, which is the light one: what is installed
    comes from a lock all the same, and installing torch once more would show nothing new.
    """
    account = make_account("root" if IS_ROOT else os.environ["USER"])
    checkout = account.checkout()
    install_less(checkout, "containers/stages/build.sh", "/opt/sluice cpu", "/opt/sluice base")
    without_self_test(checkout)
    extra = f"http://user:{SECRETS['pip']}@{index}/simple"
    given = subprocess.run(
        ["python3", "-m", "pip", "config", "get", "global.extra-index-url"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    apt = account.home / "apt.conf"
    apt.write_text(f'Acquire::ftp::Proxy "http://user:{SECRETS["apt"]}@127.0.0.1:9/";\n')
    environment = {
        "PIP_EXTRA_INDEX_URL": f"{given.strip()} {extra}".strip(),
        "APT_CONFIG": str(apt),
        "HF_TOKEN": SECRETS["environment"],
        "APPTAINERENV_TOKEN": SECRETS["environment"],
        "APPTAINER": apptainer,
    }
    make = ["make", "build-image", "VARIANT=cpu", f"BASE=docker://{registry}/sluice/base:12"]
    done = account.run(*make, cwd=checkout, environment=environment, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    yield checkout / "images/sluice-cpu.sif"
    shutil.rmtree(account.home)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_builds_from_the_same_inputs_have_the_same_packages(
    image: Path, second_image: Path
) -> None:
    first, second = (
        file.with_suffix(".txt").read_text().splitlines() for file in (image, second_image)
    )
    # Debian's are the same; Python's are a part, in the same versions.
    assert [line for line in second if line.startswith("deb ")] == [
        line for line in first if line.startswith("deb ")
    ]
    # Of setuptools the whole environment has one of its lock, the light one that of Debian's venv.
    python = {line for line in second if line.startswith("pypi ") and "setuptools" not in line}
    assert len(python) > 10
    assert python <= set(first)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_base_of_a_registry_is_recorded_by_its_digest(second_image: Path, registry: str) -> None:
    base = json.loads(second_image.with_suffix(".json").read_text())["base"]
    assert base["digest"] == digest_of(registry)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_password_is_in_the_image_the_manifest_or_the_log(
    second_image: Path, apptainer: str, tmp_path: Path
) -> None:
    # The definition, the labels and the build's arguments lie in the file as they are ...
    beside = second_image.parent.glob("*")
    found = [
        (file.name, secret)
        for file in beside
        for secret in SECRETS.values()
        if secret.encode() in file.read_bytes()
    ]
    assert found == []
    # ... and the file system packed.
    words = [word for secret in SECRETS.values() for word in ("-e", secret)]
    inside = [apptainer, "exec", "--cleanenv", "--no-home", "--no-mount", "tmp,cwd"]
    if IS_ROOT:
        inside.append("--userns")
    grep = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip"]
    places = ["/opt", "/etc", "/usr", "/var", "/root", "/home", "/.singularity.d"]
    listed = subprocess.run(
        [*inside, second_image, *grep, *words, *places],
        check=False,
        capture_output=True,
        text=True,
    )
    # 1: grep found nothing. 0 is a find, 2 a folder that it could not read.
    assert (listed.stdout, listed.returncode) == ("", 1), listed.stderr


# ---- the other kinds of base, with stages that install next to nothing ----------------------


@pytest.fixture(scope="module")
def light_checkout(builder: Account) -> Path:
    """Return a checkout whose image is a moment's work: the road, without the load."""
    checkout = builder.checkout("light")
    stages = checkout / "containers/stages"
    (stages / "build.sh").write_text("mkdir -p /opt/sluice /opt/sbom\n")
    (stages / "runtime.sh").write_text(
        "mkdir -p /opt/sluice/share; cd /opt/sluice/share\n"
        "echo deb base-files 12 >packages.txt; echo '{}' >sbom.cdx.json\n"
        'echo sluice.lock.sha256 0 >>"$2"\n'
    )
    without_self_test(checkout)
    builder.own(checkout)
    return checkout


def build_light(
    builder: Account, checkout: Path, base: str | Path, apptainer: str
) -> dict[str, str]:
    """Build images/light.sif; return what its manifest says of the base."""
    make = ["make", "build-image", "VARIANT=cpu", f"BASE={base}", "IMAGE=images/light.sif"]
    done = builder.run(*make, cwd=checkout, environment={"APPTAINER": apptainer})
    assert done.returncode == 0, done.stderr
    recorded: dict[str, str] = json.loads((checkout / "images/light.json").read_text())["base"]
    assert recorded["name"] == str(base)
    return recorded


def test_a_base_can_be_an_image_file(
    builder: Account, light_checkout: Path, base: Path, apptainer: str
) -> None:
    file = builder.home / "base.sif"
    quick = ["--mksquashfs-args", "-comp zstd -Xcompression-level 1"]
    assert builder.run(apptainer, "build", *quick, file, base).returncode == 0
    recorded = build_light(builder, light_checkout, file, apptainer)
    assert recorded["digest"] == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_a_base_can_be_named_by_its_digest(
    builder: Account, light_checkout: Path, registry: str, apptainer: str
) -> None:
    digest = digest_of(registry)
    reference = f"docker://{registry}/sluice/base@{digest}"
    assert build_light(builder, light_checkout, reference, apptainer)["digest"] == digest


def test_a_base_can_be_a_folder_and_apptainers_own_keys_sign(
    builder: Account, light_checkout: Path, base: Path, apptainer: str
) -> None:
    recorded = build_light(builder, light_checkout, base, apptainer)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", recorded["digest"])

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *words, "IMAGE=images/light.sif", "KEY=keyring"]
        return builder.run(*command, cwd=light_checkout, environment={"APPTAINER": apptainer})

    assert "does not vouch for it" in make("verify-image").stderr
    who = ["--name", "A", "--email", "a@example.org", "--comment", "tests", "--password", ""]
    made = builder.run(apptainer, "key", "newpair", *who, "--push=false", "--bit-length", "2048")
    assert made.returncode == 0, made.stderr
    signed = make("sign-image")
    assert signed.returncode == 0, signed.stderr
    verified = make("verify-image")
    assert verified.returncode == 0, verified.stderr


def test_a_build_that_fails_keeps_the_log_and_the_image_before(
    builder: Account, light_checkout: Path, base: Path, apptainer: str
) -> None:
    earlier = light_checkout / "images/kept.sif"
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_bytes(b"an image")
    builder.own(earlier.parent)
    broken = light_checkout / "containers/stages/build.sh"
    whole = broken.read_text()
    broken.write_text("echo this is the reason; exit 1\n")
    try:
        done = builder.run(
            *("make", "build-image", "VARIANT=cpu", f"BASE={base}", f"IMAGE={earlier}"),
            cwd=light_checkout,
            environment={"APPTAINER": apptainer},
        )
    finally:
        broken.write_text(whole)
    assert done.returncode == 2
    assert "this is the reason" in done.stderr
    assert "error: " in done.stderr
    assert "this is the reason" in earlier.with_suffix(".failed.log").read_text()
    assert earlier.read_bytes() == b"an image"
    assert not list((builder.home / "tmp").glob("sluice-build-*"))
