"""The arms of a sweep compiled for devices that are not there: rows that are kept as they come, and a table of them."""

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

import attnlab.ablate.cache as cache
from attnlab import config, signals
from attnlab.ablate.plan import Plan
from attnlab.errors import UserError, parse_json
from attnlab.train.compile import CompiledStep, compile_step, described_devices
from attnlab.train.mesh import described, shown_sizes
from attnlab.train.store import replace_text
from attnlab.train.workdir import check_path


def compile_arms(
    file: str, overrides: Sequence[str], topology: str, workdir: Path, *, report: Callable[[str], None] = print
) -> bool:
    """Compiles every arm of a sweep, each in a process of its own, and writes workdir/compiled.jsonl and compiled.md.
    Returns whether all of them fit.

    A row that is there already, of the same config, code, libtpu and effort, is not compiled again, so that the same
    command continues; one with an error is. Rows of other sweeps and topologies stay.

    XLA compiles at its lowest effort, unless the environment's JAX_OPTIMIZATION_LEVEL says otherwise: rows come two to
    four times sooner, with some more temporary memory and code than a run's program has.

    Args:
      file, overrides: as in run_ablation. topology: as in described_devices. workdir: takes the rows.
      report: takes lines for the user.
    """
    effort = os.environ.get("JAX_OPTIMIZATION_LEVEL", "O0")
    with described(described_devices(topology)):
        plan = Plan(file, overrides)
    try:
        check_path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir: cannot write to {error.filename} ({error.strerror}); give another") from error
    kept = {(row["sweep"], row["arm"], row["topology"]): row for row in _read(workdir / "compiled.jsonl")}
    all_fit = True
    for number, arm in enumerate(plan.arms, 1):
        run = plan.run(arm, plan.ablation.seeds[0], plan.rates[0])
        code = cache.code_version((*run.built.modules, compile_step.__module__))
        facts = {"values": run.built.values, "data": run.data, "code": code, "effort": effort}
        facts["libtpu"] = metadata.version("libtpu")
        names = {"sweep": Path(file).stem, "arm": arm, "topology": topology}
        row, digest = kept.get(tuple(names.values())), cache.digest(facts)
        if row is None or row["digest"] != digest or row["error"]:
            report(f"[{number}/{len(plan.arms)}] {arm}: compiling for {topology}")
            row = {**names, "digest": digest, "error": "", **_compiled_apart(run.built.text, topology, effort)}
            kept[tuple(names.values())] = row
            replace_text(workdir / "compiled.jsonl", "".join(json.dumps(row) + "\n" for row in kept.values()))
            replace_text(workdir / "compiled.md", table(list(kept.values())) + "\n")
        all_fit &= not row["error"] and step_of(row).fits
        report(f"[{number}/{len(plan.arms)}] {arm}: {row['error'] or _summary(step_of(row))}")
    return all_fit


_FIELDS = {field.name for field in dataclasses.fields(CompiledStep)}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [parse_json(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"workdir: {path} is not JSON lines ({error}); give another folder") from error
    for row in rows:
        known = {"sweep", "arm", "topology", "digest", "error"}
        needed = known if isinstance(row, dict) and row.get("error") else known | _FIELDS
        if not isinstance(row, dict) or not needed <= row.keys():
            raise UserError(f"workdir: {path} has rows of something else; give another folder")
    return rows


def _compiled_apart(text: str, topology: str, effort: str) -> dict[str, Any]:
    """The row of a resolved config, compiled in a process that then gives its memory back."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compile, args=(sender, text, topology, effort), daemon=True)
    process.start()
    sender.close()
    with signals.with_helpers(process.kill, process.join):  # it has nothing to save
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row = {"error": f"the process that compiled it ended with {process.exitcode}"}
        process.join()
    return row


def _compile(sender: Connection, text: str, topology: str, effort: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent, who ends us
    devices = described_devices(topology)
    try:
        jax.config.update("jax_optimization_level", effort)
        with described(devices):
            experiment = config.build([text], root="Experiment").value
        row = dataclasses.asdict(compile_step(experiment, topology, devices))
    except Exception as error:  # of this arm alone
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sender.send(row)


def step_of(row: Mapping[str, Any]) -> CompiledStep:
    """What a row without an error holds."""
    return CompiledStep(**{name: row[name] for name in _FIELDS})


def _summary(step: CompiledStep) -> str:
    return f"{step.shown_memory}; {step.cpu_seconds:.0f} CPU seconds"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line per row; of one device and one step."""
    head = ["arm", "topology", "mesh", "parameters", "tokens", "memory", "FLOPs", "of the model", "HBM, GB", "sent, GB"]
    head += ["compute, ms", "HBM, ms", "interconnect, ms", "kernels", "effort", "CPU s"]
    lines = [head, ["---"] * 3 + ["---:"] * 10 + ["---", "---", "---:"]]
    for row in rows:
        if row["error"]:
            lines.append([row["arm"], row["topology"], row["error"], *[""] * (len(head) - 3)])
            continue
        step = step_of(row)
        cells = [row["arm"], step.topology, shown_sizes(step.mesh), f"{step.parameters / 1e6:,.0f} M"]
        cells += [f"{step.batch_size} x {step.units:,}", step.shown_memory]
        if step.memory is None:
            cells += [""] * 8
        else:
            cells += [f"{step.flops:.3g}", f"{step.model_flops:.3g}", f"{step.hbm_bytes / 1e9:,.0f}"]
            cells.append(f"{step.sent / 1e9:,.1f}")
            cells += [f"{1e3 * step.seconds[name]:,.0f}" for name in ("compute", "HBM", "interconnect")]
            cells.append(", ".join(step.kernels) or "none")
        lines.append([*cells, step.effort, f"{step.cpu_seconds:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
