"""What the three programmes share: flags, the platform they run on, errors as one clear line."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from attnzoom_jax.errors import unknown_name
from attnzoom_jax.training import distributed
from attnzoom_jax.training.search import check_may_be_none
from attnzoom_jax.training.workdir import flatten, to_plain

PLATFORMS = ("", "cpu", "gpu", "tpu")


class _OrNone(flags.ArgumentParser):
    """Reads `None`, and all else as another parser does."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


def define_config_flag(help_text: str) -> None:
    """Define --config, and --config.key=value for each of its keys.

    The value `None` leaves a key to its default, where the config has a placeholder for it.
    """
    for kind, parser in (
        (bool, flags.BooleanParser()),
        (float, flags.FloatParser()),
        (int, flags.IntegerParser()),
        (str, flags.ArgumentParser()),
    ):
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)


def config_overrides() -> dict[str, Any]:
    """{key: value} of what the command line changed in the config."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def run(main: Callable[[], int | None]) -> None:
    """Parse the flags and run a programme; its return value is the exit code.

    A ValueError, a file that is missing, or a loss that is no number is the user's to mend: it is
    printed as its message alone and the exit code is 1; wrong flags have the exit code 2.
    ATTNZOOM_TRACEBACK=1 shows where it was raised. Every programme has the flags
    --coordinator_address, --num_processes and --process_id.
    """
    _define_process_flags()
    app.run(lambda argv: _guard(main, argv), flags_parser=_parse_flags)


def start_devices(platform: str, *, compile_cache: str = "", many: bool = False) -> None:
    """Choose the platform, join other processes, refuse what is not asked for, print the devices.

    Of several processes the first one speaks: what the others print is dropped, but for errors.

    Args:
        platform: "" for JAX's own choice, else "cpu", "gpu" or "tpu": what must be there.
        compile_cache: folder in which compiled programs are kept between runs; "" for none.
        many: whether the programme can have several processes.

    Raises:
        ValueError: unknown platform, or not what JAX finds; other processes that are announced and
            do not come, or that a programme cannot have.
    """
    if platform not in PLATFORMS:
        raise unknown_name("platform", platform, PLATFORMS[1:])
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", compile_cache)
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    use_tpu = platform in ("", "tpu") and os.environ.get("JAX_PLATFORMS") != "cpu"
    announcement = distributed.find_announcement(use_tpu=use_tpu, **_process_flags())
    if announcement and announcement.count and not many:
        raise ValueError(
            f"{announcement.by} announces {announcement.count} processes, and this programme is "
            "one; start it on one host, with --num_processes=1"
        )
    if announcement and many:
        distributed.join(announcement)
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # $JAX_PLATFORMS names what is not there
        raise ValueError(f"JAX finds no device: {error}") from error
    if platform and found != platform:
        raise ValueError(
            f"config.platform is {platform!r} and JAX finds only {found!r} devices; install the "
            f"package's extra for it (cuda or tpu), or pass --config.platform={found}"
        )
    distributed.check_devices(announcement if many else None, platform=platform)
    if jax.process_count() > 1:
        distributed.say_if_ended()
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # to the end of the process
    devices = jax.devices()
    print("device table")
    for kind in sorted({device.device_kind for device in devices}):
        count = sum(device.device_kind == kind for device in devices)
        print(f"  {count} x {kind} ({found}), {jax.process_count()} process(es)", flush=True)


def _define_process_flags() -> None:
    """The flags that tell a process of the others, where nothing else does."""
    flags.DEFINE_string("coordinator_address", None, "Of several processes: host:port of the first")
    flags.DEFINE_integer("num_processes", None, "How many there are; 1: alone, whatever is set")
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0")


def _process_flags() -> dict[str, Any]:
    names = ("coordinator_address", "num_processes", "process_id")
    return {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.keys()  # a file that is not there fails at its first use
            for key, value in config_overrides().items():
                if value is None:
                    check_may_be_none(flags.FLAGS.config, key)
    except Exception as error:  # a config is a programme and may raise anything
        _show_traceback()
        _fail(_explain_flag_error(error, argv), code=2)
    return arguments


def _explain_flag_error(error: Exception, argv: list[str]) -> str:
    """One line for flags that cannot be parsed, from what absl and ml_collections raise."""
    message = str(error.args[0] if error.args else error).strip()
    if isinstance(error, OSError) or "Error whilst parsing config file" in message:
        # ml_collections puts the config file's own error last, under a traceback.
        return f"--config: {message.splitlines()[-1].strip()}"
    if isinstance(error, (AttributeError, KeyError)):
        return str(_unknown_config_key(argv) or message)
    return " ".join(message.split())


def _unknown_config_key(argv: list[str]) -> ValueError | None:
    """The error for the first --config.key that the config does not have."""
    words = [word.lstrip("-") for word in argv[1:] if word.startswith("-")]
    file = next((word.partition("=")[2] for word in words if word.startswith("config=")), None)
    if file is None and "config" in words:  # --config FILE
        file = argv[argv.index("--config") + 1] if "--config" in argv[:-1] else None
    if file is None:
        return None
    known = flatten(to_plain(flags.FLAGS["config"].parser.parse(file)))
    for word in words:
        key = word.partition("=")[0].removeprefix("config.")
        if word.startswith("config.") and key not in known:
            return unknown_name("config key", key, known)
    return None


def _guard(main: Callable[[], int | None], argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; flags look like --name=value", code=2)
    if not any(argument.lstrip("-").startswith("verbosity") for argument in sys.argv[1:]):
        # Orbax tells of every file that it writes, and in each of its threads that one failed.
        debug = os.environ.get("ATTNZOOM_TRACEBACK")
        logging.set_verbosity(logging.ERROR if debug else logging.FATAL)
    try:
        code = main()
    except (ValueError, OSError, FloatingPointError) as error:
        _show_traceback()
        # JAX appends a remark about its own frames to what passes through jit.
        _fail(str(error).partition("\n-----")[0], code=1)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        _show_traceback()
        reason = " ".join(str(error).split())[:200]
        _fail(
            f"another process ended or cannot be reached ({reason}); start all of them again: a "
            "run goes on from its last checkpoint",
            code=1,
        )
    sys.exit(code or 0)


def _show_traceback() -> None:
    if os.environ.get("ATTNZOOM_TRACEBACK"):
        traceback.print_exc()


def _fail(message: str, *, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {distributed.describe_process()}{message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        distributed.end_in_order()
        os._exit(code)  # sys.exit would wait for the others, which wait for this one
    sys.exit(code)
