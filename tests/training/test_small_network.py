"""The network of a run without what its masks have emptied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import woodfisher_jax as wf
from woodfisher_jax import models
from woodfisher_jax.training.config import build
from woodfisher_jax.training.resuming.saved_run import SavedRun
from woodfisher_jax.training.small_network import without_structures

IMAGE = (4, 4, 1)


def run(gone):
    """An MLP of 8 and 6 neurons of which some inputs of its second layer are pruned."""
    settings = {"hidden": (8, 6), "num_classes": 3}
    model = models.build_model("mlp", **settings)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *IMAGE)))
    masks = wf.init_masks(variables["params"], "kernel")
    masks["fc2/kernel"] = masks["fc2/kernel"].at[jnp.array(gone, int)].set(False)
    params = wf.apply_masks(variables["params"], masks)
    config = build({"model": {"name": "mlp", **settings}})
    return model, SavedRun(config, {"params": params}, masks, {})


def test_the_config_says_what_is_left_and_outputs_stay():
    model, saved = run([1, 4, 7])
    small = without_structures(saved, IMAGE)
    settings = small.config.model.settings
    assert settings["widths"] == {"fc1": 5}
    assert small.masks["fc1/kernel"].shape == (16, 5)
    images = np.random.default_rng(0).normal(size=(5, *IMAGE)).astype(np.float32)
    rebuilt = models.build_model("mlp", **settings)
    np.testing.assert_allclose(
        jax.jit(rebuilt.apply)(small.variables, images),
        jax.jit(model.apply)(saved.variables, images),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_run_without_empty_structures_is_refused():
    _, saved = run([])
    with pytest.raises(ValueError, match=r"prune\.pattern='structures'"):
        without_structures(saved, IMAGE)
