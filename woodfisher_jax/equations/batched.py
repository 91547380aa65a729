"""A formula of one block over many of them, as the platform that runs it likes best."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


def map_blocks(function: Callable[[Any], Any], blocks: Any, together: int) -> Any:
    """A function of each block; on a CPU one by one, elsewhere several together.

    On a CPU a block's matrix products occupy all cores, and a batched LAPACK call may
    deadlock beside another (up to jaxlib 0.10). The platform is that for which the
    program is lowered, not the default one of the process that lowers it.

    Args:
        function: Of one block, a pytree of arrays.
        blocks: The same with a leading axis of blocks.
        together: Blocks at a time where they are several, at least 1.

    Returns:
        What the function returns, with a leading axis of blocks.
    """
    one_by_one = partial(jax.lax.map, function)
    in_batches = partial(jax.lax.map, function, batch_size=together)
    return jax.lax.platform_dependent(blocks, cpu=one_by_one, default=in_batches)
