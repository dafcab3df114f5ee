"""What the three programmes share: flags, the platform they run on, errors as one clear line."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from attnzoom_jax.errors import unknown_name

PLATFORMS = ("", "cpu", "gpu", "tpu")


def define_config_flag(help_text: str) -> None:
    """Define --config, and --config.key=value for each of its keys."""
    config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)


def config_overrides() -> dict[str, Any]:
    """{key: value} of what the command line changed in the config."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def run(main: Callable[[], int | None]) -> None:
    """Parse the flags and run a programme; its return value is the exit code.

    A ValueError or a file that is missing is the user's to mend: it is printed as its message
    alone and the exit code is 1. ATTNZOOM_TRACEBACK=1 shows where it was raised.
    """
    app.run(lambda argv: _guard(main, argv), flags_parser=_parse_flags)


def start_devices(platform: str, *, compile_cache: str = "") -> None:
    """Choose the platform, refuse another one, and print the device table.

    Args:
      platform: "" for JAX's own choice, else "cpu", "gpu" or "tpu": what must be there.
      compile_cache: folder in which compiled programs are kept between runs; "" for none.

    Raises:
      ValueError: unknown platform, or not what JAX finds.
    """
    if platform not in PLATFORMS:
        raise unknown_name("platform", platform, PLATFORMS[1:])
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", compile_cache)
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = jax.default_backend()
    if platform and found != platform:
        raise ValueError(
            f"config.platform is {platform!r} and JAX finds only {found!r} devices; install the "
            f"package's extra for it (cuda or tpu), or pass --config.platform={found}"
        )
    devices = jax.devices()
    print("device table")
    for kind in sorted({device.device_kind for device in devices}):
        count = sum(device.device_kind == kind for device in devices)
        print(f"  {count} x {kind} ({found}), {jax.process_count()} process(es)", flush=True)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error), code=2)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _fail(_explain_config_error(error), code=2)


def _explain_config_error(error: Exception) -> str:
    """One line for a --config that cannot be read, or for a key that it does not have."""
    message = " ".join(str(error.args[0] if error.args else error).split())
    # ml_collections names the nearest key, and leaves open what the message is about.
    return f"unknown config key {message}" if isinstance(error, KeyError) else message


def _guard(main: Callable[[], int | None], argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; flags look like --name=value", code=2)
    if not any(argument.lstrip("-").startswith("verbosity") for argument in sys.argv[1:]):
        logging.set_verbosity(logging.ERROR)  # Orbax tells of every file that it writes
    try:
        code = main()
    except (ValueError, OSError) as error:
        if os.environ.get("ATTNZOOM_TRACEBACK"):
            traceback.print_exc()
        _fail(str(error), code=1)
    sys.exit(code or 0)


def _fail(message: str, *, code: int) -> Any:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
