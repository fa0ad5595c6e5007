"""Windows, emulated as far as POSIX allows: see also `test_locks.py`."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("common", "client", "server", "simulations")

EMULATED = """
import os, pkgutil, shutil, signal, socket, sys
from types import ModuleType

# Other packages are not what is tested: they are imported before the platform is another.
import flwr, grpc, hypothesis, numpy, pydantic, rich, torch, typer, uvicorn  # noqa
import asyncio, multiprocessing, subprocess, tempfile, concurrent.futures.process, flwr.serverapp, flwr.clientapp
import PIL.Image, PIL.ImageOps, sklearn.datasets, torch.func, torchvision, transformers
import click.termui, rich.prompt, rich.progress, cryptography.x509

folder = sys.argv[1]
MODULES = "fcntl grp pwd resource termios tty pty readline syslog"
CALLS = (
    "fork forkpty setsid killpg getpgid geteuid getuid getegid chown fchmod fchown mkfifo uname nice sync pread pwrite "
    "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC sched_getaffinity sched_setaffinity getloadavg sysconf"
)
SIGNALS = "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE SIGQUIT setitimer pause"
for name in MODULES.split():
    sys.modules[name] = None
for module, names in ((os, CALLS), (signal, SIGNALS)):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
del socket.AF_UNIX
locking = ModuleType("msvcrt")
locking.LK_NBLCK, locking.locking = 2, lambda handle, mode, count: None
sys.modules["msvcrt"] = locking
shutil._use_fd_functions = False


def in_use(path):
    '''Windows lets nobody replace or delete a file that is open or mapped.'''
    path = os.path.realpath(path)
    within = path + os.sep
    opened = []
    for number in os.listdir("/proc/self/fd"):
        try:
            opened.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    with open("/proc/self/maps") as maps:
        opened += [line.rstrip("\\n").split(None, 5)[-1] for line in maps]
    return any(one == path or one.startswith(within) for one in opened)


def guarded(function, *, replaces):
    def call(source, *others, **options):
        for each in (source, *others[:1]) if replaces is not None else (source,):
            if isinstance(each, (str, os.PathLike)) and os.fspath(each).startswith(folder) and in_use(each):
                raise PermissionError(13, "Permission denied", os.fspath(each))
        if replaces is False and os.path.exists(others[0]):
            raise FileExistsError(17, "File exists", os.fspath(others[0]))
        return function(source, *others, **options)
    return call


os.replace = guarded(os.replace, replaces=True)
os.rename = guarded(os.rename, replaces=False)
os.unlink = os.remove = guarded(os.unlink, replaces=None)
really_open = os.open
os.open = lambda path, *rest, **named: (
    (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(path)))
    if os.path.isdir(path) else really_open(path, *rest, **named)
)
sys.platform = "win32"

import fedhead
for found in pkgutil.walk_packages(fedhead.__path__, "fedhead."):
    if not found.name.endswith("__main__"):
        __import__(found.name)

from fedhead.cli import main
for arguments in sys.argv[2].split(";"):
    sys.argv = ["fedhead", *arguments.split()]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
print("all done")
"""


def test_every_module_imports_and_a_run_is_made_without_posix(tmp_path: Path) -> None:
    """Module by module, then a run, the same run resumed, features used again, and the model used and exported."""
    run = tmp_path / "run"
    simulated = f"simulate --data digits --sites 4 --rounds 2 --out {run}"
    commands = [
        simulated,
        f"simulate --data digits --sites 3 --rounds 0 --out {tmp_path / 'again'}",
        f"solve {run} --out {tmp_path / 'solved'}",
        f"export {run} --format torch-export --out {tmp_path / 'exported.pt2'}",
        f"leave {run} --site site-1",
    ]
    environment = {**os.environ, "FEDHEAD_HOME": str(tmp_path / "home")}
    arguments = [sys.executable, "-c", EMULATED, str(tmp_path), ";".join(commands)]
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert "all done" in ended.stdout, ended.stderr[-3000:]


def test_texts_are_read_and_written_in_utf_8() -> None:
    """Elsewhere than on Windows this is the default."""
    found = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            modes = [text for text in texts if re.fullmatch("[rwax+]+", text)]
            is_text = node.func.attr in ("read_text", "write_text") or (node.func.attr in ("open", "fdopen") and modes)
            if is_text and "encoding" not in [keyword.arg for keyword in node.keywords]:
                found.append(f"{path}:{node.lineno}")
    assert found == []
