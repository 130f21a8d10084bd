"""The user's own packages, beside the locked ones (EXTRA=): which lines of a file are taken, and
why pip refused one.

    python containers/extra.py FILE                      its requirements, one per line
    python containers/extra.py --explain OUTPUT LOCKED   which locked package was in the way

OUTPUT is what pip wrote, LOCKED the lines NAME==VERSION that it had as constraints.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# A requirement as PEP 508 has it, without an address.
REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)\s*(?:\[[\w.,\s-]*\])?\s*"
    r"(?:(?:===|~=|==|!=|<=|>=|<|>)\s*[\w.*+!-]+\s*(?:,\s*(?!$|;)|(?=$|;)))*(?:;.+)?",
    re.ASCII,
)
SOURCES = (
    *("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--no-index"),
    *("--trusted-host", "--proxy", "--cert", "--client-cert"),
)


class Refused(Exception):
    """The file cannot be used; the message says where, why and what to do next."""


def requirements(text: str) -> list[str]:
    """Return the requirements of a requirements file, without its comments.

    Raises:
        Refused: a line is something else. The message has nothing of it that may be a password.
    """
    found, words, first = [], "", 0
    for number, line in enumerate([*text.splitlines(), ""], 1):
        first = first or number
        # A backslash continues a line, for pip as well.
        words += line.removesuffix("\\") + " "
        if line.endswith("\\"):
            continue
        if words := re.sub(r"(^|\s)#.*", "", words).strip():
            found.append(_checked(words, f"line {first}"))
        words, first = "", 0
    if not found:
        raise Refused("names no package; write one on each line, such as trl>=1.0")
    return found


def _checked(words: str, where: str) -> str:
    option = re.search(r"(?:^|\s)(--[a-z-]+|-[A-Za-z])", words)
    editable = option and option[1] in ("-e", "--editable")
    if option and option[1] in SOURCES:
        raise Refused(
            f"{where}: {option[1]} does not belong here, where it could give a password away; set "
            "it in pip's own configuration (pip.conf or PIP_*), which the build uses"
        )
    if option and not editable:
        raise Refused(
            f"{where}: the option {option[1]} is not taken; name only packages and versions"
        )
    if editable or re.search(r"[@/]|\.(whl|zip|tar\.\w+)$", words):
        raise Refused(
            f"{where}: is an address or a folder, not the name of a package; make a wheel of it "
            "(pip wheel --no-deps), have pip look for it there (PIP_FIND_LINKS), and write its name"
        )
    if not REQUIREMENT.fullmatch(words):
        raise Refused(f"{where}: '{words}' is not a requirement, such as trl>=1.0")
    return words


def explain(output: str, locked: str) -> str:
    """Return which locked package was in the way, in one line; empty if that was not the reason."""
    versions = {_normal(name): version for name, version in re.findall(r"(?m)^(.+)==(.+)$", locked)}
    cause = output.rpartition("The conflict is caused by:\n")[2].partition("\n\n")[0]
    wanted = r"^ +(?:The user requested|(\S+ \S+) depends on) (?!\(constraint\))(([\w.-]+).*)$"
    fixed = {_normal(name) for name in re.findall(r"requested \(constraint\) ([\w.-]+)", cause)}
    for whose, what, name in re.findall(wanted, cause, re.MULTILINE):
        if _normal(name) in fixed and _normal(name) in versions:
            lock = f"but the lock has {name} {versions[_normal(name)]}, and no extra package may"
            if not whose:
                return f"{what} is asked for, {lock} change the lock; leave it out"
            return (
                f"{whose} needs {what}, {lock} change the lock; ask for another version of "
                f"{whose.split()[0]}, or leave it out"
            )
    return ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str]) -> int:
    """Print the requirements of a file, or an explanation."""
    if arguments[0] == "--explain":
        output, locked = (Path(name).read_text(errors="replace") for name in arguments[1:])
        print(explain(output, locked))
        return 0
    [name] = arguments
    path = Path(name)
    try:
        if "://" in name:
            # Not shown: there may be a password in it.
            name = name.partition("://")[0] + "://..."
            raise Refused("is an address; download the file, and give its path")
        if path.is_dir():
            raise Refused("is a folder; give a requirements file, as `pip install -r` takes it")
        print("\n".join(requirements(path.read_text(encoding="utf-8-sig"))))
    except FileNotFoundError:
        reason = "there is no such file; give a requirements file, as `pip install -r` takes it"
    except UnicodeDecodeError:
        reason = "is not text in UTF-8; save it as that"
    except (Refused, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    else:
        return 0
    print(f"error: EXTRA={name}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
