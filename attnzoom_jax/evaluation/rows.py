"""Rows of a table of attribution methods: "grad_cam@stage4" is a method at a tap.

"grad_cam" alone takes the default tap of the model. A method at the images, such as "gradient", has
no tap. Options are those of the methods: {"smooth_grad": {"samples": 20}}.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from attnzoom_jax import attribution
from attnzoom_jax.attribution.methods import METHODS, create_method, takes
from attnzoom_jax.attribution.taps import INPUT
from attnzoom_jax.errors import unknown_name
from attnzoom_jax.models.taps import default_tap
from attnzoom_jax.training.workdir import to_plain


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: what makes its maps.

    Attributes:
        name: as given, such as "grad_cam@stage4".
        method: a name from attribution's METHODS, or a baseline.
        tap: where maps are taken; "" for the default tap until `at_taps` has filled it in, and for
            what has no tap.
        run: as `attribution.methods.create_method` returns it; None for a baseline.
    """

    name: str
    method: str
    tap: str
    run: Callable[..., jax.Array] | None

    @property
    def has_loop(self) -> bool:
        """Whether the method takes gradients in a loop.

        Those are slow on a CPU where the loop is compiled: call it outside of jit, with a function
        that is jitted (see attribution/chunks.py).
        """
        return self.run is not None and any(takes(self.method, x) for x in ("samples", "steps"))

    def maps(
        self, fn: Callable[[jax.Array], Any], images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Raw maps of images.

        Args:
            fn: images [n, h, w, c] -> logits.
            images: float [n, h, w, c].
            targets: class ids int [n].
            key: PRNG key, for the methods that sample.

        Returns:
            [n, h', w'], of the tap's size, or of the images'.

        Raises:
            ValueError: a baseline, which has no maps; as the method.
        """
        if self.run is None:
            raise ValueError(f"the row {self.name!r} is a baseline; it has no maps")
        return self.run(fn, images, targets, tap=self.tap, key=key)


def parse_rows(
    rows: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    baselines: Collection[str] = (),
) -> list[Row]:
    """Rows by their names; whether their taps exist is seen by `at_taps`, which needs the model.

    Args:
        rows: "method", "method@tap", or one of `baselines`.
        options: {method: {option: value}}, or a ConfigDict; methods that have no row may have some.
        baselines: names that are no methods, such as "center".

    Returns:
        The rows, in the order given.

    Raises:
        ValueError: no rows or one string, a row given twice, an unknown method or option (with near
            matches), a tap that is empty or given to what has none.
    """
    if isinstance(rows, str) or not rows:
        raise ValueError(
            f"methods is {rows!r}; expected a tuple, such as ('grad_cam@stage4', 'gradient')"
        )
    given: Mapping[str, Mapping[str, Any]] = to_plain(options or {})
    made = {}
    for method in (*given, *(row.partition("@")[0] for row in rows)):
        if method in baselines and method not in given:
            made[method] = None
        elif method not in METHODS:
            raise unknown_name("method", method, (*METHODS, *baselines))
        else:
            made[method] = create_method(method, **given.get(method, {}))
    parsed = []
    for name in rows:
        method, at, tap = name.partition("@")
        if at and not tap:
            raise ValueError(f"the row {name!r} has no tap after the @; leave the @ out too")
        if at and not _has_tap(method):
            raise ValueError(f"the row {name!r}: {method} has no tap; write {method!r}")
        if name in (row.name for row in parsed):
            raise ValueError(f"the row {name!r} is given twice")
        parsed.append(Row(name, method, tap, made[method]))
    return parsed


def at_taps(
    rows: Sequence[Row], model: nn.Module, fn: Callable[[jax.Array], Any], images: Any
) -> list[Row]:
    """Rows with the model's default tap where none was given.

    Args:
        rows: of `parse_rows`.
        model: whose default tap it is.
        fn: the model, bound.
        images: [n, h, w, c], or their shape; nothing is computed.

    Returns:
        The rows, in their order.

    Raises:
        ValueError: a tap that the model does not have, with near matches, or without spatial axes.
    """
    taps = {INPUT: images.shape, **attribution.list_taps(fn, images)}
    for row in rows:
        if row.tap and row.tap not in taps:
            raise unknown_name(f"tap in the row {row.name!r}:", row.tap, taps)
        if row.tap and len(taps[row.tap]) != 4:
            raise ValueError(
                f"the row {row.name!r}: the tap has the shape {list(taps[row.tap])}; a map needs "
                "[n, h, w, c]"
            )
    needs = [row for row in rows if not row.tap and _has_tap(row.method)]
    usual = default_tap(model, fn, images) if needs else ""
    return [dataclasses.replace(row, tap=usual) if row in needs else row for row in rows]


def _has_tap(method: str) -> bool:
    return method in METHODS and takes(method, "tap")
