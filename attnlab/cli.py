"""The command line: `attnlab COMMAND`, of which `attnlab --help` has the list."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import math
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from attnlab import __version__, signals
from attnlab.errors import RunError, UserError, missing_package, out_of_memory, own_place

_EPILOG = """\
Options of a config are set with --gin.NAME=VALUE, where NAME is a macro or Class.option:
  attnlab train experiments/lm/small.gin experiments/mixers/local.gin --gin.LocalAttention.window=32 --gin.STEPS=400

A command given again with the same --workdir continues where it stopped. --debug, after a command, prints where an
error came from. `eval "$(attnlab --print-completion bash)"` completes commands and options (zsh and tcsh too).
"""


_HOSTS = """\
Start the same command on each, with a --workdir that all see. The config's Mesh has to take all of their devices.
"""
_HEARTBEAT = "without a sign of life from a process after which the others end"
_SHARED = (
    "without --coordinator they share the runs (default 1): all are started here, and the same command on other hosts "
    "that see the folders joins them"
)
_TRUST = "run the code of modules that the run's config imports; without it, only attnlab's own is run"
_PICTURES = (".png", ".svg", ".pdf")
# Of a sample: what is drawn at once; of a seed: as in training; of a picture: weights of all pairs are computed whole.
_MOST_SAMPLES, _MOST_SEED, _MOST_SHOWN = 4096, 2**31 - 1, 2048
_MOST_DRAWN = 2**20  # tokens of a text, by --length
_MOST_PROCESSES = 256
_DEFAULT_HEARTBEAT, _MOST_HEARTBEAT, _MOST_HOSTS = 100, 86400, 2**16
_MOST_SEQUENCES = 10_000  # of regress, by --seeds
_MOST_PORT = 2**16 - 1
_DEBUG = "--debug"
_RED = 31
_LEAST_BESIDE = 50  # columns of a text beside its name


def run() -> NoReturn:
    """The program `attnlab`."""
    signals.leave(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 if a run failed, 2 for a mistake in what was given."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    with signals.handled(continues=given[:1] in (["train"], ["ablate"])):
        parser, command, overrides = _parse([argument for argument in given if argument != _DEBUG])
        if command.run is None:
            parser.print_help()
            return 0
        if "jax" not in sys.modules and command.run is not _open:
            print(f"attnlab {__version__}: starting", file=sys.stderr, flush=True)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # what is printed is there if the process is ended
        try:
            if overrides and not command.reads_config:
                raise UserError(f"{command.name} reads no config, so it takes no --gin.{overrides[0]}")
            status = command.run(command, overrides)
        except Exception as error:
            line, status = _explained(error)
            if line is None:
                raise
            if _DEBUG in given:
                traceback.print_exc()
            print(f"{_in_color('attnlab:', _RED, sys.stderr)} {line}", file=sys.stderr, flush=True)
            if not isinstance(error, (UserError, FloatingPointError)):  # which all processes of a run meet
                return status
        except (SystemExit, KeyboardInterrupt):  # of a signal, on which all processes of a run have agreed
            command.leave()
            raise
        command.leave()
        return status


def _explained(error: Exception) -> tuple[str | None, int]:
    """One line for what is no fault of the program, and the exit status; None for what is."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("attnlab"):
        return missing_package(error.name), 2
    if isinstance(error, (RunError, FloatingPointError)):
        return str(error), 1
    if (jax := sys.modules.get("jax")) and jax.distributed.is_initialized():
        from attnlab.train.hosts import lost_process

        if reason := lost_process(error):
            return f"another process of the run has ended or is not reached ({reason}); start all of them again", 1
    if type(error).__module__.startswith(("gcsfs", "google.")):
        return f"Google Cloud Storage: {' '.join(str(error).split())[:300]}", 1
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails once more at its end
        return "nobody reads the output", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", 1
    if out_of_memory(error):
        return f"out of memory ({' '.join(str(error).split())[:100]})", 1
    if place := own_place(error):  # a mixer of one's own, say, in decoding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}", 1
    return None, 1


def _in_color(text: str, code: int, stream: TextIO) -> str:
    """On a terminal, unless NO_COLOR is set."""
    return f"\033[{code}m{text}\033[0m" if stream.isatty() and not os.environ.get("NO_COLOR") else text


def _path(text: str) -> Path:
    """A path of this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"got {text}; need a path of this machine (train, ablate, sample and report take gs://...)"
        )
    return Path(_folder(text))


def _folder(text: str) -> str:
    """What is empty, as of a variable that is not set, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("got an empty path")
    return text


class _Parser(argparse.ArgumentParser):
    """Whose errors say what was meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        if unknown and (close := difflib.get_close_matches(unknown[1], re.findall(r"[\w-]+", unknown[2]), n=1)):
            message += f"; did you mean {close[0]!r}?"
        if message.startswith("unrecognized arguments: --"):
            message += "; an option of a config is --gin.NAME=VALUE"
        super().error(message)


def _parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    overrides = [argument.removeprefix("--gin.") for argument in arguments if argument.startswith("--gin.")]
    rest = [argument for argument in arguments if not argument.startswith("--gin.")]
    parser = _Parser(
        prog="attnlab",
        description="Train small models with any attention mechanism, and compare mechanisms under equal conditions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnlab {__version__}")
    parser.set_defaults(run=None, leave=lambda: None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    train = commands.add_parser("train", help="train one model", description="Train one model as the configs specify.")
    train.add_argument("configs", nargs="+", metavar="CONFIG", help="a .gin file; later files win over earlier ones")
    train.add_argument(
        "--workdir", type=_folder, help="folder, or gs://..., for checkpoints and metrics (default runs/train/NAME)"
    )
    _add_hosts(train)
    train.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="trace so many steps into WORKDIR/profile, which xprof opens (the third on, so that all is compiled)",
    )
    train.set_defaults(run=_train, reads_config=True)

    sample = commands.add_parser(
        "sample",
        help="draw images, or continue a text, with a trained model",
        description="Draw images, or continue texts as they are printed, from a run's newest checkpoint: over the "
        "devices of its mesh where there are as many, else on one (--gin.Mesh.fsdp=4 and the like name another mesh).",
    )
    sample.add_argument(
        "workdir", type=_folder, metavar="WORKDIR", help="the folder of a run, which may still be running"
    )
    sample.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to continue; give it again for more (default: beginnings of the validation text)",
    )
    sample.add_argument("--count", type=int, help="samples (default 64 images, 3 texts, or 1 of each prompt)")
    sample.add_argument(
        "--length", type=int, help="tokens to draw (default: with the longest prompt, as many as it was trained on)"
    )
    sample.add_argument("--stop", action="append", metavar="TEXT", help="end a continuation after this text")
    sample.add_argument("--top-k", type=int, metavar="K", help="draw of the K likeliest tokens alone")
    sample.add_argument(
        "--top-p", type=float, metavar="P", help="draw of the likeliest, which have probability P, alone"
    )
    sample.add_argument("--temperature", type=float, default=1.0, help="0 takes what is likeliest (default 1)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    sample.add_argument("--out", type=_path, help="the file (default: WORKDIR/samples.png; texts are printed)")
    sample.add_argument("--trust", action="store_true", help=_TRUST)
    sample.set_defaults(run=_sample, reads_config=True)

    export = commands.add_parser(
        "export",
        help="write a trained model as safetensors, with a model card",
        description="Write a run's newest checkpoint as model.safetensors, with its config and a model card; "
        "attnlab.export.load(FOLDER) gives the model.",
    )
    export.add_argument("workdir", type=_folder, metavar="WORKDIR", help="the folder of a run")
    export.add_argument("--out", type=_path, metavar="FOLDER", help="a new folder (default WORKDIR/export)")
    export.add_argument("--trust", action="store_true", help=_TRUST)
    export.set_defaults(run=_export, reads_config=False, name="export")

    ablate = commands.add_parser(
        "ablate",
        help="run a sweep of arms and seeds, and report on it",
        description="Train every arm with every seed, and write results.jsonl, results.md and report.html.",
    )
    ablate.add_argument("config", metavar="SWEEP", help="a .gin file that configures ablate.Ablation")
    ablate.add_argument(
        "--workdir", type=_folder, help="folder, or gs://..., for runs and report (default runs/ablate/NAME)"
    )
    ablate.add_argument(
        "--cache",
        type=_folder,
        metavar="DIR",
        help="folder of the runs themselves, which sweeps can share (default WORKDIR/runs)",
    )
    _add_hosts(ablate, f"; {_SHARED}")
    ablate.add_argument("--dry-run", action="store_true", help="list what would run, and its cost; run nothing")
    ablate.set_defaults(run=_ablate, reads_config=True)

    report = commands.add_parser(
        "report", help="write the report of an ablation again", description="Write results.md and report.html again."
    )
    report.add_argument("workdir", type=_folder, metavar="WORKDIR", help="the folder of an ablation")
    report.set_defaults(run=_report, reads_config=False, name="report")

    new = commands.add_parser(
        "new",
        help="write a sweep to start from",
        description="Write a commented sweep: a model and its data, two or more mixers, three seeds.",
    )
    new.add_argument("file", type=_path, metavar="FILE", help="the file to write, such as my_sweep.gin")
    new.add_argument(
        "--base",
        default="experiments/lm/quickstart.gin",
        metavar="CONFIG",
        help="model, data and training (default experiments/lm/quickstart.gin)",
    )
    new.add_argument(
        "--arms",
        nargs="+",
        default=[f"experiments/mixers/{name}.gin" for name in ("softmax", "local", "gated_linear")],
        metavar="CONFIG",
        help="of mixers, the first is the baseline (default softmax, local and gated_linear)",
    )
    new.set_defaults(run=_new, reads_config=False, name="new")

    open_ = commands.add_parser(
        "open",
        help="show the report of an ablation in a browser",
        description="Open report.html of an ablation in a browser, or serve it where there is none.",
    )
    open_.add_argument("workdir", type=_path, metavar="WORKDIR", help="the folder of an ablation")
    open_.add_argument(
        "--port", type=int, help="serve it at this port of 127.0.0.1 until Ctrl-C, such as to a browser through ssh -L"
    )
    open_.set_defaults(run=_open, reads_config=False, name="open")

    compile_ = commands.add_parser(
        "compile",
        help="compile a run for a TPU pod that is not there",
        description="Compile the training step for the TPUs of a topology: memory, FLOPs, traffic, and a roofline. "
        "A sweep's arms are compiled at XLA's lowest effort, a run at its usual one, unless JAX_OPTIMIZATION_LEVEL "
        "(O0 to O3) is set.",
    )
    compile_.add_argument("configs", nargs="+", metavar="CONFIG", help="as for train; or a sweep, all of its arms")
    compile_.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:4x4x8, v5e:16x16, v6e:16x16, tpu7x:4x4x8 and the like"
    )
    compile_.add_argument("--workdir", type=_path, help="folder for a sweep's rows (default runs/compile/NAME)")
    compile_.set_defaults(run=_compile, reads_config=True)

    show = commands.add_parser(
        "show",
        help="draw what a mixer sees",
        description="Draw who sees whom, the tiles that this touches, and how far a stack of layers reaches.",
    )
    show.add_argument("configs", nargs="+", metavar="CONFIG", help="a mixer's .gin file, after a model's if any")
    show.add_argument("--length", type=int, default=128, help="tokens, for a language model (default 128)")
    show.add_argument("--out", type=_path, help="the picture (default NAME.png)")
    show.add_argument("--trust", action="store_true", help=_TRUST)
    show.set_defaults(run=_show, reads_config=True)

    bench = commands.add_parser(
        "bench",
        help="time every mechanism against length",
        description="Time every mechanism and measure its memory against length, beside dense attention of jax.nn.",
    )
    bench.add_argument(
        "--device",
        choices=["gpu", "tpu"],
        help="instead, check every kernel on the accelerator, then time it beside other libraries; rows are kept in "
        "device.jsonl, and the same command continues",
    )
    bench.add_argument(
        "--budget", type=float, default=540, help="with --device: seconds after which no case is begun (default 540)"
    )
    bench.add_argument(
        "--tune",
        action="store_true",
        help="with --device: instead, try each kernel's block sizes, and print the table of the fastest",
    )
    bench.add_argument("--lengths", type=int, nargs="+", help="default 1024 2048 ... 65536, of prompts 4096")
    bench.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="mechanisms, named as in its table, whole or up to a comma: linear, 'local, causal'",
    )
    bench.add_argument("--backward", action="store_true", help="time the gradient as well")
    bench.add_argument(
        "--prompts",
        action="store_true",
        help="instead, time how models of causal mixers read a prompt, at once and by steps",
    )
    bench.add_argument(
        "--workdir", type=_path, default=Path("runs/bench"), help="folder for results (default runs/bench)"
    )
    bench.set_defaults(run=_bench, reads_config=False, name="bench")

    regress = commands.add_parser(
        "regress",
        help="regression at test time, without training",
        description="How well untrained mechanisms answer a linear map from examples in their context (regression), "
        "how many pairs memories keep against the width of keys (capacity), and what objectives save where some values "
        "are noise (outliers).",
    )
    regress.add_argument(
        "case",
        nargs="?",
        choices=["regression", "capacity", "outliers"],
        default="regression",
        metavar="CASE",
        help="regression, capacity or outliers (default regression)",
    )
    regress.add_argument("--seeds", type=int, default=20, help="of what is drawn (default 20)")
    regress.add_argument(
        "--workdir", type=_path, default=Path("runs/regress"), help="folder for results (default runs/regress)"
    )
    regress.set_defaults(run=_regress, reads_config=False, name="regress")

    tokenize = commands.add_parser(
        "tokenize",
        help="turn a text into shards of tokens, which data.token_shards reads",
        description="Learn a byte-level BPE of a text, and write the text as tokens into ArrayRecord files.",
    )
    tokenize.add_argument("texts", nargs="+", type=_path, metavar="TEXT", help="a UTF-8 file, or a folder of them")
    tokenize.add_argument("--out", type=_path, required=True, metavar="FOLDER", help="a new folder for the shards")
    tokenize.add_argument("--vocabulary", type=int, default=32768, help="tokens to learn (default 32768)")
    tokenize.add_argument("--tokenizer", type=_path, metavar="FILE", help="use this tokenizer.json, and learn none")
    tokenize.set_defaults(run=_tokenize, reads_config=False, name="tokenize")

    doctor = commands.add_parser(
        "doctor",
        help="say what works on this machine",
        description="Say which devices, kernels and optional parts work on this machine, and what the others need.",
    )
    doctor.set_defaults(run=_doctor, reads_config=False, name="doctor")

    listing = commands.add_parser(
        "list", help="list mixers, tasks and configs", description="List mixers, tasks and the configs that come along."
    )
    listing.set_defaults(run=_list, reads_config=False, name="list")
    if not rest or rest[0] not in commands.choices:  # a command need not wait for it
        _add_completion(parser, commands)
    return parser, parser.parse_args(rest), overrides


def _add_completion(parser: argparse.ArgumentParser, commands: Any) -> None:
    """--print-completion SHELL, where the package shtab is installed."""
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        return
    shtab.add_argument_to(parser, ["--print-completion"], help="print what a shell needs to complete commands")
    kinds = {"config": shtab.FILE, "configs": shtab.FILE, "file": shtab.FILE, "texts": shtab.FILE}
    for command in commands.choices.values():
        for action in command._actions:
            if complete := kinds.get(action.dest, shtab.DIRECTORY if action.type in (_path, _folder) else None):
                action.complete = complete


def _add_hosts(command: argparse.ArgumentParser, alone: str = "") -> None:
    """The options of processes that train a run together. alone: what --processes says without the others."""
    hosts = command.add_argument_group("several processes, of one or more hosts", description=_HOSTS)
    hosts.add_argument("--distributed", action="store_true", help="as the cluster's environment says: TPU pods, SLURM")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="where the first process is to listen")
    hosts.add_argument("--processes", type=int, metavar="N", help=f"how many there are{alone}")
    hosts.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    hosts.add_argument("--heartbeat", type=int, metavar="SECONDS", help=f"{_HEARTBEAT} (default {_DEFAULT_HEARTBEAT})")


def _train(command: argparse.Namespace, overrides: list[str]) -> int:
    is_distributed = _is_distributed(command)
    from attnlab import config
    from attnlab.train import hosts, store, train
    from attnlab.train.memory import keep_freed_memory

    if command.profile < 0:
        raise UserError(f"profile: got {command.profile}; need a number of steps")
    name = "-".join(Path(source).stem for source in command.configs)
    workdir = store.find(command.workdir or f"runs/train/{name}")
    if is_distributed:
        _join(command)
    if any(thing.__name__ == "Ablation" for thing, _ in config.named(command.configs, overrides)):
        raise UserError(f"train: {' '.join(command.configs)} is a sweep of several runs; `attnlab ablate` runs it")
    built = config.build(command.configs, overrides, root="Experiment")
    config.check_read(overrides, built)
    keep_freed_memory()
    is_over = (workdir / "result.json").is_file()
    result = train(
        built.value,
        workdir=workdir,
        fingerprint=built.values,
        config_text=built.text,
        profiled=command.profile,
    )
    if not hosts.is_first():
        return 0
    final = ", ".join(f"{name} {value:.4f}" for name, value in result.final.items())
    print(
        "trained before; " * is_over
        + f"validation: {final}\n{_spent(built.value, result)}\n{workdir / 'metrics.jsonl'}"
    )
    return 0


def _spent(experiment: Any, result: Any) -> str:
    """Where a run's time went, how fast its steps were, and which share of the devices' peak that is, if known."""
    from attnlab.train.compile import peak_flops

    def total(split: str, name: str) -> float:
        return sum(row.get(name, 0.0) for row in result.history if row["split"] == split)

    waited = total("train", "data_seconds")
    seconds = {
        "steps": total("train", "seconds") - waited,
        "data": waited,
        "evaluation": total("validation", "seconds"),
        "checkpoints": total("train", "checkpoint_seconds"),
        "compilation": result.compile_seconds,
    }
    costs, devices = experiment.task.costs(experiment.model), experiment.mesh.build().devices
    speed = f"{result.items_per_second:,.0f} {costs['unit']}s per second"
    if peak := peak_flops(devices.flat[0].device_kind):
        share = (
            3 * costs["flops"] * result.items_per_second / (peak * devices.size)
        )  # the backward is twice the forward
        speed += f", {share:.1%} of the devices' peak in bfloat16"
    return f"time: {', '.join(f'{name} {of:.1f} s' for name, of in seconds.items())}; {speed}"


def _join(command: argparse.Namespace) -> None:
    """Joins the other processes, which `main` leaves in the end."""
    from attnlab.train import hosts

    heartbeat = _DEFAULT_HEARTBEAT if command.heartbeat is None else command.heartbeat
    hosts.join(command.coordinator, command.processes, command.process, heartbeat)
    command.leave = hosts.leave


def _is_distributed(command: argparse.Namespace) -> bool:
    """Whether this is one of several processes that train a run together.

    Raises UserError where the options do not say which.
    """
    named = {name: getattr(command, name) for name in ("coordinator", "processes", "process")}
    given = [name for name, value in named.items() if value is not None]
    if command.run is _ablate and given == ["processes"] and not command.distributed:
        given = []  # they share the runs
    if command.distributed and given:
        raise UserError(f"{given[0]}: got {named[given[0]]} with --distributed, which takes it from the environment")
    if given and len(given) < len(named):
        missing = next(name for name in named if name not in given)
        raise UserError(f"{missing}: need it with --{given[0]}: --coordinator, --processes and --process go together")
    if command.heartbeat is not None and not (given or command.distributed):
        raise UserError(f"heartbeat: got {command.heartbeat} for a single process; need --distributed or --coordinator")
    if command.heartbeat is not None and not 1 <= command.heartbeat <= _MOST_HEARTBEAT:
        raise UserError(f"heartbeat: got {command.heartbeat}; need 1 to {_MOST_HEARTBEAT} seconds")
    if given:
        host, _, port = command.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"coordinator: got {command.coordinator!r}; need HOST:PORT")
        if not 1 <= command.processes <= _MOST_HOSTS:
            raise UserError(f"processes: got {command.processes}; need 1 to {_MOST_HOSTS}")
        if not 0 <= command.process < command.processes:
            raise UserError(f"process: got {command.process}; need 0 to {command.processes - 1}")
    return bool(given) or command.distributed


def _sample(command: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from attnlab import config
    from attnlab.train import LanguageTask, restore_values, store
    from attnlab.train.tasks.base import Illustrated
    from attnlab.train.tasks.texts import TextTask
    from attnlab.train.workdir import last_step

    _check_draws(command)
    workdir = store.find(command.workdir)
    built = _built_of_run("sample", workdir, overrides, command.trust)
    config.check_read(overrides, built)
    experiment = built.value
    model, task = experiment.model, experiment.task
    if not isinstance(task, (Illustrated, TextTask)):
        raise UserError(f"sample: models of {type(task).__name__} draw nothing")
    if isinstance(task, LanguageTask) and (reason := model.decoding_refusal):
        raise UserError(f"sample: this model cannot continue a text: {reason}")
    out = command.out or (workdir / "samples.png" if isinstance(task, Illustrated) else None)
    if out is not None and not store.is_remote(out):
        _check_out(out, is_picture=isinstance(task, Illustrated))
    of_texts = ("prompt", "length", "stop", "top_k", "top_p")
    if isinstance(task, Illustrated) and (given := [name for name in of_texts if getattr(command, name) is not None]):
        raise UserError(f"{given[0]}: got {getattr(command, given[0])!r}; it is for texts, and this run draws images")
    prompts, length = _prompts(command, task, model) if isinstance(task, TextTask) else ([], 0)
    mesh = experiment.mesh.build()
    values = restore_values(experiment, workdir, mesh)
    print(f"step {last_step(workdir)} of {experiment.steps}", file=sys.stderr)
    if mesh.size > 1:
        print(f"sampling on {mesh.size} devices, {experiment.mesh}", file=sys.stderr)
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        options = {"key": jax.random.key(command.seed), "temperature": command.temperature}
        if isinstance(task, Illustrated):
            assert out is not None
            with store.here(out) as path:
                task.illustrate(model, values, path, count=command.count or 64, **options)
            print(f"wrote {out}")
            return 0
        texts = [f"--- after {task.corpus.decode(prompt)!r}\n" for prompt in prompts]
        if out is None:
            print(texts[0], end="", flush=True)
        tokens, start = 0, time.perf_counter()
        draws = {"top_k": command.top_k, "top_p": command.top_p, "stop": command.stop or (), **options}
        for number, added in enumerate(task.continued(model, values, prompts, length=length, **draws)):
            if out is None:
                print(added[0] or "", end="", flush=True)
            texts = [text + (more or "") for text, more in zip(texts, added)]
            if number < 2:  # which read the prompts, and compile
                tokens, start = 0, time.perf_counter()
            else:
                tokens += sum(more is not None for more in added)
        rate = tokens / (time.perf_counter() - start)
        if out is None:
            print("".join(f"\n\n{text}" for text in texts[1:]))
        else:
            out.write_text("\n\n".join(texts) + "\n")
            print(f"wrote {out}")
        if tokens and isinstance(task, LanguageTask):  # others draw all before they give the first
            print(f"{rate:.0f} tokens per second", file=sys.stderr)
    return 0


def _built_of_run(name: str, workdir: Path, overrides: list[str], trusts: bool) -> Any:
    """A run's config as built for the devices that are here: where its mesh does not fit them, for one of them."""
    from attnlab import config
    from attnlab.train import Mesh, store

    if not (workdir / "config.gin").is_file():
        inside = sorted(path.parent for path in workdir.glob("runs/*/config.gin"))
        hint = f", such as {inside[0]}" if inside else " (`attnlab train`)"
        raise UserError(f"{name}: {workdir} has no config.gin; give the folder of a run{hint}")
    with store.here(workdir / "config.gin") as resolved:
        try:
            return config.build([str(resolved)], overrides, root="Experiment", trusts=trusts)
        except UserError:  # of whatever kind: if it is not the mesh's, it comes again
            if any("mesh" in override.partition("=")[0].lower() for override in overrides):
                raise
            one = [f"Mesh.{axis.name}=1" for axis in dataclasses.fields(Mesh)]
            return config.build([str(resolved)], [*overrides, *one], root="Experiment", trusts=trusts)


def _export(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.export import export
    from attnlab.train import store

    workdir = store.find(command.workdir)
    built = _built_of_run("export", workdir, overrides, command.trust)
    if command.out is None and store.is_remote(workdir):
        raise UserError(f"out: need a folder of this machine for a run in {workdir}")
    out = command.out or workdir / "export"
    step = export(built.value, workdir, out, trusts=command.trust)
    print(f"step {step} of {built.value.steps}", file=sys.stderr)
    print(f"wrote {out}")
    return 0


def _prompts(command: argparse.Namespace, task: Any, model: Any) -> tuple[list[Any], int]:
    """Tokens of the texts that are to be continued, and how many tokens to draw of each."""
    if command.prompt is None:
        prompts = task.beginnings(command.count or 3)
    else:
        prompts = [task.corpus.encode(text) for text in command.prompt for _ in range(command.count or 1)]
    if not all(map(len, prompts)):
        raise UserError("prompt: got a text of no tokens; need one at least")
    given = max(map(len, prompts))
    length = task.sequence_length - given if command.length is None else command.length
    if command.length is None and command.prompt is None:
        length = max(length, 1)
    elif command.length is None and length < 1:
        trained = f"it was trained on sequences of {task.sequence_length}"
        raise UserError(f"prompt: got {given} tokens, and {trained}; say with --length how many to draw")
    most = _MOST_DRAWN if model.max_length is None else model.max_length - given + 1
    if not 1 <= length <= most:
        raise UserError(f"length: got {length} after a prompt of {given} tokens; need 1 to {max(most, 1)}")
    return prompts, length


def _check_draws(command: argparse.Namespace) -> None:
    """Refuses numbers that mean nothing, before the run is read."""
    if command.count is not None and not 1 <= command.count <= _MOST_SAMPLES:
        raise UserError(f"count: got {command.count}; need at least 1, at most {_MOST_SAMPLES}")
    if not 0 <= command.temperature < math.inf:
        raise UserError(f"temperature: got {command.temperature}; need at least 0, and a finite one")
    if not 0 <= command.seed <= _MOST_SEED:
        raise UserError(f"seed: got {command.seed}; need 0 to {_MOST_SEED}")
    if command.top_k is not None and command.top_k < 1:
        raise UserError(f"top_k: got {command.top_k}; need at least 1")
    if command.top_p is not None and not 0 < command.top_p <= 1:
        raise UserError(f"top_p: got {command.top_p}; need a number above 0 and at most 1")
    if command.stop is not None and "" in command.stop:
        raise UserError("stop: got an empty text")


def _check_out(out: Path, is_picture: bool, option: str = "out") -> None:
    """Makes the folder of a file that is to be written, before anything slow is done for it."""
    if is_picture and out.suffix not in _PICTURES:
        raise UserError(f"out: got {out}; need a picture, {', '.join(_PICTURES)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        existed = out.exists()
        out.open("a").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise UserError(f"{option}: cannot write to {out} ({error.strerror}); give another") from error


def _ablate(command: argparse.Namespace, overrides: list[str]) -> int:
    is_distributed = _is_distributed(command)
    from attnlab.ablate import dry_run, measure_speed, run_ablation, write_report
    from attnlab.ablate.spread import helpers
    from attnlab.train import hosts, store
    from attnlab.train.memory import keep_freed_memory

    workdir = store.find(command.workdir or f"runs/ablate/{Path(command.config).stem}")
    runs = store.find(command.cache) if command.cache else workdir / "runs"
    sharing = 1 if command.processes is None or is_distributed else command.processes
    if not 1 <= sharing <= _MOST_PROCESSES:
        raise UserError(f"processes: got {sharing}; need at least 1, at most {_MOST_PROCESSES}")
    if command.dry_run:
        if is_distributed:
            raise UserError("dry_run: got it with --distributed or --coordinator; one process alone lists the runs")
        print(dry_run(command.config, overrides, runs))
        return 0
    arguments = [command.config, "--workdir", str(workdir), "--cache", str(runs), *(f"--gin.{o}" for o in overrides)]
    if is_distributed:
        _join(command)
    keep_freed_memory()
    start = time.monotonic()
    with helpers(sharing - 1, arguments, workdir):
        rows = run_ablation(command.config, overrides, workdir, runs=runs)
    reason = None if signals.HELPER in os.environ else measure_speed(command.config, overrides, workdir, rows)

    def report() -> None:
        if reason:
            print(f"speed: not measured ({reason})")
        page = write_report(rows, workdir)
        print(f"\n{(workdir / 'results.md').read_text()}\nreport: {store.whole(page)}")
        print(f"{time.monotonic() - start:.0f} seconds, with compiling, timing and the report")

    hosts.by_first(report)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _report(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.ablate import read_rows, write_report
    from attnlab.train import store

    workdir = store.find(command.workdir)
    print(f"report: {store.whole(write_report(read_rows(workdir), workdir))}")
    return 0


def _new(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab.new import write_sweep

    write_sweep(command.file, command.base, command.arms)
    print(f"wrote {command.file}\nwhat it would run: attnlab ablate {command.file} --dry-run")
    return 0


def _open(command: argparse.Namespace, overrides: list[str]) -> int:
    import functools
    import http.server
    import webbrowser

    page = command.workdir / "report.html"
    if not page.is_file():
        raise UserError(f"open: {command.workdir} has no report.html; give the folder of an ablation that has run")
    if command.port is None and webbrowser.open(page.resolve().as_uri()):
        print(page.resolve())
        return 0
    port = 0 if command.port is None else command.port
    if not 0 <= port <= _MOST_PORT:
        raise UserError(f"port: got {port}; need 0, for any that is free, to {_MOST_PORT}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=command.workdir)
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"port: cannot serve at {port} ({error.strerror}); give another") from error
    with server:
        print(f"http://127.0.0.1:{server.server_port}/{page.name}\nserving until Ctrl-C", flush=True)
        server.serve_forever()
    return 0


def _compile(command: argparse.Namespace, overrides: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: an accelerator that is here stays free
    from attnlab import config
    from attnlab.ablate import compile_arms
    from attnlab.train.compile import compile_step, described_devices
    from attnlab.train.mesh import described

    if any(thing.__name__ == "Ablation" for thing, _ in config.named(command.configs, overrides)):
        if len(command.configs) > 1:
            raise UserError(f"compile: {' '.join(command.configs)} are a sweep and more; give the sweep alone")
        [sweep] = command.configs
        workdir = command.workdir or Path("runs") / "compile" / Path(sweep).stem
        fit = compile_arms(sweep, overrides, command.topology, workdir)
        print(f"wrote {workdir / 'compiled.md'}")
        return 0 if fit else 1
    if command.workdir is not None:
        raise UserError(f"workdir: got {command.workdir}; only a sweep's rows are kept")
    devices = described_devices(command.topology)
    with described(devices):
        built = config.build(command.configs, overrides, root="Experiment")
    config.check_read(overrides, built)
    print(f"compiling for {len(devices)} devices, which takes minutes", file=sys.stderr)
    step = compile_step(built.value, command.topology, devices)
    print(step)
    return 0 if step.fits else 1


def _show(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import config
    from attnlab.show import show
    from attnlab.train import Experiment

    if not 1 <= command.length <= _MOST_SHOWN:
        raise UserError(f"length: got {command.length}; need 1 to {_MOST_SHOWN}, as all pairs of tokens are drawn")
    trusts = command.trust or not any(map(_is_of_a_run, map(config.find, command.configs)))
    sources, named = list(command.configs), config.named(command.configs, overrides, trusts=trusts)
    if any(thing.__name__ == "Ablation" for thing, _ in named):
        raise UserError(f"show: {' '.join(command.configs)} is a sweep; give the files of one of its arms")
    if not any(thing is Experiment and "model" in options for thing, options in named):
        mixers = [(thing, options) for thing, options in named if _is_mixer(thing)]
        images = any(mixer.is_for_grids(options) for mixer, options in mixers)
        sources.insert(0, "experiments/image/digits.gin" if images else "experiments/lm/quickstart.gin")
    out = command.out or Path("-".join(Path(source).stem for source in command.configs) + ".png")
    _check_out(out, is_picture=True)
    built = config.build(sources, overrides, root="Experiment", trusts=trusts)
    config.check_read(overrides, built)
    show(built.value.model, out, length=command.length)
    print(f"wrote {out}")
    return 0


def _is_of_a_run(path: Path) -> bool:
    """Whether a config was written by a run, which may be somebody else's."""
    return path.name == "config.gin" or (path.parent / "run.json").exists()


def _bench(command: argparse.Namespace, overrides: list[str]) -> int:
    import jax

    from attnlab.bench import lengths, prompts

    chosen = sorted(set(command.lengths or ([4096] if command.prompts else [2**power for power in range(10, 17)])))
    if chosen[0] < lengths.WINDOW:
        raise UserError(f"lengths: got {chosen[0]}; need at least the window, {lengths.WINDOW}")
    names = prompts.MIXERS if command.prompts else lengths.NAMES
    if unknown := [name for name in command.only if not lengths.named(name, names=names)]:
        raise UserError(f"only: got {unknown[0]!r}; need some of {'; '.join(names)}")
    if command.tune and command.device != "gpu":
        raise UserError("tune: got it without --device gpu, whose kernels have block sizes to choose from")
    if command.prompts and command.backward:
        raise UserError("backward: got it with --prompts, which have no gradient")
    _check_out(command.workdir / "bench.png", is_picture=True, option="workdir")
    if command.device is not None:
        return _bench_device(command)
    if command.prompts:
        title = f"Reading a prompt, on {jax.devices()[0].device_kind}"

        def keep(rows: list[Any]) -> None:
            prompts.write(rows, command.workdir, title)
            print(prompts.table(rows[-1:]).splitlines()[-1], flush=True)

        rows = prompts.time_prompts(chosen, only=command.only, report=keep)
        print(f"\n{prompts.table(rows)}\n\nwrote {command.workdir / 'prompts.md'}")
        return 0
    rows = lengths.time_lengths(chosen, only=command.only, backward=command.backward)
    passes = "forward and backward" if command.backward else "forward"
    lengths.write(rows, command.workdir, f"Attention against length, {passes}, on {jax.devices()[0].device_kind}")
    print(f"\n{lengths.table(rows)}\n\nwrote {command.workdir / 'bench.png'}")
    return 0


def _bench_device(command: argparse.Namespace) -> int:
    import jax

    from attnlab import __version__
    from attnlab.bench import device
    from attnlab.train.compile import peak_flops

    if command.prompts or command.backward or command.lengths or command.only:
        raise UserError(
            "device: got it with --prompts, --backward, --lengths or --only; it takes all cases, all passes"
        )
    if command.budget < 1:
        raise UserError(f"budget: got {command.budget}; need at least a second")
    facts = {"device": device.kind_of(command.device), "jax": jax.__version__, "attnlab": __version__}
    facts["code"] = device.code_digest("kernels_pallas", "attnlab.attention")
    jax.config.update("jax_platforms", "cpu")  # the device is for the processes that measure
    title = f"{facts['device']}, jax {facts['jax']}, attnlab {facts['attnlab']} (code {facts['code']})"
    folder, processes, trials = command.workdir, 6 if command.device == "gpu" else 1, []
    if command.device == "tpu":
        from attnlab.bench.tpu_cases import cases
    elif command.tune:
        from attnlab.bench import gpu_cases, tuning

        print("looking for the kernels that have a choice", file=sys.stderr)
        trials, folder = tuning.trials(gpu_cases.problems()), command.workdir / "tune"
        cases = functools.partial(tuning.cases, trials)
    else:
        from attnlab.bench.gpu_cases import cases
    left = device.time_cases(cases, facts, folder, budget=command.budget, processes=processes)
    rows = device.rows_of(folder / "device.jsonl", facts)
    shown = device.table(rows, cases(), peak_flops(facts["device"]))
    if command.tune:
        found = tuning.frozen(facts["device"], tuning.fastest(trials, rows))
        shown += f"\n\nFor kernels_pallas/gpu/blocks.py:\n\n```\n{found}\n```"
    (folder / "device.md").write_text(f"# {title}\n\n{shown}\n")
    device.draw(rows, folder / "device.png", title)
    print(f"\n{shown}\n\nwrote {folder / 'device.png'}")
    if left:
        print(f"{left} cases are left; the same command continues")
    return 0


def _doctor(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import doctor

    print(doctor.shown(doctor.findings()))
    return 0


def _regress(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import regress

    if not 1 <= command.seeds <= _MOST_SEQUENCES:
        raise UserError(f"seeds: got {command.seeds}; need 1 to {_MOST_SEQUENCES}")
    picture = command.workdir / f"{command.case}.png"
    _check_out(picture, is_picture=True, option="workdir")
    repeated = f"attnlab regress {command.case} --seeds {command.seeds}"
    print(regress.CASES[command.case].write(command.workdir, seeds=range(command.seeds), command=repeated))
    print(f"\nwrote {picture}")
    return 0


def _tokenize(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import data

    if command.vocabulary < 257:
        raise UserError(f"vocabulary: got {command.vocabulary}; need at least 257, all bytes and the end of a text")
    facts = data.write_token_shards(
        command.texts, command.out, vocabulary=command.vocabulary, tokenizer=command.tokenizer
    )
    parts = ", ".join(f"{facts[part]['tokens']:,} for {part}" for part in ("train", "validation"))
    print(f"{parts}; vocabulary {facts['vocabulary']:,}\nwrote {command.out}")
    return 0


def _list(command: argparse.Namespace, overrides: list[str]) -> int:
    from attnlab import config, nn, train

    def summary(thing: object) -> str:
        """The first sentence of its docstring."""
        paragraph = " ".join(line.strip() for line in (thing.__doc__ or "").strip().split("\n\n")[0].splitlines())
        return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]

    mixers = [thing for _, thing in sorted(config.offered(nn).items()) if _is_mixer(thing)]
    tasks = [thing for name, thing in sorted(config.offered(train).items()) if name.endswith("Task") and name != "Task"]
    for title, things in (("mixers", mixers), ("tasks", tasks)):
        print(title)
        for thing in things:
            _print_row(thing.__name__, 23, summary(thing))
    print("configs")
    for path in config.shipped():
        _print_row(path, 41, config.describe(path))
    return 0


def _print_row(name: str, width: int, text: str) -> None:
    """A name and, beside it or where there is no room below it, what it is. On one line where no terminal reads it."""
    row = f"  {name:<{width}} {text}"
    if not sys.stdout.isatty():
        print(row)
        return
    columns, indent = shutil.get_terminal_size().columns, " " * (width + 3)
    if columns - len(indent) < _LEAST_BESIDE:
        print(f"  {name}")
        row = indent = " " * 6
        row += text
    print(textwrap.fill(row, columns, subsequent_indent=indent, break_on_hyphens=False))


def _is_mixer(thing: Any) -> bool:
    from attnlab.nn import Attention

    return isinstance(thing, type) and issubclass(thing, Attention) and thing is not Attention


if __name__ == "__main__":
    run()
