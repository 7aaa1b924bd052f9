"""Run folders that somebody prepared, and a process that opens them with every verb while it is watched.

As a program: `python -m tests.tolaria.hostile_folders OUT [NAME...]` prints a line of JSON for each case and verb.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"
VERBS = ("resume", "eval", "report", "export", "load_model", "compare", "tamiyo show", "runs list")
CHECKPOINT = "step-0000000010"

_CEILING = 6 << 30
"""Bytes that this program may take, so that a case which goes wrong does not take the machine's."""

Prepare = Callable[[Path, Path], None]
CASES: dict[str, Prepare] = {}


def case(name: str) -> Callable[[Prepare], Prepare]:
    def note(prepare: Prepare) -> Prepare:
        CASES[name] = prepare
        return prepare

    return note


def _link(name: str) -> Prepare:
    def prepare(folder: Path, outside: Path) -> None:
        target = folder / name
        source = outside / "canary"
        if target.is_dir():
            shutil.rmtree(target)
            source = outside / "folder"
        elif name in ("checkpoints", "model", "compare", "export", "tensorboard", "checkpoints/aside"):
            source = outside / "folder"
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source)

    return prepare


for _name in (
    ".lock", "events.jsonl", "timings.jsonl", "run.json", "result.json", "report.html", "compare.json", "checkpoints",
    "checkpoints/aside", "model", "model/model.safetensors", "compare", "compare/grown-0.json", "export", "tensorboard",
    f"checkpoints/{CHECKPOINT}.json", f"checkpoints/{CHECKPOINT}.safetensors", "checkpoints/step-0000000012.json",
):  # fmt: skip
    CASES[f"link {_name}"] = _link(_name)


def _pipe(name: str) -> Prepare:
    def prepare(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return prepare


def _folder(name: str) -> Prepare:
    def prepare(folder: Path, outside: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return prepare


for _name in (".lock", "events.jsonl", "run.json", "result.json", "model/model.safetensors",
              f"checkpoints/{CHECKPOINT}.safetensors"):  # fmt: skip
    CASES[f"pipe {_name}"] = _pipe(_name)
    CASES[f"folder {_name}"] = _folder(_name)


def _text(name: str, text: str | bytes) -> Prepare:
    def prepare(folder: Path, outside: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        (folder / name).write_bytes(data)

    return prepare


_DEEP = "[" * 100_000
for _name in ("run.json", "result.json", "events.jsonl", f"checkpoints/{CHECKPOINT}.json", "compare.json"):
    CASES[f"nested {_name}"] = _text(_name, _DEEP)
    CASES[f"garbage {_name}"] = _text(_name, bytes(range(256)) * 40)
CASES["huge run.json"] = _text("run.json", '{"format":"' + "x" * (40 << 20) + '"}')
CASES["huge line of events"] = _text("events.jsonl", '{"kind":"' + "x" * (60 << 20))
CASES["numbers of 5,000 digits"] = _text("events.jsonl", '{"kind":"epoch_ended","step":' + "9" * 5000 + "}\n")


def _config(**changes: Any) -> Prepare:
    """Change the configuration in `run.json` and in the model's header."""

    def prepare(folder: Path, outside: Path) -> None:
        from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file

        values = json.loads(json.dumps(changes).replace("OUTSIDE", str(outside)))
        about = json.loads((folder / "run.json").read_text())
        values["settings"] = about["config"]["settings"] | values.get("settings", {})
        about["config"] |= values
        (folder / "run.json").write_text(json.dumps(about))
        tensors, header = read_tensor_file(folder / "model" / "model.safetensors")
        header["config"] |= values
        write_tensor_file(folder / "model" / "model.safetensors", tensors, header)

    return prepare


_ESC = "\x1b]0;owned\x07\x1b[31m"
for _name, _changes in {
    "timm with published weights": {"host": "timm:resnet18", "settings": {"timm.pretrained": True}},
    "transformers that downloads": {"host": "transformers:no/such", "settings": {"transformers.download": True}},
    "a data set of the hub": {"task": "datasets:no/such"},
    "torchvision that downloads": {"task": "torchvision:CIFAR10", "download": True},
    "torchvision that downloads by a setting": {
        "task": "torchvision:MNIST",
        "settings": {"torchvision.download": True, "torchvision.root": "OUTSIDE/none"},
    },
    "a folder of PostScript": {"task": "images:OUTSIDE/postscript"},
    "a PNG bomb": {"task": "images:OUTSIDE/bombs"},
    "a parquet bomb": {"task": "text-labels:OUTSIDE/bomb.parquet"},
    "a parquet bomb in a stream": {"task": "datasets:OUTSIDE/bomb.parquet"},
    "an IDX bomb": {"task": "torchvision:MNIST", "settings": {"torchvision.root": "OUTSIDE/idx"}},
    "a pipe among pictures": {"task": "images:OUTSIDE/pipes"},
    "a pipe as a table": {"task": "text-labels:OUTSIDE/tables"},
    "a device as a table": {"task": "text-labels:OUTSIDE/devices"},
    "a pipe as parquet": {"task": "datasets:OUTSIDE/parquets"},
    "a device as text": {"task": "text:/dev/zero"},
    "rows nested without end": {"task": "text-labels:OUTSIDE/deep.jsonl"},
    "a schedule that is a device": {"controller": "schedule:/dev/zero"},
    "an agent that is a device": {"controller": "agent:/dev/zero"},
    "an agent that is a pipe": {"controller": "agent:OUTSIDE/pipe"},
    "out elsewhere": {"out": "OUTSIDE/out"},
    "code as the host": {"host": "module:OUTSIDE/net.py:Net"},
    "code as the host, with settings": {"host": "module:OUTSIDE/net.py:Net", "settings": {"module.args": "x=1"}},
    "a disarmed governor": {"settings": {"governor.sigma": 1e9}},
    "a seed beyond all bounds": {"seed": 10**30},
    "more layers than memory": {"settings": {"cnn.widths": "100000,100000"}},
    "unknown keys": {"shell": "rm -rf /"},
    "epochs that are text": {"epochs": "many"},
    "escapes in names": {"host": _ESC, "task": _ESC},
    "a blueprint that is a path": {"blueprints": ["../../etc/passwd"]},
    "a sink that is a path": {"sinks": ["../../x"]},
}.items():
    CASES[_name] = _config(**_changes)


@case("a header longer than the file")
def _(folder: Path, outside: Path) -> None:
    for path in (folder / "checkpoints" / f"{CHECKPOINT}.safetensors", folder / "model" / "model.safetensors"):
        path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


@case("a sparse file of a terabyte")
def _(folder: Path, outside: Path) -> None:
    for path in (folder / "checkpoints" / f"{CHECKPOINT}.safetensors", folder / "model" / "model.safetensors"):
        with open(path, "wb") as file:
            file.truncate(1 << 40)


@case("a structure of 30,000 seeds")
def _(folder: Path, outside: Path) -> None:
    from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file

    path = folder / "model" / "model.safetensors"
    tensors, header = read_tensor_file(path)
    header["structure"] = [{**header["structure"][0], "path": f"block1+{n}"} for n in range(30_000)]
    write_tensor_file(path, tensors, header)


@case("paths in the structure")
def _(folder: Path, outside: Path) -> None:
    from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file

    path = folder / "model" / "model.safetensors"
    tensors, header = read_tensor_file(path)
    header["structure"] = [{**header["structure"][0], "path": "../../../etc/passwd"}]
    write_tensor_file(path, tensors, header)


@case("threads and versions that are none")
def _(folder: Path, outside: Path) -> None:
    about = json.loads((folder / "run.json").read_text())
    about |= {"threads": 10**12, "versions": "none", "plugins": 7, "data": {"train": 3}, "parts": {"host cnn": _ESC}}
    (folder / "run.json").write_text(json.dumps(about))


@case("an arm that points elsewhere")
def _(folder: Path, outside: Path) -> None:
    (folder / "compare").mkdir()
    (folder / "compare" / "grown-0.json").write_text(json.dumps({"run": str(outside), "accuracy": "x"}))


@case("a script that is called as a module is")
def _(folder: Path, outside: Path) -> None:
    for name in ("inspect.py", "torch.py", "click.py", "esper_plugins.py", "multiprocessing.py"):
        (folder / name).write_text(f"open({str(outside / 'owned')!r}, 'w')\n")


@case("nothing but run.json")
def _(folder: Path, outside: Path) -> None:
    for path in folder.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lay_outside(outside: Path) -> None:
    """What must not be touched, and the bombs that configurations point to."""
    (outside / "folder").mkdir(parents=True)
    (outside / "canary").write_text("untouched")
    (outside / "net.py").write_text(
        f"open({str(outside / 'owned')!r}, 'w')\nimport subprocess\nsubprocess.run(['id'])\n"
    )
    (outside / "folder" / "canary").write_text("untouched")
    os.mkfifo(outside / "pipe")
    (outside / "deep.jsonl").write_text('{"text":' + "[" * 50_000 + "]" * 50_000 + ',"label":1}\n' * 3)
    for split in ("a", "b"):
        for kind in ("postscript", "bombs"):
            (outside / kind / split).mkdir(parents=True)
        for number in range(4):
            (outside / "postscript" / split / f"{number}.png").write_bytes(
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
            )
            (outside / "bombs" / split / f"{number}.png").write_bytes(png_bomb(30_000, 30_000))
        (outside / "pipes" / split).mkdir(parents=True)
        os.mkfifo(outside / "pipes" / split / "0.png")
    for name, kind in (("tables", "csv"), ("parquets", "parquet")):
        (outside / name).mkdir()
        os.mkfifo(outside / name / f"train.{kind}")
    (outside / "devices").mkdir()
    (outside / "devices" / "train.csv").symlink_to("/dev/zero")
    (outside / "idx").mkdir()
    for part in ("train", "t10k"):
        for kind, dims in (("images-idx3", (60_000, 2800, 2800)), ("labels-idx1", (60_000,))):
            data = struct.pack(">HBB", 0, 8, len(dims)) + struct.pack(f">{len(dims)}I", *dims)
            with gzip.open(outside / "idx" / f"{part}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(data + bytes(10 << 20))
    parquet_bomb(outside / "bomb.parquet")


def png_bomb(width: int, height: int) -> bytes:
    """A small PNG that says that it is large, and is."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = bytes(width * 3 + 1)
    body = b"".join(packer.compress(row) for _ in range(8)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def parquet_bomb(path: Path) -> None:
    """A value of a megabyte three thousand times, which a dictionary makes small."""
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * (1 << 20)]))
    parquet.write_table(pa.table({"text": text, "label": pa.array([0, 1, 2] * 1000)}), path, use_dictionary=True)


def lay_folder(folder: Path, *, finished: bool) -> None:
    """A run folder with checkpoints and a model, recorded by an earlier version."""
    shutil.copytree(RECORDED / "interrupted", folder)
    shutil.copytree(RECORDED / "finished" / "model", folder / "model")
    if finished:
        shutil.copy(RECORDED / "finished" / "result.json", folder)
        shutil.copy(RECORDED / "finished" / "events.jsonl", folder)


# --- The watched process ---


class AccessRecorder:
    """Counts what must not happen, by Python's audit events."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    QUIET = ("/dev/null", "/dev/tty")

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pty.spawn"):
            self.seen.append(f"{event} {arguments[:1]}")
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
            self.seen.append(f"{event} {arguments[-1:]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & self.WRITES:
            self._note_write(arguments[0])
        elif event == "os.mkdir" and os.path.isdir(arguments[0]):
            return  # libraries make sure that their folders are there
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"):
            self._note_write(arguments[1] if event == "os.rename" else arguments[0])

    def _note_write(self, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or str(path) in self.QUIET or "__pycache__" in str(path):
            return
        real = os.path.realpath(path)
        if "torchinductor" in real:  # torch's own cache of kernels
            return
        assert self.inside is not None
        if not real.startswith(os.path.realpath(self.inside) + os.sep) and real != os.path.realpath(self.inside):
            self.seen.append(f"write {real}")


def call(verb: str, folder: Path) -> tuple[int, str]:
    """Exit code and what was said."""
    from esper_core.cli.main import cli

    arguments = {
        "resume": ["resume", str(folder), "--quiet"], "eval": ["eval", str(folder)], "report": ["report", str(folder)],
        "export": ["export", str(folder)], "compare": ["compare", str(folder), "--seeds", "1", "--arms", "grown"],
        "tamiyo show": ["tamiyo", "show", str(folder / "model" / "model.safetensors")],
        "runs list": ["runs", "list", str(folder.parent)],
    }  # fmt: skip
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            if verb == "load_model":
                from esper_core.leyline.errors import EsperError
                from esper_core.tolaria.model_file import load_model

                try:
                    load_model(folder)
                    code = 0
                except EsperError as error:
                    print(f"error: {error}")
                    code = 2
            else:
                code = 0
                try:
                    cli.main(arguments[verb], prog_name="esper")
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 1
        except BaseException as error:  # noqa: BLE001 - it is what the test is about
            return -1, f"{type(error).__name__}: {error}\n{out.getvalue()}"
    return code, out.getvalue()


def warm_up(root: Path) -> None:
    """Open a good folder with every verb, unwatched: what libraries do at their first import is not the case's."""
    import datasets
    import timm  # noqa: F401
    import transformers  # noqa: F401

    Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    for verb in VERBS:
        folder = root / "good" / verb.replace(" ", "-") / "run"
        folder.parent.mkdir(parents=True)
        lay_folder(folder, finished=verb in ("compare", "report"))
        code, said = call(verb, folder)
        assert code in (0, 130) or (verb == "tamiyo show" and "is no agent" in said), (verb, said)
    shutil.rmtree(root / "good")


def _peak_mebibytes() -> float:
    """This program's own peak; `ru_maxrss` would be its parent's where that was larger when it started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Lay every case and open it with every verb."""

    root, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(CASES)
    resource.setrlimit(resource.RLIMIT_DATA, (_CEILING, _CEILING))
    outside = root / "outside"
    lay_outside(outside)
    answers = os.fdopen(os.dup(1), "w")
    watch = AccessRecorder()
    warm_up(root)
    for number, name in enumerate(names):
        for verb in VERBS:
            folder = root / f"case-{number}" / verb.replace(" ", "-") / ("evil\x1b[31m" if number % 7 == 0 else "run")
            folder.parent.mkdir(parents=True)
            lay_folder(folder, finished=verb in ("compare", "report"))
            CASES[name](folder, outside)
            os.chdir(folder.parent)
            began = time.monotonic()
            _forget_peak()
            watch.seen, watch.inside = [], folder.parent
            code, said = call(verb, folder)
            watch.inside = None
            untouched = (outside / "canary").read_text() == "untouched" == (outside / "folder" / "canary").read_text()
            report = {
                "case": name, "verb": verb, "code": code, "said": said[-1500:], "seen": watch.seen,
                "untouched": untouched and sorted(os.listdir(outside / "folder")) == ["canary"]
                and not (outside / "owned").exists() and not (outside / "out").exists(),
                "seconds": time.monotonic() - began,
                "mebibytes": _peak_mebibytes(),
            }  # fmt: skip
            answers.write(json.dumps(report) + "\n")
            answers.flush()
            os.chdir(root)
            shutil.rmtree(root / f"case-{number}" / verb.replace(" ", "-"), ignore_errors=True)


if __name__ == "__main__":
    main()
