"""The `ii-dist` command: train, eval, show, models, export, recalibrate.

In: arguments. Out: an exit code (`ii_dist.config.errors`). What needs no torch is checked before it is imported.
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ii_dist
from ii_dist.config import (
    NEW_CONFIG_HELP,
    Plan,
    RunConfig,
    UserError,
    data_facts,
    dump_config,
    key_list,
    load_config,
    make_plan,
    ranks_on_a_node,
)
from ii_dist.config.errors import EXIT_DONE, ConfigError, DataError
from ii_dist.runtime import World, this_process
from ii_dist.train.export_request import SUFFIXES, plan_export

if TYPE_CHECKING:
    from ii_dist.train.commands import Outcome

CONFIG_HELP = (
    "YAML file; key=value after it overrides a key, such as optim.lr=0.1, and another YAML file lays its keys over"
)


def run() -> None:
    """Entry point of the console command."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command; a UserError becomes one line on stderr and the exit code of its class."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see ii-dist --help")
    args.overrides += rest  # overrides may stand between and after options
    try:
        return int(args.command(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ii-dist",
        description="Train Inner-Imaging ResNets on one GPU or many. To start several ranks: python -m launch submit.",
        epilog="exit codes: 0 done, 1 bug, 2 config or arguments, 3 data, 4 checkpoint, 5 cluster or environment, "
        "75 stopped as asked and resumable",
    )
    parser.add_argument("--version", action="version", version=f"ii-dist {ii_dist.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train (one rank, or this rank under launch or torchrun); resumes by itself"
    )
    train.add_argument("config", type=Path, help=CONFIG_HELP)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--new-config", type=key_list, default=(), metavar="KEYS", help=NEW_CONFIG_HELP)
    train.set_defaults(command=_train)
    _add_evaluate(commands)
    show = commands.add_parser("show", help="print the resolved config and the plan; starts no torch (but for --plot)")
    show.add_argument("config", type=Path, help=CONFIG_HELP)
    show.add_argument("overrides", nargs="*", metavar="key=value")
    show.add_argument("--ranks", type=int, default=0, help="ranks to plan for (default: what `launch` would start)")
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw the schedule as well (.png, .svg or .pdf)")
    show.set_defaults(command=_show)
    models = commands.add_parser("models", help="every network with every gate: parameters, MACs, published counts")
    models.set_defaults(command=_models, overrides=[])
    _add_export(commands)
    _add_recalibrate(commands)
    return parser


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser(
        "eval", help="exact top-1 and top-5 of a run's newest checkpoint, of a given one, or of a file of weights"
    )
    evaluate.add_argument(
        "path", type=Path, help="run folder, one runs/NAME/checkpoints/step_... folder, or a .safetensors file"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.add_argument("--config", type=Path, help="for a file: the network and the images; see `train`")
    evaluate.add_argument("--score", action="store_true", help="end with a line that is top-1 alone, for programs")
    evaluate.set_defaults(command=_evaluate)


def _add_recalibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    recalibrate = commands.add_parser(
        "recalibrate", help="a file of weights with BatchNorm statistics measured anew on training images (one process)"
    )
    recalibrate.add_argument("path", type=Path, help="a .safetensors file of weights, such as an average of several")
    recalibrate.add_argument("overrides", nargs="*", metavar="key=value")
    recalibrate.add_argument("--config", type=Path, required=True, help="the network and the images; see `train`")
    recalibrate.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make")
    recalibrate.add_argument("--images", type=int, default=10_000, help="rounded up to whole batches (10000)")
    recalibrate.add_argument("--force", action="store_true", help="replace FILE if it is there")
    recalibrate.set_defaults(command=_recalibrate)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = commands.add_parser(
        "export", help="a trained network as one file for other programs, checked by running it"
    )
    export.add_argument("path", type=Path, help="run folder (its newest whole step), or one of its step_... folders")
    export.add_argument(
        "--format", required=True, choices=list(SUFFIXES), help="weights with timm's names, or the computation"
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make")
    export.add_argument("--ema", action="store_true", help="the moving average of the weights instead of the weights")
    export.add_argument("--force", action="store_true", help="replace FILE if it is there")
    export.set_defaults(command=_export, overrides=[])


def _train(args: argparse.Namespace) -> int:
    cfg = load_config(args.config, args.overrides)
    world = this_process()
    plan = _checked_plan(cfg, world)
    from ii_dist.train.commands import train  # torch is imported only after every cheap check has passed

    return _ended(train(cfg, plan, world, args.new_config))


def _evaluate(args: argparse.Namespace) -> int:
    from ii_dist.train.preflight import WEIGHTS_SUFFIX, config_of

    alone = args.path.suffix == WEIGHTS_SUFFIX
    if alone != (args.config is not None):
        raise ConfigError(
            f"{args.path}: "
            + ("a file of weights needs --config CONFIG" if alone else "--config goes with a file only")
        )
    cfg = load_config(args.config or config_of(args.path), args.overrides)
    world = this_process()
    plan = _checked_plan(cfg, world)
    from ii_dist.train.commands import evaluate_checkpoint

    return _ended(evaluate_checkpoint(cfg, plan, world, args.path, args.score))


def _recalibrate(args: argparse.Namespace) -> int:
    cfg = load_config(args.config, args.overrides)
    world = this_process()
    plan = _checked_plan(cfg, world)
    from ii_dist.train.recalibrate import recalibrate

    return _ended(recalibrate(cfg, plan, world, args.path, args.out, args.images, args.force))


def _models(_args: argparse.Namespace) -> int:
    from ii_dist.train.commands import list_models

    return _ended(list_models())


def _export(args: argparse.Namespace) -> int:
    if args.overrides:
        raise ConfigError(f"export takes one checkpoint; {args.overrides[0]!r} is one argument too many")
    request = plan_export(args.path, args.format, args.out, args.ema, args.force)
    from ii_dist.train.export import export_checkpoint

    done = export_checkpoint(request)
    model, data = request.cfg.model, request.cfg.data
    side, weights = data.eval_image_size, " (EMA)" if request.ema else ""
    lenses = f", {done.fused_lenses} lenses folded into one filter each" if done.fused_lenses else ""
    print(
        f"{request.out}: {done.bytes / 1e6:.1f} MB, {model.network} with gate {model.gate} at step {request.step.step}"
        f"{weights}{lenses}\n"
        f"checked on random images: largest difference from the eager network {done.largest_difference:.1e} "
        f"in logits up to {done.largest_logit:.3g}\n"
        f"images: float32 N x 3 x {side} x {side}, (pixel / 255 - {list(data.mean)}) / {list(data.std)}\n"
        f"{done.how_to_load}"
    )
    return EXIT_DONE


def _ended(outcome: "Outcome") -> int:
    if outcome.text:
        print(outcome.text, flush=True)
    return outcome.exit_code


def _checked_plan(cfg: RunConfig, world: World) -> Plan:
    from ii_dist.train.preflight import preflight

    return preflight(cfg, world)


def _show(args: argparse.Namespace) -> int:
    cfg = load_config(args.config, args.overrides)
    print(dump_config(cfg), end="")
    if args.plot is not None:
        from ii_dist.train.schedule_plot import plot_schedule

        plot_schedule(cfg, args.plot)
    world_size = args.ranks or cfg.launch.nodes * ranks_on_a_node(cfg, this_process().gpus)
    try:
        facts = data_facts(cfg.data)
    except DataError as error:
        print(f"\nplan: not known before the data set is there ({error})")
        return EXIT_DONE
    print("\nplan:")
    for key, value in dataclasses.asdict(make_plan(cfg, world_size, facts)).items():
        print(f"  {key}: {list(value) if isinstance(value, tuple) else value}")
    return EXIT_DONE
