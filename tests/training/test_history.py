"""Everything that is saved has a number of its own, greater than the last."""

import dataclasses
import json

from woodfisher_jax.training.history import Log


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
