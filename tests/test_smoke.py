"""What tells most about a version of Python or JAX that was not tried yet: each algorithm, from start to test."""

import json

import numpy as np
import pytest

from metajax import config as config_lib
from metajax import main, writer
from tests.conftest import TINY

pytestmark = pytest.mark.smoke

SETTINGS = {  # beyond its name
  'classifier': ['--config.data.batch=8'],
  'mamlpp': ['--config.algorithm.per_step_norm=False'],  # the network has no normalisation
}


@pytest.mark.parametrize('name', config_lib.names('algorithm'))
def test_every_algorithm_trains_resumes_and_is_tested(name, cache, tmp_path):
  arguments = ['metajax', f'--config={TINY}', f'--config.algorithm.name={name}', '--config.model.name=mlp']
  arguments += ['--config.eval_every=2', f'--workdir={tmp_path}', *SETTINGS.get(name, [])]
  assert main.main([*arguments, '--config.total_steps=2', '--mode=train']) == 0
  assert main.main([*arguments, '--config.total_steps=4']) == 0
  records = writer.read(tmp_path)
  assert [record['step'] for record in records if 'train/loss' in record] == [1, 2, 3, 4]
  assert np.isfinite([record['train/loss'] for record in records if 'train/loss' in record]).all()
  result = json.loads((tmp_path / 'test.json').read_text())
  assert result['episodes'] == 20 and 0 <= result['accuracy'] <= 1
