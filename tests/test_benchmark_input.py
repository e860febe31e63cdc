import jax
import numpy as np
import pytest

from benchmarks import input as benchmark
from benchmarks import synthetic
from metajax import config as config_lib
from metajax.data import pipeline
from tests.conftest import TINY

TABLE = dict(size=8, channels=1, classes=6, images=26)


def test_synthetic_table_is_made_once_and_mapped(tmp_path):
  table = synthetic.load(tmp_path, **TABLE)['train']
  again = synthetic.load(tmp_path, **TABLE)['train']
  assert isinstance(table.images, np.memmap) and table.images.shape == (26, 8, 8, 1)
  assert len(np.unique(table.images)) > 200
  np.testing.assert_array_equal(table.images, again.images)
  assert table.starts.tolist() == [0, 5, 10, 14, 18, 22] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('slow', [False, True])
def test_waiting_is_small_unless_batches_are_slow_to_make(tmp_path, monkeypatch, slow):
  config = config_lib.load(TINY).to_dict()
  kept = {k: config['data'][k] for k in ('way', 'shot', 'query_shot', 'tasks')}
  config['data'] = {'name': 'benchmarks.synthetic', 'placement': 'host', **TABLE, **kept}
  config = config_lib.override(config_lib.complete(config), ['--config.model.name=mlp'])
  prefetch = pipeline.prefetch

  def slowly(make_batch, *arguments):
    return prefetch(lambda step: pipeline.time.sleep(0.1) or make_batch(step), *arguments)

  if slow:
    monkeypatch.setattr(pipeline, 'prefetch', slowly)
  others = sum(x.nbytes for x in jax.live_arrays())  # what tests before have left
  result = benchmark.measure(config, tmp_path, 1.0)
  assert result['steps'] >= 5 and result['device_bytes'] - others < 10**6
  assert result['waiting'] > 0.8 if slow else result['waiting'] < 0.5
