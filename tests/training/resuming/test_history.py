"""Everything that is saved has a number of its own, greater than the last."""

import dataclasses
import json

from woodfisher_jax.training.resuming.history import Log


def test_events_grow_where_steps_do_not() -> None:
    log = Log()
    events = [log.event]
    log.step = 22
    events.append(log.event)
    log.dense = {"top1": 90.0}
    events.append(log.event)
    log.stages.append({"sparsity": 0.5})
    events.append(log.event)
    assert events == [0, 22, 23, 24]


def test_a_log_survives_json() -> None:
    log = Log(step=3, losses=[0.1, 1 / 3], rows=[{"event": "train"}], starved_steps=2)
    assert Log(**json.loads(json.dumps(dataclasses.asdict(log)))) == log


def test_a_run_says_where_it_is() -> None:
    log = Log(step=22, rows=[{"epoch": 1.0, "step": 22}])
    assert log.moment == "epoch 1, step 22"
    log.stages.append({"sparsity": 0.5})
    log.step = 1030
    assert log.moment == "step 1,030, after pruning step 1"
    assert Log().moment == "step 0"
