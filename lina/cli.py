"""The console script `lina`: train, doctor, profile, simulate, trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

BAD_OPTION, FAILED, INTERRUPTED = 2, 1, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(BAD_OPTION, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    import lina
    from lina.profile import command as profile
    from lina.simulate import command as simulate
    from lina.train import options

    parser = _Parser(prog="lina", allow_abbrev=False,
                     description="Fast mixture-of-experts layers for PyTorch.",
                     epilog="`lina COMMAND --help` shows a command's options.")
    parser.add_argument("--version", action="version", version=f"lina {lina.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train", allow_abbrev=False, help="train an MoE language model on real text",
        description="Trains a byte-level transformer with MoE layers, by default on the Python standard "
                    "library's sources. Starts its own ranks, or joins torchrun's: "
                    "torchrun --nproc-per-node 2 -m lina.cli train",
        epilog="The summary's a2a and allreduce shares are times in flight on a rank (a2a: experts' "
               "exchange; allreduce: gradients and, with --ep above 1, their norm), so waiting for slower "
               "ranks is part of them; its waiting share is the part of both with no compute beside it. "
               "All are means over ranks and over the traced steps. A former run's checkpoint in OUT is "
               "moved to OUT/checkpoint.old.")
    options.add_arguments(train)
    doctor = commands.add_parser(
        "doctor", help="what this machine can do, and which paths lina will use",
        description="Versions, processors, links, and the paths lina will use and why.")
    trace = commands.add_parser(
        "trace", help="summarise and draw a trace written by lina.trace",
        description="Prints each track's share and bytes, the share of the time spent waiting for the "
                    "network, the share of a2a hidden by rank and layer, and peak memory; writes FILE.png.")
    trace.add_argument("file", metavar="FILE", help="a trace written by lina.trace or lina train")
    simulated = commands.add_parser(
        "simulate", allow_abbrev=False, help="step times of a model on many ranks, by simulation",
        description="Simulates one training step of a published model with the compiled policy, under each "
                    "schedule; docs/simulate.md says what is modelled.")
    simulate.add_arguments(simulated)
    profiled = commands.add_parser(
        "profile", allow_abbrev=False, help="measure links and products, and keep the cost model",
        description="Measures a2a and allreduce over each transport, passes over experts, products and "
                    "copies, fits t = alpha + n * beta to each and keeps the result for "
                    'lina.ddp(..., schedule="auto"); docs/profile.md says what is timed. Starts its own '
                    "ranks, or joins torchrun's.")
    profile.add_arguments(profiled)
    for command in (doctor, simulated, trace):
        command.add_argument("--json", metavar="PATH", help="write the findings as one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status: 0, 1 failed, 2 bad option, 130 interrupted."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    commands: dict[str, Callable[..., int]] = {"train": _train, "doctor": _doctor, "trace": _trace,
                                            "simulate": _simulate, "profile": _profile}
    try:
        return commands[command](**given)
    except KeyboardInterrupt:
        print(f"lina {command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _fail(command: str, error: object, status: int) -> int:
    print(f"lina {command}: error: {error}", file=sys.stderr)
    return status


def _train(**given: object) -> int:
    from lina.train import launch, options
    from lina.train.resolve import resolve

    try:
        resolved = resolve(given)
    except options.OptionError as error:
        return _fail("train", error, BAD_OPTION)
    try:
        launch.launch(resolved)
    except options.OptionError as error:
        return _fail("train", error, BAD_OPTION)
    except (launch.RankError, OSError) as error:
        return _fail("train", error, FAILED)
    except launch.Interrupted as how_to_go_on:
        print(f"\nlina train: interrupted; {how_to_go_on}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _doctor(json: str | None) -> int:
    from lina import doctor, tracefile

    found = doctor.examine()
    print("\n".join(doctor.lines(found)))
    if json is not None:
        try:
            tracefile.write_json(json, found)
        except OSError as error:
            return _fail("doctor", f"--json: {json}, cannot be written: {error.strerror}", BAD_OPTION)
    return 0


def _profile(**given: object) -> int:
    from lina.profile import command
    from lina.train import launch, options

    try:
        command.run(given)
    except options.OptionError as error:
        return _fail("profile", error, BAD_OPTION)
    except (launch.RankError, OSError) as error:
        return _fail("profile", error, FAILED)
    return 0


def _simulate(json: str | None, **given: Any) -> int:
    from lina import tracefile
    from lina.simulate import command

    try:
        found = command.run(**given)
        if json is not None:
            tracefile.write_json(json, found)
    except (OSError, ValueError) as error:
        return _fail("simulate", error, BAD_OPTION)
    return 0


def _trace(file: str, json: str | None) -> int:
    from lina import tracefile

    try:
        ranks = tracefile.read(file)
        found = tracefile.summary(ranks)
        picture = f"{file}.png"
        tracefile.draw(ranks, picture)
        if json is not None:
            tracefile.write_json(json, found)
    except (OSError, ValueError) as error:
        return _fail("trace", error, BAD_OPTION)
    print("\n".join(tracefile.lines(found)))
    print(f"picture   {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
